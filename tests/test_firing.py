"""Rules on a store: exactly once whoever looks and whoever dies, and the past repeats itself."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.errors import InputError
from rlhf_workbench.core.schema import (
    Alert,
    Annotation,
    Calibration,
    ChartSignal,
    Decision,
    DriftEvent,
    Firing,
    Job,
    Mistake,
    MistakePattern,
    Model,
    Observation,
    Proposal,
    QueueItem,
    QueueState,
    Record,
    Run,
    RunEnd,
    Snapshot,
    Stage,
    StreamState,
    correction,
    utc_now,
)
from rlhf_workbench.govern.firing import Follower, begin_rule
from rlhf_workbench.govern.quantities import QUANTITIES, fold_rows, read_rows
from rlhf_workbench.govern.rehearsal import backtest, dry_run
from rlhf_workbench.govern.rule_files import parse_rules
from rlhf_workbench.govern.rules import Rule
from rlhf_workbench.govern.stages import champion_stage, promote
from rlhf_workbench.govern.tracks import Place
from rlhf_workbench.govern.watching import RuleWatch, look_once
from rlhf_workbench.store.tables import Store, connect


def rule_of(text: str) -> Rule:
    found = parse_rules(f"rules: [{{name: r, {text}}}]")
    assert not found.problems, found.problems
    return found.rules[0]


def alarm(stream: str = "eve") -> DriftEvent:
    return DriftEvent(stream=stream, detector="DDM", index=1, is_confirmed=True)


def fired(store: Store) -> list[Firing]:
    return store.records(Firing, status="fired")


# -- numbers

ROWS = st.lists(st.tuples(st.integers(0, 3), st.floats(-2, 2), st.integers(0, 6), st.integers(0, 40)), max_size=25)


@settings(max_examples=50, deadline=None)
@given(
    rows=ROWS,
    measure=st.sampled_from(["count", "sum", "mean", "min", "max", "last"]),
    window=st.none() | st.integers(1, 10),
    last=st.none() | st.integers(1, 5),
    needs=st.integers(0, 3),
    marks=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=2),
)
def test_folding_is_what_its_words_say(
    rows: list[Any], measure: str, window: int | None, last: int | None, needs: int, marks: list[Any]
) -> None:
    """Against one plain loop: replaced rows, clocks set back, marks, windows."""
    start, seq, table = pd.Timestamp("2026-01-01", tz="UTC"), 1, []
    for step, value, back, life in rows:
        seq += step
        table.append(
            (
                seq,
                seq + life if life < 15 else 2**62,
                start + pd.Timedelta(minutes=seq - (back if back > 4 else 0)),
                value,
            )
        )
    frame = pd.DataFrame(table, columns=["seq", "until", "moment", "value"]).assign(id="x", subject="s")
    frame["moment"] = pd.to_datetime(frame["moment"], utc=True)
    frame = frame[frame["seq"] < frame["until"]]
    points = pd.DataFrame({"seq": range(30)})
    points["moment"] = pd.to_datetime([start + pd.Timedelta(minutes=int(s)) for s in points["seq"]], utc=True)
    set_at = pd.DataFrame(sorted((s, min(s, m)) for s, m in marks), columns=["seq", "mark"]).astype(np.int64)
    set_at["mark"] = set_at["mark"].cummax()
    span = timedelta(minutes=window) if window else None
    found = fold_rows(frame, points, measure, marks=set_at, window=span, last=last, needs=needs)
    for point, value in zip(points.itertuples(), found, strict=True):
        floor = set_at.loc[set_at["seq"] <= point.seq, "mark"].max() if len(set_at) else 0
        living = [
            r.value
            for r in frame.itertuples()
            if r.seq <= point.seq < r.until and not r.seq <= floor and (span is None or r.moment > point.moment - span)
        ][-last if last else None :]
        fold = {"count": len, "sum": sum, "mean": np.mean, "min": min, "max": max, "last": lambda v: v[-1]}[measure]
        if len(living) < needs or (not living and measure not in ("count", "sum")):
            assert np.isnan(value)
        else:
            assert value == pytest.approx(fold(living), abs=1e-9)


def every_quantity() -> dict[str, tuple[list[Record], float]]:
    """Rows that make each quantity 2 or a half, with others beside them that must not count."""
    model = Model(name="m", kind="reward")
    wrong = [
        Mistake(model_id=model.id, comparison_id=c, p_first=0.9, first_is_better=0, kind="wrong", surprise=2.0)
        for c in "abc"
    ]
    pattern = MistakePattern(model_id=model.id, name="dates", mistake_ids=[w.id for w in wrong[:2]])
    old = Alert(severity="info", title="old")
    votes = [
        Annotation(comparison_id="c", annotator_id=who, label=label, queue="q")
        for who, label in (("a", "first"), ("b", "second"))
    ]
    agreeing = [Annotation(comparison_id="d", annotator_id=who, label="first", queue="q") for who in "ab"]
    control = replace(alarm(), metadata={"period": "control"})
    gold = [QueueItem(queue="q", comparison_id=c, gold_label="first") for c in "xy"]
    return {
        "drift_events": ([alarm(), alarm("topic"), control, replace(alarm(), is_confirmed=False)], 2),
        "chart_signals": ([ChartSignal(chart="c", limits_id="l", rule="nelson 1", index=i) for i in range(2)], 2),
        "calibration": (
            [
                Calibration(model_id="m", method="none", n_fitted=1, figures={"ece_after": v, "x": 1})
                for v in (0.1, 0.5)
            ],
            0.5,
        ),
        "gold_accuracy": (
            [
                *gold,
                *(
                    Annotation(comparison_id=c, annotator_id="a", label=w, queue="q")
                    for c, w in (("x", "first"), ("y", "tie"), ("z", "tie"))
                ),
            ],
            0.5,
        ),
        "agreement": (
            [*votes, *agreeing, Annotation(comparison_id="d", annotator_id="c", label="skip", queue="q")],
            0.5,
        ),
        "observations": ([Observation(stream="s", value=v) for v in (0.2, 0.8)], 0.5),
        "open_alerts": (
            [
                old,
                Alert(severity="info", title="a"),
                Alert(severity="critical", title="b"),
                correction(old, status="resolved"),
            ],
            2,
        ),
        "new_labels": ([votes[0], model], 2),
        "mistakes": ([model, *wrong, pattern], 2),
    }


@pytest.mark.parametrize("name", QUANTITIES)
def test_every_quantity_counts_what_it_says(name: str) -> None:
    rows, expected = every_quantity()[name]
    with connect(":memory:") as store:
        for row in rows:
            store.append(row)
        if name == "new_labels":
            store.append([replace(rows[0], id="1", annotator_id="x"), replace(rows[0], id="2", annotator_id="y")])
        rule = rule_of(f"watch: {name}, at_least: 0, do: alert")
        assert dry_run(store, rule).values[""] == expected
        each = dry_run(store, rule_of(f"watch: {name}, subject: each, at_least: 0, do: alert")).values
        assert all(subject for subject in each)


# -- live and past

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["gold", "gold", "correct", "observe", "alarm", "train", "label"]),
        st.sampled_from("ab"),
        st.booleans(),
    ),
    min_size=5,
    max_size=25,
)
LIVE = [
    "watch: gold_accuracy, subject: each, last: 3, needs: 2, below: 0.6, rearm: 0.6, confirm: 2 of 3, do: alert",
    "watch: gold_accuracy, subject: each, below: 0.7, cool_down: 1s, do: alert",
    "watch: observations, subject: each, window: 1h, above: 0.5, confirm: 2 of 2, do: alert",
    "watch: drift_events, at_least: 1, since: training, min_new_labels: 3, do: alert",
    "watch: new_labels, at_least: 2, rearm: 1, budget: {per: 1h, firings: 2}, do: alert",
    "sql: SELECT count(*) FROM current_drift_event WHERE recorded_at > $now - INTERVAL 1 HOUR, at_least: 2, do: alert",
]


def change(store: Store, what: str, who: str, is_good: bool, n: int) -> None:
    """Something happens."""
    label = "first" if is_good else "second"
    if what == "correct" and (known := store.records(Annotation, annotator_id=who)):
        store.append(correction(known[-1], label=label))
    elif what in ("gold", "correct"):
        store.append(Annotation(comparison_id=f"g{n}", annotator_id=who, label=label, queue="q"))  # type: ignore[arg-type]
    elif what == "observe":
        store.append([Observation(stream=who, value=float(is_good)) for _ in range(2)])
    elif what == "alarm":
        store.append(alarm(who))
    elif what == "train":
        store.append(Model(name="m", kind="reward"))
    else:
        store.append(Annotation(comparison_id=f"l{n}", annotator_id=who, label=label, queue="q"))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", LIVE, ids=range(len(LIVE)))
@settings(max_examples=8, deadline=None)
@given(
    changes=CHANGES,
    looks=st.lists(st.booleans(), min_size=40, max_size=40),
    restarts=st.sets(st.integers(0, 39), max_size=3),
)
def test_a_backtest_is_what_was_lived(text: str, changes: list[Any], looks: list[bool], restarts: set[int]) -> None:
    """However often it was looked at, whatever was restarted with or without its memory."""
    rule = rule_of(text)
    with connect(":memory:") as store:
        store.append([QueueItem(queue="q", comparison_id=f"g{i}", gold_label="first") for i in range(40)])
        live = Follower(store, rule)
        for n, (what, who, is_good) in enumerate(changes):
            change(store, what, who, is_good, n)
            if looks[n]:
                live.look()
            if n in restarts:
                if is_good:
                    live.keep()
                live = Follower(store, rule)
        live.look()
        run, _ = begin_rule(store, rule)
        would = backtest(store, rule, since=Place(int(run.params["seq"]), run.recorded_at))
        lived = store.records(Firing)
        assert [(h.place.seq, h.subject, h.outcome.status) for h in would] == [
            (f.result["seq"], f.result["subject"], f.status)
            for f in sorted(lived, key=lambda f: (f.result["seq"], f.result["subject"]))
        ]


def test_every_judges_at_its_moments_only_and_the_past_agrees() -> None:
    rule = rule_of("watch: drift_events, window: 3s, at_least: 1, every: 1s, do: alert")
    with connect(":memory:") as store:
        live = Follower(store, rule)
        store.append(alarm())
        live.look()
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline and not fired(store):
            time.sleep(0.1)
            live.look()
        (one,) = fired(store)
        assert one.result["moment"].partition(".")[0].partition("+")[0][-2:].isdigit()
        assert "." not in one.result["moment"], "a whole multiple of a second"
        would = backtest(store, rule, since=Place(int(live.run.params["seq"]), live.run.recorded_at))
        assert next(h.place.moment.isoformat() for h in would if h.outcome.status == "fired") == one.result["moment"]


# -- what holds back, and what is done


def test_new_labels_open_the_gate_without_confirming_anything() -> None:
    rule = rule_of("watch: drift_events, at_least: 1, confirm: 2 of 2, min_new_labels: 2, do: alert")
    with connect(":memory:") as store:
        live = Follower(store, rule)
        label = [Annotation(comparison_id=f"c{i}", annotator_id="a", label="first", queue="q") for i in range(4)]
        said = []
        for row in (alarm(), label[0], alarm(), label[1]):
            store.append(row)
            said.append([f.status for f in live.look()])
        assert said == [[], [], ["held_back"], ["fired"]], "labels are no evaluations of the drift"


def test_a_training_uses_its_labels_up() -> None:
    with connect(":memory:") as store:
        rule = rule_of("watch: new_labels, at_least: 2, do: alert")
        live = Follower(store, rule)
        label = [Annotation(comparison_id=f"c{i}", annotator_id="a", label="first", queue="q") for i in range(6)]
        snapshot = Snapshot(name="s", content_hash="", n_rows=1)
        said = []
        for row in (
            label[0],
            label[1],
            snapshot,
            label[2],
            Model(name="m", kind="reward", snapshot_id=snapshot.id),
            label[3],
        ):
            store.append(row)
            said.append(len(live.look()))
        assert said == [0, 1, 0, 0, 0, 1], "the label after the snapshot was not seen by the training"


ACTIONS = {
    "pause_queue, with: {queue: q}": (QueueState, {"status": "paused"}),
    "propose, with: {action: review, params: {why: drift}}": (Proposal, {"action": "review"}),
    "requalify, with: {annotator: ada}": (Run, {"kind": "requalify"}),
    "alert, with: {severity: critical}": (Alert, {"severity": "critical"}),
}


@pytest.mark.parametrize("do", ACTIONS)
def test_actions_happen_once_while_they_stand(do: str) -> None:
    kind, facts = ACTIONS[do]
    with connect(":memory:") as store:
        store.append(QueueItem(queue="q", comparison_id="c"))
        rule = rule_of(f"watch: drift_events, subject: each, at_least: 1, do: {do}")
        one, two = Follower(store, rule), Follower(store, rule)
        for _ in range(3):
            store.append(alarm())
            one.look()
            two.look()
        assert len(fired(store)) == 1
        assert len(store.records(kind, **facts)) == 1
        assert len(store.records(Alert)) == 1
        assert fired(store)[0].source_ids == [store.records(DriftEvent)[0].id]


def test_what_cannot_be_done_is_written_told_and_not_tried_forever() -> None:
    with connect(":memory:") as store:
        rule = rule_of("watch: drift_events, at_least: 1, do: pause_queue, with: {queue: nowhere}")
        live = Follower(store, rule)
        store.append(alarm())
        (one,) = live.look()
        assert one.status == "held_back"
        assert "there is no queue 'nowhere'" in one.reason
        assert [alert.title for alert in store.records(Alert)] == ["Rule r could not act"]
        assert Follower(store, rule).look() == []


def test_a_bad_champion_goes_by_itself_once_and_a_later_one_stays() -> None:
    with connect(":memory:") as store:
        models = [Model(name="reward", kind="reward", content_hash=str(i)) for i in range(3)]
        store.append(models)
        for model in models[:2]:
            promote(store, model.id, reason="newer", needs_approval=False, needs_trial=False)
        rule = rule_of(
            "watch: observations, since: promotion, needs: 5, below: 0.6, do: rollback, with: {name: reward}"
        )
        one, two = Follower(store, rule), Follower(store, rule)
        store.append([Observation(stream="gold", value=0.0) for _ in range(4)])
        assert one.look() == [], "four values are fewer than five"
        store.append(Observation(stream="gold", value=0.0))
        promote(store, models[2].id, reason="newest", needs_approval=False, needs_trial=False)
        assert [f.status for f in one.look() + two.look()] == ["fired"]
        last = champion_stage(store, "reward", "reward")
        assert last
        assert last.model_id == models[2].id, "it was not the champion when the values were seen"
        store.append([Observation(stream="gold", value=1.0) for _ in range(5)])
        store.append([Observation(stream="gold", value=0.0) for _ in range(25)])
        one.look()
        two.look()
        last = champion_stage(store, "reward", "reward")
        assert last
        assert last.model_id == models[1].id
        assert last.reason.startswith("restored: rule r: mean of observations below 0.6")
        assert [a.severity for a in store.records(Alert)] == ["critical"]
        assert len(store.records(Stage, stage="champion")) == 4


def test_a_dry_run_and_a_backtest_write_nothing(tmp_path: Path) -> None:
    with connect(tmp_path / "s.duckdb") as store:
        store.append([alarm(), QueueItem(queue="q", comparison_id="c")])
        store.append(Annotation(comparison_id="c", annotator_id="a", label="first", queue="q"))
        run = Run(kind="train_reward", key="", seed=0)
        store.append([run, RunEnd(run_id=run.id, status="done", seconds=7.0, input_tokens=11)])
    rule = rule_of("watch: drift_events, at_least: 1, do: retrain, with: {queue: q}")
    with connect(tmp_path / "s.duckdb", read_only=True) as store:
        before = store.last_change()
        found = dry_run(store, rule)
        assert found.would[""].startswith("fire: count of drift_events at least 1")
        assert found.plan
        assert (found.plan.new_labels, found.plan.cost.seconds, found.plan.cost.tokens) == (1, 7.0, 11.0)
        assert "build_consensus" in found.plan.cost.unknown
        assert len(backtest(store, rule)) == 1
        assert store.last_change() == before
        json.dumps(found.facts())


def test_too_long_a_past_is_refused() -> None:
    with connect(":memory:") as store:
        store.append(alarm())
        rule = rule_of("sql: 'SELECT count(*) FROM alert WHERE recorded_at < $now', at_least: 1, every: 1s, do: alert")
        with pytest.raises(InputError, match="narrow it"):
            backtest(store, rule, since=utc_now() - timedelta(days=30))


def test_one_broken_rule_is_in_no_other_s_way(caplog: pytest.LogCaptureFixture) -> None:
    rules = parse_rules("""
