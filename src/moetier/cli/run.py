"""`moetier run`: load a model and stream what it writes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from moetier.cli import options as o
from moetier.cli.errors import reported
from moetier.cli.generating import Generation, check_writable, loaded, report, show, write_stats
from moetier.errors import ConfigError


@reported
def run(
    model: o.Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; read from standard input when omitted or -.", show_default=False)
    ] = None,
    device_memory: o.DeviceMemory = None,
    host_memory: o.HostMemory = None,
    slots: o.Slots = None,
    policy: o.Policy = "horizon",
    admission: o.Admission = "decode-only",
    context: o.Context = 4096,
    readers: o.Readers = 4,
    io: o.IO = "auto",
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    max_new_tokens: o.MaxNewTokens = 128,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.", min=0.01)] = None,
    seed: o.Seed = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    system: Annotated[str | None, typer.Option(help="System message, for models with a chat template.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template. [default: if there is one]")
    ] = None,
    stats_json: o.StatsJson = None,
    threads: o.Threads = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
) -> None:
    """Write text with a model whose experts stay out of core. The text goes to standard output, the rest to standard
    error.
    """
    if dtype not in o.DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(o.DTYPES)}")
    if greedy and temperature:
        raise ConfigError("--greedy and --temperature contradict each other; give one of them")
    check_writable(stats_json)
    text = read_prompt(prompt)
    sampling = sampling_options(greedy, temperature, top_p, top_k, repetition_penalty, max_new_tokens)
    tiering: dict[str, Any] = {
        "device_memory": device_memory,
        "host_memory": host_memory,
        "slots": slots,
        "policy": policy,
        "admission": admission,
        "context": context,
        "readers": readers,
        "io": io,
        "device": device,
        "dtype": dtype,
    }
    if trust_remote_code:
        tiering["trust_remote_code"] = True
    from moetier.hf import Options
    from moetier.loading import resolve

    own = {name: value for name, value in tiering.items() if name in Options.__dataclass_fields__}
    Options(**own).check()  # a wrong flag is told before anything is downloaded
    folder = resolve(model, **({"revision": revision} if revision else {}))
    with loaded(folder, quiet, threads, **tiering) as (lm, tokenizer):
        if seed is not None:
            import torch

            torch.manual_seed(seed)
        generation = Generation(lm, tokenizer)
        generation.run(tokenise(tokenizer, text, system, chat, lm.device), **sampling)
        result = report(lm, generation.speeds())
    if not quiet:
        show(result)
    if stats_json is not None:
        write_stats(stats_json, result)


def read_prompt(prompt: str | None) -> str:
    """The argument, or standard input."""
    if prompt not in (None, "-"):
        text = str(prompt)
    elif sys.stdin.isatty():
        raise ConfigError("no prompt: give one as an argument, or pipe it into standard input")
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise ConfigError("the prompt is empty")
    return text


def sampling_options(
    greedy: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Arguments of `generate`: only what the user said, the rest is the model's own generation config."""
    if top_p is not None and top_p <= 0:
        raise ConfigError(f"--top-p {top_p}: must be above 0 and at most 1")
    chosen: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if greedy or temperature == 0:
        return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    if any(value is not None for value in asked.values()):
        chosen["do_sample"] = True
    asked["repetition_penalty"] = repetition_penalty
    return chosen | {name: value for name, value in asked.items() if value is not None}


def tokenise(tokenizer: Any, text: str, system: str | None, chat: bool | None, device: Any) -> dict[str, Any]:
    """The prompt as model inputs, through the chat template where there is one."""
    template = getattr(tokenizer, "chat_template", None)
    if (chat or system) and not template:
        raise ConfigError("the tokenizer has no chat template; leave out --chat and --system")
    if template and chat is not False:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return dict(inputs.to(device))
