"""`moetier trace`: record how a model really routes, convert traces, generate synthetic ones, and say what they mean.

Tables and JSON go to standard output, progress to standard error. The JSON of `stats` is described in
`moetier.trace.summary`, that of `info` is the key `trace` of it.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moetier.cli import options as o
from moetier.cli.console import Console
from moetier.cli.errors import reported
from moetier.errors import ConfigError

if TYPE_CHECKING:
    from moetier.trace import Trace

app = typer.Typer(help="Record, convert, generate and describe traces of expert routing.", no_args_is_help=True)

_Out = Annotated[str, typer.Option("--output", "-o", help="The file to write.", metavar="FILE")]
_In = Annotated[str, typer.Argument(help="A trace file (Parquet).", metavar="TRACE")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Format = Annotated[str | None, typer.Option("--format", metavar="NAME", help="Default: by the name of the file.")]


def _natural(name: str, help_text: str, least: int = 1) -> Any:
    return typer.Option(f"--{name}", help=help_text, metavar="N", min=least)


@app.command("record")
@reported
def record(
    model: o.Model,
    text: Annotated[list[str], typer.Option("--text", help="A text file; may be given several times.", metavar="FILE")],
    output: _Out,
    mode: Annotated[
        str, typer.Option(metavar="NAME", help="decode: a prefill, then token by token; or prefill: in chunks.")
    ] = "decode",
    tokens: Annotated[int, _natural("tokens", "Tokens of each text at most, the prompt included.")] = 256,
    prompt: Annotated[int, _natural("prompt", "Tokens of each text that are prefilled (decode mode).")] = 32,
    chunk: Annotated[int, _natural("chunk", "Tokens per forward pass (prefill mode).")] = 512,
    batch: Annotated[int, _natural("batch", "Texts side by side; cut to the shortest of them.")] = 1,
    generate: Annotated[
        bool, typer.Option("--generate", help="Decode the model's own text after the prompt, not the text's.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of --generate; 0 is greedy.", metavar="X", min=0.0)] = 0.7,
    seed: Annotated[int, _natural("seed", "Seed of --generate.", 0)] = 0,
    token_ids: Annotated[
        bool,
        typer.Option("--token-ids/--no-token-ids", help="Keep the tokens' numbers; the text can be read from them."),
    ] = True,
    device_memory: o.DeviceMemory = None,
    host_memory: o.HostMemory = None,
    slots: o.Slots = None,
    policy: o.Policy = "horizon",
    readers: o.Readers = o.READERS,
    store: o.Store = None,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    threads: o.Threads = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Run a model over texts and write down which experts its routers choose.

    What is recorded does not depend on slots or policy: these only make the run faster or smaller.
    """
    from moetier.cli.loading import check_device, find, import_libraries, load_tokenizer, loaded
    from moetier.files import check_writable
    from moetier.trace.files import require_pyarrow, write_trace

    require_pyarrow()
    if dtype not in o.DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(o.DTYPES)}")
    contents = [_read_text(path) for path in text]
    check_writable(output)
    console = Console(stderr=True, quiet=quiet)
    import_libraries(console, verbose, threads)
    check_device(device)
    from moetier.options import Options
    from moetier.recording import RecordOptions, Text, record_texts

    how = RecordOptions(mode, tokens, prompt, chunk, batch, generate, temperature, seed, token_ids)  # type: ignore[arg-type]
    how.check()
    tiering: dict[str, Any] = {"device_memory": device_memory, "host_memory": host_memory, "slots": slots}
    tiering |= {"policy": policy, "readers": readers, "store": store, "context": max(tokens, 16)}
    Options(**tiering).check()
    folder = find(model, revision, console)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    arguments = (
        tiering | {"device": device, "dtype": dtype} | ({"trust_remote_code": True} if trust_remote_code else {})
    )
    with loaded(folder, console, verbose, **arguments) as lm:
        texts = [Text(Path(path).name, content) for path, content in zip(text, contents, strict=True)]
        with _bar(console, len(texts) * tokens) as advance:
            name = folder.path.name if Path(model).is_dir() else model
            trace = record_texts(lm, tokenizer, texts, how, name=name, progress=advance)
    write_trace(trace, output)
    cut = [item["name"] for item in trace.info.sequences if item["tokens"] < tokens]
    console.print(f"{output}: {_sizes(trace)}", markup=False, highlight=False, soft_wrap=True)
    if cut:
        console.print(f"fewer than {tokens} tokens: {', '.join(cut)}", markup=False, highlight=False, soft_wrap=True)


def _read_text(path: str) -> str:
    try:
        content = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {path}: not a UTF-8 text ({error.reason} at byte {error.start})") from None
    if not content.strip():
        raise ConfigError(f"--text {path}: the file is empty")
    return content


