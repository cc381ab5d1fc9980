"""Frozen limits, signals written once, and charts of what is in the store."""

import math
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.core.schema import (
    Annotation,
    ChartSignal,
    Comparison,
    Consensus,
    ControlLimits,
    Generation,
    Model,
    Observation,
    Prediction,
    Preference,
    Prompt,
    QueueItem,
)
from rlhf_workbench.monitor.attribute_charts import p_chart
from rlhf_workbench.monitor.chart_limits import (
    chart_signals,
    find_limits,
    freeze_limits,
    limit_versions,
    note_action,
    note_cause,
    pending_actions,
    wanted_action,
)
from rlhf_workbench.monitor.chart_quantities import (
    QUANTITIES,
    freeze_quantity,
    frozen_chart,
    quantity_chart,
    quantity_values,
    subgroup_values,
    watch_charts,
    watch_quantity,
)
from rlhf_workbench.monitor.charts import individuals_chart
from rlhf_workbench.store.tables import Store, connect

START = datetime(2026, 1, 5, tzinfo=UTC)
GOOD = [5, 4, 6, 5, 3, 7, 5, 6, 4, 5]


@pytest.fixture
def store():
    with connect(":memory:", actor="ada") as opened:
        yield opened


def moments(n: int) -> list[datetime]:
    return [START + timedelta(days=i) for i in range(n)]


def observe(store: Store, values: list[float], stream: str = "kl", first: int = 0, model_id: str | None = None) -> None:
    store.append(
        [
            Observation(stream=stream, value=v, model_id=model_id, happened_at=START + timedelta(days=first + i))
            for i, v in enumerate(values)
        ]
    )


def calm(n: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).normal(2, 0.1, n).tolist()


def test_a_new_version_is_a_new_row(store: Store) -> None:
    chart = p_chart(GOOD, 50)
    first = freeze_limits(store, "errors", chart, reason="the first weeks")
    second = freeze_limits(store, "errors", p_chart([3, 4, 2, 3], 50), reason="new guideline")
    other = freeze_limits(store, "speed", chart, reason="?")
    assert [one.version for one in limit_versions(store, "errors")] == [1, 2]
    assert (first.replaces, second.replaces, other.version) == (None, None, 1)
    assert find_limits(store, "errors") == second
    assert find_limits(store, "errors", 1).parameters["rate"] == 0.1
    with pytest.raises(MissingError, match="no limits of version 3; it has 1 to 2"):
        find_limits(store, "errors", 3)
    with pytest.raises(MissingError, match="frozen charts: errors, speed"):
        find_limits(store, "mood")
    for name, reason in (("errors", " "), ("", "why")):
        with pytest.raises(InputError, match="need a name and a reason"):
            freeze_limits(store, name, chart, reason=reason)


def test_two_who_freeze_at_once_get_two_versions(tmp_path: Path) -> None:
    with connect(tmp_path / "s.duckdb") as store:
        freeze = lambda: freeze_limits(store, "errors", p_chart(GOOD, 50), reason="?")  # noqa: E731
        threads = [threading.Thread(target=freeze) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [one.version for one in limit_versions(store, "errors")] == list(range(1, 9))


def test_limits_that_were_stored_draw_the_same_lines(store: Store) -> None:
    from rlhf_workbench.monitor.spc import KINDS, control_chart

    rng = np.random.default_rng(0)
    data = {
        "values": (rng.normal(5, 2, 30),),
        "groups": (rng.normal(5, 2, (30, 4)),),
        "rows": (rng.normal(5, 2, (30, 3)),),
    }
    data |= {"counts": (rng.poisson(9, 30),), "sized counts": (rng.binomial(50, 0.2, 30), 50)}
    for kind, about in KINDS.items():
        chart = control_chart(kind, *data[about.takes])
        freeze_limits(store, kind, chart, reason="test", source={"quantity": kind})
        again = control_chart(kind, *data[about.takes], limits=find_limits(store, kind).parameters)
        assert again.parameters == chart.parameters
        assert kind == "t2" or np.array_equal(again.upper, chart.upper)
        assert chart_signals(store, again, find_limits(store, kind), rules="none") == []


def test_signals_are_written_once(store: Store) -> None:
    limits = freeze_limits(store, "errors", p_chart(GOOD, 50), reason="ten weeks")
    later = [5, 4, 20, 5, 4, 21, 22, 6]
    for n in (3, 3, 6, 7, 8, 8):
        chart = p_chart(later[:n], 50, limits=limits.parameters)
        chart_signals(store, chart, limits, moments=moments(n), rules="limits")
    found = store.records(ChartSignal)
    assert [(one.index, one.points, one.happened_at) for one in found] == [
        (2, [2], moments(3)[2]),
        (5, [5], moments(6)[5]),
    ]
    assert {one.limits_id for one in found} == {limits.id}


def test_four_who_look_at_once_write_one_signal(tmp_path: Path) -> None:
    with connect(tmp_path / "s.duckdb") as store:
        limits = freeze_limits(store, "errors", p_chart(GOOD, 50), reason="ten weeks")
        chart = p_chart([5, 20, 4, 5], 50, limits=limits.parameters)
        look = lambda: chart_signals(store, chart, limits, moments=moments(4), rules="limits")  # noqa: E731
        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store.records(ChartSignal)) == 1


