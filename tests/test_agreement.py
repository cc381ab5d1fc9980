"""Krippendorff's α: against an independent implementation, and what it must not depend on."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.errors import InputError
from rlhf_workbench.quality.agreement import Level, alpha_interval, krippendorff_alpha, value_counts

LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval")


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    """Votes of 2 to 6 workers on 2 to 12 tasks, labels 0 to 4, with gaps."""
    n_workers, n_tasks = draw(st.integers(2, 6)), draw(st.integers(2, 12))
    cell = st.one_of(st.none(), st.integers(0, 4))
    cells = draw(st.lists(cell, min_size=n_workers * n_tasks, max_size=n_workers * n_tasks))
    rows = [(i // n_workers, i % n_workers, label) for i, label in enumerate(cells)]
    return pd.DataFrame(rows, columns=["task", "worker", "label"]).astype({"label": "Float64"})


def same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(one) and math.isnan(other))


def _label(votes: pd.DataFrame, change: Any) -> pd.DataFrame:
    return votes.assign(label=[None if pd.isna(v) else change(v) for v in votes["label"]])


@pytest.mark.parametrize("level", LEVELS)
@given(votes=tables())
@settings(max_examples=80, deadline=None)
def test_equals_the_krippendorff_package(level: Level, votes: pd.DataFrame) -> None:
    krippendorff = pytest.importorskip("krippendorff")
    matrix = votes.pivot(index="worker", columns="task", values="label").to_numpy(dtype=float, na_value=np.nan)
    ours = krippendorff_alpha(votes, level)
    pairable = [column[~np.isnan(column)] for column in matrix.T if (~np.isnan(column)).sum() >= 2]
    if len({v for column in pairable for v in column}) < 2:
        assert math.isnan(ours)
        return
    assert same(ours, krippendorff.alpha(reliability_data=matrix, level_of_measurement=level))


@pytest.mark.parametrize("level", LEVELS)
@given(votes=tables(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_names_and_row_order_do_not_matter(level: Level, votes: pd.DataFrame, seed: int) -> None:
    names = {w: f"person {-w}" for w in range(6)}
    other = votes.sample(frac=1, random_state=seed).assign(worker=lambda d: d["worker"].map(names))
    assert same(krippendorff_alpha(votes, level), krippendorff_alpha(other, level))


@given(votes=tables(), names=st.permutations("vwxyz"))
@settings(max_examples=40, deadline=None)
def test_nominal_does_not_depend_on_the_names_of_labels(votes: pd.DataFrame, names: list[str]) -> None:
    renamed = _label(votes, lambda v: names[int(v)])
    assert same(krippendorff_alpha(votes), krippendorff_alpha(renamed))


@given(votes=tables())
@settings(max_examples=40, deadline=None)
def test_ordinal_depends_on_the_order_alone(votes: pd.DataFrame) -> None:
    alpha = krippendorff_alpha(votes, "ordinal")
    assert same(alpha, krippendorff_alpha(_label(votes, lambda v: v**3 - 7), "ordinal"))
    words = ["never", "seldom", "often", "mostly", "always"]
    renamed = _label(votes, lambda v: words[int(v)])
    assert same(alpha, krippendorff_alpha(renamed, "ordinal", order=words))
    assert same(alpha, krippendorff_alpha(renamed, "ordinal", order=words[::-1]))


@given(votes=tables(), scale=st.sampled_from([-3.0, 0.5, 12.0]), shift=st.integers(-50, 50))
@settings(max_examples=40, deadline=None)
def test_interval_does_not_depend_on_unit_and_zero(votes: pd.DataFrame, scale: float, shift: int) -> None:
    moved = _label(votes, lambda v: scale * v + shift)
    assert same(krippendorff_alpha(votes, "interval"), krippendorff_alpha(moved, "interval"))


@pytest.mark.parametrize("level", LEVELS)
@given(votes=tables(), label=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_a_task_with_one_answer_changes_nothing(level: Level, votes: pd.DataFrame, label: int) -> None:
    lone = pd.DataFrame([("lone", 0, label)], columns=["task", "worker", "label"])
    assert same(krippendorff_alpha(votes, level), krippendorff_alpha(pd.concat([votes, lone]), level))


@given(votes=tables())
@settings(max_examples=30, deadline=None)
def test_binary_labels_are_alike_on_every_level(votes: pd.DataFrame) -> None:
    binary = _label(votes, lambda v: int(v > 1))
    alphas = [krippendorff_alpha(binary, level) for level in LEVELS]
    assert same(alphas[0], alphas[2])
    assert same(alphas[0], alphas[1])


def test_perfect_agreement_is_one_and_no_variation_is_undefined() -> None:
    perfect = pd.DataFrame([(t, w, t % 3) for t in range(9) for w in range(4)], columns=["task", "worker", "label"])
    for level in LEVELS:
        assert krippendorff_alpha(perfect, level) == pytest.approx(1)
    assert math.isnan(krippendorff_alpha(perfect.assign(label=1)))
    assert math.isnan(krippendorff_alpha(perfect[perfect["worker"] == 0]))
    assert math.isnan(alpha_interval(perfect[perfect["worker"] == 0]).low)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for seed in range(60):
        truth = rng.integers(0, 2, 100)
        right = rng.random((100, 4)) < 0.8
        labels = np.where(right, truth[:, None], 1 - truth[:, None])
        rows = [(t, w, labels[t, w]) for t in range(100) for w in range(4)]
        votes = pd.DataFrame(rows, columns=["task", "worker", "label"])
        found = alpha_interval(votes, confidence=0.9, n_resamples=200, seed=seed)
        assert found.low <= found.alpha <= found.high
        hits += found.low <= 0.36 <= found.high
    assert 45 <= hits <= 60  # 54 expected


@pytest.mark.parametrize(
    ("votes", "kwargs", "message"),
    [
        (pd.DataFrame({"task": [1], "label": [1]}), {}, "missing: worker"),
        (
            pd.DataFrame({"task": [1, 1], "worker": ["a", "a"], "label": [1, 2]}),
            {},
            "worker 'a' answered task 1 twice",
        ),
        (
            pd.DataFrame({"task": [1, 1], "worker": ["a", "b"], "label": ["x", "y"]}),
            {"level": "interval"},
            "interval needs numbers",
        ),
        (pd.DataFrame({"task": [1, 1], "worker": ["a", "b"], "label": [1, 2]}), {"level": "ratio"}, "level must be"),
        (
            pd.DataFrame({"task": [1, 1], "worker": ["a", "b"], "label": ["x", "y"]}),
            {"order": ["x"]},
            "'y' is not in the order",
        ),
    ],
)
def test_errors_say_what_to_do(votes: pd.DataFrame, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        krippendorff_alpha(votes, **kwargs)


def test_a_missing_label_is_a_gap() -> None:
    votes = pd.DataFrame({"task": [1, 1, 2], "worker": ["a", "b", "a"], "label": ["x", None, "x"]})
    assert value_counts(votes).empty
    with pytest.raises(InputError, match="n_resamples"):
        alpha_interval(votes, n_resamples=0)
