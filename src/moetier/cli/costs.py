"""The costs of experts that `moetier plan --measure` prints: what the engine measures at load with `cpu_experts=auto`.

In the JSON it is the key `calibration`, with the fields of `moetier.calibration.Calibration` and of its
`moetier.costs.Costs`, in seconds; `cpu` and `device` are lists of [tokens, seconds].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from moetier.cli.console import Console
from moetier.cli.loading import loaded
from moetier.costs import Cost, Costs, Work, makespan, split
from moetier.plan import Plan, format_size

if TYPE_CHECKING:
    from moetier.loading import CheckedFolder
    from moetier.options import Options


def measure_costs(
    plan: Plan, folder: CheckedFolder, options: Options, arguments: dict[str, Any], verbose: bool, console: Console
) -> dict[str, Any]:
    """Load the model with the plan's slots, and measure."""
    chosen = {name: getattr(options, name) for name in options.__dataclass_fields__} | arguments
    with console.status("measuring what experts cost"), loaded(folder, console, verbose, **chosen) as model:
        return calibration_of(model, plan.workload.top_k)


def calibration_of(model: Any, top_k: int) -> dict[str, Any]:
    """What is measured with a model that has not computed anything yet."""
    from moetier.calibration import calibrate

    module = next(module for module in model.modules() if hasattr(module, "_moetier"))
    return calibrate(model.moetier.cache, module, 0, top_k).to_dict()


def show_costs(found: dict[str, Any], top_k: int, console: Console) -> None:
    """As a table and a sentence on standard output."""
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    title = f"\nAn expert of {format_size(found['record_nbytes'])}, measured in {found['seconds']:.1f} s"
    console.print(title, markup=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    device = dict(found["device"])
    for name in ("tokens", f"CPU ms ({threads})", "GB/s of weights", *(["device ms"] if device else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for tokens, seconds in found["cpu"]:
        cells = [str(tokens), f"{1e3 * seconds:.3f}", f"{found['record_nbytes'] / seconds / 1e9:.1f}"]
        table.add_row(*cells, *([f"{1e3 * device[tokens]:.3f}"] if tokens in device else []))
    console.print(table)
    if not device:
        console.print("There is no GPU: everything is computed on the CPU, and no expert is ever a choice of side.")
        return
    costs = restore(found["costs"])
    console.print(
        f"on the link {1e3 * costs.link:.3f} ms ({found['record_nbytes'] / costs.link / 1e9:.1f} GB/s), off the disk "
        f"{1e3 * costs.disk:.3f} ms; CPU math takes {100 * costs.contention:.0f} % longer beside copies; rows to the "
        f"host and back {1e3 * costs.in_place:.3f} ms",
        markup=False,
        soft_wrap=True,
    )
    sides = split([Work(1)] * top_k, costs)
    alone = makespan([Work(1)] * top_k, [False] * top_k, costs)
    console.print(
        f"Of {top_k} misses of one token in host memory, --cpu-experts auto fetches {sides.in_place.count(False)}: "
        f"{1e3 * sides.seconds:.3f} ms instead of {1e3 * alone:.3f} ms",
        markup=False,
        soft_wrap=True,
    )


def restore(values: dict[str, Any]) -> Costs:
    """The inverse of `Costs.to_dict`."""
    made: dict[str, Any] = {name: Cost(**value) if isinstance(value, dict) else value for name, value in values.items()}
    return Costs(**made)
