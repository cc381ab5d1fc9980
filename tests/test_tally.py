"""Counts that go on from where they stopped are the counts from the start."""

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.errors import InputError
from rlhf_workbench.core.schema import RECORDS, Annotation, Delivery, DriftEvent, Model, Prompt, QueueItem, new_id
from rlhf_workbench.store.tables import Store, connect
from rlhf_workbench.store.tally import tally

BY = ("queue", "annotator_id", "label")


def counted(store: Store) -> dict[Any, int]:
    """By head: every row that no row replaces."""
    rows = store.sql("SELECT * FROM annotation", limit=None).to_dict("records")
    hidden = {row["replaces"] for row in rows}
    return Counter(tuple(row[name] for name in BY) for row in rows if row["id"] not in hidden)


def vote(name: str = "ada", **values: Any) -> Annotation:
    return Annotation(**{"comparison_id": "c", "annotator_id": name, "label": "first"} | values)


IDS = st.integers(0, 9).map(lambda n: f"{n:08d}-row")
ROWS = st.tuples(
    IDS,
    st.none() | IDS,
    st.sampled_from(["ada", "ben"]),
    st.sampled_from(["first", "tie"]),
    st.sampled_from([None, "q"]),
)


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.lists(ROWS, min_size=1, max_size=4), max_size=6), looks=st.integers(0, 63))
def test_going_on_is_the_same_as_counting_anew(changes: list[list[Any]], looks: int) -> None:
    """Also when a row is replaced twice, before it is there, in its own change, or by itself."""
    used: set[str] = set()
    with connect(":memory:") as store:
        for place, change in enumerate(changes):
            rows = {row[0]: row for row in change if row[0] not in used}
            used |= rows.keys()
            if rows:
                store.append(
                    [
                        vote(who, id=key, replaces=gone, label=label, queue=queue)
                        for key, gone, who, label, queue in rows.values()
                    ]
                )
            if looks >> place & 1:
                assert tally(store, {Annotation: BY})[Annotation] == counted(store)
        assert tally(store, {Annotation: BY})[Annotation] == counted(store)
        assert tally(store, {Annotation: ()})[Annotation].get((), 0) == sum(counted(store).values())


def test_what_was_undone_is_not_counted() -> None:
    class Regret(Exception):
        pass

    with connect(":memory:") as store:
        store.append([vote(), vote("ben")])
        tally(store, {Annotation: BY})
        for keep in range(3):  # later changes get the numbers of those undone
            with pytest.raises(Regret), store.transaction():
                store.append([vote("cleo"), vote("dan", queue="q")])
                assert sum(tally(store, {Annotation: BY})[Annotation].values()) == 4 + keep
                raise Regret
            store.append(vote("eve", queue=f"q{keep}"))
            assert tally(store, {Annotation: BY})[Annotation] == counted(store)


def test_tables_are_counted_apart_and_up_to_different_changes() -> None:
    with connect(":memory:") as store:
        items = [QueueItem(queue="q", comparison_id=f"c{i}", overlap=i % 2 + 1) for i in range(3)]
        store.append([Prompt(text="a", topic="x"), Prompt(text="b"), *items])
        assert tally(store, {Prompt: ["topic"]}) == {Prompt: {("x",): 1, (None,): 1}}
        store.append(replace(items[0], id=new_id(), replaces=items[0].id, overlap=5))
        wanted = {Prompt: ["topic"], QueueItem: ["queue", "overlap"], DriftEvent: ["is_confirmed"], Delivery: []}
        assert tally(store, wanted)[QueueItem] == {("q", 5): 1, ("q", 2): 1, ("q", 1): 1}
        store.append([Prompt(text="c", topic="x"), DriftEvent(stream="s", detector="d", index=0)])
        assert tally(store, wanted) == {
            Prompt: {("x",): 2, (None,): 1},
            QueueItem: {("q", 5): 1, ("q", 2): 1, ("q", 1): 1},
            DriftEvent: {(False,): 1},
            Delivery: {},
        }


def test_an_answer_of_before_stays_as_it_was() -> None:
    with connect(":memory:") as store:
        store.append(vote())
        before = tally(store, {Annotation: BY})[Annotation]
        store.append(vote())
        tally(store, {Annotation: BY})
        assert before == {(None, "ada", "first"): 1}


@pytest.mark.parametrize(("kind", "name"), [(Prompt, "metadata"), (Model, "parents"), (Prompt, 'id" FROM token --')])
def test_only_columns_of_single_values(kind: Any, name: str) -> None:
    with connect(":memory:") as store, pytest.raises(InputError, match="cannot be counted"):
        tally(store, {kind: [name]})


def test_every_table_of_an_empty_store_has_nothing() -> None:
    with connect(":memory:") as store:
        assert tally(store, {kind: () for kind in RECORDS}) == {kind: {} for kind in RECORDS}
        assert tally(store, {}) == {}


def test_a_store_put_back_from_an_earlier_copy_is_counted_anew(tmp_path: Path) -> None:
    """The same open store, whose past is another one all at once."""
    path, other = tmp_path / "s.duckdb", tmp_path / "t.duckdb"
    with connect(path) as store, connect(other) as past:
        store.append([vote(), vote("ben")])
        past.append(vote("zoe"))
        past.append(vote("zoe"))
        tally(store, {Annotation: BY})
        real, store.backend.query = store.backend.query, past.backend.query  # type: ignore[method-assign]
        try:
            assert tally(store, {Annotation: BY})[Annotation] == {(None, "zoe", "first"): 2}
        finally:
            store.backend.query = real  # type: ignore[method-assign]


def test_who_writes_meanwhile_is_counted_once() -> None:
    with connect(":memory:") as store:
        stop = threading.Event()
        seen: list[list[int]] = [[], []]

        def look(mine: list[int]) -> None:
            while not stop.is_set():
                mine.append(sum(tally(store, {Annotation: BY})[Annotation].values()))

        def write(who: str) -> None:
            mine: list[Annotation] = []
            draw = random.Random(who)
            for _ in range(40):
                gone = draw.choice(mine).id if mine and draw.random() < 0.3 else None
                mine.append(vote(who, replaces=gone))
                store.append(mine[-1])

        run_all([partial(look, mine) for mine in seen], [partial(write, who) for who in ("ada", "ben", "cleo")], stop)
        assert tally(store, {Annotation: BY})[Annotation] == counted(store)
        assert all(mine == sorted(mine) for mine in seen)  # a row adds one and hides one at most


def run_all(looking: list[Callable[[], None]], writing: list[Callable[[], None]], stop: threading.Event) -> None:
    """Let some look until all have written."""
    lookers, writers = ([threading.Thread(target=work) for work in works] for works in (looking, writing))
    for thread in (*lookers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in lookers:
        thread.join()