def test_signals_without_moments_are_known_by_their_place(store: Store) -> None:
    limits = freeze_limits(store, "errors", p_chart(GOOD, 50), reason="ten weeks")
    chart = p_chart([5, 20], 50, limits=limits.parameters)
    assert len(chart_signals(store, chart, limits, rules="limits")) == 1
    assert chart_signals(store, chart, limits, rules="limits") == []


def test_a_corrected_signal_is_not_written_again(store: Store) -> None:
    limits = freeze_limits(store, "errors", p_chart(GOOD, 50), reason="ten weeks")
    chart = p_chart([5, 20], 50, limits=limits.parameters)
    (signal,) = chart_signals(store, chart, limits, rules="limits")
    noted = note_cause(store, signal.id, "  a new annotator  ")
    assert (noted.cause, noted.replaces, noted.actor) == ("a new annotator", signal.id, "ada")
    assert chart_signals(store, chart, limits, rules="limits") == []
    acted = note_action(store, signal.id, "requalify")  # by the id that it had first
    assert (acted.cause, acted.action) == ("a new annotator", "requalify")
    assert len(store.records(ChartSignal)) == 1
    assert store.get(ChartSignal, signal.id).cause is None
    for note in (note_cause, note_action):
        with pytest.raises(InputError, match="is empty"):
            note(store, signal.id, " ")
        with pytest.raises(MissingError):
            note(store, "nobody", "something")


def test_a_new_version_does_not_repeat_old_signals(store: Store) -> None:
    first = freeze_limits(store, "errors", p_chart(GOOD, 50), reason="ten weeks")
    later = [5, 20, 4, 5]
    chart_signals(store, p_chart(later, 50, limits=first.parameters), first, moments=moments(4), rules="limits")
    second = freeze_limits(store, "errors", p_chart([4, 5, 6], 50), reason="anew")
    chart = p_chart(later, 50, limits=second.parameters)
    assert chart_signals(store, chart, second, moments=moments(4), rules="limits") == []


def test_a_chart_with_other_limits_is_refused(store: Store) -> None:
    limits = freeze_limits(store, "errors", p_chart(GOOD, 50), reason="ten weeks")
    with pytest.raises(InputError, match="was not drawn with version 1"):
        chart_signals(store, p_chart([5, 20], 50), limits)
    with pytest.raises(InputError, match="was not drawn with version 1"):
        chart_signals(store, individuals_chart([5, 20]), limits)
    with pytest.raises(InputError, match="each point needs a moment"):
        chart_signals(store, p_chart([5, 20], 50, limits=limits.parameters), limits, moments=moments(3))


def test_companions_have_signals_of_their_own(store: Store) -> None:
    limits = freeze_limits(store, "kl", individuals_chart(calm(30)), reason="month")
    chart = individuals_chart([2.0, 9.0], limits=limits.parameters)
    assert [one.rule for one in chart_signals(store, chart, limits)] == ["nelson-1", "nelson-1 of moving range"]


@pytest.mark.parametrize(
    ("quantity", "by", "rule", "action"),
    [
        ("gold_accuracy", "annotator", "nelson-1", "requalify"),
        ("gold_accuracy", "annotator", "nelson-2", "alert"),
        ("gold_accuracy", "annotator", "western-electric-1", "requalify"),
        ("agreement", None, "limits", "pause_queue"),
        ("kl", "model", "limits of moving range", "propose"),
        ("latency", "model", "limits", "alert"),
        ("anything", None, "limits", "alert"),
    ],
)
def test_what_a_signal_asks_for(quantity: str, by: str | None, rule: str, action: str) -> None:
    source = {"quantity": quantity, "by": by, "who": by and "ada"}
    limits = ControlLimits(chart="c", kind="p", version=3, parameters={"source": source}, n_points=9)
    wanted = wanted_action(ChartSignal(chart="c", limits_id=limits.id, rule=rule, index=4), limits)
    assert wanted.action == action
    assert wanted.annotator_id == ("ada" if by == "annotator" else None)
    assert wanted.model_id == ("ada" if by == "model" else None)
    assert wanted.reason == f"c: {rule} at point 4, judged by limits version 3"
    own = wanted_action(wanted.signal, limits, {(quantity, by or ""): "rollback"})
    assert own.action == ("alert" if rule == "nelson-2" else "rollback")


