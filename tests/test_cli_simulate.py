"""`moetier simulate`: its flags, what a mistake costs, and that every output holds the numbers of the simulations."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from moetier.cli import app
from moetier.cli.grid import split_policies
from moetier.simulate.config import SimulationConfig
from moetier.simulate.report import CSV_COLUMNS
from moetier.simulate.run import simulate
from moetier.tiers import configure_all
from moetier.trace import Trace
from moetier.trace.synthetic import uniform_control, zipf_markov

pytest.importorskip("pyarrow")
from moetier.trace.files import read_trace, write_trace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MACHINE = ("--record-size", "4MiB", "--disk-read-gbps", "2", "--layer-ms", "0.2", "--expert-ms", "0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulate")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    write_trace(zipf_markov(300, 4, 16, 2, sequences=6, seed=1), folder / "t.parquet")
    return folder / "t.parquet"


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["simulate", *map(str, arguments), "-j", "1"])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def made(file: Path, folder: Path) -> Any:
    """One sweep with everything in it: scopes, batches, seeds, two tiers, time."""
    outputs = {name: folder / f"r.{name}" for name in ("html", "json", "csv")}
    result = run(
        *(
            file,
            "--limit",
            "120",
            "--policy",
            "lru,horizon,slru(protected=0.5)",
            "--slots",
            "20%,40%",
            "--scope",
            "both",
            "--batch",
        ),
        *("1,3", "--seeds", "2", "--host-slots", "60%", "--h2d-gbps", "10", *MACHINE),
        *("-o", outputs["html"], "--json", outputs["json"], "--csv", outputs["csv"]),
    )
    return result, outputs


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_table(made: Any) -> None:
    text = made[0].stdout
    for title in (
        "Hit rate, %",
        "Gap between LRU and Belady closed",
        "Traffic, MB per token",
        "Speed, tokens/s",
        "Waiting",
    ):
        assert text.count(title) == 4, f"{title}: once for each scope and batch"
    for term in (
        "Semantics: access-atomic",
        "Miss denominator",
        "Fit source",
        "belady-forced: forced",
        "Seeds and ties",
    ):
        assert term in text
    assert "slru(protected=0.5)" in text and "±" in text and "(oracle)" in text
    assert "simulating" not in text, "progress is for standard error"


def test_json(made: Any, file: Path) -> None:
    report = json.loads(made[1]["json"].read_text())
    (trace,) = report["traces"]
    assert trace["trace"]["tokens"] == 120 and trace["trace"]["layers"] == 4
    assert len(trace["results"]) == 5 * 2 * 2 * 2 * 2
    assert len(trace["panels"]) == 4
    assert {term for term, _ in trace["checklist"]} >= {"Semantics", "Scope", "Bytes moved", "Fit source", "Oracles"}
    row = next(row for row in trace["panels"][0]["rows"] if row["policy"] == "lru")
    rates = [
        result["hit_rate"]
        for result in trace["results"]
        if (result["config"]["policy"], result["config"]["slots"], result["config"]["scope"], result["config"]["batch"])
        == ("lru", row["slots"], "global", 1)
    ]
    assert len(rates) == 2 and row["measures"][0]["mean"] == pytest.approx(50 * sum(rates))


def test_numbers_are_those_of_the_simulator(file: Path, folder: Path) -> None:
    run(file, "--policy", "lru,lfu", "--slots", "12,30", "--no-oracle", "--csv", folder / "n.csv", "--quiet")
    with open(folder / "n.csv", newline="") as text:
        rows = list(csv.DictReader(text))
    assert [(row["policy"], row["slots"]) for row in rows] == [
        (policy, slots) for policy in ("lru", "lfu") for slots in ("12", "30")
    ]
    for row in rows:
        result = simulate(read_trace(file), SimulationConfig(row["policy"], int(row["slots"])))
        assert float(row["hit_rate"]) == result.hit_rate
        assert int(row["misses"]) == sum(result.misses) == int(row["disk_read"])
        assert row["gap_closed"] == "" and row["bytes_unit"] == "experts"


def test_csv(made: Any) -> None:
    with open(made[1]["csv"], newline="") as text:
        rows = list(csv.DictReader(text))
    assert list(rows[0]) == list(CSV_COLUMNS)
    assert len(rows) == 80
    assert {row["oracle"] for row in rows if row["policy"].startswith("belady")} == {"1"}
    for row in rows:
        assert int(row["hits"]) + int(row["lates"]) + int(row["misses"]) == int(row["needs"])
        assert float(row["seconds_total"]) == pytest.approx(float(row["seconds_compute"]) + float(row["seconds_wait"]))
        assert row["bytes_unit"] == "bytes" and int(row["h2d"]) > 0


def test_gap_closed(made: Any) -> None:
    """From LRU, which closes nothing of it, to Belady, which closes all."""
    with open(made[1]["csv"], newline="") as text:
        gaps = [(row["policy"], row["gap_closed"]) for row in csv.DictReader(text) if row["gap_closed"]]
    assert {float(gap) for policy, gap in gaps if policy == "lru"} == {0.0}
    assert {float(gap) for policy, gap in gaps if policy == "belady"} == {1.0}
    assert any(float(gap) > 0.05 for policy, gap in gaps if policy == "horizon")


class Page(HTMLParser):
    """Checks nesting, and gathers what a page would ask for."""

    VOID = frozenset(("meta", "br", "link", "img", "input", "hr"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "form"), tag
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_asks_for_nothing(made: Any) -> None:
    text = made[1]["html"].read_text()
    page = Page(text)
    assert page.addresses and all(re.fullmatch(r"#\w+", address) for address in page.addresses)
    assert all(f'id="{address[1:]}"' in text for address in page.addresses), "a link leads nowhere"
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text and "url(" not in text
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text


def figures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_every_plot_has_data(made: Any) -> None:
    """Marks inside the picture; a line for each policy; words for axes."""
    found = figures(made[1]["html"].read_text())
    assert len(found) == 4 * (1 + 2 + 1 + 1 + 1 + 1 + 1 + 1)  # hits, heat maps, time, traffic, host, speed, wait, parts
    for svg in found:
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        name = svg.attrib["aria-label"]
        groups = [group.attrib.get("class") for group in svg.iter() if group.tag.endswith("}g")]
        assert groups.count("series") == 5 or groups.count("cell") >= 5 * 4 or groups.count("mark") == 15, name
        assert [text.text for text in svg.iter() if text.attrib.get("class") == "label"], name
        for line in svg.iter():
            for point in line.attrib.get("points", "").split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width and 0 <= y <= height, name
            assert "nan" not in " ".join(line.attrib.values())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_in_a_browser(made: Any, tmp_path: Path) -> None:
    """The page as a browser builds it has all its marks, and asks the net for nothing; one that asks is noticed."""
    page = made[1]["html"]
    dom, errors, requests = browse(page, tmp_path)
    assert dom.count("<svg") == page.read_text().count("<svg") > 30
    assert dom.count("<polyline") >= 5 * 4 * 5
    assert "Refused to" not in errors, "the page breaks its own content security policy"
    assert requests == set()
    control = tmp_path / "control.html"
    control.write_text("<!doctype html><p>x<img src='http://127.0.0.1:9/x.png'>")
    assert browse(control, tmp_path)[2] == {"http://127.0.0.1:9/x.png"}


def browse(page: Path, folder: Path) -> tuple[str, str, set[str]]:
    """A page in a headless browser: its elements, what it complains of, and what it asked the net for."""
    log = folder / "net.json"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-default-apps --disable-extensions"
    flags += " --disable-features=NetworkTimeServiceQuerying"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    environment = os.environ | {"HOME": str(folder)}
    result = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr, requests_of_pages(log)


def requests_of_pages(log: Path) -> set[str]:
    """From a network log: what pages asked the net for. The browser's own requests have no origin."""
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", ())]
    return {
        params["url"]
        for params in asked
        if params["initiator"] != "not an origin"
        and params.get("url", "file:").partition(":")[0] not in ("file", "data")
    }


