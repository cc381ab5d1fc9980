"""Fewer labels where that is possible, and an order that is an order."""

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.errors import InputError
from rlhf_workbench.train.active import (
    information_gain,
    known_matrix,
    preference_entropy,
    select_pairs,
    widths,
)
from rlhf_workbench.train.curriculum import allowed_share, curriculum_order, difficulty

Floats = npt.NDArray[np.float64]
D = 12


def _alike(rng: np.random.Generator, n: int) -> Floats:
    """All respects vary alike."""
    return rng.normal(size=(n, D))


def _few(rng: np.random.Generator, n: int) -> Floats:
    """A pair differs in few of the respects, as two answers of one model do."""
    return 1.5 * rng.normal(size=(n, D)) * np.where(rng.random((n, D)) < 0.15, 1, 0.05)


def _fit(z: Floats, ridge: float = 1.0) -> Floats:
    """Bradley–Terry by Newton's method: the weights that explain that each row won."""
    w = np.zeros(z.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(z @ w))
        w = w + np.linalg.solve(ridge * np.eye(len(w)) + (z.T * p * (1 - p)) @ z, z.T @ p - ridge * w)
    return w


def _labels_needed(draw: Callable[[np.random.Generator, int], Floats], strategy: str, seed: int, goal: float) -> int:
    """How many labels until the reward is right on a share of new pairs; asked ten at a time, at most 200."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=D)
    w *= 3 / np.linalg.norm(w)
    pool, new = draw(rng, 1500), draw(rng, 3000)
    vote = np.where(rng.random(1500) < 1 / (1 + np.exp(-pool @ w)), 1, -1)
    done: list[int] = []
    for batch in range(20):
        rest = np.setdiff1d(np.arange(1500), done)
        done += rest[select_pairs(pool[rest], 10, strategy, 20 * seed + batch, asked=pool[done], ridge=0.1)].tolist()
        if np.mean((new @ _fit(pool[done] * vote[done, None]) > 0) == (new @ w > 0)) >= goal:
            break
    return len(done)


@pytest.mark.parametrize(("draw", "goal", "saving"), [(_few, 0.85, 2.0), (_alike, 0.85, 1.1)])
def test_information_needs_fewer_labels_than_chance(
    draw: Callable[[np.random.Generator, int], Floats], goal: float, saving: float
) -> None:
    seeds = range(30)
    needed = {s: np.array([_labels_needed(draw, s, seed, goal) for seed in seeds]) for s in ("information", "random")}
    print({s: n.mean() for s, n in needed.items()})
    assert needed["random"].mean() > saving * needed["information"].mean()
    saved = needed["random"] - needed["information"]
    assert saved.mean() - 3 * saved.std() / len(saved) ** 0.5 > 0, "more than three standard errors"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), d=st.integers(1, 6))
def test_every_strategy_picks_different_pairs(seed: int, n: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    z, p = rng.normal(size=(n, d)), rng.random(n)
    for strategy in ("information", "entropy", "random"):
        for k in {1, n}:
            picked = select_pairs(z, k, strategy, seed, p_first=p)
            assert len(set(picked.tolist())) == k
            assert picked.tolist() == select_pairs(z, k, strategy, seed, p_first=p).tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_quick_update_is_the_slow_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z, asked = rng.normal(size=(15, 4)), rng.normal(size=(3, 4))
    known, expected = known_matrix(asked, 4), []
    for _ in range(6):
        wide = widths(z, known)
        wide[expected] = -1
        expected.append(int(wide.argmax()))
        known = known + np.outer(z[expected[-1]], z[expected[-1]])
    assert select_pairs(z, 6, asked=asked).tolist() == expected


def test_a_greedy_batch_is_nearly_the_best_one() -> None:
    rng = np.random.default_rng(1)
    z = rng.normal(size=(12, 4))

    def told(batch: tuple[int, ...]) -> float:
        return float(np.linalg.slogdet(known_matrix(z[list(batch)], 4))[1])

    best = max(told(batch) for batch in itertools.combinations(range(12), 4))
    assert told(tuple(select_pairs(z, 4).tolist())) >= (1 - 1 / np.e) * best


def test_the_information_of_a_batch_adds_up() -> None:
    z = np.random.default_rng(0).normal(size=(5, 3))
    known, total = known_matrix([], 3), 0.0
    for row in z:
        total += float(information_gain([row], known)[0])
        known = known + np.outer(row, row)
    assert total == pytest.approx(0.5 * np.linalg.slogdet(known_matrix(z, 3))[1])


def test_entropy_is_highest_at_an_even_bet() -> None:
    p = np.linspace(0, 1, 101)
    bits = preference_entropy(p)
    assert bits.argmax() == 50
    assert bits == pytest.approx(bits[::-1])
    assert (bits.min(), bits.max()) == pytest.approx((0, 1), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: select_pairs([[1.0]], 2), "between 1 and the number of pairs, 1; got 2"),
        (lambda: select_pairs([[1.0]], 1, "luck"), "one of information, entropy, random"),
        (lambda: select_pairs([[1.0]], 1, "entropy"), "needs p_first"),
        (lambda: select_pairs([[1.0]], 1, ridge=0), "ridge must be above 0"),
        (lambda: allowed_share(0.5, start=0), r"in \(0, 1\]"),
        (lambda: curriculum_order([0.5], "leisurely"), "one of sorted, slow"),
        (lambda: difficulty(pd.DataFrame({"p_chosen": [1.0]}), ("model",)), "needs a column margin"),
    ],
)
def test_what_cannot_be_done_is_said(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


@settings(max_examples=40, deadline=None)
@given(
    hardness=st.lists(st.floats(0, 1), max_size=60),
    pace=st.sampled_from(["sorted", "slow", "steady", "quick", "random"]),
)
def test_an_order_holds_every_pair_once_and_repeats(hardness: list[float], pace: str) -> None:
    order = curriculum_order(hardness, pace, seed=5)
    assert sorted(order.tolist()) == list(range(len(hardness)))
    assert order.tolist() == curriculum_order(hardness, pace, seed=5).tolist()


def test_nothing_is_shown_before_it_is_let_in() -> None:
    hardness = np.random.default_rng(0).permutation(200) / 200
    order = curriculum_order(hardness, "slow")
    let_in = np.ceil(allowed_share(np.arange(200) / 200, 0.1, 0.9) * 200)
    assert (hardness[order] * 200 < let_in).all()


def test_difficulty_averages_what_it_is_given() -> None:
    rows = pd.DataFrame({"p_chosen": [0.9, 0.6], "margin": [-1.0, 2.0], "chosen": ["a", "b"], "rejected": ["c", "d"]})
    assert difficulty(rows).tolist() == [0.25, 0.75]
    assert difficulty(rows, ("consensus", "model")).tolist() == [0.5, 0.5]
