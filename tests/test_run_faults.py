"""What a run folder does when the disk fails, is full, or gives back other bytes than it got."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moetier.errors import ConfigError, StoreError
from moetier.record import PAGE, RecordLayout
from moetier.stores.manifest import BLOCK
from moetier.stores.packed_index import digest
from moetier.stores.runfolder import RunFolder
from test_run_folder import BIG, EXPERTS, KEYS, LAYERS, LAYOUT, family, fill, get, holds, made, put

FAULTS = [errno.EIO, errno.ENOSPC]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """A run with a step 1 (records 0 and 1 are seeds 1 and 2) and a changed record 0 (seed 3)."""
    with made(tmp_path / "run", keep=None) as opened:
        store = family(opened)
        put(store, KEYS[0], 1)
        put(store, KEYS[1], 2)
        opened.commit(1, "one")
        put(store, KEYS[0], 3)
        yield opened


def check_first_step(folder: Path) -> None:
    """Step 1 is there, whole, and the last one."""
    with RunFolder.open(folder) as again:
        assert again.steps() == [1] and again.extra(1) == "one" and not list(again.verify())
        assert holds(family(again), {KEYS[0]: 1, KEYS[1]: 2, KEYS[2]: None})


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, at: int = 0) -> Iterator[list[int]]:
    """`os.<name>` fails from its `at`-th call on; gives the count of calls."""
    plain: Callable[..., Any] = getattr(os, name)
    calls = [0]

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > at:
            raise OSError(number, os.strerror(number))
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        yield calls


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize("name", ["pwritev", "posix_fallocate"])
def test_a_write_that_fails(run: RunFolder, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = family(run)
    fresh = KEYS[2:] + KEYS[:1]
    with failing(monkeypatch, name, number), pytest.raises(StoreError, match=rf"weights\.bin: .*{os.strerror(number)}"):
        for key in fresh:  # the file has room for some
            put(store, key, 4)
    failed = next(key for key in fresh if get(store, key) != fill(LAYOUT.nbytes, 4))
    assert holds(store, {KEYS[0]: 3, KEYS[1]: 2, failed: None if failed != KEYS[0] else 3})
    with pytest.raises(
        StoreError, match=r"step 2 cannot be committed: weights of layer \d, expert \d could not be wri"
    ):
        run.commit(2)
    put(store, failed, 5)
    run.commit(2)
    run.close()
    with RunFolder.open(run.folder) as again:
        assert holds(family(again), {KEYS[0]: 3, KEYS[1]: 2, failed: 5}) and not list(again.verify())


def test_a_failed_write_is_forgotten_by_rollback(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing(monkeypatch, "pwritev", errno.EIO), pytest.raises(StoreError):
        put(family(run), KEYS[0], 4)
    run.rollback()
    run.commit(2)
    assert holds(family(run), {KEYS[0]: 1, KEYS[1]: 2})


def test_a_write_that_is_cut_short_goes_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.pwritev

    def little(fd: int, parts: list[memoryview], offset: int) -> int:
        return plain(fd, [parts[0][: 100 * PAGE]], offset)

    monkeypatch.setattr(os, "pwritev", little)
    store = family(run, "big", BIG)
    for phase in (0, 64):
        put(store, KEYS[0], 9, phase)
        assert get(store, KEYS[0]) == fill(BIG.nbytes, 9)


def test_a_file_system_without_direct_writes(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, direct = os.pwritev, family(run).direct

    def refuses(fd: int, parts: list[memoryview], offset: int) -> int:
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", refuses)
    put(family(run), KEYS[3], 8)
    run.commit(2)
    assert holds(family(run), {KEYS[3]: 8, KEYS[0]: 3})
    assert family(run).direct == direct


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize("name", ["fdatasync", "fsync", "mkdir", "rename"])
def test_a_commit_that_fails(run: RunFolder, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call that can fail: step 1 stays, and committing again makes a whole step 2."""
    at = 0
    while True:
        with failing(monkeypatch, name, number, at) as calls:
            try:
                run.commit(2, attachments={"note": lambda path: path.write_text("two")})
            except StoreError as error:
                assert os.strerror(number) in str(error) and str(run.folder) in str(error)
            else:
                assert calls[0] <= at
                break
        copy = run.folder.with_name("copy")
        shutil.copytree(run.folder, copy)
        check_first_step(copy)
        shutil.rmtree(copy)
        assert run.steps() == [1] and holds(family(run), {KEYS[0]: 3, KEYS[1]: 2})
        put(family(run), KEYS[2], at)  # whatever was published in the meantime is not overwritten
        at += 1
    assert at > 0
    run.close()
    with RunFolder.open(run.folder, keep=None) as again:
        assert again.steps() == [1, 2] and again.attachment(2, "note").read_text() == "two" and not list(again.verify())
        assert holds(family(again), {KEYS[0]: 3, KEYS[1]: 2, KEYS[2]: at - 1})
    with RunFolder.open(run.folder, step=1, keep=None) as again:
        assert holds(family(again), {KEYS[0]: 1, KEYS[1]: 2})


