"""When a training run is asked to stop: by SIGINT, by SIGTERM, or because nobody reads its log any more (SIGPIPE)."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from moetier.cli.console import Console
from moetier.cli.errors import say

ECHO = 0.5  # seconds in which a second signal is the first one again: timeout and others pass on what all were sent


@contextmanager
def stopped_by(again: str, console: Console) -> Iterator[list[str]]:
    """The name of the signal is put into the list that is given; a second one interrupts at once.

    A log that nobody reads is like a signal; what is written afterwards is not.
    """
    asked: list[str] = []
    first = 0.0

    def ask(number: int, frame: FrameType | None = None) -> None:
        nonlocal first
        if asked and time.monotonic() < first + ECHO:
            return
        if asked:
            say("stopped", f"at once; go on from the last checkpoint with: {again}")
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        first = time.monotonic()
        say("stopping", "the step is finished and committed first; again to stop at once")

    def gone() -> None:
        if not asked:
            ask(signal.SIGPIPE)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    console.gone = gone
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        console.gone = lambda: None
