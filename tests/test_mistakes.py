"""Error memory: nothing twice, nothing by chance, nothing back."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn")

from code_pairs import add_pairs, one_pair

from rlhf_workbench.cli import main
from rlhf_workbench.collect.queue import next_task
from rlhf_workbench.core.errors import DeniedError, InputError, MissingError, StateError
from rlhf_workbench.core.schema import (
    Comparison,
    Consensus,
    Generation,
    Mistake,
    MistakePattern,
    Model,
    Prediction,
    Preference,
    Prompt,
    QueueItem,
    Snapshot,
    correction,
    utc_now,
)
from rlhf_workbench.monitor.embeddings import PAIR_VALUES, fit_space, load_space, pair_vectors
from rlhf_workbench.monitor.hard_examples import hard_examples, similar_comparisons
from rlhf_workbench.monitor.mistakes import (
    decay_weights,
    is_withdrawn,
    judged_predictions,
    mistake_kinds,
    mistake_weights,
    patterns_by_place,
    remember_mistakes,
    surprises,
)
from rlhf_workbench.monitor.patterns import pattern_examples, pattern_page, pattern_table, remember_patterns
from rlhf_workbench.monitor.recall import recall_mistakes
from rlhf_workbench.monitor.regions import distinctive_words, find_regions, judge_region, propose_regions, split_halves
from rlhf_workbench.monitor.regressions import (
    check_regressions,
    paired_p_value,
    paired_power,
    require_no_regressions,
    resolve_pattern,
    unpaired_power,
)
from rlhf_workbench.serve.hard_batch import choose_batch, enqueue_hard_batch, order_with_mistakes
from rlhf_workbench.store.tables import Store, connect

settings.register_profile("quick", max_examples=30, deadline=None)
settings.load_profile("quick")

PAIRS = Path(__file__).parent.parent.parent / "shared/data/preferences/ukpconvarg1_strict.parquet"
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)


@pytest.fixture
def store() -> Iterator[Store]:
    with connect(":memory:") as opened:
        yield opened


def say(store: Store, comparison_id: str, p_first: float) -> None:
    label = "first" if p_first > 0.5 else "second"
    facts = {"p_first": p_first, "p_second": 1 - p_first, "label": label, "n_votes": 5}
    store.append(Consensus(comparison_id=comparison_id, method="majority", **facts))  # type: ignore[arg-type]


# What is a mistake


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_which_answer_is_first_does_not_matter(rows: list[tuple[float, float]]) -> None:
    p, q = (np.array(part) for part in zip(*rows, strict=True))
    p, q = p.round(4), q.round(4)
    assert mistake_kinds(p, q).tolist() == mistake_kinds(1 - p, 1 - q).tolist()
    assert surprises(p, q) == pytest.approx(surprises(1 - p, 1 - q), abs=1e-6)
    assert (surprises(p, q) >= 0).all()


@pytest.mark.parametrize(
    ("p", "q", "kind"),
    [
        *((0.9, 0.0, "wrong"), (0.51, 0.49, "wrong"), (0.9, 1.0, ""), (0.5, 1.0, ""), (0.95, 0.5, "overconfident")),
        *((0.9, 0.55, "overconfident"), (0.8, 0.55, ""), (0.7, 0.5, ""), (0.1, 0.45, "overconfident")),
    ],
)
def test_kinds(p: float, q: float, kind: str) -> None:
    assert mistake_kinds([p], [q]).tolist() == [kind]


# Keeping them


def test_every_mistake_is_kept_once_also_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        models, _ = add_pairs(store, 80, 0, {"judge": (0.6, 0.2)})
        key = models["judge"].id
        expected = judged_predictions(store, key).query("kind != ''")
        assert remember_mistakes(store, key).added == len(expected) > 10
        before = store.records(Mistake)
    with connect(path) as store:
        again = remember_mistakes(store, key)
        assert (again.added, again.corrected, again.withdrawn) == (0, 0, 0)
        assert store.records(Mistake) == before
        assert set(expected["comparison_id"]) == {m.comparison_id for m in before}
        assert all(len(m.embedding) == PAIR_VALUES for m in before)


def test_two_at_once_keep_one_row_each(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        models, _ = add_pairs(store, 60, 0, {"judge": (0.6, 0.2)})
        key = models["judge"].id

        def work() -> None:
            with connect(path) as own:
                remember_mistakes(own, key)

        threads = [threading.Thread(target=work) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        kept = store.records(Mistake)
    assert len({m.comparison_id for m in kept}) == len(kept) > 5
    assert len({m.context["space_id"] for m in kept}) == 1


def test_a_changed_consensus_corrects_withdraws_and_brings_back(store: Store) -> None:
    models, _ = add_pairs(store, 30, 0, {"judge": (0.6, 0.4)})
    key = models["judge"].id
    remember_mistakes(store, key)
    first = store.records(Mistake)[0]
    say(store, first.comparison_id, 0.6 if first.first_is_better else 0.4)  # still the other answer, less sure
    assert remember_mistakes(store, key).corrected == 1
    (second,) = store.records(Mistake, comparison_id=first.comparison_id)
    assert second.replaces == first.id
    assert 0 < second.surprise < first.surprise
    assert second.context["since"] == first.context["since"]
    say(store, first.comparison_id, 1 - first.first_is_better)  # the model was right after all
    assert remember_mistakes(store, key).withdrawn == 1
    (third,) = store.records(Mistake, comparison_id=first.comparison_id)
    assert is_withdrawn(third)
    assert third.surprise == 0
    assert mistake_weights([third]).tolist() == [0]
    assert first.comparison_id not in set(hard_examples(store, key)["comparison_id"])
    assert remember_mistakes(store, key).withdrawn == 0
    say(store, first.comparison_id, first.first_is_better)
    assert remember_mistakes(store, key).corrected == 1
    assert not is_withdrawn(store.records(Mistake, comparison_id=first.comparison_id)[0])


def test_without_a_consensus_the_preference_of_the_models_snapshot_counts(store: Store) -> None:
    snapshots = [Snapshot(name=name, content_hash="0" * 64, n_rows=1) for name in ("own", "later")]
    model = Model(name="judge", kind="reward", snapshot_id=snapshots[0].id)
    asked = Prompt(text="Why?")
    answers = [Generation(prompt_id=asked.id, text=text) for text in ("Because.", "No idea.")]
    pair = Comparison(prompt_id=asked.id, first_id=answers[0].id, second_id=answers[1].id)
    rows = [
        Preference(
            snapshot_id=snapshot.id, comparison_id=pair.id, prompt=[], chosen=a, rejected=b, p_chosen=p, split="train"
        )
        for snapshot, a, b, p in (
            (snapshots[0], "No idea.", "Because.", 0.9),
            (snapshots[1], "Because.", "No idea.", 0.8),
        )
    ]
    store.append([*snapshots, model, asked, *answers, pair, *rows])
    store.append(Prediction(model_id=model.id, comparison_id=pair.id, p_first=0.7))
    assert judged_predictions(store, model.id)["first_is_better"].tolist() == pytest.approx([0.1])
    say(store, pair.id, 0.75)
    assert judged_predictions(store, model.id)["first_is_better"].tolist() == pytest.approx([0.75])


def test_only_the_newest_prediction_counts_and_texts_are_not_copied(store: Store) -> None:
    models, _ = add_pairs(store, 30, 0, {"judge": (1.0, 1.0)})
    key = models["judge"].id
    remember_mistakes(store, key)
    first = store.records(Mistake)[0]
    store.append(Prediction(model_id=key, comparison_id=first.comparison_id, p_first=first.first_is_better))
    assert remember_mistakes(store, key).withdrawn == 1
    text = store.get(Generation, first.context["first_id"]).text
    assert text not in json.dumps(first.context)


# Fading


def test_weights_follow_the_clock() -> None:
    now = datetime(2026, 11, 1, tzinfo=UTC)
    since = [now - timedelta(days=d) for d in (0, 30, 60, 300)] + [now + timedelta(days=5)]
    assert decay_weights(since, now=now, half_life=30) == pytest.approx([1, 0.5, 0.25, 2**-10, 1])
    for bad in (0, -1, float("nan")):
        with pytest.raises(InputError, match="half-life"):
            decay_weights(since, half_life=bad)
    with pytest.raises(InputError, match="time zone"):
        decay_weights(since, now=datetime(2026, 11, 1))


def test_resolved_patterns_fade_twice_as_fast_and_still_guard(store: Store) -> None:
    models, _ = add_pairs(store, 300, 0, {"old": (0.7, 0.1), "fixed": (0.05, 0.1), "bad": (0.7, 0.1)})
    (pattern,) = remember_patterns(store, models["old"].id).patterns
    resolve_pattern(store, pattern.id, model_id=models["fixed"].id, reason="retrained")
    members = store.records(Mistake, comparison_id=pattern.metadata["comparison_ids"], model_id=models["old"].id)
    others = [m for m in store.records(Mistake, model_id=models["old"].id) if m not in members]
    later = utc_now() + timedelta(days=90)
    weights = [mistake_weights(part, patterns_by_place(store), now=later) for part in (members, others)]
    assert weights[0] == pytest.approx(np.full(len(members), 0.25), abs=1e-3)
    assert weights[1] == pytest.approx(np.full(len(others), 0.5), abs=1e-3)
    with pytest.raises(DeniedError):
        require_no_regressions(store, models["bad"].id)


# Points and recall


@given(TEXTS, TEXTS, TEXTS)
def test_points_of_pairs_do_not_know_which_answer_is_first(prompt: str, one: str, other: str) -> None:
    space = fit_space(["def run the soup", "soup and train", "the bank", one + " x"], seed=0)
    assert (pair_vectors(space, [prompt], [one], [other]) == pair_vectors(space, [prompt], [other], [one])).all()


def test_a_space_follows_from_its_texts_and_seed(store: Store) -> None:
    texts = [" ".join(one_pair(np.random.default_rng(i), i % 2 == 0)) for i in range(60)]
    one, other = (fit_space(part, seed=3) for part in (texts, texts[::-1]))
    assert (one.place(texts) == other.place(texts)).all()


def test_recall_finds_planted_neighbours_in_any_order(store: Store) -> None:
    models, with_code = add_pairs(store, 400, 0, {"judge": (0.5, 0.3)})
    remember_mistakes(store, models["judge"].id)
    kept = {m.comparison_id for m in store.records(Mistake)}
    base = len(kept & set(with_code)) / len(kept)
    assert base < 0.5
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(20):
        question, one, other = one_pair(rng, True)
        found, swapped = (recall_mistakes(store, question, *pair, k=5) for pair in ((one, other), (other, one)))
        assert [r.mistake.id for r in found] == [r.mistake.id for r in swapped]
        assert [r.similarity for r in found] == pytest.approx([r.similarity for r in swapped])
        shares.append(np.mean([r.mistake.comparison_id in with_code for r in found]))
    assert np.mean(shares) > 0.9
    known = store.records(Mistake)[0]
    texts = [store.get(Prompt, known.context["prompt_id"]).text]
    texts += [store.get(Generation, known.context[side]).text for side in ("second_id", "first_id")]
    nearest = recall_mistakes(store, *texts, k=1)[0]
    assert nearest.mistake.id == known.id
    assert nearest.similarity == pytest.approx(1, abs=1e-4)


def test_of_two_alike_the_younger_is_recalled_first(store: Store) -> None:
    model, asked = Model(name="judge", kind="reward"), Prompt(text="Why?")
    answers = [Generation(prompt_id=asked.id, text=text) for text in ("Because it is so.", "No idea at all.")]
    store.append([model, asked, *answers])
    for days in (200, 10):
        pair = Comparison(prompt_id=asked.id, first_id=answers[0].id, second_id=answers[1].id)
        when = utc_now() - timedelta(days=days)
        store.append([pair, Prediction(model_id=model.id, comparison_id=pair.id, p_first=0.1, recorded_at=when)])
        say(store, pair.id, 1.0)
    remember_mistakes(store, model.id)
    found = recall_mistakes(store, "Why?", "Because it is so.", "No idea at all.")
    assert [round(r.weight, 3) for r in found] == [round(2 ** (-10 / 90), 3), round(2 ** (-200 / 90), 3)]


# Patterns


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_a_planted_pattern_is_found_and_named(store: Store, seed: int, method: str) -> None:
    models, with_code = add_pairs(store, 500, seed, {"judge": (0.6, 0.15)})
    report = remember_patterns(store, models["judge"].id, method=method, seed=seed)  # type: ignore[arg-type]
    best = max(report.patterns, key=lambda p: len(p.mistake_ids))
    assert best.p_value is not None
    assert best.p_value < 1e-3
    assert {"```", "def"} <= set(best.words)
    assert {"```", "def"} & set(best.name.split(", "))
    members = set(best.metadata["comparison_ids"])
    wrong_with_code = {m.comparison_id for m in store.records(Mistake)} & set(with_code)
    assert len(members & wrong_with_code) > 0.8 * len(members)
    assert len(members & wrong_with_code) > 0.6 * len(wrong_with_code)
    assert best.metadata["rate_inside"] == pytest.approx(0.6, abs=0.2)
    assert set(pattern_examples(store, best)["comparison_id"]) <= members


def test_errors_at_random_make_no_pattern_and_looking_twice_would() -> None:
    """80 draws under the null: at most 5 % of them find anything (here within three standard errors)."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, 12))
    false, dishonest = 0, 0
    for seed in range(80):
        wrong = np.random.default_rng(1000 + seed).random(300) < 0.25
        false += any(test.q_value <= 0.05 for test in find_regions(points, wrong, seed=seed))
        if seed < 20:
            regions = propose_regions(points, wrong, seed=seed)
            dishonest += any(judge_region(region, points, wrong).p_value <= 0.05 for region in regions)
    assert false <= 80 * 0.05 + 3 * np.sqrt(80 * 0.05 * 0.95)
    assert dishonest >= 15


