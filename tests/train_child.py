"""A training run in a process of its own, for tests that kill it: trains to the last step, and writes what came out.

    python train_child.py CHECKPOINT RUN STEPS RESULT [PAUSE]

Every step is committed; `PAUSE` seconds at most pass between two steps.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import moetier
from training import batch, load_trained, trained_experts


def main(checkpoint: str, folder: str, steps: int, result: Path, pause: float = 0.0) -> None:
    """Go on from the last commit, and save the final weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_trained(Path(checkpoint), Path(folder), slots=4, state_slots=3, gradient_slots=3)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    optimizer = moetier.AdamW(model, lr=0.01, weight_decay=0.1, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    found = optimizer.resume(scheduler=scheduler)
    print("ready", flush=True)
    for step in range(0 if found is None else found["step"], steps):
        model(**batch(step), use_cache=False).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        model.moetier.commit(scheduler=scheduler)
        print(step + 1, flush=True)
        time.sleep(pause)
    tensors = {f"{key} {name}": t for key, fields in trained_experts(model).items() for name, t in fields.items()}
    tensors |= {name: p.data.clone() for name, p in model.named_parameters() if not name.endswith("proxy.weight")}
    save_file(tensors, result)
    model.moetier.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), *map(float, sys.argv[5:]))
