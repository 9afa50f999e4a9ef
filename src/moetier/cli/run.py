"""`moetier run`: load a model and stream what it writes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from moetier.cli import options as o
from moetier.cli.console import Console, write_error
from moetier.cli.errors import reported, say
from moetier.cli.files import check_file, check_writable, write_text
from moetier.cli.generating import Generation, check_finite, speed, tokenise
from moetier.cli.loading import check_device, find, import_libraries, load_tokenizer, loaded, unused_on_cpu
from moetier.cli.report import report, show
from moetier.errors import ConfigError


@reported
def run(
    model: o.Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; read from standard input when left out, or -.", metavar="PROMPT")
    ] = None,
    device_memory: o.DeviceMemory = None,
    host_memory: o.HostMemory = None,
    slots: o.Slots = None,
    policy: o.Policy = "horizon",
    admission: o.Admission = "decode-only",
    context: o.Context = 4096,
    readers: o.Readers = o.READERS,
    io: o.IO = "auto",
    prefetch: o.Prefetch = "auto",
    pin_after: o.PinAfter = None,
    profile: o.UseProfile = None,
    store: o.Store = None,
    cpu_experts: o.CPUExperts = "off",
    cache_prior: o.CachePrior = 0.0,
    keep_top: o.KeepTop = None,
    max_rank: o.MaxRank = None,
    max_mass: o.MaxMass = None,
    drop_misses: o.DropMisses = 0.0,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    threads: o.Threads = None,
    split: o.SplitBy = "auto",
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    max_new_tokens: o.MaxNewTokens = 128,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    repetition_penalty: o.RepetitionPenalty = None,
    do_sample: o.DoSample = None,
    seed: o.Seed = None,
    system: o.System = None,
    chat: o.Chat = None,
    stats_json: o.StatsJson = None,
    timeline: o.TimelineFile = None,
    save_profile: o.SaveProfile = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Write text with a model whose experts stay out of core.

    The text goes to standard output; progress, warnings and the table at the end go to standard error.
    """
    if dtype not in o.DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(o.DTYPES)}")
    if system and chat is False:
        raise ConfigError("--system and --no-chat contradict each other: a system message needs the chat template")
    sampling = sampling_options(do_sample, temperature, top_p, top_k, repetition_penalty)
    check_writable(stats_json, "--stats-json")
    check_writable(save_profile, "--save-profile")
    check_file(timeline, "--timeline")
    text = read_prompt(prompt)
    console = Console(stderr=True, quiet=quiet)
    import_libraries(console, verbose, threads)
    check_device(device)
    import torch

    from moetier.options import Options

    tiering = Options(
        device_memory,
        host_memory,
        slots,
        policy,
        admission,
        context,
        readers,
        io,  # type: ignore[arg-type]
        split,  # type: ignore[arg-type]
        pin_after=pin_after,
        profile=profile,
        record_profile=save_profile is not None,
        store=store,
        cpu_experts=cpu_experts,
        cache_prior=cache_prior,
        keep_top=keep_top,
        max_rank=max_rank,
        max_mass=max_mass,
        drop_misses=drop_misses,
        prefetch=prefetch,
    )
    tiering.check()  # a wrong flag is told before anything is downloaded
    warnings = unused_on_cpu(device, tiering)
    folder = find(model, revision, console)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    inputs = tokenise(tokenizer, text, system, chat)
    arguments: dict[str, Any] = {name: getattr(tiering, name) for name in Options.__dataclass_fields__}
    arguments |= {"device": device, "dtype": dtype} | ({"trust_remote_code": True} if trust_remote_code else {})
    begin = time.perf_counter()
    with loaded(folder, console, verbose, **arguments) as lm:
        load_seconds = time.perf_counter() - begin
        if lm.moetier.plan.chunks is not None:
            warnings.append(lm.moetier.plan.advice)
        warnings += overruns(lm, inputs["input_ids"].shape[1] + max_new_tokens, context)
        for message in [] if quiet else warnings:
            say("warning", message)
        if seed is not None:
            torch.manual_seed(seed)
        generation = Generation(lm, tokenizer)
        with lm.moetier.timeline(timeline) if timeline is not None else nullcontext() as recorded:
            generation.run(inputs, max_new_tokens=max_new_tokens, **sampling)
        result = report(lm, model, speed([generation]), load_seconds, generation.seconds)
        if save_profile is not None:
            lm.moetier.profile().save(save_profile)
    show(result, console)
    if recorded is not None and not quiet:
        lost = f"; the first {recorded.dropped} events did not fit" if recorded.dropped else ""
        write_error(f"timeline: {timeline}: open it at https://ui.perfetto.dev{lost}")
    if stats_json is not None:
        write_text(stats_json, json.dumps(result, indent=2) + "\n", "--stats-json")


def read_prompt(prompt: str | None) -> str:
    """The argument, or standard input without its last line end."""
    if prompt is not None and prompt != "-":
        text = prompt
    elif sys.stdin.isatty():
        raise ConfigError("no prompt: give one as an argument, or pipe it into standard input")
    else:
        try:
            text = sys.stdin.read().removesuffix("\n")
            text.encode()  # some locales let any byte pass
        except UnicodeError as error:
            raise ConfigError(f"the prompt on standard input is not text: {error}") from None
    if not text:
        raise ConfigError("the prompt is empty: give one as an argument, or pipe it into standard input")
    return text


def sampling_options(
    do_sample: bool | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
) -> dict[str, Any]:
    """Arguments of `generate`: only what the user said, the rest is the model's own generation config."""
    check_finite(temperature=temperature, repetition_penalty=repetition_penalty)
    if top_p is not None and not 0 < top_p <= 1:  # also what is not a number
        raise ConfigError(f"--top-p {top_p:g}: must be above 0 and at most 1")
    chosen: dict[str, Any] = {} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}
    if temperature == 0:
        if do_sample:
            raise ConfigError("--temperature 0 is greedy and contradicts --do-sample; leave one out")
        do_sample, temperature = False, None
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    asked = {name: value for name, value in asked.items() if value is not None}
    if do_sample is False:
        if asked:
            flags = ", ".join("--" + name.replace("_", "-") for name in asked)
            raise ConfigError(f"{flags} and greedy decoding contradict each other; leave one out")
        return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if asked or do_sample:
        chosen["do_sample"] = True
    return chosen | asked


def overruns(lm: Any, tokens: int, context: int) -> Iterator[str]:
    """What a text of `tokens` may overrun."""
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if tokens > context:
        yield f"up to {tokens} tokens, but memory is planned for --context {context}"
    if longest is not None and tokens > longest:
        yield f"up to {tokens} tokens, but the model is made for {longest}"