def test_what_was_done_or_explained_is_not_asked_for_again(store: Store) -> None:
    limits = freeze_limits(store, "errors", p_chart(GOOD, 50), reason="ten weeks")
    chart = p_chart([20, 5, 21, 4, 22], 50, limits=limits.parameters)
    signals = chart_signals(store, chart, limits, rules="limits")
    assert [one.signal.index for one in pending_actions(store)] == [0, 2, 4]
    note_cause(store, signals[0].id, "a holiday")
    note_action(store, signals[1].id, "alert")
    assert [one.signal.index for one in pending_actions(store)] == [4]


# --- the quantities ---


def votes(store: Store, n: int, *, wrong: set[int] = frozenset(), annotator: str = "ada", others: int = 2) -> list[str]:
    """n pairs with a gold answer, the votes of one annotator and of others who are right; a minute apart."""
    prompt = Prompt(text="Why?")
    answers = [Generation(prompt_id=prompt.id, text=text) for text in ("good", "bad")]
    pairs = [Comparison(prompt_id=prompt.id, first_id=answers[0].id, second_id=answers[1].id) for _ in range(n)]
    items = [QueueItem(queue="q", comparison_id=pair.id, gold_label="first") for pair in pairs]
    rows = []
    seconds = np.random.default_rng(2).lognormal(3, 0.3, n).round(1).tolist()
    for i, pair in enumerate(pairs):
        at = START + timedelta(minutes=i)
        about = {"queue": "q", "seconds": seconds[i], "submitted_at": at}
        label = "second" if i in wrong else "first"
        rows.append(Annotation(comparison_id=pair.id, annotator_id=annotator, label=label, **about))
        rows += [
            Annotation(comparison_id=pair.id, annotator_id=f"other-{j}", label="first", **about) for j in range(others)
        ]
    store.append([prompt, *answers, *pairs, *items, *rows])
    return [pair.id for pair in pairs]


def test_gold_accuracy_is_the_share_of_known_answers(store: Store) -> None:
    ids = votes(store, 40, wrong={0, 3, 11, 25, 39})
    store.append(Annotation(comparison_id=ids[0], annotator_id="ada", label="skip", queue="q"))
    store.append(Annotation(comparison_id=ids[0], annotator_id="ada", label="second", queue="another"))
    chart = quantity_chart(store, "gold_accuracy", "ada").chart
    assert chart.values.tolist() == [0.8, 0.9, 0.9, 0.9]
    assert chart.center[0] == 35 / 40
    everybody = quantity_values(store, "gold_accuracy")
    assert (len(everybody), everybody["value"].mean()) == (120, 115 / 120)


def test_agreement_is_with_the_majority_of_the_others(store: Store) -> None:
    votes(store, 60, wrong={1, 2, 30})
    found = quantity_chart(store, "agreement", "ada", every=20)
    assert found.chart.kind == "laney_p"
    assert found.chart.values.tolist() == [0.9, 0.95, 1.0]
    assert found.source == {"quantity": "agreement", "by": "annotator", "who": "ada", "every": 20, "kind": "laney_p"}
    others = quantity_values(store, "agreement", "other-0")
    assert others["value"].isna().sum() == 0
    assert len(others) == 57  # where ada errs, the two others split and there is no majority


def test_speed_is_in_logarithms(store: Store) -> None:
    votes(store, 30, others=0)
    store.append(Annotation(comparison_id="c", annotator_id="ada", label="first", seconds=0.0))
    given = store.sql("SELECT seconds FROM annotation WHERE seconds > 0 ORDER BY submitted_at")["seconds"]
    values = quantity_values(store, "speed", "ada")["value"]
    assert values.tolist() == pytest.approx(np.log(given))
    chart = quantity_chart(store, "speed", "ada").chart
    assert chart.kind == "xbar_s"
    assert len(chart.values) == 3


