"""CUDA's streams and events without CUDA: what is enqueued runs later, in any order that streams and events allow.

A missing fence shows as wrong bytes, because the fake is as late as it may be: work runs when somebody waits for it,
and now and then by chance. Waits and queries see what CUDA's would: an event stands for its last `record` before them.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moetier.arenas import DeviceArena, HostArena
from moetier.training.outbound import Outbound


class FakeCuda:
    """Streams with queues, and who runs what is in them."""

    def __init__(self, seed: int = 0, haste: float = 0.05):
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.haste = haste  # chance that some work is done at a call
        self.streams: list[FakeStream] = []
        self.local = threading.local()
        self.errors: list[str] = []
        self.default = self.stream()
        self.compute: list[FakeStream] = [self.default]
        self.host_waits = self.ticks = 0
        self.recorded: dict[int, set[FakeStream]] = {}  # address of a tensor -> other streams that use it

    def free(self, tensor: torch.Tensor) -> None:
        """A tensor is dropped: the allocator gives its memory to the kernels that the current stream gets next.

        It waits for what other streams have queued, if the tensor was recorded on them.
        """
        with self.lock:
            for stream in self.recorded.pop(tensor.data_ptr(), ()):
                self.current().wait_stream(stream)
            self.current().queue.append(lambda: tensor.view(torch.uint8).fill_(255))

    def stream(self, device: Any = None, **_: Any) -> FakeStream:
        with self.lock:
            return FakeStream(self)

    def event(self, enable_timing: bool = False, blocking: bool = False) -> FakeEvent:
        return FakeEvent(self, enable_timing)

    def current(self, device: Any = None) -> FakeStream:
        found: FakeStream = getattr(self.local, "stream", self.default)
        return found

    @contextmanager
    def using(self, stream: FakeStream) -> Iterator[None]:
        before = self.current()
        self.local.stream = stream
        try:
            yield
        finally:
            self.local.stream = before

    def launch(self, work: Callable[[], object]) -> None:
        """A kernel, or a copy, on the current stream."""
        with self.lock:
            self.current().queue.append(work)
            self.chance()

    def chance(self) -> None:
        while self.random.random() < self.haste and self.step():
            pass

    def step(self) -> bool:
        """Run the head of some stream; False if no stream can go on."""
        with self.lock:
            heads = [stream for stream in self.streams if stream.queue and stream.runnable()]
            if not heads:
                return False
            self.ticks += 1
            self.random.choice(heads).queue.popleft()()
            return True

    def run_until(self, done: Callable[[], bool]) -> None:
        """What a host wait does; other threads may call in between."""
        while True:
            with self.lock:
                if done():
                    return
                assert self.step(), "the streams wait for one another"

    def run_all(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))


class Wait:
    """An entry of a queue that is not over before the event is."""

    def __init__(self, event: FakeEvent, version: int):
        self.event, self.version = event, version

    def __call__(self) -> None:
        pass


class FakeStream:
    def __init__(self, cuda: FakeCuda):
        self.cuda = cuda
        self.queue: deque[Callable[[], object]] = deque()
        cuda.streams.append(self)
        self.cuda_stream = len(cuda.streams)

    def runnable(self) -> bool:
        head = self.queue[0]
        return not isinstance(head, Wait) or head.event.ended >= head.version

    def wait_event(self, event: FakeEvent) -> None:
        with self.cuda.lock:
            self.queue.append(Wait(event, event.recorded))

    def wait_stream(self, other: FakeStream) -> None:
        event = FakeEvent(self.cuda)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.cuda.run_until(lambda: not self.queue)


class FakeEvent:
    def __init__(self, cuda: FakeCuda, timing: bool = False):
        self.cuda, self.timing = cuda, timing
        self.recorded = self.ended = 0
        self.when = 0.0

    def record(self, stream: FakeStream | None = None) -> None:
        with self.cuda.lock:
            self.recorded += 1
            version = self.recorded

            def end() -> None:
                self.ended = max(self.ended, version)
                self.when = float(self.cuda.ticks)

            (stream or self.cuda.current()).queue.append(end)

    def query(self) -> bool:
        with self.cuda.lock:
            self.cuda.chance()
            return self.ended >= self.recorded

    def synchronize(self) -> None:
        self.cuda.host_waits += 1
        self.cuda.run_until(lambda: self.ended >= self.recorded)

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.timing and other.timing
        return other.when - self.when


def install(monkeypatch: pytest.MonkeyPatch, seed: int = 0, haste: float = 0.05) -> FakeCuda:
    """Put the fake in place of `torch.cuda`, as far as the arenas use it; their copies run on its streams."""
    cuda = FakeCuda(seed, haste)
    for name, fake in [
        ("Stream", cuda.stream),
        ("Event", cuda.event),
        ("stream", cuda.using),
        ("current_stream", cuda.current),
        ("cudart", lambda: SimpleNamespace(cudaHostUnregister=lambda address: 0)),
    ]:
        monkeypatch.setattr(torch.cuda, name, fake)
    record = lambda self, stream: cuda.recorded.setdefault(self.data_ptr(), set()).add(stream)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    monkeypatch.setattr(HostArena, "_lock_pages", lambda self: True)
    for kind in (DeviceArena, Outbound):
        monkeypatch.setattr(kind, "_copy", lambda self, target, source: cuda.launch(lambda: target.copy_(source)))
    return cuda
