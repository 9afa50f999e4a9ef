"""A model's tiered experts, reachable as `model.moetier`: every layer's routing becomes an access, and is served."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moetier.access import Access, Part, Phase
from moetier.cache import ExpertCache
from moetier.calibration import Calibration
from moetier.chunks import SliceCache, forward_in_slices
from moetier.cpu_share import InPlace
from moetier.crew import Crew, OneThread
from moetier.errors import ConfigError
from moetier.eventlog import EventLog, Recorder
from moetier.experts import Routing, forward_from_leases, keys_of
from moetier.mapping import LayerMap
from moetier.overlap import Overlap, StepClock
from moetier.plan import Plan
from moetier.products import MAX_ROWS
from moetier.profile import Profile
from moetier.routing import Lever
from moetier.split_trial import SplitTrial
from moetier.threads import Cores, CoreWatch, oversubscribed, reader_cores
from moetier.timeline import LIMIT, Timeline, recorded
from moetier.training.activations import Activations, Block
from moetier.training.adapters import adapted, factors_of
from moetier.training.autograd import differentiable
from moetier.training.sink import Sink
from moetier.training.tape import Tape

if TYPE_CHECKING:
    from moetier.training.session import TrainingSession

Watch = Callable[[int, torch.Tensor, torch.Tensor, Phase], None]  # layer, experts [T, K], gate weights [T, K], phase


class TieredExperts:
    """A model's tiered experts: the cache, the plan it follows, and where each experts module gets its records.

    Reachable as `model.moetier`.
    """

    def __init__(
        self,
        cache: ExpertCache | SliceCache,
        plan: Plan,
        layers: list[LayerMap],
        recorder: Recorder | None,
        needs_mass: bool = False,
    ):
        self.cache, self.plan, self.layers = cache, plan, layers
        self.watch: Watch | None = None  # told of every layer's routing, before its experts run
        self.lever: Lever | None = None  # what may bend the routing; None: outputs are the model's own
        self.calibration: Calibration | None = None  # what the choice of experts for the CPU rests on
        self.crew: Crew | None = None  # shares small steps on the CPU
        self.training: TrainingSession | None = None  # None: experts are as the checkpoint has them
        self.sink: Sink | None = None  # trains the experts; None: they are frozen
        self.activations: Activations | None = None  # what forward keeps for backward; None: nothing
        self.tape = Tape()  # forwards whose backward is still to come
        self._one_thread = OneThread()
        self.trial: SplitTrial | None = None  # decides when the crew does it; None: always
        self._small = 0  # tokens of the step that runs, if it is a small one
        self._small_before = 0
        self._begun = 0.0
        self._recorder = recorder
        self._needs_mass = needs_mass
        self._clock = 0
        self._phase = Phase.DECODE
        self._steps = StepClock(cache.clocks)
        self._texts = 0  # begun so far
        self._sequence = 0

    def forward(
        self, layer: int, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """One access: [T, H] hidden states through the experts that `index` [T, K] names."""
        arena = self.cache.device or self.cache.host
        if hidden.device != arena.device:
            raise ConfigError(
                f"the model computes on {hidden.device} but its experts are tiered on {arena.device}; "
                "choose the device when loading (device_map), not afterwards"
            )
        if self.watch is not None:
            self.watch(layer, index, weights.detach(), self._phase)
        if self.lever is not None:
            index, weights = self.lever.drop(layer, index, weights)
        if torch.is_grad_enabled():
            return differentiable(self, layer, module, hidden, index, weights)
        return self.compute(layer, module, hidden, index, weights)[0]

    def compute(
        self,
        layer: int,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        part: Part = Part.SERVE,
        keep: Block | None = None,
    ) -> tuple[torch.Tensor, Access]:
        """`forward` without a graph, and the access that it was; `part` of a training step, whose backward can use
        what `keep` has room for.
        """
        routing = Routing(index, weights, self._needs_mass)
        keys, tokens = keys_of(layer, routing)
        self._clock += 1
        access = Access(self._clock, layer, keys, tokens, self._phase, self._sequence, routing.mass, part=part)
        if isinstance(self.cache, SliceCache):
            return forward_in_slices(module, hidden, routing, self.cache.slices(access)), access
        in_place = InPlace(module, hidden, routing, self.cache.device) if self.cache.core.misses is not None else None
        crew = self.crew if self._small and self._by_expert else None
        lease = partial(self.cache.batches, aside=crew is not None)
        adapters = factors_of(module)
        # closed: who handles an error of the math may want to commit, while its traceback holds on to the generator
        with closing(lease(access) if self.sink is None else self.sink.fresh(access, lease)) as leases:
            batches = adapted(leases, adapters) if adapters else leases
            room = None if keep is None or in_place is not None else keep.room
            result = forward_from_leases(module, hidden, routing, batches, crew, in_place, self.cache.foresee, room)
        return result, access

    def again(self, access: Access) -> Access:
        """The access of a backward over the experts of a forward."""
        self._clock += 1
        return replace(access, time=self._clock, part=Part.BACKWARD)

    @property
    def _by_expert(self) -> bool:
        return self.trial is None or self.trial.crew

    @property
    def phase(self) -> Phase:
        """Of the step that the model is in."""
        return self._phase

    def observe_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: a step of more than one token per sequence is a prefill.

        A step with nothing in the decoding cache begins a new text (or several, if it has several rows).
        """
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])  # any of them may be None
        tokens = next((tokens for tokens in given if isinstance(tokens, torch.Tensor)), None)
        if tokens is not None and tokens.dim() > 1:
            self._phase = Phase.PREFILL if tokens.shape[1] > 1 else Phase.DECODE
            if begins_text(kwargs.get("past_key_values"), self._phase):
                self._texts += 1
            self._sequence = max(0, self._texts - 1) if tokens.shape[0] == 1 else 0
            rows = tokens.shape[0] * tokens.shape[1]
            self._steps.begin(self._phase, rows)
            shared = self.crew is not None and rows <= MAX_ROWS and torch.get_num_threads() > 1
            self._small = rows if shared else 0
            self._begun = time.perf_counter()
            if self._small and self._by_expert:
                self._one_thread.enter()

    def after_forward(self, module: Any, args: Any, output: Any = None) -> None:
        """Forward hook of the model, called also when the forward failed, then without an output."""
        self._one_thread.leave()
        if self._small and self.trial is not None and output is not None:
            if self._small == self._small_before:  # else the times say nothing
                self.trial.record(time.perf_counter() - self._begun)
            self._small_before = self._small
        step = None if output is None else self._steps.end()
        if step is not None and self.cache.probe is not None:
            self.cache.probe.stepped(*step)

    def overlap(self, phase: Phase = Phase.DECODE) -> Overlap:
        """T_wait, T_compute, T_io of all forwards of a phase so far, and how much of the transfers was hidden."""
        cache = self.cache
        names = tuple(link.name for link in cache.mover.links)
        on_gpu = cache.device is not None and cache.device.device.type != "cpu"
        return Overlap(self._steps.clocks[phase], names, on_gpu)

    def oversubscribed(self, watch: CoreWatch | None = None) -> str | None:
        """Why torch has too many compute threads for the cores that are free, in one line; None if all is well.

        `watch` has seen what other programs do; without one, they are watched for a moment.
        """
        compute = torch.get_num_threads()
        if compute == 1 or (self.cache.device or self.cache.host).device.type != "cpu":
            return None
        readers = reader_cores(bool(getattr(self.cache.store, "direct", False)))
        if self.crew is not None:  # made for sharing cores with readers
            readers = 0.0
        return oversubscribed(compute, readers, Cores.now(watch))

    def timeline(self, path: str | Path | None = None, limit: int = LIMIT) -> AbstractContextManager[Timeline]:
        """`with model.moetier.timeline("run.json"):` records what runs within, for ui.perfetto.dev (docs/timeline.md).

        The file is written when the block ends, also by an exception. The last `limit` events of every thread are kept.
        Raises `ConfigError` for a file that cannot be written, or while another timeline is being recorded.
        """
        return recorded(self.cache, path, limit)

    def stats(self) -> dict[str, Any]:
        """Hits, lates and misses per tier and layer; bytes and time per link; seconds in all; times per phase; how
        small steps are split among threads, where that is on trial; what lossy levers and cache-aware routing did.
        """
        phases = {
            phase.name.lower(): {
                "steps": self._steps.steps[phase],
                "tokens": self._steps.tokens[phase],
                **self.overlap(phase).summary(),
            }
            for phase in Phase
        }
        stats = {**self.cache.stats(), "phases": phases}
        if self.trial is not None:
            stats["split"] = {"now": self.trial.report(), "changes": self.trial.changes}
        if self.lever is not None:
            stats["levers"] = self.lever.report()
        if self.activations is not None:
            stats["activations"] = self.activations.report()
        if self.training is not None and self.training.routing is not None:
            stats["routing"] = self.training.routing.report()
        return stats

    def events(self) -> EventLog:
        """The log of the core's inputs so far, for replay; needs the option `record_events=True`."""
        if self._recorder is None:
            raise ConfigError("events were not recorded; load the model with record_events=True")
        return self._recorder.log

    def profile(self) -> Profile:
        """How often each expert was used so far; needs the option `record_profile=True`."""
        if self.cache.profile is None:
            raise ConfigError("no profile was recorded; load the model with record_profile=True")
        return self.cache.profile

    def commit(self, step: int | None = None, extra: Any = None, **parts: Any) -> int:
        """Make a checkpoint of the training run; see `TrainingSession.commit` and docs/training.md."""
        if self.training is None:
            raise ConfigError("commit: the model was not loaded to be trained; load it with train=RUN_FOLDER")
        return self.training.commit(step, extra, **parts)

    def close(self) -> None:
        """Stop the threads and close the files. The model cannot run afterwards."""
        self.cache.close()
        if self.training is not None:
            self.training.close()
        if self.crew is not None:
            self.crew.close()


def begins_text(past: Any, phase: Phase) -> bool:
    """Whether a step has no tokens before it; `past` is its decoding cache.

    Without a cache that counts tokens (a model may have none, or one for states only) every prefill begins a text.
    """
    try:
        return int(past.get_seq_length()) == 0
    except (AttributeError, ValueError):
        return phase is Phase.PREFILL