def test_margins_and_gaps_follow_the_truth_that_is_known(store: Store) -> None:
    ids = votes(store, 5)
    model = Model(name="reward", kind="reward")
    p = [0.9, 0.2, 0.5, 0.7, 1.0]
    at = [START + timedelta(seconds=i) for i in range(5)]
    guesses = [
        Prediction(model_id=model.id, comparison_id=c, p_first=q, recorded_at=t)
        for c, q, t in zip(ids, p, at, strict=True)
    ]
    labels = ["first", "first", "second", "tie", None]
    agreed = [
        Consensus(comparison_id=c, method="m", p_first=0.5, p_second=0.5, label=label, n_votes=3)  # type: ignore[arg-type]
        for c, label in zip(ids, labels, strict=True)
        if label
    ]
    came = Preference(
        snapshot_id="s", comparison_id=ids[4], prompt=[], chosen="bad", rejected="good", p_chosen=1.0, split="test"
    )
    store.append([model, *guesses, *agreed, came])
    margin = quantity_values(store, "reward_margin")
    assert margin["value"].tolist()[:3] == pytest.approx([math.log(9), math.log(0.25), 0.0])
    assert margin["value"].iloc[3] == pytest.approx(-math.log(1e12), rel=1e-3)
    assert len(margin) == 4  # a tie is no truth
    gap = quantity_values(store, "calibration", model.id)["value"].tolist()
    assert gap == pytest.approx([0.9 - 1, 0.8 - 0, 0.5 - 0.5, 1.0 - 0])


def test_streams_are_charted_by_name(store: Store) -> None:
    observe(store, calm(30), model_id="m1")
    observe(store, [0.5, 1.0, 2.0, 4.0] * 10, stream="latency")
    observe(store, [1.0, 2.0, 4.0], stream="mood")
    assert quantity_chart(store, "kl", "m1").source["by"] == "model"
    assert quantity_values(store, "latency")["value"].tolist()[:4] == pytest.approx(np.log([0.5, 1, 2, 4]))
    assert quantity_chart(store, "mood").chart.kind == "individuals"
    with pytest.raises(MissingError, match=r"there are agreement, .*mood"):
        quantity_values(store, "moods")
    with pytest.raises(MissingError, match="there are some of m1"):
        quantity_values(store, "kl", "m2")


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_an_empty_store_is_not_enough(store: Store, quantity: str) -> None:
    with pytest.raises(InputError, match="not enough data"):
        quantity_chart(store, quantity)
    with pytest.raises(MissingError, match="some of nobody"):
        quantity_chart(store, quantity, "ada")


def stream_of(n: int, minutes: float = 1) -> pd.DataFrame:
    at = [START + timedelta(minutes=i * minutes) for i in range(n)]
    return pd.DataFrame({"at": pd.to_datetime(at, utc=True), "value": np.arange(float(n))})


def test_full_subgroups_never_change() -> None:
    """More values make more subgroups; those that were full stay as they were."""
    long = subgroup_values(stream_of(57), 10)
    for n in range(1, 57):
        short = subgroup_values(stream_of(n), 10)
        assert len(short.groups) == n // 10
        assert all(a.tolist() == b.tolist() for a, b in zip(short.groups, long.groups, strict=False))
        assert short.moments == long.moments[: len(short.moments)]


def test_bins_of_time_wait_until_they_are_over() -> None:
    values = stream_of(150)
    at = START + timedelta(minutes=120)
    found = subgroup_values(values, "1h", until=at)
    assert [len(group) for group in found.groups] == [60, 60]
    assert found.moments == [START + timedelta(hours=1), at]
    assert len(subgroup_values(values, "1h", until=at - timedelta(seconds=1)).groups) == 1
    gap = pd.concat([values[:30], values[130:]], ignore_index=True)
    assert [len(group) for group in subgroup_values(gap, "60min").groups] == [30, 20]
    assert len(subgroup_values(values[:61], "1h", least=2).groups) == 1


@pytest.mark.parametrize("every", ["week", "-1h", "0h", 0, "", "1e9999"])
def test_sizes_that_are_none(every: str | int) -> None:
    with pytest.raises(InputError):
        subgroup_values(stream_of(9), every)


def test_time_that_goes_backwards_is_refused() -> None:
    with pytest.raises(InputError, match="time goes backwards at value 1"):
        subgroup_values(stream_of(9)[::-1], 3)


def test_frozen_limits_stay_when_new_values_come(store: Store) -> None:
    observe(store, calm(40))
    limits = freeze_quantity(store, "kl", reason="forty days")
    before = frozen_chart(store, "kl").chart
    observe(store, (np.array(calm(40, 1)) + 3).tolist(), first=40)
    after = frozen_chart(store, "kl")
    assert after.limits == limits
    assert after.chart.upper[:40].tolist() == before.upper.tolist()
    assert after.chart.parameters == before.parameters
    assert len(after.chart.outside) >= 40
    fresh = quantity_chart(store, "kl")
    assert fresh.limits is None
    assert fresh.chart.upper[0] != before.upper[0]


