"""Streams: what a detector remembers is small and JSON, portions do not matter, and false alarms keep their budget."""

import json
import random
import subprocess
import sys
import time
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
from rlhf_workbench.core.errors import InputError, StateError
from rlhf_workbench.core.schema import Alert, DriftEvent, Observation, StreamState, correction
from rlhf_workbench.monitor.accuracy import Score, prequential_errors, score_alarms, simulate_stream
from rlhf_workbench.monitor.backtest import backtest_stream, scan_values
from rlhf_workbench.monitor.budget import calibrate_threshold, false_alarm_rate, independence_p, threshold_for
from rlhf_workbench.monitor.confirmation import ChangeWatch, Notice, find_changes, second_opinions
from rlhf_workbench.monitor.detectors import SETTINGS, StreamDetector
from rlhf_workbench.monitor.likelihood import Stretch, split_evidence
from rlhf_workbench.monitor.observation_watch import ObservationWatch
from rlhf_workbench.monitor.observations import ObservedStream, watch_observations
from rlhf_workbench.monitor.states import freeze, thaw
from rlhf_workbench.monitor.strictness import DIALS, allowed_alarms, calibrate_detector, quiet_stream, simulated_values
from rlhf_workbench.store.tables import Store, connect

DATA = Path(__file__).parent.parent.parent / "shared/data/drift"
SLOW = {"BOCD", "KSWIN"}


def _json(state: dict) -> dict:
    return json.loads(json.dumps(state, allow_nan=False))


def _errors(seed: int, *parts: tuple[float, int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.random(n) < rate for rate, n in parts]).astype(float)


# One interface


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), rates=st.tuples(st.floats(0, 0.4), st.floats(0.3, 1)))
def test_cut_anywhere_saved_and_restored_gives_the_same_alarms(
    name: str, seed: int, share: float, rates: tuple[float, float]
) -> None:
    n = 130 if name in SLOW else 400
    stream = _errors(seed, (rates[0], n), (rates[1], n // 2))
    cut = int(share * len(stream))
    whole, part, again = StreamDetector(name), StreamDetector(name), StreamDetector(name)
    expected = [whole.update(v) for v in stream]
    found = [part.update(v) for v in stream[:cut]]
    again.restore(_json(part.state()))
    assert found + [again.update(v) for v in stream[cut:]] == expected
    assert again.state() == whole.state()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_state_does_not_grow_with_the_stream(name: str) -> None:
    lengths = (250, 500) if name in SLOW else (8000, 16000) if name == "RDDM" else (1000, 4000)
    stream, detector, sizes = _errors(0, (0.1, lengths[1])), StreamDetector(name), []
    for i, value in enumerate(stream, 1):
        detector.update(value)
        if i in lengths:
            sizes.append(len(json.dumps(detector.state())))
    assert sizes[1] < 1.5 * sizes[0] + 200


def test_a_detector_that_draws_leaves_the_draws_of_others_alone() -> None:
    np.random.seed(1)  # noqa: NPY002
    expected = np.random.random(3).tolist()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    detector = StreamDetector("KSWIN")
    for value in _errors(0, (0.5, 110)):
        detector.update(value)
    assert np.random.random(3).tolist() == expected  # noqa: NPY002


def test_a_state_of_another_detector_is_refused() -> None:
    with pytest.raises(InputError, match="this is a state of 'DDM', not of 'CUSUM'"):
        StreamDetector("CUSUM").restore(StreamDetector("DDM").state())


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    )
)
def test_thaw_gives_back_what_was_frozen(value: object) -> None:
    assert thaw(_json({"v": freeze(value)})["v"]) == value


@pytest.mark.parametrize(
    "kept", [{"part": "Popen", "fields": {}}, {"array": [1], "shape": [3], "dtype": "f8"}, {"x": 1}]
)
def test_what_is_no_state_is_refused(kept: dict) -> None:
    with pytest.raises(InputError, match="no state of a detector"):
        thaw(kept)


# Evidence and budget


def test_evidence_is_the_likelihood_ratio_computed_by_hand() -> None:
    x = _errors(1, (0.2, 60), (0.6, 40))
    rates = x[:60].mean(), x[60:].mean(), x.mean()

    def fit(part: np.ndarray, rate: float) -> float:
        return float((part * np.log(rate) + (1 - part) * np.log(1 - rate)).sum())

    expected = fit(x[:60], rates[0]) + fit(x[60:], rates[1]) - fit(x, rates[2])
    sums = [(len(part), part.sum(), part.sum()) for part in (x[:60], x[60:])]
    assert split_evidence("errors", *sums) == pytest.approx(expected)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 600), min_size=1, max_size=4))
def test_portions_do_not_change_the_evidence(seed: int, sizes: list[int]) -> None:
    values = np.round(np.random.default_rng(seed).normal(size=sum(sizes)) * 1024) / 1024
    for kind, stream in (("scores", values), ("errors", (values > 1).astype(float))):
        whole, parts, at = Stretch(kind).evidence(stream), Stretch(kind), 0
        for size in sizes:
            part = stream[at : at + size]
            assert np.array_equal(parts.evidence(part), whole[at : at + size])
            parts.extend(part)
            at += size


def test_a_smaller_budget_demands_more_evidence() -> None:
    thresholds = [threshold_for(b) for b in (1e-2, 1e-3, 1e-4, 1e-6)]
    assert thresholds == sorted(thresholds)
    assert [false_alarm_rate(t) for t in thresholds] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-6])


def test_errors_in_bursts_need_a_reference_and_then_keep_the_budget() -> None:
    rng = np.random.default_rng(0)
    bursts = np.repeat((rng.random(1500) < 0.1).astype(float), 4)
    free, _ = find_changes(bursts)
    calibrated, _ = find_changes(bursts, ChangeWatch(reference=bursts[:1500]))
    assert len(free) > 3 * max(1, len(calibrated))
    assert calibrate_threshold(bursts[:1500], "errors", 1e-4) > threshold_for(1e-4) + 3


