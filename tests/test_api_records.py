"""Records go in and come out of the service unchanged, one by one and by the thousand."""

import io
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed: pip install 'rlhf_workbench[serve]'")

import pyarrow as pa
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.schema import Annotation, Prompt, Record, Token, new_id
from rlhf_workbench.govern.access import make_token
from rlhf_workbench.serve.api import create_app
from rlhf_workbench.serve.bulk import ARROW, LINES
from rlhf_workbench.serve.callers import Service
from rlhf_workbench.serve.limits import Limits
from rlhf_workbench.serve.records import RESOURCES, plural
from rlhf_workbench.serve.shapes import example, shape
from rlhf_workbench.store.tables import Store, connect

ROOT = "/v1/projects/pilot"
PROMPTS = f"{ROOT}/prompts"
SERVICE = Service({"pilot": connect(":memory:"), "copy": connect(":memory:")}, limits=Limits(rate=1e6, burst=1e6))
APP = create_app(SERVICE)
WRITEABLE = [kind for kind in RESOURCES if "post" in APP.openapi()["paths"][f"/v1/projects/{{project}}/{plural(kind)}"]]


def client_of(role: Any, project: str = "pilot", **options: Any) -> TestClient:
    _, secret = make_token(SERVICE.projects[project], f"{role}-{project}", role, **options)
    return TestClient(APP, headers={"Authorization": f"Bearer {secret}"})


ROB, COPY = client_of("researcher"), client_of("researcher", "copy")


@pytest.fixture
def store() -> Iterator[Store]:
    """A project that nobody wrote into."""
    fresh, before = connect(":memory:"), SERVICE.projects["pilot"]
    tokens = before.records(Token)
    fresh.append(tokens)
    SERVICE.projects["pilot"] = fresh
    yield fresh
    SERVICE.projects["pilot"] = before


def stream(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def bulk(client: TestClient, content: bytes, form: str, path: str = PROMPTS) -> Any:
    return client.post(f"{path}/bulk", content=content, headers={"Content-Type": form})


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("kind", WRITEABLE, ids=plural)
def test_what_is_written_is_read_listed_and_exported(kind: type[Record], store: Store) -> None:
    path = f"{ROOT}/{plural(kind)}"
    made = ROB.post(path, json=example(kind))
    assert made.status_code == 201, made.text
    record = made.json()
    assert set(record) == {f.name for f in fields(kind)}
    assert record["actor"] == "researcher-pilot"
    shape(kind).model_validate(record)
    assert ROB.get(made.headers["location"]).json() == record
    assert ROB.get(path).json() == {"items": [record], "next": None}
    assert [json.loads(line) for line in ROB.get(f"{path}/export").content.splitlines()] == [record]
    table = pa.ipc.open_stream(ROB.get(f"{path}/export", headers={"Accept": ARROW}).content).read_all()
    assert table["id"].to_pylist() == [record["id"]]


@pytest.mark.parametrize("form", [ARROW, LINES])
@pytest.mark.parametrize("kind", WRITEABLE, ids=plural)
def test_an_export_is_an_import_elsewhere(kind: type[Record], form: str, store: Store) -> None:
    ROB.post(f"{ROOT}/{plural(kind)}", json=[example(kind) for _ in range(3)])
    out = ROB.get(f"{ROOT}/{plural(kind)}/export", headers={"Accept": form}).content
    target = f"/v1/projects/copy/{plural(kind)}"
    first, again = (bulk(COPY, out, form, target) for _ in range(2))
    assert (first.json(), again.json()) == ({"written": 3}, {"written": 0}), first.text
    assert COPY.get(f"{target}/export", headers={"Accept": form}).content.endswith(out[-200:]) or form == ARROW
    ids = [record.id for record in store.records(kind)]
    assert SERVICE.projects["copy"].records(kind, id=ids) == store.records(kind)


open_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, metadata=st.dictionaries(st.text(max_size=5), open_values, max_size=3))
def test_any_text_and_any_metadata_survive(text: str, metadata: dict[str, Any]) -> None:
    made = ROB.post(PROMPTS, json={"text": text, "metadata": metadata})
    assert made.status_code == 201, made.text
    read = ROB.get(made.headers["location"]).json()
    assert (read["text"], read["metadata"]) == (text, metadata)
    lines = bulk(
        COPY, jsonl({"text": text, "metadata": metadata, "id": read["id"]}), LINES, "/v1/projects/copy/prompts"
    )
    assert lines.status_code == 201, lines.text
    assert SERVICE.projects["copy"].get(Prompt, read["id"]).metadata == metadata


