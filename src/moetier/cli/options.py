"""The options that several commands share, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from moetier.policies import ADMISSIONS, POLICIES
from moetier.predictors import PREDICTORS
from moetier.threads import default_readers

_TIERS, _COMPUTE, _TEXT, _OUTPUT = "Experts and memory", "Model and machine", "Text", "Output"
_LOSSY = "Lossy, off by default: fewer bytes read, another output (see moetier eval)"

Model = Annotated[str, typer.Argument(help="A model folder, or a Hugging Face hub id (owner/name).", metavar="MODEL")]

DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="GPU memory to take, such as 8GiB. Default: 80 % of what is free.", metavar="SIZE", rich_help_panel=_TIERS
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        help="Host memory to take, such as 16GiB. Default: 80 % of what is free.",
        metavar="SIZE",
        rich_help_panel=_TIERS,
    ),
]
Slots = Annotated[
    str | None,
    typer.Option(
        help="Experts in the fastest tier: a number, or a share such as 25%. Overrides its memory budget.",
        metavar="N|N%",
        rich_help_panel=_TIERS,
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        metavar="NAME", help=f"Eviction policy: {', '.join(POLICIES)}, or package.module:Class.", rich_help_panel=_TIERS
    ),
]
Admission = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"Which misses may displace other experts: {', '.join(ADMISSIONS)}.",
        rich_help_panel=_TIERS,
    ),
]
Prefetch = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Load experts before they are wanted, as long as it pays: auto, off, or a predictor: "
        f"{', '.join(name for name in PREDICTORS if name != 'scoutgate')}.",
        rich_help_panel=_TIERS,
    ),
]
Context = Annotated[
    int, typer.Option(help="Tokens of context to plan memory for.", metavar="N", min=1, rich_help_panel=_TIERS)
]
Readers = Annotated[int, typer.Option(help="Threads that read the disk.", metavar="N", min=1, rich_help_panel=_TIERS)]
IO = Annotated[
    str,
    typer.Option(
        "--io",
        metavar="NAME",
        help="Disk reads: auto, direct (past the page cache) or buffered.",
        rich_help_panel=_TIERS,
    ),
]
PinAfter = Annotated[
    int | None,
    typer.Option(
        help="Pin the experts used most after this many accesses (one per layer and step).",
        metavar="N",
        min=1,
        rich_help_panel=_TIERS,
    ),
]
UseProfile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="Pin the experts that this saved profile says are used most.",
        metavar="FILE",
        rich_help_panel=_TIERS,
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        help="Read experts from this packed store; none: from the checkpoint. Default: the store beside it, if any.",
        metavar="PATH|none",
        rich_help_panel=_TIERS,
    ),
]
CPUExperts = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="With a GPU, missing experts that the CPU computes: off, auto (as measured) or always. Other than off, "
        "outputs may differ in the last bits from run to run.",
        rich_help_panel=_TIERS,
    ),
]

CachePrior = Annotated[
    float,
    typer.Option(
        help="Raise the router's scores of experts in memory by this share of their range, 0 to 1.",
        metavar="X",
        rich_help_panel=_LOSSY,
    ),
]
KeepTop = Annotated[
    int | None,
    typer.Option(
        help="The router's best experts that are always used. Default: 1 of up to 8 experts, else 2.",
        metavar="N",
        rich_help_panel=_LOSSY,
    ),
]
MaxRank = Annotated[
    int | None,
    typer.Option(
        help="Prefer experts in memory that are among the router's best N.", metavar="N", rich_help_panel=_LOSSY
    ),
]
MaxMass = Annotated[
    float | None,
    typer.Option(
        help="Prefer experts in memory that are among the best of this probability.",
        metavar="X",
        rich_help_panel=_LOSSY,
    ),
]
DropMisses = Annotated[
    float,
    typer.Option(
        help="Do not load experts with less than this share of an even weight, 0 to 1.",
        metavar="X",
        rich_help_panel=_LOSSY,
    ),
]

Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Where to compute: cuda or cpu. Default: a GPU if there is one.", rich_help_panel=_COMPUTE
    ),
]
Dtype = Annotated[
    str, typer.Option(metavar="NAME", help="auto (as stored), float32, float16 or bfloat16.", rich_help_panel=_COMPUTE)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the model's own Python code. Only if you trust it.", rich_help_panel=_COMPUTE
    ),
]
SplitBy = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="NAME",
        help="How CPU threads share a small step: experts, products (torch's own way) or auto.",
        rich_help_panel=_COMPUTE,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of the model on the hub.", rich_help_panel=_COMPUTE),
]
Threads = Annotated[
    int | None, typer.Option(help="Compute threads of torch.", metavar="N", min=1, rich_help_panel=_COMPUTE)
]

MaxNewTokens = Annotated[int, typer.Option(help="Tokens to write at most.", metavar="N", min=1, rich_help_panel=_TEXT)]
Temperature = Annotated[
    float | None,
    typer.Option(help="Sample at this temperature; 0 is greedy.", metavar="X", min=0.0, rich_help_panel=_TEXT),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help="Sample from the likeliest tokens of this mass.",
        metavar="X",
        min=0.0,
        max=1.0,
        rich_help_panel=_TEXT,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", help="Sample from this many likeliest tokens.", metavar="N", min=1, rich_help_panel=_TEXT),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1 discourages repetition.", metavar="X", min=0.01, rich_help_panel=_TEXT)
]
DoSample = Annotated[
    bool | None,
    typer.Option(
        "--do-sample/--greedy",
        help="Sample, or always take the likeliest token. Default: sample if a temperature, top-p or top-k is given, "
        "else what the model's generation config says.",
        rich_help_panel=_TEXT,
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Seed for sampling.", metavar="N", min=0, max=2**32 - 1, rich_help_panel=_TEXT)
]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="System message, for models with a chat template.", rich_help_panel=_TEXT),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Put the prompt into the chat template, or take it as it is. Default: the template if there is one.",
        rich_help_panel=_TEXT,
    ),
]

StatsJson = Annotated[
    str | None,
    typer.Option(
        "--stats-json", metavar="FILE", help="Write all counters and timers to this file.", rich_help_panel=_OUTPUT
    ),
]
TimelineFile = Annotated[
    str | None,
    typer.Option(
        "--timeline",
        metavar="FILE",
        help="Record every access, wait and transfer to this file, for ui.perfetto.dev; .gz compresses it.",
        rich_help_panel=_OUTPUT,
    ),
]
SaveProfile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write how often each expert was used to this file.", rich_help_panel=_OUTPUT),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only the text: no progress, no table.", rich_help_panel=_OUTPUT)
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what transformers has to say.", rich_help_panel=_OUTPUT)]

DTYPES = ("auto", "float32", "float16", "bfloat16")
READERS = default_readers()
