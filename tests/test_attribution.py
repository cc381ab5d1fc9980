"""Attribution: the right cause is named, what cannot be told is said, and nothing depends on names or order."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("frouros")

from rlhf_workbench.cli import main
from rlhf_workbench.collect.drifting import CAUSES, STEADY, TRAITS, Plan, draw_pairs, simulate_drift, store_drift
from rlhf_workbench.collect.queue import add_items
from rlhf_workbench.collect.simulate import annotate_queue
from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.core.schema import Annotation, Comparison, DriftEvent, Generation, Prompt, Record
from rlhf_workbench.monitor import decomposition
from rlhf_workbench.monitor.attribution import adjust_by_holm, attribute_change, attribute_drift, plot_attribution
from rlhf_workbench.monitor.covariate_shift import compare_answers, prompt_odds
from rlhf_workbench.monitor.decomposition import seen_agreement, shapley_values
from rlhf_workbench.monitor.forms import win_probability
from rlhf_workbench.monitor.period_tables import read_periods
from rlhf_workbench.monitor.planted import planted_answers
from rlhf_workbench.monitor.reasking import compare_reasked, pairs_needed, plan_reasking
from rlhf_workbench.monitor.trait_changes import trait_changes
from rlhf_workbench.monitor.traits import load_vocabulary, measure_traits
from rlhf_workbench.store.tables import connect

SMALL = Plan(n_pairs=80, n_reasked=20, gold_share=0.2)
SINGLE = [(cause,) for cause in CAUSES]
TWO = list(itertools.combinations(CAUSES, 2))


@pytest.fixture(scope="module")
def small() -> tuple[pd.DataFrame, pd.DataFrame]:
    return simulate_drift(["preferences"], seed=1, plan=SMALL)


@pytest.mark.slow
def test_the_right_causes_are_named() -> None:
    """20 runs, both names exactly and no other; 400 of them are in the benchmark notebook."""
    cases = [(causes, seed) for seed in (900, 901) for causes in (*SINGLE, *TWO)]
    right = 0
    for i, (causes, seed) in enumerate(cases):
        found = attribute_change(*simulate_drift(causes, seed=seed + 10 * i), n_resamples=0)
        right += set(found.causes) == set(causes)
    assert right >= 18


def test_nothing_is_named_where_nothing_happened() -> None:
    named = [attribute_change(*simulate_drift(seed=seed), n_resamples=0).causes for seed in range(2)]
    assert named == [[], []]


def test_which_answer_comes_first_does_not_matter(small: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    votes, pairs = small
    is_turned = np.random.default_rng(0).random(len(pairs)) < 0.5
    other = {"first": "second", "second": "first"}
    swap = {f"{a}_{trait}": f"{b}_{trait}" for trait in TRAITS for a, b in (("first", "second"), ("second", "first"))}
    turned = pairs.copy()
    turned.loc[is_turned] = pairs.rename(columns=swap).loc[is_turned, pairs.columns]
    turned["gold"] = (
        pairs["gold"].where(~is_turned, pairs["gold"].map(other)).astype(object).where(pairs["gold"].notna(), None)
    )
    turned["p_first"] = np.where(is_turned, 1 - pairs["p_first"], pairs["p_first"])
    is_vote_turned = votes["pair"].isin(pairs.loc[is_turned, "pair"])
    label = votes["label"].where(~is_vote_turned, votes["label"].replace(other))
    mirrored = votes.assign(label=label, is_swapped=votes["is_swapped"] ^ is_vote_turned)
    first, second = (attribute_change(*tables, n_resamples=0) for tables in (small, (mirrored, turned)))
    for name in ("p_value", "contribution"):
        np.testing.assert_allclose(second.table[name], first.table[name], atol=2e-3, rtol=0.02)
    assert second.causes == first.causes


def test_order_of_rows_and_names_of_people_do_not_matter(small: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    votes, pairs = small
    names = {"ada": "z", "ben": "y", "cleo": "x", "dov": "w", "eli": "v"}
    other = votes.sample(frac=1, random_state=0).assign(annotator=lambda t: t["annotator"].map(names))
    first = attribute_change(votes, pairs, n_resamples=0)
    second = attribute_change(other, pairs.sample(frac=1, random_state=1), n_resamples=0)
    np.testing.assert_allclose(second.table["p_value"], first.table["p_value"], atol=2e-3, rtol=0.02)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda v, p: (v.drop(columns="label"), p),
            "votes need the columns period, pair, annotator, label; missing: label",
        ),
        (lambda v, p: (v, p.drop(columns="pair")), "pairs need the columns pair"),
        (lambda v, p: (v.assign(period="then"), p), "period 'then' is unknown; allowed: current, reference"),
        (lambda v, p: (v.assign(label="left"), p), "label 'left' is unknown"),
        (lambda v, p: (v, pd.concat([p, p.head(1)])), "is described twice"),
        (lambda v, p: (v, p.iloc[5:]), "5 pairs have votes but no row"),
        (lambda v, p: (v[v["period"] == "current"], p), "0 new pairs with votes in the reference period"),
        (lambda v, p: (v[v["period"] == "reference"], p), "0 new pairs with votes in the current period"),
        (lambda v, p: (v.iloc[:0], p), "0 new pairs"),
        (lambda v, p: (v.assign(label="skip"), p), "0 new pairs"),
        (lambda v, p: (v.assign(at=v["at"].to_numpy()[::-1]), p), "the periods overlap: the reference ends"),
        (lambda v, p: (v, p.assign(first_length=np.nan)), "'length' has missing or infinite numbers"),
    ],
)
def test_what_is_wrong_with_the_tables_is_said(
    break_it: Any, said: str, small: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    with pytest.raises(InputError) as error:
        attribute_change(*break_it(*small), n_resamples=0)
    assert said in str(error.value)


def test_alpha_out_of_range_is_refused(small: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    with pytest.raises(InputError, match=r"0 < alpha < 0\.5"):
        attribute_change(*small, alpha=0.5)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (replace(SMALL, gold_share=0), "no gold items in the current period"),
        (replace(SMALL, repeat_share=0), "no hidden repeats"),
        (replace(SMALL, n_reasked=0), "preferences rest on gold items alone; ask"),
        (replace(SMALL, n_reasked=0, gold_share=0), "preferences, a tired crew and harder pairs look alike; ask"),
        (SMALL, "20 pairs were asked again; a change of mind on one pair in five needs"),
        (replace(SMALL, overlap=1), "hardly any pair has two people's votes"),
        (replace(SMALL, overlap=1, crew=STEADY[:1]), "one person votes"),
    ],
)
def test_missing_evidence_is_named(plan: Plan, said: str) -> None:
    found = attribute_change(*simulate_drift(seed=5, plan=plan), n_resamples=0)
    assert any(said in text for text in found.inquiry.missing)
    assert said in found.sentence or found.inquiry.missing[0] in found.sentence


def test_without_linking_pairs_preferences_are_not_named() -> None:
    plan = Plan(n_reasked=0, gold_share=0)
    found = attribute_change(*simulate_drift(["preferences"], seed=3, plan=plan), n_resamples=0)
    assert found.verdict == "cannot be told"
    assert "preferences" in found.undecided[0]
    assert np.isnan(found.table["p_value"]["preferences"])
    assert not found.table["is_named"].any()


def test_one_voice_is_no_crew() -> None:
    """With one person, her new mind and everybody's are the same thing."""
    plan = replace(SMALL, n_pairs=150, overlap=1, n_reasked=60, crew=STEADY[:1])
    found = attribute_change(*simulate_drift(["preferences"], seed=3, plan=plan), n_resamples=0)
    assert found.undecided == ["annotators or preferences"]
    assert not {"annotators", "preferences"} & set(found.causes)


