"""Morphology: symbols mean what they say, planted tastes are found, intervals hold, changes are real, bad input is told."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("sklearn", reason="comes with the extra monitor")

from matplotlib.cbook import is_math_text

from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.messages import Example
from rlhf_workbench.core.plugins import Plugin, PluginError
from rlhf_workbench.core.schema import Annotation, Comparison, Consensus, Form, Generation, Model, Prediction, Prompt
from rlhf_workbench.monitor import traits as traits_module
from rlhf_workbench.monitor.form_records import (
    askable_pairs,
    dataset_pairs,
    form_path,
    measure_form,
    model_pairs,
    recorded_change,
    stored_forms,
)
from rlhf_workbench.monitor.forms import UNMEASURABLE, debiased_weights, fit_form, newton_weights, win_probability
from rlhf_workbench.monitor.morphogenesis import follow_forms, form_change, plot_path
from rlhf_workbench.monitor.planted import PLANTABLE, decide_pairs, planted_pairs
from rlhf_workbench.monitor.reflection import informative_pairs, reflect, unexplained_change
from rlhf_workbench.monitor.seeds import FORMAL
from rlhf_workbench.monitor.symbols import RULES
from rlhf_workbench.monitor.traits import (
    TraitPairs,
    example_pairs,
    load_vocabulary,
    measure_pairs,
    measure_traits,
    trait_support,
)
from rlhf_workbench.store.registry import run_once
from rlhf_workbench.store.tables import Store, connect

PREFERENCES = Path(__file__).parents[2] / "shared" / "data" / "preferences"
FEW = ["concise", "hedged", "warm", "refuses", "lists", "numbers", "concludes", "asks-back"]
TASTE = {"length": 0.3, "refuses": -2.0, "warm": 0.8, "lists": 1.6}


@pytest.fixture(scope="module")
def pool() -> TraitPairs:
    """Six hundred questions with two pairs each, undecided."""
    return planted_pairs(600, 2, seed=11, vocabulary=load_vocabulary(FEW))


def part(pairs: TraitPairs, places: Any) -> TraitPairs:
    ids = tuple(pairs.comparison_ids[i] for i in places)
    rows = pairs.differences.iloc[places].reset_index(drop=True)
    return TraitPairs(rows, pairs.lengths[places], pairs.p_first[places], pairs.clusters[places], ids, pairs.notes)


# Symbols


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "is_shown"),
    [
        ("refuses", "", "I’m afraid I can’t do that.", True),
        ("refuses", "", "You can't go wrong with tea.", False),
        ("refuses", "", "Tea. " * 80 + "I can't say more.", False),  # refusals stand at the beginning
        (
            "hedged",
            "",
            "May is a month and June is another of the twelve months that we have in a year, all told.",
            False,
        ),
        ("warm", "", "Thanks to the rain it grew.", False),
        ("rude", "", "Hello, shell!", False),
        ("first-person", "", "i.e. the cat", False),
        ("asks-back", "", "```\nx = a ? b : c?\n```", False),
        ("asks-back", "", "Why? Because of the sun.", False),
        ("repeats-question", "", "No question was given.", False),
        ("lists", "", "- <script>alert(1)</script>\n- two\n- three", True),
        ("lists", "", "a - b\n-5 degrees\n3.14", False),
        ("code-block", "", "Text.\n\n```html\n<b>\n```", True),
        ("formatted", "", "2 * 3 * 4 ** 5", False),
        ("numbers", "", "1. one\n2. two\n3. three\n4. four", False),
        ("cites", "", "see (Smith and Wesson, 1999)", True),
        ("cites", "", "it was built (in 1999)", False),
        ("exclaims", "", "a != b", False),
        ("concise", "", "word " * 200, False),
        ("emoji", "", "Ωμέγα → 日本語", False),
    ],
)
def test_rules_on_texts_that_are_easily_mistaken(name: str, prompt: str, answer: str, is_shown: bool) -> None:
    if name == "exclaims":
        answer += " and so on. It goes. And goes. And goes."
    assert (RULES[name].measure(prompt, answer) > 0.5) == is_shown


@pytest.mark.parametrize(
    ("text", "is_formal"),
    [
        ("The defendant has been informed of the charges and is entitled to legal representation.", True),
        ("Photosynthesis is the process by which plants convert light into chemical energy.", True),
        ("Customers may request reimbursement of travel expenses upon presentation of receipts.", True),
        ("lol nope, I'm not doing that", False),
        ("Hey guys, what's everyone up to tonight?", False),
        ("we went to the shop and it was shut so we went home", False),
    ],
)
def test_the_seeded_symbol_on_sentences_that_it_has_not_seen(text: str, is_formal: bool) -> None:
    assert (FORMAL.measure("", text) > 0.5) == is_formal


def test_own_symbols_do_not_depend_on_each_others_names() -> None:
    vocabulary = load_vocabulary()
    assert len(vocabulary) == len(RULES) + 1 >= 15
    assert all(name == symbol.name for name, symbol in vocabulary.items())
    with pytest.raises(InputError, match="named; known"):
        load_vocabulary([])


class Shouts:
    name = "shouts"

    def measure(self, prompt: str, answer: str) -> float:
        return float(answer.isupper())


def test_a_plugins_symbol_is_in_the_vocabulary_and_its_faults_carry_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Plugin("symbol", "shouts", "lab-shouts", "1.0", None)  # type: ignore[arg-type]
    monkeypatch.setattr(traits_module, "find_plugins", lambda kind: [plugin])
    monkeypatch.setattr(traits_module, "load_plugin", lambda kind, name: Shouts())
    assert measure_traits(["a"], ["AH"], load_vocabulary(["shouts", "warm"])).loc[0].tolist() == [1.0, 0.0]
    broken = Shouts()
    broken.measure = lambda prompt, answer: 2.0  # type: ignore[method-assign]
    broken.plugin = plugin  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"'shouts' of lab-shouts 1.0 measured 2.0 where"):
        measure_traits(["a"], ["b"], {"shouts": broken})
    monkeypatch.setattr(traits_module, "find_plugins", lambda kind: [replace(plugin, name="warm")])
    with pytest.raises(StateError, match="lab-shouts brings a symbol 'warm'"):
        load_vocabulary()


# Pairs


def table(*rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["prompt", "first", "second", "p_first"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "missing: rows"),
        ([("q", "a", "a", 1.0), ("q", "b", " b\n", 0.0)], "in all 2 pairs both answers are the same text"),
        ([("q", "a", None, 1.0)], "second must be text in every row, got NoneType"),
        ([("q", 3, "b", 1.0)], "first must be text in every row, got int"),
        ([("q", "a", "b", 1.5)], "p_first must be from 0 to 1 in every row, got 1.5"),
        ([("q", "a", "b", float("nan"))], "p_first must be from 0 to 1"),
        ([("q", "a", "b", "yes")], "p_first must be from 0 to 1 in every row, got 'yes'"),
    ],
)
def test_what_is_no_pair_is_refused(rows: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        measure_pairs(table(*rows))


def test_what_was_left_out_is_said_and_huge_texts_are_read_from_the_start() -> None:
    huge = "word " * 300_000 + "Sorry."
    found = measure_pairs(
        table(("q", "a", "a", 1.0), ("q", "", "Sorry.", 0.0), ("q", huge, "Sorry.", 0.0)),
        load_vocabulary([*FEW[:3], "apologises"]),
    )
    assert len(found) == 2
    assert [note[:2] for note in found.notes] == ["1 ", "1 ", "1 "]
    assert found.differences["apologises"].tolist() == [-1.0, -1.0]
    assert (found.differences.iloc[0].drop("apologises") <= 0).all()


def test_single_answers_make_no_pairs() -> None:
    single = Example(
        messages=[{"role": "user", "content": "q"}], answers=([{"role": "assistant", "content": "a"}],), is_good=True
    )
    with pytest.raises(InputError, match="needs pairs of answers"):
        example_pairs([single])


@pytest.mark.parametrize("places", [range(30), [0] * 500], ids=["few pairs", "one question"])
def test_too_little_is_refused_with_what_is_needed(pool: TraitPairs, places: Any) -> None:
    with pytest.raises(InputError, match=r"measurable"):
        fit_form(part(decide_pairs(pool, TASTE, 0), list(places)))


def test_twenty_pairs_on_each_of_a_dozen_questions_are_too_few_questions() -> None:
    pairs = decide_pairs(planted_pairs(12, 20, 0, load_vocabulary(FEW)), TASTE, 0)
    with pytest.raises(InputError, match=r"measurable traits need \d+ pairs on 20 questions, got 240 on 12"):
        fit_form(pairs)


def test_a_trait_that_never_varies_is_not_measurable_and_has_no_weight(pool: TraitPairs) -> None:
    decided = decide_pairs(pool, TASTE, 0)
    gaps = decided.differences.assign(
        silent=0.0, rare=(np.arange(len(pool)) < 19) * 1.0, twin=decided.differences["lists"]
    )
    form = fit_form(replace(decided, differences=gaps))
    for name, why in {
        "silent": "differs in 0 pairs",
        "rare": "differs in 19 pairs",
        "twin": "moves together with lists",
    }.items():
        assert form.table.loc[name, "state"] == UNMEASURABLE
        assert str(form.table.loc[name, "reason"]).startswith(why)
        assert np.isnan(form.table.loc[name, "weight"])
        assert name not in form.measurable()


# Forms


def test_weights_and_errors_agree_with_statsmodels(pool: TraitPairs) -> None:
    sm = pytest.importorskip("statsmodels.api")
    decided = decide_pairs(pool, TASTE, 3)
    soft = replace(decided, p_first=0.1 + 0.8 * decided.p_first)
    for pairs in (decided, soft):
        design, codes = pairs.design(FEW), pd.factorize(pairs.clusters)[0]
        theirs = sm.GLM(pairs.p_first, design, family=sm.families.Binomial()).fit(
            cov_type="cluster", cov_kwds={"groups": codes}
        )
        assert newton_weights(design, pairs.p_first) == pytest.approx(theirs.params, abs=1e-6)
        weights, influences = debiased_weights(design, pairs.p_first, codes, 0)
        errors = np.sqrt((influences**2).sum(axis=0))
        assert np.abs(weights - theirs.params).max() < 0.1 * theirs.bse.max()
        assert ((errors / theirs.bse > 0.97) & (errors / theirs.bse < 1.15)).all()  # the jackknife is a little larger


def test_exchanging_first_and_second_and_the_order_of_rows_change_nothing(pool: TraitPairs) -> None:
    decided = decide_pairs(pool, TASTE, 4)
    flip = np.random.default_rng(0).random(len(pool)) < 0.5
    sign = np.where(flip, -1.0, 1.0)
    turned = replace(
        decided,
        differences=decided.differences.mul(sign, axis=0),
        lengths=decided.lengths * sign,
        p_first=np.where(flip, 1 - decided.p_first, decided.p_first),
    )
    one, other = fit_form(decided), fit_form(turned)
    assert np.allclose(one.table["weight"], other.table["weight"], atol=1e-3)
    assert one.explained == pytest.approx(other.explained, abs=1e-3)
    again = fit_form(decided)
    assert one.table.equals(again.table)
    assert one.explained == again.explained


def test_a_trait_that_decides_every_pair_has_a_finite_weight(pool: TraitPairs) -> None:
    lists = pool.differences["lists"].to_numpy()
    form = fit_form(replace(pool, p_first=np.where(lists > 0, 1.0, np.where(lists < 0, 0.0, 0.5))))
    assert 2 < form.table.loc["lists", "weight"] < 20
    assert np.isfinite(form.table.loc["lists", ["low", "high"]].astype(float)).all()


def test_planted_traits_are_recovered_in_sign_and_order_and_null_traits_stay_silent(pool: TraitPairs) -> None:
    planted = {name: weight for name, weight in TASTE.items() if name != "length"}
    others = [name for name in FEW if name not in planted]
    truth = sorted(planted, key=lambda name: planted[name])
    right, false, covered = 0, [], []
    for run in range(40):
        form = fit_form(decide_pairs(pool, TASTE, 100 + run), seed=run, is_explained=False).table
        found = form.loc[truth, "weight"].astype(float)
        is_right = (np.sign(found) == np.sign([planted[n] for n in truth])).all() and found.is_monotonic_increasing
        right += bool(is_right) and (form.loc[truth, "state"] != "no evidence").all()
        false += (form.loc[others, "p_value"] < 0.05).tolist()
        goal = pd.Series({n: planted.get(n, 0.0) for n in FEW})
        covered += ((form.loc[FEW, "low"] <= goal) & (goal <= form.loc[FEW, "high"])).tolist()
    assert right >= 38
    assert np.mean(false) <= 0.085  # 5 % and two standard errors of 200 looks
    assert np.mean(covered) >= 0.92


def test_a_long_answer_is_no_concise_answer_and_length_alone_explains_nothing_else(pool: TraitPairs) -> None:
    form = fit_form(decide_pairs(pool, {"length": 1.0}, 5))
    assert form.length["low"] < 1.0 < form.length["high"]
    assert set(form.table["state"]) == {"no evidence"}
    assert form.explained[0] == pytest.approx(form.explained_by_length, abs=0.02)


def test_a_models_own_probabilities_are_explained_in_full(pool: TraitPairs) -> None:
    logits = pool.differences["lists"].to_numpy() * 1.5 - pool.differences["refuses"].to_numpy()
    form = fit_form(replace(pool, p_first=win_probability(logits)))
    assert form.table.loc["lists", "weight"] == pytest.approx(1.5, abs=0.02)
    assert form.explained[0] > 0.99


def test_pairs_of_one_question_do_not_count_as_if_they_were_alone(pool: TraitPairs) -> None:
    decided = decide_pairs(pool, TASTE, 6)
    fivefold = part(decided, np.tile(np.arange(len(decided)), 5))
    one, other = fit_form(decided).table["error"], fit_form(fivefold).table["error"]
    assert np.allclose(one.astype(float), other.astype(float), rtol=0.1)


# Changes


def test_no_change_is_rarely_called_one_and_a_planted_one_is_named(pool: TraitPairs) -> None:
    false, found = 0, 0
    halves = np.arange(0, 600), np.arange(600, 1200)
    for run in range(20):
        old = part(decide_pairs(pool, TASTE, 200 + run), halves[0])
        for is_changed in (False, True):
            taste = TASTE | ({"hedged": -1.5} if is_changed else {})
            new = part(decide_pairs(pool, taste, 300 + run), halves[1])
            states = form_change(old, new, permutations=199, seed=run)["state"]
            called = set(states.index[states.isin(["rose", "fell"])])
            if is_changed:
                found += states["hedged"] == "fell"
            else:
                false += bool(called)
    assert false <= 4  # 5 % of 20 is 1; more than 4 has a chance of 0.3 %
    assert found >= 17


def test_two_models_on_the_same_comparisons_are_told_apart_more_sharply(pool: TraitPairs) -> None:
    base = pool.differences.to_numpy() @ np.linspace(-1, 1, len(FEW))
    noise = np.random.default_rng(0).normal(0, 1, len(pool))
    old = replace(pool, p_first=win_probability(base + noise))
    new = replace(pool, p_first=win_probability(base + noise + 0.15 * pool.differences["warm"].to_numpy()))
    apart = replace(new, clusters=np.array([f"other {c}" for c in new.clusters], dtype=object))
    same, other = (form_change(old, side, permutations=199) for side in (new, apart))
    assert same.loc["warm", "state"] == "rose"
    assert other.loc["warm", "state"] == "no evidence of change"
    assert (same["high"] - same["low"])["warm"] < 0.3 * (other["high"] - other["low"])["warm"]
    itself = form_change(old, old, permutations=99)
    assert (itself["change"].dropna() == 0).all()
    assert (itself["p_value"] == 1).all()


def test_what_one_side_cannot_measure_is_said(pool: TraitPairs) -> None:
    old = decide_pairs(pool, TASTE, 1)
    new = replace(old, differences=old.differences.assign(warm=0.0))
    change = form_change(old, new, permutations=49)
    assert change.loc["warm", "state"] == UNMEASURABLE
    assert str(change.loc["warm", "reason"]).startswith("in the current pairs, differs in 0 pairs")
    with pytest.raises(InputError, match="at least 2 versions, got 1"):
        follow_forms({"v1": old})


def test_a_plot_of_versions_with_strange_names_is_drawn() -> None:
    names = "$v_1$ <script>", "$v_{ $"  # mathematics, and what is no mathematics
    path = pd.DataFrame(
        [
            (names[0], "warm", 0.1, 0.0, 0.2),
            (names[1], "warm", 0.2, 0.1, 0.3),
            ("v2\n2", "warm", 0.3, 0.2, 0.4),
            ("v2\n2", "lists", 1.0, 0.9, 1.1),
        ],
        columns=["version", "trait", "weight", "low", "high"],
    )
    figure, image = plot_path(path), io.BytesIO()
    figure.savefig(image, format="png")
    assert image.getvalue().startswith(b"\x89PNG")
    shown = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes[:2]]
    assert shown == [[r"\$v_1\$ <script>", r"\$v_{ \$", "v2 2"]] * 2
    assert not any(is_math_text(text) for text in shown[0])


# Reflection


def changed(**states: str) -> pd.DataFrame:
    frame = pd.DataFrame({"state": pd.Series(states)})
    return frame.assign(reference=0.0, current=1.0, change=1.0, p_adjusted=0.01, shift=np.linspace(1, 0.5, len(frame)))


def test_unwanted_goes_before_unexplained_and_free_is_left_alone(pool: TraitPairs) -> None:
    changes = changed(lists="rose", refuses="rose", warm="fell")
    assert reflect(changes, pool, {"refuses": "not more"}, k=5).trait == "refuses"
    assert reflect(changes, pool, {"refuses": "free"}, k=5).trait == "lists"
    assert reflect(changes, pool, dict.fromkeys(changes.index, "free"), k=5).verdict == "nothing to ask"
    assert reflect(changes, pool, {"lists": "more", "refuses": "more", "warm": "not less"}, k=5).trait == "warm"
    batch = reflect(changes, pool, {"refuses": "not more"}, k=40)
    assert len(set(batch.comparison_ids)) == 40
    json.dumps(batch.facts(), allow_nan=False)


def test_a_batch_tells_more_of_its_trait_than_pairs_drawn_at_random(pool: TraitPairs) -> None:
    places, errors = informative_pairs(pool, "refuses", 60)
    gaps = pool.differences["refuses"].abs().to_numpy()
    assert gaps[places].min() > 0.5
    assert pd.Series(pool.clusters[places]).value_counts().max() <= 2
    design = pool.design(FEW)

    def error(chosen: Any) -> float:
        information = 0.25 * design[chosen].T @ design[chosen] + np.eye(design.shape[1]) / 4
        return float(np.sqrt(np.linalg.inv(information)[1 + FEW.index("refuses"), 1 + FEW.index("refuses")]))

    assert error(places) == pytest.approx(errors[-1])
    rng = np.random.default_rng(0)
    differing = np.flatnonzero(gaps > 0.5)
    assert error(places) < min(error(rng.choice(differing, 60, replace=False)) for _ in range(20))


def test_what_no_trait_explains_becomes_the_batch(pool: TraitPairs) -> None:
    rng = np.random.default_rng(0)
    old = replace(pool, p_first=rng.uniform(0.3, 0.7, len(pool)))
    hit = rng.choice(len(pool), 60, replace=False)
    new = replace(
        pool, p_first=np.where(np.isin(np.arange(len(pool)), hit), 1 - old.p_first + 0.25, old.p_first).clip(0, 1)
    )
    rest = unexplained_change(old, new)
    batch = reflect(changed(lists="no evidence of change"), pool, {}, k=20, rest=rest)
    assert batch.verdict == "no trait explains it"
    assert set(batch.comparison_ids) <= {pool.comparison_ids[i] for i in hit}
    assert unexplained_change(old, old)[0] is None


def test_a_batch_without_candidates_is_refused(pool: TraitPairs) -> None:
    nameless = replace(pool, comparison_ids=(None,) * len(pool))
    with pytest.raises(InputError, match="comparison_id and k of at least 1, got 0 and 5"):
        reflect(changed(lists="rose"), nameless, {}, k=5)
    with pytest.raises(InputError, match="none of 1200 pairs differs in 'silent'"):
        informative_pairs(replace(pool, differences=pool.differences.assign(silent=0.0)), "silent", 5)


# Records


@pytest.fixture(scope="module")
def store() -> Store:
    """A dataset with votes and a consensus, and two versions of a model of which the second turned against lists."""
    opened = connect(":memory:")
    rng = np.random.default_rng(0)
    models = [Model(name="judge", kind="reward"), Model(name="judge", kind="reward")]
    rows: list[Any] = list(models)
    for q in range(90):
        prompt = Prompt(text=f"<b>Question</b> {q}?")
        rows.append(prompt)
        for _ in range(2):
            lists, sorry = rng.integers(0, 2, 2), rng.integers(0, 2, 2)
            more = rng.integers(0, 4, 2)
            texts = [
                "It is so." + " And so on." * more[i] + " Sorry." * sorry[i] + "\n- a\n- b\n- c" * lists[i]
                for i in (0, 1)
            ]
            answers = [Generation(prompt_id=prompt.id, text=text) for text in texts]
            pair = Comparison(prompt_id=prompt.id, first_id=answers[0].id, second_id=answers[1].id, dataset="pilot")
            lead = int(lists[0] - lists[1])
            p = float(win_probability(np.array(1.5 * lead)))
            label: Any = "first" if rng.random() < p else "second"
            rows += [*answers, pair, Annotation(comparison_id=pair.id, annotator_id="ada", label=label)]
            rows.append(Annotation(comparison_id=pair.id, annotator_id="oracle", label="tie", queue="q/truth"))
            rows.append(Annotation(comparison_id=pair.id, annotator_id="ben", label="skip"))
            for model, weight in zip(models, (1.5, -1.5), strict=True):
                said = float(win_probability(np.array(weight * lead + rng.normal(0, 0.2))))
                rows.append(Prediction(model_id=model.id, comparison_id=pair.id, p_first=said))
    opened.append(rows)
    return opened


SMALL: dict[str, Any] = {"traits": ["lists", "apologises", "refuses"]}


def test_the_same_store_and_seed_give_the_same_form(store: Store) -> None:
    runs = [run_once(store, measure_form, seed=5, dataset="pilot", fresh=True, **SMALL) for _ in range(2)]
    one, other = (store.get(Form, run["form_id"]) for run in runs)
    same = ("subject", "version", "weights", "intervals", "explained", "n", "metadata")
    assert all(getattr(one, name) == getattr(other, name) for name in same)
    assert runs[0]["rewarded"] == ["lists"]
    assert runs[0]["not_measurable"] == ["refuses"]
    assert one.metadata["traits"]["refuses"]["weight"] is None
    assert set(one.weights) == {"lists", "apologises"}
    json.dumps(one.metadata, allow_nan=False)


def test_labels_are_people_s_and_the_consensus_goes_before_votes() -> None:
    opened = connect(":memory:")
    prompt = Prompt(text="q")
    one, two = Generation(prompt_id=prompt.id, text="a"), Generation(prompt_id=prompt.id, text="b")
    pair = Comparison(prompt_id=prompt.id, first_id=one.id, second_id=two.id, dataset="d")
    opened.append([prompt, one, two, pair])
    with pytest.raises(MissingError, match="no dataset 'd' with labels"):
        dataset_pairs(opened, "d")
    votes = [("ada", "first", None), ("ben", "tie", None), ("cleo", "skip", None), ("oracle", "second", "q/truth")]
    opened.append([Annotation(comparison_id=pair.id, annotator_id=a, label=v, queue=q) for a, v, q in votes])  # type: ignore[arg-type]
    assert dataset_pairs(opened, "d")["p_first"].tolist() == [0.75]
    opened.append(
        Consensus(comparison_id=pair.id, method="m", p_first=0.6, p_second=0.2, p_tie=0.2, label="first", n_votes=2)
    )
    assert dataset_pairs(opened, "d")["p_first"].tolist() == [0.7]
    assert dataset_pairs(opened, "d", labels="votes")["p_first"].tolist() == [0.75]
    with pytest.raises(MissingError, match="no votes between 2300-01-01 and now"):
        dataset_pairs(opened, "d", since="2300-01-01")
    with pytest.raises(InputError, match="'soon' is no moment"):
        dataset_pairs(opened, "d", since="soon")
    with pytest.raises(InputError, match="a consensus has no time"):
        dataset_pairs(opened, "d", since="2026-01-01", labels="consensus")
    assert askable_pairs(opened, "d")["p_first"].tolist() == [0.5]


def test_versions_of_a_model_make_a_path_and_their_change_is_found(store: Store) -> None:
    ids = [model.id for model in store.records(Model)]
    runs = [run_once(store, measure_form, seed=0, model_id=key, **SMALL) for key in ids]
    assert [form.subject for form in stored_forms(store, ids[0])] == ids
    path = form_path(store, ids[1])
    lists = path[path["trait"] == "lists"]["weight"].tolist()
    assert lists[0] > 1.2
    assert lists[1] < -1.2
    change = recorded_change(store, *(run["form_id"] for run in runs), permutations=199)
    assert change.loc["lists", "state"] == "fell"
    assert change.loc["apologises", "state"] == "no evidence of change"
    assert change["share"].idxmax() == "lists"
    with pytest.raises(MissingError, match="no form of 'nobody' was measured yet"):
        stored_forms(store, "nobody")


def test_a_form_needs_one_source_and_a_model_predictions(store: Store) -> None:
    with pytest.raises(InputError, match="give model_id or dataset"):
        measure_form(store, run_id="r", seed=0)
    silent = Model(name="silent", kind="reward")
    store.append(silent)
    with pytest.raises(MissingError, match=r"silent .* has no predictions"):
        model_pairs(store, silent.id)


# People's preferences


@pytest.mark.skipif(not PREFERENCES.is_dir(), reason="needs ../shared/data, which a clone does not have")
def test_harmlessness_rewards_apologies_and_shorter_answers() -> None:
    rows = pd.read_parquet(PREFERENCES / "hh_harmless_base.parquet")
    prompts = rows["prompt"].map(lambda text: json.loads(text)[-1]["content"])
    pairs = pd.DataFrame(
        {
            "prompt": prompts,
            "first": rows["chosen"],
            "second": rows["rejected"],
            "p_first": 1.0,
            "cluster": rows["prompt"],
        }
    )
    form = fit_form(measure_pairs(pairs))
    assert form.table.loc["apologises", "state"] == "rewarded"
    assert form.length["high"] < 0
    assert 0.02 < form.explained[0] < 0.12
    assert form.table.loc["code-block", "state"] == UNMEASURABLE
    assert trait_support(measure_pairs(pairs.head(300)))["inflation"].max() < 5


def test_every_plantable_trait_has_a_symbol() -> None:
    assert set(PLANTABLE) <= set(load_vocabulary())