def test_patterns_keep_their_names_and_are_written_once(store: Store) -> None:
    models, _ = add_pairs(store, 400, 0, {"judge": (0.6, 0.1)})
    key = models["judge"].id
    (first,) = remember_patterns(store, key).patterns
    assert (again := remember_patterns(store, key)).patterns == [first]
    assert (again.added, again.corrected) == (0, 0)
    gone = first.metadata["comparison_ids"][0]
    say(store, gone, 1 - store.records(Mistake, comparison_id=gone)[0].first_is_better)
    changed = remember_patterns(store, key)
    assert (changed.added, changed.corrected) == (0, 1)
    (now,) = store.records(MistakePattern)
    assert now.replaces == first.id
    assert now.name == first.name
    assert gone not in now.metadata["comparison_ids"]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.integers(0, 100))
def test_what_belongs_together_stays_in_one_half(groups: list[int], seed: int) -> None:
    first = split_halves(groups, seed)
    assert all(len(set(first[np.array(groups) == group])) == 1 for group in groups)
    sizes = [len({g for g, f in zip(groups, first, strict=True) if f == half}) for half in (True, False)]
    assert abs(sizes[0] - sizes[1]) <= 1


def test_a_pair_that_is_asked_often_confirms_nothing_by_itself() -> None:
    """The same two texts five times, always the same outcome: a plain split finds and confirms them."""
    rng = np.random.default_rng(0)
    points, texts = np.repeat(rng.normal(size=(80, 6)), 5, axis=0), np.repeat(np.arange(80), 5).tolist()
    found = {"together": 0, "apart": 0}
    for seed in range(14):
        wrong = np.repeat(np.random.default_rng(seed).random(80) < 0.35, 5)
        for name, groups in (("together", texts), ("apart", None)):
            found[name] += any(test.q_value <= 0.05 for test in find_regions(points, wrong, seed=seed, groups=groups))
    assert found["together"] <= 3
    assert found["apart"] >= 10


