"""The places that a queue gives follow from its rows: always those that the plain definition gives."""

from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_workbench.collect.queue as queue
from rlhf_workbench.collect.places import places_of
from rlhf_workbench.core.errors import InputError, StateError
from rlhf_workbench.core.schema import Annotation, Comparison, Generation, Lease, Prompt, utc_now
from rlhf_workbench.store.tables import Store, connect

# The definition: for each person the first item without an answer or skip of theirs, and with fewer answers and others'
# leases than wanted.
FREE = """
WITH person AS (SELECT unnest($people) AS who),
answers AS (
    SELECT comparison_id, count(DISTINCT annotator_id) FILTER (label <> 'skip') AS n, list(annotator_id) AS whose
    FROM current_annotation WHERE queue = $queue GROUP BY comparison_id),
leased AS (
    SELECT who, comparison_id, count(DISTINCT annotator_id) AS n FROM current_lease, person
    WHERE queue = $queue AND expires_at > $now AND annotator_id <> who
      AND id NOT IN (SELECT lease_id FROM annotation WHERE lease_id IS NOT NULL)
    GROUP BY ALL),
item AS (SELECT *, row_number() OVER (ORDER BY id) AS place FROM current_queue_item WHERE queue = $queue)
SELECT DISTINCT ON (who) who, comparison_id, place
FROM item CROSS JOIN person LEFT JOIN answers USING (comparison_id) LEFT JOIN leased USING (who, comparison_id)
WHERE NOT list_contains(coalesce(whose, []), who) AND coalesce(answers.n, 0) + coalesce(leased.n, 0) < overlap
ORDER BY who, priority DESC, item.id
"""
PEOPLE = ["ada", "ben", "cleo"]
QUEUES = ["q", "r"]
step = st.one_of(
    st.tuples(st.just("items"), st.sampled_from(QUEUES), st.integers(1, 3), st.sampled_from([0.0, 0.0, 2.0])),
    st.tuples(st.just("next"), st.sampled_from(QUEUES), st.sampled_from(PEOPLE), st.sampled_from([5.0, 600.0])),
    st.tuples(st.just("answer"), st.integers(0, 20), st.sampled_from(["left", "tie", "skip"]), st.booleans()),
    st.tuples(st.just("import"), st.integers(0, 20), st.sampled_from(PEOPLE), st.sampled_from(["first", "skip"])),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 6.0, 700.0]), st.none(), st.none()),
    st.tuples(st.just("fail"), st.sampled_from(QUEUES), st.sampled_from(PEOPLE), st.none()),
)


def new_pairs(store: Store, n: int) -> list[str]:
    prompt = Prompt(text="?")
    one, two = Generation(prompt_id=prompt.id, text="1"), Generation(prompt_id=prompt.id, text="2")
    pairs = [Comparison(prompt_id=prompt.id, first_id=one.id, second_id=two.id) for _ in range(n)]
    store.append([prompt, one, two, *pairs])
    return [pair.id for pair in pairs]


def do(store: Store, what: tuple[Any, ...], pairs: list[str]) -> None:
    """One thing that happens to a queue."""
    kind, one, two, three = what
    if kind == "items":
        made = new_pairs(store, two)
        pairs += made
        queue.add_items(store, one, made, overlap=two, priority=three)
    elif kind == "next":
        queue.next_task(store, one, two, lease_s=three)
    elif kind == "answer":
        leases = store.records(Lease)
        if leases:
            with suppress(StateError):
                queue.submit(store, leases[one % len(leases)].id, two)
    elif kind == "import" and pairs:
        store.append(Annotation(comparison_id=pairs[one % len(pairs)], annotator_id=two, label=three, queue="q"))
    elif kind == "fail":
        with suppress(InputError), store.transaction():
            for who in (two, "zoe"):  # the second look sees what the first one wrote
                queue.next_task(store, one, who)
            store.sql("SELECT * FROM nowhere")


def check(store: Store, now: datetime) -> None:
    for name in QUEUES:
        rows = store.sql(FREE, {"queue": name, "people": PEOPLE, "now": now})
        wanted = {who: (pair, place) for who, pair, place in rows.itertuples(index=False)}
        with store.transaction():
            line = places_of(store, now).queues.get(name)
            found = {who: line.first_for(who) if line else None for who in PEOPLE}
        assert {who: (item.comparison_id, item.place) for who, item in found.items() if item} == wanted, name


@settings(max_examples=60, deadline=None)
@given(st.lists(step, min_size=3, max_size=14))
def test_places_are_those_of_the_definition_whatever_happens(steps: list[tuple[Any, ...]]) -> None:
    now, pairs = utc_now(), []
    with connect(":memory:") as store:
        for what in steps:
            now += timedelta(seconds=what[1] if what[0] == "wait" else 0.01)
            with patch.object(queue, "utc_now", return_value=now):
                do(store, what, pairs)
            check(store, now)


def test_what_another_handle_wrote_is_seen(tmp_path: Any) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as one, connect(path) as other:
        queue.add_items(one, "q", new_pairs(one, 2), overlap=1)
        first = queue.next_task(one, "q", "ada")
        second = queue.next_task(other, "q", "ben")
        assert first
        assert second
        assert first.comparison_id != second.comparison_id
        assert queue.next_task(one, "q", "cleo") is None
        queue.submit(other, first.lease_id, "skip")
        third = queue.next_task(one, "q", "cleo")
        assert third
        assert third.comparison_id == first.comparison_id


def test_two_answers_of_one_person_take_one_place() -> None:
    with connect(":memory:") as store:
        (pair,) = new_pairs(store, 1)
        queue.add_items(store, "q", [pair], overlap=2)
        for label in ("first", "tie", "skip"):
            store.append(Annotation(comparison_id=pair, annotator_id="ada", label=label, queue="q"))
            check(store, utc_now())
        task = queue.next_task(store, "q", "ben")
        assert task
        queue.submit(store, task.lease_id, "tie")
        assert queue.next_task(store, "q", "cleo") is None
