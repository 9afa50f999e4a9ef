"""`moetier train MODEL TEXTS`: trains, stops, goes on to the same bits, exports; and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig
from typer.testing import CliRunner

import moetier
from device_training import two_tiers
from moetier.cli import app, stopping
from moetier.cli.console import Console
from moetier.cli.train_report import scalars
from moetier.errors import CheckpointError, StoreError
from moetier.stores.runfolder import RunFolder
from moetier.training import from_scratch
from moetier.training.lm import LanguageModelTraining, Step
from moetier.training.lm_settings import Batches, Settings

SMALL = ("--sequence-length", 16, "--batch-size", 2, "--accumulation", 2, "--slots", "25%", "--lr", 0.01)
SMALL = (*SMALL, "--readers", 1, "--threads", 1)
TEXT = "\n".join(f"{n} bottles of beer on the wall, {n} bottles of beer." for n in range(99, 60, -1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer of characters; no weights."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {chr(code): code - 31 for code in range(32, 127)} | {"</s>": 0, "\n": 96}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    Qwen3MoeConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        attention_dropout=0.1,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.md").write_text(TEXT[::-1])
    (folder / "held.out").write_text(TEXT[:500])
    (folder / "not.bin").write_bytes(b"\xff\xfe")
    return folder


def call(*args: object, code: int = 0) -> Any:
    with torch.enable_grad():
        result = CliRunner().invoke(app, ["train", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def said(result: Any) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def losses(path: Path) -> list[float]:
    found: list[float] = json.loads(path.read_text())["steps"]["loss"]
    return found


def test_from_scratch_with_a_file_of_options(model: Path, text: Path, tmp_path: Path) -> None:
    run, saved, report = tmp_path / "run", tmp_path / "saved", tmp_path / "report.json"
    config = tmp_path / "train.toml"
    config.write_text(
        f'model = "{model}"\ntexts = ["{text}"]\nfrom-scratch = true\neval_texts = "{text / "held.out"}"\n'
        'lr = 0.5\nslots = 4\nsteps = 16\nsequence-length = 16\nbatch-size = 4\nwarmup = 4\noptim = "momentum"\n'
        "gradient-checkpointing = true\naux-loss = 0.01\nquiet = false\n"
    )
    options = ("--config", config, "--lr", 0.05, "--out", run, "--export", saved, "--json", report, "--log-every", 8)
    shown = said(call(*options))
    assert "2 files" in shown and "4 of 16 experts in memory" in shown
    assert re.search(r"step 16: loss \d\.\d+ · \d+ tokens/s · hits \d+ % · read .* written .* dirty", shown)
    found = json.loads(report.read_text())
    assert found["settings"]["lr"] == 0.05 and found["settings"]["gradient_checkpointing"] is True
    assert (
        found["steps"]["lr"][0] == pytest.approx(0.0125) and found["steps"]["lr"][3] == 0.05 == found["steps"]["lr"][4]
    )
    assert 0 < found["steps"]["lr"][-1] < 0.003
    first, last = found["evaluations"]
    assert first["step"] == 0 and last["step"] == 16 and last["loss"] < first["loss"] - 0.3
    assert found["caches"]["state"]["tiers"][0]["write_backs"] and found["steps"]["written_bytes"][-1]
    kept = found["activations"]
    assert kept["nbytes"] and kept["kept"] == 2 * 16 and not kept["recomputed"]
    assert "32 of 32 layers' forwards kept" in shown

    trained = AutoModelForCausalLM.from_pretrained(saved)
    assert (saved / "tokenizer.json").is_file() and (saved / "generation_config.json").is_file()
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(saved)(TEXT[:500])["input_ids"])
    ids = ids[: len(ids) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        loss = trained(input_ids=ids, labels=ids).loss
    assert float(loss) == pytest.approx(last["loss"], rel=1e-5)


def test_stopped_and_resumed(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = (model, text, "--from-scratch", *SMALL, "--steps", 9, "--optim", "adafactor", "--weight-decay", 0.1)
    args = (*args, "--eval-texts", text / "held.out", "--eval-every", 5, "--dtype", "bfloat16")
    whole, part, rest = (tmp_path / f"{name}.json" for name in ("whole", "part", "rest"))
    call(*args, "--out", tmp_path / "whole", "--json", whole, "-q")

    made = LanguageModelTraining.steps

    def steps(self: Any) -> Any:
        for step in made(self):
            if step.number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTraining, "steps", steps)
        stopped = call(
            *args,
            "--out",
            tmp_path / "run",
            "--json",
            part,
            "--commit-every",
            4,
            "--slots",
            3,
            code=128 + signal.SIGTERM,
        )
    again = re.search(r"go on with: moetier train (.*)", stopped.stderr)
    assert again is not None and "step 5 of 9 is committed" in stopped.stderr
    assert 'device = "cpu"' in (tmp_path / "run" / "train.toml").read_text()
    with monkeypatch.context() as patch:
        two_tiers(patch)  # a stand-in for a GPU has the same bits
        shown = said(call(*again[1].split(), "--json", rest, "--slots", 5, "--state-slots", 4))
    assert "5 of 16 experts in device memory" in shown and "goes on from step 5" in shown
    assert json.loads(part.read_text())["stopped"] == "SIGTERM"
    assert losses(part) + losses(rest) == losses(whole)
    ends = [json.loads(file.read_text())["evaluations"][-1] for file in (rest, whole)]
    assert ends[0] == ends[1] and ends[0]["step"] == 9
    assert "--steps 9, not 12; with a schedule" in said(call(*again[1].split(), "--steps", 12, code=2))
    shown = said(call(*again[1].split(), "--batch-size", 3, "--optim", "hot-cold(hot=adamw,cold=sgd)", code=2))
    assert "the run was begun with --batch-size 2, not 3, --optim adafactor, not hot-cold(hot=adamw,cold=sgd);" in shown
    other = said(call(model, text / "a.txt", *args[2:], "--out", tmp_path / "run", "--resume", code=2))
    assert "the texts have changed" in other
    shutil.rmtree(tmp_path / "run" / "initial")
    assert "is gone" in said(call(*again[1].split(), code=4))


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (("{model}",), "MODEL and TEXTS: give a model and at least one text", 2),
        (("{model}", "{text}"), "--out: give a folder", 2),
        (("{model}", "{text}/none", "--out", "{new}"), "TEXTS {text}/none: no such file or folder", 4),
        (("{model}", "{text}/not.bin", "--out", "{new}"), "TEXTS {text}/not.bin: not a text in UTF-8", 4),
        (("{model}", "{model}", "--out", "{new}"), "the folder has no text files", 4),
        (("{model}", "{text}", "--out", "{text}"), "holds other files; give another folder", 2),
        (("{model}", "{text}", "--out", "{new}", "--resume"), "--resume: {new} holds no run", 2),
        (("{model}", "{text}", "--out", "{new}", "--steps", 1, "--epochs", 1), "--steps and --epochs", 2),
        (("{model}", "{text}", "--out", "{new}", "--eval-every", 1), "--eval-every: nothing to evaluate on", 2),
        (
            ("{model}", "{text}", "--out", "{new}", "--schedule", "x"),
            "--schedule: 'x' is unknown; choose one of cosine",
            2,
        ),
        (("{model}", "{text}", "--out", "{new}", "--dtype", "float16"), "--dtype: float16 gradients overflow", 2),
        (("{model}", "{text}", "--out", "{new}", "--warmup", 5, "--steps", 4), "--warmup: from 0 to the 4 steps", 2),
        (("{model}", "{text}", "--out", "{new}", "--batch-size", 5000), "--batch-size: the texts have", 2),
        (("{model}", "{text}", "--out", "{new}", "--sequence-length", 9999), "do not fill one sequence of 9999", 2),
        (("{model}", "{text}/a.txt", "--out", "{new}", "--sequence-length", 9999), "tokens in 1 file do not fill", 2),
        (
            ("{model}", "{text}", "--out", "{new}", "--batch-size", 5000),
            "or a smaller --batch-size or --sequence-length",
            2,
        ),
        (("{model}", "{text}", "--out", "{new}", "--optim", "rprop"), "--optim: unknown optimizer 'rprop'", 2),
        (("{model}", "{text}", "--out", "{new}", "--optim", "adamw(lr=x)"), "--optim: lr: 'x' must be a number", 2),
        (("{model}", "{text}", "--out", "{new}", "--seed", 1 << 63), "--seed: must be from 0 to 2**63 - 1", 2),
        (("{model}", "{text}", "--out", "{text}/a.txt"), "--out {text}/a.txt: is a file; give a folder", 2),
        (("{model}", "{text}", "--out", "{new}", "--tokenizer", "{new}"), "--tokenizer {new}: no such folder", 4),
        (("{model}", "{text}", "--out", "{new}", "--export", "{text}/a.txt"), "--export {text}/a.txt: cannot be", 2),
        (
            ("{model}", "{text}", "--out", "{new}", "--export", "/proc/no/x"),
            "--export /proc/no/x: cannot be written",
            2,
        ),
        (("{model}", "{text}", "--out", "{new}", "--export", "{model}"), "that training begins with; give another", 2),
        (("{model}", "{text}", "--out", "{new}", "--export", "{new}/initial"), "that training begins with; give", 2),
        (("{model}", "{text}", "--out", "{new}", "--resume-from", 3), "--resume: {new} holds no run", 2),
        (("{model}", "{text}", "--out", "{new}", "--writeback", "never"), "never", 2),
        (("{model}", "{text}", "--out", "{new}", "--slots", "0"), "--slots: at least 1 slot is needed, got 0", 3),
        (
            ("{model}", "{text}", "--out", "{new}", "--slots", "4", "--state-slots", "0%"),
            "--state-slots: '0%' must be",
            2,
        ),
        (("{model}", "{text}", "--out", "{new}", "--activation-memory", "lots"), "--activation-memory: 'lots' is", 2),
        (("sythetic", "--steps", 4), "MODEL and TEXTS", 2),
        (("--config", "{new}.toml"), "{new}.toml: cannot be read: No such file", 2),
    ],
)
def test_refused(model: Path, text: Path, tmp_path: Path, args: tuple[object, ...], message: str, code: int) -> None:
    names = {"model": str(model), "text": str(text), "new": str(tmp_path / "new")}
    given = [str(arg).format(**names) for arg in args]
    if "--out" in given:
        given.append("--from-scratch")
    shown = call(*given, code=code).stderr
    assert message.format(**names) in shown and len(shown.splitlines()) == 1
    assert "--slots" in given or not (tmp_path / "new").exists()  # what only the model tells comes later


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepps = 3", "unknown key stepps; there are accumulation, activation-memory, aux-loss"),
        ("steps = true", "steps = true: one value is needed"),
        ("steps = 'many'", "steps: "),
        ("steps = 0", "steps: "),
        ("quiet = 1", "quiet = 1: true or false is needed"),
        ("texts = [[1]]", "texts = [[1]]: a list of texts is needed"),
        ("steps 3", "not TOML"),
        ("[train]\nsteps = 3", "unknown key train"),
    ],
)
def test_a_file_of_options_is_checked(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "train.toml"
    config.write_text(content)
    shown = call("--config", config, code=2).stderr
    assert f"{config}: {message}" in shown and len(shown.splitlines()) == 1


def test_a_loss_that_is_no_number(model: Path, text: Path, tmp_path: Path) -> None:
    args = (model, text, "--from-scratch", *SMALL, "--steps", 9, "--optim", "sgd", "--max-grad-norm", 0, "--out")
    shown = said(call(*args, tmp_path / "run", "--lr", 1e38, "--commit-every", 1, code=1))
    assert re.search(r"the loss of step \d is (nan|inf); the run stays at step \d; try a lower learning rate", shown)


def test_tensorboard_is_missing(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    args = (
        model,
        text,
        "--from-scratch",
        "--sequence-length",
        16,
        "--out",
        tmp_path / "run",
        "--tensorboard",
        tmp_path,
    )
    assert "install moetier[tensorboard]" in call(*args, code=2).stderr


def test_tensorboard(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = (model, text, "--from-scratch", *SMALL, "--steps", 3, "--out", tmp_path / "run", "--json", tmp_path / "j")
    call(*args, "--tensorboard", tmp_path / "logs", "--eval-texts", text / "held.out", "-q")
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    scalars = [event.value for event in events.Scalars("train/loss")]
    assert scalars == pytest.approx(losses(tmp_path / "j"))
    assert {"eval/perplexity", "experts/hit_rate", "bytes/dirty", "train/grad_norm"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("name", ["train_from_scratch", "finetune_demo"])
def test_examples(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("It came to pass in those days. " * 6)
    example = Path(__file__).parents[1] / f"examples/{name}.toml"
    small = (
        "--sequence-length",
        16,
        "--batch-size",
        1,
        "--steps",
        2,
        "--warmup",
        1,
        "--eval-texts",
        tmp_path / "a.txt",
    )
    out = ("--out", tmp_path / "run", "--export", tmp_path / "saved", "--json", tmp_path / "j", "--readers", 1)
    shown = said(call("--config", example, "demo", tmp_path / "a.txt", *small, *out))
    assert "48 of 192 experts in memory; 2 steps" in shown and (tmp_path / "saved/tokenizer.json").is_file()
    found = json.loads((tmp_path / "j").read_text())
    assert found["step"] == 2 and (found["evaluations"][0]["loss"] > 7) == (name == "train_from_scratch")


def test_goes_on_from_an_earlier_step(model: Path, text: Path, tmp_path: Path) -> None:
    args = (model, text, "--from-scratch", *SMALL, "--steps", 2, "--out", tmp_path / "run", "--keep", 2)
    whole, rest = tmp_path / "whole.json", tmp_path / "rest.json"
    call(*args, "--commit-every", 1, "--json", whole, "-q")
    (tmp_path / "run/run/steps/step-2.2/step.json").write_text("{")
    config = ("--config", tmp_path / "run/train.toml", "-q")
    shown = said(call(*config, "--resume", code=4))
    assert "another step, with moetier train lm --resume-from (there are: 1)" in shown
    call(*config, "--resume-from", 1, "--json", rest)
    assert losses(rest) == losses(whole)[1:]
    assert "resume-from" not in (tmp_path / "run/train.toml").read_text()


def test_a_disk_that_is_full(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any) -> int:
        raise StoreError("weights.bin: no space; make room on its disk")

    monkeypatch.setattr(LanguageModelTraining, "commit", full)
    args = (model, text, "--from-scratch", *SMALL, "--steps", 1, "--out", tmp_path / "run", "-q")
    again = f"make room on its disk; then go on with: moetier train --config {tmp_path / 'run/train.toml'} --resume"
    assert again in said(call(*args, code=4))


def test_random_weights_that_cannot_be_written(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(from_scratch, "save_file", full)
    args = (model, text, "--from-scratch", *SMALL, "--steps", 1, "--out")
    for out in (tmp_path / "run", Path("/proc/none/run")):
        shown = call(*args, out, code=4).stderr
        assert f"{out}/initial: the checkpoint could not be written (No s" in shown and len(shown.splitlines()) == 1
    assert not any((tmp_path / "run").iterdir())


def test_an_export_that_fails(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, report = tmp_path / "saved", tmp_path / "report.json"
    args = (model, text, "--from-scratch", *SMALL, "--steps", 1, "--out", tmp_path / "a run", "--export", saved)

    def full(*args: Any, **kwargs: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # as tokenizers has it

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        shown = said(call(*args, "--json", report, code=4))
    assert f"{saved}: the tokenizer could not be saved: No space left on device" in shown
    again = re.search(r"saved later with: moetier train (.*)", shown)
    assert again is not None and losses(report)  # what was measured is not lost
    call(*shlex.split(again[1]), "-q")
    assert (saved / "tokenizer.json").is_file()


def test_a_second_signal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with stopping.stopped_by("moetier train …", Console(stderr=True)) as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as `timeout` passes it on
        assert asked == ["SIGINT"]
        now += 1.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    first, second = capsys.readouterr().err.splitlines()
    assert "the step is finished" in first and second.endswith("from the last checkpoint with: moetier train …")


def test_a_log_that_nobody_reads(model: Path, text: Path, tmp_path: Path) -> None:
    """As in `moetier train … 2>&1 | head -2`: like a signal."""
    args = (model, text, "--from-scratch", *SMALL, "--steps", 2000, "--log-every", 1, "--out", tmp_path / "run")
    command = [sys.executable, "-m", "moetier", "train", *map(str, (*args, "--json", tmp_path / "j"))]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert running.stdout is not None
    while "step 1:" not in (line := running.stdout.readline()):
        assert line
    running.stdout.close()
    assert running.wait(120) == 128 + signal.SIGPIPE
    found = json.loads((tmp_path / "j").read_text())
    assert found["stopped"] == "SIGPIPE" and 0 < found["step"] < 2000
    assert any((tmp_path / "run/run/steps").glob(f"step-{found['step']}.*"))


def test_a_log_that_nobody_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `moetier train … 2>&1 | tee log` and Ctrl-C, which `tee` hears too."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        console = Console(stderr=True)
        with stopping.stopped_by("moetier train …", console) as asked:
            signal.raise_signal(signal.SIGTERM)
            console.print("step 8")
            assert asked == ["SIGTERM"]
        console.print("a table")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        console = Console(stderr=True)
        with pytest.raises(BrokenPipeError):
            console.print("before the first step there is nothing to commit")
        with stopping.stopped_by("moetier train …", console) as asked:
            console.print("step 8")
            assert asked == ["SIGPIPE"] and console.quiet


def test_a_run_without_a_checkpoint(model: Path, text: Path, tmp_path: Path) -> None:
    args = (model, text, "--from-scratch", *SMALL, "--steps", 1, "--out", tmp_path / "run", "-q")
    call(*args, "--optim", "sgd", "--lr", 0, "--aux-loss", 0)
    shutil.rmtree(tmp_path / "run/run/steps")
    (tmp_path / "run/run/steps").mkdir()
    assert "holds a run without a checkpoint yet; begin it with --resume" in said(call(*args, code=2))
    call(*args, "--resume")


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [("--seed", 3, "--seed 0, not 3"), ("--dtype", "bfloat16", "--dtype auto, not bfloat16"), ("", 12, "12")],
)
def test_other_random_weights(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, value: object, told: str
) -> None:
    """Made anew before the first checkpoint, whatever was there; refused after it."""

    def killed(self: Any) -> Any:
        raise StoreError("killed")

    run, again, fresh = tmp_path / "run", tmp_path / "again.json", tmp_path / "fresh.json"
    source, args = shutil.copytree(model, tmp_path / "model"), (text, "--from-scratch", *SMALL, "--steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTraining, "steps", killed)
        call(source, *args, "--out", run, "-q", code=4)
    more = (flag, value) if flag else ()
    if not flag:
        config = source / "config.json"
        config.write_text(config.read_text().replace('"moe_intermediate_size": 8', f'"moe_intermediate_size": {value}'))
        told = "the model's moe_intermediate_size 8, not 12"
    shown = said(call(source, *args, *more, "--out", run, "--resume", "--json", again))
    assert f"no checkpoint yet: random weights are made anew; they had {told}" in shown
    call(source, *args, *more, "--out", tmp_path / "fresh", "--json", fresh, "-q")
    assert losses(again) == losses(fresh)
    call(source, *args, *more, "--out", run, "--resume", "-q")  # the same: nothing to say, nothing to do
    first = call(model, *args, "--out", run, "--resume", code=2).stderr
    assert f"{run}/initial: the run was begun with" in first and "give the same, or another folder" in first


def test_random_weights_of_a_run_that_is_open(model: Path, text: Path, tmp_path: Path) -> None:
    args = (model, text, "--from-scratch", *SMALL, "--steps", 1, "--out", tmp_path / "run", "-q")
    call(*args)
    shutil.rmtree(tmp_path / "run/run/steps")
    (tmp_path / "run/run/steps").mkdir()
    with RunFolder.open(tmp_path / "run/run"):
        assert "has it open" in said(call(*args, "--resume", "--seed", 1, code=2))
    assert (tmp_path / "run/initial/config.json").is_file()
    (tmp_path / "run/initial").rename(tmp_path / "run/.initial.draft")  # killed while it made them
    shutil.rmtree(tmp_path / "run/run")
    (tmp_path / "run/train.toml").unlink()
    call(*args)


def test_a_run_is_no_model(model: Path, text: Path, tmp_path: Path) -> None:
    """Whoever gives the folder of a run instead of what it exports is told how to export it."""
    run, saved = tmp_path / "a run", tmp_path / "saved"
    call(model, text, "--from-scratch", *SMALL, "--steps", 1, "--out", run, "-q")
    told = set()
    for command in (
        ("run", run, "x"),
        ("run", run / "run", "x"),
        ("plan", run),
        ("eval", run, "--text", text / "a.txt"),
    ):
        result = CliRunner().invoke(app, [str(part) for part in command])
        found = re.search(r"a training run, not a model; save its model with moetier train (.*), and", result.stderr)
        assert found is not None and result.exit_code == 4 and len(result.stderr.splitlines()) == 1, result.output
        told.add(found[1])
    with pytest.raises(CheckpointError, match="not a model; save its model"):
        moetier.from_pretrained(run)
    (again,) = told
    call(*shlex.split(again.replace("DIR", str(saved))), "-q")
    assert CliRunner().invoke(app, ["plan", str(saved)]).exit_code == 0
    with RunFolder.create(tmp_path / "other", model="path/to/model", fingerprint="1"):
        pass
    with pytest.raises(CheckpointError, match=r"from_pretrained\('path/to/model', train='.*other'\)\.save_pretrained"):
        moetier.from_pretrained(tmp_path / "other")
    with RunFolder.create(tmp_path / "synthetic", model="synthetic {}", fingerprint="1"):
        pass
    with pytest.raises(CheckpointError, match="that of moetier train synthetic, which makes no model"):
        moetier.from_pretrained(tmp_path / "synthetic")


def test_schedules() -> None:
    rates = [Settings(10, lr=1.0, warmup=4, schedule="linear").lr_of(step) for step in range(1, 11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    rates = [Settings(4, lr=2.0).lr_of(step) for step in range(1, 5)]
    assert rates[0] == 2.0 and rates[2] == pytest.approx(1.0) and rates == sorted(rates, reverse=True)
    assert Settings(4, schedule="constant").lr_of(4) == 1e-4


def test_batches() -> None:
    batches = Batches(11, 3, seed=5)
    epochs = [[int(block) for number in range(3) for block in batches[3 * epoch + number]] for epoch in range(3)]
    assert all(len(set(epoch)) == 9 and set(epoch) <= set(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [int(block) for block in Batches(11, 3, seed=5)[4]] == epochs[1][3:6]  # whatever was asked before


def test_steps_are_reported_whole() -> None:
    from moetier.cli.train_report import said_of

    step = Step(3, 2.0, 0.1, None, 64, 0.5, 4096, 2048, 3, 4, 1024)
    assert (
        said_of([step])
        == "loss 2.0000 · 128 tokens/s · hits 75 % · read 4.0 KiB, written 2.0 KiB a step · dirty 1.0 KiB"
    )


def test_routing_that_favours_experts_in_memory(model: Path, text: Path, tmp_path: Path) -> None:
    args = (model, text, "--from-scratch", *SMALL, "--schedule", "constant", "--log-every", 2)
    lever = ("--cache-prior", 0.8, "--keep-top", 0)
    whole, rest = tmp_path / "whole.json", tmp_path / "rest.json"
    shown = said(call(*args, *lever, "--steps", 4, "--out", tmp_path / "whole", "--json", whole))
    assert re.search(r"step 4: .* routing \d+ % changed, balance \d\.\d\d \(own \d\.\d\d\)", shown)
    found = json.loads(whole.read_text())["routing"]
    assert found["levers"] == "cache_prior=0.8,keep_top=0" and found["kept"] == 2 and found["tokens"] == 4 * 2 * 2 * 16
    changed = found["steps"]["changed_tokens"]
    assert changed[0] == 0.0 < changed[1] and found["changed_tokens"] == pytest.approx(sum(changed) / 4)
    kept = f"routing kept {100 - 100 * found['changed_experts']:.1f} % by cache_prior=0.8,keep_top=0"
    assert kept in shown and f"load-balancing loss, 1 is even; own: {found['balance_loss_own']:.3f}" in shown
    tags = scalars(Step(3, 2.0, 0.1, None, 64, 0.5, 4096, 2048, 3, 4, 1024, {"cv": 0.5}))
    assert tags["routing/cv"] == 0.5 and "routing/cv" not in scalars(Step(3, 2.0, 0.1, None, 64, 0.5, 1, 1, 3, 4, 1))

    call(*args, *lever, "--steps", 2, "--out", tmp_path / "run", "-q")
    config = ("--config", tmp_path / "run" / "train.toml", "--resume")
    assert "trained with routing cache_prior=0.8,keep_top=0, not cache_prior=0.2,keep_top=0" in said(
        call(*config, "--cache-prior", 0.2, code=2)
    )
    call(*config, "--steps", 4, "--json", rest, "--slots", 7, "-q")
    assert losses(rest) == losses(whole)[2:]
