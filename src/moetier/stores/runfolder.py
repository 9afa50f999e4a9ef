"""The run folder: where the changed records of a training run live, step by step. The checkpoint stays as it is.

Guarantees, for a kill, a power failure or a full disk at any moment:
- the last committed step is whole, and so is every other one that is kept;
- pages that a committed step names are never written;
- a record or attachment that was damaged is found out when it is read, and not used.

Joins steps (`runsteps`) and families (`runfamily`). Knows no model, cache or optimizer. The format: docs/run-folder.md.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from moetier.errors import ConfigError, MoetierError, StoreError
from moetier.record import RecordLayout
from moetier.stores import ExpertStore
from moetier.stores.checkpoint import IOMode
from moetier.stores.extents import FULL, ExtentFile
from moetier.stores.manifest import FamilyTable, Manifest, check_name
from moetier.stores.packed_index import sync_folder
from moetier.stores.runfamily import Initial, Records, RunFamily, Verify, described, same_layouts
from moetier.stores.runlock import LOCK, FolderLock
from moetier.stores.runsteps import HEAD, STEPS, Head, Steps, Writer
from moetier.stores.runverify import damaged


class RunFolder:
    """A run, open for writing by one process, or for reading by several. A context manager; see `create` and `open`.

    Families may be read and written from many threads; the methods of the run itself are for one at a time.
    """

    def __init__(self, folder: Path, head: Head, step: int | None, keep: int | None, write: bool, io: IOMode):
        if keep is not None and keep < 1:
            raise ConfigError(f"keep: at least 1 step must be kept, got {keep}")
        self.folder, self.head, self.keep = folder, head, keep
        self._write, self._io = write, io
        self._committing = threading.Lock()
        self._families: dict[str, Records] = {}
        self._closed = False
        self._lock = FolderLock(folder, write)
        try:
            with _explained(folder, "the run cannot be opened"):
                self._steps = Steps(folder, self._free)
                self._steps.choose(step)
                if write:
                    self._steps.clear()
                    for path in folder.glob(".scratch-*.bin"):  # of a process that was killed while it made one
                        path.unlink(missing_ok=True)
                self._open_families()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        model: str,
        fingerprint: str,
        witness: str = "",
        keep: int | None = 1,
        io: IOMode = "auto",
    ) -> RunFolder:
        """A new run in a new or empty folder. `fingerprint` and `witness` say from which checkpoint it begins.

        `keep` is how many steps `commit` leaves; None: all. Raises `ConfigError` for a folder that holds something,
        `StoreError` where it cannot be written.
        """
        folder, head = Path(folder), Head(model, fingerprint, witness)
        with _explained(folder, "the run cannot be made"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise ConfigError(f"{folder}: not a folder; give a new or empty one for the run") from None
            present = set(os.listdir(folder))
            if HEAD in present:
                raise ConfigError(f"{folder}: holds a run already; go on with it (open), or give another folder")
            if present - {LOCK, STEPS, f".{HEAD}.tmp"}:
                raise ConfigError(f"{folder}: holds other files; give a new or empty folder for the run")
            (folder / STEPS).mkdir(exist_ok=True)
            head.save(folder)
            sync_folder(folder.absolute().parent)
        return cls(folder, head, None, keep, True, io)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        step: int | None = None,
        fingerprint: str | None = None,
        witness: str | None = None,
        keep: int | None = 1,
        write: bool = True,
        io: IOMode = "auto",
    ) -> RunFolder:
        """Go on with a run from its last committed step, or from `step`; everything behind it is undone.

        Later steps stay until the next commit, which replaces them. With a `fingerprint` (and a `witness`) the run
        must have begun from that checkpoint, as it was. Raises `StoreError` for damage, another checkpoint and another
        version of the format, `ConfigError` where another process has the run, and for a step that is not there.
        """
        folder = Path(folder)
        head = Head.load(folder)
        head.check(folder, fingerprint, witness)
        return cls(folder, head, step, keep, write, io)

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether a folder holds a run."""
        return (Path(folder) / HEAD).is_file()

    # -- reading and writing -------------------------------------------------------------------------------------------

    def family(
        self,
        name: str,
        layouts: Sequence[RecordLayout] | None = None,
        *,
        experts: Sequence[int] | None = None,
        base: ExpertStore | None = None,
        initial: Initial | None = None,
        verify: Verify = "first",
    ) -> RunFamily:
        """The store of a family of records, one per expert.

        `layouts` (of each layer) and `experts` (how many each has) may be left out with a `base`, which is read where
        nothing was written; without one, `initial` makes such records, or they are zeros. Closing the store closes the
        base. Raises `StoreError` where the run has the family in other layouts.
        """
        self._check_open()
        check_name(name, "family")
        if verify not in ("first", "always"):
            raise ConfigError(f"verify: unknown way {verify!r}: use first or always")
        if base is not None:
            layouts = [base.layout(layer) for layer in range(base.layers)] if layouts is None else layouts
            experts = [base.experts] * base.layers if experts is None else experts
        if layouts is None or experts is None or len(layouts) != len(experts) or not layouts:
            raise ConfigError(f"family {name!r}: layouts and experts must have one entry per layer")
        if base is not None and not same_layouts(layouts, [base.layout(layer) for layer in range(base.layers)]):
            raise ConfigError(f"family {name!r}: the layouts are not those of its base")
        records = self._families.get(name)
        if records is None:
            records = self._new_records(name, FamilyTable(tuple(layouts), tuple(experts), {}))
        elif not same_layouts(records.layouts, layouts) or records.experts != tuple(experts):
            raise StoreError(
                f"{self.folder}: the run has {name!r} as {described(records.layouts, records.experts)}, but "
                f"{described(layouts, experts)} is asked for; load the model as it was when the run began, or begin a "
                "new run in another folder"
            )
        return RunFamily(self.folder, records, base, initial, verify, self._write)

    def commit(self, step: int, extra: Any = None, attachments: Mapping[str, Writer] | None = None) -> None:
        """Make everything written so far a step that stays, or raise `StoreError` and change nothing.

        `extra` is anything that JSON takes (`ConfigError` if not), `attachments` are files beside it, each written by
        its function to the path that it is given. The step takes the place of the same and of later ones, and the
        oldest go beyond `keep`. Caches over the families must have been flushed. After an error it can be tried again.
        """
        self._check_writable()
        attachments = dict(attachments or {})
        for name in attachments:
            check_name(name, "attachment")
        if step < 0:
            raise ConfigError(f"step: counts from 0, got {step}")
        try:
            extra = json.loads(json.dumps(extra))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"extra: must be what JSON can hold: {error}") from None
        with self._committing:
            self._check_written(step)
            tables = None
            try:
                for records in self._families.values():
                    records.sync()
                tables = {name: records.snapshot() for name, records in self._families.items()}
                for records in self._families.values():
                    records.sync()  # what was written between the two
                self._check_written(step)
            except BaseException:
                if tables is not None:
                    self._free(tables)
                raise
            with _explained(self.folder, f"step {step} could not be committed"):
                self._steps.publish(step, tables, extra, attachments)
            if self.keep is not None:
                self._steps.remove(self._steps.whole[: -self.keep])

    def _check_written(self, step: int) -> None:
        for name, records in self._families.items():
            for key, why in list(records.failed.items()):
                raise StoreError(
                    f"{self.folder}: step {step} cannot be committed: {name} of layer {key.layer}, expert {key.expert} "
                    f"could not be written ({why}); write them again, or roll back"
                )

    def rollback(self) -> None:
        """Undo everything since the last commit, or since the run was opened. Caches must forget what they hold."""
        self._check_writable()
        with self._committing:
            for name, records in self._families.items():
                table = None if self._steps.at is None else self._steps.at.families.get(name)
                records.reset({} if table is None else table.records)

    def go_back(self, step: int) -> None:
        """Undo everything behind a step, as if the run had been opened there. Caches must forget what they hold.

        Later steps stay until the next commit. Raises `ConfigError` for a step that is not there.
        """
        self._check_writable()
        self._steps.choose(step)
        self.rollback()

    # -- steps ---------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int | None:
        """The step that the run goes on from: the last one committed, or the one it was opened at. None: none yet."""
        return None if self._steps.at is None else self._steps.at.step

    def steps(self) -> list[int]:
        """All steps that can be opened, ascending."""
        return [manifest.step for manifest in self._steps.whole]

    def extra(self, step: int) -> Any:
        """What was committed with the step. Raises `ConfigError` for a step that is not there, as do the next ones."""
        return self._step(step).extra

    def attachments(self, step: int) -> list[str]:
        """The names of the files that were committed with the step."""
        return sorted(self._step(step).attachments)

    def attachment(self, step: int, name: str) -> Path:
        """A file that was committed with the step, to be read only. Raises `StoreError` where it is damaged."""
        return self._steps.attachment(self._step(step), name)

    def drop(self, step: int) -> None:
        """Remove a step; what only it held is free. The one that the run goes on from cannot be dropped."""
        self._check_writable()
        manifest = self._step(step)
        if manifest is self._steps.at:
            raise ConfigError(f"step: {step} is the one that the run goes on from; commit another one first")
        with self._committing:
            self._steps.remove([manifest])
            for records in self._families.values():
                records.file.trim()

    def verify(
        self, step: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[str]:
        """Read every record and attachment of a step, or of all, and say what is damaged.

        What several steps have in common is read once; `progress` is told of bytes of records, done and of all.
        """
        self._check_open()
        return damaged(self._steps, self._families, step, progress)

    def stats(self) -> dict[str, dict[str, int]]:
        """Bytes of every family: its file, what of it is in use, and what was written since the run was opened."""
        return {
            name: {"file": records.file.size, "used": records.file.used, "written": records.written_nbytes}
            for name, records in self._families.items()
        }

    def close(self) -> None:
        """Close the files and let others have the run; what was not committed is gone. Again is harmless."""
        self._closed = True
        for records in self._families.values():
            records.file.close()
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _open_families(self) -> None:
        """Open the data files that steps name, with everything that they name in use."""
        tables: dict[str, list[FamilyTable]] = {}
        for manifest in self._steps.whole:
            for name, table in manifest.families.items():
                tables.setdefault(name, []).append(table)
        for name, found in tables.items():
            own = self._steps.at.families.get(name) if self._steps.at is not None else None
            if not (self.folder / _file_name(name)).is_file():
                raise StoreError(f"{self.folder / _file_name(name)}: missing; restore it")
            records = self._records(name, own or found[-1])
            if own is not None:
                end = max((item.offset + item.nbytes for item in own.records.values()), default=0)
                if end > records.file.size:
                    raise StoreError(
                        f"{records.file.path}: truncated: {records.file.size} bytes, but step {self.step} needs {end}; "
                        "restore it, or go on from another step"
                    )
            try:
                records.file.claim((i.offset, i.nbytes) for table in found for i in table.records.values())
            except ValueError as error:
                raise StoreError(f"{self.folder / STEPS}: the steps contradict each other: {error}") from error
            if own is not None:
                records.reset(own.records)
            records.file.trim()

    def _records(self, name: str, like: FamilyTable) -> Records:
        file = ExtentFile(self.folder / _file_name(name), self._io, self._write)
        records = self._families[name] = Records(name, file, like.layouts, like.experts)
        return records

    def _new_records(self, name: str, like: FamilyTable) -> Records:
        if not self._write:
            raise ConfigError(f"family {name!r}: step {self.step} of {self.folder} has no such family")
        with _explained(self.folder, f"{_file_name(name)} cannot be made"):
            records = self._records(name, like)
            records.file.trim()  # of a run that was killed before its first step
            sync_folder(self.folder)
        return records

    def _free(self, tables: Mapping[str, FamilyTable]) -> None:
        for name, table in tables.items():
            self._families[name].release(table)

    def _step(self, step: int) -> Manifest:
        self._check_open()
        return self._steps.find(step)

    def _check_open(self) -> None:
        if self._closed:
            raise MoetierError(f"{self.folder}: the run is closed")

    def _check_writable(self) -> None:
        self._check_open()
        if not self._write:
            raise ConfigError(f"{self.folder}: the run was opened for reading; open it with write=True")


def _file_name(family: str) -> str:
    return f"{family}.bin"


@contextmanager
def _explained(folder: Path, what: str) -> Iterator[None]:
    """The system's errors as moetier's own."""
    try:
        yield
    except MoetierError:
        raise
    except (OSError, SafetensorError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "; make room on its disk" if getattr(error, "errno", None) in FULL else ""
        raise StoreError(f"{getattr(error, 'filename', None) or folder}: {what}: {cause}{hint}") from error
