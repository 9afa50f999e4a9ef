"""What the benchmarks share: a checkpoint to run, memory control groups, process counters, disk bandwidth, the machine.

Imports torch only inside functions, so that a process that merely starts and watches others stays small.
"""

from __future__ import annotations

import datetime
import json
import mmap
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MIB = 1 << 20
GIB = 1 << 30
DEFAULT_THREADS = "default"  # what one gets without setting a number of threads anywhere
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


# -- the checkpoint ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE model, and how its tokens are related.

    The router's rows are random. What makes some experts popular, and consecutive tokens alike, is the embedding: each
    token's is sqrt(common) times a direction that all tokens share, plus sqrt(topic) times the direction of the token's
    topic, plus noise of its own for the rest of the variance. The router's product with the first part is a fixed
    offset per expert (popularity), with the second an offset per topic, and texts stay with a topic for 1 / (1 - stay)
    tokens on average.
    """

    hidden: int = 1024
    layers: int = 12
    experts: int = 64
    top_k: int = 8
    intermediate: int = 768
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 8192
    topics: int = 16
    common: float = 0.06
    topic: float = 0.36
    stay: float = 0.9
    layers_per_shard: int = 3

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert in bf16."""
        return 3 * self.hidden * self.intermediate * 2

    @property
    def experts_nbytes(self) -> int:
        """Bytes of all experts."""
        return self.layers * self.experts * self.expert_nbytes


BIG = Shape()
TINY = Shape(hidden=256, layers=3, experts=16, top_k=4, intermediate=192, heads=4, kv_heads=2, vocab=512, topics=8)
MICRO = Shape(64, layers=1, experts=4, top_k=2, intermediate=32, heads=2, kv_heads=1, head_dim=32, vocab=64, topics=4)


def make_checkpoint(folder: Path, shape: Shape, device: str = "cpu") -> None:
    """Write the checkpoint in hub layout (a tensor per expert and matrix), shard by shard. Reused if it is there.

    `device` draws the numbers; another one draws others.
    """
    marker = folder / "shape.json"
    if marker.is_file() and json.loads(marker.read_text()) == asdict(shape):
        return
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    from safetensors.torch import save_file

    starts = range(0, shape.layers, shape.layers_per_shard)
    groups = [range(start, min(start + shape.layers_per_shard, shape.layers)) for start in starts]
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(len(groups) + 1):
        name = f"model-{number + 1:05d}-of-{len(groups) + 1:05d}.safetensors"
        tensors = (
            _outer_tensors(shape, device) if number == 0 else dict(_layer_tensors(shape, groups[number - 1], device))
        )
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1))
    os.sync()
    marker.write_text(json.dumps(asdict(shape)))


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.intermediate,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "bfloat16",
    }


def _outer_tensors(shape: Shape, device: str) -> dict[str, Any]:
    import torch

    generator = torch.Generator(device).manual_seed(1)

    def normal(*sizes: int) -> Any:
        return torch.randn(*sizes, generator=generator, device=device).cpu()

    own = normal(shape.vocab, shape.hidden)
    common = normal(shape.hidden)
    topics = normal(shape.topics, shape.hidden)
    rest = 1 - shape.common - shape.topic
    embedding = shape.common**0.5 * common + rest**0.5 * own
    embedding += shape.topic**0.5 * topics[torch.arange(shape.vocab) % shape.topics]
    head = normal(shape.vocab, shape.hidden) * 0.02
    return {
        "model.embed_tokens.weight": embedding.bfloat16(),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
        "lm_head.weight": head.bfloat16(),
    }


