"""A plain PyTorch loop over a model whose experts are out of core.

    python examples/train_loop.py [MODEL] [--run FOLDER] [--steps N] [--save FOLDER]

Without MODEL it makes a tiny Mixture-of-Experts model with random weights and trains it from scratch, with a quarter of
its experts in memory. Stop it whenever you like, and start it again with the same --run: it goes on from the last
checkpoint. What is moetier's are the lines marked with (1), (2) and (3); the rest is any loop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moetier

TEXT = Path(__file__).read_bytes()  # its own source, byte by byte
LENGTH = 64


def make_model(folder: Path) -> None:
    """A checkpoint of 4 layers of 16 small experts."""
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def batch(step: int) -> dict[str, torch.Tensor]:
    """Pieces of the text; the same ones for the same step."""
    generator = torch.Generator().manual_seed(step)
    begins = torch.randint(0, len(TEXT) - LENGTH, (8,), generator=generator).tolist()
    ids = torch.tensor([list(TEXT[begin : begin + LENGTH]) for begin in begins])
    return {"input_ids": ids, "labels": ids}


def main() -> None:
    """Train, with a checkpoint every ten steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a checkpoint's folder")
    parser.add_argument("--run", type=Path, default=Path("train-loop-run"), help="where the run's state lives")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save", type=Path, help="where to save the trained model")
    arguments = parser.parse_args()
    path = arguments.model
    if path is None:
        path = arguments.run.with_name(arguments.run.name + "-model")
        if not path.exists():
            make_model(path)

    model = moetier.from_pretrained(path, train=arguments.run, slots="25%", device="cpu").train()  # (1)
    optimizer = moetier.AdamW(model, lr=3e-3, max_grad_norm=1.0)  # (2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=arguments.steps)
    found = optimizer.resume(scheduler=scheduler)
    for step in range(0 if found is None else found["step"], arguments.steps):
        loss = model(**batch(step), use_cache=False).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0 or step + 1 == arguments.steps:
            model.moetier.commit(scheduler=scheduler)  # (3)
            print(f"step {step + 1}: loss {loss.item():.4f}, gradient norm {optimizer.grad_norm:.3f}", flush=True)
    if arguments.save is not None:
        model.save_pretrained(arguments.save)
        print(f"saved to {arguments.save}")
    model.moetier.close()


if __name__ == "__main__":
    main()
