"""The command line: what is printed where, what each mistake costs, and which options there are."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import moetier
from families import VOCAB
from moetier.cli import app
from moetier.plan import Machine, Workload, make_plan

Get = Callable[..., Path]
NAME = "qwen3_moe"
PROMPT = "Once upon a time"
FAST = ("--slots", "6", "--context", "64", "--max-new-tokens", "12")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DEMO = Path(moetier.__file__).parent / "demo_model" / SINGLE

OPTIONS = {
    "run": (
        "--admission --cache-prior --chat --context --cpu-experts --device --device-memory --do-sample "
        "--drop-misses --dtype --greedy --help --host-memory --io --keep-top --max-mass --max-new-tokens --max-rank "
        "--no-chat --pin-after --policy --prefetch --profile --quiet --readers --repetition-penalty --revision "
        "--save-profile "
        "--seed --slots --split --stats-json --store --system --temperature --threads --timeline --top-k --top-p "
        "--trust-remote-code --verbose -h -q MODEL [PROMPT]"
    ),
    "plan": (
        "--budgets --compare --context --device --device-memory --help --host-memory --json --measure "
        "--policy --profile --readers --revision --slots --store --threads --trace --trust-remote-code --verbose -h "
        "MODEL"
    ),
    "pack": "--dtype --help --profile --quiet --replace --revision --trust-remote-code --verbose -h -q MODEL [OUT]",
    "verify": "--help --quiet --trust-remote-code --verbose -h -q STORE [MODEL]",
    "unpack": "--help --quiet -h -q STORE OUT",
    "demo": (
        "--help --max-new-tokens --pin-after --policy --prefetch --profile --save-profile --seed --slots --stats-json "
        "--temperature --threads -h [PROMPT]"
    ),
    "eval": (
        "--admission --cpu-experts --device --device-memory --dtype --help --host-memory --io --json --policy --quiet "
        "--readers --revision --slots --split --store --text --threads --tokens --trust-remote-code --try --verbose "
        "--window -h -q MODEL"
    ),
    "simulate": (
        "--admission --batch --csv --d2h-gbps --dirty --disk-read-gbps --disk-write-gbps --exclusive --expert-ms --fit "
        "--fit-split --h2d-gbps --help --host-policy --host-slots --inclusive --io-latency-ms --jobs --json --layer-ms "
        "--limit --no-oracle --oracle --output --policy --predictor --prefetch-confidence --prefetch-control "
        "--prefetch-displace --prefetch-limit --quiet --ray --record-size --refill --resume --scope --seeds "
        "--semantics --slots --spare --staging --warm-pinning -h -j -o -q TRACES"
    ),
    "tune": "--batch --help --output --share --slots --whole -h -o TRACES",
    "bench cache": (
        "--d2h-gbps --device-slots --dirty-limit --dirty-share --disk-read-gbps --disk-write-gbps --envs "
        "--envs-per-batch --episode-len --experts --experts-per-step --h2d-gbps --help --host-slots --io-latency-ms "
        "--json --layers --policy --readers --record-size --sampler --seed --steps --store --writeback -h"
    ),
    "bench io": "--help --json --seconds --write-size -h [PATH]",
    "predict evaluate": (
        "--distance --help --json --model --per-layer --predictor --quiet --slots --text --threads --tokens "
        "--trust-remote-code -h -q [TRACE]"
    ),
    "predict train": (
        "--epochs --help --model --output --quiet --seed --threads --trust-remote-code -h -o -q PREDICTOR TRACE"
    ),
    "train lm": (
        "--accumulation --activation-memory --aux-loss --batch-size --cache-prior --commit-every --config --device "
        "--device-memory --dtype --epochs --eval-every --eval-texts --export --from-scratch --gradient-checkpointing "
        "--gradient-slots --help --host-memory --idle --io --json --keep --keep-top --log-every --lr --max-grad-norm "
        "--max-mass --max-rank --no-prefetch --optim --out --policy --prefetch --quiet --readers --resume "
        "--resume-from --revision --schedule --seed --sequence-length --slots --state-slots --steps --store "
        "--tensorboard --threads --tokenizer --trust-remote-code --verbose --warmup --weight-decay --writeback -h -q "
        "[MODEL] [TEXTS]"
    ),
    "train synthetic": (
        "--batch-size --commit-every --device-slots --dtype --envs-per-batch --episode-len --expert-width --help "
        "--host-memory --host-slots --idle --in-memory --json --layers --lookahead --lr --max-grad-norm --n-envs "
        "--n-experts --no-prefetch --optim --policy --prefetch --quiet --readers --resume --run --sampler "
        "--samples-per-env --seed --sort-by-expert --steps --threads --top-k --weight-decay --width --writeback "
        "-h -q"
    ),
    "study ebco": "--help --json --markdown --scale --seed -h [TRACE]",
    "trace record": (
        "--batch --chunk --device --device-memory --dtype --generate --help --host-memory --mode "
        "--no-token-ids --output --policy --prompt --quiet --readers --revision --seed --slots --store --temperature "
        "--text --threads --token-ids --tokens --trust-remote-code --verbose -h -o -q MODEL"
    ),
    "trace import": "--format --help --output -h -o SOURCE",
    "trace export": "--format --help --output -h -o TRACE",
    "trace generate": "--experts --help --layers --output --seed --set --tokens --top-k -h -o KIND",
    "trace info": "--help --json -h TRACE",
    "trace stats": "--decode-only --help --json --seed --tokens -h TRACE",
}


# -- helpers -----------------------------------------------------------------------------------------------------------


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per ASCII character; the ids 0, 1, 2 are the specials of the tiny models."""
    letters = {v: k for k, v in _unicode_of_bytes().items()}
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letters[byte]: byte for byte in range(3, VOCAB)}
    tiny = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tiny.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tiny.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tiny, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made


