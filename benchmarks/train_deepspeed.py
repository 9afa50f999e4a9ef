"""DeepSpeed's ZeRO-Infinity as a peer in training: fp32 masters, moments and gradients in files on the disk.

Needs a package that nothing else here does (`pip install deepspeed`), and what compiles its operators on first use: a
C++ compiler, ninja, and the headers of libaio (`apt-get install libaio-dev`). Knows nothing about limits or reports.

The weights stay in memory: without an accelerator, DeepSpeed computes wrong gradients where they are on the disk too
(docs/benchmarks.md).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import Shape

Spec = dict[str, Any]
NAME = "deepspeed-nvme"
NEEDS = "it needs libaio's headers, a C++ compiler and ninja, see docs/benchmarks.md"
OPERATORS = ("AsyncIOBuilder", "CPUAdamBuilder", "ShareMemCommBuilder")  # the last one's for every group of processes


def check() -> None:
    """Raises `SystemExit` where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise SystemExit(f"error: {NAME}: DeepSpeed is not installed: pip install deepspeed; {NEEDS}")


def task_build(spec: Spec) -> dict[str, Any]:
    """Compile the operators, which takes minutes the first time. Raises `SystemExit` where one cannot be had."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    for name in OPERATORS:
        try:
            get_accelerator().create_op_builder(name).load(verbose=False)
        except Exception as error:  # whatever the compiler, ninja or the linker had to say
            raise SystemExit(f"{error}\nerror: {NAME}: DeepSpeed's {name} cannot be compiled; {NEEDS}") from error
    return {"version": version("deepspeed")}


def config(shape: Shape, spec: Spec, folder: Path) -> dict[str, Any]:
    """All that DeepSpeed can have on the disk here, in the smallest pieces: a layer's stacked experts are one."""
    largest = shape.experts * 2 * shape.intermediate * shape.hidden
    return {
        "train_micro_batch_size_per_gpu": spec["rows"],
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": str(folder)},
            "sub_group_size": largest,
            "reduce_bucket_size": largest,
        },
        "aio": {"queue_depth": 16},  # of 1 MiB: as many bytes in flight as where the disk's speed is measured
        "optimizer": {"type": "AdamW", "params": {"lr": spec["lr"], "weight_decay": 0.01}},  # torch's other defaults
        "gradient_clipping": 0.0,  # by default, norms above 1 are clipped, which the other arms do not do
        "bf16": {"enabled": spec["dtype"] == "bfloat16"},
        "steps_per_print": 1 << 30,
    }


@dataclass
class Optimizer:
    """The engine's `step` as an optimizer's."""

    step: Callable[[], Any]

    def zero_grad(self) -> None:
        """`step` does it."""


def load(spec: Spec) -> tuple[Any, Any]:
    """The model as DeepSpeed's engine, to which `loss.backward()` belongs too, and what steps it; a single process."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    folder = Path(spec["run"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = config(Shape(**spec["shape"]), spec, folder)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    stage3 = HfDeepSpeedConfig(settings)  # as long as it lives, `from_pretrained` hands parameters to DeepSpeed
    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype="auto").train()
    del stage3
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]
    return engine, Optimizer(engine.step)
