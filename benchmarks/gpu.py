"""Decode on a GPU: all experts resident against 75, 50 and 25 % of them in device slots, the rest in host memory.

    python benchmarks/gpu.py --json results.json                # under eight minutes, with a CUDA device
    python benchmarks/gpu.py --dry-run                          # on any machine, with a stand-in for the device

One process, no download: it writes a checkpoint with random weights, sized for the device, measures a plain copy from
page-locked memory, and runs the same text through plain transformers, moetier and accelerate's CPU offload. What does
not fit into the time budget is left out and named. With --dry-run, ordinary memory stands in for the device (the arena
that the tests use), sizes are tiny, and speeds mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
from arms import accelerate_device_map
from common import GIB, MIB, TINY, Shape
from report import ROOT, Mark, gbs, machine_line, marks_table, say, size, table, update_section, write_json
from tasks import difference

SHARES = (100, 75, 50, 25)
# hidden size and width of Qwen3-30B-A3B, fewer layers: 9 MiB an expert, 13.5 GiB in all
MODEL = Shape(2048, 24, 64, 8, 768, 32, 4, 128, vocab=8192, layers_per_shard=6)
HALF = 50
SHORT = 8  # measured tokens of a peer whose steps take most of a second


class Benchmark:
    """The parts, in order of importance, and what they found."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        import torch

        self.args, self.folder = args, folder
        self.shape = TINY if args.dry_run else MODEL
        self.device = torch.device("cpu" if args.dry_run else "cuda:0")
        self.begin = time.perf_counter()
        length = args.prompt + args.warm_up + args.tokens
        self.tokens = common.make_tokens(self.shape, length, args.seed)
        self.found: dict[str, Any] = {
            "machine": common.machine_info(ROOT),
            "device": "none: ordinary memory stands in" if args.dry_run else torch.cuda.get_device_name(self.device),
            "shape": asdict(self.shape),
            "settings": {name: getattr(args, name) for name in ("prompt", "warm_up", "tokens", "rounds", "dry_run")},
            "seconds": {},
            "runs": {},
            "left_out": {},
        }

    def main(self) -> dict[str, Any]:
        """Every part that the time allows; one that fails is named and does not end the others."""
        self.part("checkpoint", self.make_checkpoint, needed=True)
        self.part("pinned copy", self.measure_copies)
        self.part("all resident, transformers", lambda: self.run("transformers", self.load_transformers))
        for share in (100, HALF, 75, 25):
            self.part(f"moetier, {share} %", lambda share=share: self.run(f"moetier-{share}", self.loader(share)))
        self.part("accelerate", lambda: self.run(f"accelerate-{HALF}", self.load_accelerate, 1, SHORT))
        self.found["seconds"]["all"] = time.perf_counter() - self.begin
        write_json(self.args.json, self.found)
        return self.found

    def part(self, name: str, call: Callable[[], None], needed: bool = False) -> None:
        """Run a part unless the time is up; note how long it took, or why it is missing."""
        begin = time.perf_counter()
        if begin - self.begin > self.args.budget_seconds and not needed:
            self.found["left_out"][name] = f"the time budget of {self.args.budget_seconds} s was spent"
            return
        try:
            call()
        except Exception as error:
            if needed:
                raise
            self.found["left_out"][name] = f"{type(error).__name__}: {str(error)[:400]}"
        finally:
            self.release()
        self.found["seconds"][name] = time.perf_counter() - begin
        say(f"{name}: {self.found['seconds'][name]:.1f} s {self.found['left_out'].get(name, '')}")
        write_json(self.args.json, self.found)

    def release(self) -> None:
        """Give the memory of the last part back."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def synchronise(self) -> None:
        """Wait for the device."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def make_checkpoint(self) -> None:
        """Random weights, drawn on the device: a host would take minutes."""
        common.make_checkpoint(self.folder, self.shape, str(self.device))

    def measure_copies(self) -> None:
        """Bytes/s of plain copies of one expert's size, page-locked memory to the device, one behind the other."""
        import torch

        nbytes, count = self.shape.expert_nbytes, 8 if self.args.dry_run else 64
        locked = self.device.type == "cuda"
        source = torch.empty(count, nbytes, dtype=torch.uint8, pin_memory=locked)
        source.random_()
        target = torch.empty(count, nbytes, dtype=torch.uint8, device=self.device)
        rates = []
        for _ in range(self.args.rounds + 1):  # the first one is not counted
            self.synchronise()
            begin = time.perf_counter()
            for number in range(count):
                target[number].copy_(source[number], non_blocking=True)
            self.synchronise()
            rates.append(count * nbytes / (time.perf_counter() - begin))
        self.found["pinned_copy"] = {"nbytes": nbytes, "bytes_per_second": rates[1:], "page_locked": locked}

    def run(self, name: str, load: Callable[[], Any], rounds: int | None = None, tokens: int | None = None) -> None:
        """Load, run the text some times (or the first `tokens` of it), and keep steps and the engine's counters."""
        begin = time.perf_counter()
        model = load()
        try:
            loaded = time.perf_counter() - begin
            found = [self.decode(model, tokens) for _ in range(rounds or self.args.rounds)]
            result: dict[str, Any] = {"load_seconds": loaded, "rounds": found}
            if hasattr(model, "moetier"):
                result["tiers"] = [config.slots for config in model.moetier.cache.core.configs]
            self.found["runs"][name] = result
            say(f"  {name}: {rate(result):.1f} tokens/s")
        finally:
            if hasattr(model, "moetier"):
                model.moetier.close()

    def decode(self, model: Any, limit: int | None = None) -> dict[str, Any]:
        """The text's own tokens are fed one by one, as in decode.py; a step ends when its token is known here."""
        import torch

        args = self.args
        last = args.prompt + args.warm_up + min(limit or args.tokens, args.tokens)
        tokens = torch.tensor([self.tokens[:last]], device=self.device)
        stats = model.moetier.stats if hasattr(model, "moetier") else None
        steps, chosen, before = [], [], None
        with torch.no_grad():
            self.synchronise()
            begin = time.perf_counter()
            output = model(input_ids=tokens[:, : args.prompt], use_cache=True, logits_to_keep=1)
            chosen.append(int(output.logits[0, -1].argmax()))
            prefill = time.perf_counter() - begin
            for position in range(args.prompt, tokens.shape[1]):
                if position == args.prompt + args.warm_up and stats:
                    before = stats()
                begin = time.perf_counter()
                past = output.past_key_values
                output = model(input_ids=tokens[:, position : position + 1], past_key_values=past, use_cache=True)
                chosen.append(int(output.logits[0, -1].argmax()))
                steps.append(time.perf_counter() - begin)
        found = {"prefill_seconds": prefill, "steps": steps[args.warm_up :], "chosen": chosen}
        if stats and before is not None:
            after = stats()
            found["engine"] = self.counters(before, after)
        return found

    def counters(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """The engine's, and the link to the device: bytes moved, and the time in which it moved any."""
        found = difference(before, after)
        for side, (old, new) in enumerate(zip(before["tiers"], after["tiers"], strict=True)):
            found[f"tier_{side}"] = {key: sum(new[key]) - sum(old[key]) for key in ("hits", "lates", "misses")}
        name = next((name for name in after["links"] if name.endswith("device")), None)
        if name is not None:
            for key in ("bytes", "busy_seconds", "copies"):
                found[f"link_{key}"] = after["links"][name][key] - before["links"][name][key]
        return found

    # -- loading -------------------------------------------------------------------------------------------------------

    def load_transformers(self) -> Any:
        """Plain transformers, everything on the device."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto", device_map={"": self.device})

    def loader(self, share: int) -> Callable[[], Any]:
        """moetier with `share` % of the experts in device slots, and all that are not there in host memory."""

        def load() -> Any:
            import moetier

            records = self.shape.layers * self.shape.experts
            slots = max(1, records * share // 100)
            options: dict[str, Any] = {"context": len(self.tokens), "device": self.device}
            if self.args.dry_run:
                model = moetier.from_pretrained(self.folder, slots="100%", **options)
                use_stand_in(model, slots, records)
            else:
                host = self.shape.experts_nbytes + self.shape.experts_nbytes // 4 + 4 * GIB
                options |= {"host_memory": host, "io": "buffered"}  # what was just written is in the page cache
                model = moetier.from_pretrained(self.folder, slots=slots, **options)
            touch_home(model.moetier.cache)
            return model

        return load

    def load_accelerate(self) -> Any:
        """transformers' model, half of the layers' experts in host memory, which accelerate brings in when needed."""
        from accelerate import dispatch_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto")
        resident = int(self.shape.layers * HALF / 100)
        places = accelerate_device_map(self.shape.layers, resident)
        main = 0 if self.device.type == "cuda" else "cpu"
        # "disk" in that map is what is offloaded: here to host memory
        device_map = {name: "cpu" if place == "disk" else main for name, place in places.items()}
        return dispatch_model(model, device_map, main_device=main, force_hooks=True)


def use_stand_in(model: Any, device_slots: int, host_slots: int) -> None:
    """Serve the model's experts through two tiers of ordinary memory, the upper one in the place of a device's."""
    from moetier.arenas import HostArena, HostTierArena
    from moetier.cache import ExpertCache
    from moetier.residency import Residency
    from moetier.tiers import TierConfig

    tiered = model.moetier
    old, store = tiered.cache, tiered.cache.store
    core = Residency(
        [TierConfig(device_slots, "horizon"), TierConfig(host_slots, "horizon")], store.layers, store.experts
    )
    host, device = HostArena(host_slots, store.slot_nbytes), HostTierArena(device_slots, store.slot_nbytes)
    tiered.cache = ExpertCache(store, core, host, device)
    old.mover.close()
    old.host.close()


def touch_home(cache: Any) -> None:
    """Bring every expert up once: afterwards those that are not on the device are in host memory."""
    from moetier import Access, ExpertKey

    for layer in range(cache.store.layers):
        for expert in range(cache.store.experts):
            for _ in cache.stream(Access(0, layer, (ExpertKey(layer, expert),))):
                pass


# -- the report --------------------------------------------------------------------------------------------------------


def rate(run: dict[str, Any]) -> float:
    """Tokens/s: the median of the rounds."""
    return statistics.median(len(one["steps"]) / sum(one["steps"]) for one in run["rounds"])


def link_rate(run: dict[str, Any]) -> float | None:
    """Bytes moved to the device / the time in which the link moved any: the median of the rounds."""
    rates = [
        one["engine"]["link_bytes"] / one["engine"]["link_busy_seconds"]
        for one in run["rounds"]
        if one.get("engine", {}).get("link_busy_seconds")
    ]
    return statistics.median(rates) if rates else None


def marks(found: dict[str, Any]) -> list[Mark]:
    """The goals that the runs allow to judge."""
    runs, goals = found["runs"], []
    half = runs.get(f"moetier-{HALF}")
    resident = [rate(runs[name]) for name in ("transformers", "moetier-100") if name in runs]
    if half and resident:
        goals.append(
            Mark(f"{HALF} % device slots: tokens/s ÷ the faster of all resident", rate(half) / max(resident), 0.6, True)
        )
    if half and link_rate(half) and "pinned_copy" in found:
        plain = statistics.median(found["pinned_copy"]["bytes_per_second"])
        goals.append(Mark("bytes/s to the device ÷ a plain pinned copy", (link_rate(half) or 0) / plain, 0.9, True))
    if half and f"accelerate-{HALF}" in runs:
        ratio = rate(half) / rate(runs[f"accelerate-{HALF}"])
        goals.append(Mark(f"{HALF} %: tokens/s ÷ accelerate's CPU offload", ratio, 10, True))
    return goals


def tables(found: dict[str, Any]) -> str:
    """The whole report in markdown."""
    settings, shape = found["settings"], Shape(**found["shape"])
    parts = [
        f"{found['device']}; {machine_line(found['machine'])}. {shape.layers} layers × {shape.experts} experts, top "
        f"{shape.top_k}, {shape.expert_nbytes / MIB:.1f} MiB each, {size(shape.experts_nbytes)} in all; "
        f"{settings['prompt']} prompt tokens, {settings['tokens']} measured; medians of {settings['rounds']} rounds; "
        f"{found['seconds'].get('all', 0):.0f} s in all.",
    ]
    if settings["dry_run"]:
        parts.append("A dry run: ordinary memory stands in for the device, and the speeds mean nothing.")
    if marks(found):
        parts.append(marks_table(marks(found)))
    parts.append(run_table(found["runs"]))
    if "pinned_copy" in found:
        copy = found["pinned_copy"]
        kind = "page-locked" if copy["page_locked"] else "ordinary"
        parts.append(f"Plain copies of {copy['nbytes'] / MIB:.1f} MiB, {kind}: {gbs(copy['bytes_per_second'])} GB/s.")
    chosen = {name: run["rounds"][0]["chosen"] for name, run in found["runs"].items()}
    reference = next(iter(chosen.values()), None)
    other = [name for name, tokens in chosen.items() if tokens != (reference or [])[: len(tokens)]]
    parts.append(
        f"Not the same next tokens as the first: {', '.join(other)}." if other else "All chose the same tokens."
    )
    parts += [f"Left out: {name}: {why}" for name, why in found["left_out"].items()]
    return "\n\n".join(parts)


def run_table(runs: dict[str, Any]) -> str:
    """Speeds, and what went over the link."""
    rows = []
    for name, run in runs.items():
        last = run["rounds"][-1]
        steps, engine, speed = len(last["steps"]), last.get("engine", {}), link_rate(run)
        tier = engine.get("tier_0")
        hits = f"{100 * tier['hits'] / max(1, sum(tier.values())):.0f} %" if tier else ""
        row = [name, f"**{rate(run):.1f}**", f"{1e3 * statistics.median(last['steps']):.1f}", hits]
        row.append(f"{engine['link_bytes'] / steps / 1e6:.1f}" if "link_bytes" in engine else "")
        row.append(f"{speed / 1e9:.2f}" if speed else "")
        rows.append(
            [*row, *(f"{1e3 * engine[key] / steps:.1f}" if key in engine else "" for key in ("wait", "compute"))]
        )
    head = ["run", "decode, tokens/s", "median step, ms", "device hits", "to the device, MB/token", "GB/s while moving"]
    return table([*head, "waiting, ms", "launching math, ms"], rows)


def main() -> None:
    """Measure, or write the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="no GPU: tiny sizes, ordinary memory in the place of the device's")
    add("--budget-seconds", type=float, default=420, help="no part is begun after so long")
    add("--rounds", type=int, default=3, help="runs of the text with each model")
    add("--prompt", type=int, default=32)
    add("--warm-up", type=int, default=8)
    add("--tokens", type=int, default=48, help="measured tokens")
    add("--seed", type=int, default=0)
    add("--work", type=Path, help="folder for the checkpoint (14 GB); by default a temporary one")
    add("--json", type=Path)
    add("--update-docs", type=Path, metavar="JSON", help="write results into docs/benchmarks.md")
    args = parser.parse_args()
    if args.update_docs:
        update_section("gpu", tables(json.loads(args.update_docs.read_text())))
        return
    import torch

    if args.dry_run:
        args.prompt, args.warm_up, args.tokens, args.rounds = 8, 1, 4, 2
    elif not torch.cuda.is_available():
        raise SystemExit("error: torch finds no CUDA device; --dry-run runs without one")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        found = Benchmark(args, Path(folder) / "model").main()
    print(tables(found))
    if args.json is None:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
