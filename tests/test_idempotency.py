"""Whatever changes something, asked twice with one Idempotency-Key, is done once or says why not; the store never hangs."""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed: pip install 'rlhf_workbench[serve]'")

import httpx
import uvicorn

from rlhf_workbench.collect.queue import add_items, next_task
from rlhf_workbench.core.schema import (
    Alert,
    Comparison,
    Consensus,
    Delivery,
    Generation,
    Job,
    Member,
    Prompt,
    Proposal,
    Run,
    Webhook,
)
from rlhf_workbench.govern.access import make_token
from rlhf_workbench.serve.api import create_app
from rlhf_workbench.serve.callers import Service
from rlhf_workbench.serve.limits import Limits
from rlhf_workbench.serve.running import add_parts
from rlhf_workbench.serve.worker import Worker
from rlhf_workbench.store.tables import Store, connect
from rlhf_workbench.store.wire import ALL_CALLS

pytestmark = pytest.mark.server
PATIENCE_S = 10  # a request that hangs is a failure, not a test that never ends
LIMITS = Limits(rate=1e6, burst=1e6, stranger_rate=1e6, stranger_burst=1e6)
SERVICE = Service({"pilot": connect(":memory:")}, limits=LIMITS)
APP = create_app(SERVICE)
add_parts(APP, SERVICE)
SPEC = APP.openapi()
WRITES = [
    pytest.param(path, operation, call, id=f"{operation['operationId']}{'-' + call if call else ''}")
    for path, methods in SPEC["paths"].items()
    for method, operation in methods.items()
    if method != "get"
    for call in (ALL_CALLS if "{call}" in path else [""])
]
NEVER_KEPT = {"create_token", "create_webhook", "rotate_webhook"}  # their answer is a secret


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """In a file, so that it can be backed up; not closed, as a store that hangs would not close."""
    return connect(tmp_path_factory.mktemp("once") / "pilot.duckdb")


