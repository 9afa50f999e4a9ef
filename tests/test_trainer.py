"""The Trainer of transformers with tiered experts: as in memory, stopped and resumed, evaluated, exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import moetier
from device_training import kernels_at_once, late_device, two_tiers
from families import VOCAB
from moetier.training import reference
from moetier.training.balance import NUMBERS
from moetier.training.trainer import check_device
from training import (
    NAME,
    assert_close,
    assert_same,
    batch,
    load_reference,
    load_trained,
    model_class,
    trained_experts,
)

Get = Callable[..., Any]

CHECKPOINTING = {f.name for f in fields(TrainingArguments)} & {"activation_checkpointing"} or {"gradient_checkpointing"}


@pytest.fixture(autouse=True)
def with_gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def samples(count: int, seed: int = 0, length: int = 8) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "seed": 7,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "log_level": "error",
    }
    return TrainingArguments(str(folder), **(given | options))


class Until(TrainerCallback):
    """Ends the process's training after a step, saved or not."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Runs:
    """Models that train in run folders below a folder, closed in the end."""

    def __init__(self, checkpoint: Path, folder: Path):
        self.checkpoint, self.folder, self.models = checkpoint, folder, list[Any]()

    def trainer(self, name: str = "run", kind: Any = None, load: Any = None, until: int = 0, **options: Any) -> Any:
        """A model with dropout in its attention (so that random states matter) and its Trainer."""
        self.models.append(load_trained(self.checkpoint, self.folder / name, **(load or {})))
        named = {key: options.pop(key) for key in ("optimizers", "optimizer_cls_and_kwargs") if key in options}
        return made(
            kind or moetier.Trainer, self.models[-1], arguments(self.folder / f"{name}-out", **options), until, **named
        )

    def close(self) -> None:
        for model in self.models:
            model.moetier.close()
        self.models.clear()


