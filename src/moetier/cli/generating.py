"""From a prompt to text on standard output, with the time of every token."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from moetier.errors import CheckpointError, ConfigError


def check_finite(**numbers: float | None) -> None:
    """Raise `ConfigError` for a flag, named as its parameter, that is infinite or not a number."""
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be a finite number")


def tokenise(tokenizer: Any, text: str, system: str | None = None, chat: bool | None = None) -> Any:
    """The prompt as model inputs, through the chat template where there is one. Raises `ConfigError`."""
    from jinja2 import TemplateError

    template = getattr(tokenizer, "chat_template", None)
    if (chat or system) and not template:
        raise ConfigError("the tokenizer has no chat template; leave out --chat and --system")
    if template and chat is not False:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        try:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ConfigError(f"the chat template refuses this: {error}; try without --system, or --no-chat") from error
    else:
        inputs = tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    if not inputs["input_ids"].numel():
        raise ConfigError("the prompt has no tokens")
    return inputs


class Generation:
    """What one call of `generate` did."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.prompt_tokens = 0
        self.times: list[float] = []  # seconds since the start, one per new token
        self.seconds = 0.0

    def run(self, inputs: Any, **options: Any) -> None:
        """Generate from tokenised inputs, streaming to standard output."""
        import torch
        from transformers import TextStreamer

        generation = self
        ids = inputs["input_ids"]
        self.prompt_tokens = ids.shape[1]
        known = self.model.get_input_embeddings().weight.shape[0]
        if int(ids.max()) >= known:
            raise CheckpointError(
                f"the tokenizer gives token {int(ids.max())} but the model knows {known} tokens: their files do not "
                "belong together; download the model again"
            )

        class Streamer(TextStreamer):  # type: ignore[misc]
            def put(self, value: Any) -> None:
                if not self.next_tokens_are_prompt:
                    generation.times.append(time.perf_counter() - begin)
                super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                sys.stdout.write(text + ("\n" if stream_end else ""))
                sys.stdout.flush()

        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        begin = time.perf_counter()
        with torch.no_grad():
            try:
                self.model.generate(**inputs.to(self.model.device), streamer=streamer, **options)
            except KeyboardInterrupt:
                streamer.end()  # the word it was in
                raise
        self.seconds = time.perf_counter() - begin


def speed(generations: list[Generation]) -> dict[str, float]:
    """Tokens and rates over all generations; a rate is 0 where there is nothing to divide."""
    ran = [generation for generation in generations if generation.times]
    first = sum(generation.times[0] for generation in ran)
    rest = sum(generation.times[-1] - generation.times[0] for generation in ran)
    prompt_tokens = sum(generation.prompt_tokens for generation in ran)
    new_tokens = sum(len(generation.times) for generation in ran)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "first_token_seconds": first / len(ran) if ran else 0.0,
        "prefill_tokens_per_second": prompt_tokens / first if first else 0.0,
        "decode_tokens_per_second": (new_tokens - len(ran)) / rest if rest else 0.0,
    }
