"""A store of made-up records in real files: for stress tests and benchmarks that need bytes but no model.

Every word of a record follows from (layer, expert, version), so that each byte can be checked, and a record that mixes
two versions cannot pass. Records can be changed and written; a crash in the middle of a write may tear one.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import torch

from moetier.access import ExpertKey
from moetier.errors import ConfigError, StoreError
from moetier.record import PAGE, RecordLayout
from moetier.stores.checkpoint import SEGMENT_NBYTES, IOMode
from moetier.stores.diskio import DiskFile, aligned_buffer

FORMAT = "moetier synthetic store"
FIELD = "words"
_HEAD = "synthetic.json"
_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that words do not repeat; as a signed 64-bit number


class Pattern:
    """What the words of a record are: version, key, then a ramp that starts where these two say."""

    def __init__(self, nbytes: int):
        self._ramps: dict[torch.device, torch.Tensor] = {}
        self._words = nbytes // 8

    def _ramp(self, device: torch.device) -> torch.Tensor:
        if device not in self._ramps:
            self._ramps[device] = torch.arange(self._words, dtype=torch.int64, device=device) * _STRIDE
        return self._ramps[device]

    def fill(self, words: torch.Tensor, key: ExpertKey, version: int) -> None:
        """Make `words` [N] int64 this version of the record."""
        torch.add(self._ramp(words.device), _seed(key, version), out=words)
        words[0], words[1] = version, _number(key)

    def matches(self, words: torch.Tensor, key: ExpertKey, version: int) -> bool:
        """Whether every byte is of this version."""
        expected = self._ramp(words.device) + _seed(key, version)
        expected[0], expected[1] = version, _number(key)
        return bool(torch.equal(words, expected))


def _number(key: ExpertKey) -> int:
    return (key.layer << 32) + key.expert


def _seed(key: ExpertKey, version: int) -> int:
    mixed = (_number(key) * 0xBF58476D1CE4E5B9 + version * 0x94D049BB133111EB) & (1 << 63) - 1
    return mixed - (1 << 62)


class SyntheticStore:
    """`layers` x `experts` records of `record_nbytes` bytes in a folder, one file per layer.

    The folder is made if it does not exist; one made earlier with the same numbers is used again, with the versions
    its records have by now (`versions`). Raises `ConfigError` for numbers that cannot be, and for a folder that holds
    anything else.
    """

    def __init__(self, folder: Path, layers: int, experts: int, record_nbytes: int, io: IOMode = "auto"):
        if record_nbytes < PAGE or record_nbytes % PAGE:
            raise ConfigError(f"record_size: must be a multiple of {PAGE} bytes, got {record_nbytes}")
        if layers < 1 or experts < 1:
            raise ConfigError(f"at least 1 layer and 1 expert are needed, got {layers} and {experts}")
        self.folder, self.layers, self.experts, self.record_nbytes = folder, layers, experts, record_nbytes
        self.pattern = Pattern(record_nbytes)
        self._layout = RecordLayout.of([(FIELD, torch.int64, (record_nbytes // 8,))])
        self._make()
        self._files = [DiskFile(path, io) for path in self._paths()]
        self._write_fds = [_open_to_write(file) for file in self._files]
        self.versions = self._read_versions()

    def _paths(self) -> list[Path]:
        return [self.folder / f"layer-{layer:04d}.bin" for layer in range(self.layers)]

    def _make(self) -> None:
        head = {"format": FORMAT, "version": 1, "layers": self.layers, "experts": self.experts}
        head["record_nbytes"] = self.record_nbytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            present = sorted(os.listdir(self.folder))
            if not present:
                self._write_all()
                draft = self.folder / f".{_HEAD}.tmp"
                draft.write_text(json.dumps(head) + "\n")
                os.replace(draft, self.folder / _HEAD)  # last: a folder without it is not used
                return
            found = json.loads((self.folder / _HEAD).read_text()) if _HEAD in present else None
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"{self.folder}: not a folder; give a new or empty one for the synthetic store") from None
        except OSError as error:
            if not (self.folder / _HEAD).exists():
                for path in self._paths():
                    path.unlink(missing_ok=True)
            raise StoreError(f"{self.folder}: the synthetic store cannot be made: {error.strerror}") from error
        except ValueError:
            found = None
        if found != head:
            raise ConfigError(
                f"{self.folder}: holds something else than a synthetic store of {self.layers} x {self.experts} records "
                f"of {self.record_nbytes} bytes; give a new or empty folder"
            )

    def _write_all(self) -> None:
        buffer = aligned_buffer(self.record_nbytes)
        words = torch.frombuffer(buffer, dtype=torch.int64)
        for layer, path in enumerate(self._paths()):
            with open(path, "wb", buffering=0) as file:
                for expert in range(self.experts):
                    self.pattern.fill(words, ExpertKey(layer, expert), 0)
                    if file.write(buffer) != self.record_nbytes:
                        raise OSError(errno.ENOSPC, "the disk is full")
                os.fsync(file.fileno())

    def _read_versions(self) -> dict[ExpertKey, int]:
        keys = [ExpertKey(layer, expert) for layer in range(self.layers) for expert in range(self.experts)]
        head = bytearray(16)
        versions = {}
        for key in keys:
            self._files[key.layer].read_into(key.expert * self.record_nbytes, memoryview(head))
            if int.from_bytes(head[8:], "little", signed=True) != _number(key):
                raise StoreError(f"{self._files[key.layer].path}: record {key.expert} is damaged; delete the folder")
            versions[key] = int.from_bytes(head[:8], "little", signed=True)
        return versions

    @property
    def slot_nbytes(self) -> int:
        """Bytes of a slot: those of a record, which are whole pages."""
        return self.record_nbytes

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return all(file.direct for file in self._files)

    def layout(self, layer: int) -> RecordLayout:
        """One field, `words`, [record_nbytes / 8] int64."""
        return self._layout

    def phase(self, key: ExpertKey) -> int:
        """Records begin on a page."""
        return 0

    def segments(self, key: ExpertKey) -> int:
        """Requests of a MiB at most."""
        return -(-self.record_nbytes // SEGMENT_NBYTES)

    def read(self, key: ExpertKey, segment: int, into: memoryview) -> int:
        """Read one part into its place in `into`."""
        part = into[segment * SEGMENT_NBYTES : (segment + 1) * SEGMENT_NBYTES]
        self._files[key.layer].read_into(key.expert * self.record_nbytes + segment * SEGMENT_NBYTES, part)
        return len(part)

    def write(self, key: ExpertKey, segment: int, data: memoryview) -> int:
        """Write one part from its place in `data`."""
        part = data[segment * SEGMENT_NBYTES : (segment + 1) * SEGMENT_NBYTES]
        offset = key.expert * self.record_nbytes + segment * SEGMENT_NBYTES
        file, done = self._files[key.layer], 0
        try:
            while done < len(part):
                done += os.pwrite(self._write_fds[key.layer], part[done:], offset + done)
        except OSError as error:
            raise StoreError(f"{file.path}: writing {len(part)} bytes at offset {offset} failed: {error}") from error
        return done

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        for fd in self._write_fds:
            os.close(fd)
        self._write_fds = []


def _open_to_write(file: DiskFile) -> int:
    """A descriptor that writes as the file is read: past the page cache, if that is allowed."""
    try:
        return os.open(file.path, os.O_WRONLY | os.O_CLOEXEC | (os.O_DIRECT if file.direct else 0))
    except OSError as error:
        raise StoreError(f"{file.path}: cannot be opened for writing: {error.strerror}") from error
