"""`moetier.Trainer`: the Trainer of transformers for a model whose experts are trained out of core.

Everything that Trainer does stays its own; this file says where a checkpoint is. The run folder is the truth: a step
of it holds experts, resident weights, optimizer, scheduler, random generators and the Trainer's own state. A folder
`checkpoint-N` of Trainer only stands for step N of the run, has no weights, and is made again where it is missing.
See docs/trainer.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from moetier.errors import ConfigError, StoreError, UnsupportedModelError
from moetier.hf import find_experts
from moetier.stores.packed_index import write_durably
from moetier.training.balance import NUMBERS
from moetier.training.optimizer import SGD, AdamW, TieredOptimizer, session_of
from moetier.training.session import TrainingSession

STATE = "trainer_state.json"  # the name that Trainer gives it
MARK = "moetier-step.json"  # in a checkpoint folder: of which run it is which step
OPTIMIZERS: dict[type, type[TieredOptimizer]] = {torch.optim.AdamW: AdamW, torch.optim.SGD: SGD}


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` for a model that was loaded with `moetier.from_pretrained(path, train=RUN_FOLDER)`.

    Takes the same arguments. `args.optim` may be any of Trainer's names for torch's AdamW and SGD; for more (idle
    experts, another optimizer for them) give `optimizers=(moetier.AdamW(model, …), None)`, or
    `optimizer_cls_and_kwargs=(moetier.AdamW, {…})`, which gets Trainer's groups with and without decay.

    `train(resume_from_checkpoint=True)` goes on with the run's last step, a path or `checkpoint-N` with that one, bit
    for bit as if it had never stopped; "auto" begins where there is no step yet. `save_total_limit` also holds for the
    steps of the run (`keep` does not). `save_model` exports an ordinary checkpoint.

    Raises `ConfigError` for arguments that cannot work with tiered experts.
    """

    optimizer: Any

    def __init__(self, model: Any = None, args: Any = None, *positional: Any, **named: Any):
        if find_spec("accelerate") is None:
            raise ConfigError("Trainer needs the package accelerate; install moetier[train]")
        if named.get("model_init") is not None or model is None:
            raise ConfigError("model_init: a run folder trains one model; load it and pass it as model")
        session = session_of(model)
        if model is not session.model or getattr(model, "_hf_peft_config_loaded", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} adds weights to a model that was loaded to be trained, which its run folder "
                "would not fit any more; for adapters on frozen experts load without train=, and use "
                "transformers.Trainer"
            )
        args = transformers.TrainingArguments("tmp_trainer") if args is None else args
        check_arguments(args)
        check_device(args, model)
        self._session: TrainingSession = session
        if session.routing is not None:
            self._told = session.routing.tally.copy()  # up to the last line of the log
        if args.torch_compile:
            if session.routing is not None:
                raise ConfigError(
                    f"{session.routing.levers}: routers that choose again cannot be compiled; leave it out"
                )
            compile_around_experts(model)
        super().__init__(model, args, *positional, **named)
        session.run.keep = None  # Trainer rotates
        if self.optimizer is not None:
            check_optimizer(self.optimizer, args)
        elif session.engine.owes:  # else no forward is possible, and evaluating needs one
            self.create_optimizer()

    # -- the optimizer -------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer that the arguments name, for parameters and experts, in Trainer's groups."""
        if self.optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            tiered = OPTIMIZERS.get(kind, kind)
            if not (isinstance(tiered, type) and issubclass(tiered, TieredOptimizer)):
                names = ", ".join(sorted(known.__name__ for known in OPTIMIZERS))
                raise ConfigError(
                    f"optim: {getattr(kind, '__name__', kind)} cannot train tiered experts; choose one that is {names} "
                    "of torch, or give optimizers=(moetier.AdamW(model, …), None)"
                )
            decays = set(self.get_decay_parameter_names(self.model))
            named = [(name in decays, p) for name, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for decay, p in named if decay], "weight_decay": self.args.weight_decay},
                {"params": [p for decay, p in named if not decay], "weight_decay": 0.0},
            ]
            own: Any = tiered
            self.optimizer = own(self.model, groups, **options)
            check_optimizer(self.optimizer, self.args)
        return self.optimizer

    # -- telling -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *positional: Any, **named: Any) -> None:
        """As Trainer does; where experts in memory are favoured, with what that did since the last line of training."""
        routing = self._session.routing
        if routing is not None and "loss" in logs:
            summary = routing.tally.since(self._told).summary()
            logs = logs | {f"routing_{name}": summary[name] for name in NUMBERS}
            self._told = routing.tally.copy()
        super().log(logs, *positional, **named)

    # -- going on ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **named: Any) -> Any:
        """Train, from the beginning of a run, or on from one of its steps; see `transformers.Trainer.train`.

        Raises `ConfigError` for a run that has steps where none is asked for, and for a step that it does not have;
        `StoreError` where it cannot be read or written: the last checkpoint stays as it is.
        """
        session = self._session
        run = session.run
        if resume_from_checkpoint == "auto":
            resume_from_checkpoint = run.step is not None
        if not resume_from_checkpoint:
            if run.step is not None and not self.args.save_only_model:
                raise ConfigError(
                    f"{run.folder}: the run is at step {run.step}; go on with train(resume_from_checkpoint=True), or "
                    "begin a new run in another folder"
                )
            return super().train(None, *positional, **named)
        step = self._step_of(resume_from_checkpoint)
        if not session.waiting or step != run.step:
            self.create_optimizer()  # the steps that experts owe are its own
            session.rewind(step)
        for kept in run.steps():
            self._show(kept)
        self._rotate()  # what a kill left
        return super().train(str(self._folder(step)), *positional, **named)

    def _step_of(self, which: str | bool) -> int:
        """The step of the run to go on with."""
        run = self._session.run
        there = ", ".join(map(str, run.steps())) or "none"
        if which is True:
            if run.step is None:
                raise ConfigError(f"{run.folder}: the run has no step to go on with yet; call train() to begin")
            return run.step if self._session.waiting else run.steps()[-1]
        found = re.fullmatch(r"checkpoint-(\d+)", Path(str(which)).name)
        if found is None or int(found[1]) not in run.steps():
            raise ConfigError(
                f"resume_from_checkpoint: {which} is no step of {run.folder}; there are: {there}; True takes the last"
            )
        return int(found[1])

    def _state(self, step: int) -> dict[str, Any]:
        """The Trainer's state that was committed with a step."""
        extra = self._session.extra(step)
        if not isinstance(extra, dict) or "trainer_state" not in extra:
            raise ConfigError(
                f"{self._session.run.folder}: step {step} was not made by moetier.Trainer; go on with the loop that "
                "made it, or begin a new run in another folder"
            )
        state: dict[str, Any] = extra["trainer_state"]
        return state

    def _folder(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _show(self, step: int) -> None:
        """Make the folder that stands for a step of the run, as a kill may have left the run without it."""
        state = self._state(step)
        folder = self._folder(step)
        text = json.dumps(state, indent=2, sort_keys=True) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(folder / STATE, text.encode())
            self._mark(folder, step)
        except OSError as error:
            raise StoreError(f"{folder}: the folder of step {step} cannot be written: {error.strerror}") from error

    def _mark(self, folder: Path, step: int) -> None:
        body = {
            "run": os.path.relpath(self._session.run.folder, folder),
            "step": step,
            "weights": "in the run folder; for an ordinary checkpoint: trainer.save_model(FOLDER)",
        }
        write_durably(folder / MARK, (json.dumps(body, indent=2) + "\n").encode())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the weights are those of the step already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._session.resume(**self._parts())

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: it came back with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._session.restore_generators()

    def _load_best_model(self) -> None:
        step = self.state.best_global_step
        self._session.rewind(step)
        self._session.resume(**self._parts())

    def _parts(self) -> dict[str, Any]:
        """What a step holds beside what every training has."""
        parts = {"scheduler": self.lr_scheduler, "scaler": getattr(self.accelerator, "scaler", None)}
        return {name: part for name, part in parts.items() if part is not None}

    # -- saving --------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write an ordinary checkpoint of the model as it is by now, experts included, streaming."""
        if not _internal_call or self.args.save_only_model:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's own state, and then a step of the run with it. One without the other is mended by `train`."""
        if self.args.save_only_model:
            super()._save_checkpoint(model, trial)
            return
        step = int(self.state.global_step)
        folder = self._folder(step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._mark(folder, step)
            super()._save_checkpoint(model, trial)
            state = json.loads((folder / STATE).read_text("utf-8"))
            self._session.commit(step, {"trainer_state": state}, **self._parts())
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, StoreError):
                raise StoreError(f"{folder}: step {step} cannot be saved: {error.strerror}") from error
            raise
        self._rotate()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Nothing: they are in the step of the run."""

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: it is in the step of the run."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: they are in the step of the run."""

    def _finalize_training(self, *positional: Any, **named: Any) -> Any:
        result = super()._finalize_training(*positional, **named)
        if not self.args.save_only_model:
            self._rotate()
        return result

    def _rotate(self) -> None:
        """Steps without a folder go, and folders of this run without a step."""
        run = self._session.run
        for step in run.steps():
            if not self._folder(step).is_dir() and step != run.step:
                run.drop(step)
        there = {self._folder(step) for step in run.steps()}
        for mark in Path(self.args.output_dir).glob(f"checkpoint-*/{MARK}"):
            if mark.parent not in there and self._is_mine(mark):
                shutil.rmtree(mark.parent, ignore_errors=True)

    def _is_mine(self, mark: Path) -> bool:
        """Whether a checkpoint folder stands for a step of this run."""
        try:
            named = json.loads(mark.read_text("utf-8"))["run"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return (mark.parent / str(named)).resolve() == self._session.run.folder.resolve()


def compile_around_experts(model: Any) -> None:
    """Have `torch.compile` leave the experts alone, which are loops over leases, and the hooks that watch the model."""
    for _, module in find_experts(model):
        module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number, hook in hooks.items():
            hooks[number] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]


def check_arguments(args: Any) -> None:
    """Raise `ConfigError` for arguments of Trainer that tiered experts in training do not allow."""
    refused = {
        "world_size": (args.world_size > 1, "a run folder is trained by one process; start one"),
        "push_to_hub": (args.push_to_hub, "a tiered model is saved to a folder; save_model, and upload that"),
        "auto_find_batch_size": (
            args.auto_find_batch_size,
            "a failed attempt would have trained already; give per_device_train_batch_size",
        ),
        "save_only_model": (
            args.save_only_model and args.load_best_model_at_end,
            "the best model is taken from the steps of the run, and there are none; leave one of the two out",
        ),
        "enable_jit_checkpoint": (
            getattr(args, "enable_jit_checkpoint", False),
            "it saves between a backward and its step, and a step of the run has no gradients; use save_steps",
        ),
        "fsdp": (bool(args.fsdp), "tiered experts cannot be sharded; leave it out"),
        "deepspeed": (bool(args.deepspeed), "tiered experts cannot be sharded; leave it out"),
    }
    for name, (wrong, why) in refused.items():
        if wrong:
            raise ConfigError(f"{name}: {why}")


def check_device(args: Any, model: Any) -> None:
    """Raise `ConfigError` where Trainer would compute elsewhere than the model was loaded to, or on several GPUs."""
    here, there = model.device, args.device
    if (here.type, here.index or 0) != (there.type, there.index or 0):
        way = "pass use_cpu=True" if here.type == "cpu" else "load the model with device=, or leave use_cpu out"
        raise ConfigError(f"the model was loaded to {here}, and Trainer's arguments compute on {there}; {way}")
    if args.n_gpu > 1:
        raise ConfigError(
            f"n_gpu: Trainer would copy the model to {args.n_gpu} GPUs, and a run folder is trained on one; set "
            "CUDA_VISIBLE_DEVICES to one of them"
        )


def check_optimizer(optimizer: Any, args: Any) -> None:
    """Raise `ConfigError` for an optimizer that cannot train the experts as the arguments say."""
    if not isinstance(optimizer, TieredOptimizer):
        raise ConfigError(
            f"optimizers: {type(optimizer).__name__} cannot train tiered experts; give moetier.AdamW(model, …)"
        )
    if optimizer.updates_in_backward and (args.max_grad_norm > 0 or args.gradient_accumulation_steps > 1):
        raise ConfigError(
            "update='backward' applies gradients before Trainer clips or accumulates them; pass max_grad_norm=0 and "
            "gradient_accumulation_steps=1, or use update='step'"
        )