rules:
  - {name: broken, sql: "SELECT id FROM drift_event", at_least: 1, do: alert}
  - {name: fine, watch: drift_events, at_least: 1, do: alert}
""")
    with connect(":memory:") as store:
        look_once(store, rules)
        store.append([alarm(), alarm()])
        assert [f.rule for f in look_once(store, rules)] == ["fine"]
        assert "rule broken could not be judged" in caplog.text


def test_a_clock_that_was_set_back_silences_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_workbench.store import engine

    rule = rule_of("watch: drift_events, subject: each, at_least: 1, cool_down: 1h, do: alert")
    with connect(":memory:") as store:
        live = Follower(store, rule)
        store.append(alarm("a"))
        monkeypatch.setattr(engine, "utc_now", lambda: utc_now() - timedelta(days=400))
        store.append(alarm("b"))
        live.look()
        assert [f.result["subject"] for f in fired(store)] == ["a", "b"]
        would = backtest(store, rule, since=Place(int(live.run.params["seq"]), live.run.recorded_at))
        assert [h.place.seq for h in would] == [f.result["seq"] for f in fired(store)]


def test_memory_is_kept_so_that_the_past_is_not_judged_again() -> None:
    rule = rule_of("watch: observations, last: 5, below: 0.5, do: alert")
    with connect(":memory:") as store:
        live = Follower(store, rule)
        for i in range(12):
            store.append(Observation(stream="s", value=float(i < 6)))
        live.look()
        live.keep()
        live.keep()
        assert len(store.records(StreamState)) == 1
        again = Follower(store, rule)
        assert (again.place, again.machine.state()) == (live.place, live.machine.state())
        rows = read_rows(store, QUANTITIES["observations"], upto=again.place.seq, after=again.place.seq, keep=5)
        assert len(rows) == 5, "only what the next look can need is read"


# -- processes

TEXT = """
rules:
  - {name: drifted, watch: drift_events, subject: each, at_least: 1, do: retrain, with: {queue: q, needs_approval: false}}
  - {name: asked, watch: drift_events, subject: each, at_least: 1, do: propose, with: {action: review}}