def test_questions_that_do_not_overlap_leave_the_policy_untested(small: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    votes, pairs = small
    old = set(votes.loc[votes["period"] == "reference", "pair"])
    pairs = pairs.assign(topic=np.where(pairs["pair"].isin(old), "a", "b"))
    found = attribute_change(votes, pairs, n_resamples=0)
    assert "inputs" in found.causes
    assert np.isnan(found.table["p_value"]["policy"])
    assert any("inputs and policy cannot be told apart" in text for text in found.inquiry.missing)


def test_contributions_add_up_and_intervals_hold_them(small: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    found = attribute_change(*small, n_resamples=40)
    table = found.decomposition.table
    change = found.decomposition.now - found.decomposition.before
    assert table["contribution"].sum() == pytest.approx(change)
    assert (table["low"] <= table["high"]).all()
    named = table.loc[list(CAUSES)]
    assert ((named["low"] - 0.02 <= named["contribution"]) & (named["contribution"] <= named["high"] + 0.02)).all()
    assert table["high"]["preferences"] < 0
    again = attribute_change(*small, n_resamples=40)
    pd.testing.assert_frame_equal(again.table, found.table)


def test_agreement_among_people_is_used_without_a_model(small: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    votes, pairs = small
    found = attribute_change(votes, pairs.drop(columns="p_first"), n_resamples=0)
    seen = seen_agreement(votes, pairs, np.zeros(len(pairs)), "people")
    assert found.decomposition.measure == "people"
    assert found.decomposition.before == pytest.approx(seen.loc[~seen["is_current"], "agreement"].mean())
    assert "among people" in found.sentence


def test_rare_people_are_taken_together(small: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    votes, pairs = small
    guests = votes.assign(annotator=[f"g{i}" if i % 4 == 0 else a for i, a in enumerate(votes["annotator"])])
    found = attribute_change(guests, pairs, n_resamples=0)
    assert {c.what for c in found.inquiry.clues if c.cause == "annotators" and c.counts} >= {"ada", "eli", "crew"}
    assert not any("g0" in c.text or "(rare)" in c.text for c in found.inquiry.clues if c.counts)


worlds = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.floats(-5, 5), min_size=2**n, max_size=2**n).map(
        lambda values: dict(
            zip(
                (frozenset(c) for k in range(n + 1) for c in itertools.combinations("abcd"[:n], k)), values, strict=True
            )
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(worlds, st.floats(-3, 3))
def test_shapley_values_share_everything_and_give_a_bystander_what_it_brings(
    value: dict[frozenset[str], float], alone: float
) -> None:
    everybody = max(value, key=len)
    shares = shapley_values(value)
    assert sum(shares.values()) == pytest.approx(value[everybody] - value[frozenset()], abs=1e-9)
    with_bystander = value | {world | {"z"}: v + alone for world, v in value.items()}
    more = shapley_values(with_bystander)
    assert more["z"] == pytest.approx(alone, abs=1e-9)
    assert all(more[player] == pytest.approx(shares[player], abs=1e-9) for player in shares)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.2))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float], alpha: float) -> None:
    rejected, n = set(), len(p_values)
    for rank, i in enumerate(np.argsort(p_values, kind="stable").tolist()):
        if p_values[i] * (n - rank) > alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(adjust_by_holm(p_values)) if p <= alpha} == rejected


