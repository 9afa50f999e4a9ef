"""The compute crew: experts of an access side by side on the CPU, one thread each, without barriers inside.

torch splits every small product over its OpenMP threads and has them meet after each. When one of them cannot run,
because a reader or another program has its core, the other spins: a decode step of 0.07 s took 0.3 s beside one busy
process. The crew splits by expert instead: whoever is free takes the next one, and they meet once per batch.

Splitting a product over threads must not change its bits; `products.py` finds out for the dtype and shapes at hand. The
crew itself knows nothing of experts: it runs callables.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from moetier.errors import ConfigError
from moetier.products import is_exact, one_thread_can_cut
from moetier.record import RecordLayout

Split = Literal["auto", "experts", "products"]
Task = Callable[[], None]


class Crew:
    """`helpers` threads beside the one that calls `run`. They start with the first run and wait without spinning.

    `cuts` says that one product of one row may also be shared, each thread computing some of its outputs.
    """

    def __init__(self, helpers: int, cuts: bool = False):
        if helpers < 1:
            raise ValueError(f"a crew needs at least 1 helper, got {helpers}")
        self.helpers, self.cuts = helpers, cuts
        self._tasks: deque[Task] = deque()
        self._errors: list[BaseException] = []
        self._wake = threading.Semaphore(0)
        self._ended = threading.Semaphore(0)
        self._busy = threading.Lock()  # one run at a time
        self._called = 0  # helpers that have not ended yet
        self._threads: list[threading.Thread] = []
        self._closed = False

    def run(self, tasks: Iterable[Task], first: Task | None = None) -> None:
        """Run all tasks, in any order and at once; return when all have ended. Raises the first error of one.

        The caller does `first` before it takes part, while the others have begun. A caller that comes while another's
        tasks run does its own alone.
        """
        if not self._busy.acquire(blocking=False):
            for task in tasks if first is None else (first, *tasks):
                task()
            return
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)  # for this thread's products; a third of a microsecond
            self._gather()  # a run that was interrupted may have left helpers at work
            self._tasks.clear()
            self._errors.clear()
            self._tasks.extend(tasks)
            called = min(self.helpers, len(self._tasks) - 1)
            if called > 0 and not self._threads:
                self._launch()
            for _ in range(called):
                self._called += 1
                self._wake.release()
            if first is not None:
                first()
            self._work()
            self._gather()
            if self._errors:
                error, self._errors = self._errors[0], []
                raise error
        finally:
            torch.set_num_threads(threads)
            self._busy.release()

    def close(self) -> None:
        """Stop the helpers."""
        self._closed = True
        for _ in self._threads:
            self._wake.release()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _gather(self) -> None:
        while self._called:
            self._ended.acquire()
            self._called -= 1

    def _launch(self) -> None:
        for number in range(self.helpers):
            thread = threading.Thread(target=self._help, name=f"moetier compute {number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        tasks = self._tasks
        while tasks:
            try:
                task = tasks.popleft()
            except IndexError:  # another was faster
                return
            try:
                task()
            except BaseException as error:
                self._errors.append(error)

    def _help(self) -> None:
        torch.set_num_threads(1)  # of this thread only: OpenMP keeps the number per thread
        with torch.inference_mode():  # may write to whatever the caller made, in inference mode or not
            while True:
                self._wake.acquire()
                if self._closed:
                    return
                self._work()
                self._ended.release()


class OneThread:
    """Hooks around a model's forward: steps of few tokens run with one torch thread, the number is put back after.

    What is not experts is short products there; they lose more by meeting than they gain by sharing.
    """

    def __init__(self) -> None:
        self._before = threading.local()

    def enter(self) -> None:
        """Before the forward."""
        if getattr(self._before, "threads", None) is None:
            self._before.threads = torch.get_num_threads()
            torch.set_num_threads(1)

    def leave(self) -> None:
        """After the forward, failed or not."""
        threads = getattr(self._before, "threads", None)
        if threads is not None:
            self._before.threads = None
            torch.set_num_threads(threads)


def make_crew(split: Split, layouts: Sequence[RecordLayout], is_transposed: bool) -> Crew | None:
    """The crew for these records with as many threads as torch has here, or None where torch's own way is taken.

    Raises `ConfigError` if "experts" was asked for and would change bits.
    """
    threads = torch.get_num_threads()
    if split == "products" or threads < 2:
        return None
    weights = sorted({(f.dtype, f.shape) for layout in layouts for f in layout.fields if len(f.shape) == 2}, key=str)
    half = all(dtype in (torch.bfloat16, torch.float16) for dtype, _ in weights)
    if half and all(is_exact(dtype, (shape,), is_transposed, threads) for dtype, shape in weights):
        cuts = not is_transposed and all(one_thread_can_cut(dtype, shape) for dtype, shape in weights)
        return Crew(threads - 1, cuts)
    if split == "experts":
        raise ConfigError(
            "split='experts': with these dtypes and shapes a product's bits depend on the number of threads; "
            "use split='products', or load the model in bfloat16 or float16"
        )
    return None
