"""Any order of writes, commits, rollbacks, drops and reopenings: the run folder does what a few dictionaries do."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moetier.access import ExpertKey
from moetier.record import PAGE, RecordLayout
from moetier.stores.diskio import aligned_buffer
from moetier.stores.runfamily import RunFamily
from moetier.stores.runfolder import RunFolder

LAYOUTS = {  # of different sizes, also from layer to layer: gaps do not fit everybody
    "weights": [RecordLayout.of([("w", torch.uint8, (nbytes,))]) for nbytes in (PAGE - 5, 3 * PAGE)],
    "state": [RecordLayout.of([("s", torch.uint8, (nbytes,))]) for nbytes in (2 * PAGE + 1, 17)],
}
EXPERTS = [2, 3]
RECORDS = [(n, ExpertKey(la, e)) for n in LAYOUTS for la, count in enumerate(EXPERTS) for e in range(count)]
Content = dict[tuple[str, ExpertKey], int]


def expected(name: str, key: ExpertKey, seed: int) -> bytes:
    """What a record is: every byte follows from whose it is and its seed; seed 0 was never written."""
    nbytes = LAYOUTS[name][key.layer].nbytes
    return bytes(nbytes) if not seed else bytes([(seed * 31 + key.expert * 7 + len(name)) % 255 + 1]) * nbytes


class Runs(RuleBasedStateMachine):
    """`content` is what the run has now, `steps` what it had at each commit."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(prefix="moetier-runs-"))
        self.run = RunFolder.create(self.scratch / "run", model="m", fingerprint="f", keep=2)
        self.keep: int | None = 2
        self.steps: dict[int, Content] = {}
        self.at: int | None = None
        self.content: Content = {}
        self.seed = 0
        self.stores = self.families()

    def families(self) -> dict[str, RunFamily]:
        return {name: self.run.family(name, layouts, experts=EXPERTS) for name, layouts in LAYOUTS.items()}

    def teardown(self) -> None:
        self.run.close()
        shutil.rmtree(self.scratch)

    @rule(chosen=st.sets(st.sampled_from(RECORDS), min_size=1, max_size=4), phase=st.sampled_from([0, 8]))
    def write(self, chosen: set[tuple[str, ExpertKey]], phase: int) -> None:
        for name, key in sorted(chosen):
            self.seed += 1
            nbytes = LAYOUTS[name][key.layer].nbytes
            data = aligned_buffer(4 * PAGE)[phase : phase + nbytes]
            data[:] = expected(name, key, self.seed)
            self.stores[name].write(key, 0, data)
            self.content[name, key] = self.seed

    @rule(ahead=st.integers(0, 3))
    def commit(self, ahead: int) -> None:
        step = (self.at or 0) + ahead
        self.run.commit(step, {"seed": self.seed}, {"seed": lambda path: path.write_text(str(self.seed))})
        self.steps = {number: was for number, was in self.steps.items() if number < step} | {step: dict(self.content)}
        while self.keep is not None and len(self.steps) > self.keep:
            del self.steps[min(self.steps)]
        self.at = step

    @rule()
    def rollback(self) -> None:
        self.run.rollback()
        self.content = {} if self.at is None else dict(self.steps[self.at])

    @precondition(lambda self: len(self.steps) > 1)
    @rule(pick=st.integers(0, 9))
    def drop(self, pick: int) -> None:
        others = sorted(set(self.steps) - {self.at})
        step = others[pick % len(others)]
        self.run.drop(step)
        del self.steps[step]

    @rule(pick=st.none() | st.integers(0, 9), keep=st.sampled_from([1, 2, 3, None]))
    def reopen(self, pick: int | None, keep: int | None) -> None:
        step = None if pick is None or not self.steps else sorted(self.steps)[pick % len(self.steps)]
        self.run.close()
        self.run = RunFolder.open(self.scratch / "run", step=step, keep=keep)
        self.keep = keep
        self.at = max(self.steps, default=None) if step is None else step
        self.content = {} if self.at is None else dict(self.steps[self.at])
        self.stores = self.families()

    @invariant()
    def holds_what_was_written(self) -> None:
        into = aligned_buffer(4 * PAGE)
        for name, key in RECORDS:
            wanted = expected(name, key, self.content.get((name, key), 0))
            self.stores[name].read(key, 0, into[: len(wanted)])
            assert bytes(into[: len(wanted)]) == wanted

    @invariant()
    def has_its_steps(self) -> None:
        assert self.run.steps() == sorted(self.steps) and self.run.step == self.at
        for step in self.steps:
            text = self.run.attachment(step, "seed").read_text()
            assert self.run.extra(step) == {"seed": int(text)}

    @invariant()
    def every_step_is_whole_and_space_is_not_lost(self) -> None:
        assert not list(self.run.verify())
        for name, layouts in LAYOUTS.items():
            versions = {
                (key, seed)
                for content in [*self.steps.values(), self.content]
                for (owner, key), seed in content.items()
                if owner == name
            }
            pages = sum(-(-layouts[key.layer].nbytes // PAGE) * PAGE for key, _ in versions)
            used = self.run.stats()[name]["used"]
            # a record behind a phase of 8 bytes may take a page more
            assert pages <= used <= pages + len(versions) * PAGE


class TestRuns(Runs.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=12, stateful_step_count=20, deadline=None, derandomize=True)