def test_words_that_distinguish() -> None:
    rng = np.random.default_rng(0)
    texts = [one_pair(rng, True)[1:] for _ in range(60)]
    plain = [one_pair(rng, False)[1] for _ in range(200)]
    words = [word for word, _ in distinctive_words([" ".join(pair) for pair in texts], plain)]
    assert set(words[:3]) == {"```", "def", "return"}
    assert not {"the", "is", "and"} & set(words)


# Hostile and odd input


def test_texts_of_strangers_are_escaped(store: Store) -> None:
    evil = "<script>alert(1)</script>"
    asked, key = Prompt(text=evil), "m"
    answers = [Generation(prompt_id=asked.id, text=f"{evil} {i}") for i in range(2)]
    pair = Comparison(prompt_id=asked.id, first_id=answers[0].id, second_id=answers[1].id)
    numbers = {"p_first": 0.1, "first_is_better": 1.0, "surprise": 2.3}
    wrong = Mistake(model_id=key, comparison_id=pair.id, kind="wrong", **numbers)  # type: ignore[arg-type]
    rates = {"rate_inside": 0.5, "n_inside": 10, "rate_outside": 0.1}
    pattern = MistakePattern(model_id=key, name=evil, metadata=rates | {"example_ids": [pair.id]})
    store.append([asked, *answers, pair, wrong, pattern])
    page = pattern_page(store, pattern)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 4  # name, question, both answers


