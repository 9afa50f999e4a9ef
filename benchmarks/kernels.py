"""What bounds an expert's matrix products on a CPU: bytes of weights per second against the memory's bandwidth.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json       # some minutes; wants a quiet machine
    python benchmarks/kernels.py --json benchmarks/results/kernels.json --resume --minutes 4    # a piece of it
    python benchmarks/kernels.py --update-docs benchmarks/results/kernels.json

A decode step multiplies one row, or a few, by matrices that no cache holds. So the weights here are views in an arena
much larger than the caches, visited round robin, as in a running model. Beside torch's own products stand, as
information, what its compiler and a loop compiled by numba reach. Everything runs in this one process; what the memory
gives is measured again beside every part, and each product is compared with what was found next to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
from common import MIB
from report import ROOT, Pieces, gbs, machine_line, say, table, update_section

SIZES = ((768, 2048), (1408, 2048), (3584, 4096))  # [out, in]: Qwen3-MoE, DeepSeek-V2-Lite, Mixtral's a quarter as wide
BATCHES = (1, 2, 4, 8, 16, 64, 256)
DTYPES = ("bfloat16", "float32")
Product = Callable[[Any, Any, Any], Any]  # x [B, in], weight [out, in], out [B, out]


# -- the memory's own speed --------------------------------------------------------------------------------------------


def stream_bandwidth(arena: Any, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Bytes/s of reading the arena (a sum), and of copying its halves (bytes read plus bytes written)."""
    import torch

    words = arena.view(torch.float32)
    half = words.numel() // 2
    calls = {
        "read": (arena.numel(), lambda: words.sum()),
        "copy": (arena.numel(), lambda: words[:half].copy_(words[half : 2 * half])),
    }
    return {name: [nbytes * rate(call, seconds) for _ in range(rounds)] for name, (nbytes, call) in calls.items()}


def rate(call: Callable[[], object], seconds: float) -> float:
    """Calls per second, over at least so many seconds, after one that is not counted."""
    call()
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or not count:
        call()
        count += 1
    return count / elapsed


# -- products ----------------------------------------------------------------------------------------------------------


def products(extra: bool) -> Iterator[tuple[str, Callable[[str, int], bool], Product]]:
    """Name, whether it does (dtype, batch), and the call."""
    import torch
    from torch.nn.functional import linear

    yield "F.linear", lambda dtype, batch: True, lambda x, w, out: linear(x, w)
    yield "torch.mm", lambda dtype, batch: True, lambda x, w, out: torch.mm(x, w.t(), out=out)
    yield "torch.mv", lambda dtype, batch: batch == 1, lambda x, w, out: torch.mv(w, x[0], out=out[0])
    yield "torch.addmv", lambda dtype, batch: batch == 1, lambda x, w, out: torch.addmv(out[0], w, x[0])
    if not extra:
        return
    if shutil.which("g++") or shutil.which("c++"):
        compiled = torch.compile(lambda x, w: linear(x, w), dynamic=False)
        yield "torch.compile", lambda dtype, batch: batch in (1, 4), lambda x, w, out: compiled(x, w)
    else:
        say("no C++ compiler: torch.compile is left out")
    try:
        yield "numba", lambda dtype, batch: dtype == "bfloat16" and batch == 1, numba_product()
    except ImportError:
        say("numba is not installed: its loop is left out")


