"""The queue never gives more places than wanted, whoever asks, and keeps every answer."""

import threading
from collections import Counter
from datetime import timedelta
from unittest.mock import patch

import pytest

from rlhf_workbench.collect.queue import add_items, next_task, queue_progress, submit
from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.schema import Annotation, Comparison, Generation, Lease, Prompt, Record, utc_now
from rlhf_workbench.store.tables import Store, connect


def fill(store: Store, n: int, overlap: int, queue: str = "q") -> list[str]:
    """A queue of n comparisons."""
    records: list[Record] = []
    pairs = []
    for i in range(n):
        prompt = Prompt(text=f"question {i}")
        one, two = (Generation(prompt_id=prompt.id, text=f"{word} {i}") for word in ("one", "two"))
        pairs.append(Comparison(prompt_id=prompt.id, first_id=one.id, second_id=two.id))
        records += [prompt, one, two, pairs[-1]]
    store.append(records)
    add_items(store, queue, [pair.id for pair in pairs], overlap=overlap)
    return [pair.id for pair in pairs]


def test_fifty_people_at_once_get_no_place_twice() -> None:
    with connect(":memory:") as store:
        pairs = fill(store, n=20, overlap=3)
        errors: list[BaseException] = []

        def work(name: str) -> None:
            try:
                while task := next_task(store, "q", name):
                    submit(store, task.lease_id, "left")
            except BaseException as error:
                errors.append(error)

        people = [threading.Thread(target=work, args=(f"person {i}",)) for i in range(50)]
        for person in people:
            person.start()
        for person in people:
            person.join(timeout=120)
        assert not errors
        answers = store.records(Annotation)
        assert Counter(a.comparison_id for a in answers) == dict.fromkeys(pairs, 3)
        assert len({(a.comparison_id, a.annotator_id) for a in answers}) == 60
        assert store.verify().is_intact


def test_a_lapsed_lease_frees_the_place() -> None:
    with connect(":memory:") as store:
        fill(store, n=1, overlap=1)
        slow = next_task(store, "q", "slow", lease_s=30)
        assert slow
        assert next_task(store, "q", "quick") is None
        later = utc_now() + timedelta(seconds=31)
        with patch("rlhf_workbench.collect.queue.utc_now", return_value=later):
            quick = next_task(store, "q", "quick")
            assert quick
            with pytest.raises(StateError, match="given away"):
                submit(store, slow.lease_id, "left")
            submit(store, quick.lease_id, "right")
        assert [a.annotator_id for a in store.records(Annotation)] == ["quick"]


def test_a_late_answer_is_welcome_while_nobody_took_the_place() -> None:
    with connect(":memory:") as store:
        fill(store, n=1, overlap=1)
        task = next_task(store, "q", "slow", lease_s=30)
        assert task
        with patch("rlhf_workbench.collect.queue.utc_now", return_value=utc_now() + timedelta(hours=1)):
            submit(store, task.lease_id, "left")
        assert len(store.records(Annotation)) == 1


@pytest.mark.parametrize("seed", range(20))
def test_the_label_is_about_the_answers_not_about_the_screen(seed: int) -> None:
    with connect(":memory:") as store:
        fill(store, n=1, overlap=1)
        task = next_task(store, "q", "ada", seed=seed)
        assert task
        assert task.is_swapped == (task.left == "two 0")
        label = submit(store, task.lease_id, "left").label
        assert label == ("second" if task.left == "two 0" else "first")


def test_seeds_draw_both_orders_and_repeat() -> None:
    def orders(seed: int) -> list[bool]:
        with connect(":memory:") as store:
            fill(store, n=30, overlap=1)
            found = []
            while task := next_task(store, "q", "ada", seed=seed):
                submit(store, task.lease_id, "tie")
                found.append(task.is_swapped)
            return found

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)
    assert 5 <= sum(orders(1)) <= 25


def test_a_skip_does_not_count_and_does_not_come_back() -> None:
    with connect(":memory:") as store:
        fill(store, n=1, overlap=1)
        task = next_task(store, "q", "ada")
        assert task
        submit(store, task.lease_id, "skip")
        assert next_task(store, "q", "ada") is None
        assert next_task(store, "q", "bob") is not None
        assert queue_progress(store, "q").given == 0


def test_urgent_items_come_first() -> None:
    with connect(":memory:") as store:
        low = fill(store, n=2, overlap=1)
        pair = store.get(Comparison, low[0])
        urgent = Comparison(prompt_id=pair.prompt_id, first_id=pair.first_id, second_id=pair.second_id)
        store.append(urgent)
        add_items(store, "q", [urgent.id], priority=1.0)
        task = next_task(store, "q", "ada")
        assert task
        assert task.comparison_id == urgent.id


def test_wrong_words_and_unknown_leases() -> None:
    with connect(":memory:") as store:
        fill(store, n=1, overlap=1)
        task = next_task(store, "q", "ada")
        assert task
        with pytest.raises(InputError, match="between 0 and 1"):
            submit(store, task.lease_id, "left", strength=3.0)
        with pytest.raises(MissingError):
            submit(store, "no-lease", "left")
        with pytest.raises(InputError, match="overlap"):
            add_items(store, "other", [task.comparison_id], overlap=0)
        assert store.counts()["lease"] == len(store.records(Lease)) == 1
        assert "annotation" not in store.counts()