"""


def _endless(path: Path) -> None:
    """Look at the rules until killed."""
    while True:
        try:
            with connect(path, actor=f"p{os.getpid()}") as store, RuleWatch(store, parse_rules(TEXT), poll_s=0.05):
                time.sleep(60)
        except Exception:
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(200)
def test_processes_that_fire_at_once_and_are_killed_act_once(tmp_path: Path) -> None:
    """Three watch the same store, one is killed every few alarms: one firing, one proposal a cause, and no half of either."""
    path, draw = tmp_path / "s.duckdb", random.Random(3)
    with connect(path) as store:
        store.append(QueueItem(queue="q", comparison_id="c"))
        store.append(Annotation(comparison_id="c", annotator_id="a", label="first", queue="q"))
        look_once(store, parse_rules(TEXT))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_endless, args=(path,), daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    streams = [f"s{i}" for i in range(9)]
    for i, stream in enumerate(streams):
        _write(path, alarm(stream))
        time.sleep(draw.random() * 0.1)
        if i % 3 == 2:
            victim = draw.randrange(3)
            os.kill(workers[victim].pid or 0, signal.SIGKILL)
            workers[victim].join()
            workers[victim] = context.Process(target=_endless, args=(path,), daemon=True)
            workers[victim].start()
    _wait(path, 2 * len(streams))
    for worker in workers:
        worker.kill()
        worker.join()
    with connect(path) as store:
        found = fired(store)
        assert Counter((f.rule, f.result["subject"]) for f in found) == Counter(
            (r, s) for r in ("drifted", "asked") for s in streams
        )
        assert len({f.fingerprint for f in found}) == len(found)
        assert len(store.records(Proposal)) == len(streams)
        assert {p.params["firing_id"] for p in store.records(Proposal)} == {f.id for f in found if f.rule == "asked"}
        assert len(store.records(Job)) == 1, "while one retraining waits, the same rule asks for no second"
        assert store.records(Decision) == []
        assert store.verify().is_intact


def _write(path: Path, record: Record) -> None:
    """Append, whoever owns the store just now."""
    for _ in range(200):
        try:
            with connect(path) as store:
                if not store.records(type(record), id=record.id):
                    store.append(record)
                return
        except Exception:
            time.sleep(0.05)
    raise AssertionError("the store stayed out of reach")


def _wait(path: Path, n: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            with connect(path, read_only=True) as store:
                if len(fired(store)) >= n:
                    return
        except Exception:
            pass
        time.sleep(0.3)
    raise AssertionError("not every cause fired")
