"""Calibration: the measures have their properties, T never harms, the report opens without a network."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")

from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.core.schema import Comparison, Generation, Model, Prediction, Preference, Prompt
from rlhf_workbench.monitor.calibration import (
    adaptive_ece,
    brier,
    ece,
    fit_temperature,
    mce,
    nll,
    pair_probabilities,
    plot_reliability,
    reliability_table,
    scale_probabilities,
)
from rlhf_workbench.monitor.calibration_intervals import chance_ece, ece_interval
from rlhf_workbench.monitor.model_calibration import calibrate_model
from rlhf_workbench.monitor.outcomes import preference_outcomes
from rlhf_workbench.store.tables import Store, connect

settings.register_profile("quick", max_examples=40, deadline=None)
settings.load_profile("quick")

DATA = Path(__file__).parent.parent.parent / "shared/data/calibration"
MEASURES = (ece, adaptive_ece, mce, brier, nll)
pairs = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)
tables = st.integers(2, 5).flatmap(
    lambda k: st.lists(
        st.tuples(st.lists(st.floats(0.01, 1), min_size=k, max_size=k), st.integers(0, k - 1)), min_size=2, max_size=40
    )
)


def as_table(rows: list[tuple[list[float], int]]) -> tuple[np.ndarray, np.ndarray]:
    weights = np.array([weights for weights, _ in rows])
    return weights / weights.sum(axis=1, keepdims=True), np.array([label for _, label in rows])


@given(pairs)
def test_which_answer_is_called_first_does_not_matter(rows: list[tuple[float, bool]]) -> None:
    p, better = np.array([p for p, _ in rows]), np.array([b for _, b in rows])
    one, other = pair_probabilities(p, better), pair_probabilities(1 - p, ~better)
    for measure in (ece, adaptive_ece, mce):
        assert measure(*one) == measure(*other)
    assert brier(*one) == pytest.approx(brier(*other))
    assert nll(*one) == pytest.approx(nll(*other), rel=1e-3)  # 1 - 1e-17 is 1
    assert ece_interval(*one, seed=0, draws=20) == ece_interval(*other, seed=0, draws=20)


@given(pairs, st.randoms(use_true_random=False))
def test_each_pair_may_be_swapped_by_itself(rows: list[tuple[float, bool]], random: object) -> None:
    swapped = [(1 - p, not b) if random.random() < 0.5 else (p, b) for p, b in rows]  # type: ignore[attr-defined]
    one, other = (pair_probabilities(*zip(*part, strict=True)) for part in (rows, swapped))
    assert ece(*one) == pytest.approx(ece(*other), abs=1e-12)
    assert fit_temperature(*one, prior_sd=1) == pytest.approx(fit_temperature(*other, prior_sd=1), rel=1e-3)


@given(tables, st.randoms(use_true_random=False))
def test_order_of_rows_and_names_of_classes_do_not_matter(rows: list[tuple[list[float], int]], random: object) -> None:
    probs, labels = as_table(rows)
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    classes = list(range(probs.shape[1]))
    random.shuffle(classes)  # type: ignore[attr-defined]
    for measure in MEASURES:
        found = measure(probs, labels)
        assert measure(probs[order], labels[order]) == pytest.approx(found, abs=1e-9)
        assert measure(probs[:, classes], np.argsort(classes)[labels]) == pytest.approx(found, abs=1e-9)


@given(tables)
def test_ece_lies_between_the_overall_gap_and_the_largest_gap(rows: list[tuple[list[float], int]]) -> None:
    probs, labels = as_table(rows)
    table = reliability_table(probs, labels)
    assert table["n"].sum() == len(rows)
    overall = abs((table["n"] * (table["confidence"] - table["accuracy"])).sum()) / len(rows)
    assert overall - 1e-9 <= ece(probs, labels) <= mce(probs, labels) + 1e-9
    assert ((table["confidence"] > table["lo"]) & (table["confidence"] <= table["hi"] + 1e-12)).all()
    assert ((table["accuracy_lo"] <= table["accuracy"]) & (table["accuracy"] <= table["accuracy_hi"])).all()


@given(tables, st.sampled_from([np.inf, 1.0, 0.2]))
def test_temperature_never_makes_the_fitted_rows_worse(rows: list[tuple[list[float], int]], prior_sd: float) -> None:
    probs, labels = as_table(rows)
    temperature = fit_temperature(probs, labels, prior_sd=prior_sd)
    scaled = scale_probabilities(probs, temperature)
    assert 0.02 <= temperature <= 50
    assert nll(scaled, labels) <= nll(probs, labels) + 1e-12
    assert scaled.sum(axis=1) == pytest.approx(1)
    assert (np.argsort(scaled, axis=1, kind="stable")[:, -1] == np.argsort(probs, axis=1, kind="stable")[:, -1]).all()


@pytest.mark.parametrize("k", [2, 4])
def test_a_perfect_model_has_a_small_ece_and_needs_no_temperature(k: int) -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(k, 0.7), size=20_000)
    labels = (probs.cumsum(axis=1) < rng.uniform(size=(20_000, 1))).sum(axis=1)
    assert ece(probs, labels) < 0.015
    assert ece(probs, labels) < 2 * chance_ece(probs, labels, seed=0)[0]
    assert fit_temperature(probs, labels) == pytest.approx(1, abs=0.03)


def test_interval_holds_the_true_value_also_with_few_rows() -> None:
    """Perfectly calibrated pairs, so the truth is 0; the plain percentile interval never held it."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        p = rng.uniform(size=40)
        probs, labels = pair_probabilities(p, rng.uniform(size=40) < p)
        held += ece_interval(probs, labels, seed=seed, draws=150)[0] == 0
    assert held >= 90