def test_watching_finds_what_came_later_and_only_once(store: Store) -> None:
    noise = calm(60, seed=4)
    noise[7] = 9.0  # within the frozen period: was known when the limits were frozen
    observe(store, noise[:40], model_id="m1")
    freeze_quantity(store, "kl", "m1", reason="forty days, one point with a known cause", exclude=[7])
    assert watch_charts(store, rules="limits").signals == []
    observe(store, [*noise[40:50], 5.0, *noise[50:]], first=40, model_id="m1")
    found = watch_charts(store, rules="limits")
    assert {(one.chart, one.rule, one.index) for one in found.signals} == {
        ("kl of m1", "limits", 50),
        ("kl of m1", "limits of moving range", 50),
    }
    assert found.signals[0].happened_at == START + timedelta(days=50)
    assert (found.charts, found.skipped) == (["kl of m1"], {})
    assert watch_charts(store, rules="limits").signals == []
    assert watch_quantity(store, "kl of m1", rules="limits") == []
    assert [one.action for one in pending_actions(store)] == ["propose", "propose"]


def test_excluded_points_do_not_widen_the_limits(store: Store) -> None:
    noise = calm(40)
    observe(store, [*noise[:20], 9.0, *noise[20:]])
    wide, narrow = (freeze_quantity(store, "kl", reason="?", exclude=out) for out in ((), (20,)))
    assert narrow.parameters["sigma"] < wide.parameters["sigma"] / 2
    assert narrow.parameters == individuals_chart(noise).parameters | {"source": narrow.parameters["source"]}
    assert (narrow.version, narrow.parameters["source"]["excluded"], narrow.n_points) == (2, [20], 40)
    with pytest.raises(InputError, match="there is no point 41"):
        freeze_quantity(store, "kl", reason="?", exclude=[41])


def test_one_chart_that_cannot_be_judged_does_not_stop_the_others(store: Store) -> None:
    observe(store, calm(30))
    freeze_quantity(store, "kl", reason="month")
    about = {"quantity": "mood", "who": None, "every": 1, "through": START.isoformat()}
    freeze_limits(store, "mood", individuals_chart(calm(9)), reason="?", source=about)
    freeze_limits(store, "drawn by hand", individuals_chart(calm(9)), reason="?")
    found = watch_charts(store)
    assert found.charts == ["kl"]
    assert list(found.skipped) == ["mood"]
    with pytest.raises(InputError, match="not of a quantity"):
        frozen_chart(store, "drawn by hand")


def test_a_drop_in_gold_accuracy_is_found_and_named(store: Store) -> None:
    votes(store, 150, wrong={*range(4, 100, 10), *range(100, 150, 2)})
    freeze_quantity(store, "gold_accuracy", "ada", reason="first 100", through=START + timedelta(minutes=99))
    freeze_quantity(store, "speed", "ada", reason="first 100", through=START + timedelta(minutes=99))
    signals = watch_charts(store, rules="limits").signals
    assert {one.chart for one in signals} == {"gold_accuracy of ada"}
    assert min(one.index for one in signals) <= 11
    wanted = pending_actions(store)[0]
    assert (wanted.action, wanted.annotator_id) == ("requalify", "ada")


def test_charts_are_drawn_twice_the_same() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("holoviews")
    from rlhf_workbench.monitor.chart_plots import chart_view, panel_table, plot_chart
    from rlhf_workbench.monitor.chart_rules import find_hits

    chart = individuals_chart([2.0, 9.0, *calm(30)], limits={"mean": 2.0, "sigma": 0.1})
    hits = find_hits(chart)
    table = panel_table(chart, hits, labels=[f"<b>{i}</b>" for i in range(32)])
    assert table["rules"].iloc[1] == "nelson-1"
    assert (table["rules"] != "").sum() == len({p for hit in hits for p in hit.points if hit.panel == "value"})
    figure = plot_chart(chart, hits, title="a $ and <b>")
    assert [axes.get_ylabel() for axes in figure.axes] == ["value", "moving range"]
    view = chart_view(chart, hits, labels=table["label"])
    assert len(view) == 2
    red = [part for part in view.traverse(lambda x: x) if type(part).__name__ == "Scatter"][1]
    assert red.dimension_values("index").tolist() == table.loc[table["rules"] != "", "index"].tolist()
    stepped = p_chart([5, 50], [50, 500])
    assert len(chart_view(stepped)) == 1
    assert len(plot_chart(stepped).axes) == 1
