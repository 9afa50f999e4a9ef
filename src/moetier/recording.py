"""Record a trace from real runs: which experts the router of every layer chose, with their gate weights.

`TraceRecorder` watches any forward of a tiered model; `record_texts` drives the model over texts. Both see exactly what
the engine serves, for every family that the hook serves, and change no output. Knows nothing of files (`trace.files`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moetier import __version__
from moetier.access import Phase
from moetier.errors import ConfigError, UnsupportedModelError
from moetier.trace import NO_EXPERT, Trace, TraceInfo

__all__ = ["Mode", "RecordOptions", "Text", "TraceRecorder", "fingerprint", "record_texts"]

Mode = Literal["decode", "prefill"]
Progress = Callable[[int], None]  # told of tokens done


@dataclass(frozen=True, slots=True)
class Text:
    """A text to record. `name` goes into the trace, and so does the hash of `content`."""

    name: str
    content: str


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """How to run a model over texts.

    - `decode`: the first `prompt` tokens of a text are one prefill; then one token per step with the decoding cache, up
      to `tokens` in all: those of the text itself (teacher forcing), or with `generate` the model's own, drawn at
      `temperature` (0: the likeliest);
    - `prefill`: the first `tokens` tokens in chunks of `chunk`.

    `batch` texts run side by side; those of a batch are cut to the shortest of them. Without `token_ids` the trace does
    not hold the tokens' numbers, from which the text can be read.
    """

    mode: Mode = "decode"
    tokens: int = 256
    prompt: int = 32
    chunk: int = 512
    batch: int = 1
    generate: bool = False
    temperature: float = 0.7
    seed: int = 0
    token_ids: bool = True

    def check(self) -> None:
        """Raise `ConfigError`, naming the flag, for options that do not go together."""
        if self.mode not in ("decode", "prefill"):
            raise ConfigError(f"--mode {self.mode}: choose decode or prefill")
        for name in ("tokens", "prompt", "chunk", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: at least 1 is needed")
        if self.mode == "decode" and self.tokens <= self.prompt:
            raise ConfigError(
                f"--tokens {self.tokens} leaves nothing to decode after --prompt {self.prompt}; give more tokens, or "
                "--mode prefill"
            )
        if self.mode == "prefill" and self.generate:
            raise ConfigError("--generate needs --mode decode")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: must be a finite number, not negative")


class TraceRecorder:
    """Watches a tiered model while it is open (a context manager); `step` says what the next forward is.

    A family that shows the experts other rows than one per token cannot be recorded: `UnsupportedModelError`.
    """

    def __init__(self, model: Any):
        self._tiered = model.moetier
        self.num_experts = max(len(layer.recipes) for layer in self._tiered.layers)
        self._rows: list[tuple[NDArray[np.int16], NDArray[np.float32]] | None] = [None] * len(self._tiered.layers)
        self._done: list[tuple[int, list[int], Phase, list[tuple[NDArray[np.int16], NDArray[np.float32]]]]] = []
        self._ids: list[NDArray[np.int32]] = []
        self._phase = Phase.DECODE

    def __enter__(self) -> TraceRecorder:
        if self._tiered.watch is not None:
            raise ConfigError("the routing of this model is being watched already")
        self._tiered.watch = self._routed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tiered.watch = None

    def _routed(self, layer: int, index: torch.Tensor, weights: torch.Tensor, phase: Phase) -> None:
        if self._rows[layer] is not None:
            raise UnsupportedModelError(f"layer {layer} chose experts twice in one forward; this cannot be recorded")
        gates = weights.detach().float().cpu().numpy()
        order = np.argsort(-gates, axis=1, kind="stable")
        experts = index.detach().cpu().numpy().astype(np.int16)
        self._rows[layer] = np.take_along_axis(experts, order, axis=1), np.take_along_axis(gates, order, axis=1)
        self._phase = phase

    def step(self, sequences: Sequence[int], tokens: int, ids: torch.Tensor | None = None) -> None:
        """The forward that just ended had `tokens` tokens of each of these sequences; `ids` are theirs, [B, tokens].

        Either every step tells the ids, or none does.
        """
        missing = [layer for layer, row in enumerate(self._rows) if row is None]
        if missing:
            raise UnsupportedModelError(f"MoE layers {missing} did not run in this forward; this cannot be recorded")
        rows = [row for row in self._rows if row is not None]
        wrong = {len(experts) for experts, _ in rows} - {len(sequences) * tokens}
        if wrong:
            raise UnsupportedModelError(
                f"a forward of {len(sequences)} x {tokens} tokens showed {sorted(wrong)} rows to the experts; this "
                "model cannot be recorded token by token"
            )
        self._done.append((tokens, list(sequences), self._phase, rows))
        self._rows = [None] * len(self._rows)
        if ids is not None:
            self._ids.append(ids.reshape(-1).cpu().numpy().astype(np.int32))

    def trace(self, info: TraceInfo | None = None) -> Trace:
        """Everything recorded so far."""
        layers = len(self._rows)
        top_k = max((experts.shape[1] for *_, rows in self._done for experts, _ in rows), default=1)
        total = sum(tokens * len(sequences) for tokens, sequences, *_ in self._done)
        experts = np.full((total, layers, top_k), NO_EXPERT, dtype=np.int16)
        weights = np.zeros(experts.shape, dtype=np.float32)
        sequence, step, phase = np.empty(total, np.int32), np.empty(total, np.int64), np.empty(total, np.uint8)
        begin = 0
        for number, (tokens, sequences, step_phase, rows) in enumerate(self._done):
            part = slice(begin, begin + tokens * len(sequences))
            sequence[part], step[part], phase[part] = np.repeat(sequences, tokens), number, step_phase
            for layer, (chosen, gates) in enumerate(rows):
                experts[part, layer, : chosen.shape[1]], weights[part, layer, : chosen.shape[1]] = chosen, gates
            begin = part.stop
        ids = np.concatenate(self._ids) if self._ids else None
        return Trace(experts, self.num_experts, sequence, step, phase, weights, info or TraceInfo(), ids)


def record_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    options: RecordOptions | None = None,
    *,
    name: str = "",
    progress: Progress | None = None,
) -> Trace:
    """Run a tiered model over texts and return what its routers chose; `name` is the model's, for the trace's info.

    Raises `ConfigError` for options or texts that cannot be used, `UnsupportedModelError` for a model that cannot be
    recorded.
    """
    options = options or RecordOptions()
    options.check()
    if not texts:
        raise ConfigError("--text: at least one text is needed")
    ids = [_tokens(model, tokenizer, text, options) for text in texts]
    runner = _Runner(model, options, progress or (lambda count: None))
    described: list[dict[str, Any]] = []
    with runner.recorder, torch.no_grad():
        for first in range(0, len(texts), options.batch):
            group = range(first, min(first + options.batch, len(texts)))
            length = runner.run(list(group), [ids[number] for number in group])
            for number in group:
                digest = hashlib.sha256(texts[number].content.encode("utf-8", "surrogatepass")).hexdigest()
                described.append({"name": texts[number].name, "sha256": digest, "tokens": length})
                if options.mode == "decode":
                    described[-1]["prompt"] = min(options.prompt, length)
    return runner.recorder.trace(_info(model, tokenizer, name, options, described))


class _Runner:
    """The model's forward passes over one group of texts after the other."""

    def __init__(self, model: Any, options: RecordOptions, progress: Progress):
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError("an encoder-decoder model cannot be recorded yet; use a decoder-only model")
        self.model, self.options, self.progress = model, options, progress
        self.recorder = TraceRecorder(model)
        known = inspect.signature(model.forward).parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in known else {}  # a long chunk's logits are large
        self._generator = torch.Generator(device=model.device).manual_seed(options.seed)

    def run(self, sequences: list[int], ids: list[list[int]]) -> int:
        """Run a group; returns how many tokens each of its texts ran."""
        options, past = self.options, None
        given = min(len(tokens) for tokens in ids)
        total = options.tokens if options.generate else min(given, options.tokens)
        tokens = torch.tensor([row[:given] for row in ids], device=self.model.device)
        begin = 0
        while begin < total:
            if options.mode == "prefill":
                count = min(options.chunk, total - begin)
            else:
                count = min(options.prompt, given, total) if begin == 0 else 1
            step = tokens[:, begin : begin + count]
            outputs = self.model(input_ids=step, past_key_values=past, use_cache=True, **self._extra)
            past = outputs.past_key_values
            if past is None and begin + count < total:
                kind = type(self.model).__name__
                raise UnsupportedModelError(f"{kind} keeps no decoding cache, so its decoding cannot be recorded")
            self.recorder.step(sequences, count, step if options.token_ids else None)
            self.progress(count * len(sequences))
            begin += count
            if options.generate and begin < total:
                tokens = torch.cat((tokens[:, :begin], self._draw(outputs.logits[:, -1])), dim=1)
        return total

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each sequence, [B, 1], from logits [B, V]."""
        if self.options.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        probabilities = torch.softmax(logits.float() / self.options.temperature, dim=-1)
        return torch.multinomial(probabilities, 1, generator=self._generator)


def _tokens(model: Any, tokenizer: Any, text: Text, options: RecordOptions) -> list[int]:
    """The text's tokens, as many as are needed. Raises `ConfigError` for a text or a number that does not do."""
    ids: list[int] = tokenizer(text.content, return_attention_mask=False, verbose=False)["input_ids"]
    if not ids:
        raise ConfigError(f"--text {text.name}: has no tokens")
    if options.mode == "decode" and not options.generate and len(ids) <= options.prompt:
        raise ConfigError(
            f"--text {text.name}: its {len(ids)} tokens leave nothing to decode after --prompt {options.prompt}; "
            "give a longer text, a shorter prompt, --generate, or --mode prefill"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = options.tokens if options.generate else min(len(ids), options.tokens)
    if isinstance(limit, int) and wanted > limit:
        raise ConfigError(f"--tokens {wanted}: the model has positions for {limit}; give fewer")
    ids = ids[: options.prompt] if options.generate else ids[: options.tokens]
    known = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= known:
        raise ConfigError(
            f"the tokenizer gives token {max(ids)} but the model knows {known}: they do not belong together"
        )
    return ids


def _info(model: Any, tokenizer: Any, name: str, options: RecordOptions, sequences: list[dict[str, Any]]) -> TraceInfo:
    import transformers

    used = ["mode", "tokens", "batch"]
    used += ["prompt", "generate"] if options.mode == "decode" else ["chunk"]
    used += ["temperature", "seed"] if options.generate else []
    vocabulary = sorted(tokenizer.get_vocab().items())
    return TraceInfo(
        model=name,
        tokenizer=f"{type(tokenizer).__name__}, {len(vocabulary)} tokens, sha256 {fingerprint(vocabulary)[:16]}",
        source="recorded",
        sequences=tuple(sequences),
        extra={
            "config_sha256": fingerprint(model.config.to_dict()),
            "architecture": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "options": {field: getattr(options, field) for field in used},
            "versions": {"moetier": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        },
    )


def fingerprint(value: Any) -> str:
    """sha256 of a value as JSON with sorted keys, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
