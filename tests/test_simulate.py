"""Simulated annotators: the utility, the choices, the queue, the batches."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.collect.queue import add_items, next_task, submit
from rlhf_workbench.collect.simulate import (
    CREW,
    TRUE_TIE,
    SimulatedAnnotator,
    annotate_queue,
    answer_traits,
    enqueue_batches,
    shifted_batches,
    true_labels,
    true_utility,
)
from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.core.schema import Annotation, Comparison, Generation, Lease, Prompt
from rlhf_workbench.store.registry import run_once
from rlhf_workbench.store.tables import Store, connect

SENTENCES = (
    "Rivers carry sand to the sea and leave it where the water slows down.",
    "Rivers carry sand to the sea and leave it where the",
    "Sand.",
    "the the the the the the the the the",
    "A river is a natural stream of water. It carries sand. The sand settles when the water slows.",
    "Mountains are high, and snow falls on them in winter, which is why people go there to ski.",
)


def fill(store: Store, n: int, run_id: str = "pairs") -> list[str]:
    """n comparisons in six topics; their ids."""
    rng = np.random.default_rng(7)
    for i in range(n):
        prompt = Prompt(text=f"How do rivers carry sand, part {i}?", topic=f"topic {i % 6}")
        texts = rng.choice(SENTENCES, 2, replace=False)
        first, second = (Generation(prompt_id=prompt.id, text=str(t)) for t in texts)
        pair = Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id, run_id=run_id)
        store.append([prompt, first, second, pair])
    return [c.id for c in store.records(Comparison)]


@given(prompt=st.text(max_size=60), answer=st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_has_a_finite_utility(prompt: str, answer: str) -> None:
    traits = answer_traits(prompt, answer)
    assert all(0 <= value <= 1 for value in traits.values())
    assert math.isfinite(true_utility(prompt, answer))
    assert true_utility(prompt, answer) == true_utility(prompt, answer)


def test_utility_is_not_length() -> None:
    prompt = "How do rivers carry sand?"
    better = [
        (SENTENCES[0], SENTENCES[1]),  # ends
        (SENTENCES[0], SENTENCES[5]),  # is about the question
        (SENTENCES[0], SENTENCES[0] + " " + SENTENCES[0]),  # does not repeat itself
        (SENTENCES[4], SENTENCES[2]),  # says enough
        (SENTENCES[0], " ".join([SENTENCES[4]] * 12)),  # says no more than that
    ]
    for good, bad in better:
        assert true_utility(prompt, good) > true_utility(prompt, bad)
    assert sum(len(good) > len(bad) for good, bad in better) <= 2


@pytest.mark.parametrize("difference", [-1.0, -0.2, 0.0, 0.5])
@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_choices_follow_the_stated_model(difference: float, bias: float) -> None:
    person = SimulatedAnnotator("p", reliability=2.0, position_bias=bias, tie_width=0.4, skip_rate=0.1)
    rng = np.random.default_rng(0)
    n = 20_000
    seen = Counter(person.choose(difference, 0.0, rng) for _ in range(n))
    lead = 2.0 * difference + bias
    left, right = 1 / (1 + math.exp(0.4 - lead)), 1 / (1 + math.exp(0.4 + lead))
    expected = {"left": 0.9 * left, "right": 0.9 * right, "tie": 0.9 * (1 - left - right), "skip": 0.1}
    for choice, share in expected.items():
        assert seen[choice] / n == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))


def test_the_crew_is_as_described() -> None:
    assert len(CREW) == 6
    assert sum(person.position_bias > 0 for person in CREW) == 1
    assert len({person.reliability for person in CREW}) == 6


def test_truth_is_the_utility() -> None:
    with connect(":memory:") as store:
        ids = fill(store, 30)
        labels = true_labels(store, ids[::-1])
        assert list(labels.index) == ids[::-1]
        for pair in store.records(Comparison):
            prompt = store.get(Prompt, pair.prompt_id).text
            first, second = (
                true_utility(prompt, store.get(Generation, g).text) for g in (pair.first_id, pair.second_id)
            )
            right = "tie" if abs(first - second) < TRUE_TIE else "first" if first > second else "second"
            assert labels[pair.id] == right
        with pytest.raises(MissingError, match="there is no comparison nowhere"):
            true_labels(store, [ids[0], "nowhere"])


def answers(store: Store, queue: str) -> list[tuple[Any, ...]]:
    """What was answered, without ids and times: the place of the comparison, who, what, how it was shown."""
    place = {c.id: i for i, c in enumerate(store.records(Comparison))}
    found = store.records(Annotation, queue=queue)
    return sorted((place[a.comparison_id], a.annotator_id, a.label, a.is_swapped, a.seconds) for a in found)


def annotated(n: int, **kwargs: Any) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    with connect(":memory:") as store:
        add_items(store, "q", fill(store, n), overlap=6)
        figures = annotate_queue(store, run_id="r", **{"seed": 1, "queue": "q", **kwargs})
        assert store.verify().is_intact
        return answers(store, "q"), figures


def test_everybody_answers_everything_through_leases() -> None:
    with connect(":memory:") as store:
        ids = fill(store, 20)
        add_items(store, "q", ids, overlap=6)
        figures = annotate_queue(store, run_id="r", seed=0, queue="q")
        votes, leases = store.records(Annotation, queue="q"), store.records(Lease, queue="q")
        truth = store.records(Annotation, queue="q/truth")
    assert len(votes) == figures["answers"] + figures["skips"] == 120
    assert {v.lease_id for v in votes} == {lease.id for lease in leases}
    assert {(v.comparison_id, v.annotator_id) for v in votes} == {(c, p.name) for c in ids for p in CREW}
    assert [t.annotator_id for t in truth] == ["oracle"] * 20
    assert all(v.seconds and v.submitted_at and v.run_id == "r" for v in votes)
    assert 0.2 < sum(v.is_swapped for v in votes) / 120 < 0.8


def test_a_smaller_overlap_is_respected() -> None:
    with connect(":memory:") as store:
        add_items(store, "q", fill(store, 15), overlap=2)
        crew = [{"name": name, "skip_rate": 0.0} for name in "abcd"]
        figures = annotate_queue(store, run_id="r", seed=0, queue="q", crew=crew)
        per_item = Counter(a.comparison_id for a in store.records(Annotation, queue="q"))
    assert figures["answers"] == 30
    assert set(per_item.values()) == {2}


def test_same_seed_same_answers() -> None:
    one, two, other = annotated(12), annotated(12), annotated(12, seed=2)
    assert one == two
    assert one[0] != other[0]


def test_figures_tell_who_leans_and_who_is_right() -> None:
    crew = [{"name": "keen", "reliability": 9.0}, {"name": "dull", "reliability": 0.0}]
    crew += [{"name": "lean", "reliability": 0.5, "position_bias": 5.0}]
    _, figures = annotated(40, crew=crew)
    assert next(iter(figures)) == "answers"
    assert figures["accuracy"]["keen"] > 0.8 > 0.6 > figures["accuracy"]["dull"]
    assert figures["share_left"]["lean"] > 0.85 > 0.7 > figures["share_left"]["keen"]


def test_a_turned_annotator_prefers_the_worse_and_nobody_else_changes() -> None:
    before, figures = annotated(20)
    after, turned = annotated(20, turned="ada")
    assert [a for a in before if a[1] != "ada"] == [a for a in after if a[1] != "ada"]
    assert figures["accuracy"]["ada"] > 0.7
    assert turned["accuracy"]["ada"] < 0.3


def test_an_interrupted_crew_goes_on_as_it_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = annotated(10)
    with connect(":memory:") as store:
        add_items(store, "q", fill(store, 10), overlap=6)
        calls = 0

        def stop(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 28:  # in the middle of a round
                raise KeyboardInterrupt
            return submit(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("rlhf_workbench.collect.simulate.submit", stop)
            with pytest.raises(KeyboardInterrupt):
                annotate_queue(store, run_id="r", seed=1, queue="q")
        assert 0 < len(answers(store, "q")) < 60
        annotate_queue(store, run_id="r2", seed=1, queue="q")
        assert answers(store, "q") == whole
        assert len(store.records(Annotation, queue="q/truth")) == 10


def test_people_and_the_crew_share_a_queue() -> None:
    with connect(":memory:") as store:
        ids = fill(store, 5)
        add_items(store, "q", ids, overlap=7)
        task = next_task(store, "q", "a person")
        assert task is not None
        submit(store, task.lease_id, "tie")
        annotate_queue(store, run_id="r", seed=0, queue="q")
        assert len(store.records(Annotation, queue="q")) == 31


def test_errors_say_what_to_do() -> None:
    with connect(":memory:") as store:
        with pytest.raises(MissingError, match="there is no queue 'q'"):
            annotate_queue(store, run_id="r", seed=0, queue="q")
        add_items(store, "q", fill(store, 3))
        with pytest.raises(InputError, match="zoe be among them, got ada"):
            annotate_queue(store, run_id="r", seed=0, queue="q", turned="zoe")
        with pytest.raises(InputError, match="names must differ"):
            annotate_queue(store, run_id="r", seed=0, queue="q", crew=[{"name": "a"}, {"name": "a"}])
        with pytest.raises(MissingError, match="made no comparisons"):
            enqueue_batches(store, run_id="r", seed=0, comparisons_run="none")


@given(
    topics=st.lists(st.sampled_from(["a", "b", "c", "d", "e", None]), min_size=30, max_size=200),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0.1, 0.9),
)
@settings(max_examples=60, deadline=None)
def test_batches_part_everything_once(topics: list[str | None], seed: int, share: float) -> None:
    if len(set(topics)) < 3:
        return
    first, second = shifted_batches(topics, seed, share)
    assert sorted(first + second) == list(range(len(topics)))
    assert (first, second) == shifted_batches(topics, seed, share)
    assert len(second) <= round(len(topics) * share)


@pytest.mark.parametrize("seed", range(8))
def test_two_topics_dominate_the_second_batch(seed: int) -> None:
    topics = [t for t in "abcdef" for _ in range(25)]
    first, second = shifted_batches(topics, seed)
    assert (len(first), len(second)) == (100, 50)
    late, early = Counter(topics[i] for i in second), Counter(topics[i] for i in first)
    heavy = [topic for topic, _ in late.most_common(2)]
    assert sum(late[t] for t in heavy) == 40
    assert sum(early[t] for t in heavy) == 10


def test_batches_go_into_two_queues_of_their_own() -> None:
    with connect(":memory:") as store:
        fill(store, 60)
        found = run_once(store, enqueue_batches, seed=0, comparisons_run="pairs", overlap=1).figures
        again = run_once(store, enqueue_batches, seed=0, comparisons_run="pairs", overlap=1, fresh=True).figures
        assert found["items"] == 60
        assert not set(found["queues"]) & set(again["queues"])
        late, early = (found["share_of_topics"][queue] for queue in found["queues"][::-1])
        assert late > 0.6 > 0.3 > early
        named = enqueue_batches(store, run_id="x", seed=0, comparisons_run="pairs", queues=["one", "two"])
        assert named["queues"] == ["one", "two"]


def test_nothing_changes_inside_a_batch() -> None:
    """The two topics are spread over the first batch, or its end would look like a shift."""
    topics = [t for t in "abcdef" for _ in range(25)]
    places = []
    for seed in range(200):
        first, second = shifted_batches(topics, seed)
        heavy = {topic for topic, _ in Counter(topics[i] for i in second).most_common(2)}
        places += [place for place, i in enumerate(first) if topics[i] in heavy]
    assert 46 < sum(places) / len(places) < 53