def made(kind: Any, model: Any, args: Any, until: int = 0, **named: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    callbacks = [Until(until)] if until else []
    data = {"train_dataset": samples(10), "eval_dataset": samples(6, 1)}
    return kind(model=model, args=args, callbacks=callbacks, **data, **named)


@pytest.fixture
def runs(checkpoint: Get, tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(checkpoint(NAME, torch.float32), tmp_path)
    yield runs
    runs.close()


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    """All weights, and the resident state of the optimizer."""
    model = trainer.model
    found = {f"{key} {name}": t for key, own in trained_experts(model).items() for name, t in own.items()}
    found |= {name: p.data.clone() for name, p in model.named_parameters() if not name.endswith("proxy.weight")}
    for number, entries in trainer.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value.clone() for name, value in entries.items()}
    return found


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


KINDS = {
    "plain": {"max_grad_norm": 0.0},
    "clipped": {"max_grad_norm": 0.3},
    "accumulated, clipped": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.3},
    "checkpointed": {"gradient_accumulation_steps": 2, **dict.fromkeys(CHECKPOINTING, True)},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_trainer_in_memory(kind: str, runs: Runs, checkpoint: Get, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no"} | KINDS[kind]
    mine = runs.trainer(load={"slots": "25%"}, **options)
    assert mine.model.moetier.plan.slots == 6  # of 24, and a token uses 3 of 8 in each of 3 layers
    mine.train()
    plain = load_reference(checkpoint(NAME, torch.float32), implementation="grouped_mm")
    theirs = made(transformers.Trainer, plain, arguments(tmp_path / "memory", **options))
    theirs.train()
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-6)
    norms = [[e["grad_norm"] for e in each.state.log_history if "grad_norm" in e] for each in (mine, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and len(norms[0]) == 6
    assert mine.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-6)
    if kind == "sgd":  # in Adam, the sign of a gradient of nearly nothing decides about a whole step
        assert_close(mine.model, plain, 1e-5)


def test_mixed_precision_is_that_in_memory(runs: Runs, checkpoint: Get, tmp_path: Path) -> None:
    """Autocast casts what is around the experts; their products stay in fp32, as in `grouped_mm`.

    A difference in the last bit of fp32 does not stay one: it decides how some activation is rounded to bf16. So the
    reference is compared to the bit, and `grouped_mm` in the first step. (Products in bf16 would be 1e-3 off there.)
    """
    options: dict[str, Any] = {"save_strategy": "no", "bf16": True, "gradient_accumulation_steps": 2, "max_steps": 3}
    options["max_grad_norm"] = 0.0  # Trainer clips with a norm that it adds up in another order
    mine = runs.trainer(load={"slots": "25%"}, **options)
    mine.train()
    trainers = [mine]
    for implementation in (reference.NAME, "grouped_mm"):
        plain = load_reference(checkpoint(NAME, torch.float32), implementation=implementation)
        trainers.append(made(transformers.Trainer, plain, arguments(tmp_path / "memory", **options)))
        trainers[-1].train()
    _, same, grouped = trainers
    assert losses(mine) == losses(same) and losses(mine)[0] != losses(mine)[-1]
    assert_same(mine.model, same.model)
    for name in ("loss", "grad_norm"):
        assert mine.state.log_history[0][name] == pytest.approx(grouped.state.log_history[0][name], rel=1e-5)
    assert losses(mine) == pytest.approx(losses(grouped), rel=5e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 3, "save_steps": 1, "max_grad_norm": 0.3}, {"save_strategy": "epoch"}],
    ids=["steps", "accumulated", "epochs"],
)
def test_resumed_is_as_never_stopped(options: dict[str, Any], runs: Runs) -> None:
    """Across an epoch's end (5 batches of 2), with dropout, a schedule, and evaluations that use the generators."""
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 2} | options
    whole = runs.trainer("whole", **options)
    whole.train()
    first = runs.trainer(until=7, **options)
    first.train()
    first.model.moetier.close()
    torch.manual_seed(99)
    second = runs.trainer(**options)
    at = second.model.moetier.training.run.step
    assert at in (5, 6, 7)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 8 and losses(second) == losses(whole)
    evaluations = [[e for e in each.state.log_history if "eval_loss" in e] for each in (second, whole)]
    assert [e["eval_loss"] for e in evaluations[0]] == [e["eval_loss"] for e in evaluations[1]]
    assert_equal(everything(second), everything(whole))
    assert len(losses(whole)) == len(set(losses(whole))) == 8


def folders(trainer: Any) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def steps(trainer: Any) -> list[int]:
    return list(trainer.model.moetier.training.run.steps())


def test_steps_and_folders_are_rotated_together(runs: Runs) -> None:
    trainer = runs.trainer(save_steps=1, save_total_limit=2)
    trainer.train()
    assert folders(trainer) == steps(trainer) == [5, 6]
    # weights, states and generators are in the run folder only, and nothing was pickled
    assert {path.name for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()} == {
        "trainer_state.json",
        "moetier-step.json",
    }


@pytest.mark.parametrize("limit", [1, None])
def test_what_a_kill_left_is_mended(limit: int | None, runs: Runs) -> None:
    options = {"save_steps": 2, "save_total_limit": limit}
    whole = runs.trainer("whole", **options)
    whole.train()
    first = runs.trainer(until=4, **options)
    first.train()
    kept = [4] if limit else [2, 4]
    assert folders(first) == steps(first) == kept
    runs.close()
    output = Path(first.args.output_dir)
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-6")  # killed between the folder and the step
    (output / "checkpoint-6/trainer_state.json").write_text('{"torn')
    shutil.rmtree(output / "checkpoint-4")  # its rotation had gone first
    second = runs.trainer(**options)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole)
    assert folders(second) == steps(second) == ([6] if limit else [2, 4, 6])