def _layer_tensors(shape: Shape, layers: range, device: str) -> Iterator[tuple[str, Any]]:
    import torch

    def normal(rows: int, columns: int, std: float = 0.02) -> Any:
        return (torch.randn(rows, columns, generator=generator, device=device) * std).bfloat16().cpu()

    hidden, inner = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in layers:
        generator = torch.Generator(device).manual_seed(100 + layer)
        at = f"model.layers.{layer}"
        for norm, width in (
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", shape.head_dim),
            ("self_attn.k_norm", shape.head_dim),
        ):
            yield f"{at}.{norm}.weight", torch.ones(width, dtype=torch.bfloat16)
        yield f"{at}.self_attn.q_proj.weight", normal(query, hidden)
        yield f"{at}.self_attn.k_proj.weight", normal(key, hidden)
        yield f"{at}.self_attn.v_proj.weight", normal(key, hidden)
        yield f"{at}.self_attn.o_proj.weight", normal(hidden, query)
        yield f"{at}.mlp.gate.weight", normal(shape.experts, hidden, hidden**-0.5)
        for expert in range(shape.experts):
            yield f"{at}.mlp.experts.{expert}.gate_proj.weight", normal(inner, hidden)
            yield f"{at}.mlp.experts.{expert}.up_proj.weight", normal(inner, hidden)
            yield f"{at}.mlp.experts.{expert}.down_proj.weight", normal(hidden, inner)