def test_no_model_no_predictions_nothing_judged(store: Store) -> None:
    with pytest.raises(MissingError, match="there is no model"):
        remember_mistakes(store, "nobody")
    model = Model(name="judge", kind="reward")
    store.append(model)
    with pytest.raises(MissingError, match="has no predictions"):
        remember_mistakes(store, model.id)
    models, _ = add_pairs(store, 5, 0, {"judge": (1, 1)}, judged=False)
    with pytest.raises(InputError, match="is judged yet"):
        remember_mistakes(store, models["judge"].id)


def test_no_mistakes_and_few_mistakes(store: Store) -> None:
    models, _ = add_pairs(store, 60, 0, {"perfect": (0, 0), "good": (0.1, 0.1)})
    assert remember_mistakes(store, models["perfect"].id).mistakes == 0
    for name in models:
        with pytest.raises(InputError, match="not enough mistakes to form patterns"):
            remember_patterns(store, models[name].id)
    with pytest.raises(MissingError, match="no mistakes"):
        hard_examples(store, models["perfect"].id)
    assert pattern_table(store).empty


def test_a_prediction_that_is_no_number_is_refused(store: Store) -> None:
    models, with_code = add_pairs(store, 10, 0, {"judge": (1, 1)}, share_code=1)
    store.append(Prediction(model_id=models["judge"].id, comparison_id=with_code[0], p_first=float("nan")))
    with pytest.raises(InputError, match="1 of 10 predictions"):
        remember_mistakes(store, models["judge"].id)


