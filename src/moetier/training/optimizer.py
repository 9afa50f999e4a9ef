"""Optimizers of a tiered model: torch's own for the parameters, the training engine for the experts, one step for both.

They are subclasses of the optimizers of torch, with ordinary groups of parameters, so that schedulers, `GradScaler`,
accelerate and the Trainer of transformers take them. A layer's experts belong to the group that its proxy is in
(`proxy.py`), and follow that group's learning rate and decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch

from moetier.access import ExpertKey
from moetier.errors import ConfigError
from moetier.training.applied import Idle, When
from moetier.training.engine import Scale, TrainingEngine
from moetier.training.groups import chosen, settings_in, trained
from moetier.training.optimizers import RecordOptimizer, Settings
from moetier.training.optimizers.adam import AdamW as RecordAdamW
from moetier.training.optimizers.clipping import (
    Clip,
    check_clipping,
    coefficient,
    group_max_norm,
    norm_of,
    scale_,
    squared_norm,
)
from moetier.training.optimizers.fields import HALF, MASTER
from moetier.training.optimizers.sgd import SGD as RecordSGD
from moetier.training.optimizers.sgd import Momentum as RecordMomentum

if TYPE_CHECKING:
    from moetier.training.session import TrainingSession

STEP = "moetier_step"  # in a state dict


class TieredOptimizer(torch.optim.Optimizer):
    """What the optimizers of tiered models have in common. Not used by itself: it comes before one of torch's.

    `grad_norm` is the global norm that the last step found, before clipping; None without `max_grad_norm`.
    """

    grad_norm: float | None
    _session: TrainingSession
    _max_grad_norm: float | None
    _clip: Clip
    _update: When
    _records: RecordOptimizer
    _own: bool  # the experts have the optimizer of the parameters, not another
    _plain_step: Callable[..., Any]  # of torch's optimizer

    def _bind(
        self,
        session: TrainingSession,
        records: RecordOptimizer,
        max_grad_norm: float | None,
        clip: Clip,
        idle: Idle,
        update: When,
    ) -> None:
        check_clipping(clip, max_grad_norm)
        if idle not in get_args(Idle):
            raise ConfigError(f"idle: {idle!r} is unknown; choose dense or skip")
        if update not in get_args(When):
            raise ConfigError(f"update: {update!r} is unknown; choose step or backward")
        if update == "backward" and max_grad_norm is not None and clip == "global":
            raise ConfigError(
                "max_grad_norm: the global norm is known after backward, but update='backward' applies gradients "
                "before; use update='step', or clip='per-expert'"
            )
        self.grad_norm, self._session, self._records = None, session, records
        self._max_grad_norm, self._clip, self._update = max_grad_norm, clip, update
        self._step_supports_amp_scaling = False  # fused ones would: `GradScaler` shall unscale, and skip, by itself
        self._settings()  # raises now rather than at the first step
        session.bind(self, records, idle, update)

    @property
    def _engine(self) -> TrainingEngine:
        return self._session.engine

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the parameters and of the experts that have gradients; takes the experts' gradients away.

        An expert's update is made before anyone sees it again, mostly by the next forward. There, or here, `StoreError`
        is raised where experts cannot be read or written; the last checkpoint stays as it is.
        """
        self._session.check_step()
        self._engine.settle()  # of layers that no forward has visited: what the disk refuses is refused before anything
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self._engine
        factors = [proxy.factor() for proxy in engine.proxies]
        at_once = self._update == "backward"
        if at_once:
            engine.check_factors(factors)
        scale = self._clipped(factors)
        settings = self._settings()
        self._session.begin_step()
        for proxy in engine.proxies:  # torch's optimizer passes over what has no gradient
            proxy.weight.grad = None
        self._step_resident()
        if at_once:
            engine.close_step()
        else:
            engine.step(settings, scale)
        self._session.stepped()
        return loss

    def upcoming(self) -> tuple[list[Settings | None], Scale]:
        """What updates during backward are made with: settings by layer, and what multiplies gradients."""
        limit = None if self._max_grad_norm is None else self._limits()
        return self._settings(), partial(_scaled, [1.0] * len(self._engine.proxies), 1.0, limit)

    def _clipped(self, factors: list[float]) -> Scale:
        """Clip the parameters' gradients; what multiplies those of the experts, with what was done to their proxies."""
        if self._max_grad_norm is None:
            return partial(_scaled, factors, 1.0, None)
        gradients = [p.grad for p in self._own_parameters() if p.grad is not None]
        resident = [squared_norm([gradient]) for gradient in gradients]
        squares = list(resident)
        for layer, factor in enumerate(factors):
            squares += [square * factor * factor for square in self._engine.squares(layer).values()]
        self.grad_norm = norm_of(squares)
        if self._clip == "global":
            clip = coefficient(self.grad_norm, self._max_grad_norm)
            scale_(gradients, clip)
            return partial(_scaled, factors, clip, None)
        limits = self._limits()
        scale_(gradients, coefficient(norm_of(resident), limits[-1]))
        return partial(_scaled, factors, 1.0, limits)

    def _limits(self) -> list[float]:
        """The share of the maximal norm that one expert of each layer has; at the end, that of the parameters."""
        assert self._max_grad_norm is not None
        engine = self._engine
        store, counts = engine.weights.store, engine.ledger.counts
        sizes = [
            sum(torch.Size(field.shape).numel() for field in store.layout(layer).fields) for layer in range(len(counts))
        ]
        resident = sum(p.numel() for p in self._own_parameters())
        total = resident + sum(
            size * count for size, count, proxy in zip(sizes, counts, engine.proxies, strict=True) if proxy.trains
        )
        return [group_max_norm(self._max_grad_norm, elements, total) for elements in (*sizes, resident)]

    def _settings(self) -> list[Settings | None]:
        start, own = self._records.settings, self._own
        return [None if group is None else settings_in(group, start, own) for group in self._group_of_layer()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those of the experts included."""
        super().zero_grad(set_to_none)
        self._engine.clear()

    def resume(self, **parts: Any) -> dict[str, Any] | None:
        """Go on where the run folder's last checkpoint was made: the optimizer's state, all random generators, and the
        state of `parts` (a scheduler, a `GradScaler`, a sampler, …), named as `commit` was given them. Call it when
        everything is made, before the first step.

        Returns {"step": …, "extra": …}, with the `extra` of `commit`; None where the run has no checkpoint yet. Raises
        `StoreError` for a checkpoint that is damaged, `ConfigError` for one that does not fit.
        """
        return self._session.resume(**parts)

    @property
    def updates_in_backward(self) -> bool:
        """Whether experts are updated before `step`: nothing may be done to their gradients then."""
        return self._update == "backward"

    def state_dict(self) -> dict[str, Any]:
        """Of the parameters, with the step that it is of."""
        return {**super().state_dict(), STEP: self._session.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of the parameters; that of the experts is in the run folder. Masters keep their dtype.

        Raises `ConfigError` for the state of another step than the experts are at.
        """
        step = state_dict.get(STEP, self._session.step)
        if step != self._session.step:
            raise ConfigError(
                f"load_state_dict: the optimizer's state is of step {step}, but the experts of this run are at "
                f"{self._session.step}; resume with optimizer.resume(), or moetier.Trainer, which know the run folder"
            )
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, entries in state_dict["state"].items():
            for name, value in entries.items():
                if isinstance(value, torch.Tensor) and name != "step":
                    self.state[parameters[number]][name] = value.to(parameters[number].device, copy=True)

    def _step_resident(self) -> None:
        """The step of torch's optimizer, on float32 copies of half-precision parameters."""
        halves = [p for p in self._own_parameters() if p.grad is not None and p.dtype in HALF]
        kept = []
        for p in halves:
            gradient = p.grad
            assert gradient is not None
            kept.append((p.data, gradient))
            master = self.state[p].pop(MASTER, None) if p in self.state else None
            p.grad = None
            p.data = p.data.float() if master is None else master
            p.grad = gradient.float()
        try:
            self._step_of_torch()
        finally:
            for p, (data, gradient) in zip(halves, kept, strict=True):
                master = p.data
                p.grad = None
                p.data = data.copy_(master)
                p.grad = gradient
                self.state[p][MASTER] = master

    def _step_of_torch(self) -> None:
        step: Any = type(self)._plain_step
        if getattr(step, "hooked", False):  # hooks of steps ran already, for this one
            step = step.__wrapped__
        step(self)

    def _group_of_layer(self) -> list[dict[str, Any] | None]:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        found = []
        for layer, proxy in enumerate(self._engine.proxies):
            group = groups.get(id(proxy.weight))
            if group is None and proxy.trains:
                raise ConfigError(
                    f"the experts of MoE layer {layer} are in no group of the optimizer; give it all of "
                    "model.parameters() (a layer's experts are the parameter `proxy` of its experts module), or "
                    "freeze them"
                )
            found.append(group)
        return found

    def _own_parameters(self) -> Iterable[torch.nn.Parameter]:
        proxies = {id(proxy.weight) for proxy in self._engine.proxies}
        return [p for group in self.param_groups for p in group["params"] if id(p) not in proxies]


class AdamW(TieredOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW` for a tiered model, experts included.

    Args:
        model: what `moetier.from_pretrained(path, train=…)` gave.
        params: parameters or groups of them as torch takes them; by default all of the model's that are not frozen.
        lr, betas, eps, weight_decay: as in torch. Each group's own, and a scheduler's, also hold for the experts whose
            proxies are in it.
        max_grad_norm: clip gradients to this norm, all of them together.
        clip: "global" (by the exact norm of all gradients) or "per-expert" (each expert, and the parameters, to their
            share of `max_grad_norm` by size: needs no norm of all).
        idle: what a step does to experts that had no tokens: "dense" (what a gradient of zero does: they decay, their
            momentum goes on) or "skip" (nothing, as torch treats parameters without a gradient).
        update: when experts are updated: by "step" (before their next use, whose math hides the bytes), or in
            "backward" as soon as their gradient is there, which stores no gradients, but allows neither accumulation
            nor clipping by the global norm.
        experts: another optimizer for the experts, made or by name from `moetier.training.optimizers.OPTIMIZERS`. Its
            learning rate and weight decay are those of its group, which a name may set: "adafactor(lr=1e-3)".
        **torch_options: further arguments of `torch.optim.AdamW` (fused, foreach), for the parameters.

    Raises `ConfigError` for arguments that cannot be used, and for a model that was not loaded to be trained.
    """

    _plain_step = torch.optim.AdamW.step

    def __init__(
        self,
        model: torch.nn.Module,
        params: Any = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        clip: Clip = "global",
        idle: Idle = "dense",
        update: When = "step",
        experts: str | RecordOptimizer | None = None,
        **torch_options: Any,
    ):
        session = session_of(model)
        super().__init__(
            trained(model, params, experts), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **torch_options
        )
        own = RecordAdamW(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        self._own = experts is None
        self._bind(session, chosen(experts, own), max_grad_norm, clip, idle, update)


class SGD(TieredOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` for a tiered model, experts included. For the arguments that are not torch's see `AdamW`."""

    _plain_step = torch.optim.SGD.step

    def __init__(
        self,
        model: torch.nn.Module,
        params: Any = None,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_grad_norm: float | None = None,
        clip: Clip = "global",
        idle: Idle = "dense",
        update: When = "step",
        experts: str | RecordOptimizer | None = None,
        **torch_options: Any,
    ):
        session = session_of(model)
        super().__init__(
            trained(model, params, experts),
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            **torch_options,
        )
        own: RecordOptimizer
        if momentum:
            own = RecordMomentum(lr, momentum, dampening, nesterov, weight_decay)
        else:
            own = RecordSGD(lr, weight_decay)
        self._own = experts is None
        self._bind(session, chosen(experts, own), max_grad_norm, clip, idle, update)


def session_of(model: torch.nn.Module) -> TrainingSession:
    """The training of a model. Raises `ConfigError` where it was not loaded for it."""
    tiered = getattr(model, "moetier", None)
    session = getattr(tiered, "training", None)
    if session is None:
        raise ConfigError(
            "this model was not loaded to be trained; load it with moetier.from_pretrained(path, train=RUN_FOLDER)"
        )
    found: TrainingSession = session
    return found


def _scaled(factors: list[float], clip: float, limits: list[float] | None, key: ExpertKey, square: float) -> float:
    """What an expert's gradient with this squared norm is multiplied by."""
    factor = factors[key.layer]
    if limits is not None:
        return factor * coefficient(math.sqrt(square) * factor, limits[key.layer])
    return factor * clip
