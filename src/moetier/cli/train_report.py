"""What a training run of a language model does, while it does it and afterwards: lines, a bar, TensorBoard, JSON."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moetier import __version__
from moetier.cli.console import Console
from moetier.errors import ConfigError
from moetier.plan import format_size
from moetier.training.balance import NUMBERS

if TYPE_CHECKING:
    from moetier.training.lm import Evaluation, LanguageModelTraining, Step
    from moetier.training.texts import Blocks

REPORT_VERSION = 1
SHOWN = 10  # steps that the losses of the table are means of
RECENT = 20  # steps that the rates of the bar are of


class Teller:
    """Hears of steps and evaluations, and tells them: a bar where a terminal looks on, a line every so many steps."""

    def __init__(
        self,
        console: Console,
        training: LanguageModelTraining,
        data: Blocks,
        held_out: Blocks | None,
        every: int,
        board: Any = None,
    ):
        self.steps: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.data, self.held_out = data, held_out
        self.begin = time.perf_counter()
        self.seconds = 0.0
        self._console, self._training, self._every, self._board = console, training, every, board
        self._recent: deque[Step] = deque(maxlen=RECENT)
        self._since: list[Step] = []
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        total = training.settings.steps
        self._task = self._bar.add_task("", total=total, completed=training.step, said="")

    def __enter__(self) -> Teller:
        plan, total = self._training.model.moetier.plan, self._training.settings.steps
        files = "1 file" if self.data.files == 1 else f"{self.data.files} files"
        texts = f"{self.data.tokens.size} tokens in {len(self.data)} sequences of {files}"
        if self.held_out is not None:
            texts += f", {self.held_out.tokens.size} to evaluate on"
        memory = "device memory" if plan.machine.device_nbytes is not None else "memory"
        self._say(f"{texts}; {plan.slots} of {plan.workload.records} experts in {memory}; {total} steps")
        if self._training.step:
            self._say(f"goes on from step {self._training.step}")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self.seconds = time.perf_counter() - self.begin

    def stepped(self, step: Step) -> None:
        """A step is done."""
        self.steps.append(step)
        self._recent.append(step)
        self._since.append(step)
        self._bar.update(self._task, completed=step.number, said=said_of(self._recent))
        if step.number % self._every == 0 or step.number == self._training.settings.steps:
            self._say(f"step {step.number}: {said_of(self._since)}")
            self._since.clear()
        if self._board is not None:
            for name, value in scalars(step).items():
                self._board.add_scalar(name, value, step.number)

    def evaluated(self, evaluation: Evaluation) -> None:
        """The held-out texts were read."""
        self.evaluations.append(evaluation)
        self._say(
            f"step {evaluation.step}: held-out loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}"
        )
        if self._board is not None:
            self._board.add_scalar("eval/loss", evaluation.loss, evaluation.step)
            self._board.add_scalar("eval/perplexity", evaluation.perplexity, evaluation.step)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def scalars(step: Step) -> dict[str, float]:
    """A step as TensorBoard has it, by tag."""
    found = {
        "train/loss": step.loss,
        "train/lr": step.lr,
        "speed/tokens_per_second": step.tokens / step.seconds,
        "speed/step_seconds": step.seconds,
        "bytes/read": float(step.read_bytes),
        "bytes/written": float(step.written_bytes),
        "bytes/dirty": float(step.dirty_bytes),
    }
    if step.grad_norm is not None:
        found["train/grad_norm"] = step.grad_norm
    if step.uses:
        found["experts/hit_rate"] = step.hits / step.uses
    if step.routing is not None:
        found |= {f"routing/{name}": value for name, value in step.routing.items()}
    return found


def said_of(steps: Sequence[Step]) -> str:
    """Some steps in one line: loss and rates are means."""
    count, seconds = len(steps), sum(step.seconds for step in steps)
    uses = max(1, sum(step.uses for step in steps))
    said = [
        f"loss {statistics.fmean(step.loss for step in steps):.4f}",
        f"{sum(step.tokens for step in steps) / seconds:.0f} tokens/s",
        f"hits {100 * sum(step.hits for step in steps) / uses:.0f} %",
        f"read {format_size(sum(step.read_bytes for step in steps) // count)}, "
        f"written {format_size(sum(step.written_bytes for step in steps) // count)} a step",
        f"dirty {format_size(steps[-1].dirty_bytes)}",
    ]
    bent = [step.routing for step in steps if step.routing is not None]
    if bent:
        changed, given, own = (
            statistics.fmean(one[name] for one in bent)
            for name in ("changed_experts", "balance_loss", "balance_loss_own")
        )
        said.append(f"routing {100 * changed:.0f} % changed, balance {given:.2f} (own {own:.2f})")
    return " · ".join(said)


def report(
    training: LanguageModelTraining, model: str, teller: Teller, load_seconds: float, stopped: str | None
) -> dict[str, Any]:
    """Version 1; bytes and seconds as plain numbers:

    version, moetier    of this format; of the library
    model, settings     the model as it was named; all that the losses depend on beside model and texts
    texts               files, tokens, sequences, held_out_tokens
    experts, slots      in all; in memory
    step, stopped       the run's step; SIGINT or SIGTERM if one of them ended it early, or null
    steps               lists, one entry for each step that was made now: number, loss, and what else `Step` has; what
                        evaluations and checkpoints read and write between steps is not in them
    evaluations         step, loss, perplexity of each
    bytes               read and written in all, from and to the run folder and the scratch file
    activations         room for what forward keeps of experts, in bytes; layers' forwards that kept theirs, and those
                        that backward computed again
    caches              by name (weights, state, gradients): what `ExpertCache.stats` says, and hit rates by tier
    routing             only where experts are favoured: settings; what `Tally.summary` says of all steps made now,
                        per layer too; and under `steps` its numbers as lists, one entry a step
    seconds             load, train (evaluations and checkpoints included)
    """
    counters = training.counters()
    caches = counters["caches"]
    for stats in caches.values():
        for tier in stats["tiers"]:
            uses = sum(sum(tier[kind]) for kind in ("hits", "lates", "misses"))
            tier["hit_rate"] = sum(tier["hits"]) / uses if uses else 0.0
    fields = list(type(teller.steps[0]).__dataclass_fields__) if teller.steps else ["loss"]
    fields = [name for name in fields if name != "routing"]
    bent = [step.routing for step in teller.steps if step.routing is not None]
    favoured = training.routing()
    routing = {}
    if favoured is not None:
        routing["routing"] = favoured | {"steps": {name: [one[name] for one in bent] for name in NUMBERS}}
    plan, held_out = training.model.moetier.plan, teller.held_out
    return {
        "version": REPORT_VERSION,
        "moetier": __version__,
        "model": model,
        "settings": training.settings.to_dict(),
        "texts": {
            "files": teller.data.files,
            "tokens": int(teller.data.tokens.size),
            "sequences": len(teller.data),
            "held_out_tokens": 0 if held_out is None else int(held_out.tokens.size),
        },
        "experts": plan.workload.records,
        "slots": plan.slots,
        "step": training.step,
        "stopped": stopped,
        "steps": {name: [getattr(step, name) for step in teller.steps] for name in fields},
        "evaluations": [asdict(found) | {"perplexity": found.perplexity} for found in teller.evaluations],
        "bytes": {"read": counters["read_bytes"], "written": counters["written_bytes"]},
        "activations": training.model.moetier.activations.report(),
        "caches": caches,
        **routing,
        "seconds": {"load": load_seconds, "train": teller.seconds},
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table at the end."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column()
    steps, seconds = result["steps"], result["seconds"]
    count = len(steps["loss"])
    table.add_row("step", str(result["step"]), f"of {result['settings']['steps']}; {count} of them now")
    if count:
        shown = min(SHOWN, count)
        first, last = statistics.fmean(steps["loss"][:shown]), statistics.fmean(steps["loss"][-shown:])
        table.add_row("loss", f"{last:.4f}", f"mean of the last {shown} steps; {first:.4f} in the first {shown}")
    evaluations = result["evaluations"]
    for found in evaluations[:1] + evaluations[1:][-1:]:
        table.add_row(
            "held-out", f"{found['loss']:.4f}", f"at step {found['step']}; perplexity {found['perplexity']:.2f}"
        )
    if count:
        each = sum(steps["seconds"]) / count
        table.add_row(
            "speed", f"{sum(steps['tokens']) / sum(steps['seconds']):.0f} tokens/s", f"{each:.3f} s a step, mean"
        )
        uses = max(1, sum(steps["uses"]))
        slots = f"of the steps' uses; {result['slots']} of {result['experts']} experts in memory"
        table.add_row("hits", f"{100 * sum(steps['hits']) / uses:.1f} %", slots)
        for name in ("read", "written"):
            said = f"a step; {format_size(result['bytes'][name])} with evaluations and checkpoints"
            table.add_row(name, format_size(sum(steps[f"{name}_bytes"]) // count), said)
        kept, again = (result["activations"][name] for name in ("kept", "recomputed"))
        said = f"for up projections: {kept} of {kept + again} layers' forwards kept theirs for backward"
        table.add_row("room", format_size(result["activations"]["nbytes"]), said)
        for row in routing_rows(result.get("routing")):
            table.add_row(*row)
        table.add_row("dirty", format_size(max(steps["dirty_bytes"])), "at most, at the end of a step")
    table.add_row("in all", f"{seconds['train']:.2f} s", f"after {seconds['load']:.2f} s of loading")
    console.print(table)


def routing_rows(bent: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """What favouring experts in memory changed, and what it did to the balance of load; nothing where none are."""
    if bent is None:
        return []
    kept = f"by {bent['levers']}: not the model's own; {bent['kept']} experts are favoured"
    sets = f"of a token's probability, mean; {100 * bent['changed_tokens']:.1f} % of the tokens have other experts"
    return [
        ("routing kept", f"{100 - 100 * bent['changed_experts']:.1f} %", kept),
        ("given up", f"{100 * bent['mass_given_up']:.2f} %", sets),
        (
            "balance",
            f"{bent['balance_loss']:.3f}",
            f"load-balancing loss, 1 is even; own: {bent['balance_loss_own']:.3f}",
        ),
        ("spread", f"{bent['cv']:.3f}", f"of tokens per expert, deviation ÷ mean; own: {bent['cv_own']:.3f}"),
    ]


def board_writer(folder: str | None) -> Callable[[int], Any] | None:
    """Makes a writer for TensorBoard that begins with a step. Raises `ConfigError` where it is not installed."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("--tensorboard needs the package tensorboard; install moetier[tensorboard]") from None

    def make(step: int) -> Any:
        try:
            # what a run that was killed had logged after its last checkpoint is made again, and shown once
            return SummaryWriter(os.path.expanduser(folder), purge_step=step if step > 1 else None)
        except OSError as error:
            raise ConfigError(f"--tensorboard {folder}: cannot be written: {error.strerror or error}") from None

    return make