def make_tokens(shape: Shape, count: int, seed: int = 0) -> list[int]:
    """A text: random tokens of a topic that changes now and then. The same in every arm."""
    import random

    source = random.Random(seed)
    topic = source.randrange(shape.topics)
    tokens = []
    for _ in range(count):
        if source.random() > shape.stay:
            topic = source.randrange(shape.topics)
        tokens.append(source.randrange(shape.vocab // shape.topics) * shape.topics + topic)
    return tokens


# -- processes --------------------------------------------------------------------------------------------------------


def memory_of(pid: int | str = "self") -> dict[str, int]:
    """VmHWM (peak resident, mapped files included), VmRSS, RssAnon and RssFile in bytes; empty for no such process."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = re.findall(r"^(VmHWM|VmRSS|RssAnon|RssFile):\s+(\d+) kB", text, re.M)
    return {name: int(kib) * 1024 for name, kib in found}


def disk_read_bytes() -> int:
    """Bytes that this process made the disk read, page faults included."""
    match = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)
    return int(match[1]) if match else 0


@dataclass
class Ended:
    """How a child ended. Peaks are sampled (RssAnon has no high-water mark in the kernel)."""

    returncode: int
    stderr: str
    peak_anon: int


def run_child(script: Path, spec: dict[str, Any], folder: Path, group: MemoryGroup | None = None) -> tuple[Any, Ended]:
    """Run `script --child SPEC` in a fresh process (inside `group`), and read the JSON that it writes."""
    folder.mkdir(parents=True, exist_ok=True)
    out, log = folder / "child.json", folder / "child.log"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(script), "--child", json.dumps(spec | {"out": str(out)})]
    if group is not None:
        command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.procs), *command]
    with open(log, "w") as stderr:
        child = subprocess.Popen(command, stdout=stderr, stderr=stderr, env=child_environment(spec))
        peak = 0
        try:
            while child.poll() is None:
                peak = max(peak, memory_of(child.pid).get("RssAnon", 0))
                time.sleep(0.1)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    result = json.loads(out.read_text()) if out.is_file() and child.returncode == 0 else None
    return result, Ended(child.returncode, log.read_text()[-2000:], peak)


def child_environment(spec: dict[str, Any]) -> dict[str, str]:
    """The environment of a child: its thread count (`threads`, or "default": none is set) and `source`, its engine."""
    environment = {name: value for name, value in os.environ.items() if name not in THREAD_SETTINGS}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    threads = spec.get("threads", 1)
    if threads != DEFAULT_THREADS:
        environment["OMP_NUM_THREADS"] = str(threads)
    if spec.get("source"):
        paths = [str(spec["source"]), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def drop_page_cache() -> bool:
    """Write dirty pages and empty the page cache; False where that is not permitted."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


# -- memory control groups --------------------------------------------------------------------------------------------


class NoMemoryGroup(RuntimeError):
    """Control groups are not available to this process."""


@contextmanager
def tidy_end() -> Iterator[None]:
    """Around a benchmark: told to end, it ends its children and removes their groups; without groups it says so."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except NoMemoryGroup as error:
        raise SystemExit(f"error: {error}") from None


class MemoryGroup:
    """A memory control group, version 1 or 2. Page cache that its processes bring in is charged to it."""

    def __init__(self, folder: Path, version: int):
        self.folder, self.version = folder, version
        self.procs = folder / "cgroup.procs"

    def stats(self) -> dict[str, int]:
        """Peak usage (page cache included), and how often the limit was hit."""
        if self.version == 1:
            counters = [self.folder / f"memory.{name}failcnt" for name in ("", "memsw.")]
            failures = sum(int(file.read_text()) for file in counters if file.is_file())
            oom = re.search(r"oom_kill (\d+)", (self.folder / "memory.oom_control").read_text())
            peak = int((self.folder / "memory.max_usage_in_bytes").read_text())
            return {"peak": peak, "limit_hits": failures, "killed": int(oom[1]) if oom else 0}
        events = dict(line.split() for line in (self.folder / "memory.events").read_text().splitlines())
        peak_file = self.folder / "memory.peak"  # since Linux 5.19
        peak = int(peak_file.read_text()) if peak_file.is_file() else 0
        return {"peak": peak, "limit_hits": int(events["max"]), "killed": int(events["oom_kill"])}


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A fresh group with a limit in bytes and no swap. Raises `NoMemoryGroup` with the reason."""
    name = f"moetier-benchmark-{os.getpid()}"
    first = Path("/sys/fs/cgroup/memory")
    version = 1 if (first / "memory.limit_in_bytes").is_file() else 2
    folder = (first if version == 1 else Path("/sys/fs/cgroup")) / name
    try:
        if version == 2 and "memory" not in (folder.parent / "cgroup.subtree_control").read_text().split():
            (folder.parent / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir(exist_ok=True)
        names = ("limit_in_bytes", "memsw.limit_in_bytes") if version == 1 else ("max", "swap.max")
        (folder / f"memory.{names[0]}").write_text(str(limit))
        if (folder / f"memory.{names[1]}").is_file():
            (folder / f"memory.{names[1]}").write_text(str(limit) if version == 1 else "0")
    except OSError as error:
        raise NoMemoryGroup(
            f"no memory control group can be made at {folder} ({error.strerror}); run as root where control groups are "
            "mounted writable, or pass --memory-limit none to run without a limit"
        ) from error
    try:
        yield MemoryGroup(folder, version)
    finally:
        _remove(folder, version)


def _remove(folder: Path, version: int) -> None:
    for _ in range(50):  # its last process may still be exiting
        try:
            if version == 1:
                (folder / "memory.force_empty").write_text("0")
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


# -- the disk ---------------------------------------------------------------------------------------------------------


def seconds_of(requests: Iterable[Any], threads: int, nbytes: int, move: Callable[[Any, mmap.mmap], int]) -> float:
    """How long so many threads take for the requests, each of `nbytes`; `move(request, buffer)` returns the bytes."""
    todo = iter(requests)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        buffer = mmap.mmap(-1, nbytes)
        buffer.write(os.urandom(nbytes))  # its pages exist before the clock starts
        ready.wait()
        try:
            while True:
                with lock:
                    request = next(todo, None)
                if request is None:
                    return
                if move(request, buffer) != nbytes:
                    raise OSError(f"{request}: moved short")
        except BaseException as error:
            errors.append(error)

    ready = threading.Barrier(threads + 1)
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    begin = time.perf_counter()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - begin
    if errors:
        raise errors[0]
    return elapsed


def raw_bandwidth(files: list[Path], threads: int, nbytes: int, start: int = 0) -> float:
    """Bytes/s of plain direct reads in 1 MiB chunks, `nbytes` in all from chunk `start` on, round the files."""
    chunks = [(file, offset) for file in files for offset in range(0, file.stat().st_size - MIB, MIB)]
    todo = [chunks[(start + i) % len(chunks)] for i in range(nbytes // MIB)]
    fds = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files}
    try:
        return len(todo) * MIB / seconds_of(todo, threads, MIB, lambda at, into: os.preadv(fds[at[0]], [into], at[1]))
    finally:
        for fd in fds.values():
            os.close(fd)


# -- the machine ------------------------------------------------------------------------------------------------------


def machine_info(root: Path) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    total = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.M)
    simd = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flags and flag in flags[1].split()]
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "simd": simd,
        "cores": os.cpu_count(),
        "memory": int(total[1]) * 1024 if total else 0,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("torch", "transformers", "accelerate", "safetensors", "moetier")
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(root),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit(root: Path) -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + (" (changed)" if changed else "")
    except OSError:
        return "unknown"