@pytest.mark.parametrize("rate", [0.03, 0.3])
def test_no_more_false_alarms_than_the_budget_says(rate: float) -> None:
    """Ten streams of 10,000 at ten times the usual budget: at most 100 alarms are allowed, about 20 are expected."""
    found = [
        find_changes(simulate_stream("none", seed, levels=(rate,) * 4).errors, ChangeWatch(budget=1e-3, k=1))[0]
        for seed in range(10)
    ]
    assert 1 <= sum(map(len, found)) <= 50


# The watch


def _notices(watch: ChangeWatch, stream: np.ndarray, cuts: list[int]) -> list[Notice]:
    found = []
    for part in np.split(stream, cuts):
        found += watch.take(part) if len(part) else []
        state = _json(watch.state())
        fresh = ChangeWatch(watch.kind, reference=np.arange(60.0) if watch.kind == "scores" else None)
        fresh.restore(state)
        watch = fresh
    return found


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 1800), max_size=3).map(sorted))
def test_a_watch_cut_anywhere_says_the_same(seed: int, cuts: list[int]) -> None:
    errors = _errors(seed, (0.1, 700), (0.4, 500), (0.1, 600))
    assert _notices(ChangeWatch(), errors, cuts) == ChangeWatch().take(errors)
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(0, 1, 700), rng.normal(1, 2, 600)])
    watches = [ChangeWatch("scores", reference=scores[:300]) for _ in range(2)]
    assert _notices(watches[0], scores, cuts) == watches[1].take(scores)


def test_one_value_at_a_time_is_the_same_as_all_at_once() -> None:
    errors = _errors(3, (0.1, 400), (0.6, 200))
    watch = ChangeWatch()
    assert [n for v in errors for n in watch.take(v)] == ChangeWatch().take(errors)


@pytest.mark.parametrize("seed", range(4))
def test_a_fall_is_found_like_a_rise(seed: int) -> None:
    errors = _errors(seed, (0.2, 1500), (0.5, 800))
    rises, falls = (find_changes(stream)[0] for stream in (errors, 1 - errors))
    assert [a.index for a in rises] == [a.index for a in falls]
    assert {a.direction for a in rises} == {"rise"}
    assert {a.direction for a in falls} == {"fall"}


def test_a_gradual_change_raises_one_alarm() -> None:
    for seed in range(5):
        stream = simulate_stream("gradual", seed, levels=(0.1, 0.5), segment=2500, width=1000)
        alarms, _ = find_changes(stream.errors, ChangeWatch(k=1))
        assert len([a for a in alarms if a.index >= 2500 and a.direction == "rise"]) == 1


def test_a_model_that_learns_again_is_a_recovery_and_no_second_alarm() -> None:
    alarms, _ = find_changes(_errors(1, (0.1, 1500), (0.7, 150), (0.1, 1000)))
    assert len(alarms) == 1
    assert alarms[0].recovered is not None
    assert alarms[0].settled is None


def test_confirmation_asks_for_company() -> None:
    errors = _errors(0, (0.1, 800), (0.3, 300))
    alone, company = (find_changes(errors, ChangeWatch(k=k))[0] for k in (1, 4))
    assert alone[0].detectors == ("likelihood",)
    assert len(company[0].detectors) >= 4
    assert company[0].index >= alone[0].index
    assert second_opinions(_errors(0, (0.1, 300), (0.9, 60)), 300)


def test_accuracy_on_streams_with_known_changes() -> None:
    totals = {}
    for shape in ("abrupt", "gradual"):
        total = Score()
        for seed in range(200, 205):
            stream = simulate_stream(shape, seed)
            total += score_alarms(
                [a.index for a in find_changes(stream.errors, ChangeWatch(k=1))[0]], stream.changes, 500
            )
        totals[shape] = total
    assert min(total.f1 for total in totals.values()) > 0.9


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_stream_raises_nothing(value: float) -> None:
    assert find_changes([value] * 3000) == ([], [])


def test_what_cannot_be_watched_is_refused() -> None:
    with pytest.raises(InputError, match="value 3 is 2"):
        ChangeWatch().take([0, 1, 0, 2])
    with pytest.raises(InputError, match="scores need a reference"):
        ChangeWatch("scores")
    with pytest.raises(InputError, match="k from 1 to 6"):
        ChangeWatch(k=7)
    with pytest.raises(InputError, match="not enough data: 59 values"):
        find_changes([0.0] * 59)
    watch = ChangeWatch()
    with pytest.raises(InputError):
        watch.take([0, np.nan])
    assert watch.seen == 0


# Backtest, files and the command


def test_backtest_says_how_often_each_setting_would_have_fired() -> None:
    stream = simulate_stream("abrupt", 3).errors
    table = backtest_stream(stream, [{}, {"budget": 1e-6}, {"detector": "CUSUM"}], quiet=2500)
    assert table["fired"].tolist() == [len(places) for places in table["fired_at"]]
    assert table["expected_false"].tolist() == pytest.approx([0.2, 0.002, 1.0])
    single = StreamDetector("CUSUM", **scan_values(stream, "CUSUM").settings)
    assert table["fired_at"][2] == [i for i, v in enumerate(stream) if single.update(v)]


def _said(*words: str) -> dict:
    result = CliRunner().invoke(drift, [*words, "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl", "npz"])
def test_the_command_reads_every_format(suffix: str, tmp_path: Path) -> None:
    errors = _errors(0, (0.1, 600), (0.5, 200))
    path, table = tmp_path / f"x.{suffix}", pd.DataFrame({"wrong": errors.astype(int)})
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        np.savez(path, wrong=errors > 0)
    facts = _said(str(path), "--error", "wrong")
    (alarm,) = facts["alarms"]
    assert 600 <= alarm["index"] < 640
    assert abs(alarm["start"] - 600) < 20
    assert (alarm["direction"], alarm["improvement"], facts["kind"]) == ("rise", False, "errors")
    assert {"severity", "p", "detectors", "settled", "recovered"} < set(alarm)


