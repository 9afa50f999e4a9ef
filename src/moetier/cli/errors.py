"""A user's mistake is one line on standard error and an exit code, never a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from moetier.errors import CapacityError, ConfigError, MoetierError, StoreError, UnsupportedModelError

EXIT_CODES: tuple[tuple[type[MoetierError], int, str], ...] = (
    (ConfigError, 2, "a flag or argument"),
    (CapacityError, 3, "a budget below the minimum"),
    (StoreError, 4, "files"),
    (UnsupportedModelError, 5, "an unsupported model"),
)

P = ParamSpec("P")
R = TypeVar("R")


def fail(message: str, code: int) -> typer.Exit:
    """Print the error; the result is to be raised."""
    print(f"error: {message}", file=sys.stderr)
    return typer.Exit(code)


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose moetier errors, interrupts and broken pipes end it quietly."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except MoetierError as error:
            code = next((code for kind, code, _ in EXIT_CODES if isinstance(error, kind)), 1)
            raise fail(str(error), code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader is gone: say no more
            raise typer.Exit(0) from None

    return wrapper
