"""Queues that are paused and annotators that are suspended: asked for in any process, honoured in all."""

from pathlib import Path

import pytest

from rlhf_workbench.apps.annotate import LabelSession, session_html
from rlhf_workbench.collect.queue import add_items, next_task, submit
from rlhf_workbench.collect.standing import open_queue, pause_queue, suspend_annotator
from rlhf_workbench.core.errors import StateError
from rlhf_workbench.core.schema import AnnotatorState, Comparison, Generation, Prompt, QueueState, Record, RunEnd
from rlhf_workbench.store.tables import Store, connect


def fill(store: Store, n: int, gold: int, queue: str = "q") -> list[str]:
    """A queue whose first `gold` comparisons have the known answer `first`."""
    rows: list[Record] = []
    pairs = []
    for i in range(n):
        prompt = Prompt(text=f"{queue} {i}")
        one, two = (Generation(prompt_id=prompt.id, text=f"{word} {i}") for word in ("one", "two"))
        pairs.append(Comparison(prompt_id=prompt.id, first_id=one.id, second_id=two.id))
        rows += [prompt, one, two, pairs[-1]]
    store.append(rows)
    known = {pair.id: "first" for pair in pairs[:gold]}
    add_items(store, queue, [pair.id for pair in pairs], gold=known)  # type: ignore[arg-type]
    return [pair.id for pair in pairs]


def answer(store: Store, who: str, is_right: bool, queue: str = "q") -> str:
    """Take the next task and answer it; the comparison."""
    task = next_task(store, queue, who)
    assert task
    submit(store, task.lease_id, "left" if is_right != task.is_swapped else "right")
    return task.comparison_id


def test_a_paused_queue_gives_nothing_takes_what_was_done_and_goes_on(tmp_path: Path) -> None:
    with connect(tmp_path / "s.duckdb") as store, connect(tmp_path / "s.duckdb") as other:
        fill(store, 3, 0)
        fill(store, 1, 0, "other")
        task = next_task(store, "q", "ada")
        assert task
        pause_queue(other, "q", "the guideline changes")
        with pytest.raises(StateError, match="is paused: the guideline changes"):
            next_task(store, "q", "ada")
        assert next_task(store, "other", "ada")
        submit(store, task.lease_id, "left")
        open_queue(store, "q", "it is out")
        assert next_task(other, "q", "ada")
        assert len(store.records(QueueState)) == 1


def test_who_is_suspended_gets_gold_items_until_enough_are_right() -> None:
    with connect(":memory:") as store:
        pairs = fill(store, 9, 6)
        for _ in range(6):
            answer(store, "ben", True)  # takes the places of all gold items
        ordinary = next_task(store, "q", "ada")
        assert ordinary
        assert ordinary.comparison_id in pairs[6:]
        state = suspend_annotator(store, "ada", "5 of 12 were right", accuracy=0.75, gold_items=4)
        seen = [answer(store, "ada", is_right) for is_right in (False, False, True, True)]
        assert seen == pairs[:4]
        assert store.records(AnnotatorState)[0].status == "suspended", "2 of 4"
        assert answer(store, "ada", True) == pairs[4]
        (now,) = store.records(AnnotatorState)
        assert (now.status, now.reason, now.replaces) == ("qualified", "3 of 4 gold items were right", state.id)
        assert store.records(RunEnd, run_id=state.run_id)[0].figures["accuracy"] == 0.75
        again = next_task(store, "q", "ada")
        assert again
        assert again.lease_id == ordinary.lease_id, "the work that was held comes back"


def test_what_was_answered_before_does_not_qualify_and_an_end_of_gold_is_said() -> None:
    with connect(":memory:") as store:
        fill(store, 4, 2)
        for _ in range(2):
            answer(store, "ada", True)
        suspend_annotator(store, "ada", "too quick", queue="q", accuracy=0.5, gold_items=1)
        with pytest.raises(StateError, match=r"ada is suspended: too quick; no gold item is left in queue 'q'"):
            next_task(store, "q", "ada")
        assert next_task(store, "q", "ben")
        fill(store, 1, 0, "other")
        assert next_task(store, "other", "ada"), "in this queue only"


def test_a_suspension_is_found_by_a_process_that_comes_later(tmp_path: Path) -> None:
    with connect(tmp_path / "s.duckdb") as store:
        pairs = fill(store, 3, 1)
        suspend_annotator(store, "ada", "why")
        pause_queue(store, "q", "so")
    with connect(tmp_path / "s.duckdb") as store:
        with pytest.raises(StateError, match="is paused: so"):
            next_task(store, "q", "ada")
        open_queue(store, "q", "done")
        task = next_task(store, "q", "ada")
        assert task
        assert task.comparison_id == pairs[0]


def test_the_page_says_why_there_is_no_task() -> None:
    with connect(":memory:") as store:
        fill(store, 3, 1)
        session = LabelSession(store, "q", "ada")
        pause_queue(store, "q", "<b>the guideline</b>")
        session.answer("left")
        page = session_html(session)
        assert "is paused: &lt;b&gt;the guideline&lt;/b&gt;" in page
        assert "Nothing is left" not in page
        with pytest.raises(StateError, match="is paused"):
            session.answer("left")
        open_queue(store, "q", "done")
        assert LabelSession(store, "q", "ada").task
