"""Kill a process that writes and commits all the time, at random moments, and look at what it left: `run_kills.py N`.

Every child goes on where the one before was killed. After each, the last step must be the last one whose commit had
returned, or the one that was being committed; every record must be the version that this step names, byte for byte;
and no checksum of any step may be wrong. Children are forked from here, so that a round takes a fraction of a second.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetier.access import ExpertKey
from moetier.record import PAGE, RecordLayout
from moetier.stores.diskio import aligned_buffer
from moetier.stores.runfamily import RunFamily
from moetier.stores.runfolder import RunFolder

LAYOUTS = {
    "weights": RecordLayout.of([("w", torch.uint8, (5 * PAGE + 77,))]),
    "state": RecordLayout.of([("s", torch.uint8, (23 * PAGE,))]),
}
LAYERS, EXPERTS, THREADS = 3, 5, 3
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


def families(run: RunFolder) -> dict[str, RunFamily]:
    return {
        name: run.family(name, [layout] * LAYERS, experts=[EXPERTS] * LAYERS, verify="always")
        for name, layout in LAYOUTS.items()
    }


def content(name: str, key: ExpertKey, version: int) -> bytes:
    """What a version of a record is; version 0: zeros, as a record that was never written."""
    nbytes = LAYOUTS[name].nbytes
    if version == 0:
        return bytes(nbytes)
    seed = version * 1009 + key.layer * 101 + key.expert * 7 + len(name)
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8).tobytes()


def label(name: str, key: ExpertKey) -> str:
    return f"{name}/{key.layer}/{key.expert}"


def work(folder: Path, seed: int, tell: int) -> None:
    """What a child does until it is killed: changes, commits, and now and then a rollback or an older step."""
    chance = random.Random(seed)
    run = RunFolder.open(folder, keep=chance.choice([1, 2, None]))
    if len(run.steps()) > 1 and chance.random() < 0.3:
        step = chance.choice(run.steps())
        run.close()
        run = RunFolder.open(folder, step=step, keep=2)
    stores = families(run)
    saved = {"serial": 0, "versions": {}} if run.step is None else run.extra(run.step)
    serial = max([saved["serial"], *(run.extra(step)["serial"] for step in run.steps())])
    versions: dict[str, int] = dict(saved["versions"])
    step = run.step or 0
    os.write(tell, b"ready\n")
    while True:
        serial += 1
        changed = [(name, key) for name in LAYOUTS for key in KEYS if chance.random() < 0.3]
        if chance.random() < 0.15:
            change(stores, changed, 10**6 + serial)
            run.rollback()
            continue
        change(stores, changed, serial)
        versions |= {label(name, key): serial for name, key in changed}
        step += chance.choice([1, 1, 1, 5])
        note = f"note {serial}"
        os.write(tell, f"begin {serial}\n".encode())
        run.commit(
            step, {"serial": serial, "versions": versions}, {"note": lambda path, note=note: path.write_text(note)}
        )
        os.write(tell, f"done {serial}\n".encode())
        if len(run.steps()) > 3:
            run.drop(chance.choice(run.steps()[:-1]))


def change(stores: dict[str, RunFamily], changed: list[tuple[str, ExpertKey]], version: int) -> None:
    def write(mine: list[tuple[str, ExpertKey]]) -> None:
        buffer = aligned_buffer(stores["state"].slot_nbytes)
        for name, key in mine:
            data = buffer[: LAYOUTS[name].nbytes]
            data[:] = content(name, key, version)
            stores[name].write(key, 0, data)

    threads = [threading.Thread(target=write, args=(changed[number::THREADS],)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def check(folder: Path, done: int, begun: int) -> None:
    """Raise AssertionError unless the folder is as it must be after a kill."""
    with RunFolder.open(folder, write=False) as run:
        saved: dict[str, Any] = {"serial": 0, "versions": {}} if run.step is None else run.extra(run.step)
        assert saved["serial"] in (done, begun), f"serial {saved['serial']}, committed {done}, begun {begun}"
        damage = list(run.verify())
        assert not damage, damage
        if run.step is None:
            return
        assert run.attachment(run.step, "note").read_text() == f"note {saved['serial']}"
        for name, store in families(run).items():
            into = memoryview(bytearray(LAYOUTS[name].nbytes))
            for key in KEYS:
                for segment in range(store.segments(key)):
                    store.read(key, segment, into)
                version = saved["versions"].get(label(name, key), 0)
                assert bytes(into) == content(name, key, version), f"{label(name, key)} is not version {version}"


def killed(folder: Path, seed: int, longest: float) -> list[str]:
    """One child, killed; what it told."""
    hear, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(hear)
            work(folder, seed, tell)
        except BaseException:
            traceback.print_exc()
        os._exit(3)
    os.close(tell)
    with open(hear) as told:
        first = told.readline()
        time.sleep(random.Random(seed).uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        lines = [first, *told.readlines()]
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise AssertionError(f"round {seed}: the child ended by itself, see above")
    return [line.strip() for line in lines if line.endswith("\n")]


def main(rounds: int, seed: int = 0, longest: float = 0.25) -> None:
    """So many kills; prints what happened. Raises AssertionError for the first folder that is not as it must be."""
    commits = within = done = 0
    with tempfile.TemporaryDirectory(prefix="moetier-kills-") as scratch:
        folder = Path(scratch) / "run"
        RunFolder.create(folder, model="kills", fingerprint="f").close()
        for number in range(seed, seed + rounds):
            told = [line.split() for line in killed(folder, number, longest)]
            finished = [int(line[1]) for line in told if line[0] == "done"]
            begun = [int(line[1]) for line in told if line[0] == "begin"]
            commits += len(finished)
            done = max([done, *finished]) if finished else done
            last = begun[-1] if begun else done
            within += last != done
            check(folder, done, last)
            with RunFolder.open(folder, write=False) as run:
                done = 0 if run.step is None else run.extra(run.step)["serial"]
    print(f"{rounds} kills, {within} of them within a commit; {commits} commits that had returned; all whole")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(int(text) for text in sys.argv[1:]))