def _unicode_of_bytes() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable characters stand for themselves, the others move up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in plain]
    result = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(moved)}
    assert set(result) == set(ByteLevel.alphabet())
    return result


def call(*args: object, input: str | bytes | None = None, code: int = 0) -> Any:
    """Run a command in this process; anything but a clean exit with `code` fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in args], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def said(result: Any) -> str:
    """Standard error on one line, without the frames that typer draws."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from moetier.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reheader(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors header, leaving the data as it is."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def split(folder: Path) -> None:
    """The checkpoint as two shards with an index; the second holds the last layer."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        shards["b.safetensors" if ".layers.2." in name else "a.safetensors"][name] = tensor
    for file, held in shards.items():
        save_file(held, folder / file, {"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="session")
def folder(checkpoint: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoE with a tokenizer. Never write to it."""
    path = Path(shutil.copytree(checkpoint(NAME), tmp_path_factory.mktemp("cli") / "model"))
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def chat_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    path = Path(shutil.copytree(folder, tmp_path_factory.mktemp("cli") / "chat"))
    tokenizer(TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture(scope="session")
def expected(folder: Path) -> Callable[..., str]:
    """The text that plain transformers writes, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tiny = tokenizer()

    def get(prompt: str = PROMPT, **options: Any) -> str:
        inputs = tiny(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            ids = model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False} | options)
        return str(tiny.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return get


# -- run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["argument", "stdin", "-"])
def test_greedy_text_is_what_transformers_writes(way: str, folder: Path, expected: Callable[..., str]) -> None:
    prompt = {"argument": [PROMPT], "stdin": [], "-": ["-"]}[way]
    result = call("run", folder, *prompt, "--greedy", *FAST, input=None if way == "argument" else PROMPT)
    assert result.stdout == expected() + "\n"
    assert len(result.stdout) > 5
    for row in ("decode", "prefill", "first token", "host hit rate", "host slots", "T_wait", "T_compute", "decisions"):
        assert re.search(rf"^{row} ", result.stderr, re.MULTILINE), result.stderr
    assert "12 tokens prefill" in said(result)
    assert f"tokens/s {len(PROMPT)} tokens first token" in said(result)
    assert "host slots 6 of 24 experts" in said(result)
    assert "policy horizon" in said(result)


def test_quiet_says_nothing_but_the_text(folder: Path, expected: Callable[..., str]) -> None:
    result = call("run", folder, PROMPT, "--temperature", 0, "--quiet", *FAST)
    assert (result.stdout, result.stderr) == (expected() + "\n", "")


def test_piped(folder: Path, expected: Callable[..., str]) -> None:
    result = process("run", folder, "--greedy", *FAST, input=PROMPT + "\n")
    assert (result.returncode, result.stdout) == (0, expected() + "\n")
    assert "decode" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_text_longer_than_planned(folder: Path) -> None:
    result = call("run", folder, PROMPT, "--greedy", *FAST, "--context", 20)
    assert "warning: up to 28 tokens, but memory is planned for --context 20" in said(result)


def test_stats_json(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    path.write_text("replaced")
    call("run", folder, PROMPT, "--greedy", "--stats-json", path, "--policy", "lru", "--quiet", *FAST)
    stats = json.loads(path.read_text())
    assert {"version", "speed", "plan", "tiers", "links", "seconds"} <= stats.keys()
    assert stats["version"] == 1
    assert stats["speed"]["prompt_tokens"] == len(PROMPT)
    assert stats["speed"]["new_tokens"] == 12
    assert stats["speed"]["decode_tokens_per_second"] > 0
    assert stats["plan"]["tiers"] == [{"name": "host", "slots": 6, "bytes": stats["plan"]["tiers"][0]["bytes"]}]
    assert stats["plan"]["experts"] == 24
    (tier,) = stats["tiers"]
    assert tier["policy"] == "lru"
    assert sum(tier["misses"]) > 0
    assert [link["copies"] > 0 and link["bytes"] > 0 for link in stats["links"].values()] == [True]
    assert {"wait", "compute", "decide"} <= stats["seconds"].keys()
    assert os.listdir(tmp_path) == ["stats.json"]  # no temporary file stays


def test_stats_json_into_what_is_not_a_file(folder: Path, tmp_path: Path) -> None:
    """A pipe or device is written to, not replaced; a link keeps leading to the file."""
    (tmp_path / "real.json").touch()
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    call("run", folder, PROMPT, "--greedy", "--quiet", *FAST, "--stats-json", tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["version"] == 1
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    call("run", folder, PROMPT, "--greedy", "--quiet", *FAST, "--stats-json", tmp_path / "pipe")
    assert json.loads(reader.communicate(timeout=20)[0])["version"] == 1
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("where", ["no/such/folder/stats.json", "."])
def test_stats_json_that_cannot_be_written(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is loaded."""
    monkeypatch.setattr(moetier, "from_pretrained", None)
    result = call("run", tmp_path, PROMPT, "--stats-json", tmp_path / where, code=2)
    assert "--stats-json" in said(result)
    assert "cannot be written" in said(result)


def test_sampling_repeats_with_the_seed(folder: Path) -> None:
    args = ("run", folder, PROMPT, "--temperature", 1.5, "--top-p", 0.95, "--top-k", 100, "--quiet", *FAST)
    first, again, other = (call(*args, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_repetition_penalty_applies_to_greedy_too(folder: Path, expected: Callable[..., str]) -> None:
    text = expected(repetition_penalty=5.0)
    assert text != expected()
    assert call("run", folder, PROMPT, "--greedy", "--repetition-penalty", 5, *FAST).stdout == text + "\n"


def test_chat_template(chat_folder: Path, expected: Callable[..., str]) -> None:
    run = ("run", chat_folder, PROMPT, "--greedy", "--quiet", *FAST)
    chat = expected(f"<user>{PROMPT}\n<assistant>")
    system = expected(f"<system>Be kind\n<user>{PROMPT}\n<assistant>")
    assert len({chat, system, expected()}) == 3
    assert call(*run).stdout == call(*run, "--chat").stdout == chat + "\n"
    assert call(*run, "--system", "Be kind").stdout == system + "\n"
    assert call(*run, "--no-chat").stdout == expected() + "\n"


@pytest.mark.parametrize("flags", [("--chat",), ("--system", "Be kind")])
def test_chat_without_a_template(flags: tuple[str, ...], folder: Path) -> None:
    result = call("run", folder, PROMPT, *flags, *FAST, code=2)
    assert "the tokenizer has no chat template; leave out --chat and --system" in said(result)


def test_a_template_that_refuses(copy: Path) -> None:
    tokenizer("{{ raise_exception('no system messages here') }}").save_pretrained(copy)
    result = call("run", copy, PROMPT, *FAST, code=2)
    assert "no system messages here" in said(result)
    assert "--no-chat" in said(result)


# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan_as_a_table(folder: Path) -> None:
    result = call("plan", folder, "--context", 64)
    assert re.search(r"^ok: every expert fits", result.stdout, re.MULTILINE)
    assert f"Memory plan of {folder}\n" in result.stdout
    assert re.search(r"24 in 3 layers, 3 per token", result.stdout)
    assert result.stderr == ""


def test_plan_as_json(folder: Path) -> None:
    plan = json.loads(call("plan", folder, "--slots", "25%", "--json").stdout)
    assert plan["status"] == "below recommended"
    assert plan["tiers"][0]["slots"] == 6
    assert plan["workload"]["records"] == 24
    assert plan["workload"]["layers"] == 3
    assert plan["recommended_slots"] == 18


def test_the_minimum_that_plan_states_works(folder: Path) -> None:
    common = ("--context", "64", "--device", "cpu")
    result = call("plan", folder, "--host-memory", "1MiB", *common, code=1)
    assert re.search(r"^budget exhausted: ", result.stdout, re.MULTILINE)
    stated = re.search(r"--host-memory 1\.0 MiB leaves no slot .*\((\d+) bytes\)", result.stdout)
    assert stated is not None, result.stdout
    minimum = int(stated[1])
    assert json.loads(call("plan", folder, "--json", "--host-memory", minimum - 1, *common, code=1).stdout)
    assert "below recommended" in call("plan", folder, "--host-memory", minimum, *common).stdout
    result = call("run", folder, PROMPT, "--host-memory", minimum, "--max-new-tokens", 2, *common)
    assert "host slots 1 of 24 experts" in said(result)
    result = call("run", folder, PROMPT, "--host-memory", minimum - 1, *common, code=3)
    assert f"--host-memory {(minimum - 1) / 2**20:.1f} MiB leaves no slot" in said(result)
    assert f"({minimum} bytes)" in said(result)


@pytest.mark.parametrize(
    ("changes", "budget", "status", "code"),
    [
        ({}, 1 << 20, "ok", 0),
        ({}, 2000, "below recommended", 0),
        ({}, 1000, "budget exhausted", 1),
        ({"slot_nbytes": 0}, 1 << 20, "unknown expert size", 1),
        ({"records": 0}, 1 << 20, "empty", 1),
    ],
)
def test_every_status_has_its_exit_code(
    changes: dict[str, int], budget: int, status: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = {"layers": 3, "records": 24, "top_k": 3, "record_nbytes": 100, "slot_nbytes": 128, "resident_nbytes": 1000}
    work |= {"kv_nbytes": 10, "context": 64, "workspace_nbytes": 50} | changes
    plan = make_plan(Workload(**work), Machine(budget))
    monkeypatch.setattr("moetier.loading.inspect", lambda *_, **__: plan)
    assert re.search(rf"^{status}(: |$)", call("plan", folder, code=code).stdout, re.MULTILINE)
    assert json.loads(call("plan", folder, "--json", code=code).stdout)["status"] == status


def test_a_plan_for_a_gpu_elsewhere(folder: Path) -> None:
    plan = json.loads(call("plan", folder, "--device-memory", "1GiB", "--json").stdout)
    assert [tier["name"] for tier in plan["tiers"]] == ["device", "host"]
    result = call("plan", folder, "--device-memory", "1GiB", "--device", "cpu", code=2)
    assert "--device cpu and --device-memory contradict each other" in said(result)


# -- flags that cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--policy mru", 2, "unknown policy 'mru'; choose one of: activation-matrix, belady, belady-forced, dali,"),
        ("--policy no.such:Thing", 2, "policy 'no.such:Thing' cannot be imported"),
        ("--admission never", 2, "unknown admission policy 'never'; choose one of: "),
        ("--host-memory some", 2, "--host-memory: 'some' is not a size"),
        ("--device-memory 8XB", 2, "--device-memory: '8XB' is not a size"),
        ("--slots lots", 2, "--slots: 'lots' is neither a number"),
        ("--slots 0%", 2, "--slots: '0%' must be above 0%"),
        ("--slots 0", 3, "--slots: at least 1 slot is needed, got 0"),
        ("--slots=-3", 3, "--slots: at least 1 slot is needed, got -3"),
        ("--dtype int4", 2, "--dtype int4: choose one of auto, float32, float16, bfloat16"),
        ("--io fast", 2, "--io: 'fast' is unknown; choose auto, direct or buffered"),
        ("--device abacus", 2, "--device abacus: "),
        ("--system Hi --no-chat", 2, "--system and --no-chat contradict each other"),
        ("--max-new-tokens -3", 2, "Invalid value for '--max-new-tokens'"),
        ("--max-new-tokens 0", 2, "Invalid value for '--max-new-tokens'"),
        ("--context 0", 2, "Invalid value for '--context'"),
        ("--readers 0", 2, "Invalid value for '--readers'"),
        ("--threads 0", 2, "Invalid value for '--threads'"),
        ("--top-k 0", 2, "Invalid value for '--top-k'"),
        ("--top-p 0", 2, "--top-p 0: must be above 0 and at most 1"),
        ("--top-p 1.1", 2, "Invalid value for '--top-p'"),
        ("--top-p nan", 2, "--top-p"),
        ("--temperature -1", 2, "Invalid value for '--temperature'"),
        ("--temperature nan", 2, "--temperature"),
        ("--temperature inf", 2, "--temperature inf: "),
        ("--repetition-penalty nan", 2, "--repetition-penalty"),
        ("--seed 99999999999999999999", 2, "Invalid value for '--seed'"),
        ("--greedy --temperature 0.7", 2, "--temperature and greedy decoding contradict each other"),
        ("--greedy --top-p 0.9", 2, "--top-p and greedy decoding contradict each other"),
        ("--temperature 0 --top-k 5", 2, "--top-k and greedy decoding contradict each other"),
        ("--no-such-flag", 2, "No such option: --no-such-flag"),
    ],
)
def test_a_flag_that_cannot_be_used(flags: str, code: int, words: str, folder: Path) -> None:
    result = call("run", folder, PROMPT, *flags.split(), code=code)
    assert words in said(result)
    assert result.stdout == ""


@pytest.mark.parametrize("flags", ["--slots 0", "--host-memory some", "--device abacus", "--context 0"])
def test_plan_refuses_the_same_flags(flags: str, folder: Path) -> None:
    result = call("plan", folder, *flags.split(), code=3 if flags == "--slots 0" else 2)
    assert flags.split()[0] in said(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize(
    "command", [("run", PROMPT), ("plan",), ("train", __file__, "--out", "somewhere")], ids=lambda c: c[0]
)
def test_a_gpu_that_is_not_there(command: tuple[str, ...], folder: Path) -> None:
    result = call(command[0], folder, *command[1:], "--device", "cuda", code=2)
    assert "--device cuda: " in said(result)


@pytest.mark.parametrize(("prompt", "stdin"), [((), ""), (("-",), "\n"), (("",), None)])
def test_an_empty_prompt(prompt: tuple[str, ...], stdin: str | None, folder: Path) -> None:
    assert "the prompt is empty" in said(call("run", folder, *prompt, input=stdin, code=2))


def test_a_prompt_that_is_not_text(folder: Path) -> None:
    assert "the prompt on standard input is not text" in said(call("run", folder, input=b"caf\xe9\xff", code=2))


def test_no_prompt_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("moetier.cli.run.sys", terminal)
    assert "no prompt: give one as an argument, or pipe it" in said(call("run", folder, code=2))


def test_arguments_missing() -> None:
    assert "Missing argument 'MODEL'" in said(call("run", code=2))
    assert "No such command 'ran'" in said(call("ran", code=2))


# -- models and files that cannot be used ------------------------------------------------------------------------------


def not_an_moe(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def missing_shard(folder: Path) -> None:
    split(folder)
    (folder / "b.safetensors").unlink()


def corrupt_shard(folder: Path) -> None:
    split(folder)
    path = folder / "b.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:9] + b"\xff\xfe" + raw[11:])


def escaping(target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        split(folder)
        (folder / "b.safetensors").rename(folder.parent / "x.safetensors")
        name = target.format(folder=folder.parent)
        if target == "link":
            name = "b.safetensors"
            (folder / name).symlink_to(folder.parent / "x.safetensors")
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {k: name if v == "b.safetensors" else v for k, v in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def overlap(header: dict[str, Any]) -> None:
    begin, end = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["data_offsets"] = [begin - 2, end - 2]


def bomb(folder: Path) -> None:
    path = folder / SINGLE
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "not an MoE": (not_an_moe, 5, r"LlamaForCausalLM \(llama\) is not a Mixture-of-Experts model"),
    "unknown type": (lambda f: configure(f, model_type="qwen99"), 5, r"config.json: model type 'qwen99' is unknown"),
    "quantised": (
        lambda f: configure(f, quantization_config={"quant_method": "fp8"}),
        5,
        r"config.json: the checkpoint is quantised \(fp8\)",
    ),
    "config broken": (lambda f: (f / "config.json").write_text("{"), 4, r"config.json: cannot be read as JSON"),
    "config missing": (lambda f: (f / "config.json").unlink(), 4, r"config.json: missing"),
    "folder missing": (shutil.rmtree, 4, r"no such model folder; give a folder with config.json, or a hub id"),
    "weights missing": (lambda f: (f / SINGLE).unlink(), 4, r"no checkpoint here"),
    "shard missing": (missing_shard, 4, r"b.safetensors: cannot be opened"),
    "shard corrupt": (corrupt_shard, 4, r"b.safetensors: the header is not JSON"),
    "truncated": (lambda f: os.truncate(f / SINGLE, 100_000), 4, r"model.safetensors: truncated"),
    "index leads up": (escaping("../x.safetensors"), 4, r"names the file '../x.safetensors', outside of its folder"),
    "index is absolute": (escaping("{folder}/x.safetensors"), 4, r"names the file '/.*', outside of its folder"),
    "link leads out": (escaping("link"), 4, r"b.safetensors: a link that leads out of the folder"),
    "header bomb": (bomb, 4, r"model.safetensors: .*header would be 4611686018427387904 bytes"),
    "overlap": (lambda f: reheader(f / SINGLE, overlap), 4, r"overlaps the tensor before it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_used(damage: str, copy: Path) -> None:
    change, code, words = DAMAGES[damage]
    change(copy)
    for command in (["run", copy, PROMPT], ["plan", copy]):
        result = call(*command, code=code)
        assert re.search(words, said(result)), result.stderr
        assert said(result).startswith("error: ")
        assert len(result.stderr.splitlines()) == 1
        assert result.stdout == ""


@pytest.mark.parametrize("command", [("run", PROMPT), ("plan",)], ids=lambda c: c[0])
def test_a_family_that_is_not_supported(command: tuple[str, ...], checkpoint: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("llama4_text"), tmp_path / "model"))
    tokenizer().save_pretrained(folder)
    result = call(command[0], folder, *command[1:], code=5)
    assert re.search(r"error: .*llama4", said(result), re.IGNORECASE)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_tokenizer_that_cannot_be_used(content: str | None, copy: Path) -> None:
    path = copy / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    result = call("run", copy, PROMPT, *FAST, code=4)
    assert f"error: {copy}: " in said(result)
    assert "tokenizer" in said(result)


def test_a_hub_id_that_cannot_be_reached() -> None:
    for command in (["run", "nobody/no-such-model", PROMPT], ["plan", "nobody/no-such-model"]):
        assert "nobody/no-such-model: not a folder, and the hub" in said(call(*command, code=4))


def test_a_disk_error_in_the_middle_of_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, load = os.preadv, moetier.from_pretrained
    calls: list[int] = []

    def failing(*args: Any) -> int:
        calls.append(1)
        if len(calls) > 40:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    def loading(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        monkeypatch.setattr(os, "preadv", failing)
        return model

    monkeypatch.setattr(moetier, "from_pretrained", loading)
    result = call("run", folder, PROMPT, *FAST, "--slots", 3, code=4)
    pattern = r"error: \S*model.safetensors: reading \d+ bytes at offset \d+ .*Input/output"
    assert re.search(pattern, said(result)), result.stderr


# -- processes ---------------------------------------------------------------------------------------------------------


def test_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moetier, "from_pretrained", interrupt)
    assert said(call("run", folder, PROMPT, code=130)) == "interrupted"


def test_a_reader_that_goes_away(folder: Path) -> None:
    """As in `moetier run … | head -c 1`."""
    command = [sys.executable, "-c", "from moetier.cli import main; main()", "run", str(folder), PROMPT]
    args = ["--greedy", "--quiet", "--slots", "6", "--context", "128", "--max-new-tokens", "80"]
    running = subprocess.Popen([*command, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None and running.stderr is not None
    running.stdout.read(1)
    running.stdout.close()
    errors = running.stderr.read().decode()
    running.stderr.close()
    assert (running.wait(30), errors) == (0, "")


def test_a_table_that_nobody_reads(folder: Path) -> None:
    """As in `moetier plan … | true`: not the exit code of a plan that does not work."""
    command = [sys.executable, "-c", "from moetier.cli import main; main()", "plan", str(folder)]
    reader, writer = os.pipe()
    os.close(reader)
    for streams in ({"stdout": writer, "stderr": subprocess.PIPE}, {"stdout": writer, "stderr": writer}):
        done = subprocess.run(command, **streams, timeout=120)
        assert done.returncode == 0 and not done.stderr
    os.close(writer)


def test_a_mistake_in_a_process(tmp_path: Path) -> None:
    for flags, words in (("--dtype int4", "--dtype int4: choose one of "), ("--context 0", "Invalid value for '--con")):
        result = process("run", tmp_path, PROMPT, *flags.split())
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {words}")
        assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not DEMO.is_file(), reason="the embedded model is not here")
def test_demo(tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    result = call("demo", "--max-new-tokens", 4, "--stats-json", stats)
    assert "192 experts in 6 layers, 48 slots: 25 %" in said(result)
    assert "T_wait" in said(result)
    assert "class FileHandler" in result.stdout
    assert json.loads(stats.read_text())["speed"]["new_tokens"] % 4 == 0
    result = call("demo", "The sea", "--max-new-tokens", 4, "--temperature", 0)
    assert result.stdout.startswith("The sea")


@pytest.mark.skipif(not DEMO.is_file(), reason="the embedded model is not here")
@pytest.mark.parametrize(
    ("flags", "code"), [("--policy belady", 2), ("--slots 0", 3), ("--slots lots", 2), ("--temperature nan", 2)]
)
def test_demo_refuses_the_same_flags(flags: str, code: int) -> None:
    result = call("demo", *flags.split(), code=code)
    assert flags.split()[0].removeprefix("--") in said(result)
    assert result.stdout == ""


# -- the surface -------------------------------------------------------------------------------------------------------


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All commands, those of groups as `group command`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def test_options() -> None:
    """The options of every command. Whoever adds one says so here, in the documentation and in the change log."""
    found = {}
    for name, command in commands(typer.main.get_command(app)):
        options = [flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")]
        arguments = [
            p.name.upper() if p.required else f"[{p.name.upper()}]"
            for p in command.params
            if not p.opts[0].startswith("-")
        ]
        found[name] = " ".join([*sorted([*options, "--help", "-h"]), *arguments])
    assert found == OPTIONS


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from moetier.cli import app\n"
        "for args in sys.argv[1:]:\n"
        "    app(args.split(), standalone_mode=False, prog_name='moetier')\n"
        "    print('-- end of', args)\n"
        "    heavy = {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "    assert not heavy, (args, heavy)\n"
    )
    all_args = ["--help", "--version", "run --help", "plan --help", "demo --help"]
    result = subprocess.run([sys.executable, "-c", code, *all_args], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shown = result.stdout.split("-- end of")
    assert len(shown) == len(all_args) + 1 and all("moetier" in text for text in shown[:-1])


def test_version_and_help() -> None:
    assert call("--version").stdout == f"moetier {moetier.__version__}\n"
    text = call("--help").stdout
    assert all(command.split()[0] in text for command in OPTIONS)
    assert "Exit codes" in text


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "moetier"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"moetier {moetier.__version__}\n"
    refused = subprocess.run([*command, "demo", "--slots", "many"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "many" in refused.stderr and "Traceback" not in refused.stderr
