"""Load tokenizer and model for a command: progress for people, errors as moetier's own, the chatter of others off."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from moetier.access import Phase
from moetier.cli.console import Console
from moetier.cli.errors import say
from moetier.errors import CheckpointError, ConfigError
from moetier.threads import CoreWatch, check_threads, delayed

if TYPE_CHECKING:
    from moetier.loading import CheckedFolder
    from moetier.options import Options


def import_libraries(console: Console, verbose: bool, threads: int | None) -> None:
    """Import torch and transformers, which takes seconds, and set them up."""
    if threads is not None:
        check_threads(threads, "--threads")
    with console.status("importing torch and transformers"):
        import torch
        import transformers

        import moetier.loading  # noqa: F401  (registers the hook)

    if not verbose:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def check_device(name: str | None, must_exist: bool = True) -> None:
    """Raise `ConfigError` unless torch can compute there."""
    import torch

    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: unknown; give cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: moetier computes on cpu and cuda")
    if must_exist and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"--device {name}: torch sees {found} GPUs; leave the flag out to take what there is")


def device_of(name: str | None) -> str:
    """Where to compute, by `--device`: the first GPU if there is one, else the CPU. Raises `ConfigError`."""
    import torch

    check_device(name)
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def unused_on_cpu(device: str | None, options: Options) -> list[str]:
    """Warnings of options that say something about a GPU, where the model computes on the CPU."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return []
    given = {"device_memory": options.device_memory is not None, "cpu_experts": options.cpu_experts != "off"}
    return [f"{name} is not used: the model computes on the CPU" for name, said in given.items() if said]


def find(model: str, revision: str | None, console: Console) -> CheckedFolder:
    """The folder of a model, checked before anything is loaded from it."""
    from moetier.loading import checked, resolve

    folder = resolve(model, **({"revision": revision} if revision else {}))
    with console.status("reading headers"):
        return checked(folder)


def load_tokenizer(folder: CheckedFolder | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, or of one with a tokenizer only. Raises `CheckpointError`."""
    from transformers import AutoTokenizer

    from moetier.loading import translate

    path = folder if isinstance(folder, Path) else folder.path
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever the parser of a damaged file raises
        told = translate(error, path)
        if isinstance(told, ConfigError):
            raise told from error
        text = " ".join(str(error).split())[:400] or type(error).__name__
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({text}); download its files again") from error


@contextmanager
def loaded(folder: CheckedFolder, console: Console, verbose: bool, **options: Any) -> Iterator[Any]:
    """The model, closed at the end; says so where it has more threads than cores.

    Raises what `moetier.from_pretrained` raises.
    """
    import moetier

    watch = CoreWatch()
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        with _bar(console, verbose):
            model = moetier.from_pretrained(folder, **options)
        try:
            with _watched_threads(model, console.quiet, verbose, watch):
                yield model
        finally:
            model.moetier.close()


@contextmanager
def _watched_threads(model: Any, quiet: bool, verbose: bool, watch: CoreWatch) -> Iterator[None]:
    """Warn of more compute threads than free cores: before a run by what there is, after it by what was seen."""
    import torch

    told = None if quiet else model.moetier.oversubscribed(watch)
    if told is not None and not verbose:  # with --verbose the library has told it
        say("warning", told)
    during = CoreWatch()
    yield
    if not quiet and told is None:
        told = delayed(torch.get_num_threads(), during, sum(model.moetier.overlap(phase).busy for phase in Phase))
        if told is not None:
            say("warning", told)


@contextmanager
def _bar(console: Console, verbose: bool) -> Iterator[None]:
    """A bar of our own in place of transformers', where that lets us."""
    from transformers.utils import logging

    hooked = getattr(logging, "set_tqdm_hook", None)
    if verbose or hooked is None or not console.is_terminal or console.quiet:
        yield
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("mapping experts", total=None)

        def track(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not args or not isinstance(args[0], Collection):
                return factory(*args, **kwargs)
            label = "loading the weights that are not experts"
            return progress.track(args[0], total=len(args[0]), task_id=task, description=label)

        before = hooked(track)
        try:
            yield
        finally:
            hooked(before)
