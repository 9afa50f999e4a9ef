"""Train the small Mixture-of-Experts language model that ships with the package, on one CPU thread.

    python scripts/collect_demo_text.py --root root --out text
    python scripts/train_demo_model.py --text text --work work --out src/moetier/demo_model --minutes 55

The model is an ordinary ``Qwen3MoeForCausalLM``: 32 experts in every layer, 4 of them for a token. Hidden
matrices are trained with Muon, everything else with AdamW. The learning rate follows the clock and not a
step count, so a run always ends with a decayed rate, however fast the machine is. ``work`` receives the
token files, a checkpoint every few minutes, ``log.txt`` and ``report.json``; ``out`` the finished model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

END = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 512
BATCH = 8  # windows of CONTEXT tokens in one step


def train_tokenizer(documents: list[dict[str, str]], folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training documents; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((item["text"] for item in documents if item["split"] == "train"), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def prepare(text: Path, work: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Train the tokenizer and write the token files; returns the bytes and tokens of every part."""
    with (text / "documents.jsonl").open(encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    tokenizer = train_tokenizer(documents, folder)
    np.random.default_rng(0).shuffle(documents)  # type: ignore[arg-type]
    streams: dict[str, list[np.ndarray]] = {}
    counted: dict[str, dict[str, int]] = {}
    for item in documents:
        name = "train" if item["split"] == "train" else f"heldout-{item['domain']}"
        ids = np.array([0, *tokenizer(item["text"])["input_ids"]], dtype=np.uint16)  # 0 is END
        streams.setdefault(name, []).append(ids)
        for key in {name, f"{item['split']}-{item['domain']}"}:
            size = counted.setdefault(key, {"bytes": 0, "tokens": 0})
            size["bytes"] += len(item["text"].encode())
            size["tokens"] += len(ids)
    for name, arrays in streams.items():
        np.concatenate([*arrays, np.zeros(1, dtype=np.uint16)]).tofile(work / f"{name}.bin")
    (work / "counts.json").write_text(json.dumps(counted, indent=2))
    return counted


def looped_experts(
    experts: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """One matrix product per expert over sorted rows: on a CPU the fastest form for training."""
    slots = index.reshape(-1)
    order = torch.argsort(slots, stable=True)
    counts = torch.bincount(slots, minlength=experts.num_experts).tolist()
    rows = order // index.shape[-1]
    parts = hidden.index_select(0, rows).split(counts)
    both = torch.cat([F.linear(x, w) for x, w in zip(parts, experts.gate_up_proj.unbind(0), strict=True)])
    gate, up = both.chunk(2, dim=-1)
    parts = (F.silu(gate) * up).split(counts)
    out = torch.cat([F.linear(x, w) for x, w in zip(parts, experts.down_proj.unbind(0), strict=True)])
    out = out * weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden).index_add(0, rows, out)


def build_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=256,  # no dense layer uses it
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    ALL_EXPERTS_FUNCTIONS["looped"] = looped_experts
    model.set_experts_implementation("looped")
    return model


class RouterWatch:
    """Collects the router logits of every layer, for the balance loss and the load report."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.logits: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _module, _args, out: self.logits.append(out[0]))

    def loads(self) -> list[torch.Tensor]:
        """Share of the routed slots that went to each expert, layer by layer."""
        shares = [torch.bincount(x.topk(4).indices.reshape(-1), minlength=32) for x in self.logits]
        return [share / share.sum() for share in shares]

    def balance(self) -> torch.Tensor:
        """1 where all experts are used alike, larger otherwise; mean over the layers."""
        pairs = zip(self.logits, self.loads(), strict=True)
        return torch.stack([32 * (x.softmax(-1).mean(0) * load).sum() for x, load in pairs]).mean()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz steps; 3-D weights are stacks of matrices."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("buffer", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(buffer, group["momentum"])
                # The fused gate and up matrices of an expert are two matrices.
                split = update.dim() == 3 and update.shape[1] < update.shape[2]
                stack = torch.cat(update.chunk(2, dim=1)) if split else update
                stack = orthogonal(stack) * max(1.0, stack.shape[-2] / stack.shape[-1]) ** 0.5
                update = torch.cat(stack.chunk(2), dim=1) if split else stack
                weight.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def losses(model: Qwen3MoeForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def heldout(model: Qwen3MoeForCausalLM, work: Path, watch: RouterWatch, most: int) -> dict[str, float]:
    """Mean held-out loss of every domain, in nats per token."""
    found = {}
    for path in sorted(work.glob("heldout-*.bin")):
        tokens = torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))
        rows = tokens.unfold(0, CONTEXT + 1, CONTEXT)[:most]
        values = []
        for part in rows.split(BATCH):
            values.append(losses(model, part))
            watch.logits.clear()
        found[path.stem.removeprefix("heldout-")] = torch.cat(values).mean().item()
    return found


@torch.no_grad()
def entropies(model: Qwen3MoeForCausalLM, work: Path, watch: RouterWatch) -> list[dict[str, float]]:
    """How evenly the held-out text loads the experts of each layer."""
    totals = torch.zeros(model.config.num_hidden_layers, 32)
    for path in sorted(work.glob("heldout-*.bin")):
        tokens = torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))
        losses(model, tokens.unfold(0, CONTEXT + 1, CONTEXT)[:8])
        totals += torch.stack(watch.loads())
        watch.logits.clear()
    shares = totals / totals.sum(1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(1) / math.log(32)
    pairs = zip(entropy.tolist(), shares, strict=True)
    return [{"entropy": e, "least": s.min().item(), "most": s.max().item()} for e, s in pairs]


def save(model: Qwen3MoeForCausalLM, folder: Path) -> None:
    copy = Qwen3MoeForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=55.0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    counted = prepare(arguments.text, work, out)
    tokens = np.memmap(work / "train.bin", dtype=np.uint16, mode="r")
    model = build_model()
    watch = RouterWatch(model)
    save(model, out)
    named = list(model.model.layers.named_parameters())
    inner = [p for name, p in named if p.dim() >= 2 and not name.endswith("gate.weight")]
    hidden = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in hidden]
    muon = Muon(inner, arguments.muon_lr, decay=0.1)
    adam = torch.optim.AdamW(rest, lr=arguments.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    peaks = [(muon, arguments.muon_lr), (adam, arguments.adam_lr)]
    windows = (len(tokens) - 1) // CONTEXT
    order = np.random.default_rng(1).permutation(windows)
    budget = arguments.minutes * 60
    begin = time.monotonic()
    step, shown, saved = 0, 0.0, 0.0
    with (work / "log.txt").open("w") as log:
        while (elapsed := time.monotonic() - begin) < budget:
            progress = elapsed / budget
            rate = min(1.0, (step + 1) / 40, 2 * (1 - progress))  # warm up, hold, decay over the second half
            for optimizer, peak in peaks:
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate
            chosen = [order[(step * BATCH + i) % windows] * CONTEXT for i in range(BATCH)]
            picked = np.stack([tokens[at : at + CONTEXT + 1] for at in chosen])
            rows = torch.from_numpy(picked.astype(np.int64))
            if progress < 0.7:  # shorter sequences are faster, and long ones can be learnt late
                half = CONTEXT // 2
                rows = torch.cat([rows[:, : half + 1], rows[:, half:]])
            loss = losses(model, rows).mean()
            balance = watch.balance()
            watch.logits.clear()
            (loss + 0.01 * balance).backward()
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            for optimizer, _ in peaks:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step <= 10 or step % 20 == 0:
                seen = step * BATCH * CONTEXT
                line = f"loss {loss.item():.3f} balance {balance.item():.3f}"
                print(f"{elapsed:.0f}s step {step} tokens {seen} {line}", file=log, flush=True)
            if elapsed - shown > 300:
                shown = elapsed
                print(f"heldout {heldout(model, work, watch, 8)}", file=log, flush=True)
            if elapsed - saved > 600 or (saved == 0.0 and elapsed > 120):
                saved = elapsed
                save(model, out if elapsed < 600 else work / "checkpoint")
    minutes = (time.monotonic() - begin) / 60
    save(model, out)
    final = heldout(model, work, watch, 10**6)
    ratios = {name: size["tokens"] / size["bytes"] for name, size in counted.items()}
    report = {
        "minutes": minutes,
        "steps": step,
        "tokens_seen": step * BATCH * CONTEXT,
        "counts": counted,
        "heldout_nats_per_token": final,
        "heldout_bits_per_byte": {
            name: value / math.log(2) * ratios[f"heldout-{name}"] for name, value in final.items()
        },
        "expert_load": entropies(model, work, watch),
    }
    (work / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
