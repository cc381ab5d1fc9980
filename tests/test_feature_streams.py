"""Sliding windows against a reference: a restart changes nothing, the budget is kept, a shift is found soon."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("frouros")

from rlhf_workbench.cli import main
from rlhf_workbench.commands.drift import drift
from rlhf_workbench.core.errors import InputError
from rlhf_workbench.core.schema import StreamState
from rlhf_workbench.monitor.feature_streams import FeatureStream, follow_values, open_stream
from rlhf_workbench.store.tables import connect


def _opened(test: str, seed: int, **how: Any) -> tuple[FeatureStream, Any]:
    rng = np.random.default_rng(seed)
    shape = () if test == "KS" else (3,)
    reference = np.round(rng.normal(size=(200, *shape)), 1)  # with ties
    return open_stream(reference, **{"window": 15, "budget": 0.01, "simulated": 400, "seed": seed} | how), (rng, shape)


@pytest.mark.parametrize("test", ["KS", "MMD"])
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), shift=st.floats(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_restart_anywhere_changes_nothing(test: str, seed: int, share: float, shift: float) -> None:
    whole, (rng, shape) = _opened(test, seed)
    part, _ = _opened(test, seed)
    values = np.round(rng.normal(size=(90, *shape)), 1) + np.where(np.arange(90) < 45, 0, shift).reshape(
        -1, *[1] * len(shape)
    )
    cut = int(share * len(values))
    expected = [whole.update(v) for v in values]
    found = [part.update(v) for v in values[:cut]]
    part = FeatureStream.from_state(json.loads(json.dumps(part.state())))
    found += [part.update(v) for v in values[cut:]]
    assert found == expected  # to the last bit
    assert part.state() == whole.state()


def test_the_state_goes_through_the_store() -> None:
    stream, (rng, _) = _opened("MMD", 0)
    for row in rng.normal(size=(20, 3)):
        stream.update(row)
    with connect(":memory:") as store:
        store.append(StreamState(stream="prompts", seen=stream.seen, state=stream.state()))
        again = FeatureStream.from_state(store.records(StreamState, stream="prompts")[0].state)
    row = rng.normal(size=3)
    assert again.update(row) == stream.update(row)


@pytest.mark.parametrize("test", ["KS", "MMD"])
def test_distances_are_those_of_frouros(test: str) -> None:
    from frouros.detectors.data_drift import IncrementalKSTest, MMDStreaming
    from frouros.utils.kernels import rbf_kernel

    stream, (rng, shape) = _opened(test, 1)
    stream.threshold = 9.0
    kernel = partial(rbf_kernel, sigma=stream.width)
    peer = IncrementalKSTest(window_size=15) if test == "KS" else MMDStreaming(window_size=15, kernel=kernel)
    peer.fit(X=stream.reference)
    for value in np.round(rng.normal(0.5, 1, size=(60, *shape)), 1):
        reading, (result, _) = stream.update(value), peer.update(value=value)
        assert (reading is None) == (result is None)
        if reading:
            assert reading.distance == pytest.approx(result.statistic if test == "KS" else result.distance, abs=1e-9)


@pytest.mark.parametrize(("test", "runs"), [("KS", 12), ("MMD", 6)])
def test_alarms_are_as_rare_as_the_budget_says_and_a_shift_is_found(test: str, runs: int) -> None:
    """Budget 1 % over `runs` streams of 300 quiet values; then the mean moves by 1.5 deviations."""
    alarms, late = 0, []
    for seed in range(runs):
        stream, (rng, shape) = _opened(test, seed, simulated=2000, window=20)
        alarms += sum(bool(r and r.is_alarm) for r in (stream.update(v) for v in rng.normal(size=(300, *shape))))
        after = [stream.update(v) for v in rng.normal(1.5, 1, size=(60, *shape))]
        late.append(next((i for i, r in enumerate(after) if r and r.is_alarm), 99))
    assert alarms <= 1.8 * 0.01 * runs * 300
    assert np.median(late) <= 25


def test_memory_does_not_grow() -> None:
    stream, (rng, _) = _opened("MMD", 3)
    sizes = []
    for i, row in enumerate(rng.normal(size=(400, 3))):
        stream.update(row)
        sizes += [sum(map(len, (stream.recent, stream.to_reference, *stream.within)))] if i % 100 == 99 else []
    assert max(sizes) <= 15 + 15 + 15 * 14 / 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, 2.0], None])
def test_a_value_of_another_kind_is_refused(value: Any) -> None:
    stream, _ = _opened("KS", 0)
    with pytest.raises(InputError, match="must be finite and of shape"):
        stream.update(value)
    assert stream.seen == 0


@pytest.mark.parametrize(
    ("reference", "how", "message"),
    [
        (range(59), {"window": 15}, "the reference has 59 values, a window of 15 needs 60"),
        ([float("nan")] * 99, {"window": 15}, "has 0 values"),
        (range(99), {"window": 4}, "a window needs 5 values"),
        (range(99), {"window": 15, "budget": 1e-5}, r"budget 0\.0001 to 1"),
        ([[1.0, 2.0]] * 98 + [[1.0]], {"window": 15}, "one length"),
    ],
)
def test_a_reference_that_does_not_do_is_refused(reference: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_stream(list(reference), **how)


def test_a_constant_reference_makes_no_noise() -> None:
    stream = open_stream(np.ones(100), window=10, budget=0.01, simulated=300)
    assert not any(r and r.is_alarm for r in (stream.update(1.0) for _ in range(100)))
    assert any(r and r.is_alarm for r in (stream.update(2.0) for _ in range(20)))


# From alarms to episodes


def test_a_change_that_lasts_is_one_episode_and_a_second_one_another() -> None:
    rng = np.random.default_rng(0)
    steps = np.repeat([0, 1.5, 0, 1.5], 300)[:, None] * [1, 0]
    stream = open_stream(rng.normal(size=(400, 2)), window=40, budget=2e-4)
    found = follow_values(rng.normal(size=(1200, 2)) + steps, stream)
    assert [300 <= e.index < 345 or 900 <= e.index < 945 for e in found] == [True, True]
    assert all(e.start == e.index - 39 for e in found)
    assert 560 <= found[0].until < 640
    assert all(e.distance > stream.threshold for e in found)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A reference and rows whose columns become alike at row 500: no column shows it alone."""
    rng = np.random.default_rng(1)
    old, new = rng.normal(size=(1600, 2)), rng.normal(size=(1000, 2))
    new[500:, 1] = 0.98 * new[500:, 0] + np.sqrt(1 - 0.98**2) * new[500:, 1]
    pd.DataFrame(old, columns=["a", "b"]).to_csv(tmp_path / "old.csv", index=False)
    pd.DataFrame(1000 * new, columns=["a", "b"]).to_csv(tmp_path / "scaled.csv", index=False)
    pd.DataFrame(new, columns=["a", "b"]).assign(word="x").to_csv(tmp_path / "new.csv", index=False)
    return tmp_path


