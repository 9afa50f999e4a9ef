"""Make a packed store of a checkpoint: every expert one record, resumable at any moment, whole or not a store at all.

Records are read by `CheckpointStore`, so that a packed expert is what the engine would have loaded, byte for byte. The
index is written when everything it names is on the disk. docs/packed-store.md describes the folder.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moetier.access import ExpertKey
from moetier.errors import ConfigError, StoreError
from moetier.mapping import LayerMap
from moetier.packing.datafile import DataFile
from moetier.packing.draft import Draft, contents_of, plan_of, refuse_foreign
from moetier.packing.files import resident_header, small_files, write_resident, write_small
from moetier.packing.workers import in_parallel
from moetier.plan import format_size
from moetier.profile import Profile
from moetier.record import FIELD_ALIGNMENT, PAGE, round_up
from moetier.stores.checkpoint import CheckpointStore
from moetier.stores.diskio import aligned_buffer
from moetier.stores.packed_index import INDEX, RESIDENT, PackedIndex, Record, checksum, is_store, sync_folder
from moetier.stores.packed_sources import LayerSources, sources_of, uncovered
from moetier.stores.shards import Shards

if TYPE_CHECKING:
    from moetier.loading import CheckedFolder

THREADS = 4
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Checkpoint:
    """What is packed: a model folder, its shards, and where its experts are in them."""

    folder: Path
    shards: Shards
    maps: Sequence[LayerMap]
    dtype: str  # as asked for: auto, float32, …

    @classmethod
    def open(cls, folder: Path | CheckedFolder, dtype: str = "auto", **options: Any) -> Checkpoint:
        """Find the experts of a local model folder; no weight is loaded. `options` go to `moetier.loading.skeleton`.

        Raises what `moetier.from_pretrained` raises for the checkpoint, and `ConfigError` for a packed store.
        """
        from moetier.loading import CheckedFolder, skeleton

        path = folder.path if isinstance(folder, CheckedFolder) else folder
        if is_store(path):
            raise ConfigError(
                f"{path}: is a packed store itself; give the checkpoint (`moetier unpack` makes it again)"
            )
        made = skeleton(folder, None if dtype == "auto" else getattr(torch, dtype), **options)
        return cls(path, made.shards, made.maps, dtype)


@dataclass(frozen=True)
class Packed:
    """What `pack` did: the index of the store, and the bytes that an earlier, interrupted pack had done already."""

    index: PackedIndex
    resumed_nbytes: int = 0
    was_there: bool = False


def plan(checkpoint: Checkpoint, out: Path, profile: Profile | None = None) -> PackedIndex:
    """Where every record will lie: a file per layer, records on pages, the experts used most first."""
    shards, maps = checkpoint.shards, checkpoint.maps
    store = CheckpointStore(shards, [m.layout for m in maps], [m.recipes for m in maps])
    try:
        phases = [
            [_phase(store, ExpertKey(layer, expert)) for expert in range(len(m.recipes))]
            for layer, m in enumerate(maps)
        ]
    finally:
        store.close()
    records: list[tuple[Record, ...]] = []
    files: list[tuple[str, int]] = []
    for layer, m in enumerate(maps):
        count = len(m.recipes)
        hot = [] if profile is None else [e for e in profile.top(layer, profile.experts) if e < count]
        row: dict[int, Record] = {}
        offset = 0
        for expert in [*hot, *sorted(set(range(count)) - set(hot))]:
            row[expert] = Record(layer, offset, phases[layer][expert], 0)
            offset += round_up(phases[layer][expert] + m.layout.nbytes, PAGE)
        records.append(tuple(row[expert] for expert in range(count)))
        files.append((f"experts-{layer:05d}.bin", offset))
    return PackedIndex(
        out,
        checkpoint.folder.resolve().name,
        shards.fingerprint(),
        shards.witness(),
        checkpoint.dtype,
        tuple(m.layout for m in maps),
        tuple(records),
        tuple(files),
        versions={name: version(name) for name in ("moetier", "transformers")},
    )


def pack(
    checkpoint: Checkpoint,
    out: Path,
    *,
    profile: Profile | None = None,
    again: bool = False,
    threads: int = THREADS,
    progress: Progress = lambda done, total: None,
) -> Packed:
    """Make a packed store in the folder `out`, or go on with one whose making was interrupted.

    `profile` puts the experts of a layer that it says are used most first. `again` throws away what is in `out`, if
    that is a store or a draft of one. Raises `ConfigError` for a folder that cannot be used, `StoreError` when the disk
    is full or fails; what was written then stays, and the same call goes on.
    """
    out = Path(out)
    _check_place(checkpoint, out)
    refuse_foreign(out)
    index = plan(checkpoint, out, profile)
    try:
        with Draft(index) as draft:
            if again:
                draft.clear()
            elif (out / INDEX).exists():
                return Packed(_same(index), was_there=True)
            draft.begin()
            return _Packer(checkpoint, draft, threads, progress).run()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{error.filename or out}: packing stopped: {error.strerror or error}; what is done is kept: make room or "
            "mend the disk, and run the same command again to go on"
        ) from error


class _Packer:
    """One pass over everything that is not done yet."""

    def __init__(self, checkpoint: Checkpoint, draft: Draft, threads: int, progress: Progress):
        self.checkpoint, self.draft, self.index, self.threads = checkpoint, draft, draft.index, threads
        shards, maps = checkpoint.shards, checkpoint.maps
        self.store = CheckpointStore(shards, [m.layout for m in maps], [m.recipes for m in maps])
        found = [sources_of(m) for m in maps]
        self.unknown = next((f"layer {n}: {why}" for n, why in enumerate(found) if isinstance(why, str)), "")
        self.sources = [item for item in found if isinstance(item, LayerSources)]
        if self.unknown:
            names = {name for m in maps for name in m.tensors}
            self.resident = [name for name in _in_order(shards) if name not in names]
        else:
            self.resident = uncovered(shards, self.sources)
        self.done = 0
        self.total = sum(nbytes for _, nbytes in self.index.files) + self._resident_nbytes()
        self._progress = progress
        self._local = threading.local()
        self._files: list[DataFile] = []

    def run(self) -> Packed:
        """Go on until the index is written."""
        try:
            self.draft.recover(self._advance)
            if RESIDENT in self.draft.contents:
                self._advance(self._resident_nbytes())
            resumed = self.done
            self._advance(0)
            self._check_room()
            for name, nbytes in self.index.files:
                self._files.append(DataFile(self.index.folder / name, nbytes))
            self._write_files()
            todo = [key for key in self.index.placed() if key not in self.draft.records]
            for key, (found, exact) in in_parallel(self._pack, todo, self.threads):
                self.draft.record_done(key, found, exact)
                self._advance(self.index.region(key))
            return Packed(self._finish(), resumed)
        finally:
            for file in self._files:
                file.close()
            self.store.close()

    def _resident_nbytes(self) -> int:
        return sum(self.checkpoint.shards.tensors[name].nbytes for name in self.resident)

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        self._progress(self.done, self.total)

    def _check_room(self) -> None:
        """Tell at once that the disk is too small, not after an hour."""
        folder = self.index.folder
        here = [folder / name for name, _ in self.index.files] + [folder / RESIDENT]
        taken = sum(path.stat().st_blocks * 512 for path in here if path.exists())
        header, _ = resident_header(self.checkpoint.shards, self.resident)
        needed = self.total + len(header) - taken
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize
        if needed > free:
            raise StoreError(
                f"{folder}: {format_size(needed)} more are needed ({needed} bytes), {format_size(free)} are free on "
                "its disk; make room, or give a folder on another disk"
            )

    def _write_files(self) -> None:
        folder, shards = self.index.folder, self.checkpoint.shards
        small = small_files(self.checkpoint.folder, shards, None if self.unknown else self.sources)
        for name, content in small.items():
            self.draft.file_done(name, write_small(folder, name, content))
        if RESIDENT not in self.draft.contents:
            self.draft.file_done(RESIDENT, write_resident(folder, shards, self.resident, self._advance))
        for name in set(self.draft.contents) - {*small, RESIDENT}:
            del self.draft.contents[name]  # gone from the model folder since

    def _pack(self, key: ExpertKey) -> tuple[int, bool]:
        """Read, write and sum one record; whether its sources can be had back from it."""
        record, layout = self.index.record(key), self.index.layouts[key.layer]
        if not hasattr(self._local, "buffer"):
            self._local.buffer = aligned_buffer(self.index.slot_nbytes)
        region: memoryview = self._local.buffer[: self.index.region(key)]
        torch.frombuffer(region, dtype=torch.uint8).zero_()  # the gaps between fields are part of the checksum
        own = region[record.phase : record.phase + layout.nbytes]
        for segment in range(self.store.segments(key)):
            self.store.read(key, segment, own)
        exact = not self.unknown and self._exact(key, own)
        self._files[record.file].write(record.offset, region)
        return checksum(key, region), exact

    def _exact(self, key: ExpertKey, own: memoryview) -> bool:
        layout, sources = self.index.layouts[key.layer], self.sources[key.layer]
        if sources.plain(layout):
            return True
        views = layout.views(torch.frombuffer(own, dtype=torch.uint8))
        for item, feed in zip(sources.fields, sources.spans[key.expert], strict=True):
            again = item.restore(views[item.name]).view(torch.uint8)
            begin = 0
            for file, offset, nbytes in feed:
                original = torch.empty(nbytes, dtype=torch.uint8)
                self.store.read_range(file, offset, memoryview(original.numpy()))  # type: ignore[arg-type]
                if not torch.equal(again[begin : begin + nbytes], original):
                    return False
                begin += nbytes
        return True

    def _finish(self) -> PackedIndex:
        for file in self._files:
            file.sync()
        shards, index = self.checkpoint.shards, self.index
        if (shards.fingerprint(), shards.witness()) != (index.fingerprint, index.witness):
            raise StoreError(
                f"{self.checkpoint.folder}: the checkpoint was changed while it was packed; begin anew with --replace"
            )
        inexact = sorted(key for key, (_, exact) in self.draft.records.items() if not exact)
        lossy = self.unknown or (self._why(inexact[0]) if inexact else "")
        records = tuple(
            tuple(replace(r, checksum=self.draft.records[ExpertKey(layer, e)][0]) for e, r in enumerate(row))
            for layer, row in enumerate(index.records)
        )
        finished = replace(index, records=records, contents=dict(self.draft.contents), lossy=lossy)
        sync_folder(index.folder)
        finished.save()
        self.draft.close_for_good()
        return finished

    def _why(self, key: ExpertKey) -> str:
        layout, sources = self.index.layouts[key.layer], self.sources[key.layer]
        for item, own in zip(sources.fields, layout.fields, strict=True):
            if item.dtype != own.dtype:
                was, now = (str(dtype).removeprefix("torch.") for dtype in (item.dtype, own.dtype))
                return f"layer {key.layer}: {own.name} was cast from {was} to {now}, which loses bits"
        return f"layer {key.layer}: the loader's operations cannot be undone for expert {key.expert}"


def _phase(store: CheckpointStore, key: ExpertKey) -> int:
    """Where in a cache line the record must begin to give the bits of the checkpoint: matters in float32 only."""
    if all(field.dtype != torch.float32 for field in store.layout(key.layer).fields):
        return 0
    return store.phase(key) % FIELD_ALIGNMENT


def _in_order(shards: Shards) -> list[str]:
    return [entry.name for entry in sorted(shards.tensors.values(), key=lambda e: (e.file, e.offset, e.nbytes))]


def _same(index: PackedIndex) -> PackedIndex:
    """The finished store in the folder, if it is what was asked for."""
    found = PackedIndex.load(index.folder)
    zeroed = replace(found, records=tuple(tuple(replace(r, checksum=0) for r in row) for row in found.records))
    if plan_of(zeroed) != plan_of(index):
        raise ConfigError(
            f"{index.folder}: holds a packed store of another checkpoint ({found.model}), or one made with other "
            "options; give --replace to make it anew, or another folder"
        )
    for name, item in found.contents.items():
        if contents_of(index.folder / name) != item:
            raise StoreError(f"{index.folder / name}: damaged; give --replace to pack the model again")
    return found


def _check_place(checkpoint: Checkpoint, out: Path) -> None:
    model, target = checkpoint.folder.resolve(), out.resolve()
    if target == model or model in target.parents:
        raise ConfigError(f"{out}: inside the model folder {checkpoint.folder}; give a folder beside it")
    if target in model.parents:
        raise ConfigError(f"{out}: contains the model folder {checkpoint.folder}; give a new folder")
