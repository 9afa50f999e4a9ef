"""A run survives a power failure at any moment: a disk that forgets what was not synced, or keeps any part of it.

The run works in a real folder; every call that changes or syncs something is followed. After each call the folder is
made again as a disk might have it: names and bytes that were synced for certain, the rest as the worst case wants it.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moetier.access import ExpertKey
from moetier.record import PAGE
from moetier.stores.runfolder import RunFolder
from test_run_folder import EXPERTS, KEYS, LAYERS, LAYOUT, family, fill, get, made, put

CALLS = [
    "pwritev",
    "fdatasync",
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "rmdir",
    "unlink",
    "ftruncate",
    "posix_fallocate",
]
# which names are there: those of the last sync of their folder (True), or all;
# which bytes: those of the last sync of their file, all, or pages of either
LEFT = [(True, "synced"), (True, "all"), (True, "torn"), (False, "synced"), (False, "torn")]


class Disk:
    """What of a folder is certain to be on the disk. Inodes are held open, so that their numbers stay theirs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.fds: dict[int, int] = {}
        self.look(folder)
        self.root = os.stat(folder).st_ino

    def look(self, path: Path) -> int:
        """Get to know everything from here on; returns the inode."""
        inode = os.stat(path).st_ino
        if inode not in self.fds:
            self.fds[inode] = os.open(path, os.O_RDONLY)
        if path.is_dir():
            for child in path.iterdir():
                self.look(child)
        return inode

    def synced(self, fd: int) -> None:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            self.names[found.st_ino] = self.now(found.st_ino)
        else:
            self.bytes[found.st_ino] = self.content(found.st_ino)

    def now(self, inode: int) -> dict[str, int]:
        path = Path(os.readlink(f"/proc/self/fd/{self.fds[inode]}"))
        return {name: os.stat(path / name).st_ino for name in os.listdir(path)} if path.exists() else {}

    def content(self, inode: int) -> bytes:
        return os.pread(self.fds[inode], os.fstat(self.fds[inode]).st_size, 0)

    def after_the_failure(self, inode: int, target: Path, synced_names: bool, how: str, chance: random.Random) -> None:
        """Make `target` what the disk has."""
        if stat.S_ISDIR(os.fstat(self.fds[inode]).st_mode):
            target.mkdir()
            for name, child in (self.names.get(inode, {}) if synced_names else self.now(inode)).items():
                self.after_the_failure(child, target / name, synced_names, how, chance)
            return
        old, new = self.bytes.get(inode, b""), self.content(inode)
        if how == "all":
            old = new
        elif how == "torn":
            size = max(len(old), len(new))
            sides = [data.ljust(size, b"\0") for data in (old, new)]
            pages = [chance.choice(sides)[begin : begin + PAGE] for begin in range(0, size, PAGE)]
            old = b"".join(pages)
        target.write_bytes(old)

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)


class Watch:
    """Follows a run, and after every call checks what a power failure would leave."""

    def __init__(self, run: RunFolder, tmp_path: Path):
        self.disk, self.tmp_path = Disk(run.folder), tmp_path
        for inode in list(self.disk.fds):  # creation ended before: all of it is synced
            fd = self.disk.fds[inode]
            self.disk.synced(fd)
        self.contents: dict[int, dict[ExpertKey, int]] = {0: {}}  # by serial of the commit; 0: before the first
        self.done = self.begun = 0
        self.cuts = 0
        self.busy = False
        self.chance = random.Random(0)

    def patched(self, name: str) -> Callable[..., Any]:
        plain = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.busy:
                return plain(*args, **kwargs)
            result = plain(*args, **kwargs)
            self.busy = True
            try:
                self.disk.look(self.disk.folder)
                if name in ("fsync", "fdatasync"):
                    self.disk.synced(args[0])
                self.check()
            finally:
                self.busy = False
            return result

        return call

    def check(self) -> None:
        for names, how in (LEFT[self.cuts % len(LEFT)], LEFT[(self.cuts + 1) % len(LEFT)]):  # all of them in turn
            target = self.tmp_path / f"cut-{self.cuts}"
            self.cuts += 1
            self.disk.after_the_failure(self.disk.root, target, names, how, self.chance)
            with RunFolder.open(target, keep=None) as run:
                serial = 0 if run.step is None else run.extra(run.step)
                assert serial in (self.done, self.begun), (names, how, serial, self.done, self.begun)
                damage = list(run.verify())
                assert not damage, (names, how, damage)
                store = family(run)
                for key in KEYS:
                    seed = self.contents[serial].get(key)
                    expected = bytes(LAYOUT.nbytes) if seed is None else fill(LAYOUT.nbytes, seed)
                    assert get(store, key) == expected, (names, how, key)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RunFolder, Watch]]:
    with made(tmp_path / "run", keep=2) as run:
        family(run)
        watch = Watch(run, tmp_path)
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, watch.patched(name))
            yield run, watch
        watch.disk.close()


def test_a_power_failure_after_any_call(watched: tuple[RunFolder, Watch]) -> None:
    run, watch = watched
    store = family(run)
    assert len(KEYS) == LAYERS * EXPERTS
    content: dict[ExpertKey, int] = {}
    for serial, step in enumerate([1, 2, 2, 3, 4], 1):
        for key in (
            KEYS[:2] if serial == 1 else [KEYS[serial % 2]]
        ):  # so that a dropped step's pages are soon used again
            put(store, key, 10 * serial)
            content = content | {key: 10 * serial}
        watch.contents[serial], watch.begun = content, serial
        run.commit(step, serial, {"note": lambda path: path.write_text("note")})
        watch.done = serial
    run.drop(run.steps()[0])
    assert watch.cuts > 100