def _said(*words: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CliRunner().invoke(drift, [*map(str, words), "--json"]).stdout)
    return found


def test_the_command_follows_rows_and_sees_what_no_column_shows(tables: Path) -> None:
    how = ["--reference", tables / "old.csv", "--window", 100, "--budget", 2e-4]
    both = _said(tables / "new.csv", *how, "--features", "a,b")
    assert (both["test"], both["features"], both["n"]) == ("MMD", ["a", "b"], 1000)
    assert [500 <= one["index"] < 600 and one["until"] > 900 for one in both["alarms"]] == [True]
    assert [_said(tables / "new.csv", *how, "--features", name)["alarms"] for name in "ab"] == [[], []]
    assert _said(tables / "scaled.csv", *how)["alarms"][0]["index"] == 99, "another scale is another distribution"


def test_rows_keep_their_numbers_when_missing_ones_are_left_out(tables: Path) -> None:
    rows = pd.read_csv(tables / "new.csv")[["a", "b"]]
    holes = pd.concat([pd.DataFrame({"a": [np.nan] * 30, "b": 0.0}), rows])
    holes.to_csv(tables / "holes.csv", index=False)
    how = ["--reference", tables / "old.csv", "--window", 50]
    whole, left = (
        _said(tables / "new.csv", *how, "--features", "a,b"),
        _said(tables / "holes.csv", *how, "--skip-missing"),
    )
    assert [one["index"] + 30 for one in whole["alarms"]] == [one["index"] for one in left["alarms"]] != []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["new.csv", "--features", "word"], "old.csv has no column word"),
        (["new.csv", "--window", "500"], "the reference has 1600 values, a window of 500 needs 2000"),
        (["words.csv"], "words.csv: a holds no numbers"),
        (["holes.csv"], "row 1 of holes.csv has no number in every column (and 0 more)"),
        (["new.csv", "--budget", "1e-6"], "a budget 0.0001 to 1"),
        (["new.csv", "--error", "a"], "give --reference, not --error"),
        (["twice.csv"], "twice.csv has more than one column 'a'"),
        (["twice.csv", "--features", "a"], "twice.csv has more than one column 'a'"),
        (
            ["vectors.npz", "--reference", "vectors.npz", "--features", "v"],
            "a column is an array (rows,), got v (2, 2)",
        ),
        (["new.csv", "--reference", "none.parquet"], "the reference has 0 values, a window of 50 needs 200"),
        (["new.csv", "--reference", "vectors.npz"], "no column in common: vectors.npz has w; new.csv has a, b, word"),
    ],
)
def test_what_cannot_be_followed_is_one_line(
    words: list[str], said: str, tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tables)
    pd.DataFrame({"a": ["x"], "b": [1.0]}).to_csv("words.csv", index=False)
    pd.DataFrame({"a": [1.0, np.nan], "b": 1.0}).to_csv("holes.csv", index=False)
    pd.DataFrame([[1.0, 2.0]], columns=["a", "a"]).to_csv("twice.csv", index=False)
    pd.DataFrame({"a": [1.0], "b": 1.0}).head(0).to_parquet("none.parquet")
    np.savez("vectors.npz", v=np.ones((2, 2)), w=np.ones(2))
    assert main(["drift", words[0], "--reference", "old.csv", "--window", "50", *words[1:]]) == 2
    assert said in capsys.readouterr().err