def test_other_questions_alone_are_not_taken_for_another_policy() -> None:
    is_current, rejected = np.arange(400) >= 200, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pairs = pd.concat([draw_pairs(rng, 200, "r"), draw_pairs(rng, 200, "c", inputs=1.0)], ignore_index=True)
        table = compare_answers(pairs, is_current, prompt_odds(pairs, is_current), list(TRAITS))
        rejected += table["p_value"].min() * len(table) < 0.05
    assert rejected <= 6  # 2 expected; more than 6 has a chance of 1 %


def test_as_many_pairs_as_planned_find_the_change() -> None:
    need, found, false = pairs_needed(0.78, flipped=0.3, alpha=0.05), 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        lead = rng.normal(size=need.n) * 2.4
        for flipped in (0.3, 0.0):
            now = np.where(rng.random(need.n) < flipped, -lead, lead)
            rows = [
                (period, i, who, "first" if rng.random() < 1 / (1 + np.exp(-x)) else "second")
                for period, leads in (("reference", lead), ("current", now))
                for i, x in enumerate(leads)
                for who in "abc"
            ]
            votes = pd.DataFrame(rows, columns=["period", "pair", "annotator", "label"])
            is_found = compare_reasked(votes).p_value < 0.05
            found, false = found + (is_found and flipped > 0), false + (is_found and flipped == 0)
    assert found >= 31  # 36 expected; fewer than 31 has a chance of 1 %
    assert false <= 6