def test_rows_are_those_of_the_file_when_missing_ones_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    errors = _errors(0, (0.1, 600), (0.6, 200))
    holes = np.insert(errors, np.zeros(100, dtype=int), np.nan)
    path = tmp_path / "x.parquet"
    pd.DataFrame({"wrong": holes}).to_parquet(path)
    assert main(["drift", str(path), "--error", "wrong"]) == 2
    assert "row 0 of column wrong is nan (and 99 more" in capsys.readouterr().err
    facts = _said(str(path), "--error", "wrong", "--skip-missing")
    assert (facts["missing"], facts["n"]) == (100, 800)
    assert 700 <= facts["alarms"][0]["index"] < 740


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--error", "right"], "has no column right"),
        (["--error", "text"], "is not numeric"),
        (["--error", "wrong", "--time", "at"], "time runs backwards at row 3"),
        (["--error", "short", "--detector", "CUSUM", "--skip-missing"], "this does not mean no drift"),
        (["--error", "score", "--reference-rows", "500"], "not enough data: 300 values with a reference of 500"),
        (["--error", "score", "--detector", "CUSUM"], "needs values from 0 to 1"),
        (["--error", "wrong", "--budget", "2"], "1e-4 is one in 10,000"),
        (["--error", "wrong", "--detector", "CUSUMM"], "there is no detector 'CUSUMM'"),
        ([], "nothing to look for"),
    ],
)
def test_bad_input_is_one_clear_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, n = tmp_path / "x.csv", 300
    at = np.arange(n)
    at[3] = 0
    table = pd.DataFrame({"wrong": _errors(0, (0.2, n)).astype(int), "text": "no", "at": at})
    table["score"], table["short"] = np.random.default_rng(0).normal(size=n), np.where(at < 20, 1.0, np.nan)
    table.to_csv(path, index=False)
    assert main(["drift", str(path), *words]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_scores_are_put_on_the_scale_of_the_reference(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.lognormal(0, 1, 1500), rng.lognormal(0.6, 1, 600)])
    path = tmp_path / "x.npz"
    np.savez(path, seconds=scores)
    facts = _said(str(path), "--error", "seconds", "--reference-rows", "800")
    assert facts["kind"] == "scores"
    assert [1500 <= a["index"] < 1700 for a in facts["alarms"]] == [True]
    np.savez(tmp_path / "quiet.npz", seconds=scores[:1000])
    apart = _said(str(path), "--error", "seconds", "--reference", str(tmp_path / "quiet.npz"))
    assert [a["direction"] for a in apart["alarms"]] == ["rise"]


