"""For the Trainer of transformers: a commit into the run folder wherever it saves a checkpoint.

    model = moetier.from_pretrained(path, train=run)
    optimizer = moetier.AdamW(model, lr=1e-4)
    optimizer.resume()
    trainer = Trainer(model, arguments, optimizers=(optimizer, None), callbacks=[CommitOnSave()], ...)
    trainer.train()

The Trainer's checkpoints are ordinary ones, with all experts. To go on from one, `checkpoint-300` say, load the model
with `train_step=300` and call `trainer.train(resume_from_checkpoint=".../checkpoint-300")`.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class CommitOnSave(TrainerCallback):  # type: ignore[misc]
    """Commits the Trainer's step when it has saved its own checkpoint of it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a save."""
        kwargs["model"].moetier.commit(state.global_step)
