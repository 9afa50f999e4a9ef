"""Trace files, the formats of others, synthetic routing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.access import Phase
from moetier.errors import ConfigError
from moetier.files import whole_file
from moetier.trace import Trace, TraceInfo
from moetier.trace.files import read_trace, write_trace
from moetier.trace.interchange import read_jsonl, read_npz, write_csv, write_jsonl, write_oracle
from moetier.trace.needs import needs_of
from moetier.trace.synthetic import environments, uniform_control, zipf_markov

TEXT = st.text(max_size=8)
JSON = st.dictionaries(TEXT, st.none() | st.booleans() | st.integers(-(2**60), 2**60) | TEXT, max_size=3)


@st.composite
def traces(draw: st.DrawFn, least_tokens: int = 0) -> Trace:
    """Any trace that the constructor takes, with distinct experts per token and layer."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens, layers = draw(st.integers(least_tokens, 12)), draw(st.integers(1, 4))
    num_experts = draw(st.sampled_from([1, 2, 5, 256, 257, 1000]))
    top_k = draw(st.integers(1, min(4, num_experts)))
    shape = (tokens, layers, top_k)
    experts = np.argsort(rng.random((tokens, layers, num_experts)), axis=2)[..., :top_k].astype(np.int16)
    weights = None
    kind = draw(st.sampled_from(["none", "float16", "bfloat16", "float32"]))
    if kind != "none":
        weights = rng.random(shape, dtype=np.float32)
        if kind == "float16":
            weights = weights.astype(np.float16).astype(np.float32)
        if kind == "bfloat16":
            weights = (weights.view(np.uint32) & 0xFFFF0000).view(np.float32)
    used = np.full((layers,), top_k) if draw(st.booleans()) else rng.integers(0, top_k + 1, layers)
    for layer, count in enumerate(used):
        experts[:, layer, count:] = -1
        if weights is not None:
            weights[:, layer, count:] = 0
    return Trace(
        experts=experts,
        num_experts=num_experts,
        sequence=rng.integers(0, 3, tokens).astype(np.int32),
        step=np.cumsum(rng.integers(0, 3, tokens)).astype(np.int64),
        phase=rng.integers(0, 2, tokens).astype(np.uint8),
        weights=weights,
        info=TraceInfo(draw(TEXT), draw(TEXT), draw(TEXT), tuple(draw(st.lists(JSON, max_size=2))), draw(JSON)),
        token_ids=rng.integers(0, 2**31 - 1, tokens).astype(np.int32) if draw(st.booleans()) else None,
    )