def test_two_tables_are_compared(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old = pd.DataFrame({"length": rng.normal(size=300), "topic": rng.choice(["a", "b"], 300)})
    old.to_csv(tmp_path / "old.csv", index=False)
    old.assign(length=old["length"] + 1).to_csv(tmp_path / "new.csv", index=False)
    facts = _said(str(tmp_path / "new.csv"), "--reference", str(tmp_path / "old.csv"))
    assert facts["drifted"] == ["length"]


# Single detectors keep a budget


@pytest.mark.parametrize(("name", "rate"), [("CUSUM", 0.05), ("GMA", 0.2), ("HDDM-A", 0.2)])
def test_a_calibrated_detector_keeps_the_budget_on_quiet_streams(name: str, rate: float) -> None:
    """At one in 1,000, with three references: 24 alarms in 24,000 values are allowed."""
    n = 0
    for seed in range(3):
        settings = calibrate_detector(name, _errors(seed, (rate, 500)), 1e-3, length=1000, seed=seed)
        for other in range(8):
            detector = StreamDetector(name, **settings)
            n += sum(detector.update(v) for v in _errors(1000 + 10 * seed + other, (rate, 1000)))
    assert n <= 24


def test_a_calibrated_detector_keeps_the_budget_where_errors_come_in_bursts() -> None:
    def bursts(seed: int, n: int) -> np.ndarray:
        return np.repeat(_errors(seed, (0.1, n // 5)), 5)

    n = {"calibrated": 0, "as if one by one": 0}
    for seed in range(2):
        reference = bursts(seed, 1500)
        mixed = np.random.default_rng(seed).permutation(reference)
        for label, values in zip(n, (reference, mixed), strict=True):
            settings = calibrate_detector("CUSUM", values, 1e-3, length=1000, seed=seed)
            detector = StreamDetector("CUSUM", **settings)
            n[label] += sum(detector.update(v) for v in bursts(100 + seed, 5000))
    assert n["calibrated"] <= 10 < n["as if one by one"], "the budget allows 10"


@pytest.mark.parametrize("name", ["CUSUM", "HDDM-A", "STEPD"])
def test_a_clear_step_is_found_at_one_in_ten_thousand(name: str) -> None:
    errors = _errors(3, (0.1, 1500), (0.5, 300))
    found = scan_values(errors, name)
    assert [1500 <= a.index < 1600 for a in found.alarms] == [True]
    assert found.alarms[0].direction == "rise"
    assert found.expected_false == pytest.approx(0.18)


@settings(max_examples=20, deadline=None)
@given(st.integers(1000, 300_000), st.floats(1e-5, 1e-2))
def test_the_allowed_alarms_are_those_of_the_exact_poisson_bound(n: int, budget: float) -> None:
    from scipy.stats import poisson

    allowed = allowed_alarms(n, budget)
    assert poisson.cdf(allowed + 1, n * budget) > 0.05
    assert allowed < 0 or poisson.cdf(allowed, n * budget) <= 0.05 * (1 + 1e-9)


@pytest.mark.parametrize("name", DIALS)
def test_the_rungs_of_a_dial_go_from_loose_to_strict(name: str) -> None:
    dial, rungs = DIALS[name]
    stream = quiet_stream(_errors(0, (0.2, 400)), 600, np.random.default_rng(1)).tolist()
    counts = []
    for rung in (rungs[0], rungs[len(rungs) // 3], rungs[-1]):
        detector = StreamDetector(name, **{dial: rung})
        counts.append(sum(detector.update(value) for value in stream))
    assert counts == sorted(counts, reverse=True)
    assert list(rungs) == sorted(rungs, reverse=rungs[0] > rungs[-1])


def test_the_command_says_which_settings_keep_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, wrong=_errors(0, (0.1, 900), (0.5, 200)))
    strict, loose = (
        _said(str(path), "--error", "wrong", "--detector", "CUSUM", "--budget", b) for b in ("1e-4", "1e-2")
    )
    assert strict["settings"]["lambda_"] > loose["settings"]["lambda_"]
    assert (strict["expected_false_alarms"], loose["expected_false_alarms"]) == pytest.approx((0.11, 11))
    assert "drawn from the first 500 values" in strict["notes"][0]
    rows = _said(str(path), "--error", "wrong", "--detector", "CUSUM", "--reference-rows", "900")
    assert "the first 900 values" in rows["notes"][0]
    other = _said(str(path), "--error", "wrong", "--detector", "CUSUM", "--reference", str(path))
    assert "the 1100 values of the reference" in other["notes"][0]
    for words in (["--detector", "ECDD-WT"], ["--detector", "CUSUM", "--reference-rows", "0"]):
        none = _said(str(path), "--error", "wrong", *words)
        assert (none["settings"], none["expected_false_alarms"]) == ({}, None)
        assert "no budget is promised" in none["notes"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "1e-6"], "needs 2,995,733 simulated values, and at most 300,000 are run; take the detector auto"),
        (["--budget", "0.5"], "1e-4 is one in 10,000"),
        (["--reference-rows", "150"], "the reference has 150 values, needs 200; widen"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.savez(tmp_path / "x.npz", wrong=_errors(0, (0.1, 900)))
    assert main(["drift", str(tmp_path / "x.npz"), "--error", "wrong", "--detector", "CUSUM", *words]) == 2
    assert said in capsys.readouterr().err


def test_what_teaches_nothing_promises_nothing() -> None:
    quiet = np.zeros(600)
    assert "all of them are 0" in scan_values(quiet, "CUSUM").notes[0]
    assert "100 values are too few" in scan_values(_errors(0, (0.1, 100)), "CUSUM").notes[0]
    with pytest.raises(InputError, match="all 300 values of the reference are 0"):
        scan_values(quiet, "CUSUM", reference=300)
    rare = _errors(0, (0.02, 1000))
    with pytest.raises(StateError, match="DDM fires more often"):
        calibrate_detector("DDM", rare, 1e-4)
    found = scan_values(rare, "DDM")
    assert (found.expected_false, found.settings) == (None, {})
    assert "no budget is promised for DDM, which keeps its settings: DDM fires more often" in found.notes[0]
    assert simulated_values(1e-2) == 20_000


# The store

_WATCH = """
import sys
from rlhf_workbench.monitor.observations import watch_observations
from rlhf_workbench.store.tables import connect
with connect(sys.argv[1]) as store:
    for _ in range(5):
        print(watch_observations(store, "reward").new)
"""


def test_two_processes_watch_every_value_once(tmp_path: Path) -> None:
    path, errors = tmp_path / "w.duckdb", _errors(0, (0.1, 600), (0.5, 400))
    with connect(path) as store:
        store.append([Observation(stream="reward", value=v) for v in errors])
    runs = [subprocess.Popen([sys.executable, "-c", _WATCH, str(path)], stdout=subprocess.PIPE) for _ in range(2)]
    new = [int(line) for run in runs for line in run.communicate(timeout=120)[0].split()]
    assert sum(new) == 1000
    with connect(path) as store:
        alarms = store.records(DriftEvent, is_confirmed=True)
        assert [600 <= a.index < 640 for a in alarms] == [True]
        assert [s.seen for s in store.records(StreamState)] == [1000]


def test_values_one_by_one_in_the_store_give_the_events_of_all_at_once() -> None:
    errors = _errors(1, (0.1, 210), (0.9, 30))
    with connect(":memory:") as one, connect(":memory:") as other:
        for value in errors:
            one.append(Observation(stream="s", value=value))
            watch_observations(one, "s")
        other.append([Observation(stream="s", value=v) for v in errors])
        watch_observations(other, "s")
        found = [[(e.index, e.detector, e.is_confirmed) for e in s.records(DriftEvent)] for s in (one, other)]
    assert found[0] == found[1]
    assert any(confirmed for _, _, confirmed in found[0])


def test_what_cannot_be_watched_is_skipped_and_counted() -> None:
    at = pd.Timestamp("2026-01-01", tz="UTC").to_pydatetime()
    with connect(":memory:") as store:
        rows = [Observation(stream="s", value=v, happened_at=at) for v in (0.0, 0.5, 1.0)]
        late = Observation(stream="s", value=1.0, happened_at=at.replace(year=2025))
        store.append([*rows, late, Observation(stream="other", value=1.0)])
        found = watch_observations(store, "s")
        assert (found.seen, found.new, found.skipped, found.late) == (4, 4, 1, 1)


def test_new_settings_begin_with_the_next_value() -> None:
    errors = _errors(0, (0.1, 600), (0.6, 200))
    with connect(":memory:") as store:
        store.append([Observation(stream="s", value=v) for v in errors])
        watch_observations(store, "s")
        store.append([Observation(stream="s", value=v) for v in errors])
        watch_observations(store, "s", budget=1e-5)
        alarms = [e.index for e in store.records(DriftEvent, is_confirmed=True)]
    assert [600 <= i < 640 or 1400 <= i < 1440 for i in alarms] == [True, True]


# What is remembered of a stream is kept now and then only


def _told(store: Store) -> list[tuple[Any, ...]]:
    """What the events of a store say, without ids and moments."""
    return [
        (e.index, e.detector, e.is_confirmed, e.severity, e.p_value, e.metadata)
        for e in sorted(store.records(DriftEvent), key=lambda e: (e.index, e.is_confirmed))
    ]


def _in_one_pass(values: np.ndarray, kind: str) -> list[tuple[Any, ...]]:
    with connect(":memory:") as store:
        store.append([Observation(stream="s", value=v) for v in values])
        watch_observations(store, "s", kind=kind)
        return _told(store)


def _moving(kind: str, seed: int) -> np.ndarray:
    """3,600 values whose level rises, falls, and rises for a moment."""
    if kind == "errors":
        return _errors(seed, (0.1, 1300), (0.5, 900), (0.1, 700), (0.8, 120), (0.1, 580))
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(m, 1, n) for m, n in ((0, 1300), (1, 900), (-0.5, 700), (2, 120), (0, 580))])


@pytest.mark.parametrize("kind", ["errors", "scores"])
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10_000), turns=st.lists(st.sampled_from("aabbxyk"), min_size=12, max_size=30))
def test_two_watches_that_are_killed_anywhere_say_what_one_pass_says(kind: str, seed: int, turns: list[str]) -> None:
    """a and b look; x and y are killed and begin again; k ends well and begins again."""
    values, heard = _moving(kind, seed), []
    with connect(":memory:") as store:
        watches = {name: ObservedStream(store, "s", kind=kind) for name in "ab"}
        for part, turn in zip(np.array_split(values, len(turns)), turns, strict=True):
            store.append([Observation(stream="s", value=v) for v in part])
            if turn == "k":
                watches["a"].keep()
            if turn in "xyk":
                watches["b" if turn == "y" else "a"] = ObservedStream(store, "s", kind=kind)
            else:
                watches[turn].look(heard.append)
        for watch in watches.values():
            watch.look(heard.append)
            watch.keep()
        assert _told(store) == _in_one_pass(values, kind)
        assert len({e.id for e in heard}) == len(heard)
        assert sorted(e.index for e in heard) == [e.index for e in store.records(DriftEvent, is_confirmed=True)]
        assert [s.seen for s in store.records(StreamState)] == [len(values)]
        assert watch_observations(store, "s", kind=kind).new == 0
        assert store.verify().is_intact


@pytest.mark.parametrize(("kind", "most"), [("errors", 3_000), ("scores", 45_000)])
def test_a_silent_stream_is_written_down_once_in_a_thousand_values(kind: str, most: int) -> None:
    n = 3000
    values = _errors(3, (0.1, n)) if kind == "errors" else np.random.default_rng(0).normal(size=n)
    with connect(":memory:") as store:
        watch = ObservationWatch(store)
        for part in np.array_split(values, 100):
            store.append([Observation(stream="s", value=v) for v in part])
            watch.look()
        assert not store.records(DriftEvent)
        assert store.counts()["stream_state"] in (n // 1000 - 1, n // 1000)
        watch.stop()
        kept = store.sql("SELECT seen, length(state::VARCHAR) AS size FROM stream_state ORDER BY audit_seq")
        assert kept["size"].sum() <= (n // 1000 + 1) * most
        assert kept["seen"].iloc[-1] == n
        assert [s.seen for s in store.records(StreamState)] == [n], "the newest one is the current one"


def test_an_alarm_and_its_alert_happen_together_or_not_at_all() -> None:
    values, failures = _errors(0, (0.1, 600), (0.5, 400)), [OSError("disk full")]

    def hear(event: DriftEvent) -> None:
        store.append(Alert(severity="warning", title="changed", source_id=event.id))
        if failures:
            raise failures.pop()

    with connect(":memory:") as store:
        store.append([Observation(stream="s", value=v) for v in values[:500]])
        watch = ObservationWatch(store, hear=hear)
        assert watch.look() == 500
        store.append([Observation(stream="s", value=v) for v in values[500:-1]])
        assert watch.look() == 0, "logged, and taken back"
        assert "alert" not in store.counts()
        assert "drift_event" not in store.counts()
        store.append(Observation(stream="s", value=values[-1]))
        watch.look()
        assert [a.source_id for a in store.records(Alert)] == [
            e.id for e in store.sql("SELECT id FROM drift_event WHERE is_confirmed AND replaces IS NULL").itertuples()
        ]
        assert len(store.records(Alert)) == 1
        assert _told(store) == _in_one_pass(values, "errors")


def test_a_look_that_failed_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _errors(0, (0.1, 600), (0.5, 400))
    with connect(":memory:") as store:
        watch = ObservedStream(store, "s")
        for start, end in ((0, 550), (550, 800), (800, 1000)):
            store.append([Observation(stream="s", value=v) for v in values[start:end]])
            with monkeypatch.context() as broken:
                broken.setattr(ChangeWatch, "take", lambda self, values: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    watch.look()
            assert watch.look().seen == end
        assert _told(store) == _in_one_pass(values, "errors")


def test_who_stops_late_does_not_put_an_older_memory_over_a_newer_one() -> None:
    values = _errors(0, (0.1, 600), (0.5, 400))
    with connect(":memory:") as store:
        late, other = ObservedStream(store, "s"), ObservedStream(store, "s")
        store.append([Observation(stream="s", value=v) for v in values[:500]])
        assert late.look().seen == 500
        store.append([Observation(stream="s", value=v) for v in values[500:]])
        assert other.look().events
        late.keep()
        assert [s.seen for s in store.records(StreamState)] == [1000]
        watch_observations(store, "s")
        assert _told(store) == _in_one_pass(values, "errors")


def test_a_stream_that_was_forgotten_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_workbench.monitor.observation_watch._MOST_STREAMS", 1)
    values = _errors(0, (0.1, 600), (0.5, 400))
    with connect(":memory:") as store:
        watch = ObservationWatch(store)
        for part in np.array_split(values, 12):
            store.append([Observation(stream=name, value=v) for v in part for name in ("s", "t")])
            watch.look()
        expected = [row[0] for row in _in_one_pass(values, "errors")]
        for stream in ("s", "t"):
            assert [e.index for e in store.records(DriftEvent, stream=stream)] == expected


_SERVE = """
import sys, time
from rlhf_workbench.govern.alerts import raise_alert
from rlhf_workbench.monitor.observation_watch import ObservationWatch
from rlhf_workbench.store.tables import connect
with connect(sys.argv[1]) as store:
    ObservationWatch(store, hear=lambda e: raise_alert(store, "warning", "changed", source_id=e.id)).start()
    print("started", flush=True)
    time.sleep(100)
"""


@pytest.mark.server
def test_two_services_of_which_one_is_killed_again_and_again_raise_each_alert_once(tmp_path: Path) -> None:
    path, values, draw = tmp_path / "s.duckdb", _errors(5, (0.1, 800), (0.5, 600), (0.1, 600)), random.Random(3)

    def start() -> "subprocess.Popen[str]":
        service = subprocess.Popen([sys.executable, "-c", _SERVE, str(path)], stdout=-1, text=True)
        assert service.stdout
        assert service.stdout.readline() == "started\n"
        return service

    with connect(path) as store:
        services = [start(), start()]
        try:
            for i, part in enumerate(np.array_split(values, 100)):
                store.append([Observation(stream="s", value=v) for v in part])
                time.sleep(draw.uniform(0, 0.06))
                if i % 20 == 19:
                    place = draw.randrange(2)
                    services[place].kill()
                    services[place].communicate()
                    services[place] = start()
            time.sleep(1)
        finally:
            for service in services:
                service.kill()
                service.communicate()
        watch_observations(store, "s")
        assert _told(store) == _in_one_pass(values, "errors")
        alarms = store.sql("SELECT id FROM drift_event WHERE is_confirmed AND replaces IS NULL ORDER BY id")["id"]
        assert len(alarms) >= 2
        assert [a.source_id for a in store.records(Alert)] == alarms.tolist()
        assert store.verify().is_intact


# What is promised, and what is said about it


def _bursts(seed: int, n: int, run: int = 4) -> np.ndarray:
    return np.repeat(_errors(seed, (0.1, n // run)), run)


def test_where_errors_come_in_bursts_what_the_output_promises_is_kept(tmp_path: Path) -> None:
    """Six quiet streams of 10,000: without what is learnt from them there are 40 to 90 alarms."""
    promised = fired = 0.0
    for seed in range(6):
        found = scan_values(_bursts(seed, 10_000))
        assert found.expected_false is not None
        assert found.is_most
        promised, fired = promised + found.expected_false, fired + len(found.alarms)
    assert fired <= promised == pytest.approx(6)
    np.savez(tmp_path / "x.npz", wrong=_bursts(0, 10_000))
    facts = _said(str(tmp_path / "x.npz"), "--error", "wrong")
    assert "the threshold was learnt from the 1500 values of the quiet period" in facts["notes"][0]
    careless = _said(str(tmp_path / "x.npz"), "--error", "wrong", "--reference-rows", "0")
    assert len(careless["alarms"]) > 5 * max(1, len(facts["alarms"]))
    assert careless["expected_false_alarms"] is None
    assert "no budget is promised: values depend" in careless["notes"][0]


def test_errors_that_come_one_by_one_are_judged_as_before(tmp_path: Path) -> None:
    for seed in range(5):
        stream = simulate_stream("abrupt", seed).errors
        usual, free = scan_values(stream), scan_values(stream, reference=0)
        assert (usual, usual.notes) == (free, ())
        assert find_changes(stream, ChangeWatch(learns=True)) == find_changes(stream, ChangeWatch())


def test_a_step_among_the_first_values_is_not_taken_for_dependence() -> None:
    found = scan_values(_errors(0, (0.1, 300), (0.5, 700)))
    assert [300 <= a.index < 340 for a in found.alarms] == [True]
    assert independence_p(_errors(0, (0.1, 300), (0.5, 200))) > 0.01 > independence_p(_bursts(0, 500))


@pytest.mark.parametrize("cut", [1, 199, 200, 350, 500, 1200, 1500, 1600])
def test_a_watch_that_learns_remembers_what_it_has_learnt(cut: int) -> None:
    stream = np.concatenate([_bursts(1, 2000, 3), _errors(2, (0.9, 200))])
    whole, part, again = ChangeWatch(learns=True), ChangeWatch(learns=True), ChangeWatch(learns=True)
    expected = whole.take(stream)
    first = part.take(stream[:cut])
    again.restore(_json(part.state()))
    assert first + again.take(stream[cut:]) == expected
    assert again.state() == whole.state()
    assert again.demand.alarm_at > ChangeWatch().demand.alarm_at + 3
    assert again.demand.alarm_rate == again.demand.budget


@pytest.mark.parametrize("run", [4, 8])
def test_a_watch_that_learns_keeps_the_budget(run: int) -> None:
    """Six quiet streams of 10,000 in bursts, six false alarms allowed: one that does not learn raises 40 and more."""
    streams = [_bursts(seed, 10_000, run) for seed in range(6)]
    fired = [len(find_changes(stream, ChangeWatch(learns=True))[0]) for stream in streams]
    assert sum(fired) <= 6
    assert len(find_changes(streams[0], ChangeWatch())[0]) > 3


def test_before_it_is_known_how_errors_come_there_are_warnings_and_no_alarm() -> None:
    step, late = _errors(1, (0.1, 90), (0.9, 200)), _errors(1, (0.1, 400), (0.9, 200))
    notices = ChangeWatch(learns=True).take(step)
    assert [(n.event, n.change.index < 120) for n in notices] == [("warning", True), ("alarm", False)]
    alarm = notices[1].change
    assert (alarm.index, alarm.direction) == (200, "rise")
    assert 85 <= alarm.start <= 92
    assert [c.index < 420 for c in find_changes(late, ChangeWatch(learns=True))[0]] == [True]


def test_the_service_learns_how_errors_come() -> None:
    values = _bursts(0, 6000)
    with connect(":memory:") as store:
        watch = ObservationWatch(store)
        for part in np.array_split(values, 9):
            store.append([Observation(stream="s", value=v) for v in part])
            watch.look()
        fired = len(store.records(DriftEvent, is_confirmed=True))
        assert _told(store) == _in_one_pass(values, "errors")
    assert len(find_changes(values)[0]) >= 4 * max(1, fired)


def test_a_stream_that_was_kept_before_watches_learnt_begins_to_learn() -> None:
    values = _bursts(0, 8000, 8)
    with connect(":memory:") as store:
        store.append([Observation(stream="s", value=v) for v in values[:1000]])
        watch_observations(store, "s")
        (kept,) = store.records(StreamState)
        older = {
            name: v for name, v in kept.state["watch"].items() if name not in ("is_dependent", "may_alarm", "first")
        }
        older["thresholds"] = ChangeWatch().state()["thresholds"]
        store.append(correction(kept, state=kept.state | {"watch": older}))
        store.append([Observation(stream="s", value=v) for v in values[1000:]])
        watch_observations(store, "s")
        state = store.records(StreamState)[-1].state["watch"]
    assert state["is_dependent"]
    assert state["thresholds"][1] > ChangeWatch().demand.alarm_at + 3


def test_it_is_said_how_many_errors_are_missing() -> None:
    with connect(":memory:") as store:
        for n, needed in ((150, 50), (49, 1), (1, 0)):
            store.append([Observation(stream="s", value=v) for v in _errors(n, (0.1, n))])
            assert watch_observations(store, "s").needed == needed


@pytest.mark.parametrize(("words", "n"), [(["--reference-rows", "150"], 150), (["--reference", "few.npz"], 10)])
def test_a_reference_too_short_to_learn_from_is_refused(
    words: list[str], n: int, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", wrong=_errors(0, (0.1, 900)))
    np.savez("few.npz", wrong=_errors(0, (0.5, 10)))
    assert main(["drift", "x.npz", "--error", "wrong", *words]) == 2
    assert f"the reference has {n} values, needs 200" in capsys.readouterr().err
    with connect(":memory:") as store, pytest.raises(InputError, match="has 150 values, needs 200"):
        ObservedStream(store, "s", reference=150)


def test_a_short_reference_of_scores_says_what_it_is_not_enough_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", score=np.random.default_rng(0).normal(size=900))
    facts = _said(str(tmp_path / "x.npz"), "--error", "score", "--reference-rows", "150")
    assert "the 150 values of the reference are enough for a scale and too few" in facts["notes"][0]


def test_the_smallest_and_the_largest_budget_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.savez(tmp_path / "x.npz", wrong=_errors(0, (0.1, 900), (0.9, 300)))
    for budget in ("1e-9", "0.01"):
        assert len(_said(str(tmp_path / "x.npz"), "--error", "wrong", "--budget", budget)["alarms"]) >= 1
    for budget in ("9e-10", "0.011"):
        assert main(["drift", str(tmp_path / "x.npz"), "--error", "wrong", "--budget", budget]) == 2
        assert f"from 1e-9 to 0.01, got {budget}" in capsys.readouterr().err


def test_a_constant_is_said_to_be_one_and_no_reference_is_blamed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    late = np.r_[np.full(500, 0.7), np.random.default_rng(0).normal(size=500)]
    np.savez(tmp_path / "x.npz", flat=np.full(1000, 0.7), late=late)
    facts = _said(str(tmp_path / "x.npz"), "--error", "flat")
    assert (facts["alarms"], len(facts["notes"])) == ([], 1)
    assert "all values are the same" in facts["notes"][0]
    assert main(["drift", str(tmp_path / "x.npz"), "--error", "late"]) == 2
    assert "the first 500 values are all 0.7" in capsys.readouterr().err


def test_labels_are_not_silently_watched_as_scores(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    pd.DataFrame({"label": 2 * _errors(0, (0.3, 900)).astype(int)}).to_csv(path, index=False)
    facts = _said(str(path), "--error", "label")
    assert "taken as scores, since the values are 0, 2: errors are 0 and 1" in facts["notes"][0]
    assert "in 900 scores" in CliRunner().invoke(drift, [str(path), "--error", "label"]).stdout
    np.savez(tmp_path / "x.npz", score=np.random.default_rng(0).normal(size=900))
    assert not _said(str(tmp_path / "x.npz"), "--error", "score")["notes"]


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (["2026-1-9", "2026-1-10", "2026-1-11"], None),
        (["9.1.2026", "10.1.2026", "13.1.2026"], None),
        (["9", "10", "11"], None),
        (["2026-01-09T10:00:00Z", "2026-01-09T10:00:00.5Z", "2026-01-10"], None),
        (["2026-1-10", "2026-1-9", "2026-1-11"], "time runs backwards at row 1: at is 2026-1-9 after 2026-1-10"),
        (["2026-1-9", None, "2026-1-11"], "the time of row 1 is missing (and 0 more"),
        (["first", "second", "third"], "at is text that is no date at row 0 ('first')"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_times_in_text_are_read_as_times(
    suffix: str, times: list[Any], said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, table = tmp_path / f"x.{suffix}", pd.DataFrame({"at": [t for t in times for _ in range(40)]})
    table["wrong"] = _errors(0, (0.1, 120)).astype(int)
    said = said and said.replace("row 1", "row 40").replace("0 more", "39 more")
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    assert main(["drift", str(path), "--error", "wrong", "--time", "at"]) == (2 if said else 0)
    assert (said or "") in capsys.readouterr().err


def test_a_missing_time_is_said_to_be_missing_and_a_column_may_be_its_own_time(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, at = tmp_path / "x.parquet", pd.Series(pd.date_range("2026-01-01", periods=100))
    pd.DataFrame({"at": at.where(at.index != 7), "wrong": np.repeat([0, 1], 50)}).to_parquet(path)
    assert main(["drift", str(path), "--error", "wrong", "--time", "at"]) == 2
    assert "the time of row 7 is missing" in capsys.readouterr().err
    assert len(_said(str(path), "--error", "wrong", "--time", "wrong")["alarms"]) == 1


def test_detectors_are_found_in_any_case_and_the_nearest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.savez(tmp_path / "x.npz", wrong=_errors(0, (0.1, 600), (0.9, 100)))
    for name, known in (("cusum", "CUSUM"), ("page-hinkley", "Page-Hinkley"), ("hddma", "HDDMA")):
        assert _said(str(tmp_path / "x.npz"), "--error", "wrong", "--detector", name)["alarms"][0]["detectors"] == [
            known
        ]
    assert _said(str(tmp_path / "x.npz"), "--error", "wrong", "--detector", "Auto")["threshold"] > 0
    assert main(["drift", str(tmp_path / "x.npz"), "--error", "wrong", "--detector", "adwinn"]) == 2
    assert "there is no detector 'adwinn'; did you mean 'ADWIN'?" in capsys.readouterr().err


def test_the_command_says_what_other_settings_would_have_fired(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    errors = _errors(3, (0.1, 1500), (0.5, 300))
    path = tmp_path / "x.npz"
    np.savez(path, wrong=errors, score=np.random.default_rng(0).normal(size=1800))
    facts = _said(str(path), "--error", "wrong", "--backtest", "--budget", "1e-3")
    tried = [(one["detector"], one["budget"], one["k"]) for one in facts["backtest"]]
    assert tried == [
        *(("auto", pytest.approx(b), 2) for b in (1e-3, 1e-2, 1e-4)),
        *(("auto", 1e-3, k) for k in (1, 3)),
        *((name, 1e-3, 2) for name in ("CUSUM", "HDDM-A")),
    ]
    for one in facts["backtest"]:
        found = scan_values(errors, one["detector"], budget=one["budget"], k=one["k"])
        assert one["fired_at"] == [a.index for a in found.alarms]
        assert (one["fired"], one["expected_false"]) == (len(found.alarms), pytest.approx(found.expected_false))
    said = CliRunner().invoke(drift, [str(path), "--error", "wrong", "--backtest"]).stdout
    assert said.splitlines()[0].split() == ["detector", "budget", "k", "fired", "false", "expected", "at", "rows"]
    assert len(said.splitlines()) >= 9
    scores = _said(str(path), "--error", "score", "--backtest")
    assert {one["detector"] for one in scores["backtest"]} == {"auto"}, "single detectors need 0 to 1"
    assert main(["drift", str(path), "--backtest"]) == 2
    assert "name its column with --error" in capsys.readouterr().err


def test_rows_of_a_backtest_are_those_of_the_file(tmp_path: Path) -> None:
    holes = np.insert(_errors(0, (0.1, 600), (0.9, 200)), np.zeros(100, dtype=int), np.nan)
    np.savez(tmp_path / "x.npz", wrong=holes)
    facts = _said(str(tmp_path / "x.npz"), "--error", "wrong", "--skip-missing", "--backtest")
    assert all(700 <= one["fired_at"][0] < 740 for one in facts["backtest"])


@pytest.mark.parametrize("n", [0, 5])
def test_too_few_rows_are_no_missing_drift(n: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old = pd.DataFrame({"length": rng.normal(size=500), "reward": rng.normal(size=500), "topic": ["a", "b"] * 250})
    old.to_csv(tmp_path / "old.csv", index=False)
    old.head(n).to_csv(tmp_path / "new.csv", index=False)
    words = [str(tmp_path / "new.csv"), "--reference", str(tmp_path / "old.csv")]
    said, facts = CliRunner().invoke(drift, words, catch_exceptions=False).stdout, _said(*words)
    assert f"0 of 0 features changed, not enough data for 3 more; 500 rows against {n}" in said
    assert "not enough data for 3 of 3 features" in facts["notes"][-1]
    assert "this does not mean no drift" in said


def test_a_feature_named_twice_is_compared_once(tmp_path: Path) -> None:
    pd.DataFrame({"reward": np.arange(100.0)}).to_csv(tmp_path / "x.csv", index=False)
    facts = _said(str(tmp_path / "x.csv"), "--reference", str(tmp_path / "x.csv"), "--features", "reward,reward")
    assert [one["feature"] for one in facts["features"]] == ["reward"]


# A classifier that goes on learning


def test_a_change_of_concept_is_found_in_the_errors_of_a_classifier() -> None:
    if not DATA.exists():
        pytest.skip(f"needs the shared data at {DATA}")
    table = pd.read_parquet(DATA / "circle_gradual.parquet")
    features = table.drop(columns=["t", "y"]).to_numpy()
    errors = prequential_errors(features, table["y"].to_numpy(), memory=None)
    alarms, _ = find_changes(errors)
    assert [1000 <= a.index + 200 < 1350 for a in alarms][:1] == [True]
    assert scan_values(errors).kind == "errors"
