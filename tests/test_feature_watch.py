"""Feature spaces of a store, window by window: what changed is found, what did not is quiet, everything is repeatable."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("frouros")
pytest.importorskip("sklearn")

from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.core.schema import (
    Annotation,
    Comparison,
    DriftEvent,
    Generation,
    Label,
    Observation,
    Prediction,
    Prompt,
    Record,
)
from rlhf_workbench.monitor.feature_watch import (
    STORE_SPACES,
    plot_feature_watch,
    read_comparisons,
    store_spaces,
    watch_feature_spaces,
    watch_spaces,
)
from rlhf_workbench.monitor.spaces import FeatureSpace
from rlhf_workbench.monitor.windows import (
    calibrate_windows,
    chance_of_confirmation,
    confirmed_at,
    count_alarms,
    level_for_budget,
    window_p_values,
)
from rlhf_workbench.store.tables import Store, connect

WORDS = {"law": "court appeal judge law contract vote", "food": "bread oven bean soup salt rye"}
START = datetime(2026, 1, 5, tzinfo=UTC)


def fill(store: Store, n: int, queue: str, start: int, **change: Any) -> None:
    """Comparisons of two subjects; `law`, `margin`, `seconds`, `longer` change one space each."""
    rng, records = np.random.default_rng([start, n]), cast(list[Record], [])
    for i in range(start, start + n):
        topic = "law" if rng.random() < change.get("law", 0.5) else "food"
        words = WORDS[topic].split()
        prompt = Prompt(text=" ".join(rng.choice(words, 6)) + "?", topic=topic)
        texts = [" ".join(rng.choice(words, rng.integers(8, 16) + change.get("longer", 0))) + "." for _ in range(2)]
        answers = [Generation(prompt_id=prompt.id, text=t, metadata={"log_probability": rng.normal(-2)}) for t in texts]
        pair = Comparison(prompt_id=prompt.id, first_id=answers[0].id, second_id=answers[1].id)
        odds = rng.normal(0, 1) * change.get("margin", 1.0)
        records += [
            prompt,
            *answers,
            pair,
            Prediction(model_id="m", comparison_id=pair.id, p_first=1 / (1 + np.exp(-odds))),
        ]
        records.append(Observation(stream="latency", value=rng.gamma(3, 1), comparison_id=pair.id))
        for name in ("ada", "ben"):
            label = cast(Label, str(rng.choice(["first", "second", "tie"])))
            about = {"queue": queue, "seconds": rng.gamma(4, 5) * change.get("seconds", 1.0)}
            at = START + timedelta(minutes=i)
            records.append(Annotation(comparison_id=pair.id, annotator_id=name, label=label, submitted_at=at, **about))
    store.append(records)


@pytest.fixture(scope="module")
def store() -> Any:
    with connect(":memory:") as opened:
        fill(opened, 240, "before", 0)
        fill(opened, 160, "after", 240, law=0.95, margin=3.0, seconds=0.4, longer=8)
        fill(opened, 160, "quiet", 400)
        yield opened


def test_all_spaces_of_a_store_are_watched_at_once(store: Store) -> None:
    figures = watch_feature_spaces(store, run_id="all", seed=0, queues=["before", "after"], window=40, rounds=199)
    assert next(iter(figures)) == "first_alarm"
    expected = {"prompt text", "answer text", "topic mix", "reward margin", "time on a task", "answer length"}
    assert expected <= set(figures["confirmed_spaces"])
    assert set(figures["confirmed_spaces"]) <= expected | {"punctuation of an answer", "prompt length"}
    assert figures["first_alarm"] == 79  # the second window
    assert figures["joint"]["p"] <= 0.001
    assert figures["rows"] == [240, 160]
    assert figures["windows"] == 4
    events = store.records(DriftEvent, run_id="all")
    assert sum(event.is_confirmed for event in events) == figures["confirmed"]
    for event in events:
        assert 0 < event.severity <= 1
        assert event.p_value is not None
        assert event.p_value <= figures["rule"]["level"]
        assert event.metadata["after_shift"] == event.index - 240
        assert event.happened_at is not None
    pytest.importorskip("matplotlib")
    assert len(plot_feature_watch(figures).axes[0].lines) == figures["confirmed"]


def test_the_same_look_gives_the_same_figures(store: Store) -> None:
    how: dict[str, Any] = {
        "queues": ["before", "after"],
        "window": 40,
        "rounds": 99,
        "spaces": ["topic mix", "prompt text"],
    }
    first, second = (watch_feature_spaces(store, run_id=name, seed=7, **how) for name in ("r1", "r2"))
    assert first == second


def test_where_nothing_happens_nothing_is_confirmed(store: Store) -> None:
    figures = watch_feature_spaces(store, run_id="quiet", seed=0, queues=["before", "quiet"], window=40, rounds=199)
    assert figures["confirmed"] == 0
    assert figures["first_alarm"] is None
    assert not any(one["is_drifted_by_e"] for one in figures["spaces"])


def test_rows_hold_what_the_store_says(store: Store) -> None:
    rows = read_comparisons(store)
    assert len(rows) == 560
    assert rows["at"].is_monotonic_increasing
    names = {space.name for space in store_spaces(rows)}
    assert names == {space.name for space in STORE_SPACES} | {"stream latency"}
    one = rows.iloc[0]
    votes = store.frame(Annotation, comparison_id=one["comparison_id"])
    assert one["seconds"] == pytest.approx(votes["seconds"].median())
    assert one["share_undecided"] == (votes["label"] == "tie").mean()
    p = store.records(Prediction, comparison_id=one["comparison_id"])[0].p_first
    assert one["margin"] == pytest.approx(abs(np.log(p / (1 - p))))
    assert one["prompt_length"] == len(one["prompt"])
    assert one["log_probability"] < 0


def test_the_side_counts_as_it_was_shown() -> None:
    with connect(":memory:") as store:
        prompt = Prompt(text="Why?")
        answers = [Generation(prompt_id=prompt.id, text=text) for text in ("a,b", "c\nd")]
        pair = Comparison(prompt_id=prompt.id, first_id=answers[0].id, second_id=answers[1].id)
        labels = [("first", True), ("second", True), ("first", False), ("first", False)]
        votes = [
            Annotation(comparison_id=pair.id, annotator_id=f"{i}", label=cast(Label, label), is_swapped=is_swapped)
            for i, (label, is_swapped) in enumerate(labels)
        ]
        store.append([prompt, *answers, pair, *votes])
        row = read_comparisons(store).iloc[0]
        assert (row["share_left"], row["agreement"]) == (0.75, 0.75)
        assert (row["answer_lines"], row["length_gap"]) == (1.5, 0)
        assert row["punctuation"] == pytest.approx(1 / 6)
        assert pd.isna(row["margin"])
        assert "reward margin" not in {space.name for space in store_spaces(read_comparisons(store))}


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"queues": ["before", "after"], "window": 24}, InputError, "at least 25 rows, got 24"),
        ({"queues": ["before", "after"], "window": 130}, InputError, "not enough data: 240 rows of reference and 160"),
        ({"queues": ["before", "nobody"]}, InputError, "240 rows of reference and 0 after it"),
        ({"queues": ["before"]}, InputError, "name two queues"),
        ({"reference_share": 1.5}, InputError, "reference_share must be between"),
        (
            {"reference_share": 0.5, "spaces": ["colour"]},
            MissingError,
            "there is no feature space 'colour'; known: prompt",
        ),
        ({"reference_share": 0.5, "spaces": ["topic mix"], "k": 4}, InputError, "got 4 of 3"),
        ({"reference_share": 0.5, "spaces": ["topic mix"], "budget": 0}, InputError, "between 0 and 1, got 0"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    store: Store, how: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        watch_feature_spaces(store, run_id="no", seed=0, **how)
    assert store.records(DriftEvent, run_id="no") == []


def test_an_embedding_of_ones_own_is_asked_once(store: Store) -> None:
    asked: list[int] = []

    def lengths(texts: Any) -> Any:
        asked.append(len(texts))
        return np.array([[len(t), t.count("court")] for t in texts], dtype=float)

    how: dict[str, Any] = {"spaces": ["prompt text"], "window": 40, "rounds": 99, "embed": lengths}
    figures = watch_feature_spaces(store, run_id="e", seed=0, queues=["before", "after"], **how)
    assert figures["confirmed_spaces"] == {"prompt text": 1}
    assert set(asked) == {400}


def test_a_space_with_gaps_is_not_called_quiet() -> None:
    rows = pd.DataFrame({"at": pd.date_range("2026-01-01", periods=200, freq="h", tz="UTC")})
    rows["x"] = np.where(np.arange(200) < 100, 1.0, np.nan)
    rows["y"] = np.random.default_rng(0).normal(size=200)
    spaces = [FeatureSpace("x", "number"), FeatureSpace("y", "number")]
    events, found, _ = watch_spaces(rows, spaces, n_reference=100, window=40)
    assert [one.shift is None for one in found[0]] == [True, False]
    assert "not enough data" in found[0][0].reason
    assert events == []


# Windows


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_confirmation_is_what_counting_says(signals: list[bool], k: int, more: int) -> None:
    n, found = k + more, []
    is_on = False
    for i in range(len(signals)):
        was_on, is_on = is_on, sum(signals[max(0, i - n + 1) : i + 1]) >= k
        found += [i] if is_on and not was_on else []
    assert confirmed_at(signals, k, n) == found


@pytest.mark.parametrize(("k", "n", "correlation"), [(1, 1, 0.0), (2, 3, 0.0), (2, 3, 0.3), (3, 5, 0.5)])
def test_the_level_gives_the_chance_that_was_asked_for(k: int, n: int, correlation: float) -> None:
    """Against a simulation with 200,000 series of windows."""
    from scipy.stats import norm

    level = level_for_budget(0.02, k, n, correlation=correlation)
    assert chance_of_confirmation(level, k, n, correlation) == pytest.approx(0.02, rel=1e-3)
    rng = np.random.default_rng(0)
    z = np.sqrt(correlation) * rng.normal(size=(200_000, 1)) + np.sqrt(1 - correlation) * rng.normal(size=(200_000, n))
    assert ((2 * norm.sf(np.abs(z)) <= level).sum(1) >= k).mean() == pytest.approx(0.02, abs=0.0012)


def test_a_budget_is_kept_where_nothing_happens() -> None:
    """30 references of 200 rows with 20 windows of 40 each and two features; budget 5 % a window: 30 alarms expected."""
    from rlhf_workbench.monitor.multiplicity import adjust_p_values
    from rlhf_workbench.monitor.shifts import compare

    alarms = windows = 0
    for seed in range(30):
        values = np.random.default_rng(seed).normal(size=(1000, 2))

        def find(old: Any, new: Any, values: Any = values) -> Any:
            return adjust_p_values([compare("number", values[old, j], values[new, j]).p_value for j in range(2)])

        own, now = window_p_values(find, n_reference=200, n_rows=1000, window=40)
        rule = calibrate_windows(own, window=40, n_reference=200, budget=0.05)
        alarms, windows = alarms + count_alarms(now, rule.level, 2, 3), windows + len(now)
    assert windows == 600
    assert alarms <= 42


def test_a_restless_reference_asks_for_a_stricter_level() -> None:
    """Rows that come in batches: windows of one reference differ by themselves."""
    rng = np.random.default_rng(0)
    batches = np.repeat(rng.normal(size=60), 20) + rng.normal(size=1200)
    from rlhf_workbench.monitor.shifts import compare

    own, _ = window_p_values(
        lambda old, new: [compare("number", batches[old], batches[new]).p_value],
        n_reference=1000,
        n_rows=1200,
        window=50,
    )
    rule = calibrate_windows(own, window=50, n_reference=1000)
    assert rule.is_tightened
    assert rule.alarms == 0
    assert rule.level < level_for_budget(0.01, correlation=50 / 1050) / 5


def test_a_reference_shorter_than_two_windows_is_refused() -> None:
    with pytest.raises(InputError, match="the reference has 90 rows and a window 50: it must hold at least two"):
        calibrate_windows(np.ones((1, 1)), window=50, n_reference=90)


def test_the_job_runs(tmp_path: Path) -> None:
    pm = pytest.importorskip("papermill", reason="needs the extra jobs: pip install 'rlhf_workbench[jobs]'")
    with connect(tmp_path / "s.duckdb") as store:
        fill(store, 120, "before", 0)
        fill(store, 90, "after", 120, law=0.95)
    job = Path(__file__).parent.parent / "nbs/jobs/drift_watch.ipynb"
    params = {
        "store_path": str(tmp_path / "s.duckdb"),
        "reference_queue": "before",
        "current_queue": "after",
        "window": 30,
    }
    done = pm.execute_notebook(
        str(job), str(tmp_path / "out.ipynb"), params, progress_bar=False, kernel_name="python3", language="python"
    )
    text = str(done.cells)
    assert "confirmed alarms in 3 windows of 30" in text
    assert text.count("image/png") >= 1
    with connect(tmp_path / "s.duckdb") as store:
        assert "topic mix" in {event.stream for event in store.records(DriftEvent, is_confirmed=True)}