@pytest.fixture(scope="module")
def client(store: Store) -> Iterator[httpx.Client]:
    """An admin before the service on a free port."""
    SERVICE.projects["pilot"] = store
    APP.state.workers = {"pilot": Worker(store)}
    _, secret = make_token(store, "root", "admin")
    server = uvicorn.Server(uvicorn.Config(APP, port=0, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    base = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {secret}"}, timeout=PATIENCE_S) as made:
        yield made
    server.should_exit = True
    thread.join(20)


def new_things(store: Store, has_hook: bool) -> dict[str, str]:
    """Something new for each name that stands in an address or a body."""
    prompt = Prompt(text="a?")
    first, second = (Generation(prompt_id=prompt.id, text=text, model="m") for text in "ab")
    pair, spare = (Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id) for _ in range(2))
    hook = Webhook(url="https://hooks.example/rlhf", secret="whsec_" + "A" * 32)
    delivery = Delivery(webhook_id=hook.id, event_id=hook.id, event="alert.created", status="dead")
    member = Member(subject=uuid.uuid4().hex, role="reviewer")
    alert, job = Alert(severity="info", title="t"), Job(notebook="loop")
    run = Run(kind="consensus", key=uuid.uuid4().hex, seed=0)
    agreed = Consensus(
        comparison_id=pair.id, method="m", p_first=1.0, p_second=0.0, label="first", n_votes=3, run_id=run.id
    )
    proposal = Proposal(action="release", reason="r", fingerprint=uuid.uuid4().hex)
    store.append(
        [
            prompt,
            first,
            second,
            pair,
            spare,
            *([hook] if has_hook else []),
            delivery,
            member,
            alert,
            job,
            run,
            agreed,
            proposal,
        ]
    )
    queue = f"q-{uuid.uuid4().hex[:8]}"
    add_items(store, queue, [pair.id], overlap=2)
    task = next_task(store, queue, "somebody", lease_s=600)
    assert task
    ids = {"delivery": delivery, "webhook": hook, "member": member, "alert": alert, "job": job, "proposal": proposal}
    token = make_token(store, uuid.uuid4().hex[:8], "service")[0]
    return {"project": "pilot", "queue": queue, "pair": spare.id, "lease": task.lease_id, "run": run.id} | {
        f"{name}_id": record.id for name, record in (ids | {"token": token}).items()
    }


def body_of(operation: dict[str, Any], things: dict[str, str]) -> tuple[str, bytes]:
    """Type and content of a body that is right."""
    name, content = operation["operationId"], operation.get("requestBody", {}).get("content", {})
    if not content:
        return "", b""
    own: dict[str, dict[str, Any]] = {
        "add_queue_items": {"comparison_ids": [things["pair"]], "overlap": 2},
        "take_task": {"lease_s": 60},
        "give_answer": {"lease_id": things["lease"], "choice": "left"},
        "freeze": {"name": "pilot", "consensus_run": things["run"]},
        "decide_proposal": {"verdict": "rejected", "reason": "r"},
        "raise_one": {"severity": "info", "title": "t"},
        "acknowledge_alert": {"reason": "r"},
        "resolve_alert": {"reason": "r"},
        "ask_for_job": {"notebook": "loop"},
        "ask_sql": {"query": "SELECT count(*) AS n FROM prompt"},
        "ask_sql_for_arrow": {"query": "SELECT repeat('é', 300) AS t, count(*) AS n FROM prompt"},
        "create_token": {"name": uuid.uuid4().hex[:8], "role": "service"},
        "invite_member": {"subject": uuid.uuid4().hex, "role": "reviewer"},
        "create_webhook": {"url": "https://93.184.216.34/rlhf"},
    }
    kind = "application/x-ndjson" if "application/x-ndjson" in content else next(iter(content))
    if name in own:
        return kind, json.dumps(own[name]).encode()
    shown = content[kind]
    example = shown.get("example") or shown["schema"]["examples"][0]
    return kind, example.encode() if isinstance(example, str) else json.dumps(example).encode()


def offers_key(operation: dict[str, Any]) -> bool:
    """Whether the OpenAPI has the header."""
    return "Idempotency-Key" in {parameter["name"] for parameter in operation.get("parameters", [])}


def still_writes(client: httpx.Client) -> None:
    """The store takes a write within a few seconds."""
    answer = client.post("/v1/projects/pilot/prompts", json={"text": "still there?"}, timeout=5)
    assert answer.status_code == 201


@pytest.mark.parametrize(("path", "operation", "call"), WRITES)
def test_every_write_twice_with_the_same_key(
    client: httpx.Client, store: Store, path: str, operation: dict[str, Any], call: str
) -> None:
    things, key = new_things(store, "{webhook" in path or "{delivery" in path) | {"call": call}, str(uuid.uuid4())
    kind, content = body_of(operation, things)
    headers = {"Idempotency-Key": key} | ({"Content-Type": kind} if kind else {})
    first, again = (client.post(path.format(**things), content=content, headers=headers) for _ in range(2))
    assert max(first.status_code, again.status_code) < 500, (first.text, again.text)
    if call:
        assert first.status_code == again.status_code == 400
        assert "takes no Idempotency-Key" in first.json()["detail"]
    else:
        assert first.status_code < 300, first.text
        assert first.content or first.status_code == 204
    if operation["operationId"] in NEVER_KEPT:
        assert again.status_code == 409
    elif offers_key(operation):
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert again.headers.get("content-type") == first.headers.get("content-type")
    still_writes(client)


def test_the_key_is_offered_where_something_is_written_and_nowhere_else() -> None:
    operations = [param.values[1] for param in WRITES]
    silent = {o["operationId"] for o in operations if not offers_key(o) and "x-public" not in o}
    assert silent == {"call_store", "ask_sql", "ask_sql_for_arrow"}


def test_a_question_by_post_is_asked_anew(client: httpx.Client) -> None:
    question, key = {"query": "SELECT count(*) AS n FROM prompt"}, {"Idempotency-Key": str(uuid.uuid4())}
    before = client.post("/v1/projects/pilot/sql", json=question, headers=key).json()["rows"]
    still_writes(client)
    after = client.post("/v1/projects/pilot/sql", json=question, headers=key).json()["rows"]
    assert after[0][0] == before[0][0] + 1


def test_not_ready_while_no_write_gets_its_turn(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()
    with connect(tmp_path / "s.duckdb") as store, contextlib.ExitStack() as at_last:
        from fastapi.testclient import TestClient

        app = create_app(Service({"pilot": store}, limits=LIMITS))
        app.state.is_alone = True
        probe = TestClient(app, base_url="http://127.0.0.1:5006", client=("127.0.0.1", 4711))
        at_last.callback(leave.set)
        assert probe.get("/readyz").status_code == 200

        def hang() -> None:
            with store.transaction():
                inside.set()
                leave.wait(60)

        thread = threading.Thread(target=hang)
        thread.start()
        assert inside.wait(10)
        answer = probe.get("/readyz")
        assert thread.is_alive(), "the answer did not wait for the one that hangs"
        assert answer.status_code == 503
        assert "a write got no turn" in answer.json()["problems"]["pilot"]
        leave.set()
        thread.join(10)
        assert probe.get("/readyz").status_code == 200