def test_fewer_rows_than_a_window_are_not_called_quiet(tables: Path) -> None:
    pd.read_csv(tables / "new.csv").head(20).to_csv(tables / "few.csv", index=False)
    how = [str(tables / "few.csv"), "--reference", str(tables / "old.csv"), "--window", "50"]
    assert "not enough data: 20 rows, a window needs 50" in CliRunner().invoke(drift, how).stdout
    assert _said(*how)["notes"]


def test_columns_are_those_of_both_files_whatever_their_order(tables: Path) -> None:
    how = ["--reference", tables / "old.csv", "--window", 100, "--budget", 2e-4]
    pd.read_csv(tables / "new.csv")[["word", "b", "a"]].to_csv(tables / "turned.csv", index=False)
    turned, named = _said(tables / "turned.csv", *how), _said(tables / "new.csv", *how, "--features", "a,b")
    assert turned["features"] == ["a", "b"]
    assert turned["alarms"] == named["alarms"] != []


def test_rows_and_columns_are_those_of_the_file_and_not_of_pandas(tables: Path) -> None:
    rows = pd.read_csv(tables / "new.csv")[["a", "b"]].set_axis([0, 1], axis=1)
    pd.concat([rows.tail(200), rows], ignore_index=True).iloc[200:].to_parquet(tables / "later.parquet")
    rows.set_axis([f"row {i}" for i in range(len(rows))]).to_parquet(tables / "named.parquet")
    pd.read_csv(tables / "old.csv").set_axis([0, 1], axis=1).to_csv(tables / "numbered.csv", index=False)
    how = ["--reference", tables / "numbered.csv", "--window", 100, "--budget", 2e-4]
    days = pd.date_range("2026-01-01", periods=len(rows), name="day")
    rows.set_axis(days).to_parquet(tables / "dated.parquet")
    for name in ("later.parquet", "named.parquet", "dated.parquet"):
        (alarm,) = _said(tables / name, *how)["alarms"]
        assert 500 <= alarm["index"] < 600
    for name in ("named.parquet", "dated.parquet"):
        assert _said(tables / name, "--reference", tables / name, "--window", 100)["features"] == ["0", "1"]


def test_numbers_whose_squares_are_infinite_are_followed_too(tables: Path) -> None:
    for name in ("old.csv", "scaled.csv"):
        (pd.read_csv(tables / name) * 1e200).to_csv(tables / f"large-{name}", index=False)
    how = [tables / "large-scaled.csv", "--reference", tables / "large-old.csv", "--window", 100]
    assert _said(*how)["alarms"][0]["index"] == 99
