"""Comparisons travel to Argilla and answers come home, each once; what goes wrong on the way reads as one line."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

pytest.importorskip("argilla", reason="needs the collect extra")

from rlhf_workbench.collect.argilla import (
    argilla_annotations,
    argilla_records,
    argilla_settings,
    pull_annotations,
    push_records,
    store_annotations,
)
from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.schema import Annotation, Comparison, Generation, Prompt, new_id
from rlhf_workbench.store.tables import Store, connect

ADA, BOB = "00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hot?"}]


@pytest.fixture
def store() -> Iterator[Store]:
    with connect(":memory:") as opened:
        first = Prompt(text="Sky?", topic="weather")
        second = Prompt(text="Hot?", messages=TURNS)
        opened.append([first, second])
        for prompt in (first, second):
            pair = [Generation(prompt_id=prompt.id, text=text, model="secret") for text in ("Yes.", "No.")]
            opened.append([*pair, Comparison(prompt_id=prompt.id, first_id=pair[0].id, second_id=pair[1].id)])
        yield opened


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARGILLA_API_URL", "ARGILLA_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_records_and_settings_need_no_server(store: Store, no_server: None) -> None:
    import argilla as rg

    records, settings = argilla_records(store, dataset="default"), argilla_settings(overlap=2)
    pairs = store.records(Comparison)
    assert [r.id for r in records] == [p.id for p in pairs]
    assert records[0].fields == {"prompt": "Sky?", "first": "Yes.", "second": "No."}
    assert records[1].fields["prompt"] == "System: Be brief.\n\nHuman: Hot?"
    assert "secret" not in str([r.to_dict() for r in records])
    assert settings.distribution.min_submitted == 2
    assert {f.name for f in settings.fields} == set(records[0].fields)
    assert rg.Argilla._default_client is None
    settings.validate()


def test_answers_are_read_from_argilla_objects(store: Store) -> None:
    import argilla as rg

    record = argilla_records(store, dataset="default")[0]
    for user, value, status in ((ADA, "second", "submitted"), (BOB, "tie", "draft")):
        record.responses.add(rg.Response("preference", value, user_id=UUID(user), status=status))
    record.responses.add(rg.Response("reason", "shorter", user_id=UUID(ADA), status="submitted"))
    (vote,) = argilla_annotations([record], names={ADA: "ada"}, queue="q", run_id="r")
    assert (vote.annotator_id, vote.label, vote.reason) == ("ada", "second", "shorter")
    assert (vote.queue, vote.run_id) == ("q", "r")
    exported = argilla_annotations([record.to_dict()])  # to_dict forgets which answers are drafts
    assert [(v.annotator_id, v.label) for v in exported] == [(ADA, "second"), (BOB, "tie")]


def response(status: str, value: str | None) -> dict[str, Any]:
    values = None if value is None else {"preference": {"value": value}}
    return {"user_id": ADA, "status": status, "values": values, "updated_at": "2026-11-23T04:28:37.687143"}


@pytest.mark.parametrize(
    ("status", "value", "label"),
    [
        ("submitted", "first", "first"),
        ("submitted", "tie", "tie"),
        ("discarded", "second", "skip"),
        ("discarded", None, "skip"),
        ("draft", "first", None),
        ("submitted", None, None),
    ],
)
def test_answers_are_read_from_the_servers_json(status: str, value: str | None, label: str | None) -> None:
    record = {"id": "theirs", "external_id": "ours", "responses": [response(status, value)]}
    found = argilla_annotations([record])
    assert [a.label for a in found] == ([label] if label else [])
    assert all(a.comparison_id == "ours" and str(a.submitted_at).endswith("+00:00") for a in found)


def test_a_strange_record_is_refused() -> None:
    with pytest.raises(InputError, match="has the label 'left'; needs one of first, second, tie"):
        argilla_annotations([{"external_id": "c", "responses": [response("submitted", "left")]}])
    with pytest.raises(InputError, match="a record needs an id"):
        argilla_annotations([{"responses": []}])
    with pytest.raises(InputError, match="overlap must be at least 1"):
        argilla_settings(overlap=0)


def test_each_answer_is_stored_once_and_a_change_is_a_correction(store: Store) -> None:
    pair = store.records(Comparison)[0]
    queue_vote = Annotation(comparison_id=pair.id, annotator_id="ada", label="first", queue="q")
    store.append(queue_vote)
    vote = Annotation(comparison_id=pair.id, annotator_id="ada", label="first", metadata={"source": "argilla"})
    assert store_annotations(store, [vote]) == 1
    assert store_annotations(store, [replace(vote, id=new_id())]) == 0
    assert store_annotations(store, [replace(vote, id=new_id(), label="tie")]) == 1
    assert store_annotations(store, [replace(vote, id=new_id(), label="tie")]) == 0
    assert [(a.label, a.queue) for a in store.records(Annotation)] == [("first", "q"), ("tie", None)]
    assert store_annotations(store, []) == 0


def test_foreign_answers_are_refused_whole(store: Store) -> None:
    pair = store.records(Comparison)[0]
    votes = [Annotation(comparison_id=i, annotator_id="ada", label="first") for i in (pair.id, "elsewhere")]
    with pytest.raises(MissingError, match="1 answers are about comparisons that this store does not have"):
        store_annotations(store, votes)
    assert store.records(Annotation) == []


def test_without_a_server_the_reason_is_named(store: Store, no_server: None) -> None:
    with pytest.raises(MissingError, match="set ARGILLA_API_URL and ARGILLA_API_KEY"):
        push_records(store, dataset="default")
    with pytest.raises(MissingError, match="there are no comparisons in dataset 'other'"):
        push_records(store, dataset="other")
    for url, words in (("http://127.0.0.1:9", "does not answer"), ("nonsense", "does not answer")):
        with pytest.raises(StateError, match=words):
            pull_annotations(store, dataset="default", api_url=url, api_key="k")


@pytest.mark.server
@pytest.mark.skipif("ARGILLA_API_URL" not in os.environ, reason="needs an Argilla server in ARGILLA_API_URL and _KEY")
def test_a_real_server_takes_records_and_gives_answers(store: Store) -> None:
    import argilla as rg

    name = f"test-{new_id()}"
    assert [push_records(store, dataset="default", name=name) for _ in range(2)] == [2, 2]
    client = rg.Argilla()
    theirs = client.datasets(name=name)
    try:
        records = list(theirs.records)
        assert {r.id for r in records} == {p.id for p in store.records(Comparison)}
        for record, body in zip(records, ({"values": {"preference": {"value": "second"}}}, {}), strict=True):
            status = "submitted" if body else "discarded"
            url = f"/api/v1/records/{record._server_id}/responses"
            client.http_client.post(url, json={**body, "status": status}).raise_for_status()
        assert [pull_annotations(store, dataset="default", name=name) for _ in range(2)] == [2, 0]
        assert {a.label for a in store.records(Annotation)} == {"second", "skip"}
    finally:
        theirs.delete()
