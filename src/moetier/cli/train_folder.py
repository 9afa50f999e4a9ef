"""The folder of a run of `moetier train`: what may begin or go on there, its random weights, what is exported.

train.toml    the command's options: `moetier train --config OUT/train.toml --resume` goes on
initial/      with --from-scratch: the checkpoint that training began with
run/          the run folder (docs/training.md)
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from moetier.cli.console import Console
from moetier.cli.files import check_folder
from moetier.errors import ConfigError, MoetierError, StoreError

DRAFT = ".initial.draft"  # of random weights, where a process was killed that made them


def check_folders(folder: Path, resume: bool) -> None:
    """Raise `ConfigError` for a run that is to begin where something is, or to go on where nothing is."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--out {folder}: is a file; give a folder")
        there = folder.is_dir() and any(path.name != DRAFT for path in folder.iterdir())
        begun = has_checkpoint(folder)
    except OSError as error:
        raise StoreError(f"--out {folder}: cannot be read: {error.strerror}") from None
    ours = (folder / "train.toml").is_file() or (folder / "run").is_dir() or (folder / "initial").is_dir()
    if resume and not ours:
        raise ConfigError(f"--resume: {folder} holds no run; leave it out to begin one there")
    if there and not resume:
        what = "holds other files; give"
        if ours:
            what = "holds a run already; go on with --resume, or give"
            what = what if begun else "holds a run without a checkpoint yet; begin it with --resume, or give"
        raise ConfigError(f"--out {folder}: {what} another folder")


def has_checkpoint(folder: Path) -> bool:
    """Whether anything was committed there."""
    return any((folder / "run" / "steps").glob("step-*"))


def initial_of(folder: Path) -> Path:
    """Where a run keeps the checkpoint with random weights that it begins with."""
    return folder / "initial"


def initial(source: Path, folder: Path, settings: Any, console: Console, trust_remote_code: bool) -> Path:
    """The checkpoint with random weights that the run begins with, made unless it is there.

    Before the first checkpoint of a run it is made anew where it follows from other options than these; later that is
    a `ConfigError`.
    """
    from moetier.training.from_scratch import Recipe, config_of, make_checkpoint

    made, begun = initial_of(folder), has_checkpoint(folder)
    if begun and not made.is_dir():
        raise StoreError(f"{made}: the checkpoint that the run began with is gone, and it needs it")
    config = config_of(source, trust_remote_code)
    recipe, before = Recipe.of(source, settings.seed, settings.dtype), Recipe.load(made)
    other = "" if before is None else recipe.difference(before)
    if begun and other:
        raise ConfigError(f"{made}: the run was begun with {other}; give the same, or another folder")
    if begun or (before is not None and not other):
        return made
    if other:
        console.print(f"no checkpoint yet: random weights are made anew; they had {other}", soft_wrap=True)
    with console.status("making random weights"):
        forget(folder)
        make_checkpoint(config, made, recipe, trust_remote_code)
    return made


def forget(folder: Path) -> None:
    """Remove a run without a checkpoint. Raises `ConfigError` where another process has it, `StoreError`."""
    from moetier.stores.runfolder import RunFolder
    from moetier.training.from_scratch import RECIPE

    run, made = folder / "run", initial_of(folder)
    try:
        if RunFolder.exists(run):
            with RunFolder.open(run):
                shutil.rmtree(run)
        (made / RECIPE).unlink(missing_ok=True)  # first: what is left of the folder after a kill is not taken for whole
        if made.is_dir():
            shutil.rmtree(made)
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: cannot be removed: {error.strerror}; remove it") from error


def check_export(export: str, source: Path, folder: Path) -> None:
    """Raise `ConfigError` for a folder that the trained model could not be saved to, before it is trained."""
    check_folder(export, "--export")
    if Path(export).expanduser().resolve() in (source.resolve(), initial_of(folder).resolve()):
        raise ConfigError(f"--export {export}: holds the checkpoint that training begins with; give another folder")


def save(model: Any, tokenizer: Any, export: str, again: str) -> None:
    """Make an ordinary checkpoint. Raises `StoreError` that says how to try `again`: what was trained is committed."""
    folder, what = Path(export).expanduser(), "model"
    try:
        model.save_pretrained(folder)
        what = "tokenizer"
        tokenizer.save_pretrained(folder)
    except Exception as error:  # Rust's writers of tokenizers raise nothing finer
        told = str(error) if isinstance(error, MoetierError) else f"{export}: the {what} could not be saved: {error}"
        if isinstance(error, ConfigError):
            raise
        raise StoreError(
            f"{told}; the run is committed, and can be saved later with: {again} --export {shlex.quote(export)}"
        ) from error
