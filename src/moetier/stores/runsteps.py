"""The steps of a run on the disk: which there are, how one comes to be there, and how it goes.

A step is a folder with a manifest. It appears by one rename, when all of it is on the disk, and disappears by another;
what it names is free only after the folder of steps was synced. Knows folders and manifests; opens no data file.
"""

from __future__ import annotations

import json
import os
import reprlib
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetier.errors import ConfigError, StoreError
from moetier.record import PAGE
from moetier.stores.manifest import BLOCK, FamilyTable, Manifest, numbers_of
from moetier.stores.packed_index import CHECKSUM, Contents, digest, dumps, sync_folder, write_durably

FORMAT = "moetier run"
VERSION = 1
HEAD = "moetier-run.json"
STEPS = "steps"
CHUNK = 4 << 20

Writer = Callable[[Path], object]  # writes an attachment to the path it is given
Tables = Mapping[str, FamilyTable]


@dataclass(frozen=True, slots=True)
class Head:
    """Which model a run trains: its name, for people, and which checkpoint it began from (see `Shards`)."""

    model: str
    fingerprint: str
    witness: str

    def save(self, folder: Path) -> None:
        """Write it; a folder with it is a run. Raises OSError."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "witness": self.witness,
            "page": PAGE,
            "block": BLOCK,
            "checksum": CHECKSUM,
        }
        write_durably(folder / HEAD, (dumps(body | {"digest": digest(body)}) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Head:
        """That of a run. Raises `StoreError` naming the file and the way out."""
        path = folder / HEAD
        try:
            raw = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{folder}: no run, {HEAD} is missing; give the folder of a run") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}; make it readable for this user") from error
        except (ValueError, RecursionError):
            raise StoreError(f"{path}: damaged: not JSON; restore it") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise StoreError(f"{path}: not the head of a run; give the folder of a run")
        if raw.get("version") != VERSION:
            raise StoreError(
                f"{path}: version {reprlib.repr(raw.get('version'))} of the format; this moetier reads {VERSION}: use "
                "the moetier that made the run"
            )
        if raw.pop("digest", None) != digest(raw):
            raise StoreError(f"{path}: damaged or edited: it does not match its digest; restore it")
        if (raw["page"], raw["block"], raw["checksum"]) != (PAGE, BLOCK, CHECKSUM):
            raise StoreError(f"{path}: pages or checksums of another kind; use the moetier that made the run")
        return cls(str(raw["model"]), str(raw["fingerprint"]), str(raw["witness"]))

    def check(self, folder: Path, fingerprint: str | None, witness: str | None) -> None:
        """Raise `StoreError` unless the run began from this checkpoint, as it is now; None: not compared."""
        if fingerprint not in (None, self.fingerprint):
            raise StoreError(
                f"{folder / HEAD}: the run trains {self.model or 'another model'}, and not the checkpoint that was "
                "given; give that one, or another folder for a new run"
            )
        if witness not in (None, self.witness):
            raise StoreError(
                f"{folder / HEAD}: the checkpoint {self.model} was changed since the run began, and the records that "
                "the run has not written are read from there; restore it, or begin a new run in another folder"
            )


class Steps:
    """The steps of a run. `whole` are those that can be gone on from, by step; `free` is told what is named no more.

    `damaged` are manifests that cannot be read, with the reason. Of two steps where the one with the higher sequence
    is not the later one, the other belongs to a past that was left: it is not listed, and `clear` removes it.
    """

    def __init__(self, folder: Path, free: Callable[[Tables], None]):
        self.folder = folder / STEPS
        self.whole: list[Manifest] = []
        self.at: Manifest | None = None  # the step that the run goes on from
        self.damaged: dict[tuple[int, int], StoreError] = {}  # sequence, step
        self._free = free
        self._left: list[Manifest] = []  # to be hidden: of a past that was left, or a rename failed
        self._hidden: list[tuple[Tables, Path]] = []  # perhaps still a step on the disk: until the next sync
        self._sequence = 0
        self._read()

    def _read(self) -> None:
        found = []
        for name in _names(self.folder):
            numbers = numbers_of(name)
            if numbers is None:
                continue
            self._sequence = max(self._sequence, numbers[0])
            try:
                found.append(Manifest.load(self.folder / name))
            except StoreError as error:
                self.damaged[numbers] = error
        for manifest in sorted(found, key=lambda item: -item.sequence):
            if self.whole and manifest.step >= self.whole[0].step:
                self._left.append(Manifest(manifest.step, manifest.sequence, {}))
            else:
                self.whole.insert(0, manifest)

    def choose(self, step: int | None) -> None:
        """Go on from `step`, or from the last one; from none where there is none yet.

        Raises `ConfigError` for a step that is not there, `StoreError` where it, or the last one, is damaged.
        """
        newest = self.whole[-1].sequence if self.whole else 0
        for (sequence, number), error in self.damaged.items():
            if number == step or (step is None and sequence > newest):
                raise StoreError(
                    f"{error}; restore it, or go on from another step (there are: {self._there()})"
                ) from error
        if step is not None:
            self.at = self.find(step)
        elif self.whole:
            self.at = self.whole[-1]

    def find(self, step: int) -> Manifest:
        """A step that is there, else `ConfigError`."""
        for manifest in self.whole:
            if manifest.step == step:
                return manifest
        raise ConfigError(f"step: {self.folder.parent} has no step {step}; there are: {self._there()}")

    def _there(self) -> str:
        return ", ".join(str(item.step) for item in self.whole) or "none"

    def attachment(self, manifest: Manifest, name: str) -> Path:
        """A file of a step, compared with its checksum. Raises `StoreError` for damage, `ConfigError` for no such."""
        if name not in manifest.attachments:
            there = ", ".join(sorted(manifest.attachments)) or "none"
            raise ConfigError(
                f"attachment: step {manifest.step} of {self.folder.parent} has no {name!r}; there are: {there}"
            )
        path = self.folder / manifest.folder / name
        try:
            found = contents_of(path)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}; restore it, or use another step") from error
        if found != manifest.attachments[name]:
            raise StoreError(f"{path}: damaged: it does not match its checksum; restore it, or use another step")
        return path

    def clear(self) -> None:
        """Remove what a writer that was killed left behind. Raises OSError."""
        for name in _names(self.folder):
            if name.startswith("."):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        left, self._left = self._left, []
        for manifest in left:
            self._hide(manifest)
        sync_folder(self.folder)
        self._forget_hidden()

    def publish(self, step: int, tables: Tables, extra: object, attachments: Mapping[str, Writer]) -> None:
        """Make a step; all that `tables` name is on the disk. It is the last one when this returns.

        On errors `tables` are freed, now or when it is certain that the disk does not name them.
        """
        self._sequence += 1
        draft = self.folder / f".draft-{self._sequence}"
        renamed = False
        try:
            draft.mkdir()
            contents = {name: _attach(draft / name, write) for name, write in attachments.items()}
            manifest = Manifest(step, self._sequence, tables, contents, extra)
            manifest.save(draft)
            sync_folder(draft)
            os.rename(draft, self.folder / manifest.folder)
            renamed = True
            sync_folder(self.folder)
        except BaseException:
            if renamed:
                self._left.append(manifest)
                self._hide_left()
            else:
                shutil.rmtree(draft, ignore_errors=True)
                self._free(tables)
            raise
        self._forget_hidden()
        replaced = [item for item in self.whole if item.step >= step]
        self.whole, self.at = [item for item in self.whole if item.step < step] + [manifest], manifest
        broken = [numbers for numbers in self.damaged if numbers[1] >= step]
        for sequence, number in broken:
            replaced.append(Manifest(number, sequence, {}))
            del self.damaged[sequence, number]
        self.remove(replaced)

    def remove(self, manifests: Iterable[Manifest]) -> None:
        """Steps that are wanted no more. What cannot be removed now stays on the disk until the next time."""
        manifests = list(manifests)
        gone = set(map(id, manifests))
        self.whole = [item for item in self.whole if id(item) not in gone]
        self._left.extend(manifests)
        self._hide_left()
        if self._left:
            warnings.warn(
                f"{self.folder}: {self._left[0].folder} could not be removed; its space is not free yet",
                RuntimeWarning,
                stacklevel=4,
            )
        if self._hidden:
            try:
                sync_folder(self.folder)
            except OSError as error:
                warnings.warn(f"{self.folder}: {error.strerror}; space is not free yet", RuntimeWarning, stacklevel=4)
            else:
                self._forget_hidden()

    def _hide_left(self) -> None:
        left, self._left = self._left, []
        for manifest in left:
            try:
                self._hide(manifest)
            except OSError:
                self._left.append(manifest)

    def _hide(self, manifest: Manifest) -> None:
        hidden = self.folder / f".dropped-{manifest.sequence}"
        os.rename(self.folder / manifest.folder, hidden)
        self._hidden.append((manifest.families, hidden))

    def _forget_hidden(self) -> None:
        """The folder was synced: nothing hidden is a step any more."""
        for tables, path in self._hidden:
            self._free(tables)
            shutil.rmtree(path, ignore_errors=True)
        self._hidden.clear()


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read: {error.strerror}; restore it") from error


def _attach(path: Path, write: Writer) -> Contents:
    write(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return contents_of(path)


def contents_of(path: Path) -> Contents:
    """Size and checksum of a file. Raises OSError."""
    nbytes = total = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            nbytes, total = nbytes + len(chunk), zlib.crc32(chunk, total)
    return Contents(nbytes, total)
