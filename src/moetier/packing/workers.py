"""The same work for many items on a few threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[tuple[T, R]]:
    """Yield (item, result) as they end. The first error is raised when the items under way have ended."""
    rest = iter(items)
    running: dict[Future[R], T] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="moetier packing")
    try:
        while True:
            for item in islice(rest, 2 * threads - len(running)):
                running[pool.submit(work, item)] = item
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                item = running.pop(future)
                yield item, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
