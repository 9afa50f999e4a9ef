"""Every family that transformers decorates runs out of core with the very bits it gives in memory, or is refused.

Each family meets `horizon` and two other eviction policies; with `MOETIER_COMBINATIONS=all`, all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moetier
from combinations import dealt
from conftest import family_class
from families import FAMILIES, VOCAB, WITHOUT_HOOK
from moetier import UnsupportedModelError
from moetier.attach import build_cache
from moetier.options import Options
from prepared import ONLINE

REFUSED = {"ernie4_5_vl_moe": "feed several parameters at once"}
"""Families with the experts interface whose checkpoints cannot be read expert by expert, and what the error says."""

RUNNING = [name for name in FAMILIES if name not in REFUSED]
DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
NEW_TOKENS = 3


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def padded() -> dict[str, torch.Tensor]:
    """A batch of two prompts, the first shorter and padded on the left."""
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    ids[0, :3] = mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Outputs:
    """What a model gives: logits of a batched prefill, and tokens and logits of every step of a greedy generation."""

    prefill: torch.Tensor
    sequences: torch.Tensor
    steps: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, model: Any) -> Outputs:
        """Run the model: a prefill without padding, then prefill and one-token steps with a cache, left padded."""
        prefill = model(input_ids=tokens(), use_cache=True).logits
        made = model.generate(
            **padded(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return cls(prefill, made.sequences, made.logits)

    def check(self, other: Outputs) -> None:
        """Raise unless both are equal, bit for bit."""
        assert torch.isfinite(self.prefill).all()
        assert torch.equal(self.prefill, other.prefill)
        assert torch.equal(self.sequences, other.sequences)
        assert len(self.steps) == len(other.steps) == NEW_TOKENS
        for mine, theirs in zip(self.steps, other.steps, strict=True):
            assert torch.equal(mine, theirs)


@dataclass(frozen=True)
class Pair:
    """A family's in-memory outputs and its tiered model."""

    expected: Outputs
    model: Any

    def use(self, policy: str) -> None:
        """Give the model a new, empty cache with another policy."""
        old = self.model.moetier
        options = Options(slots="25%", policy=policy, context=64)
        cache, _ = build_cache(old.cache.store, old.plan, options, torch.device("cpu"))
        old.cache.mover.close()
        old.cache = cache


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Iterator[Pair]:
    kind = family_class(request.param)
    folder = checkpoint(request.param)
    with torch.no_grad():
        expected = Outputs.of(kind.from_pretrained(folder, dtype="auto").eval())
    model = moetier.from_pretrained(folder, slots="25%", model_class=kind, context=64)
    yield Pair(expected, model)
    model.moetier.close()


@pytest.mark.parametrize(("pair", "policy"), dealt(RUNNING, ONLINE, 2, ["horizon"]), indirect=["pair"])
def test_bits_do_not_change(pair: Pair, policy: str) -> None:
    pair.use(policy)
    plan = pair.model.moetier.plan
    assert plan.slots == round(plan.workload.records / 4)
    pair.expected.check(Outputs.of(pair.model))
    (top,) = pair.model.moetier.stats()["tiers"]
    assert top["policy"] == policy and sum(top["misses"]) > 0


@pytest.mark.parametrize("name", REFUSED)
def test_checkpoints_that_mix_experts_are_refused(name: str, tiered: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        tiered(name)


@pytest.mark.parametrize("name", WITHOUT_HOOK)
def test_families_without_the_interface_are_refused(name: str, tiered: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="do not use the experts interface of transformers") as caught:
        tiered(name)
    assert "docs/families.md" in str(caught.value)


# One family per way of storing experts: per expert, fused, fused and transposed with biases, fused under another name,
# without gate, with a norm behind each expert, interleaved.
LAYOUTS = ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "aria_text", "nemotron_h", "muse_spark", "inkling2_text"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_dtypes(name: str, dtype: torch.dtype, plain: Callable[..., Any], tiered: Callable[..., Any]) -> None:
    model = tiered(name, dtype)
    assert {field.dtype for m in model.moetier.layers for field in m.layout.fields} == {dtype}
    Outputs.of(plain(name, dtype)).check(Outputs.of(model))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_cast_while_loading(
    name: str,
    stored: torch.dtype,
    wanted: torch.dtype,
    checkpoint: Callable[..., Path],
    tiered: Callable[..., Any],
) -> None:
    expected = Outputs.of(family_class(name).from_pretrained(checkpoint(name, stored), dtype=wanted).eval())
    expected.check(Outputs.of(tiered(name, stored, dtype=wanted)))


def test_transposed_as_on_the_hub(checkpoint: Callable[..., Path], tmp_path: Path, tiered: Callable[..., Any]) -> None:
    """Qwen3-VL's own files hold [E, H, 2I] and [E, I, H]; save_pretrained writes them the other way round."""
    kind, folder = family_class("qwen3_vl_moe"), checkpoint("qwen3_vl_moe")
    tensors = load_file(folder / "model.safetensors")
    turned = [key for key in tensors if re.search(r"experts\.(gate_up|down)_proj$", key)]
    assert turned
    for key in turned:
        assert tensors[key].shape[1] != tensors[key].shape[2]
        tensors[key] = tensors[key].transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = Outputs.of(kind.from_pretrained(folder, dtype="auto").eval())
    expected.check(Outputs.of(kind.from_pretrained(tmp_path, dtype="auto").eval()))
    expected.check(Outputs.of(tiered(tmp_path, model_class=kind)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_of_a_layer_span_shards(
    name: str, checkpoint: Callable[..., Path], plain: Callable[..., Any], tmp_path: Path, tiered: Callable[..., Any]
) -> None:
    model = family_class(name).from_pretrained(checkpoint(name), dtype="auto")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    sharded = tiered(tmp_path, model_class=family_class(name))
    layer = sharded.moetier.layers[0]
    extents = [
        extent
        for recipe in layer.recipes
        for extent in (*recipe.extents, *(s.extent for c in recipe.conversions for s in c.sources))
    ]
    assert len({extent.file for extent in extents}) > 1
    Outputs.of(plain(name)).check(Outputs.of(sharded))


@pytest.mark.parametrize("experts_per_token", [1, 2, 8])
def test_any_number_of_experts_per_token(experts_per_token: int, tmp_path: Path, tiered: Callable[..., Any]) -> None:
    from families import make_checkpoint

    family = FAMILIES["mixtral"]
    settings = dict(family.settings) | {"num_experts_per_tok": experts_per_token}
    make_checkpoint(replace(family, settings=settings), tmp_path)
    expected = Outputs.of(family_class("mixtral").from_pretrained(tmp_path, dtype="auto").eval())
    for slots in (1, 3, "100%"):
        model = tiered(tmp_path, slots=slots)
        assert model.moetier.plan.workload.top_k == experts_per_token
        expected.check(Outputs.of(model))


def test_the_documented_table_is_up_to_date() -> None:
    """docs/families.md comes from scripts/make_family_table.py."""
    rows = [line.split("|")[1:-1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    documented = {cells[0].strip().strip("`"): cells[-1].strip() for cells in rows}
    assert list(documented) == [*FAMILIES, *WITHOUT_HOOK]
    for name, outcome in documented.items():
        if name in RUNNING:
            assert outcome == "bit-identical", name
        else:
            assert outcome.startswith("refused: "), name
