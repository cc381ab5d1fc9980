"""Windows against a reference: every test keeps its level, sees what it should, and refuses what it cannot judge."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("frouros")

from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.monitor.multiplicity import adjust_p_values, select_by_e, to_e_values
from rlhf_workbench.monitor.permutation import Permuted
from rlhf_workbench.monitor.shifts import TESTS, Shift, compare

quick = settings(max_examples=30, deadline=None)
EVERY = [(kind, test) for kind, tests in TESTS.items() for test in tests]


def _draw(kind: str, rng: np.random.Generator, n: int, shift: float = 0.0) -> np.ndarray[Any, Any]:
    """Numbers with ties and a tail, five labels, or three dimensions that go together."""
    if kind == "number":
        return np.round(rng.gamma(2, 3, n) + 4 * shift, 1)
    if kind == "category":
        weights = np.array([5, 4, 3, 2, 1]) + np.array([0, 0, 0, 4, 8]) * shift
        return np.array(list("abcde"))[rng.choice(5, n, p=weights / weights.sum())]
    return rng.normal(size=(n, 3)) @ np.array([[1, 0.8, 0], [0, 1, 0], [0, 0, 1]]) + shift


@pytest.mark.parametrize(("kind", "test"), EVERY)
def test_false_alarms_are_as_rare_as_promised(kind: str, test: str) -> None:
    """At 10 %: of n runs without a shift no more than the 99.9 % point of the binomial; the e-value is 1 in the mean."""
    from scipy.stats import binom

    runs = 20 if test == "C2ST" else 120
    rounds = 99 if test != "BWS" else 49
    shifts = []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        shifts.append(compare(kind, _draw(kind, rng, 60), _draw(kind, rng, 40), test=test, rounds=rounds, seed=seed))
    assert sum(shift.p_value <= 0.1 for shift in shifts) <= binom.ppf(0.999, runs, 0.1)
    e = np.array([shift.e_value for shift in shifts])
    assert e.mean() - 3.3 * e.std() / np.sqrt(runs) <= 1
    assert all(0 <= shift.effect <= 1 for shift in shifts)


@pytest.mark.parametrize(("kind", "test"), EVERY)
def test_a_clear_shift_is_seen(kind: str, test: str) -> None:
    rng = np.random.default_rng(1)
    old, new = _draw(kind, rng, 150), _draw(kind, rng, 100, shift=1.5)
    shift = compare(kind, old, new, test=test)
    assert shift.p_value <= 0.002
    assert shift.e_value > 10
    assert shift.effect > 0.1
    assert (shift.n_reference, shift.n) == (150, 100)
    assert compare(kind, old, new, test=test) == shift
    assert compare(kind, old, old, test=test).effect <= 0.05 + (test == "C2ST")


@pytest.mark.parametrize(("kind", "test"), EVERY)
def test_nothing_in_common_is_an_effect_of_one(kind: str, test: str) -> None:
    rng = np.random.default_rng(0)
    far = {"number": 1e6 + rng.random(40), "category": np.array(["z"] * 40), "vector": 1e3 + rng.normal(size=(40, 3))}
    shift = compare(kind, _draw(kind, rng, 60), far[kind], test=test)
    assert shift.effect > 0.9
    assert shift.severity == "large"


@pytest.mark.parametrize("test", TESTS["number"])
@pytest.mark.parametrize("other", [7.0, 8.0])
def test_constants_are_judged(test: str, other: float) -> None:
    shift = compare("number", [7.0] * 30, [other] * 30, test=test)
    assert (shift.p_value < 0.01) == (other != 7)
    assert (shift.effect > 0.9) == (other != 7)


@pytest.mark.parametrize("test", TESTS["category"])
def test_one_label_is_judged(test: str) -> None:
    assert compare("category", ["a"] * 30, ["a"] * 20, test=test).p_value == 1
    assert compare("category", ["a"] * 30, ["b"] * 20, test=test).p_value < 0.01


@pytest.mark.parametrize(
    ("kind", "reference", "window", "message"),
    [
        ("number", [1.0] * 9, [1.0] * 50, "not enough data: 9 and 50 rows, needs 10"),
        ("number", [float("nan")] * 50, [1.0] * 50, "not enough data: 0 and 50"),
        ("number", [float("inf")] * 50, [1.0] * 50, "not enough data: 0 and 50"),
        ("number", ["a"] * 20, [1.0] * 20, "should be numbers"),
        ("category", [None] * 20, ["a"] * 20, "not enough data: 0 and 20"),
        ("vector", np.zeros((20, 2)), np.zeros((20, 3)), "2 in the reference and 3 in the window"),
        ("vector", [[1.0, 2.0]] * 19 + [[1.0]], np.zeros((20, 2)), "one length, got 1 to 2"),
        ("vector", [None] * 20, np.zeros((20, 2)), "not enough data: 0 and 20"),
    ],
)
def test_what_cannot_be_judged_is_refused(kind: Any, reference: Any, window: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(kind, reference, window)


def test_unknown_tests_are_named() -> None:
    with pytest.raises(MissingError, match="known: chi2, PSI"):
        compare("category", list("ab") * 20, list("ab") * 20, test="KS")
    with pytest.raises(MissingError, match="known: number, category, vector"):
        compare("image", [], [])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 19"):
        compare("number", range(20), range(20), test="EMD", rounds=5)


def test_many_rows_are_sampled_and_it_says_so() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=300_000)
    assert compare("number", numbers, numbers[:200_000]).n_reference == 100_000
    shift = compare("number", numbers, numbers[:9000] + 0.3, test="energy", rounds=99)
    assert (shift.n_reference, shift.n) == (2000, 2000)
    assert shift.p_value == 0.01


def test_kuiper_sees_a_change_of_scale_better_than_ks() -> None:
    found: dict[str, float] = {"KS": 0, "Kuiper": 0}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        old, new = rng.normal(size=100), rng.normal(0, 1.6, size=100)
        for test in found:
            found[test] += compare("number", old, new, test=test, rounds=199).p_value <= 0.05
    assert found["Kuiper"] >= found["KS"] + 4


@quick
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_permutation_values_are_valid(seed: int, ties: int) -> None:
    """Over all places that the real labelling could have, p and e are what they promise, exactly."""
    values = np.random.default_rng(seed).integers(0, ties, 40).astype(float)
    each = [Permuted(float(v), np.delete(values, i)) for i, v in enumerate(values)]
    p = np.array([one.p_value for one in each])
    for level in (0.05, 0.1, 0.5):
        assert (p <= level).mean() <= level + 1e-12
    assert np.mean([one.e_value for one in each]) <= 1 + 1e-9


def _discoveries(select: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], share: float) -> tuple[float, float]:
    """False discovery rate and power over 400 runs of 20 features that depend on each other, 6 of them drifted."""
    from scipy.stats import norm

    false, power = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        z = np.sqrt(share) * rng.normal() + np.sqrt(1 - share) * rng.normal(size=20)
        chosen = select(norm.sf(z + np.where(np.arange(20) < 6, 4.0, 0.0)))
        false.append(chosen[6:].sum() / max(1, chosen.sum()))
        power.append(chosen[:6].mean())
    return float(np.mean(false)), float(np.mean(power))


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_false_discoveries_are_kept_below_the_rate(share: float) -> None:
    by_p = _discoveries(lambda p: adjust_p_values(p) <= 0.1, share)
    by_e = _discoveries(lambda p: select_by_e(to_e_values(p), 0.1), share)
    raw = _discoveries(lambda p: p <= 0.1, share)
    assert by_p[0] <= 0.1
    assert by_e[0] <= by_p[0]
    assert raw[0] > 0.13
    assert by_p[1] > 0.9
    assert 0.5 < by_e[1] < by_p[1]


@quick
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.floats(0.01, 0.5))
def test_e_bh_is_what_its_definition_says(e_values: list[float], rate: float) -> None:
    chosen = select_by_e(e_values, rate)
    m, k = len(e_values), int(chosen.sum())
    best = max((j for j in range(1, m + 1) if j * sorted(e_values)[-j] * rate >= m), default=0)
    assert k == best
    if 0 < k < m:
        assert np.array(e_values)[chosen].min() >= np.array(e_values)[~chosen].max()


@quick
@given(st.floats(0, 1), st.floats(0, 1))
def test_smaller_p_values_make_larger_e_values(a: float, b: float) -> None:
    low, high = to_e_values(sorted([a, b]))
    assert np.isfinite(low)
    assert low >= high - 1e-3 >= 0.49


def test_severity_follows_the_effect() -> None:
    words = [Shift("KS", 1.0, effect).severity for effect in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert words == ["negligible", "small", "medium", "large", "large"]