def test_interval_is_the_same_for_the_same_seed() -> None:
    probs, labels = pair_probabilities([0.9, 0.2, 0.7, 0.6] * 5, [1, 0, 0, 1] * 5)
    assert ece_interval(probs, labels, seed=3) == ece_interval(probs, labels, seed=3)


@pytest.mark.parametrize(
    ("name", "ece_before", "ece_after", "temperature", "nll_after", "brier_after"),
    [
        ("cifar10_lenet5", 0.1108, 0.0159, 1.4066, 1.3056, 0.5978),
        ("cifar100_wideresnet16x4_first5000", 0.0521, 0.0362, 1.1191, 0.9469, 0.3444),
    ],
)
def test_published_networks(
    name: str, ece_before: float, ece_after: float, temperature: float, nll_after: float, brier_after: float
) -> None:
    if not DATA.is_dir():
        pytest.skip(f"needs the shared data at {DATA}")
    with np.load(DATA / f"{name}.npz") as file:
        probs, labels = file["probs"], file["labels"]
    assert ece(probs[1::2], labels[1::2]) == pytest.approx(ece_before, abs=5e-5)
    fitted = fit_temperature(probs[::2], labels[::2])
    assert fitted == pytest.approx(temperature, abs=5e-4)
    scaled = scale_probabilities(probs[1::2], fitted)
    assert ece(scaled, labels[1::2]) == pytest.approx(ece_after, abs=1e-4)
    assert nll(scaled, labels[1::2]) == pytest.approx(nll_after, abs=1e-4)
    assert brier(scaled, labels[1::2]) == pytest.approx(brier_after, abs=1e-4)


@pytest.mark.parametrize(
    ("probs", "labels", "says"),
    [
        ([], [], "n > 0"),
        ([[0.5, 0.5]], [0, 1], "n labels"),
        ([[0.5, 0.6]], [0], "sum to 1"),
        ([[float("nan"), 1]], [0], "finite"),
        ([[1.2, -0.2]], [0], "at least 0"),
        ([[0.5, 0.5]], [2], "labels must be"),
        ([[0.5, 0.5]], [-1], "labels must be"),
        ([[0.5, 0.5]], [0.5], "labels must be"),
    ],
)
def test_what_is_not_a_probability_is_refused(probs: list[list[float]], labels: list[float], says: str) -> None:
    for measure in (*MEASURES, fit_temperature, reliability_table):
        with pytest.raises(InputError, match=says):
            measure(probs, labels)


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="above 0"):
        scale_probabilities([[0.5, 0.5]], temperature)


def test_certain_and_wrong_is_finite() -> None:
    probs, labels = pair_probabilities([1.0, 0.0, 1.0], [False, True, True])
    assert np.isfinite(nll(probs, labels))
    assert nll(scale_probabilities(probs, fit_temperature(probs, labels)), labels) < nll(probs, labels)


def filled(store: Store, n: int, *, sharpness: float = 2.0, seed: int = 0, one_sided: bool = False) -> str:
    """A reward model's predictions on n comparisons, every second one in the test split; its id."""
    rng = np.random.default_rng(seed)
    prompt = Prompt(text="Why?")
    model = Model(name="reward", kind="reward", snapshot_id="s1")
    rows: list[object] = [prompt, model]
    for i in range(n):
        logit = rng.normal() * 1.5
        is_first = one_sided or rng.uniform() < 1 / (1 + np.exp(-logit))
        first, second = (Generation(prompt_id=prompt.id, text=f"answer {i} {side}") for side in "ab")
        pair = Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id)
        chosen, rejected = (first.text, second.text) if is_first else (second.text, first.text)
        split = "test" if i % 2 else "calibration"
        about = {"comparison_id": pair.id, "split": split}
        rows += [
            first,
            second,
            pair,
            Prediction(model_id=model.id, p_first=1 / (1 + np.exp(-sharpness * logit)), **about),
        ]
        rows += [Preference(snapshot_id="s1", prompt=[], chosen=chosen, rejected=rejected, p_chosen=1.0, **about)]
    store.append(rows)  # type: ignore[arg-type]
    return model.id


