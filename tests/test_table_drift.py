"""Two tables: each column by its kind, findings adjusted together, odd input refused or stated."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("frouros")
pytest.importorskip("sklearn")

from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.monitor.spaces import FeatureSpace, compare_samples, embed_texts, joint_matrix, read_space
from rlhf_workbench.monitor.table_drift import TableDrift, column_kind, compare_tables

QUESTIONS = {
    "law": ["May the court hear the appeal?", "What is a contract?", "Who may sue a company?", "When is a vote void?"],
    "food": ["How long does bread bake?", "Is rye sour?", "What goes with beans?", "Can I freeze soup again?"],
}


def table(seed: int, n: int = 150, law: float = 0.5, mean: float = 0.0) -> pd.DataFrame:
    """A column of every kind; `law` moves topic and text, `mean` the vectors."""
    rng = np.random.default_rng(seed)
    topics = np.where(rng.random(n) < law, "law", "food")
    return pd.DataFrame(
        {
            "length": rng.integers(5, 90, n),
            "seconds": rng.gamma(3, 4, n),
            "topic": topics,
            "text": [
                f"{rng.choice(QUESTIONS[t])} {rng.choice(QUESTIONS[t])}, number {rng.integers(99)}" for t in topics
            ],
            "vector": list(rng.normal(mean, 1, (n, 3))),
            "is_swapped": rng.random(n) < 0.5,
            "at": pd.Timestamp("2026-01-05", tz="UTC") + pd.to_timedelta(rng.random(n), unit="D"),
        }
    )


def drift(old: pd.DataFrame, new: pd.DataFrame, **settings: Any) -> TableDrift:
    return compare_tables(old, new, **{"rounds": 199, "is_joint": False} | settings)


def test_every_kind_is_recognised_and_only_what_changed_is_found() -> None:
    result = compare_tables(table(0), table(1, law=0.85, mean=0.7), rounds=199)
    kinds = {one.space.name: one.space.kind for one in result.features}
    assert kinds == {
        "length": "number",
        "seconds": "number",
        "topic": "category",
        "text": "text",
        "vector": "vector",
        "is_swapped": "category",
        "at": "number",
    }
    assert {one.space.name for one in result.drifted} == {"topic", "text", "vector"}
    assert result.joint is not None
    assert result.joint.p_value <= 0.01
    assert result.drifted[0].space.name == "topic" or result.drifted[0].shift.effect >= result.drifted[1].shift.effect


def test_same_tables_give_the_same_json_and_it_is_plain() -> None:
    found = [compare_tables(table(0), table(1, law=0.8), rounds=99, seed=3).to_json() for _ in range(2)]
    assert found[0] == found[1]
    assert json.loads(json.dumps(found[0], allow_nan=False)) == found[0]
    keys = {"feature", "kind", "test", "statistic", "p", "q", "e", "effect", "severity", "is_drifted", "enough"}
    assert all(keys <= set(one) for one in found[0]["features"])
    assert found[0]["n_reference"] == found[0]["n"] == 150


def test_a_comparison_where_nothing_happened_is_quiet_most_of_the_time() -> None:
    """At a rate of 20 %, 40 runs: 8 expected at most; the 99.9 % point of the binomial is 16."""
    columns = ["length", "seconds", "topic", "is_swapped", "vector"]
    alarms = [
        bool(drift(table(s, 60), table(s + 999, 50), features=columns, rounds=99, fdr=0.2).drifted) for s in range(40)
    ]
    assert sum(alarms) <= 16


def test_a_budget_is_stricter_than_the_rate() -> None:
    old, new = table(0), table(3, law=0.63)
    loose, strict = (drift(old, new, features=["topic"], fdr=0.2, budget=b) for b in (None, 1e-6))
    assert [len(loose.drifted), len(strict.drifted)] == [1, 0]
    assert strict.level == 1e-6


def test_too_few_shuffles_for_the_budget_are_stated() -> None:
    notes = drift(table(0), table(1), budget=1e-3).notes
    assert any("raise rounds to 7000" in note for note in notes)
    assert not any("shuffles" in note for note in drift(table(0), table(1), rounds=999).notes)


@pytest.mark.parametrize("test", ["CVM", "AD", "Kuiper", "PSI", "EMD"])
def test_a_named_test_is_taken(test: str) -> None:
    result = drift(table(0), table(1), features=["length", "topic"], tests={"length": test})
    assert [one.shift and one.shift.test for one in result.features] == [test, "chi2"]


ODD = {
    "constant": ([1.0] * 50, [1.0] * 50, True, []),
    "constant that moves": ([1.0] * 50, [2.0] * 50, True, ["x"]),
    "all missing": ([np.nan] * 50, [np.nan] * 50, False, []),
    "missing from now on": ([1.0, 2.0, 3.0, 4.0, 5.0] * 10, [np.nan] * 50, False, ["x is missing"]),
    "infinite from now on": ([1.0, 2.0, 3.0, 4.0, 5.0] * 10, [np.inf] * 50, False, ["x is missing"]),
    "none at all": ([None] * 50, [None] * 50, False, []),
    "unseen labels": (["a"] * 50, ["b"] * 50, True, ["x"]),
    "integers and floats": (list(range(50)), [float(v) for v in range(50)], True, []),
    "names that never repeat": ([f"id-{i}" for i in range(50)], [f"id-{i}" for i in range(50, 100)], True, []),
    "texts with gaps": (["how are you, Ada", None] * 25, ["how are you, Ada", None] * 25, True, []),
    "empty texts": (["", " "] * 25, ["", " "] * 25, True, []),
    "lists with gaps": ([[1.0, 2.0], None] * 25, [[1.0, 2.0], [np.nan, 1.0]] * 25, True, []),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_columns_are_judged_or_refused_one_by_one(name: str) -> None:
    old, new, is_enough, drifted = ODD[name]
    result = drift(pd.DataFrame({"x": old, "y": range(50)}), pd.DataFrame({"x": new, "y": range(50)}))
    one = result.to_json()["features"][0]
    assert one["enough"] == is_enough
    assert ("not enough data" in (one["reason"] or "")) == (not is_enough)
    assert [d.space.name for d in result.drifted] == drifted


def test_unseen_labels_are_listed() -> None:
    old, new = (pd.DataFrame({"x": labels}) for labels in (["a"] * 50, ["a"] * 20 + ["c"] * 20 + ["b"] * 10))
    assert drift(old, new).to_json()["features"][0]["unseen"] == ["c", "b"]


@pytest.mark.parametrize(
    ("old", "new", "settings", "error", "message"),
    [
        (
            {"x": range(50)},
            {"x": ["a", "b"] * 25},
            {},
            InputError,
            "'x' holds number values in the reference and category",
        ),
        ({"x": range(50)}, {"y": range(50)}, {}, MissingError, "in both: none"),
        (
            {"x": range(50)},
            {"x": range(50)},
            {"features": ["y"]},
            MissingError,
            "no column 'y' in both tables; in both: x",
        ),
        ({"x": range(50)}, {"x": range(50)}, {"tests": {"x": "chi2"}}, MissingError, "known: KS, CVM"),
        ({"x": range(50)}, {"x": range(50)}, {"fdr": 0}, InputError, "fdr must be between 0 and 1"),
        ({"x": range(50)}, {"x": range(50)}, {"budget": 1.0}, InputError, "budget must be between 0 and 1"),
        ({"x": [[1, 2]] * 50}, {"x": [[1, 2, 3]] * 50}, {}, InputError, "feature 'x': vectors must have one length"),
    ],
)
def test_what_does_not_go_together_is_refused(
    old: Any, new: Any, settings: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        drift(pd.DataFrame(old), pd.DataFrame(new), **settings)


def test_a_name_twice_is_refused() -> None:
    twice = pd.DataFrame(np.zeros((50, 2)), columns=["x", "x"])
    with pytest.raises(InputError, match="current table has more than one column 'x'"):
        drift(pd.DataFrame({"x": range(50)}), twice)


def test_empty_tables_are_not_called_quiet() -> None:
    result = drift(pd.DataFrame({"x": range(50)}), pd.DataFrame({"x": pd.Series([], dtype=float)}))
    assert not result.to_json()["features"][0]["enough"]


def test_large_tables_are_sampled_and_it_says_so() -> None:
    rng = np.random.default_rng(0)
    big = pd.DataFrame({"x": rng.normal(size=300_000), "y": rng.integers(0, 5, 300_000)})
    result = compare_tables(big, big + 0.1, most_rows=20_000, is_joint=False)
    assert result.settings["rows_used"] == [20_000, 20_000]
    assert "20000 of the 300000 rows of the reference were sampled" in result.notes[0]
    assert result.n_reference == 300_000
    assert "x" in [one.space.name for one in result.drifted]


def test_columns_of_one_table_alone_are_named() -> None:
    result = drift(pd.DataFrame({"x": range(50), "a": 1}), pd.DataFrame({"x": range(50), "b": 1}))
    assert result.notes == ["only the reference has a; not compared", "only the current table has b; not compared"]


def test_an_embedding_of_ones_own_is_used() -> None:
    def initials(texts: Any) -> Any:
        return np.array([[float(t.startswith("May")), len(t) / 100] for t in texts])

    old, new = (pd.DataFrame({"x": [f"{w} I go there on day {i}?" for i in range(50)]}) for w in ("May", "Can"))
    assert [one.space.name for one in drift(old, new, embed=initials).drifted] == ["x"]
    with pytest.raises(InputError, match=r"one vector a text, got \(100,\) for 100 texts"):
        drift(old, new, embed=lambda texts: np.zeros(len(texts)))


def test_texts_are_embedded_without_favour() -> None:
    """Fitted on both samples the test keeps its level (20 runs at 10 %: the 99.9 % point is 7); the reason is there."""
    rng, alarms = np.random.default_rng(0), 0
    words = [f"w{i}" for i in range(400)]
    for seed in range(20):
        texts = [" ".join(rng.choice(words, 12)) for _ in range(100)]
        both = pd.DataFrame({"t": texts})
        sample = read_space(FeatureSpace("t", "text"), both[:50], both[50:], seed=seed)
        alarms += compare_samples([sample], fdr=0.1, rounds=99, seed=seed)[0].is_drifted
    assert alarms <= 7
    assert embed_texts(["", ""]).shape == (2, 1)


def test_the_joint_test_sees_what_no_column_shows() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    old, new = (pd.DataFrame({"a": part, "b": sign * part}) for part, sign in ((x[:150], 1), (x[150:], -1)))
    result = compare_tables(old, new)
    assert result.drifted == []
    assert result.joint is not None
    assert result.joint.p_value <= 0.001
    samples = [read_space(FeatureSpace(name, "number"), old, new) for name in "ab"]
    assert [part.shape for part in joint_matrix(samples)] == [(150, 2), (150, 2)]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "number"),
        ([True, False], "category"),
        (pd.Categorical(["a", "b"]), "category"),
        ([(1, 2)], "vector"),
        ([np.zeros(3)], "vector"),
        ([f"what is {i}" for i in range(99)], "text"),
        (["a b", "c d"] * 40, "category"),
        ([{"a": 1}], "category"),
        (pd.to_datetime(["2026-01-01"]), "number"),
        (pd.array([1, None], dtype="Int64"), "number"),
        (pd.Series([1, None, 2.5], dtype=object), "number"),
        ([None, None], None),
    ],
)
def test_kinds_of_columns(values: Any, kind: str | None) -> None:
    assert column_kind(pd.Series(values)) == kind
