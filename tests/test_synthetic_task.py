"""The teacher regression and its model, in memory: made from a seed, learnable, known to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from moetier.access import ExpertKey
from moetier.errors import ConfigError
from moetier.training.lookahead import Lookahead
from moetier.training.samplers import EnvironmentSampler
from moetier.training.synthetic import SyntheticConfig, SyntheticModel, expert_ranks, first_weights
from moetier.training.teachers import TeacherRegression, Teachers

TEACHERS = Teachers(environments=6, samples=40, width=16, outputs=3, hidden=4)


def model(**changes: Any) -> SyntheticModel:
    sizes = {"num_experts": 8, "hidden_size": 16, "intermediate_size": 24, "num_environments": 6, "num_outputs": 3}
    return SyntheticModel(SyntheticConfig(**sizes | {"num_hidden_layers": 2} | changes)).reset()


def test_the_task_is_made_from_its_seed() -> None:
    one, same = TeacherRegression(TEACHERS), TeacherRegression(TEACHERS)
    everything = range(len(one))
    batch, again = one.batch(everything), same.batch(everything)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert torch.equal(batch["environment"], torch.arange(6).repeat_interleave(40))
    other = TeacherRegression(Teachers(environments=6, samples=40, width=16, outputs=3, hidden=4, seed=1))
    assert not torch.equal(other.batch(everything)["target"], batch["target"])
    assert 0.1 < batch["target"].var() < 1
    row = one[47]
    assert all(torch.equal(row[name], batch[name][47]) for name in batch)


def test_held_out_samples_have_the_same_teachers() -> None:
    """A linear map fitted to one set explains the other: teachers of few hidden units are nearly linear."""
    seen, held_out = TeacherRegression(TEACHERS), TeacherRegression(TEACHERS, held_out=True)
    rows = range(40)
    inputs, target = seen.batch(rows)["inputs"], seen.batch(rows)["target"]
    others, truth = held_out.batch(rows)["inputs"], held_out.batch(rows)["target"]
    assert not torch.equal(inputs, others)
    fitted = others @ torch.linalg.lstsq(inputs, target).solution
    assert (fitted - truth).square().mean() < 0.5 * truth.square().mean()


def test_noise() -> None:
    quiet, loud = Teachers(1, 500, 8), Teachers(1, 500, 8, noise=0.5)
    difference = (
        TeacherRegression(loud).batch(range(500))["target"] - TeacherRegression(quiet).batch(range(500))["target"]
    )
    assert difference.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "named"), [({"samples": 0}, "samples"), ({"noise": -1.0}, "noise"), ({"seed": -1}, "seed")]
)
def test_wrong_tasks(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TeacherRegression(Teachers(**wrong))


@pytest.mark.parametrize(
    ("wrong", "named"), [({"num_experts_per_tok": 9}, "9 of 8"), ({"hidden_size": 0}, "hidden_size")]
)
def test_wrong_models(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        model(**wrong)


def test_the_experts_agree_with_transformers() -> None:
    batch = TeacherRegression(TEACHERS).batch(range(0, 240, 7))
    one = model()
    answers = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        one.set_experts_implementation(name)
        answers[name] = one(**batch).logits
    torch.testing.assert_close(answers["grouped_mm"], answers["eager"])
    torch.testing.assert_close(answers["batched_mm"], answers["eager"])


def test_weights_follow_from_the_seed() -> None:
    one, same, other = model(), model(), model(seed=1)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if "norm" not in name and "bias" not in name:
            assert not torch.equal(parameter, other.get_parameter(name))
    experts = one.moe_layers[1].experts
    alone = {name: torch.empty_like(getattr(experts, name)[5]) for name in ("gate_up_proj", "down_proj")}
    first_weights(0, ExpertKey(1, 5), alone)
    assert all(torch.equal(alone[name], getattr(experts, name)[5]) for name in alone)
    flat = experts.down_proj.flatten(1)
    assert not torch.equal(flat[0], flat[1])
    assert flat.std() == pytest.approx(24**-0.5, rel=0.05)


def test_a_hint_names_what_a_batch_uses() -> None:
    one, data = model(), TeacherRegression(TEACHERS)
    batch = data.batch([0, 41, 81, 82])
    used: list[ExpertKey] = []
    for number, layer in enumerate(one.moe_layers):
        index, weights = layer.choose(batch["environment"])
        assert torch.allclose(weights.sum(-1), torch.ones(4))
        used += [ExpertKey(number, expert) for expert in sorted(set(index.flatten().tolist()))]
    assert one.hint(batch) == used


def test_ranks_bring_environments_with_common_experts_together() -> None:
    one = model(num_hidden_layers=1)
    ranks = expert_ranks(one, torch.arange(6))
    order = ranks.argsort().tolist()
    keys = [one.expert_keys(torch.tensor([environment])) for environment in order]
    assert keys == sorted(keys) and sorted(ranks.tolist()) == list(range(6))
    assert torch.equal(expert_ranks(one, [3, 3, 0]), ranks[[3, 3, 0]])


def test_it_learns() -> None:
    data = TeacherRegression(TEACHERS)
    sampler = EnvironmentSampler(data, 24, environments=data.environments, episode_length=2, envs_per_batch=3)
    loader = Lookahead(DataLoader(data, batch_size=24, sampler=sampler))
    one = model()
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
    losses = []
    with torch.enable_grad():
        for _ in range(12):
            for batch in loader:
                loss = one(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])


def test_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    one = model()
    one.save_pretrained(tmp_path)
    again = SyntheticModel.from_pretrained(tmp_path)
    assert isinstance(again, PreTrainedModel) and again.config.num_environments == 6
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


class Seen(TrainerCallback):  # type: ignore[misc]
    """Stops training after some steps."""

    def __init__(self, stop: int | None):
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop:
            control.should_save = control.should_training_stop = True


class EpisodeTrainer(Trainer):  # type: ignore[misc]
    """As docs/sampling.md says: its own sampler, and a look-ahead over the Trainer's own iterator."""

    seen: list[list[int]]
    told: list[int]

    def _get_train_sampler(self, train_dataset: Any = None) -> EnvironmentSampler:
        data = self.train_dataset
        return EnvironmentSampler(
            data, self.args.train_batch_size, environments=data.environments, episode_length=2, envs_per_batch=2
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if not hasattr(self, "ahead"):
            self.told = []
            self.ahead = Lookahead([], 1, self.model.hint, self)
        return super().get_batch_samples(self.ahead.over(epoch_iterator), num_batches, device)

    def prefetch(self, keys: Any) -> int:
        self.told.append(len(keys))
        return 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(inputs["target"][:, 0].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_trainer_stops_and_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    data = TeacherRegression(TEACHERS)

    def run(folder: str, stop: int | None = None, resume: bool = False) -> EpisodeTrainer:
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=16,
            num_train_epochs=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            label_names=["target"],
            use_cpu=True,
        )
        trainer = EpisodeTrainer(model(), arguments, train_dataset=data, callbacks=[Seen(stop)])
        trainer.seen = []
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    with torch.enable_grad():
        whole = run("whole")
        first = run("cut", stop=11)
        second = run("cut", resume=True)
    assert len(whole.seen) == 30 and len(first.seen) == 21  # 8 updates an epoch, of 15 batches
    assert first.seen + second.seen == whole.seen
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name
    assert len(whole.told) == 30 and len(first.told) + len(second.told) == 30
    environments = data.environments[EpisodeTrainer._get_train_sampler(whole).batch(1)]
    assert len(set(environments.tolist())) == 2