def test_a_function_of_ones_own(store: Store) -> None:
    models, _ = add_pairs(store, 60, 0, {"judge": (0.6, 0.3)})
    key = models["judge"].id
    size = 30

    def encode(texts: object) -> np.ndarray:
        return np.array([[hash_of(text, i) for i in range(size)] for text in texts])  # type: ignore[attr-defined]

    def hash_of(text: str, i: int) -> float:
        return float((sum(map(ord, text)) * (i + 3)) % 97)

    remember_mistakes(store, key, embed=encode)
    assert all(len(m.embedding) == PAIR_VALUES for m in store.records(Mistake))
    with pytest.raises(InputError, match="give the same function"):
        recall_mistakes(store, "a", "b", "c")
    assert recall_mistakes(store, "a", "b", "c", embed=encode)
    size = 20
    with pytest.raises(InputError, match="20 values a text"):
        recall_mistakes(store, "a", "b", "c", embed=encode)
    with pytest.raises(InputError, match="NaN"):
        remember_mistakes(store, key, embed=lambda texts: np.full((len(texts), 3), np.nan), refit=True)
    assert remember_mistakes(store, key, refit=True).corrected > 0
    assert load_space(store).method == "tfidf"


def test_stored_points_of_another_length_are_refused(store: Store) -> None:
    models, _ = add_pairs(store, 40, 0, {"judge": (0.6, 0.3)})
    remember_mistakes(store, models["judge"].id)
    store.append(correction(store.records(Mistake)[0], embedding=[0.1, 0.2]))
    with pytest.raises(InputError, match="has 2 values, needs 64"):
        recall_mistakes(store, "a", "b", "c")
    remember_mistakes(store, models["judge"].id)  # mends it
    assert recall_mistakes(store, "a", "b", "c")