def test_pages_hold_everything_once_while_others_write(store: Store) -> None:
    before = store.append([Prompt(text=str(n)) for n in range(25)])
    seen, cursor = [], None
    while True:
        page = ROB.get(PROMPTS, params={"limit": 4} | ({"cursor": cursor} if cursor else {}))
        seen += [item["id"] for item in page.json()["items"]]
        cursor = page.json()["next"]
        assert ("link" in page.headers) == (cursor is not None)
        if cursor is None:
            break
        assert ROB.get(page.links["next"]["url"]).status_code == 200
        if len(seen) < 40:
            store.append([Prompt(text="late"), Prompt(text="late")])
    assert seen[:25] == before
    assert len(set(seen)) == len(seen) == store.counts()["prompt"]


def test_a_cursor_belongs_to_its_filters(store: Store) -> None:
    store.append([Prompt(text=str(n), topic="a") for n in range(3)])
    cursor = ROB.get(PROMPTS, params={"limit": 1, "topic": "a"}).json()["next"]
    assert ROB.get(PROMPTS, params={"limit": 2, "topic": "a", "cursor": cursor}).status_code == 200
    assert ROB.get(PROMPTS, params={"limit": 1, "topic": "b", "cursor": cursor}).status_code == 422
    assert ROB.get(f"{ROOT}/generations", params={"cursor": cursor}).status_code == 422


def test_lists_are_narrowed_by_any_plain_column(store: Store) -> None:
    votes = [
        Annotation(comparison_id=f"c{n}", annotator_id="ab"[n % 2], label="first", strength=n / 4) for n in range(4)
    ]
    store.append(votes)
    path = f"{ROOT}/annotations"

    def found(**filters: Any) -> list[str]:
        return [item["comparison_id"] for item in ROB.get(path, params=filters).json()["items"]]

    assert found(annotator_id="a") == ["c0", "c2"]
    assert found(annotator_id="b", strength=0.75) == ["c3"]
    assert found(is_swapped="true") == []
    assert found(recorded_at=votes[1].recorded_at.isoformat()) == ["c1"]
    assert found(annotator_id="' OR 1=1 --") == []
    assert ROB.get(f"{ROOT}/ratings", params={"kind": "binary"}).status_code == 200
    assert ROB.get(f"{ROOT}/runs/export", params={"kind": "train"}).content == b""
    assert ROB.get(path, params={"label": "left"}).status_code == 422
    assert ROB.get(path, params={"metadata": "{}"}).status_code == 422


def test_the_same_id_is_the_same_record_or_an_error(store: Store) -> None:
    sent = {"id": new_id(), "text": "a?", "metadata": {"n": 1}}
    statuses = [ROB.post(PROMPTS, json=sent).status_code for _ in range(2)]
    assert statuses == [201, 200]
    assert ROB.post(PROMPTS, json=[sent, {"text": "b?"}]).json()["written"] == 1
    assert ROB.post(PROMPTS, json={**sent, "text": "c?"}).status_code == 409
    assert ROB.post(PROMPTS, json=[{"text": "never"}, {**sent, "text": "c?"}]).status_code == 409
    assert bulk(ROB, jsonl({"text": "never"}, {**sent, "metadata": {}}), LINES).status_code == 409
    assert bulk(ROB, jsonl({"id": "x", "text": "1"}, {"id": "x", "text": "1"}), LINES).status_code == 422
    assert sorted(p.text for p in store.records(Prompt)) == ["a?", "b?"]


def test_a_correction_corrects_what_still_counts(store: Store) -> None:
    first = ROB.post(PROMPTS, json={"text": "a?"}).json()["id"]
    second = ROB.post(PROMPTS, json={"text": "b?", "replaces": first})
    assert second.status_code == 201
    assert ROB.post(PROMPTS, json={"text": "c?", "replaces": first}).status_code == 409
    assert bulk(ROB, jsonl({"text": "c?", "replaces": first}), LINES).status_code == 409
    assert ROB.post(PROMPTS, json={"text": "c?", "replaces": "never-was"}).status_code == 404
    both = [{"text": text, "replaces": second.json()["id"]} for text in "de"]
    assert ROB.post(PROMPTS, json=both).status_code == 422
    assert bulk(ROB, jsonl(*both), LINES).status_code == 422
    assert [item["text"] for item in ROB.get(PROMPTS).json()["items"]] == ["b?"]
    assert ROB.get(f"{PROMPTS}/{first}").json()["text"] == "a?"


