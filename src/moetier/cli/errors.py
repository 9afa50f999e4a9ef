"""A user's mistake is one line on standard error and an exit code, never a traceback. A bug of ours keeps its own."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

from moetier.cli.console import let_go, write_error
from moetier.errors import CapacityError, ConfigError, MoetierError, StoreError, UnsupportedModelError

EXIT_CODES: tuple[tuple[type[MoetierError], int, str], ...] = (
    (ConfigError, 2, "a flag or argument that cannot be used"),
    (CapacityError, 3, "a memory budget below the minimum"),
    (StoreError, 4, "files missing, damaged or unreadable"),
    (UnsupportedModelError, 5, "not an MoE, or a family that is not supported"),
)

Words = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]  # of the library, and what to say for them

_SETTING = re.compile(r"(?:^|(?<=, ))(?!not\b)(\w+)(?= \S.*?, not )")  # of a list: lr 0.1, not 0.2, batch_size 2, not 3

_FLAGS: tuple[Words, ...] = (  # the library names its arguments, a user of the command line knows flags
    (re.compile(r"(?<![\w./-])(device|host|activation)_memory(?![\w./-])"), r"--\1-memory"),
    (re.compile(r"(?<![\w./-])cpu_experts(?![\w./-])"), "--cpu-experts"),
    (re.compile(r"^(resume|ray|slots|policy|admission|context|readers|io|store|split): "), r"--\1: "),
    (re.compile(r"^pin_after: "), "--pin-after: "),
    (re.compile(r"^(cache|keep|max|drop)_(prior|top|rank|mass|misses): "), r"--\1-\2: "),
    (re.compile(r"^processes: "), "--jobs: "),
    (re.compile(r"^(steps|lr|warmup|schedule|optim|idle|accumulation|seed|dtype|keep|writeback): "), r"--\1: "),
    (re.compile(r"^(weight|aux|gradient|state|gradient)_(decay|loss|checkpointing|slots): "), r"--\1-\2: "),
    (re.compile(r"\bsequence_length\b"), "--sequence-length"),
    (re.compile(r"(^|smaller )batch_size\b"), r"\1--batch-size"),
    (re.compile(r"^max_grad_norm: "), "--max-grad-norm: "),
    (re.compile(r"^(sampler: '|width: )"), r"--\1"),
    (re.compile(r"^(episode_len|envs_per_batch): "), lambda found: f"--{found[1].replace('_', '-')}: "),
    (re.compile(r"^num_experts_per_tok: "), "--top-k: "),
    (re.compile(r"(?<=trained with )optimizer (?=\S+, not )"), "--optim "),
    (re.compile(r"(?<=with |.and )idle (?=\w+, not )"), "--idle "),
    (re.compile(r"(?<=the run was begun with ).*?(?=; )"), lambda found: _SETTING.sub(_flag, found[0])),
    (re.compile(r"\btrust_remote_code=True\b"), "--trust-remote-code"),
)


def _flag(name: re.Match[str]) -> str:
    return f"--{name[1].replace('_', '-')}"


P = ParamSpec("P")
R = TypeVar("R")


def with_flags(message: str, own: Sequence[Words] = ()) -> str:
    """A message of the library in the words of the command line; `own` are those of one command."""
    for pattern, flag in (*own, *_FLAGS):
        message = pattern.sub(flag, message)
    return message


def say(kind: str, message: str, own: Sequence[Words] = ()) -> None:
    """One line on standard error."""
    write_error(f"{kind}: {'; '.join(with_flags(message, own).splitlines())}")


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose moetier errors, interrupts and broken pipes end it in one line or none."""
    return reported_with()(command)


def reported_with(*own: Words) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The same for a command that has words of its own for some of the library's."""
    return lambda command: _reported(command, own)


def _reported(command: Callable[P, R], own: Sequence[Words]) -> Callable[P, R]:
    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = command(*args, **kwargs)
            sys.stdout.flush()  # here, where a broken pipe is still expected
            return result
        except MoetierError as error:
            say("error", str(error), own)
            raise typer.Exit(next((code for kind, code, _ in EXIT_CODES if isinstance(error, kind)), 1)) from None
        except KeyboardInterrupt:
            write_error("\ninterrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader has seen enough: that is no error, and there is nobody to tell
            let_go()
            raise typer.Exit(0) from None

    return wrapper


class Program(TyperGroup):
    """The root command: typer's own complaints about flags take the same form as moetier's."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Parse, run and exit."""
        try:
            code = super().main(
                args, prog_name or "moetier", complete_var, False, windows_expand_args=windows_expand_args, **extra
            )
        except Exception as error:
            # By shape, not by class: typer brings its own copy of click in some versions and not in others.
            describe = getattr(error, "format_message", None)
            if describe is None or not standalone_mode:
                raise
            path = getattr(getattr(error, "ctx", None), "command_path", "moetier")
            if describe():  # nothing where the help has been shown
                say("error", f"{describe().rstrip('.')}; see {path} --help")
            sys.exit(2)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code