class _bar:
    """A progress bar over tokens; calls back with their number."""

    def __init__(self, console: Console, total: int):
        columns = (
            TextColumn("recording"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=console.quiet)
        self._task = self._progress.add_task("recording", total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda count: self._progress.advance(self._task, count)

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


@app.command("import")
@reported
def import_(
    source: Annotated[str, typer.Argument(help="The file to import.", metavar="FILE")],
    output: _Out,
    format_: _Format = None,
) -> None:
    """Make a trace file from npz or JSONL; docs/traces.md describes both."""
    from moetier.trace.files import write_trace
    from moetier.trace.interchange import IMPORTS

    name = format_ or Path(source).suffix.removeprefix(".").lower()
    if name not in IMPORTS:
        raise ConfigError(f"--format {name or '(none)'}: unknown; choose one of {', '.join(IMPORTS)}")
    trace = IMPORTS[name](source)
    write_trace(trace, output)
    _tell(f"{output}: {_sizes(trace)}")


@app.command("export")
@reported
def export(trace: _In, output: _Out, format_: _Format = None) -> None:
    """Write a trace as JSONL, or for libCacheSim as csv or oracleGeneral (.bin)."""
    from moetier.trace.files import read_trace
    from moetier.trace.interchange import EXPORTS

    suffix = Path(output).suffix.removeprefix(".").lower()
    name = format_ or {"bin": "oracleGeneral", "oraclegeneral": "oracleGeneral"}.get(suffix, suffix)
    if name not in EXPORTS:
        raise ConfigError(f"--format {name or '(none)'}: unknown; choose one of {', '.join(EXPORTS)}")
    loaded = read_trace(trace)
    EXPORTS[name](loaded, output)
    _tell(f"{output}: {_sizes(loaded)}")


@app.command("generate")
@reported
def generate_(
    kind: Annotated[
        str,
        typer.Argument(metavar="KIND", help="zipf-markov, episode, iid, or uniform-control (a control, no benchmark)."),
    ],
    output: _Out,
    tokens: Annotated[int, _natural("tokens", "Tokens; of episode and iid: steps.")] = 10_000,
    layers: Annotated[int, _natural("layers", "MoE layers.")] = 24,
    experts: Annotated[int, _natural("experts", "Experts per layer.")] = 32,
    top_k: Annotated[int, _natural("top-k", "Experts per token and layer.")] = 4,
    seed: Annotated[int, _natural("seed", "Seed.", 0)] = 0,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the generator; may be given several times."),
    ] = None,
) -> None:
    """Make synthetic routing with a known structure; docs/traces.md has every parameter."""
    from moetier.files import check_writable
    from moetier.trace import synthetic
    from moetier.trace.files import require_pyarrow, write_trace

    environments = functools.partial(synthetic.environments, sampler="iid" if kind == "iid" else "episode")
    makers: dict[str, Callable[..., Trace]] = {
        "zipf-markov": synthetic.zipf_markov,
        "episode": environments,
        "iid": environments,
        "uniform-control": synthetic.uniform_control,
    }
    if kind not in makers:
        raise ConfigError(f"{kind}: unknown; choose one of {', '.join(makers)}")
    require_pyarrow()
    check_writable(output)
    values = _parameters(kind, makers[kind], parameter or [])
    trace = makers[kind](tokens, layers, experts, top_k, seed=seed, **values)
    write_trace(trace, output)
    _tell(f"{output}: {_sizes(trace)}")


def _parameters(kind: str, maker: Callable[..., Trace], texts: list[str]) -> dict[str, Any]:
    """`--set name=value` as keyword arguments. Raises `ConfigError` for what the generator does not take."""
    known = inspect.signature(maker).parameters
    names = [name for name in known if known[name].kind is inspect.Parameter.KEYWORD_ONLY]
    names = [name for name in names if name not in ("seed", "sampler")]
    if kind == "iid":
        names = [name for name in names if name not in ("episode", "envs_per_batch")]
    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in names:
            raise ConfigError(f"--set {text}: {kind} takes {', '.join(names)}")
        number = float if isinstance(known[name].default, float) else int
        try:
            values[name] = number(value)
        except ValueError:
            wanted = "number" if number is float else "whole number"
            raise ConfigError(f"--set {text}: {name} is a {wanted}") from None
    return values


@app.command("info")
@reported
def info(trace: _In, as_json: _Json = False) -> None:
    """Print what a trace holds and where it comes from."""
    from moetier.trace.files import read_trace
    from moetier.trace.summary import describe

    described = describe(read_trace(trace))
    if as_json:
        print(json.dumps(described, indent=2))
        return
    origin = described.pop("info")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {name.replace("_", " "): _say(value) for name, value in described.items()}
    rows |= {"model": origin["model"], "tokenizer": origin["tokenizer"], "source": origin["source"]}
    rows |= {name.replace("_", " "): json.dumps(value) for name, value in origin["extra"].items()}
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    console = Console(highlight=False, markup=False)
    console.print(table)
    for number, sequence in enumerate(origin["sequences"][:20]):
        console.print(f"sequence {number}: {json.dumps(sequence, ensure_ascii=False)}", soft_wrap=True)
    if len(origin["sequences"]) > 20:
        console.print(f"… and {len(origin['sequences']) - 20} more sequences (--json shows all)")


@app.command("stats")
@reported
def stats(
    trace: _In,
    as_json: _Json = False,
    decode_only: Annotated[bool, typer.Option("--decode-only", help="Leave the tokens of prefills out.")] = False,
    tokens: Annotated[int, _natural("tokens", "Tokens to sample for the locality statistics.", 16)] = 8192,
    seed: Annotated[int, _natural("seed", "Seed of the shuffles.", 0)] = 0,
) -> None:
    """Describe a trace: skew, locality, reuse, working sets; and whether the model is worth offloading."""
    from moetier.cli.tracestats import show
    from moetier.trace.files import read_trace
    from moetier.trace.summary import summarise

    console = Console(stderr=True)
    with console.status("counting"):
        loaded = read_trace(trace)
        loaded = loaded.decode_only() if decode_only else loaded
        if not loaded.tokens:
            raise ConfigError(
                f"{trace}: no tokens{' that were decoded; leave --decode-only out' if decode_only else ''}"
            )
        summary = summarise(loaded, tokens, seed)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary, Console(highlight=False, markup=False))


def _say(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _sizes(trace: Trace) -> str:
    return (
        f"{trace.tokens} tokens of {len(trace.sequences())} sequences, {trace.layers} layers, {trace.top_k} of "
        f"{trace.num_experts} experts"
    )


def _tell(message: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message)