def test_only_who_may_import_says_when_and_who(store: Store) -> None:
    old = {"text": "a?", "actor": "zed", "recorded_at": "2020-02-02T00:00:00Z"}
    narrow = client_of("researcher", scopes=["prompt:write", "prompt:read"])
    assert narrow.post(PROMPTS, json={"text": "mine"}).status_code == 201
    for content in (old, {"text": "a?", "actor": "zed"}, {"text": "a?", "recorded_at": old["recorded_at"]}):
        assert narrow.post(PROMPTS, json=content).status_code == 403
        assert bulk(narrow, jsonl(content), LINES).status_code == 403
    made = ROB.post(PROMPTS, json=old).json()
    assert (made["actor"], made["recorded_at"]) == ("zed", "2020-02-02T00:00:00Z")
    assert len(store.records(Prompt)) == 2


def test_wrong_lines_are_named_and_nothing_is_written(store: Store) -> None:
    lines = [{"text": str(n)} for n in range(20_000)]
    lines[7] = {"txt": "x"}
    lines[15_000] = {"text": 1}  # type: ignore[dict-item]
    answer = bulk(ROB, jsonl(*lines), LINES)
    assert answer.status_code == 422
    assert [(error["line"], error["where"]) for error in answer.json()["errors"]] == [(8, "text"), (15_001, "text")]
    assert bulk(ROB, b'{"text": "a"}\nnot json\n', LINES).json()["errors"][0]["line"] == 2
    votes = pa.table({"comparison_id": ["c"] * 3, "annotator_id": ["a", None, "a"], "label": ["first", "tie", "left"]})
    arrow = bulk(ROB, stream(votes), ARROW, f"{ROOT}/annotations")
    assert [(error["line"], error["where"]) for error in arrow.json()["errors"]] == [(2, "annotator_id"), (3, "label")]
    assert not store.counts().keys() & {"prompt", "annotation"}


@pytest.mark.parametrize(
    "table",
    [
        {"txt": ["a"]},
        {"topic": ["a"]},
        {"text": [None]},
        {"text": ["a"], "metadata": ["not json"]},
        {"text": ["a"], "metadata": ['{"comma": 1,}']},
        {"text": ["a"], "metadata": ['{"number": NaN}']},
        {"text": ["a"], "metadata": ['{"number": 1e999}']},
        {"text": ["a"], "metadata": ['{"half": "\\ud800"}']},
        {"text": ["a"], "id": ["../etc/passwd"]},
        {"text": ["a"], "recorded_at": [1.5]},
        {"text": [b"\xff\xfe"]},
        {"text": [{"a": 1}]},
    ],
    ids=str,
)
def test_arrow_that_does_not_fit_is_refused(table: dict[str, Any], store: Store) -> None:
    answer = bulk(ROB, stream(pa.table(table)), ARROW)
    assert answer.status_code == 422, answer.text
    assert "prompt" not in store.counts()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_arrow_is_refused_or_harmless(data: st.DataObject) -> None:
    whole = bytearray(stream(pa.table({"text": ["a", "b"], "topic": ["x", None]})))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    assert bulk(ROB, bytes(whole[: data.draw(st.integers(0, len(whole)))]), ARROW).status_code in (201, 422)


def test_a_hundred_thousand_rows_go_in_and_out(store: Store) -> None:
    n = 100_000
    table = pa.table({"text": [f"prompt {k}" for k in range(n)], "metadata": [f'{{"k": {k}}}' for k in range(n)]})
    assert bulk(ROB, stream(table), ARROW).json() == {"written": n}
    back = pa.ipc.open_stream(ROB.get(f"{PROMPTS}/export", headers={"Accept": ARROW}).content).read_all()
    assert back.select(["text", "metadata"]).equals(table)
    assert store.verify().is_intact


def test_what_has_its_own_routes_is_not_written_here() -> None:
    paths = APP.openapi()["paths"]
    for name in ("leases", "runs", "run-ends", "job-ends", "snapshots", "preferences", "decisions", "alerts"):
        assert "post" not in paths[f"/v1/projects/{{project}}/{name}"]
    for name in ("tokens", "webhooks", "members", "jobs"):
        assert f"/v1/projects/{{project}}/{name}/export" not in paths
        assert f"/v1/projects/{{project}}/{name}/bulk" not in paths


def test_every_operation_documents_itself() -> None:
    for methods in APP.openapi()["paths"].values():
        for method, operation in methods.items():
            assert operation["summary"]
            assert operation["description"]
            assert operation["tags"]
            needed = {"422", "429", "500"} | ({"401", "403", "404"} if "x-permission" in operation else set())
            needed |= {"400", "408", "409", "413", "415"} if method != "get" else set()
            assert needed <= set(operation["responses"]), operation["operationId"]