def test_a_plan_counts_what_was_asked_and_says_what_is_short() -> None:
    votes, pairs = simulate_drift(seed=0, plan=Plan(n_pairs=60, n_reasked=20))
    plan = plan_reasking(votes, pairs)["params"]
    asked = set(votes.loc[votes["period"] == "current", "pair"])
    assert not asked & set(plan["comparison_ids"])
    assert plan["n_asked"] == 20
    assert plan["short"] == plan["n_needed"] - 20 - len(plan["comparison_ids"]) > 0
    with pytest.raises(InputError, match="let at least two people vote"):
        plan_reasking(votes.drop_duplicates(["period", "pair"]), pairs)


def test_a_store_gives_the_same_finding_and_keeps_it(tmp_path: Path) -> None:
    votes, pairs = simulate_drift(["annotators"], seed=3, way="careless", plan=Plan(n_pairs=150))
    with connect(tmp_path / "s.duckdb") as store:
        model_id = store_drift(store, votes, pairs, ("old", "new"))
        read, about = read_periods(store, ["old"], ["new"])
        key = ["period", "annotator", "label"]
        assert read[key].value_counts().sum() == len(votes)
        assert about["gold"].notna().sum() == pairs["gold"].notna().sum()
        assert read.groupby("period").size().to_dict() == votes.groupby("period").size().to_dict()
        start = votes.loc[votes["period"] == "current", "at"].min()
        alarm = DriftEvent(stream="disagreement", detector="ADWIN", index=9, happened_at=start, is_confirmed=True)
        quiet = DriftEvent(stream="disagreement", detector="ADWIN", index=9, happened_at=start)
        store.append([alarm, quiet])
        figures = attribute_drift(store, run_id="r", seed=0, reference="old", current="new", n_resamples=0)
        event = store.get(DriftEvent, figures["event_id"])
        assert (next(iter(figures)), figures["causes"]) == ("verdict", ["annotators"])
        assert figures["event_ids"] == event.metadata["event_ids"] == [alarm.id]
        assert (event.stream, event.detector, event.is_confirmed, event.run_id) == (
            "attribution",
            "annotators",
            True,
            "r",
        )
        json.dumps(figures)
        by_time = attribute_drift(
            store, run_id="t", seed=0, since=start.isoformat(), n_resamples=0, event_ids=[quiet.id]
        )
        assert by_time["by_cause"] == figures["by_cause"]
        assert by_time["event_ids"] == [quiet.id]
        planned = figures["plan"]["params"]["comparison_ids"]
        assert {c.id for c in store.records(Comparison, id=planned)} == set(planned)
        assert len(plot_attribution(figures).axes[0].patches) == 7
        with pytest.raises(MissingError, match="no votes in queue 'x'; queues with votes: new, old"):
            read_periods(store, ["old"], ["x"])
        with pytest.raises(MissingError, match=f"models that have: {model_id}"):
            read_periods(store, ["old"], ["new"], model_id="m")
        with pytest.raises(InputError, match="name the queues"):
            read_periods(store, ["old"])
    with connect(":memory:") as empty, pytest.raises(MissingError, match="no votes in this store"):
        read_periods(empty, since=start)