def test_after_a_failed_sync_everything_is_written_again(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may call pages clean that it could not write: a second sync that succeeds proves nothing."""
    put(family(run), KEYS[2], 4)
    with failing(monkeypatch, "fdatasync", errno.EIO), pytest.raises(StoreError, match="could not be brought to the"):
        run.commit(2)
    before = run.stats()["weights"]["written"]
    run.commit(2)
    assert run.stats()["weights"]["written"] - before == 2 * PAGE
    run.close()
    with RunFolder.open(run.folder) as again:
        assert holds(family(again), {KEYS[0]: 3, KEYS[1]: 2, KEYS[2]: 4}) and not list(again.verify())


def test_a_record_that_a_failed_sync_lost_is_not_committed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing(monkeypatch, "fdatasync", errno.EIO), pytest.raises(StoreError):
        run.commit(2)
    scribble(run.folder / "weights.bin", 2 * PAGE + 10)  # the third extent: record 0 as it is now
    with pytest.raises(StoreError, match=r"weights of layer 0, expert 0 .* damaged"):
        run.commit(2)
    put(family(run), KEYS[0], 5)
    run.commit(2)
    assert holds(family(run), {KEYS[0]: 5}) and not list(run.verify())


def test_an_attachment_that_cannot_be_written(run: RunFolder) -> None:
    from safetensors import SafetensorError

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    with pytest.raises(StoreError, match="step 2 could not be committed: I/O error: No space left"):
        run.commit(2, attachments={"a": full})
    with pytest.raises(StoreError, match="No such file"):
        run.commit(2, attachments={"a": lambda path: None})
    with pytest.raises(ZeroDivisionError):
        run.commit(2, attachments={"a": lambda path: 1 // 0})
    assert not list((run.folder / "steps").glob(".*"))
    check_first_step(Path(shutil.copytree(run.folder, run.folder.with_name("copy"))))


def test_steps_that_cannot_be_removed_are_removed_later(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.keep = 1
    plain = os.rename

    def stuck(source: Any, target: Any) -> None:
        if ".dropped" in str(target):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stuck)
        with pytest.warns(RuntimeWarning, match=r"step-1\.1 could not be removed"):
            run.commit(2)
    assert run.steps() == [2] and run.stats()["weights"]["used"] == 3 * PAGE
    run.commit(3)
    assert run.stats()["weights"]["used"] == 2 * PAGE
    assert [path.name for path in (run.folder / "steps").iterdir()] == ["step-3.3"]


def in_child(work: Callable[[], object]) -> str:
    """What a function returns, or the error it raises, in a forked process."""
    hear, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, but none that the child needs
        child = os.fork()
    if not child:
        try:
            answer = str(work())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(tell, answer.encode())
        os._exit(0)
    os.close(tell)
    with open(hear) as told:
        answer = told.read()
    os.waitpid(child, 0)
    return answer


def grow_until_refused(folder: Path) -> int:
    """Write and commit under a limit of the system for the size of files; go on when it is gone."""
    with RunFolder.open(folder, keep=None) as run:
        store = family(run)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6 * PAGE, hard))
        written = 0
        with pytest.raises(StoreError, match=r"weights\.bin: .*File too large; make room"):
            for seed in range(9):
                put(store, KEYS[seed % 6], 50 + seed)
                written += 1
                run.commit(100 + seed)
        assert run.steps() == [1] + [100 + seed for seed in range(written)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        put(store, KEYS[written % 6], 99)
        run.commit(200)
        assert not list(run.verify())
        return written


def test_a_file_that_may_not_grow(run: RunFolder) -> None:
    """A limit of the system, and no patched function: the store goes on once there is room."""
    run.close()
    written = int(in_child(lambda: grow_until_refused(run.folder)))
    assert 0 < written < 9
    with RunFolder.open(run.folder) as again:
        assert holds(family(again), {KEYS[written % 6]: 99, KEYS[written - 1]: 50 + written - 1})


# -- damage ------------------------------------------------------------------------------------------------------------


def scribble(path: Path, offset: int, count: int = 2) -> None:
    """Turn bits of some bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 0x40 for byte in old))
        os.fsync(file.fileno())