@pytest.mark.parametrize(
    ("points", "wrong", "says"),
    [
        ([[1.0, float("nan")]] * 50, [True] * 25 + [False] * 25, "finite"),
        ([[1.0]] * 50, [True] * 3, "n flags"),
        ([[1.0]] * 50, [True] * 50, "nearly every prediction is a mistake"),
        ([[1.0]] * 50, [True] * 5 + [False] * 45, "not enough mistakes"),
    ],
)
def test_regions_need_points_and_flags(points: list[list[float]], wrong: list[bool], says: str) -> None:
    with pytest.raises(InputError, match=says):
        find_regions(points, wrong, seed=0)


def test_points_that_are_all_the_same_make_no_pattern() -> None:
    assert all(test.q_value > 0.05 for test in find_regions([[1.0, 2.0]] * 100, [True, False] * 50, seed=0))


# The gate


def test_power_is_what_simulation_says() -> None:
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(2000):
        new, before = rng.random(40) < 0.45, rng.random(40) < 0.15
        b, c = int((new & ~before).sum()), int((before & ~new).sum())
        stopped += paired_p_value(b, c) <= 0.05 and (b - c) / 40 >= 0.1
    assert stopped / 2000 == pytest.approx(paired_power(40, 0.45, 0.15), abs=0.03)
    assert paired_power(40, 0.15, 0.15) <= 0.05
    assert unpaired_power(40, 0.15, 6, 40) <= 0.05 < 0.8 < unpaired_power(60, 0.6, 6, 60)


def test_the_gate_stops_what_comes_back_and_lets_pass_what_does_not(store: Store) -> None:
    rates = {"old": (0.6, 0.1), "fixed": (0.1, 0.1)}
    rates |= {f"good {i}": (0.1, 0.1) for i in range(5)} | {f"bad {i}": (0.6, 0.1) for i in range(5)}
    models, _ = add_pairs(store, 300, 0, rates)
    (pattern,) = remember_patterns(store, models["old"].id).patterns
    assert not check_regressions(store, models["bad 0"].id).checks  # nothing is resolved yet
    with pytest.raises(StateError, match="does not show"):
        resolve_pattern(store, pattern.name, model_id=models["bad 0"].id, reason="hope")
    resolve_pattern(store, pattern.name, model_id=models["fixed"].id, reason="retrained")
    with pytest.raises(StateError, match="resolved already"):
        resolve_pattern(store, pattern.name, model_id=models["fixed"].id, reason="again")
    for i in range(5):
        (good,), (bad,) = (check_regressions(store, models[f"{name} {i}"].id).checks for name in ("good", "bad"))
        assert (good.verdict, bad.verdict) == ("clear", "returned")
        assert min(good.power, bad.power) > 0.95
        assert good.test == "paired"
    with pytest.raises(DeniedError, match=r"brings back resolved mistakes: .*def"):
        require_no_regressions(store, models["bad 3"].id)
    assert remember_patterns(store, models["old"].id).patterns[0].status == "resolved"


def test_a_candidate_that_was_not_looked_at_does_not_pass(store: Store) -> None:
    models, with_code = add_pairs(store, 300, 0, {"old": (0.7, 0.1), "fixed": (0.05, 0.1)})
    (pattern,) = remember_patterns(store, models["old"].id).patterns
    with pytest.raises(MissingError, match="there is no pattern 'x'; there are"):
        resolve_pattern(store, "x", model_id=models["fixed"].id, reason="r")
    with pytest.raises(InputError, match="needs a reason"):
        resolve_pattern(store, pattern.id, model_id=models["fixed"].id, reason=" ")
    fresh = Model(name="fresh", kind="reward")
    store.append(fresh)
    with pytest.raises(StateError, match="has no predictions on the pairs"):
        resolve_pattern(store, pattern.id, model_id=fresh.id, reason="r")
    resolve_pattern(store, pattern.id, model_id=models["fixed"].id, reason="r")
    with pytest.raises(StateError, match="0 judged pairs"):
        require_no_regressions(store, fresh.id)
    truth = judged_predictions(store, models["old"].id).set_index("comparison_id")["first_is_better"]
    few = [Prediction(model_id=fresh.id, comparison_id=c, p_first=float(truth[c])) for c in with_code[:3]]
    store.append(few)
    with pytest.raises(StateError, match="judged pairs, power"):
        require_no_regressions(store, fresh.id)
    rest = [Prediction(model_id=fresh.id, comparison_id=c, p_first=float(truth[c])) for c in with_code[3:]]
    store.append(rest)
    assert require_no_regressions(store, fresh.id).is_clear
    policy = Model(name="policy", kind="policy")
    store.append(policy)
    assert require_no_regressions(store, policy.id).checks == ()  # reward models' mistakes are not its