def test_step_measures_on_other_rows_than_it_fits() -> None:
    pytest.importorskip("evidently")
    with connect(":memory:") as store:
        model_id = filled(store, 400)
        figures = calibrate_model(store, run_id="r1", seed=0, model_id=model_id)
        assert next(iter(figures)) == "ece_after"
        assert figures["nll_after"] < figures["nll_before"]
        assert figures["temperature"] == pytest.approx(2, abs=0.7)
        assert (figures["rows_fitted"], figures["rows_tested"], figures["rows_left_out"]) == (200, 200, 0)
        assert figures["ece_after_interval"][0] <= figures["ece_after"] <= figures["ece_after_interval"][1]
        assert sum(row["n"] for row in figures["reliability_after"]) == 200
        again = calibrate_model(store, run_id="r2", seed=0, model_id=model_id)
        same = [name for name in figures if not name.endswith(("_id", "report"))]
        assert [again[name] for name in same] == [figures[name] for name in same]


def test_twenty_rows_give_wide_intervals_and_fewer_are_refused() -> None:
    pytest.importorskip("evidently")
    with connect(":memory:") as store:
        figures = calibrate_model(store, run_id="r", seed=0, model_id=filled(store, 20, one_sided=True))
        lo, hi = figures["ece_after_interval"]
        assert hi - lo > 0.1
        assert figures["ece_after_by_chance"] > 0.05
    with connect(":memory:") as store, pytest.raises(InputError, match="not enough data: 9 calibration rows, needs 10"):
        calibrate_model(store, run_id="r", seed=0, model_id=filled(store, 18))


def test_a_model_without_predictions_and_no_model_at_all() -> None:
    with connect(":memory:") as store:
        model = Model(name="reward", kind="reward", snapshot_id="s1")
        store.append(model)
        with pytest.raises(InputError, match="not enough data: 0 calibration"):
            calibrate_model(store, run_id="r", seed=0, model_id=model.id)
        with pytest.raises(MissingError):
            calibrate_model(store, run_id="r", seed=0, model_id="nobody")


def test_rows_that_cannot_be_read_are_missing_not_wrong() -> None:
    with connect(":memory:") as store:
        model_id = filled(store, 4)
        same = [Generation(prompt_id="p", text="the same") for _ in range(2)]
        pair = Comparison(prompt_id="p", first_id=same[0].id, second_id=same[1].id)
        about = {"comparison_id": pair.id, "split": "test"}
        row = Preference(snapshot_id="s1", prompt=[], chosen="the same", rejected="the same", p_chosen=1.0, **about)
        lost = Prediction(model_id=model_id, comparison_id="not in the snapshot", p_first=0.5, split="test")
        store.append([*same, pair, row, Prediction(model_id=model_id, p_first=0.5, **about), lost])
        rows = preference_outcomes(store, model_id)
        assert len(rows) == 6
        assert rows["first_is_better"].isna().sum() == 2


def test_report_asks_nobody_for_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("evidently")
    import socket

    def refuse(*args: object) -> None:
        raise AssertionError(f"the report wants to talk to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with connect(":memory:") as store:
        figures = calibrate_model(store, run_id="r", seed=0, model_id=filled(store, 60))
        html = (store.files() / figures["report"]).read_text(encoding="utf-8")
    assert "Expected calibration error" in html
    assert f"{figures['ece_after']:.4f}" in html
    markup = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert "<link" not in markup
    assert not re.search(r"<(script|img|iframe)[^>]*\bsrc=", markup)
    assert all(address.startswith("data:") for address in re.findall(r"url\(([^)]*)\)", markup))


def test_evidently_tests_apply_to_our_measures() -> None:
    pytest.importorskip("evidently")
    import pandas as pd
    from evidently import Dataset, Report
    from evidently.tests import lte

    from rlhf_workbench.monitor.report import evidently_metric

    table = pd.DataFrame({"p_first": [0.9, 0.9, 0.1, 0.2], "first_is_better": [0, 0, 1, 1]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        snapshot = Report([evidently_metric("brier", tests=[lte(0.25)])]).run(Dataset.from_pandas(table))
    assert [test["status"] for test in snapshot.dict()["tests"]] == ["FAIL"]


def test_plot_has_both_lines() -> None:
    pytest.importorskip("matplotlib")
    table = reliability_table(*pair_probabilities([0.9, 0.8, 0.6, 0.3], [1, 1, 0, 0]))
    axes = plot_reliability(table, table, title="T").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["before", "after"]