# -- saturation --------------------------------------------------------------------------------------------------------


def test_saturation_is_said_and_nothing_ranked(folder: Path) -> None:
    """Every access needs all experts of its layer: no winner is named, in text or page."""
    write_trace(uniform_control(600, 2, 4, 2, sequences=40), folder / "s.parquet")
    arguments = (folder / "s.parquet", "--policy", "lru,lfu", "--slots", "50%", "--batch", "20")
    result = run(*arguments, "-o", folder / "s.html")
    assert "Saturated: an access needs 4.0 of the 4 experts" in result.stdout
    text = (folder / "s.html").read_text()
    assert "Saturated" in text and "<td class=best>" not in text and "class=headline>" not in text


def test_equals_are_not_ranked(file: Path, folder: Path) -> None:
    result = run(file, "--policy", "lru,lru(),fifo", "--slots", "100%", "-o", folder / "e.html")
    assert "they are not ranked there" in result.stdout
    assert "<td class=best>" not in (folder / "e.html").read_text()


# -- what is simulated -------------------------------------------------------------------------------------------------


def test_fit_split(file: Path, folder: Path) -> None:
    result = run(file, "--policy", "static,lru", "--slots", "30%", "--fit-split", "--json", folder / "f.json")
    assert "static: fitted on every other sequence of t.parquet (150 tokens), reported on the others" in result.stdout
    (trace,) = json.loads((folder / "f.json").read_text())["traces"]
    half: Trace = read_trace(file).split()[1]
    assert trace["trace"]["tokens"] == half.tokens
    static = next(result for result in trace["results"] if result["config"]["policy"] == "static")
    expected = simulate(half, SimulationConfig("static", static["config"]["slots"]), read_trace(file).split()[0])
    assert static["hit_rate"] == expected.hit_rate