def test_no_release_brings_back_a_resolved_pattern(store: Store) -> None:
    from rlhf_workbench.govern.stages import promote

    models, _ = add_pairs(
        store, 300, 0, {"old": (0.7, 0.1), "fixed": (0.05, 0.1), "good": (0.1, 0.1), "bad": (0.7, 0.1)}
    )
    (pattern,) = remember_patterns(store, models["old"].id).patterns
    resolve_pattern(store, pattern.id, model_id=models["fixed"].id, reason="retrained")
    with pytest.raises(DeniedError, match=r"brings back resolved mistakes: .*def"):
        promote(store, models["bad"].id, reason="new", needs_approval=False, needs_trial=False)
    stage = promote(store, models["good"].id, reason="new", needs_approval=False, needs_trial=False)
    assert (stage.stage, stage.model_id) == ("champion", models["good"].id)


# The next batch and the next training


def test_the_next_batch_holds_the_hard_pairs_and_the_curriculum_knows_them(store: Store) -> None:
    models, with_code = add_pairs(store, 400, 0, {"judge": (0.7, 0.05)})
    key = models["judge"].id
    _, new_code = add_pairs(store, 100, 1, {}, judged=False)
    (pattern,) = remember_patterns(store, key).patterns
    unjudged = similar_comparisons(store, key, most=20)
    assert np.mean(unjudged["comparison_id"].isin(new_code)) > 0.9
    figures = enqueue_hard_batch(store, run_id="r", seed=0, model_id=key, queue="next", size=40)
    assert figures["items"] == 40
    assert figures["sources"] == {"mistake": 20, "similar": 20}
    items = store.frame(QueueItem, queue="next")
    assert np.mean(items["comparison_id"].isin([*with_code, *new_code])) > 0.8
    assert items["priority"].min() >= 1
    assert figures["patterns"][pattern.name] > 25
    task = next_task(store, "next", "ada")
    assert task is not None
    assert task.comparison_id in set(items.loc[items["priority"] == items["priority"].max(), "comparison_id"])
    again = choose_batch(store, key, size=40, seed=0, queue="next")
    assert not set(again["comparison_id"]) & set(items["comparison_id"])

    rows = judged_predictions(store, key)
    snapshot = Snapshot(name="demo", content_hash="0" * 64, n_rows=len(rows))
    facts = {"snapshot_id": snapshot.id, "prompt": [], "p_chosen": 0.9, "split": "train"}
    store.append(
        [snapshot]
        + [
            Preference(comparison_id=r.comparison_id, chosen=r.first, rejected=r.second, **facts)
            for r in rows.itertuples()
        ]
    )
    ordered = order_with_mistakes(store, snapshot.id, model_id=key, seed=0)
    assert sorted(ordered["comparison_id"]) == sorted(rows["comparison_id"])
    wrong = ordered["comparison_id"].isin(rows.loc[rows["kind"] != "", "comparison_id"])
    places = np.arange(len(ordered))
    assert places[wrong].mean() > places[~wrong].mean() + 0.2 * len(ordered)
    calm = order_with_mistakes(store, snapshot.id, model_id=key, seed=0, half_life=1e-9)  # all has faded
    assert calm["difficulty"].nunique() == 1


def test_everything_hard_waits_already(store: Store) -> None:
    models, _ = add_pairs(store, 30, 0, {"judge": (1, 1)})
    key = models["judge"].id
    remember_mistakes(store, key)
    enqueue_hard_batch(store, run_id="r", seed=0, model_id=key, queue="q", size=100)
    with pytest.raises(StateError, match="waits in queue 'q' already"):
        enqueue_hard_batch(store, run_id="r", seed=0, model_id=key, queue="q", size=100)
    with pytest.raises(InputError, match="size must be"):
        choose_batch(store, key, size=0, seed=0)


