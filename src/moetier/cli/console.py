"""What commands write to: readers that have gone (`moetier … | head`) are a `BrokenPipeError`, not rich's own exit."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import rich.console


class Console(rich.console.Console):
    """A console of rich's. With `gone` set, a reader that has gone is told there, and the console is quiet."""

    gone: Callable[[], None] | None = None

    def on_broken_pipe(self) -> NoReturn:
        """Newer versions of rich would exit with code 1 here."""
        raise BrokenPipeError

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich has it. Raises `BrokenPipeError` where nobody reads and nobody is to be told."""
        try:
            super().print(*objects, **options)
        except BrokenPipeError:
            if self.gone is None:
                raise
            self.quiet = True
            let_go()
            self.gone()


def write_error(line: str) -> None:
    """A line on standard error, for whoever reads it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        let_go()


def let_go() -> None:
    """Lead standard streams that nobody reads to nowhere, so that their last flush is no error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError):  # a stream without a descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
