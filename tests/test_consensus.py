"""Consensus: published figures, symmetries, and the step against a known truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("crowdkit", reason="needs pip install 'rlhf_workbench[collect]'")

from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.core.schema import Annotation, AnnotatorScore, Consensus
from rlhf_workbench.quality.consensus import (
    PREFERENCES,
    Method,
    aggregate_votes,
    build_consensus,
    consensus_labels,
    truth_figures,
)
from rlhf_workbench.store.tables import connect

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "consensus").exists(), reason="../shared/data is not there")
METHODS: tuple[Method, ...] = get_args(Method)
COLUMNS = ["task", "worker", "label"]
MIRROR = {"first": "second", "second": "first", "tie": "tie"}


def share_right(posterior: pd.DataFrame, truth: "pd.Series[Any]") -> float:
    """Accuracy where a tie of n labels counts 1/n."""
    known = posterior.loc[truth.index]
    best = known.ge(known.max(axis=1) - 1e-9, axis=0)
    credit = best.div(best.sum(axis=1), axis=0).to_numpy()
    return float(credit[np.arange(len(truth)), known.columns.get_indexer(pd.Index(truth))].mean())


PUBLISHED = {  # the table in the README of the shared data; GLAD on product takes most of a minute
    "dog": {"majority": 0.8222, "dawid_skene": 0.8426, "one_coin": 0.8302, "mace": 0.8364, "glad": 0.8340},
    "product": {"majority": 0.8966, "dawid_skene": 0.9397, "one_coin": 0.9084, "mace": 0.6950},
    "snow_rte": {"majority": 0.8969, "dawid_skene": 0.9275, "one_coin": 0.9250, "mace": 0.9250, "glad": 0.9250},
}
CASES = [(name, method) for name, row in PUBLISHED.items() for method in row]


@needs_data
@pytest.mark.parametrize(("name", "method"), CASES)
def test_accuracy_on_the_classic_sets(name: str, method: Method) -> None:
    votes = pd.read_parquet(DATA / "consensus" / f"{name}_labels.parquet")
    truth = pd.read_parquet(DATA / "consensus" / f"{name}_truth.parquet").set_index("task")["truth"]
    posterior = aggregate_votes(votes, method, sorted(votes["label"].unique())).posterior
    assert share_right(posterior, truth) == pytest.approx(PUBLISHED[name][method], abs=0.005)


def ukp() -> tuple[pd.DataFrame, "pd.Series[str]"]:
    words = {"a1": "first", "a2": "second", "equal": "tie"}
    votes = pd.read_parquet(DATA / "preferences" / "ukpconvarg1_votes.parquet")
    pairs = pd.read_parquet(DATA / "preferences" / "ukpconvarg1_pairs.parquet").set_index("pair")
    table = pd.DataFrame({"task": votes["pair"], "worker": votes["worker"], "label": votes["value"].map(words)})
    return table, pairs["gold"].map(words).dropna()


@needs_data
@pytest.mark.parametrize(
    ("method", "accuracy", "direction"),
    [("majority", 0.886, 0.958), ("symmetric", 0.931, 0.974), ("dawid_skene", 0.895, 0.967), ("one_coin", 0.846, 0.953),
     ("mace", 0.915, 0.964)],
)  # fmt: skip
def test_accuracy_on_real_preferences(method: Method, accuracy: float, direction: float) -> None:
    votes, gold = ukp()
    figures = truth_figures(aggregate_votes(votes, method).posterior, gold)
    assert figures["accuracy"] == pytest.approx(accuracy, abs=0.005)
    assert figures["accuracy_direction"] == pytest.approx(direction, abs=0.005)


def test_one_coin_equals_crowd_kit() -> None:
    from crowdkit.aggregation import OneCoinDawidSkene

    rng = np.random.default_rng(0)
    rows = [(t, w, rng.choice(PREFERENCES)) for t in range(40) for w in rng.choice(9, 4, replace=False)]
    votes = pd.DataFrame(rows, columns=COLUMNS)
    theirs = OneCoinDawidSkene(n_iter=100).fit_predict_proba(votes)
    ours = aggregate_votes(votes, "one_coin").posterior
    np.testing.assert_allclose(ours, theirs.loc[ours.index, ours.columns], atol=1e-6)


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    """Votes with gaps: 1 to 8 tasks, 1 to 5 workers, at least one vote."""
    n_workers, n_tasks = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    cell = st.one_of(st.none(), st.sampled_from(PREFERENCES))
    cells = draw(st.lists(cell, min_size=n_workers * n_tasks, max_size=n_workers * n_tasks))
    cells[0] = cells[0] or "first"
    rows = [(i // n_workers, f"w{i % n_workers}", label) for i, label in enumerate(cells)]
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.mark.parametrize("method", METHODS)
@given(votes=tables())
@settings(max_examples=12, deadline=None)
def test_every_table_of_votes_gives_probabilities(method: Method, votes: pd.DataFrame) -> None:
    found = aggregate_votes(votes, method)
    voted = votes[votes["label"].notna()]
    assert list(found.posterior.index) == list(voted["task"].unique())
    assert list(found.posterior.columns) == list(PREFERENCES)
    np.testing.assert_allclose(found.posterior.sum(axis=1), 1)
    assert found.posterior.to_numpy().min() >= 0
    assert found.annotators["accuracy"].between(0, 1 + 1e-9).all()
    assert found.annotators["n_votes"].sum() == len(voted)


@pytest.mark.parametrize("method", ["majority", "symmetric"])
@given(votes=tables(), turned=st.sets(st.integers(0, 7)))
@settings(max_examples=25, deadline=None)
def test_exchanging_first_and_second_in_some_tasks_exchanges_their_posteriors(
    method: Method, votes: pd.DataFrame, turned: set[int]
) -> None:
    is_turned = votes["task"].isin(turned)
    other = votes.assign(label=votes["label"].where(~is_turned, votes["label"].map(MIRROR)))
    one, two = aggregate_votes(votes, method).posterior, aggregate_votes(other, method).posterior
    back = np.where(two.index.isin(turned)[:, None], two[["second", "first", "tie"]], two)
    np.testing.assert_allclose(one, back, atol=1e-6)


@given(votes=tables(), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_majority_does_not_depend_on_the_order_of_rows(votes: pd.DataFrame, seed: int) -> None:
    one = aggregate_votes(votes, "majority").posterior
    two = aggregate_votes(votes.sample(frac=1, random_state=seed), "majority").posterior
    assert consensus_labels(one).to_dict() == consensus_labels(two).to_dict()


def crowd(seed: int, n_tasks: int = 1200, n_workers: int = 300) -> tuple[pd.DataFrame, "pd.Series[str]"]:
    """Five votes a task by people who come for about twenty, with a lead seen through logistic noise."""
    rng = np.random.default_rng(seed)
    lead, skill = rng.normal(0, 1.3, n_tasks), rng.uniform(0.4, 5, n_workers)
    rows = []
    for task in range(n_tasks):
        for worker in rng.choice(n_workers, 5, replace=False):
            seen = skill[worker] * lead[task] + rng.logistic()
            rows.append((task, worker, "tie" if abs(seen) < 0.4 else "first" if seen > 0 else "second"))
    truth = np.where(np.abs(lead) < 0.1, "tie", np.where(lead > 0, "first", "second"))
    return pd.DataFrame(rows, columns=COLUMNS), pd.Series(truth)


def test_symmetry_keeps_rare_ties_in_bounds() -> None:
    votes, truth = crowd(0)
    found = {m: aggregate_votes(votes, m).posterior for m in METHODS if m not in ("glad", "mace", "one_coin")}
    figures = {m: truth_figures(p, truth) for m, p in found.items()}
    ties = {m: float((consensus_labels(p) == "tie").mean()) for m, p in found.items()}
    true_ties = float((truth == "tie").mean())
    assert abs(ties["symmetric"] - true_ties) < abs(ties["dawid_skene"] - true_ties)
    assert figures["symmetric"]["accuracy"] > figures["dawid_skene"]["accuracy"]
    assert figures["symmetric"]["accuracy_direction"] > figures["majority"]["accuracy_direction"]


def test_recovers_the_quality_of_annotators() -> None:
    rng = np.random.default_rng(1)
    skill = {"good": 0.95, "fair": 0.8, "poor": 0.6, "contrary": 0.1, "fine": 0.9}
    truth = rng.choice(["first", "second"], 400)
    rows = [(t, w, z if rng.random() < p else MIRROR[z]) for t, z in enumerate(truth) for w, p in skill.items()]
    scores = aggregate_votes(pd.DataFrame(rows, columns=COLUMNS)).annotators.set_index("worker")["accuracy"]
    for worker, p in skill.items():
        assert scores[worker] == pytest.approx(p, abs=0.05)


@pytest.mark.parametrize(
    ("rows", "method", "message"),
    [
        ([(1, "a", "first"), (1, "a", "tie")], "symmetric", "twice"),
        ([(1, "a", "better")], "symmetric", "'better' is not in the order"),
        ([(1, "a", None)], "symmetric", "there are no votes"),
        ([(1, "a", "tie")], "wawa", "method must be one of"),
    ],
)
def test_errors_say_what_to_do(rows: Sequence[tuple[Any, ...]], method: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregate_votes(pd.DataFrame(rows, columns=COLUMNS), method)


def vote(comparison: str, who: str, label: Any, **kwargs: Any) -> Annotation:
    return Annotation(comparison_id=comparison, annotator_id=who, label=label, **{"queue": "q", **kwargs})


def test_step_leaves_skips_out_and_records_both_tables() -> None:
    with connect(":memory:") as store:
        earlier = vote("c1", "ann", "second")
        store.append([earlier, vote("c1", "bob", "first"), vote("c2", "bob", "second"), vote("c2", "ann", "second")])
        store.append([vote("c1", "ann", "first", replaces=earlier.id), vote("c3", "ann", "skip")])
        store.append([vote("c1", "x", "second", queue="other"), vote("c1", "oracle", "first", queue="q/truth")])
        figures = build_consensus(store, run_id="r", seed=0, queue="q", truth_queue="q/truth")
        assert next(iter(figures)) == "accuracy"
        assert (figures["accuracy"], figures["n_truth"], figures["n_votes"]) == (1.0, 1, 4)
        found = {c.comparison_id: c for c in store.records(Consensus, run_id="r")}
        assert {c: f.label for c, f in found.items()} == {"c1": "first", "c2": "second"}
        assert all(abs(f.p_first + f.p_second + f.p_tie - 1) < 1e-9 for f in found.values())
        assert found["c1"].n_votes == 2
        scores = store.records(AnnotatorScore, run_id="r")
        assert [(s.annotator_id, s.n_votes) for s in scores] == [("ann", 2), ("bob", 2)]
        assert scores[0].metadata == {"share_left": 0.5}


def test_step_without_truth_begins_with_alpha_and_repeats() -> None:
    runs = []
    for _ in range(2):
        with connect(":memory:") as store:
            votes, _truth = crowd(3, n_tasks=60, n_workers=8)
            store.append([vote(f"c{t:03}", f"w{w}", label) for t, w, label in votes.itertuples(index=False)])
            runs.append(build_consensus(store, run_id="r", seed=5, queue="q"))
    assert runs[0] == runs[1]
    assert next(iter(runs[0])) == "alpha"
    assert runs[0]["alpha_low"] < runs[0]["alpha"] < runs[0]["alpha_high"]


def test_step_names_a_queue_that_nobody_answered() -> None:
    with connect(":memory:") as store, pytest.raises(MissingError, match="queue 'q' has no answers"):
        build_consensus(store, run_id="r", seed=0, queue="q")


def test_undefined_alpha_is_null_and_few_annotators_are_shown() -> None:
    with connect(":memory:") as store:
        store.append([vote("c1", f"w{i:02}", "first") for i in range(30)])
        figures = build_consensus(store, run_id="r", seed=0, queue="q")
    assert figures["alpha"] is None
    assert (figures["n_annotators"], len(figures["annotators"])) == (30, 20)


def test_an_exact_tie_is_a_tie() -> None:
    posterior = pd.DataFrame({"first": [0.5, 0.4, 1 / 3], "second": [0.5, 0.35, 1 / 3], "tie": [0.0, 0.25, 1 / 3]})
    assert consensus_labels(posterior).tolist() == ["tie", "first", "tie"]
