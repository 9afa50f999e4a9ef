"""A model's training session, reachable as `model.moetier.training`: the run folder, the engine, commit and resume.

It joins what a checkpoint is made of: the experts' records (which the run folder keeps), the resident weights, the
optimizer, the random generators, the engine's books. Knows nothing of an update's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from moetier.errors import CapacityError, ConfigError, StoreError
from moetier.levers import Levers
from moetier.plan import format_size
from moetier.stores.runfolder import RunFolder
from moetier.training.allocator import give_holes_back
from moetier.training.applied import Applied, Idle, When
from moetier.training.caches import small_cache
from moetier.training.engine import TrainingEngine
from moetier.training.optimizers import RecordOptimizer, name_of
from moetier.training.snapshots import (
    OPTIMIZER,
    RANDOM,
    RESIDENT,
    TensorFile,
    check_json,
    optimizer_snapshot,
    plain,
    random_snapshot,
    resident_tensors,
    restore_optimizer,
    restore_random,
    restore_resident,
    save_tensors,
)

if TYPE_CHECKING:
    from moetier.training.optimizer import TieredOptimizer
    from moetier.training.routing import CacheAwareRouting

FORMAT = 1  # of what a checkpoint holds beside the records


class TrainingSession:
    """Trains one model into one run folder. `step` counts the optimizer's steps, those of earlier runs included."""

    def __init__(
        self,
        model: Any,
        run: RunFolder,
        engine: TrainingEngine,
        state_nbytes: int,
        state_slots: int | None = None,
        readers: int = 2,
        writeback: str = "evict",
    ):
        self.model, self.run, self.engine = model, run, engine
        self.routing: CacheAwareRouting | None = None  # favours what is in memory; None: routers choose by themselves
        self.step = 0
        self._state_nbytes, self._state_slots, self._readers = state_nbytes, state_slots, readers
        self._writeback = writeback
        self._optimizer: TieredOptimizer | None = None
        self._kind = ""
        self._saved: dict[str, Any] | None = None
        self._resumed = False
        engine.owes = self._begin()

    def _begin(self) -> bool:
        """Be at the step that the run is at, with its resident weights; returns whether its experts owe steps."""
        at = self.run.step
        if at is None:
            return False
        self._saved = saved = _checked(self.run.extra(at), self.run)
        self.step = int(saved["step"])
        restore_resident(self.model, TensorFile(self.run.attachment(at, RESIDENT)))
        return bool(saved["owes"])

    # -- the optimizer -------------------------------------------------------------------------------------------------

    def bind(self, optimizer: TieredOptimizer, records: RecordOptimizer, idle: Idle, update: When) -> None:
        """Let an optimizer train the model: opens the records of its state, and allocates their slots."""
        if self._optimizer is not None:
            raise ConfigError("this model has an optimizer already; load the model again to train it with another")
        kind = f"{type(records).__module__}:{type(records).__qualname__}, idle={idle}"
        if self._saved is not None and self._saved["kind"] != kind:
            raise ConfigError(
                f"{self.run.folder}: the run was trained with {_differing(self._saved['kind'], kind)}; give the same, "
                "or begin a new run in another folder"
            )
        engine = self.engine
        layouts = [engine.weights.store.layout(layer) for layer in range(engine.weights.store.layers)]
        states = [records.state_layout(layout) for layout in layouts]
        state = None
        if any(layout is not None for layout in states):
            made = [layout for layout in states if layout is not None]
            if len(made) < len(states):
                raise ConfigError("the optimizer has a state in some layers only")
            store = self.run.family("state", made, experts=engine.ledger.counts)
            slots = self._slots_of_state(store.slot_nbytes)
            state = small_cache(store, slots, engine.ledger.counts, self._readers, "zigzag", self._writeback)
        if self._saved is not None:
            engine.ledger.load(self._saved["ledger"], records.settings)
        usage = records.usage(len(layouts), max(engine.ledger.counts))
        if usage is not None and self._saved is not None:
            usage.load(self._saved["usage"])
        engine.applied = Applied(records, state, engine.weights, engine.ledger, idle, update, usage)
        if update == "backward":  # gradients wait for nothing, so that their slots stay untouched
            arena, plan = engine.gradients.cache.host, self.model.moetier.plan
            untouched = arena.slots * arena.slot_nbytes
            self.model.moetier.plan = replace(plan, host_total_nbytes=plan.host_total_nbytes - untouched)
        engine.upcoming = optimizer.upcoming
        engine.owes = False
        self._optimizer, self._kind = optimizer, kind

    def _slots_of_state(self, slot_nbytes: int) -> int:
        records = sum(self.engine.ledger.counts)
        slots = self._state_slots or self._state_nbytes // slot_nbytes
        if slots < 1:
            raise CapacityError(
                f"the optimizer's state of one expert takes {format_size(slot_nbytes)}, and "
                f"{format_size(self._state_nbytes)} were set aside; give host_memory {format_size(slot_nbytes)} more"
            )
        return min(records, slots)

    def begin_step(self) -> None:
        """The optimizer is about to make a step. Raises `ConfigError` where routing was to be changed and was not."""
        if self.routing is not None:
            self.routing.step()

    def stepped(self) -> None:
        """The optimizer has made a step."""
        self.step += 1
        give_holes_back()

    def check_step(self) -> None:
        """Raise `ConfigError` for a step before the optimizer has its state back."""
        if self._saved is not None and not self._resumed:
            raise ConfigError(
                f"{self.run.folder}: the run is at step {self.step}; call optimizer.resume() before the first step, "
                "which gives the optimizer its state back"
            )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def commit(self, step: int | None = None, extra: Any = None, **parts: Any) -> int:
        """Make a checkpoint of everything as it is now; returns its step.

        `parts` are objects with a `state_dict` that JSON can keep (a scheduler, a `GradScaler`, a sampler), to be given
        to `resume` under the same names; `extra` is anything that JSON can keep. A checkpoint is complete or not there:
        after an error the last one is what it was. Raises `StoreError` where it cannot be written, `ConfigError`
        between a backward and its step.
        """
        optimizer = self._optimizer
        if optimizer is None:
            raise ConfigError("a checkpoint holds the optimizer's state: make the optimizer before the first commit")
        self.check_step()
        if self.engine.pending:
            raise ConfigError(
                "commit: there are gradients that no step has taken, and a checkpoint has no gradients; commit after "
                "optimizer.step() or zero_grad()"
            )
        self.engine.settle()
        number = self.step if step is None else step
        tensors, described = optimizer_snapshot(optimizer)
        randoms, generators = random_snapshot()
        saved = {
            "format": FORMAT,
            "step": self.step,
            "kind": self._kind,
            "ledger": self.engine.ledger.save(),
            "owes": self.engine.anyone_owes(),
            "usage": self.engine.usage(),
            "routing": None if self.routing is None else self.routing.save(),
            "optimizer": described,
            "random": generators,
            "parts": {name: plain(part.state_dict(), name) for name, part in parts.items()},
            "extra": check_json(extra, "extra"),
        }
        self.engine.flush()
        attachments: dict[str, Callable[[Any], None]] = {
            RESIDENT: partial(save_tensors, resident_tensors(self.model)),
            OPTIMIZER: partial(save_tensors, tensors),
            RANDOM: partial(save_tensors, randoms),
        }
        self.run.commit(number, saved, attachments)
        return number

    def resume(self, **parts: Any) -> dict[str, Any] | None:
        """Give the optimizer, `parts` and the random generators the state of the checkpoint the run was opened at.

        Returns {"step": …, "extra": …}; None where there is no checkpoint yet. Call it once, when all parts are made.
        """
        if self._optimizer is None:
            raise ConfigError("make the optimizer before resume()")
        if self._resumed:
            raise ConfigError("resume() was called already; load the model again to go back to the checkpoint")
        self._resumed = True
        saved, at = self._saved, self.run.step
        if saved is None or at is None:
            return None
        given = {name for name, part in parts.items() if part is not None}
        if given != set(saved["parts"]):
            raise ConfigError(
                f"resume: the checkpoint was made with the parts {sorted(saved['parts'])}, given are {sorted(given)}; "
                "give the same"
            )
        self._resume_routing(saved.get("routing"))
        restore_optimizer(self._optimizer, TensorFile(self.run.attachment(at, OPTIMIZER)), saved["optimizer"])
        for name in given:
            parts[name].load_state_dict(saved["parts"][name])
        self.restore_generators()
        return {"step": self.step, "extra": saved["extra"]}

    def _resume_routing(self, saved: dict[str, Any] | None) -> None:
        """Favour what the checkpoint favoured. Raises `ConfigError` where it was made with other levers."""
        before = Levers(**saved["levers"]) if saved is not None else Levers()
        now = Levers() if self.routing is None else self.routing.levers
        if before != now:
            raise ConfigError(
                f"{self.run.folder}: the run was trained with routing {before}, not {now}; give the same, or begin a "
                "new run in another folder"
            )
        if saved is not None and self.routing is not None:
            self.routing.load(saved)

    def restore_generators(self) -> None:
        """Set all random generators as they were at the checkpoint that training goes on from."""
        if self._saved is not None and self.run.step is not None:
            restore_random(TensorFile(self.run.attachment(self.run.step, RANDOM)), self._saved["random"])

    @property
    def waiting(self) -> bool:
        """Whether the model is as the run was opened, and `resume` was not called yet."""
        return self._saved is not None and not self._resumed

    def extra(self, step: int) -> Any:
        """What was given as `extra` when a step was committed."""
        return _checked(self.run.extra(step), self.run)["extra"]

    def rewind(self, step: int) -> None:
        """Go back to a step of the run, in this process; everything since is undone. Then call `resume`.

        Later steps stay until the next commit, as when the run is opened at a step. Raises `ConfigError` for a step
        that is not there, `StoreError` where records cannot be read; the model must then be loaded again.
        """
        if self._optimizer is None:
            raise ConfigError("make the optimizer before rewind()")
        saved = _checked(self.run.extra(step), self.run)
        if saved["kind"] != self._kind:
            raise ConfigError(
                f"{self.run.folder}: step {step} was trained with {_differing(saved['kind'], self._kind)}"
            )
        self.engine.clear()
        self.engine.rewind(partial(self.run.go_back, step), saved)
        self._begin()
        self._resumed = False

    def close(self) -> None:
        """Stop threads and close files; what was not committed is lost. The cache of weights is the model's."""
        self.engine.close()
        self.run.close()


def _differing(before: str, now: str) -> str:
    """How two kinds of update differ, of the form `package.module:Class, idle=dense` as checkpoints keep it."""
    pairs = zip(("optimizer", "idle"), before.split(", idle="), now.split(", idle="), strict=True)
    return " and ".join(f"{what} {name_of(old)}, not {name_of(new)}" for what, old, new in pairs if old != new)


def _checked(saved: Any, run: RunFolder) -> dict[str, Any]:
    """What a checkpoint holds beside the records. Raises `StoreError` for anything else."""
    names = {"format", "step", "kind", "ledger", "owes", "optimizer", "random", "parts", "extra"}
    if not isinstance(saved, dict) or not names <= saved.keys():
        raise StoreError(f"{run.folder}: step {run.step} is no checkpoint of training; give the folder of another run")
    if saved["format"] != FORMAT:
        raise StoreError(f"{run.folder}: the checkpoint has format {saved['format']}; this moetier reads {FORMAT}")
    return saved