def test_the_job_does_all_of_it(tmp_path: Path) -> None:
    pytest.importorskip("papermill")
    from rlhf_workbench.serve.jobs import find_job, run_job

    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        models, _ = add_pairs(store, 300, 0, {"judge": (0.7, 0.1)})
    params = {"store_path": str(path), "model_id": models["judge"].id, "size": 30}
    page = run_job(find_job("hard_batch"), params, out=tmp_path).with_suffix(".html").read_text(encoding="utf-8")
    assert "mistakes among 300 judged predictions" in page
    assert "30 pairs wait in queue" in page
    with connect(path) as store:
        assert len(store.records(QueueItem, queue="hard")) == 30
        assert store.verify().is_intact


# The command line


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        models, _ = add_pairs(store, 300, 0, {"old": (0.7, 0.1), "fixed": (0.05, 0.1), "bad": (0.7, 0.1)})

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["mistakes", *words, "--store", str(path)])
        said = capsys.readouterr()
        return code, said.out, said.err

    old, fixed, bad = (models[name].id for name in ("old", "fixed", "bad"))
    assert json.loads(call("remember", "--model", old, "--json")[1])["added"] > 20
    assert json.loads(call("remember", "--model", old, "--json")[1])["added"] == 0
    found = json.loads(call("patterns", "--model", old, "--json")[1])
    name = found["patterns"][0]["name"]
    assert found["added"] == 1
    asked = ("recall", "--prompt", "Soup?", "--first", "```def f(x): return x```", "--second", "the soup")
    assert len(json.loads(call(*asked, "--json")[1])["mistakes"]) == 5
    assert "How about" in call(*asked)[1]
    assert call("check", "--model", bad)[0] == 0
    assert call("resolve", name, "--model", bad, "--reason", "hope")[0] == 2
    assert (
        json.loads(call("resolve", name, "--model", fixed, "--reason", "retrained", "--json")[1])["status"]
        == "resolved"
    )
    assert call("check", "--model", fixed)[0] == 0
    code, out, err = call("check", "--model", bad)
    assert code == 2
    assert name in err
    assert err.count("\n") == 1
    assert "returned" in out
    assert not json.loads(call("check", "--model", bad, "--json")[1])["is_clear"]
    assert call("remember", "--model", "nobody")[0] == 2


# Real arguments


def test_mistakes_about_real_arguments_have_readable_patterns(store: Store) -> None:
    if not PAIRS.is_file():
        pytest.skip(f"needs the shared data at {PAIRS}")
    from rlhf_workbench.train.baselines import fit_tfidf

    table = pd.read_parquet(PAIRS)
    table = table.assign(prompt=[json.loads(p)[-1]["content"] for p in table["prompt"]])
    test = table[table["split"] == "test"]
    train = table[table["split"] == "train"].sample(500, random_state=0)
    lead = fit_tfidf(train)(test)
    model = Model(name="tfidf", kind="reward")
    prompts = {text: Prompt(text=text) for text in test["prompt"].unique()}
    answers = {t: Generation(prompt_id="p", text=t) for t in pd.unique(pd.concat([test["chosen"], test["rejected"]]))}
    store.append([model, *prompts.values(), *answers.values()])
    records: list[Comparison | Consensus | Prediction] = []
    for row, margin in zip(test.itertuples(), lead, strict=True):
        pair = Comparison(
            prompt_id=prompts[row.prompt].id, first_id=answers[row.chosen].id, second_id=answers[row.rejected].id
        )
        said = {"p_first": 1.0, "p_second": 0.0, "label": "first", "n_votes": 5}
        records += [pair, Consensus(comparison_id=pair.id, method="gold", **said)]
        records.append(
            Prediction(model_id=model.id, comparison_id=pair.id, p_first=float(1 / (1 + np.exp(-2 * margin))))
        )
    store.append(records)
    report = remember_patterns(store, model.id)
    assert report.predictions == len(test)
    assert 100 < report.mistakes < 600
    assert report.tested
    for pattern in report.patterns:
        assert sum(word.isalpha() for word in pattern.words) >= 3
        assert pattern.metadata["rate_inside"] > pattern.metadata["rate_outside"]
        assert len(pattern_examples(store, pattern)) == 3