def test_a_commit_that_fails_leaves_the_step_before(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = runs.trainer()
    commit, left = trainer._session.commit, 1

    def failing(*given: Any, **named: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise moetier.StoreError("No space left on device")
        return int(commit(*given, **named))

    monkeypatch.setattr(trainer._session, "commit", failing)
    with pytest.raises(moetier.StoreError, match="No space left"):
        trainer.train()
    assert folders(trainer) == steps(trainer) == [2]


@pytest.mark.parametrize("experts", [None, "hot-cold(threshold=0.03)"])
def test_any_step_can_be_gone_on_from_and_the_same_process_can_go_on(experts: str | None, runs: Runs) -> None:
    options: dict[str, Any] = {"optimizer_cls_and_kwargs": (moetier.AdamW, {"lr": 0.01, "experts": experts})}
    trainer = runs.trainer(save_steps=1, **options)
    trainer.train()
    expected, weights = losses(trainer), everything(trainer)

    def goes_on(trainer: Any, **where: Any) -> None:
        trainer.train(**where)
        assert losses(trainer) == expected
        assert_equal(everything(trainer), weights)

    goes_on(trainer, resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3"))  # back in time
    runs.close()
    again = runs.trainer(save_steps=1, **options)
    goes_on(again, resume_from_checkpoint="checkpoint-2")  # the model was loaded at step 6
    assert steps(again) == [1, 2, 3, 4, 5, 6]
    if experts is not None:
        return  # the rest is the Trainer's own doing, whatever the optimizer keeps
    runs.close()
    goes_on(runs.trainer(save_steps=1, load={"train_step": 4}, **options), resume_from_checkpoint=True)
    stopped = runs.trainer("stopped", until=5, **options)  # saved at 4
    stopped.train()
    stopped.remove_callback(Until)
    goes_on(stopped, resume_from_checkpoint=True)


@pytest.mark.parametrize("limit", [1, None])
def test_the_best_model_is_back_at_the_end(limit: int | None, runs: Runs) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.05, "warmup_steps": 0}
    trainer = runs.trainer(load_best_model_at_end=True, save_total_limit=limit, lr_scheduler_type="constant", **options)
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = found.index(min(found))
    assert best + 1 == trainer.state.best_global_step < 6, "the test needs a model that gets worse"
    assert trainer.evaluate()["eval_loss"] == found[best]
    assert folders(trainer) == steps(trainer) == ([best + 1] if limit else [1, 2, 3, 4, 5, 6])


def test_evaluates_a_stopped_run_and_exports_it(runs: Runs, tmp_path: Path) -> None:
    first = runs.trainer()
    first.train()
    runs.close()
    trainer = runs.trainer()  # most experts of its last step owe decay, which only an optimizer can make
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    trainer.model.save_pretrained(tmp_path / "also")
    for folder in ("saved", "also"):
        plain = model_class().from_pretrained(tmp_path / folder, dtype="auto")
        with torch.no_grad():
            theirs = [plain.eval()(**batch(7)).loss, trainer.model.eval()(**batch(7)).loss]
        assert torch.equal(*theirs)
        other = made(transformers.Trainer, plain, arguments(tmp_path / "plain"))
        assert other.evaluate()["eval_loss"] == loss


def test_exports_only_where_only_models_are_asked_for(runs: Runs) -> None:
    trainer = runs.trainer(save_only_model=True, max_steps=2)
    trainer.train()
    assert steps(trainer) == [] and folders(trainer) == [2]
    model_class().from_pretrained(Path(trainer.args.output_dir) / "checkpoint-2")


def test_its_own_optimizer_and_schedule(runs: Runs) -> None:
    kind = (moetier.AdamW, {"lr": 0.01, "idle": "skip", "experts": "sgd"})
    trainer = runs.trainer(optimizer_cls_and_kwargs=kind, until=4)
    trainer.train()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    model = load_trained(runs.checkpoint, runs.folder / "other")
    runs.models.append(model)
    optimizer = moetier.AdamW(model, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = made(moetier.Trainer, model, arguments(runs.folder / "o", max_steps=3), optimizers=(optimizer, schedule))
    trainer.train()
    assert optimizer.param_groups[0]["lr"] == 0.01 * 0.5**3
    model.moetier.close()
    model = load_trained(runs.checkpoint, runs.folder / "other")
    runs.models.append(model)
    optimizer = moetier.AdamW(model, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = made(moetier.Trainer, model, arguments(runs.folder / "o", max_steps=5), optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=True)
    assert optimizer.param_groups[0]["lr"] == 0.01 * 0.5**5 and model.moetier.training.step == 5


@pytest.mark.filterwarnings("ignore::UserWarning")  # of dynamo, about tensors of transformers
def test_compiled_around_the_experts(runs: Runs) -> None:
    plain = runs.trainer("plain", save_strategy="no", max_steps=2)
    plain.train()
    trainer = runs.trainer(save_strategy="no", max_steps=2, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-6)
    assert sum(torch._dynamo.utils.counters["frames"].values()) > 0


def test_what_cannot_be(runs: Runs, tmp_path: Path) -> None:
    trainer = runs.trainer(max_steps=2)
    model = trainer.model
    with pytest.raises(moetier.ConfigError, match="the run has no step to go on with yet"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    with pytest.raises(moetier.ConfigError, match=r"is at step 2; go on with train\(resume_from_checkpoint=True\)"):
        trainer.train()
    for which in (str(tmp_path / "checkpoint-7"), "elsewhere"):
        with pytest.raises(moetier.ConfigError, match=r"is no step of .*; there are: 2"):
            trainer.train(resume_from_checkpoint=which)
    wrong: dict[str, dict[str, Any]] = {
        "push_to_hub": {"push_to_hub": True},
        "auto_find_batch_size": {"auto_find_batch_size": True},
        "save_only_model": {"save_only_model": True, "load_best_model_at_end": True, "eval_strategy": "steps"},
    }
    for name, options in wrong.items():
        with pytest.raises(moetier.ConfigError, match=rf"^{name}: "):
            moetier.Trainer(model=model, args=arguments(tmp_path / "wrong", **options))
    with pytest.raises(moetier.ConfigError, match=r"^model_init: "):
        moetier.Trainer(args=arguments(tmp_path / "wrong"), model_init=lambda: model)
    with pytest.raises(moetier.ConfigError, match="AdamW cannot train tiered experts; give"):
        other = torch.optim.AdamW(model.parameters())
        moetier.Trainer(model=model, args=arguments(tmp_path / "wrong"), optimizers=(other, None))
    with pytest.raises(moetier.ConfigError, match=r"load it with moetier\.from_pretrained"):
        moetier.Trainer(model=load_reference(runs.checkpoint), args=arguments(tmp_path / "wrong"))
    trainer = runs.trainer("next", optim="adafactor")
    with pytest.raises(moetier.ConfigError, match="optim: Adafactor cannot train tiered experts; choose one"):
        trainer.train()
    trainer = runs.trainer("another", optimizer_cls_and_kwargs=(moetier.AdamW, {"update": "backward"}))
    with pytest.raises(moetier.ConfigError, match="pass max_grad_norm=0 and gradient_accumulation_steps=1"):
        trainer.train()


def test_a_step_of_a_plain_loop_is_not_taken_for_one_of_the_trainer(runs: Runs) -> None:
    model = load_trained(runs.checkpoint, runs.folder / "run")
    optimizer = moetier.AdamW(model)
    model(**batch(0), use_cache=False).loss.backward()
    optimizer.step()
    model.moetier.commit()
    model.moetier.close()
    with pytest.raises(moetier.ConfigError, match=r"step 1 was not made by moetier\.Trainer"):
        runs.trainer().train(resume_from_checkpoint=True)


def test_the_device_is_where_the_model_is(runs: Runs, tmp_path: Path) -> None:
    """What a machine with GPUs says when model and arguments do not go together."""
    model = load_trained(runs.checkpoint, runs.folder / "run")
    runs.models.append(model)
    gpu = SimpleNamespace(device=torch.device("cuda", 0), n_gpu=1)
    with pytest.raises(moetier.ConfigError, match=r"was loaded to cpu, .* compute on cuda:0; pass use_cpu=True"):
        check_device(gpu, model)
    there = SimpleNamespace(device=torch.device("cuda", 0))
    check_device(gpu, there)
    with pytest.raises(moetier.ConfigError, match="n_gpu: Trainer would copy the model to 2 GPUs"):
        check_device(SimpleNamespace(device=torch.device("cuda", 0), n_gpu=2), there)
    with pytest.raises(moetier.ConfigError, match=r"was loaded to cuda:0, .* compute on cpu; load the model"):
        check_device(SimpleNamespace(device=torch.device("cpu"), n_gpu=0), there)


def test_experts_on_a_late_device(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer with a stand-in for a GPU: the losses of one tier, to the bit."""
    found = []
    for late in (False, True):
        with monkeypatch.context() as patch:
            if late:
                kernels_at_once(patch, late_device(patch, 5))
                two_tiers(patch)
            model = load_trained(runs.checkpoint, tmp_path / f"run{late}", slots=3)
            runs.models.append(model)
            trainer = made(moetier.Trainer, model, arguments(tmp_path / f"out{late}", max_steps=3))
            trainer.train()
            found.append(losses(trainer))
            model.moetier.close()
    assert found[0] == found[1]


def test_the_plain_trainer_trains_but_does_not_resume_in_silence(runs: Runs, tmp_path: Path) -> None:
    """It keeps nothing of the experts' optimizer, and would go on from where the run folder is: at its beginning."""

    def plain() -> Any:
        model = load_trained(runs.checkpoint, runs.folder / "run")
        runs.models.append(model)
        args = arguments(tmp_path / "out", save_steps=1, max_steps=2)
        return made(transformers.Trainer, model, args, optimizers=(moetier.AdamW(model, lr=0.01), None))

    plain().train()
    runs.close()
    with pytest.raises(moetier.ConfigError, match=r"is of step 2, but the experts of this run are at 0; resume with"):
        plain().train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_adapters_on_frozen_experts(runs: Runs, checkpoint: Get, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)

    def tiered() -> Any:
        return moetier.from_pretrained(runs.checkpoint, slots=6, model_class=model_class(), device="cpu")

    found = []
    for load in (tiered, lambda: load_reference(runs.checkpoint, implementation="grouped_mm")):
        torch.manual_seed(0)
        model = peft.get_peft_model(load(), config)
        for layer in model.base_model.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        trainer = transformers.Trainer(
            model=model, args=arguments(tmp_path / f"out{len(found)}"), train_dataset=samples(10)
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    trained = peft.PeftModel.from_pretrained(tiered(), tmp_path / "out0/checkpoint-6").merge_and_unload()
    trained.save_pretrained(tmp_path / "merged")
    merged = model_class().from_pretrained(tmp_path / "merged", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(trained.eval()(**batch(0)).logits, merged(**batch(0)).logits)
    trained.moetier.close()
    model = load_trained(runs.checkpoint, runs.folder / "run")
    runs.models.append(model)
    with pytest.raises(moetier.UnsupportedModelError, match="for adapters on frozen experts load without train="):
        moetier.Trainer(model=peft.get_peft_model(model, config), args=arguments(tmp_path / "wrong"))


def test_routing_that_favours_experts_in_memory(runs: Runs) -> None:
    load = {"cache_prior": 0.7, "slots": 8}
    trainer = runs.trainer(load=load, max_steps=4, logging_steps=2, save_strategy="no")
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(lines) == 2 and all(line.keys() >= {f"routing_{name}" for name in NUMBERS} for line in lines)
    whole = trainer.model.moetier.stats()["routing"]
    mean = sum(line["routing_changed_tokens"] for line in lines) / 2
    assert whole["changed_tokens"] == pytest.approx(mean) and mean > 0
    assert "routing_cv" not in trainer.evaluate()
    trainer.model.moetier.close()
    with pytest.raises(moetier.ConfigError, match=r"cache_prior=0\.7: routers that choose again cannot be compiled"):
        runs.trainer("compiled", load=load, torch_compile=True)