def test_fit_on_the_same_routing_is_told(file: Path) -> None:
    result = run(file, "--policy", "static,lru", "--slots", "30%", "--fit", file)
    assert "not held out" in result.stdout and "warning: --fit" in result.stderr


def test_several_traces_limit_and_semantics(file: Path, folder: Path) -> None:
    write_trace(zipf_markov(200, 2, 8, 2, seed=3), folder / "u.parquet")
    result = run(
        *(file, folder / "u.parquet", "--policy", "lru", "--slots", "40%", "--limit", "100"),
        *("--semantics", "sequential", "--json", folder / "m.json", "-o", folder / "m.html"),
    )
    assert "Semantics: sequential" in result.stdout and "access-atomic" not in result.stdout
    report = json.loads((folder / "m.json").read_text())
    assert [(trace["name"], trace["trace"]["tokens"]) for trace in report["traces"]] == [
        ("t.parquet", 100), ("u.parquet", 100),
    ]  # fmt: skip
    Page((folder / "m.html").read_text())


def test_options_reach_the_simulation(file: Path, folder: Path) -> None:
    run(
        *(file, "--policy", "lru", "--slots", "40%", "--no-oracle", "--admission", "decode-only", "--staging", "3"),
        *("--predictor", "previous-token", "--prefetch-confidence", "0.2", "--prefetch-limit", "2", "--warm-pinning"),
        *(
            "40",
            "--dirty",
            "--host-slots",
            "50%",
            "--d2h-gbps",
            "5",
            "--disk-write-gbps",
            "0.5",
            "--io-latency-ms",
            "2",
        ),
        *(*MACHINE, "--prefetch-displace", "--host-policy", "lfu", "--json", folder / "o.json"),
    )
    (result,) = json.loads((folder / "o.json").read_text())["traces"][0]["results"]
    config, timing = result["config"], result["config"]["timing"]
    assert (config["admission"], config["staging"], config["predictor"]) == ("decode-only", 3, "previous-token")
    assert (config["prefetch_confidence"], config["prefetch_limit"], config["prefetch_displace"]) == (0.2, 2, True)
    assert (config["warm_pinning"], config["dirty"], config["host_slots"], config["host_policy"]) == (
        40,
        True,
        32,
        "lfu",
    )
    assert timing["record_nbytes"] == 4 << 20
    assert timing["disk_write"]["gbps"] == 0.5 and timing["d2h"]["gbps"] == 5
    assert timing["disk_read"]["latency"] == timing["disk_write"]["latency"] == 0.002
    assert timing["layer_seconds"] == pytest.approx(2e-4) and timing["expert_seconds"] == pytest.approx(1e-4)


