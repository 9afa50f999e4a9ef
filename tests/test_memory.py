"""The peak memory of a run stays within its plan, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import family_class
from families import FAMILIES
from moetier.sizing import BASE_WORKSPACE

MIB = 1 << 20
CHILD = """
import gc, json, sys, warnings
import torch, transformers
import moetier, moetier.loading
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
folder, kind, *ways = sys.argv[1:]
kind = getattr(transformers, kind)

def status(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(lines[name].split()[0]) * 1024

def load(way):
    if way == "plain":
        return kind.from_pretrained(folder, dtype="auto")
    if way == "tiered":
        return moetier.from_pretrained(folder, slots="25%", context=128, model_class=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = moetier.from_pretrained(folder, slots=1, context=128, model_class=kind)
        whole.moetier.close()
        work = whole.moetier.plan.workload
        budget = work.resident_nbytes + work.kv_nbytes + work.workspace_nbytes + work.slot_nbytes // 2
        del whole
        return moetier.from_pretrained(folder, host_memory=budget, context=128, model_class=kind)

def measure(way):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    base, result = status("VmRSS"), {}
    model = load(way)
    if way != "plain":
        plan = model.moetier.plan
        result |= {"total": plan.host_total_nbytes, "tier": plan.tiers[0].nbytes, "rest": plan.workload.resident_nbytes}
        result |= {"largest": max(entry.nbytes for entry in model.moetier.cache.store.shards.tensors.values())}
    result["loaded"] = status("VmHWM") - base
    ids = torch.arange(3, 103)[None]
    with torch.no_grad():
        greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    result["peak"] = status("VmHWM") - base
    result["tokens"] = output[0, 100:].tolist()
    if way != "plain":
        result["misses"] = sum(map(sum, (tier["misses"] for tier in model.moetier.stats()["tiers"])))
        model.moetier.close()
    return result

torch.mm(torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16))
print(json.dumps([measure(way) for way in ways]))
"""


def measure(folder: Path, name: str, *ways: str) -> list[dict[str, Any]]:
    """One process measures all ways, the first of them in its fresh memory."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), FAMILIES[name].model, *ways],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    results: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])  # stored per expert, stored fused
def test_the_peak_stays_within_the_plan(name: str, tmp_path: Path) -> None:
    kind = family_class(name)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "num_hidden_layers": 4}
    config = getattr(transformers, FAMILIES[name].config)(**dict(FAMILIES[name].settings) | sizes)
    model = kind._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    del model
    experts = 4 * 16 * 3 * 512 * 1024 * 2
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > experts == 192 * MIB

    ways = ["tiered", "plain"] if name == "mixtral" else ["tiered"]
    tiered, *plain = measure(tmp_path, name, *ways)
    sizes = {key: round(value / MIB, 1) for key, value in tiered.items() if key not in ("tokens", "misses")}
    print(f"{name}, MiB: {sizes}")
    assert 48 * MIB <= tiered["tier"] <= 49 * MIB
    assert tiered["total"] >= tiered["tier"] + tiered["rest"] + BASE_WORKSPACE
    assert tiered["peak"] <= tiered["total"]
    assert tiered["peak"] < experts / 2 and tiered["misses"] > 20
    # while loading, nothing is there but the other weights: no fused tensor is built, no slot is filled
    assert tiered["loaded"] <= tiered["rest"] + BASE_WORKSPACE
    if plain:  # the measurement would see a model in memory
        assert plain[0]["peak"] > experts and plain[0]["tokens"] == tiered["tokens"]
    else:
        assert tiered["largest"] == 16 * 2 * 512 * 1024 * 2
        assert tiered["loaded"] < tiered["rest"] + tiered["largest"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # rows of a file, and columns picked from rows
def test_the_peak_in_slices_stays_within_the_plan(name: str, tmp_path: Path) -> None:
    """Experts of 12 MiB through half of that, and the text is the plain model's."""
    kind = family_class(name)
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_local_experts": 4, "num_hidden_layers": 1}
    sizes |= {"layer_types": ["full_attention"]} if name == "gpt_oss" else {}
    config = getattr(transformers, FAMILIES[name].config)(**dict(FAMILIES[name].settings) | sizes)
    model = kind._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 103)[None]
    greedy: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, 100:].tolist()
    (chunked,) = measure(tmp_path, name, "chunked")
    print(name, {key: round(value / MIB, 1) for key, value in chunked.items() if key not in ("tokens", "misses")})
    assert chunked["tier"] <= 6.1 * MIB and chunked["largest"] >= 4 * MIB
    assert chunked["peak"] <= chunked["total"]
    assert chunked["tokens"] == expected and chunked["misses"] > 40
