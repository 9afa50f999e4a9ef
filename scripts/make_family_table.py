"""Writes docs/families.md: runs every family of tests/families.py out of core and tells what came of it."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import moetier  # noqa: E402
from families import FAMILIES, VOCAB, WITHOUT_HOOK, Family, available, make_checkpoint  # noqa: E402
from moetier.hf import find_experts  # noqa: E402
from moetier.stores.shards import Shards  # noqa: E402

INTRODUCTION = """\
# Families

Which Mixture-of-Experts families run out of core. *bit-identical* means: a tiny checkpoint of the family, with a
quarter of its experts resident, gives the same bits as the plain model in memory: for a batched prefill, for
one-token steps with a cache, and for greedy generation from a padded batch. `tests/test_families.py` checks this, with
three eviction policies for each family and several families for each policy; with `MOETIER_COMBINATIONS=all`, with all
policies for all families.

moetier knows no family by name. It runs those whose experts module uses the experts interface of transformers
(`use_experts_implementation`), and reads their checkpoints by the model's own loading rules. A family that is not
listed and uses that interface should run too.

This page is written by `scripts/make_family_table.py`; made with transformers {version}. In the column *stored*,
*per expert* means one tensor per expert and matrix, *fused* one tensor for all experts of a layer; *as they are*
means that an expert's bytes are read straight into its slot, *converted* that the loader's operations run on each
expert as it is read.

| family | experts module | stored | differs from the default by | outcome |
| --- | --- | --- | --- | --- |
"""

NOTES = """
Quantised checkpoints (fp8, mxfp4, …) are refused for now: load an fp32, fp16 or bf16 one. In float32 on a CPU, the
product of a single row can depend in its last bit on where in memory the weights start; this holds for transformers
too, whose weights start where the file puts them.
"""


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lines = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        for family in (*FAMILIES.values(), *WITHOUT_HOOK.values()):
            if not available(family):
                sys.exit(f"transformers {transformers.__version__} has no {family.name}; upgrade it to make the table")
            lines.append("| " + " | ".join(row(family, Path(scratch) / family.name)) + " |")
            print(lines[-1])
    text = INTRODUCTION.format(version=transformers.__version__) + "\n".join(lines) + "\n" + NOTES
    (ROOT / "docs" / "families.md").write_text(text)


def row(family: Family, folder: Path) -> tuple[str, ...]:
    kind = getattr(transformers, family.model)
    make_checkpoint(family, folder)
    plain = kind.from_pretrained(folder, dtype="auto")
    name = f"`{family.name}`"
    try:
        _, module = find_experts(plain)[0]
    except moetier.UnsupportedModelError:
        return name, "–", "–", family.note or "–", "refused: its experts do not use the experts interface"
    experts, flags = type(module).__name__, differences(module)
    try:
        model = moetier.from_pretrained(folder, slots="25%", context=64, model_class=kind)
    except moetier.UnsupportedModelError as error:
        reason = str(error).partition(": ")[2].partition(" (")[0]
        return name, experts, "per expert", flags, f"refused: {reason}"
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    same = torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    made = [m.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None) for m in (plain, model)]
    outcome = "bit-identical" if same and torch.equal(*made) else "differs"
    model.moetier.close()
    return name, experts, storage(folder, model), flags, outcome


def storage(folder: Path, model: Any) -> str:
    """How the file holds the experts, and whether their bytes are used as they are."""
    layer = model.moetier.layers[0]
    entries = [Shards.open(folder).tensors[name] for name in layer.tensors]
    recipe = layer.recipes[0]
    per_expert = len(entries) > len(layer.layout.fields) * 2
    matrix = max(entries, key=lambda entry: len(entry.shape))
    example = re.sub(r"^.*?layers\.\d+\.", "", matrix.name)
    converted = ", ".join(f"`{conversion.field}`" for conversion in recipe.conversions)
    how = f"{converted} converted" if converted else "as they are"
    return f"{'per expert' if per_expert else 'fused'} (`{example}`), {how}"


def differences(module: Any) -> str:
    flags = {
        "no gate": not module.has_gate,
        "biases": module.has_bias,
        "transposed": module.is_transposed,
        "gate and up interleaved": not getattr(module, "is_concatenated", True),
        "norm behind each expert": module.has_post_expert_norm,
        "own gate function": "_apply_gate" in vars(type(module)) and custom_gate(module),
    }
    return ", ".join(name for name, present in flags.items() if present) or "–"


def custom_gate(module: Any) -> bool:
    return str(vars(type(module))["_apply_gate"].__module__).startswith("transformers.models.")


if __name__ == "__main__":
    main()
