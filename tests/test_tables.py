"""Import of tables: what is complained about and where, what is decided, and real data."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf_workbench.collect.tables import check_mapping, import_tables, read_mapping, tables_hash
from rlhf_workbench.core.errors import InputError, MissingError, StateError, WorkbenchError
from rlhf_workbench.core.schema import Annotation, Comparison, Generation, Prompt
from rlhf_workbench.store.registry import run_once
from rlhf_workbench.store.tables import Store, connect

DATA = Path(__file__).parents[2] / "shared" / "data" / "preferences"
UKP = Path(__file__).parents[1] / "nbs" / "tutorials" / "ukpconvarg1.yaml"

PAIRS = [
    {"id": "p1", "prompt": "Q1", "first": "a", "second": "b", "topic": "t", "gold": "first", "split": "test"},
    {"id": "p2", "prompt": "Q1", "first": "b", "second": "c", "topic": "t", "gold": None, "split": "train"},
    {"id": "p3", "prompt": "Q2", "first": "a", "second": "b", "topic": None, "gold": "tie", "split": "train"},
]
VOTES = [
    {"comparison": "p1", "annotator": "ann", "label": "first", "at": "2026-01-01T10:00:00", "s": 3, "why": "short"},
    {"comparison": "p2", "annotator": "bob", "label": "tie", "at": "2026-01-01T09:00:00Z", "s": 2.5, "why": ""},
    {
        "comparison": "p3",
        "annotator": "ann",
        "label": "skip",
        "at": "2026-01-01T12:00:00+01:00",
        "s": None,
        "why": None,
    },
]
FULL = {"topic": "topic", "gold": "gold", "split": "split", "submitted_at": "at", "seconds": "s", "reason": "why"}


def write(folder: Path, name: str, rows: list[Any]) -> str:
    path = folder / name
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
    elif name.endswith(".csv"):
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(store: Store, folder: Path, pairs: list[Any], votes: list[Any], kind: str = "jsonl", **kwargs: Any) -> Any:
    files = {"data": write(folder, f"pairs.{kind}", pairs), "votes": write(folder, f"votes.{kind}", votes)}
    return import_tables(store, run_id="run-000001", seed=0, **files, **{"mapping": FULL, **kwargs})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_records(kind: str, tmp_path: Path) -> None:
    with connect(":memory:") as store:
        figures = load(store, tmp_path, PAIRS, VOTES, kind, dataset="d")
        pairs = {c.metadata["source_id"]: c for c in store.records(Comparison)}
        texts = {g.id: g.text for g in store.records(Generation)}
        prompts = {p.id: (p.text, p.topic) for p in store.records(Prompt)}
        votes = store.records(Annotation, queue="d")
        gold = store.records(Annotation, queue="d/truth")
    assert next(iter(figures)) == "votes"
    assert (figures["votes"], figures["comparisons"], figures["gold"], figures["annotators"]) == (3, 3, 2, 2)
    shown = {k: (prompts[c.prompt_id], texts[c.first_id], texts[c.second_id]) for k, c in pairs.items()}
    assert shown == {"p1": (("Q1", "t"), "a", "b"), "p2": (("Q1", "t"), "b", "c"), "p3": (("Q2", None), "a", "b")}
    assert pairs["p1"].second_id == pairs["p2"].first_id, "an answer that stands in two pairs is one record"
    assert len(texts) == 5
    assert pairs["p1"].metadata == {"source_id": "p1", "split": "test"}
    found = [(v.annotator_id, v.label, v.submitted_at and v.submitted_at.hour, v.seconds, v.reason) for v in votes]
    assert found == [("bob", "tie", 9, 2.5, None), ("ann", "first", 10, 3.0, "short"), ("ann", "skip", 11, None, None)]
    assert {(g.comparison_id, g.label, g.annotator_id) for g in gold} == {
        (pairs["p1"].id, "first", "gold"),
        (pairs["p3"].id, "tie", "gold"),
    }


def changed(rows: list[dict[str, Any]], place: int, **cells: Any) -> list[dict[str, Any]]:
    return [row | cells if i == place else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("pairs", "votes", "mapping", "message"),
    [
        (PAIRS, VOTES, {"first": "answer_a"}, "pairs.jsonl line 1: 'answer_a' is missing; the columns are id, prompt"),
        (PAIRS, VOTES, {"value": "vote"}, "votes.jsonl line 1: 'vote' is missing; the columns are comparison"),
        (PAIRS, VOTES, {"prompt": "{title}: {prompt}"}, "pairs.jsonl line 1: 'title' is missing"),
        (changed(PAIRS, 2, id="p1"), VOTES, {}, "pairs.jsonl line 3: 'id' p1 stands in an earlier row"),
        (changed(PAIRS, 1, second=""), VOTES, {}, "pairs.jsonl line 2: 'second' is empty"),
        (changed(PAIRS, 1, prompt=7), VOTES, {}, "pairs.jsonl line 2: 'prompt' must be text, got a number"),
        (changed(PAIRS, 1, gold="left"), VOTES, {}, "pairs.jsonl line 2: 'gold' is 'left', which has no meaning"),
        (changed(PAIRS, 0, first="a\0"), VOTES, {}, "pairs.jsonl line 1: 'first' contains a NUL"),
        ([], VOTES, {}, "pairs.jsonl has no rows; a table of comparisons is needed"),
        (PAIRS, [], {}, "votes.jsonl has no rows"),
        ([*PAIRS, [1]], VOTES, {}, "pairs.jsonl line 4: needs an object with named values, got a list"),
        (PAIRS, changed(VOTES, 1, label="both"), {}, "votes.jsonl line 2: 'label' is 'both', which has no meaning"),
        (PAIRS, changed(VOTES, 1, label=None), {}, "votes.jsonl line 2: 'label' is None, which has no meaning"),
        (PAIRS, changed(VOTES, 2, comparison="p9"), {}, "votes.jsonl line 3: 'comparison' is 'p9', and no comparison"),
        (PAIRS, changed(VOTES, 2, annotator=""), {}, "votes.jsonl line 3: 'annotator' is empty"),
        (PAIRS, changed(VOTES, 0, at="yesterday"), {}, "votes.jsonl line 1: 'at' is 'yesterday'; a time such as"),
        (PAIRS, changed(VOTES, 0, at=1700000000), {}, "votes.jsonl line 1: 'at' is 1700000000; a time such as"),
        (PAIRS, changed(VOTES, 0, s=-1), {}, "votes.jsonl line 1: 's' is '-1'; a number of seconds"),
        (PAIRS, changed(VOTES, 0, s="long"), {}, "votes.jsonl line 1: 's' is 'long'; a number of seconds"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_imported(
    pairs: list[Any], votes: list[Any], mapping: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with connect(":memory:") as store:
        with pytest.raises(InputError) as caught:
            load(store, tmp_path, pairs, votes, mapping=FULL | mapping)
        assert message in str(caught.value)
        assert store.counts() == {}


def test_the_later_vote_of_a_person_counts(tmp_path: Path) -> None:
    again = [
        VOTES[0] | {"label": "second", "at": "2026-01-01T08:00:00"},
        VOTES[0] | {"label": "tie", "at": "2026-02-01"},
    ]
    with connect(":memory:") as store:
        figures = load(store, tmp_path, PAIRS, [again[1], *VOTES, again[0]])
        kept = store.records(Annotation, queue="human", annotator_id="ann")
        assert store.counts()["annotation"] == 5 + 2
    assert figures["corrected"] == 2
    assert sorted(v.label for v in kept) == ["skip", "tie"]


def test_without_times_the_order_of_the_file_counts(tmp_path: Path) -> None:
    votes = [{"comparison": "p1", "annotator": "a", "label": word} for word in ("first", "second")]
    with connect(":memory:") as store:
        figures = load(store, tmp_path, PAIRS, votes, mapping={})
        assert [v.label for v in store.records(Annotation)] == ["second"]
    assert (figures["first_vote"], figures["truth_queue"], figures["gold"]) == (None, None, 0)


def test_words_and_numbers_are_translated(tmp_path: Path) -> None:
    votes = [{"comparison": 1, "annotator": i, "label": word} for i, word in enumerate([1, 0.0, "1"])]
    with connect(":memory:") as store:
        mapping = {"values": {1: "first", 0: "second"}}
        load(store, tmp_path, [PAIRS[0] | {"id": 1.0}], votes, mapping=mapping)
        assert [v.label for v in store.records(Annotation)] == ["first", "second", "first"]
    with connect(":memory:") as store:
        votes = [{"comparison": "p1", "annotator": i, "label": word} for i, word in enumerate([1, 0])]
        load(store, tmp_path, PAIRS, votes, "csv", mapping=mapping)
        assert [v.label for v in store.records(Annotation)] == ["first", "second"]


def test_a_conversation_as_prompt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    turns += [{"role": "user", "content": "Why?"}]
    with connect(":memory:") as store:
        load(store, tmp_path, changed(PAIRS, 0, prompt=turns), VOTES)
        prompt = store.records(Prompt)[0]
        assert (prompt.text, prompt.messages) == ("Why?", turns)
        with pytest.raises(InputError, match="line 1: 'prompt' has no user turn"):
            load(store, tmp_path, changed(PAIRS, 0, prompt=turns[1:2]), VOTES)


def test_a_second_import_gets_a_name_of_its_own(tmp_path: Path) -> None:
    with connect(":memory:") as store:
        assert load(store, tmp_path, PAIRS, VOTES)["queue"] == "human"
        assert load(store, tmp_path, PAIRS, VOTES)["queue"] == "human 000001"
        assert len(store.records(Annotation, queue="human")) == 3


def test_a_file_that_changed_since_it_was_hashed_is_refused(tmp_path: Path) -> None:
    files = {"data": write(tmp_path, "p.jsonl", PAIRS), "votes": write(tmp_path, "v.jsonl", VOTES)}
    before = tables_hash(**files)
    write(tmp_path, "v.jsonl", VOTES[:2])
    with connect(":memory:") as store:
        with pytest.raises(StateError, match="changed after its hash was taken"):
            import_tables(store, run_id="r", seed=0, mapping=FULL, data_hash=before, **files)
        first = run_once(store, import_tables, seed=0, mapping=FULL, data_hash=tables_hash(**files), **files)
        again = run_once(store, import_tables, seed=0, mapping=FULL, data_hash=tables_hash(**files), **files)
        assert first.id == again.id
        assert store.counts()["comparison"] == 3


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("first: [a", {}, "is not YAML"),
        ("- first", {}, "must hold lines such as"),
        ("frist: a", {}, "'frist' is no key of a mapping"),
        ("first: 3", {}, "first must be the name of a column, got 3"),
        ("values: {a: left}", {}, "values must say for each word"),
        ("first: a", {"last": "b"}, "'last' is no key of a mapping"),
    ],
)
def test_a_bad_mapping_is_explained(text: str, columns: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_mapping(path, columns)


def test_columns_go_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("first: a\nvalues: {x: first, y: second}", encoding="utf-8")
    found = read_mapping(path, {"first": "b", "values.z": "tie"})
    assert (found["first"], found["values"]) == ("b", {"x": "first", "y": "second", "z": "tie"})
    assert read_mapping() == read_mapping("", {})
    assert check_mapping(found).second == "second"
    with pytest.raises(MissingError, match="there is no file"):
        read_mapping(tmp_path / "absent.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfeid", b'{"id": 1', b"\x93NUMPY"])
def test_a_damaged_file_is_a_plain_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(content)
    votes = write(tmp_path, "votes.jsonl", VOTES)
    with connect(":memory:") as store, pytest.raises(WorkbenchError, match=r"pairs\.jsonl line 1"):
        import_tables(store, run_id="r", seed=0, data=str(tmp_path / "pairs.jsonl"), votes=votes)


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
@pytest.mark.timeout(90)  # about 4 s on two idle cores
def test_real_votes_come_in_within_seconds() -> None:
    files = {
        name: str(DATA / f"ukpconvarg1_{table}.parquet") for name, table in (("data", "pairs"), ("votes", "votes"))
    }
    with connect(":memory:") as store:
        figures = import_tables(store, run_id="r", seed=0, mapping=read_mapping(UKP), dataset="ukp", **files)
        votes, pairs = store.frame(Annotation, queue="ukp"), store.records(Comparison)
        assert store.verify().is_intact
    assert (figures["votes"], figures["comparisons"], figures["annotators"]) == (53_630, 10_749, 3_687)
    assert (figures["gold"], figures["corrected"]) == (10_237, 0)
    assert sum(c.metadata["split"] == "test" for c in pairs) == 1_711
    assert votes["label"].value_counts().to_dict() == {"first": 20_862, "second": 20_791, "tie": 11_977}
    assert votes["submitted_at"].is_monotonic_increasing
    assert votes["reason"].notna().mean() > 0.99
