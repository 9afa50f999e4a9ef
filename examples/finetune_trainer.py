"""Fine-tune a Mixture-of-Experts model on a text with the Trainer of transformers, a quarter of its experts in memory.

    python examples/finetune_trainer.py [TEXT_FILE] [--model MODEL] [--run FOLDER] [--steps N] [--save FOLDER]

Without --model it takes the small model that comes with moetier; without a text, moetier's README. The last tenth of
the text is held out, and its perplexity is printed before and after. Stop it whenever you like, and start it again with
the same --run: it goes on from the last checkpoint. What is moetier's are the lines marked with (1) and (2).
"""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainingArguments

import moetier

README = Path(__file__).parents[1] / "README.md"


def blocks(ids: torch.Tensor, length: int) -> list[dict[str, torch.Tensor]]:
    """The text in pieces of `length` tokens; what is left at the end is dropped."""
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // length * length].view(-1, length)]


def main() -> None:
    """Evaluate, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, default=README, help="a text file in UTF-8")
    parser.add_argument("--model", help="a checkpoint's folder, or its id on the Hugging Face hub")
    parser.add_argument("--run", type=Path, default=Path("finetune-run"), help="where the run's state lives")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128, help="tokens of a piece of text")
    parser.add_argument("--save", type=Path, help="where to save the trained model")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        path = arguments.model or stack.enter_context(as_file(files("moetier") / "demo_model"))
        finetune(str(path), arguments)


def finetune(path: str, arguments: Any) -> None:
    """Train the model at `path`."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = arguments.text.read_text("utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    pieces = blocks(ids, arguments.length)
    held_out = max(1, len(pieces) // 10)
    if len(pieces) <= held_out:
        raise SystemExit(f"{arguments.text}: {len(ids)} tokens are too few; give a longer text, or a smaller --length")

    model = moetier.from_pretrained(path, train=arguments.run, slots="25%", device="cpu", dtype="float32")  # (1)
    trainer = moetier.Trainer(  # (2)
        model=model,
        args=TrainingArguments(
            f"{arguments.run}-trainer",
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            warmup_steps=5,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_steps=20,
            save_total_limit=2,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=pieces[:-held_out],
        eval_dataset=pieces[-held_out:],
        processing_class=tokenizer,
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )
    plan = model.moetier.plan
    print(
        f"{plan.slots} of {plan.workload.records} experts in memory, {len(pieces)} pieces of {arguments.length} tokens"
    )
    at = model.moetier.training.step
    print(f"perplexity at step {at}: {math.exp(trainer.evaluate()['eval_loss']):.2f}", flush=True)
    trainer.train(resume_from_checkpoint="auto")
    print(f"perplexity at step {arguments.steps}: {math.exp(trainer.evaluate()['eval_loss']):.2f}")
    if arguments.save is not None:
        trainer.save_model(arguments.save)
        print(f"saved to {arguments.save}")
    model.moetier.close()


if __name__ == "__main__":
    main()
