"""The options that several commands share, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A model folder, or a Hugging Face hub id (owner/name).", show_default=False)
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="GPU memory to take, such as 8GiB. [default: 80 % of what is free]", show_default=False),
]
HostMemory = Annotated[
    str | None,
    typer.Option(help="Host memory to take, such as 16GiB. [default: 80 % of what is free]", show_default=False),
]
Slots = Annotated[
    str | None,
    typer.Option(help="Experts in the fastest tier: a number, or a share such as 25%. Overrides its memory budget."),
]
Policy = Annotated[str, typer.Option(help="Eviction policy: horizon, lfru, lfu, lru, slru, or package.module:Class.")]
Admission = Annotated[str, typer.Option(help="Which misses may displace others: decode-only or always.")]
Context = Annotated[int, typer.Option(help="Tokens of context to plan memory for.", min=1)]
Readers = Annotated[int, typer.Option(help="Threads that read the disk.", min=1)]
IO = Annotated[str, typer.Option("--io", help="Disk reads: auto, direct (past the page cache) or buffered.")]
Device = Annotated[str | None, typer.Option(help="Where to compute: cuda or cpu. [default: a GPU if there is one]")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, float16 or bfloat16.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own Python code. Only if you trust it.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Threads = Annotated[int | None, typer.Option(help="Compute threads of torch.", min=1)]
StatsJson = Annotated[str | None, typer.Option("--stats-json", help="Write all counters and timers to this file.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only the text: no progress, no table.")]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to write at most.", min=1)]
Temperature = Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.", min=0.0)]
TopP = Annotated[float | None, typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.", max=1.0)]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample from this many tokens.", min=1)]
Seed = Annotated[int | None, typer.Option(help="Seed for sampling.")]

DTYPES = ("auto", "float32", "float16", "bfloat16")