def test_an_annotator_who_turns_in_the_real_queue_is_named() -> None:
    """Votes by collect.simulate on real texts, through leases and gold items, without any link but gold."""
    rng, rows, ids = np.random.default_rng(0), list[Record](), list[str]()
    words = ["tea", "water", "leaf", "pot", "cup", "warm", "slow", "green", "steep", "pour", "rest", "drink"]
    for i in range(140):
        prompt = Prompt(text=f"How do I make {' '.join(rng.choice(words, 3))}?", topic=["tea", "pots"][i % 2])
        texts = [" ".join(rng.choice(words, int(rng.integers(5, 60)))) + rng.choice([".", ""]) for _ in range(2)]
        answers = [Generation(prompt_id=prompt.id, text=text) for text in texts]
        pair = Comparison(prompt_id=prompt.id, first_id=answers[0].id, second_id=answers[1].id)
        rows, ids = [*rows, prompt, *answers, pair], [*ids, pair.id]
    with connect(":memory:") as store:
        store.append(rows)
        crew = [{"name": name, "reliability": 3.0} for name in ("ada", "ben", "cleo", "dov")]
        for queue, part, turned in (("old", ids[:70], None), ("new", ids[70:], "cleo")):
            add_items(store, queue, part, overlap=4)
            annotate_queue(store, run_id=queue, seed=1, queue=queue, crew=crew, turned=turned)
        figures = attribute_drift(store, run_id="r", seed=0, reference="old", current="new", n_resamples=0)
        assert figures["causes"] == ["annotators"]
        assert "cleo" in figures["by_cause"]["annotators"]["reason"]
        assert figures["measure"] == "people"
        assert len(store.records(Annotation, queue="new")) == 280