@pytest.mark.parametrize("offset", [0, LAYOUT.nbytes // 2, LAYOUT.nbytes - 2])
@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_torn_record_is_never_used(run: RunFolder, offset: int, verify: Any) -> None:
    run.close()
    scribble(run.folder / "weights.bin", PAGE + offset)
    with RunFolder.open(run.folder) as again:
        store = family(again, verify=verify)
        for _ in range(2):
            with pytest.raises(
                StoreError, match=r"weights\.bin: weights of layer 0, expert 1 .* damaged.*another step"
            ):
                get(store, KEYS[1])
        assert holds(store, {KEYS[0]: 1})
        assert [line.split(":")[0] for line in again.verify()] == ["step 1"]
        put(store, KEYS[1], 7)
        again.commit(2)
        assert holds(store, {KEYS[1]: 7})


def test_damage_in_one_of_many_blocks(tmp_path: Path) -> None:
    with made(tmp_path / "run") as run:
        put(family(run, layout=BIG), KEYS[0], 1)
        run.commit(1)
    scribble(run.folder / "weights.bin", BLOCK + 77)
    with RunFolder.open(run.folder) as run:
        store = family(run, layout=BIG)
        into = memoryview(bytearray(BIG.nbytes))
        assert store.segments(KEYS[0]) == 3
        store.read(KEYS[0], 0, into)
        with pytest.raises(StoreError, match="damaged"):
            store.read(KEYS[0], 1, into)
        store.read(KEYS[0], 2, into)


def test_damage_while_the_run_is_open(run: RunFolder) -> None:
    run = RunFolder.open(_closed(run))
    first, always = family(run), family(run, verify="always")
    assert get(first, KEYS[1]) == fill(LAYOUT.nbytes, 2)
    scribble(run.folder / "weights.bin", PAGE + 5)
    assert get(first, KEYS[1]) != fill(LAYOUT.nbytes, 2)  # compared once: docs/run-folder.md says so
    with pytest.raises(StoreError, match="damaged"):
        get(always, KEYS[1])
    run.close()


def _closed(run: RunFolder) -> Path:
    run.close()
    return run.folder


def test_a_record_in_anothers_place(run: RunFolder) -> None:
    run.close()
    path = run.folder / "weights.bin"
    data = path.read_bytes()
    path.write_bytes(data[PAGE : 2 * PAGE] + data[:PAGE] + data[2 * PAGE :])
    with RunFolder.open(run.folder) as again:
        for key in KEYS[:2]:
            with pytest.raises(StoreError, match="damaged"):
                get(family(again), key)


@pytest.mark.parametrize(("size", "text"), [(0, "truncated: 0 bytes, but step 1 needs 8192"), (None, "missing")])
def test_a_data_file_that_is_cut_or_gone(run: RunFolder, size: int | None, text: str) -> None:
    path = _closed(run) / "weights.bin"
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    for write in (True, False):
        with pytest.raises(StoreError, match=rf"weights\.bin: {text}.*restore it"):
            RunFolder.open(run.folder, write=write)


def two_steps(run: RunFolder) -> Path:
    run.commit(2, "two")
    run.close()
    return run.folder / "steps" / "step-2.2" / "step.json"


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "edited", "not json", "deep", "version"])
def test_a_damaged_manifest(run: RunFolder, how: str) -> None:
    path = two_steps(run)
    raw = path.read_text()
    match how:
        case "flip":
            scribble(path, len(raw) // 2)
        case "cut":
            os.truncate(path, len(raw) // 2)
        case "gone":
            path.unlink()
        case "edited":
            path.write_text(raw.replace('"two"', '"tow"'))
        case "not json":
            path.write_bytes(b"\xff\xfe")
        case "deep":
            path.write_text("[" * 100_000)
        case "version":
            body = json.loads(raw) | {"version": 2}
            body.pop("digest")
            path.write_text(json.dumps(body | {"digest": digest(body)}))
    with pytest.raises(StoreError, match=r"step\.json: .*go on from another step \(there are: 1\)"):
        RunFolder.open(run.folder)
    with pytest.raises(StoreError, match=r"step\.json: "):
        RunFolder.open(run.folder, step=2)
    with RunFolder.open(run.folder, step=1) as again:
        assert again.steps() == [1] and len(list(again.verify())) == 1
        assert holds(family(again), {KEYS[0]: 1, KEYS[1]: 2})
        put(family(again), KEYS[0], 9)
        again.commit(2)
        assert not list(again.verify())
    with RunFolder.open(run.folder) as again:
        assert again.step == 2 and holds(family(again), {KEYS[0]: 9})


@pytest.mark.parametrize(
    "change",
    [
        {"step": 3},
        {"step": -1},
        {"step": True},
        {"families": {"../x": {"layouts": [], "layers": []}}},
        {"families": {"weights": {"layouts": [], "layers": [{"layout": 0, "experts": 1, "records": []}]}}},
        {"families": []},
        {"attachments": {"a/b": {"bytes": 1, "checksum": 1}}},
        {"format": "x"},
    ],
)
def test_a_manifest_with_a_right_digest_and_wrong_contents(run: RunFolder, change: dict[str, Any]) -> None:
    path = two_steps(run)
    body = json.loads(path.read_text()) | change
    body.pop("digest")
    path.write_text(json.dumps(body | {"digest": digest(body)}))
    with pytest.raises(StoreError, match=r"step\.json: "):
        RunFolder.open(run.folder)


@pytest.mark.parametrize("row", [[9, 0, 0, [1]], [0, 1, 0, [1]], [0, 0, 4096, [1]], [0, 0, 0, []], [0, 4096, 0, [1]]])
def test_a_manifest_with_a_wrong_record(run: RunFolder, row: list[Any]) -> None:
    path = two_steps(run)
    body = json.loads(path.read_text())
    body.pop("digest")
    rows = body["families"]["weights"]["layers"][0]["records"]
    assert len(rows) == 2
    rows[0] = row
    path.write_text(json.dumps(body | {"digest": digest(body)}))
    with pytest.raises(StoreError, match=r"step\.json: damaged"):
        RunFolder.open(run.folder)


# -- who may open what -------------------------------------------------------------------------------------------------


def test_another_model_or_a_changed_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunFolder.create(folder, model="tiny", fingerprint="f", witness="w").close()
    RunFolder.open(folder, fingerprint="f", witness="w").close()
    with pytest.raises(StoreError, match=r"moetier-run\.json: the run trains tiny, and not .*another folder"):
        RunFolder.open(folder, fingerprint="g", witness="w")
    with pytest.raises(StoreError, match=r"moetier-run\.json: the checkpoint tiny was changed since .*restore it"):
        RunFolder.open(folder, fingerprint="f", witness="x")


def test_other_layouts(run: RunFolder) -> None:
    other = RecordLayout.of([("a", torch.bfloat16, (3, 5)), ("b", torch.bfloat16, (701,))])
    with pytest.raises(StoreError, match=r"has 'weights' as 2 layers of 3 experts \(a float32 .*a bfloat16.*is asked"):
        family(run, layout=other)
    with pytest.raises(StoreError, match="is asked for"):
        run.family("weights", [LAYOUT] * LAYERS, experts=[EXPERTS, EXPERTS + 1])
    padded = RecordLayout(LAYOUT.fields, PAGE)  # a packed store has whole pages
    assert holds(family(run, layout=padded), {}) and family(run, layout=padded).layout(0).nbytes == LAYOUT.nbytes


def test_the_head(run: RunFolder, tmp_path: Path) -> None:
    path = _closed(run) / "moetier-run.json"
    raw = path.read_text()
    body = json.loads(raw)
    body.pop("digest")
    newer = body | {"version": 2}
    pages = body | {"page": 512}
    for text, match in (
        (raw[:-20], "damaged: not JSON"),
        (raw.replace("tiny", "tidy"), "does not match its digest"),
        ("[]", "not the head of a run"),
        (json.dumps(newer | {"digest": digest(newer)}), "version 2 of the format; this moetier reads 1: use the"),
        (json.dumps(pages | {"digest": digest(pages)}), "of another kind"),
    ):
        path.write_text(text)
        with pytest.raises(StoreError, match=rf"moetier-run\.json: .*{match}"):
            RunFolder.open(run.folder)
    with pytest.raises(StoreError, match=r"no run, moetier-run\.json is missing"):
        RunFolder.open(tmp_path)
    assert not RunFolder.exists(tmp_path) and RunFolder.exists(run.folder)


def test_folders_for_a_new_run(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run already; go on with it"):
        made(run.folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ConfigError, match="holds other files"):
        made(tmp_path / "other")
    with pytest.raises(ConfigError, match="not a folder"):
        made(tmp_path / "other" / "file")
    (tmp_path / "begun" / "steps").mkdir(parents=True)  # killed before it was a run
    made(tmp_path / "begun").close()
    with pytest.raises(ConfigError, match="at least 1 step must be kept"):
        made(tmp_path / "new", keep=0)


def test_steps_that_are_not_there(run: RunFolder) -> None:
    for call in (run.extra, run.drop, run.attachments, lambda step: list(run.verify(step))):
        with pytest.raises(ConfigError, match="has no step 7; there are: 1"):
            call(7)
    with pytest.raises(ConfigError, match="is the one that the run goes on from"):
        run.drop(1)
    with pytest.raises(ConfigError, match="counts from 0"):
        run.commit(-1)
    with pytest.raises(ConfigError, match="has no step 7; there are: 1"):
        RunFolder.open(_closed(run), step=7)
    with RunFolder.open(run.folder):  # and the lock was given back
        pass


def test_read_only(run: RunFolder) -> None:
    folder = _closed(run)
    before = sorted(folder.rglob("*"))
    with RunFolder.open(folder, write=False) as first, RunFolder.open(folder, write=False) as second:
        assert holds(family(first), {KEYS[0]: 1}) and holds(family(second), {KEYS[1]: 2})
        with pytest.raises(StoreError, match="opened for reading"):
            put(family(first), KEYS[0], 1)
        for call in (lambda: first.commit(2), first.rollback, lambda: first.drop(1)):
            with pytest.raises(ConfigError, match="opened for reading"):
                call()
        with pytest.raises(ConfigError, match="has no such family"):
            family(first, "state")
        with pytest.raises(ConfigError, match="this process has it open already"):
            RunFolder.open(folder)
        first.close()
        with pytest.raises(ConfigError, match="this process has it open already"):
            RunFolder.open(folder)
    RunFolder.open(folder).close()
    assert sorted(folder.rglob("*")) == before


def test_a_second_writer(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="this process has it open already"):
        RunFolder.open(run.folder, write=False)
    for write in (True, False):
        code = [sys.executable, "-c", LOCKED, str(run.folder / "lock"), str(int(write))]
        assert subprocess.run(code, capture_output=True, text=True, check=True).stdout.strip() == "refused"
    put(family(run), KEYS[0], 4)
    run.commit(2)  # none of that took the lock away
    run.close()
    said = in_child(lambda: RunFolder.open(run.folder).steps())
    assert said == "[1, 2]"  # and a process that ended does not keep it
    RunFolder.open(run.folder).close()


LOCKED = """
import fcntl, sys
file = open(sys.argv[1], "r+")
try:
    fcntl.lockf(file, (fcntl.LOCK_EX if int(sys.argv[2]) else fcntl.LOCK_SH) | fcntl.LOCK_NB)
except OSError:
    print("refused")
"""


def test_another_process_that_has_the_run(run: RunFolder) -> None:
    folder = _closed(run)
    hold = f"import fcntl, sys\nfile = open({str(folder / 'lock')!r}, 'r+')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
    hold += "import os\nfile.write(f'{os.getpid()}\\n'); file.flush()\nprint('held', flush=True)\nsys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for write in (True, False):
            with pytest.raises(ConfigError, match=rf"another process \({other.pid}\) has it open; wait until it ends"):
                RunFolder.open(folder, write=write)
        other.kill()
    RunFolder.open(folder).close()


def test_a_forked_child_does_not_keep_the_lock(run: RunFolder) -> None:
    """As a data loader's workers do when the process that trains is killed."""
    folder = _closed(run)
    hear, tell = os.pipe()

    def train_and_die() -> None:
        RunFolder.open(folder)
        if not os.fork():
            os.close(tell)
            os.read(hear, 1)  # lives on, until the test ends
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child_that_dies(train_and_die) == signal.SIGKILL
    RunFolder.open(folder).close()
    os.close(hear)
    os.close(tell)


def in_child_that_dies(work: Callable[[], None]) -> int:
    """The signal that ended a forked process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])