def assert_same(one: Trace, other: Trace) -> None:
    for name in ("experts", "weights", "sequence", "step", "phase", "token_ids"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and np.array_equal(a, b), name
    assert one.num_experts == other.num_experts and one.info == other.info


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(trace=traces())
def test_a_file_gives_back_the_trace(folder: Path, trace: Trace) -> None:
    write_trace(trace, folder / "t.parquet")
    assert_same(read_trace(folder / "t.parquet"), trace)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(trace=traces(least_tokens=1))
def test_jsonl_gives_back_the_trace(folder: Path, trace: Trace) -> None:
    if (trace.experts[..., -1] < 0).all():
        return  # the format does not say how many experts a layer could have used
    write_jsonl(trace, folder / "t.jsonl")
    assert_same(read_jsonl(folder / "t.jsonl"), trace)


def test_a_file_is_compact(tmp_path: Path) -> None:
    trace = zipf_markov(2000, 6, 32, 4)
    write_trace(trace, tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 11 * trace.tokens * trace.layers  # in memory: 24


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path) -> None:
    trace = zipf_markov(10, 1, 4, 1)
    write_trace(trace, tmp_path / "t.parquet")
    before = (tmp_path / "t.parquet").read_bytes()
    with pytest.raises(RuntimeError), whole_file(tmp_path / "t.parquet") as draft:
        draft.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
    assert (tmp_path / "t.parquet").read_bytes() == before
    unwritable = Trace(trace.experts, 4, trace.sequence, trace.step, trace.phase, info=TraceInfo(extra={"x": object()}))
    with pytest.raises(ConfigError, match=r"t\.parquet: .*JSON"):
        write_trace(unwritable, tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_trace(trace, tmp_path / "absent" / "t.parquet")
    with pytest.raises(ConfigError, match="a folder"):
        write_trace(trace, tmp_path)


def damaged_files(folder: Path) -> dict[str, Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_trace(zipf_markov(50, 2, 8, 2), folder / "good.parquet")
    good = (folder / "good.parquet").read_bytes()
    table = pq.read_table(folder / "good.parquet")
    head = json.loads(table.schema.metadata[b"moetier.trace"])
    files = {"empty": b"", "text": b"not parquet", "cut": good[: len(good) // 2], "no end": good[:-8]}
    paths = {"absent": folder / "absent.parquet", "folder": folder}
    for name, content in files.items():
        paths[name] = folder / f"{name}.parquet"
        paths[name].write_bytes(content)
    tables = {
        "foreign": pa.table({"x": [1]}),
        "newer": table.replace_schema_metadata({b"moetier.trace": json.dumps(head | {"version": 9}).encode()}),
        "few experts": table.replace_schema_metadata(
            {b"moetier.trace": json.dumps(head | {"num_experts": 1}).encode()}
        ),
        "no info": table.replace_schema_metadata({b"moetier.trace": json.dumps(head | {"info": None}).encode()}),
        "no column": table.drop_columns(["experts.1"]),
        "wrong type": table.set_column(0, "sequence", pa.array(["x"] * 50)),
        "nulls": table.set_column(1, "step", pa.array([None] * 50, pa.int64())),
    }
    for name, content in tables.items():
        paths[name] = folder / f"{name}.parquet"
        pq.write_table(content, paths[name])
    return paths


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    for name, path in damaged_files(tmp_path).items():
        with pytest.raises(ConfigError) as caught:
            read_trace(path)
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value), name


def npz(path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "experts": np.argsort(rng.random((6, 2, 8)), axis=2)[..., :3].astype(np.uint8),
        "gate_weights": rng.random((6, 2, 3)).astype(np.float16),
        "offsets": np.array([0, 2, 6]),
        "meta": np.array(json.dumps([{"domain": "a"}, {"domain": "b"}])),
        "num_experts": np.array(8),
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_npz(tmp_path: Path) -> None:
    path = npz(tmp_path / "t.npz")
    trace, arrays = read_npz(path), np.load(path)
    assert np.array_equal(trace.experts, arrays["experts"]) and trace.num_experts == 8
    assert trace.weights is not None and np.array_equal(trace.weights, arrays["gate_weights"])
    assert trace.sequence.tolist() == [0, 0, 1, 1, 1, 1] and trace.step.tolist() == list(range(6))
    assert set(trace.phase) == {Phase.DECODE}
    assert [sequence["domain"] for sequence in trace.info.sequences] == ["a", "b"]
    assert read_npz(npz(path, gate_weights=None, meta=None)).weights is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "no array 'experts'"),
        ({"offsets": None}, "no array 'offsets'"),
        ({"experts": np.zeros((6, 2), np.uint8)}, "tokens, layers, k"),
        ({"experts": np.zeros((6, 2, 3))}, "whole numbers"),
        ({"experts": np.full((6, 2, 3), 9, np.uint8)}, "not below num_experts"),
        ({"experts": np.full((6, 2, 3), 70_000)}, "32767"),
        ({"experts": np.full((6, 2, 3), -2)}, "from -1"),
        ({"offsets": np.array([0, 2, 5])}, "offsets must rise"),
        ({"offsets": np.array([0, 4, 2, 6])}, "offsets must rise"),
        ({"offsets": np.array([0.0, 6.0])}, "offsets must rise"),
        ({"gate_weights": np.zeros((6, 2, 2))}, "gate_weights must"),
        ({"num_experts": np.array([8])}, "num_experts must"),
        ({"meta": np.array("{")}, "meta is not JSON"),
        ({"meta": np.array('{"a": 1}')}, "list of objects"),
        ({"meta": np.array([{"a": 1}], dtype=object)}, "allow_pickle"),
    ],
)
def test_bad_npz(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_npz(npz(tmp_path / "t.npz", **changes))
    assert str(caught.value).startswith(str(tmp_path / "t.npz"))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    npz(tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:300])
    np.savez_compressed(tmp_path / "flipped.npz", experts=np.zeros((9, 9, 9)))
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[60:70] = b"\xff" * 10
    (tmp_path / "flipped.npz").write_bytes(content)
    for name in ("one.npy", "text.npz", "empty.npz", "cut.npz", "flipped.npz", "absent.npz"):
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            read_npz(tmp_path / name)


HEAD = {"format": "moetier trace jsonl", "version": 1, "num_experts": 8}


def test_jsonl_needs_little(tmp_path: Path) -> None:
    lines = [HEAD, {"experts": [[1, 2], [3]]}, {"experts": [[7], []]}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    trace = read_jsonl(tmp_path / "t.jsonl")
    assert trace.experts.tolist() == [[[1, 2], [3, -1]], [[7, -1], [-1, -1]]]
    assert trace.step.tolist() == [0, 1] and trace.sequence.tolist() == [0, 0] and trace.weights is None


@pytest.mark.parametrize(
    ("lines", "where", "message"),
    [
        ([], 1, "not JSON"),
        ([{"format": "other"}], 1, "not a header"),
        ([HEAD | {"version": 2}], 1, "version 2"),
        ([HEAD | {"num_experts": "8"}], 1, "num_experts"),
        ([HEAD | {"sequences": {}}], 1, "sequences"),
        ([HEAD, {"experts": [[1]]}, {"experts": [[8]]}], 3, "0 to 7"),
        ([HEAD, {"experts": [[1]]}, {"experts": [[1, 1]]}], 3, "twice"),
        ([HEAD, {"experts": [[1]]}, {"experts": [[1], [2]]}], 3, "2 layers"),
        ([HEAD, {"experts": [[1]], "weights": [[1.0]]}, {"experts": [[1]]}], 3, "every token or for none"),
        ([HEAD, {"experts": [[1]], "token": 5}, {"experts": [[1]]}], 3, "every line or on none"),
        ([HEAD, {"experts": [[1]], "weights": [[1.0, 2.0]]}], 2, "shape of experts"),
        ([HEAD, {"experts": [[1]], "weights": [[10**400]]}], 2, "finite"),
        ([HEAD, {"experts": [[1]], "step": 3}, {"experts": [[1]], "step": 2}], 3, "must not decrease"),
        ([HEAD, {"experts": [[1]], "phase": "train"}], 2, "prefill"),
        ([HEAD, {"experts": [[1]], "sequence": -1}], 2, "sequence"),
        ([HEAD, {"experts": [1]}], 2, "list per layer"),
        ([HEAD, {"experts": []}], 2, "list per layer"),
        ([HEAD, [1]], 2, "object"),
    ],
)
def test_bad_jsonl_is_refused_by_line(tmp_path: Path, lines: list[Any], where: int, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=message) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}, line {where}: ")


def test_jsonl_without_tokens_and_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(HEAD) + "\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("t.jsonl", "b.jsonl", "absent.jsonl"):
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            read_jsonl(tmp_path / name)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(trace=traces())
def test_needs_are_those_of_the_accesses(trace: Trace) -> None:
    expected = [(a.time - 1, key.layer * trace.num_experts + key.expert) for a in trace.accesses() for key in a.keys]
    needs = needs_of(trace)
    assert list(zip(needs.access.tolist(), needs.record.tolist(), strict=True)) == expected


def test_exports_for_libcachesim(tmp_path: Path) -> None:
    trace = zipf_markov(300, 3, 8, 2, prompt=10)
    needs = needs_of(trace)
    write_csv(trace, tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == "time,obj_id,size" and len(lines) == 1 + len(needs.record)
    assert lines[1] == f"{needs.access[0]},{needs.record[0]},1"
    write_oracle(trace, tmp_path / "t.bin")
    assert (tmp_path / "t.bin").stat().st_size == 24 * len(needs.record)
    requests = np.fromfile(tmp_path / "t.bin", dtype=[("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    seen: dict[int, int] = {}
    for number in range(len(requests), 0, -1):  # backwards, as libCacheSim makes such files
        record = int(requests["id"][number - 1])
        assert requests["next"][number - 1] == seen.get(record, -1)
        seen[record] = number


Make = Callable[..., Trace]


@pytest.mark.parametrize("make", [zipf_markov, environments, uniform_control])
def test_synthetic_routing_is_valid_and_reproducible(make: Make) -> None:
    trace = make(400, 3, 16, 4, seed=1)
    assert trace.tokens == 400 and trace.layers == 3 and trace.top_k == 4
    assert (np.diff(np.sort(trace.experts, axis=2), axis=2) > 0).all(), "an expert twice"
    assert trace.weights is not None and (np.diff(trace.weights, axis=2) <= 0).all(), "not in order of gate weight"
    np.testing.assert_allclose(trace.weights.sum(axis=2), 1, atol=2e-3)
    assert_same(trace, make(400, 3, 16, 4, seed=1))
    assert not np.array_equal(trace.experts, make(400, 3, 16, 4, seed=2).experts)


def overlap(trace: Trace) -> float:
    both = trace.experts[1:, :, :, None] == trace.experts[:-1, :, None, :]
    return float(both.any(axis=-1).mean())


def test_zipf_markov_has_the_structure_it_is_asked_for() -> None:
    plain = {"topic_skew": 0.0, "persistence": 0.0, "topics": 1}
    zipf = zipf_markov(40_000, 2, 16, 1, skew=1.0, **plain)
    share = np.sort(np.bincount(zipf.experts[:, 0, 0], minlength=16) / zipf.tokens)[::-1]
    expected = 1 / np.arange(1, 17)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.01)
    low, high = (zipf_markov(3000, 2, 32, 4, persistence=p) for p in (0.0, 0.8))
    assert overlap(high) > overlap(low) + 0.2
    rare, steady = (zipf_markov(3000, 2, 32, 4, skew=0, persistence=0, topic_skew=2, stay=s) for s in (0.2, 0.99))
    assert overlap(steady) > overlap(rare) + 0.2
    prompts = zipf_markov(100, 1, 8, 2, sequences=4, prompt=5)
    assert prompts.phase.tolist() == ([0] * 5 + [1] * 20) * 4
    assert len(set(prompts.step.tolist())) == 4 * 21
    assert prompts.sequence.tolist() == [token // 25 for token in range(100)]


def test_environments_are_what_correlates_tokens() -> None:
    def union(trace: Trace) -> float:
        return float(np.mean([len(access.keys) for access in trace.accesses()]))

    shape = (300, 2, 64, 2)
    assert overlap(environments(*shape, episode=100)) > 2 * overlap(environments(*shape, sampler="iid"))
    one, four = (environments(*shape, batch=16, envs_per_batch=n) for n in (1, 4))
    assert union(four) > 2 * union(one)
    assert [len(set(one.sequence[one.step == step].tolist())) for step in (0, 299)] == [16, 16]
    episodes = environments(*shape, episode=100)
    assert episodes.sequences() == [0, 1, 2]


def test_uniform_routing_is_only_made_by_its_name() -> None:
    assert "CONTROL" in uniform_control(10, 1, 4, 2).info.source
    with pytest.raises(ConfigError, match="uniform_control"):
        zipf_markov(10, 1, 4, 2, skew=0, topic_skew=0, persistence=0)
    with pytest.raises(ConfigError, match="uniform_control"):
        zipf_markov(10, 1, 4, 2, skew=0, stay=0, persistence=0)
    with pytest.raises(ConfigError, match="uniform_control"):
        environments(10, 1, 4, 2, affinity=0.5, preferred=2)
    with pytest.raises(ConfigError, match="uniform_control"):
        environments(10, 1, 4, 2, preferred=4)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (zipf_markov, {"tokens": 0}, "tokens"),
        (zipf_markov, {"top_k": 5}, "top_k"),
        (zipf_markov, {"stay": 1.5}, "stay"),
        (zipf_markov, {"sequences": 11}, "sequences"),
        (environments, {"sampler": "random"}, "sampler"),
        (environments, {"envs_per_batch": 2}, "envs_per_batch"),
        (environments, {"episode": 0}, "episode"),
    ],
)
def test_bad_parameters_are_named(make: Make, arguments: dict[str, Any], message: str) -> None:
    first = "tokens" if make is zipf_markov else "steps"
    with pytest.raises(ConfigError, match=f"^{message}:"):
        make(**{first: 10, "layers": 1, "experts": 4, "top_k": 2} | arguments)