def numba_product() -> Product:
    """A matrix-vector product of bf16 weights: a row is shifted up to fp32 in a buffer that stays in the cache."""
    import numba
    import numpy as np
    import torch

    @numba.njit(parallel=True, fastmath=True)  # type: ignore[misc]
    def multiply(weight: Any, x: Any, out: Any) -> None:
        rows, columns = weight.shape
        parts = numba.get_num_threads()
        for part in numba.prange(parts):
            shifted = np.empty(columns, np.uint32)
            floats = shifted.view(np.float32)
            for row in range(part * rows // parts, (part + 1) * rows // parts):
                for column in range(columns):
                    shifted[column] = np.uint32(weight[row, column]) << np.uint32(16)
                total = np.float32(0)
                for column in range(columns):
                    total += floats[column] * x[column]
                out[row] = total

    def product(x: Any, weight: Any, out: Any) -> None:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        single, result = x[0].float().numpy(), out[0].float().numpy()
        multiply(weight.view(torch.uint16).numpy(), single, result)
        out[0].copy_(torch.from_numpy(result))

    return product


def check(product: Product, x: Any, weight: Any) -> float:
    """The largest error against fp64, relative to the largest result: a wrong kernel must not be timed."""
    import torch

    out = torch.zeros(len(x), len(weight), dtype=x.dtype)
    result = product(x, weight, out)
    found = (out if result is None else result).reshape(len(x), -1).double()
    exact = x.double() @ weight.double().t()
    return float((found - exact).abs().max() / exact.abs().max())


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is missing: of each number of threads, dtype and size the bandwidths, then every product."""
    import torch

    arena = torch.empty(args.arena_mib * MIB, dtype=torch.uint8)
    pieces, names = Pieces(args), ("arena_mib", "seconds", "rounds", "batches", "no_extra", "smoke")
    found = pieces.open(
        {
            "machine": common.machine_info(ROOT),
            "settings": {name: getattr(args, name) for name in names},
            "caches": cache_sizes(),
            "bandwidth": {},
            "products": [],
        }
    )
    done = {(row["threads"], row["dtype"], tuple(row["size"])) for row in found["products"]}
    kernels = list(products(not args.no_extra))
    torch._dynamo.config.recompile_limit = 256  # a program per size, dtype, batch
    for threads in args.threads:
        torch.set_num_threads(threads)
        torch.compiler.reset()  # the number of threads is part of a compiled program
        for dtype in DTYPES:
            sizes = [size for size in args.sizes if (threads, dtype, size) not in done]
            if sizes:
                torch.randn(arena.numel() // getattr(torch, dtype).itemsize, out=arena.view(getattr(torch, dtype)))
            for size in sizes:
                if not pieces.time_left():
                    say("the time is over; --resume goes on")
                    return found
                streams = stream_bandwidth(arena, args.seconds, args.rounds)
                both = found["bandwidth"].setdefault(str(threads), {})
                for name, values in streams.items():
                    both.setdefault(name, []).extend(values)
                cell = {"threads": threads, "dtype": dtype, "size": size, "read": streams["read"]}
                found["products"] += [cell | row for row in measure_size(arena, dtype, size, kernels, args)]
                pieces.write(found)
                say(f"{threads} threads, {dtype}, {size[0]} × {size[1]}: done")
    return found


def measure_size(
    arena: Any, dtype: str, size: tuple[int, int], kernels: list[Any], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Every product and batch over the arena's matrices of this size."""
    import torch

    kind = getattr(torch, dtype)
    count = arena.numel() // (size[0] * size[1] * kind.itemsize)
    weights = arena.view(kind)[: count * size[0] * size[1]].view(count, *size)
    for batch in args.batches:
        x, out = torch.randn(batch, size[1]).to(kind), torch.zeros(batch, size[0], dtype=kind)
        for name, does, product in kernels:
            if not does(dtype, batch):
                continue
            try:
                error = check(product, x, weights[0])
            except Exception as failure:  # a compiler that does not work here
                yield {"batch": batch, "kernel": name, "failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
                continue
            if not error < 0.05:
                raise SystemExit(f"error: {name} is wrong for {dtype}, batch {batch}: relative error {error:.3g}")

            places = round_robin(count)

            def call(product: Product = product, x: Any = x, out: Any = out, places: Iterator[int] = places) -> None:
                product(x, weights[next(places)], out)

            nbytes = weights[0].numel() * kind.itemsize
            rates = [rate(call, args.seconds) for _ in range(args.rounds)]
            flops = [2 * batch * size[0] * size[1] * value for value in rates]
            yield {
                "batch": batch,
                "kernel": name,
                "bytes_per_second": [nbytes * value for value in rates],
                "flops": flops,
            }


def round_robin(count: int) -> Iterator[int]:
    """0, 1, …, count - 1, again and again."""
    while True:
        yield from range(count)


def cache_sizes() -> dict[str, str]:
    """The processor's caches, as Linux tells them."""
    folder, found = Path("/sys/devices/system/cpu/cpu0/cache"), {}
    for index in sorted(folder.glob("index*")) if folder.is_dir() else []:
        level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
        found[f"L{level} {kind.lower()}"] = (index / "size").read_text().strip()
    return found


# -- the report --------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    """Bandwidths, and per dtype, size and threads the share of the read bandwidth of every product."""
    settings = found["settings"]
    caches = ", ".join(f"{name} {size}" for name, size in found["caches"].items()) or "unknown"
    parts = [
        f"{machine_line(found['machine'])}; caches: {caches}; an arena of {settings['arena_mib']} MiB, "
        f"{settings['rounds']} × {settings['seconds']} s each, medians; "
        f"`python benchmarks/{found['machine']['command']}`."
    ]
    bandwidth = sorted(found["bandwidth"].items(), key=lambda item: int(item[0]))
    rows = [[threads, gbs(values["read"]), gbs(values["copy"])] for threads, values in bandwidth]
    parts.append(table(["threads", "reading, GB/s (min–max)", "copying, GB/s read + written"], rows))
    for dtype in DTYPES:
        batches = sorted({row["batch"] for row in found["products"]})
        head = [f"{dtype}: GB/s of weights (share of reading)", "threads", *(f"batch {batch}" for batch in batches)]
        cells = {}
        for row in found["products"]:
            if row["dtype"] == dtype:
                place = (tuple(row["size"]), row["threads"], row["kernel"])
                cells.setdefault(place, {})[row["batch"]] = cell(row)
        rows = [
            [f"{size[0]} × {size[1]}, {kernel}", str(threads), *(by_batch.get(batch, "") for batch in batches)]
            for (size, threads, kernel), by_batch in sorted(cells.items(), key=lambda item: item[0][:2])
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def cell(row: dict[str, Any]) -> str:
    """A product's speed, its share of what reading reached next to it, and from a batch of 16 on what it computes."""
    if "failed" in row:
        return "failed"
    speed = statistics.median(row["bytes_per_second"])
    text = f"{speed / 1e9:.1f} ({100 * speed / statistics.median(row['read']):.0f} %)"
    return text if row["batch"] < 16 else f"{text}; {statistics.median(row['flops']) / 1e9:.0f} GFLOP/s"


def main() -> None:
    """Measure, or write the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--threads", type=int, nargs="+", default=sorted({1, min(2, os.cpu_count() or 1)}), help="torch threads")
    sizes = "; ".join(f"{number}: {size[0]} × {size[1]}" for number, size in enumerate(SIZES))
    add("--sizes", type=int, nargs="+", choices=range(len(SIZES)), metavar="NUMBER", help=sizes)
    add("--batches", type=int, nargs="+", default=list(BATCHES))
    add("--arena-mib", type=int, default=1024, help="must be much larger than the caches")
    add("--seconds", type=float, default=0.3, help="of each measurement")
    add("--rounds", type=int, default=3)
    add("--no-extra", action="store_true", help="torch's own products only")
    Pieces.add_options(parser)
    add("--smoke", action="store_true", help="one small size: does it run?")
    add("--update-docs", type=Path, metavar="JSON", help="write results into docs/benchmarks.md")
    args = parser.parse_args()
    if args.update_docs:
        update_section("kernels", tables(json.loads(args.update_docs.read_text())))
        return
    args.sizes = [SIZES[number] for number in args.sizes or range(len(SIZES))]
    if args.smoke:
        args.sizes, args.batches, args.threads = ((96, 128),), [1, 4], [1]
        args.arena_mib, args.seconds, args.rounds = 4, 0.005, 2
    print(tables(measure(args)))


if __name__ == "__main__":
    main()
