"""The CUDA path: device tier above a page-locked host tier. Skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import families
import moetier
from prepared import ONLINE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h"]


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[families.Family, Path]:
    family = families.FAMILIES[request.param]
    families.make_checkpoint(family, tmp_path / "model")
    return family, tmp_path / "model"


@pytest.mark.parametrize("policy", ONLINE)
def test_tiered_on_the_gpu_is_close_to_in_memory(folder: tuple[families.Family, Path], policy: str) -> None:
    family, path = folder
    model_class = getattr(transformers, family.model)
    plain = model_class.from_pretrained(path, dtype=torch.bfloat16, device_map={"": "cuda"})
    tiered = moetier.from_pretrained(
        path, slots="25%", host_memory="64MiB", policy=policy, model_class=model_class, device="cuda"
    )
    ids = torch.arange(24, device="cuda").view(2, 12)
    with torch.no_grad():
        expected, actual = plain(input_ids=ids).logits.float(), tiered(input_ids=ids).logits.float()
    # one product per expert against one grouped product: rounding may differ in the last bit of bf16
    assert (actual - expected).norm() <= 1e-2 * expected.norm()
    stats = tiered.moetier.stats()
    assert sum(stats["tiers"][0]["misses"]) > 0
    assert stats["links"]["host→device"]["bytes"] > 0
    tiered.moetier.close()


def test_slots_are_not_overwritten_while_kernels_read_them(folder: tuple[families.Family, Path]) -> None:
    """Two slots, many accesses queued without synchronisation: every result equals the one with all slots."""
    family, path = folder
    model_class = getattr(transformers, family.model)
    ids = torch.arange(24, device="cuda").view(2, 12)
    outputs = []
    for slots in ("100%", 2):
        model = moetier.from_pretrained(
            path, slots=slots, host_memory="64MiB", model_class=model_class, device="cuda", dtype=torch.bfloat16
        )
        with torch.no_grad():
            outputs.append(torch.stack([model(input_ids=ids).logits for _ in range(8)]))
        model.moetier.close()
    assert torch.equal(outputs[0], outputs[1])


def test_host_arena_is_page_locked(folder: tuple[families.Family, Path]) -> None:
    family, path = folder
    model = moetier.from_pretrained(
        path, slots=4, host_memory="64MiB", model_class=getattr(transformers, family.model), device="cuda"
    )
    assert model.moetier.cache.host.page_locked
    model.moetier.close()
    assert not model.moetier.cache.host.page_locked