def test_two_tiers_are_exclusive_as_in_a_run(file: Path, folder: Path) -> None:
    """By default what the engine does with two tiers; together they hold more, so less is read from disk."""

    def results(*flags: object) -> list[dict[str, Any]]:
        common = (file, "--policy", "lru", "--slots", "25%,50%", "--no-oracle", "--host-slots", "50%")
        done = run(*common, *flags, "--json", folder / "x.json", "--csv", folder / "x.csv")
        said.append(" ".join(done.stdout.split()))
        found = json.loads((folder / "x.json").read_text())["traces"][0]["results"]
        return [{name: value for name, value in row.items() if name != "wall_seconds"} for row in found]

    said: list[str] = []
    trace = read_trace(file)
    once = results()
    built = [configure_all([slots, 32], trace.records, trace.layers, trace.top_k)[1] for slots in (16, 32)]
    for result, tier in zip(once, built, strict=True):
        config = result["config"]
        assert (config["exclusive"], config["spare"], config["refill"]) == (tier.exclusive, tier.spare, tier.refill)
        assert result["demotions"] > 0 and result["refills"] == 0
    copied = sum(result["demotions"] for result in once)
    assert f"exclusive: an expert is kept once in the two. Over all runs {copied:,} copied down (2 victims" in said[0]
    rows = list(csv.DictReader((folder / "x.csv").read_text().splitlines()))
    assert [(row["exclusive"], int(row["demotions"])) for row in rows] == [("1", r["demotions"]) for r in once]
    assert results("--exclusive", "--refill", "never") == once

    twice = results("--inclusive")
    assert "also kept in the second" in said[-1]
    for alone, result in zip(twice, once, strict=True):
        assert not alone["config"]["exclusive"] and alone["demotions"] == 0
        assert sum(result["host_misses"]) < sum(alone["host_misses"])
    assert [r["config"]["spare"] for r in results("--spare", 1)] == [1, 1]
    again = results("--refill", "always")
    assert all(result["refills"] > 0 and result["demotions"] == 0 for result in again)
    slow = (*MACHINE, "--d2h-gbps", "0.1", "--refill", "auto")
    assert all(result["refills"] > 0 and result["demotions"] == 0 for result in results(*slow))
    fast = (*MACHINE, "--d2h-gbps", "100", "--refill", "auto")
    assert all(result["refills"] == 0 and result["demotions"] > 0 for result in results(*fast))
    layered = results("--scope", "layer")
    assert [r["config"]["spare"] for r in layered] == [0, 1]  # 4 and 8 slots a layer