def test_the_command_says_it_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "s.duckdb", tmp_path / "why.png"
    with connect(path) as store:
        store_drift(store, *simulate_drift(["policy"], seed=1, plan=SMALL), ("old", "new"))
    words = ["attribute", "--reference", "old", "--current", "new", "--store", str(path), "--resamples", "10"]
    assert main([*words, "--json", "--picture", str(picture)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["causes"] == ["policy"]
    assert picture.stat().st_size > 2000
    assert main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("Agreement with the reward model went from")
    assert "→ policy" in text
    assert main([*words[:-4], "--current", "nowhere", "--store", str(path)]) == 2
    assert "no votes in queue 'nowhere'" in capsys.readouterr().err
    assert main(["attribute", "--reference", "old", "--store", str(path)]) == 2


def test_causes_are_the_same_words_everywhere() -> None:
    assert decomposition.CAUSES == CAUSES


# Traits


PLANTED = ["hedged", "warm", "lists", "numbers", "asks-back", "exclaims"]


def planted_texts(n_pairs: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pairs of texts, and by how much of each trait the first differs from the second."""
    answers = planted_answers(n_pairs, 2, seed)
    sides = [answers.iloc[i::2].reset_index(drop=True) for i in (0, 1)]
    vocabulary = load_vocabulary(PLANTED)
    shown = [measure_traits(side["prompt"].tolist(), side["answer"].tolist(), vocabulary) for side in sides]
    prompts = [f"What is to be said of number {i:03}?" for i in range(n_pairs)]  # of one length: no other inputs
    texts = {"prompt": prompts, "first_text": sides[0]["answer"], "second_text": sides[1]["answer"]}
    return pd.DataFrame({"pair": [f"p{i}" for i in range(n_pairs)], **texts}), shown[0] - shown[1]


def planted_votes(
    gaps: pd.DataFrame, taste: dict[str, float], places: Any, seed: int, n_voters: int = 3
) -> pd.DataFrame:
    """Votes of a crew with this taste on the pairs at these places."""
    chance = win_probability(sum(weight * gaps[name].to_numpy() for name, weight in taste.items())[places])
    draws = np.random.default_rng(seed).random((n_voters, len(chance))) < chance
    ids, crew = [f"p{i}" for i in places], "abc"[:n_voters]
    rows = [(i, who, "first" if d else "second") for who, ds in zip(crew, draws, strict=True)
            for i, d in zip(ids, ds, strict=True)]  # fmt: skip
    return pd.DataFrame(rows, columns=["pair", "annotator", "label"])


def test_the_trait_whose_weight_turns_is_named_and_no_other_and_none_where_nothing_turns() -> None:
    pairs, gaps = planted_texts(360, seed=3)
    vocabulary, halves = load_vocabulary(PLANTED), (np.arange(180), np.arange(180, 360))
    before, turned = {"hedged": 1.5, "warm": 1.0}, {"hedged": -1.5, "warm": 1.0}
    found, false = [], []
    for seed in range(12):
        old = planted_votes(gaps, before, halves[0], seed).assign(period="reference")
        for taste, names in ((turned, found), (before, false)):
            new = planted_votes(gaps, taste, halves[1], 100 + seed).assign(period="current")
            votes = pd.concat([old, new])
            names.append(trait_changes(votes, pairs, vocabulary=vocabulary, permutations=499)["changed"])
    assert sum("hedged" in names for names in found) >= 11
    assert sum(names == ["hedged"] for names in found) >= 10
    assert sum(bool(names) for names in false) <= 1  # 0.12 expected


def store_planted(store: Any, taste: dict[str, float]) -> None:
    """Two queues of votes on planted texts, a part of the pairs in both; at first people like hedging."""
    pairs, gaps = planted_texts(400, seed=5)
    rows = list[Record]()
    for row in pairs.itertuples():
        prompt = Prompt(text=row.prompt, topic="t")
        said = [Generation(prompt_id=prompt.id, text=text) for text in (row.first_text, row.second_text)]
        pair = Comparison(id=row.pair, prompt_id=prompt.id, first_id=said[0].id, second_id=said[1].id)
        rows += [prompt, *said, pair]
    start = pd.Timestamp("2026-03-01", tz="UTC")
    periods = [("old", {"hedged": 2.0}, np.arange(240)), ("new", taste, np.arange(160, 400))]
    for month, (queue, wanted, places) in enumerate(periods):
        at = (start + pd.DateOffset(months=month)).to_pydatetime()
        for vote in planted_votes(gaps, wanted, places, seed=month).itertuples():
            said = {"comparison_id": vote.pair, "annotator_id": vote.annotator, "label": vote.label}
            rows.append(Annotation(**said, queue=queue, submitted_at=at))
    store.append(rows)


def test_a_run_says_which_trait_preferences_changed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        store_planted(store, {"hedged": -2.0})
    words = ["--reference", "old", "--current", "new", "--resamples", "0", "--store", str(path)]
    assert main(["attribute", *words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["causes"] == ["preferences"]
    assert (figures["traits"]["state"], figures["traits"]["changed"]) == ("changed", ["hedged"])
    row = figures["traits"]["by_trait"]["hedged"]
    assert row["low"] < row["change"] < row["high"] < 0 < row["reference"]
    assert row["p_adjusted"] < 0.01
    with connect(path, read_only=True) as store:
        assert store.records(DriftEvent)[-1].metadata["traits"] == figures["traits"]
    assert main(["attribute", *words]) == 0
    assert "What is preferred changed in: hedged from +" in capsys.readouterr().out


def test_a_run_names_no_trait_where_tastes_stay_and_says_when_it_cannot_know() -> None:
    with connect(":memory:") as store:
        store_planted(store, {"hedged": 2.0})
        same = attribute_drift(store, run_id="r", seed=0, reference="old", current="new", n_resamples=0)
        assert (same["traits"]["state"], same["traits"]["changed"]) == ("no evidence of change", [])
    pairs, gaps = planted_texts(20, seed=1)
    votes = planted_votes(gaps, {"hedged": 2.0}, np.arange(20), seed=0)
    halves = votes.assign(period=np.where(votes["pair"].isin(pairs["pair"][:10]), "reference", "current"))
    few = trait_changes(halves, pairs)
    assert (few["state"], few["changed"]) == ("not enough data", [])
    assert few["reason"]
