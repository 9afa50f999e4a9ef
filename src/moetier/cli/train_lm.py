"""`moetier train MODEL TEXTS`: train a causal language model on text files, experts out of core.

The folder `--out` is that of `train_folder.py`; the JSON (`--json`) is what `moetier.cli.train_report.report` says.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetier.cli import options as o
from moetier.cli.console import Console
from moetier.cli.errors import reported_with, say
from moetier.cli.files import check_writable, write_text
from moetier.cli.loading import device_of, find, import_libraries, load_tokenizer, loaded, unused_on_cpu
from moetier.cli.settings_file import SettingsFile, settings_text
from moetier.cli.stopping import stopped_by
from moetier.cli.train_folder import check_export, check_folders, initial, save
from moetier.cli.train_report import Teller, board_writer, report, show
from moetier.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from moetier.loading import CheckedFolder
    from moetier.training.lm import LanguageModelTraining
    from moetier.training.texts import Blocks

_DATA, _LOOP, _MEMORY = "Texts", "Training", "Experts and memory"
_MACHINE, _RUN, _OUT = "Model and machine", "Run", "Output"
DEMO = "demo"
WORDS = (
    (re.compile(r"^step: "), "--resume-from: "),
    (re.compile(r"\b(go on from|use) another step\b"), r"\1 another step, with moetier train lm --resume-from"),
)


def _number(help: str, panel: str, least: int = 1, metavar: str = "N") -> Any:
    return typer.Option(metavar=metavar, min=least, help=help, rich_help_panel=panel)


def _text(help: str, panel: str, metavar: str = "NAME", *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)


def _real(help: str, panel: str) -> Any:
    return typer.Option(metavar="X", min=0.0, help=help, rich_help_panel=panel)


@reported_with(*WORDS)
def language_model(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A model folder, a hub id (owner/name), or demo: the one that comes with moetier."
        ),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXTS", help="Text files in UTF-8, or folders of them (.txt, .md, .rst)."),
    ] = None,
    config: SettingsFile = None,
    out: Annotated[str | None, _text("Folder of the run: new, or with --resume that of before.", _RUN, "DIR")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=_RUN)
    ] = False,
    resume_from: Annotated[
        int | None, _number("Go on from the checkpoint of this step, not from the last; see --keep.", _RUN)
    ] = None,
    commit_every: Annotated[int, _number("Steps between checkpoints; one more at the end and on Ctrl-C.", _RUN)] = 100,
    keep: Annotated[int, _number("Checkpoints that are kept.", _RUN)] = 1,
    export: Annotated[
        str | None, _text("At the end, save an ordinary checkpoint with the tokenizer here.", _RUN, "DIR")
    ] = None,
    sequence_length: Annotated[int, _number("Tokens of a sequence.", _DATA, 2)] = 256,
    eval_texts: Annotated[
        list[str] | None, _text("Texts to evaluate on, files or folders; give several.", _DATA, "PATH")
    ] = None,
    eval_every: Annotated[
        int | None, _number("Steps between evaluations. Default: only at the beginning and at the end.", _DATA)
    ] = None,
    tokenizer: Annotated[str | None, _text("Folder of another tokenizer than the model's.", _DATA, "DIR")] = None,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch",
            help="Begin with random weights: of MODEL only the config is used (or it is a config file).",
            rich_help_panel=_LOOP,
        ),
    ] = False,
    steps: Annotated[int | None, _number("Steps of the optimizer, in all.", _LOOP)] = None,
    epochs: Annotated[int | None, _number("Instead of --steps; 1 if neither is given.", _LOOP)] = None,
    batch_size: Annotated[int, _number("Sequences in a batch.", _LOOP)] = 8,
    accumulation: Annotated[int, _number("Batches in a step.", _LOOP)] = 1,
    lr: Annotated[float, _real("Learning rate, at its highest.", _LOOP)] = 1e-4,
    warmup: Annotated[int, _number("Steps in which the learning rate rises.", _LOOP, 0)] = 0,
    schedule: Annotated[str, _text("Then: cosine or linear down to 0, or constant.", _LOOP)] = "cosine",
    optim: Annotated[
        str,
        _text("adamw, sgd or momentum; or of the experts alone: adafactor, adamw8bit, hot-cold, …", _LOOP),
    ] = "adamw",
    weight_decay: Annotated[float, _real("Not of norms and biases outside of experts.", _LOOP)] = 0.0,
    max_grad_norm: Annotated[float, _real("Clip all gradients together; 0: do not.", _LOOP)] = 1.0,
    idle: Annotated[
        str, _text("A step for experts without tokens: dense (a gradient of zero) or skip.", _LOOP)
    ] = "dense",
    aux_loss: Annotated[
        float | None, _real("Weight of the load-balancing loss. Default: as the model's config says.", _LOOP)
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Compute activations again in backward.", rich_help_panel=_LOOP),
    ] = False,
    seed: Annotated[int, _number("Of the order of the data, of dropout, of random weights.", _LOOP, 0)] = 0,
    device_memory: o.DeviceMemory = None,
    host_memory: o.HostMemory = None,
    slots: Annotated[
        str | None, _text("Experts in memory (with a GPU, in its memory): a number, or a share.", _MEMORY, "N|N%")
    ] = None,
    state_slots: Annotated[
        str | None, _text("The same for optimizer states. Default: as --slots.", _MEMORY, "N|N%")
    ] = None,
    gradient_slots: Annotated[
        str | None, _text("The same for gradients. Default: as --slots.", _MEMORY, "N|N%")
    ] = None,
    activation_memory: Annotated[
        str | None,
        _text("Memory for what forward keeps of experts for backward, e.g. 512MiB; 0: compute again.", _MEMORY, "SIZE"),
    ] = None,
    policy: o.Policy = "zigzag",
    writeback: Annotated[
        str, _text("When changed experts are written: evict, periodic or writethrough.", _MEMORY)
    ] = "evict",
    prefetch: Annotated[
        bool,
        typer.Option(
            "--prefetch/--no-prefetch", help="Load experts ahead where the order is known.", rich_help_panel=_MEMORY
        ),
    ] = True,
    cache_prior: o.CachePrior = 0.0,
    keep_top: o.KeepTop = None,
    max_rank: o.MaxRank = None,
    max_mass: o.MaxMass = None,
    readers: o.Readers = o.READERS,
    io: o.IO = "auto",
    store: o.Store = None,
    dtype: Annotated[
        str,
        _text("Of the weights: auto (as stored), float32, or bfloat16 with float32 masters.", _MACHINE),
    ] = "auto",
    device: o.Device = None,
    threads: o.Threads = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    log_every: Annotated[int, _number("Steps between lines of the log.", _OUT)] = 10,
    tensorboard: Annotated[str | None, _text("Write logs for TensorBoard here.", _OUT, "DIR")] = None,
    json_file: Annotated[str | None, _text("Write everything here.", _OUT, "FILE", "--json")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No log, no table.", rich_help_panel=_OUT)] = False,
    verbose: o.Verbose = False,
) -> None:
    """Train a language model on text files; its experts, their gradients and optimizer states stay out of core.

    Stop it with Ctrl-C whenever you like: it goes on with --resume, to the same bits as if it had never stopped.
    """
    if model is None or not texts:
        raise ConfigError(
            "MODEL and TEXTS: give a model and at least one text file or folder; see moetier train --help"
        )
    if out is None:
        raise ConfigError("--out: give a folder for the run, which holds its checkpoints")
    steps, epochs = one_of(context, steps, epochs)
    if eval_every is not None and not eval_texts:
        raise ConfigError("--eval-every: nothing to evaluate on; give --eval-texts")
    check_writable(json_file, "--json")
    folder = Path(out).expanduser()
    resume = resume or resume_from is not None
    check_folders(folder, resume)
    console = Console(stderr=True, quiet=quiet, highlight=False)
    import_libraries(console, verbose, threads)
    from moetier.loading import checked
    from moetier.training.lm_settings import Batches, Settings
    from moetier.training.optimizers import check_optimizer
    from moetier.training.texts import absolute, blocks_of

    with ExitStack() as stack:
        found = model_folder(model, from_scratch, revision, stack, console)
        if export is not None:
            check_export(export, found if isinstance(found, Path) else found.path, folder)
        if tokenizer is not None and not Path(tokenizer).expanduser().is_dir():
            raise StoreError(f"--tokenizer {tokenizer}: no such folder; give one with a tokenizer's files")
        words = load_tokenizer(found if tokenizer is None else Path(tokenizer).expanduser(), trust_remote_code)
        with console.status("reading texts"):
            data = blocks_of(texts, words, sequence_length, "TEXTS")
            held_out = blocks_of(eval_texts, words, sequence_length, "--eval-texts") if eval_texts else None
        per_epoch = Batches(len(data), batch_size, seed).per_epoch
        settings = Settings(
            steps or max(1, (epochs or 1) * per_epoch // accumulation),
            sequence_length,
            batch_size,
            accumulation,
            lr,
            warmup,
            schedule,
            optim,
            weight_decay,
            max_grad_norm,
            idle,
            aux_loss,
            gradient_checkpointing,
            seed,
            dtype,
        )
        settings.check()
        check_optimizer(optim)
        writer = board_writer(tensorboard)
        tiering: dict[str, Any] = {
            "train": str(folder / "run"),
            "train_step": resume_from,
            "keep": keep,
            "device_memory": device_memory,
            "host_memory": host_memory,
            "slots": slots,
            "state_slots": state_slots,
            "gradient_slots": gradient_slots,
            "activation_memory": activation_memory,
            "policy": policy,
            "writeback": writeback,
            "prefetch": "auto" if prefetch else "off",
            "cache_prior": cache_prior,
            "keep_top": keep_top,
            "max_rank": max_rank,
            "max_mass": max_mass,
            "readers": readers,
            "io": io,
            "store": store,
            "context": batch_size * sequence_length,
        }
        from moetier.options import Options

        options = Options(**tiering)
        options.check()
        device = device_of(device)
        for line in [] if quiet else unused_on_cpu(device, options):
            say("warning", line)
        if isinstance(found, Path):
            found = checked(initial(found, folder, settings, console, trust_remote_code))
        tiering |= {"device": device, "dtype": dtype} | ({"trust_remote_code": True} if trust_remote_code else {})
        begin = time.perf_counter()
        lm = stack.enter_context(loaded(found, console, verbose, **tiering))
        from moetier.training.lm import LanguageModelTraining
        from moetier.training.texts import check_vocabulary

        for blocks in (data, held_out):
            if blocks is not None:
                check_vocabulary(blocks, lm.get_input_embeddings().weight.shape[0])
        training = LanguageModelTraining(lm, settings, data)
        longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and sequence_length > longest and not quiet:
            say("warning", f"sequences of {sequence_length} tokens, but the model is made for {longest}")
        places: dict[str, Any] = {"model": absolute(model), "texts": [absolute(t) for t in texts], "out": absolute(out)}
        places |= {"eval_texts": [absolute(t) for t in eval_texts or []], "resume": None, "json_file": None}
        places |= {"resume_from": None}
        places |= {"device": device}  # a run goes on where it began, unless it is told otherwise
        places |= {"steps": steps, "epochs": epochs, "tokenizer": absolute(tokenizer) if tokenizer else None}
        for name, place in {"export": export, "tensorboard": tensorboard}.items():
            places[name] = None if place is None else os.path.abspath(os.path.expanduser(place))
        write_text(folder / "train.toml", settings_text(context, places), "--out")
        load_seconds = time.perf_counter() - begin
        board = None if writer is None else writer(training.step + 1)
        if board is not None:
            stack.callback(board.close)
        teller = Teller(console, training, data, held_out, log_every, board)
        again = f"moetier train --config {shlex.quote(str(folder / 'train.toml'))} --resume"
        with teller, stopped_by(again, console) as stop:
            try:
                run(training, held_out, eval_every, commit_every, teller, stop)
            except StoreError as error:
                raise StoreError(f"{error}; then go on with: {again}") from error
        result = report(training, model, teller, load_seconds, stop[0] if stop else None)
        show(result, console)
        if json_file is not None:
            write_text(json_file, json.dumps(result, indent=2) + "\n", "--json")
        if export is not None and not stop:
            with console.status(f"saving to {export}"):
                save(lm, words, export, again)
    if stop:
        say("stopped", f"step {training.step} of {settings.steps} is committed; go on with: {again}")
        raise typer.Exit(128 + signal.Signals[stop[0]])
    if export is not None and not quiet:
        say("saved", f"{export}: an ordinary checkpoint, for moetier run and any other loader")


def run(
    training: LanguageModelTraining,
    held_out: Blocks | None,
    eval_every: int | None,
    commit_every: int,
    teller: Teller,
    stop: list[str],
) -> None:
    """Steps, evaluations and checkpoints, until the end or until `stop` says something; the last step is committed."""
    total = training.settings.steps

    def evaluate() -> None:
        if held_out is not None and not stop:
            found = training.evaluate(held_out, lambda: not stop)
            if found is not None:
                teller.evaluated(found)

    if training.step == 0:
        evaluate()
    for step in [] if stop else training.steps():
        teller.stepped(step)
        last = step.number == total
        if step.number % commit_every == 0 and not last and not stop:
            training.commit()
        if last or (eval_every is not None and step.number % eval_every == 0):
            evaluate()
        if stop:
            break
    if training.committed != training.step:
        training.commit()


def one_of(context: typer.Context, steps: int | None, epochs: int | None) -> tuple[int | None, int | None]:
    """How long to train: of steps and epochs at most one, where a flag wins over a file. Raises `ConfigError`."""
    if steps is None or epochs is None:
        return steps, epochs
    sources = [str(getattr(context.get_parameter_source(name), "name", "")) for name in ("steps", "epochs")]
    if sources.count("COMMANDLINE") != 1:
        raise ConfigError("--steps and --epochs both say how long to train; give one")
    return (steps, None) if sources[0] == "COMMANDLINE" else (None, epochs)


def model_folder(
    model: str, from_scratch: bool, revision: str | None, stack: ExitStack, console: Console
) -> CheckedFolder | Path:
    """Where a model's files are; `demo` is the one that comes with moetier, unless there is such a folder.

    With `from_scratch` nothing but its config is wanted: a path.
    """
    from moetier.loading import resolve

    path = Path(model).expanduser()
    if model == DEMO and not path.exists():
        path = stack.enter_context(as_file(files("moetier") / "demo_model"))
    if from_scratch and path.exists():
        return path
    if from_scratch:
        return resolve(model, **({"revision": revision} if revision else {}))
    return find(str(path) if path.exists() else model, revision, console)