def test_resume(file: Path, folder: Path) -> None:
    arguments = (file, "--policy", "lru", "--slots", "20%", "--resume", folder / "r.jsonl", "--csv", folder / "a.csv")
    run(*arguments)
    lines = (folder / "r.jsonl").read_bytes()
    first = (folder / "a.csv").read_bytes()
    run(*arguments)
    assert (folder / "r.jsonl").read_bytes() == lines and (folder / "a.csv").read_bytes() == first


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--policy", "lru,nope"), 2, r"--policy: unknown policy 'nope'"),
        (("--policy", "slru(x=1)"), 2, r"--policy: policy 'slru' has no parameter 'x'"),
        (("--policy", ","), 2, r"--policy: no policy is named"),
        (("--policy", "static"), 2, r"--policy static: it is fitted beforehand; give --fit FILE or --fit-split"),
        (("--slots", "ten"), 2, r"--slots: 'ten' is neither"),
        (("--slots", "0"), 3, r"--slots: at least 1 slot"),
        (("--slots", "65"), 2, r"--slots 65: the model has 64 experts"),
        (("--slots", "3", "--scope", "layer"), 3, r"--slots: 3 slots are less than one for each of the 4 layers"),
        (("--scope", "here"), 2, r"--scope here: choose one of global, layer, both"),
        (("--semantics", "x"), 2, r"--semantics x: choose atomic or sequential"),
        (("--batch", "1,x"), 2, r"--batch: 'x' is not a number of streams"),
        (("--admission", "x"), 2, r"--admission x: choose one of"),
        (("--admission", "decode-only"), 2, r"--admission decode-only needs --staging"),
        (("--staging", "7"), 2, r"--staging 7: staging slots are taken out of --slots"),
        (("--predictor", "x"), 2, r"--predictor: unknown predictor 'x'"),
        (("--prefetch-limit", "2"), 2, r"--prefetch-limit does nothing without --predictor"),
        (("--host-policy", "lru"), 2, r"--host-policy does nothing without --host-slots"),
        (("--exclusive",), 2, r"--exclusive is of two tiers; give --host-slots too"),
        (("--inclusive",), 2, r"--inclusive is of two tiers; give --host-slots too"),
        (("--spare", "2"), 2, r"--spare is of exclusive tiers; give --host-slots, and leave out --inclusive"),
        (("--refill", "always", "--host-slots", "9", "--inclusive"), 2, r"--refill is of exclusive tiers"),
        (("--refill", "x", "--host-slots", "9"), 2, r"--refill x: choose one of never, always, auto"),
        (("--refill", "always", "--spare", "1", "--host-slots", "9"), 2, r"leave out --spare"),
        (("--refill", "auto", "--host-slots", "9"), 2, r"--refill auto compares the links"),
        (("--d2h-gbps", "1", "--record-size", "1MB"), 2, r"--d2h-gbps does nothing without exclusive tiers"),
        (
            ("--d2h-gbps", "1", "--record-size", "1MB", "--host-slots", "9", "--inclusive"),
            2,
            r"--d2h-gbps does nothing without exclusive tiers",
        ),
        (("--warm-pinning", "5", "--scope", "layer"), 2, r"--warm-pinning chooses among all layers"),
        (("--disk-read-gbps", "1"), 2, r"--disk-read-gbps needs --record-size"),
        (("--disk-read-gbps", "1", "--record-size", "x"), 2, r"--record-size: 'x' is not a size"),
        (("--h2d-gbps", "1", "--record-size", "1MB"), 2, r"--h2d-gbps does nothing without --host-slots"),
        (("--disk-write-gbps", "1", "--record-size", "1MB"), 2, r"--disk-write-gbps does nothing without --dirty"),
        (
            ("--expert-ms", "1", "--record-size", "1MB", "--semantics", "sequential"),
            2,
            r"--semantics sequential has no time",
        ),
        (("--fit", "{file}", "--fit-split"), 2, r"--fit and --fit-split contradict"),
        (("--fit", "{file}"), 2, r"--fit .*: no policy of --policy learns beforehand"),
        (("-o", "/proc/x/r.html"), 2, r"--output /proc/x/r.html: cannot be written"),
        (("--resume", "{file}"), 2, r"--resume: .* not a result of a sweep"),
    ],
)
def test_mistakes(file: Path, flags: tuple[str, ...], code: int, message: str) -> None:
    given = {flags[index] for index in range(0, len(flags), 2)}
    base = () if "--policy" in given else ("--policy", "lru")
    base += () if "--slots" in given else ("--slots", "7")
    result = run(file, *base, *(flag.replace("{file}", str(file)) for flag in flags), code=code)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert result.stdout == ""
    assert read_trace(file).tokens == 300, "the trace is as it was"


def test_no_such_trace(folder: Path) -> None:
    result = run(folder / "none.parquet", code=2)
    assert "none.parquet: there is no such file" in result.stderr


def test_one_failing_policy_does_not_cost_the_others(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_policy.py").write_text(
        "from moetier.policies.lru import LRU\n"
        "class Failing(LRU):\n    def on_hit(self, key, access):\n        raise ValueError('no <idea>')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    page = tmp_path / "r.html"
    result = run(file, "--policy", "failing_policy:Failing,lru", "--slots", "40%", "-o", page, code=1)
    assert "error: failing_policy:Failing, 26 slots, scope global: ValueError: no <idea>" in result.stderr
    assert "lru" in result.stdout and "Failing" not in result.stdout
    assert "Failed simulations" in page.read_text() and "no &lt;idea&gt;" in page.read_text()
    Page(page.read_text())


def test_split_policies() -> None:
    assert split_policies("slru(protected=0.5, x=1), lru,a.b:C") == ["slru(protected=0.5, x=1)", "lru", "a.b:C"]
