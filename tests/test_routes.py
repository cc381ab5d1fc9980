"""The routes of queues, decisions, jobs, admin and events, as each role sees them."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'rlhf_workbench[serve]'")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_workbench.collect.queue import add_items
from rlhf_workbench.core.schema import (
    Alert,
    Annotation,
    Comparison,
    Generation,
    Job,
    Lease,
    Model,
    Prompt,
    Proposal,
    Role,
    Token,
    Webhook,
)
from rlhf_workbench.govern.access import make_token
from rlhf_workbench.serve.api import create_app
from rlhf_workbench.serve.callers import Service
from rlhf_workbench.serve.events import Change, Feed, event_lines
from rlhf_workbench.serve.metrics import Meter, Metered
from rlhf_workbench.serve.worker import Worker
from rlhf_workbench.store.tables import Store, connect

Program = Callable[..., TestClient]  # name, role, scopes → the service as this program sees it


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with connect(tmp_path / "pilot.duckdb") as opened:
        yield opened


@pytest.fixture(scope="module")
def service() -> Iterator[FastAPI]:
    """Built once; each test puts its own store in."""
    with connect(":memory:") as safety:
        made = create_app(Service({"safety": safety}))
        made.state.meter = Meter()
        made.add_middleware(Metered, meter=made.state.meter)
        yield made


@pytest.fixture
def app(service: FastAPI, store: Store) -> FastAPI:
    service.state.service.projects["pilot"] = store
    service.state.workers, service.state.is_alone = {"pilot": Worker(store)}, False
    return service


@pytest.fixture
def program(app: FastAPI, store: Store) -> Program:
    def made(name: str, role: Role, scopes: tuple[str, ...] = (), project: str = "pilot") -> TestClient:
        _, secret = make_token(store, name, role, scopes=scopes)
        base = f"http://127.0.0.1:5006/v1/projects/{project}/"
        return TestClient(app, base_url=base, headers={"Authorization": f"Bearer {secret}"})

    return made


def pairs(store: Store, n: int) -> list[str]:
    """n comparisons, the first answer good, the second bad."""
    ids = []
    for i in range(n):
        prompt = Prompt(text=f"question {i}")
        first, second = (Generation(prompt_id=prompt.id, text=t, model=f"secret-{t}") for t in ("good", "bad"))
        pair = Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id)
        store.append([prompt, first, second, pair])
        ids.append(pair.id)
    return ids


# Queues: only oneself, only one's own


def test_an_annotator_sees_the_task_and_nothing_about_it(program: Program, store: Store) -> None:
    (pair,) = pairs(store, 1)
    add_items(store, "q", [pair], overlap=2, gold={pair: "first"})
    store.append(Annotation(comparison_id=pair, annotator_id="ben", label="first", queue="q"))
    answer = program("ada", "annotator").post("queues/q/next")
    assert set(answer.json()) == {"lease_id", "queue", "comparison_id", "prompt", "left", "right", "expires_at"}
    assert {answer.json()["left"], answer.json()["right"]} == {"good", "bad"}
    assert not [word for word in ("secret-", "gold", "ben", "swapped") if word in answer.text]


def test_progress_has_no_names(program: Program, store: Store) -> None:
    add_items(store, "q", pairs(store, 2), overlap=2)
    store.append(Annotation(comparison_id="c", annotator_id="ben", label="first", queue="q"))
    ada = program("ada", "annotator")
    assert ada.get("queues").json() == {"q": {"items": 2, "wanted": 4, "given": 1, "annotators": 1}}
    assert ada.get("queues/q").json() == ada.get("queues").json()["q"]


@pytest.mark.parametrize(
    "path", ["annotations", "leases", "generations", "comparisons", "queue-items", "queue_items", "annotator_scores"]
)
def test_an_annotator_reads_no_table(program: Program, store: Store, path: str) -> None:
    assert program("ada", "annotator").get(path).status_code in (403, 404)


def test_nobody_answers_for_another(program: Program, store: Store) -> None:
    add_items(store, "q", pairs(store, 3), overlap=1)
    ada, eve, rob = program("ada", "annotator"), program("eve", "annotator"), program("rob", "researcher")
    hers = ada.post("queues/q/next").json()["lease_id"]
    said = {"lease_id": hers, "choice": "left"}
    unknown = eve.post("queues/q/answers", json=said | {"lease_id": "nothing"})
    refused = eve.post("queues/q/answers", json=said)
    assert unknown.status_code == refused.status_code == 404
    assert unknown.json()["detail"].replace("nothing", hers) == refused.json()["detail"]  # no hint that it is there
    assert eve.post("queues/q/next", json={"annotator_id": "ada"}).status_code == 403
    assert ada.post("queues/q/answers", json=said | {"annotator_id": "ben"}).status_code == 422
    assert ada.post("queues/other/answers", json=said).status_code == 404
    assert store.records(Annotation) == []
    assert ada.post("queues/q/answers", json=said).status_code == 201
    assert rob.post("queues/q/next", json={"annotator_id": "ada"}).status_code == 200
    assert {lease.annotator_id for lease in store.records(Lease)} == {"ada"}
    assert [(a.annotator_id, a.actor) for a in store.records(Annotation)] == [("ada", "ada")]


def test_a_changed_mind_corrects_and_the_end_is_204(program: Program, store: Store) -> None:
    add_items(store, "q", pairs(store, 1))
    ada = program("ada", "annotator")
    lease = ada.post("queues/q/next").json()["lease_id"]
    for choice in ("left", "tie"):
        assert ada.post("queues/q/answers", json={"lease_id": lease, "choice": choice}).status_code == 201
    assert [a.label for a in store.records(Annotation)] == ["tie"]
    assert ada.post("queues/q/next").status_code == 204
    assert ada.post("queues/nothing/next").status_code == 404


@pytest.mark.parametrize(
    "wrong",
    [
        {"choice": "better"},
        {"strength": 2},
        {"strength": -0.1},
        {"seconds": -1},
        {"reason": "x" * 30_000},
        {"choice": None},
        {"lease_id": 7},
    ],
)
def test_an_answer_that_does_not_fit_is_refused(program: Program, store: Store, wrong: dict[str, Any]) -> None:
    add_items(store, "q", pairs(store, 1))
    ada = program("ada", "annotator")
    said = {"lease_id": ada.post("queues/q/next").json()["lease_id"], "choice": "left"}
    assert ada.post("queues/q/answers", json=said | wrong).status_code == 422
    assert store.records(Annotation) == []


def test_items_must_be_comparisons_that_are_there(program: Program, store: Store) -> None:
    rob, (pair,) = program("rob", "researcher"), pairs(store, 1)
    answer = rob.post("queues/q/items", json={"comparison_ids": [pair, "ghost"]})
    assert (answer.status_code, "ghost" in answer.json()["detail"]) == (404, True)
    assert rob.post("queues/q/items", json={"comparison_ids": [pair], "gold": {"ghost": "tie"}}).status_code == 404
    assert rob.get("queues").json() == {}
    assert rob.post("queues/batch-1/truth/items", json={"comparison_ids": [pair]}).status_code == 201
    assert rob.get("queues/batch-1/truth").json()["items"] == 1


def test_many_annotators_at_once_give_each_place_once(app: FastAPI, program: Program, store: Store) -> None:
    add_items(store, "q", pairs(store, 12), overlap=2)

    def work(browser: TestClient) -> None:
        while (task := browser.post("queues/q/next")).status_code == 200:
            answer = {"lease_id": task.json()["lease_id"], "choice": "left"}
            assert browser.post("queues/q/answers", json=answer).status_code == 201

    browsers = [program(f"a{i}", "annotator") for i in range(4)]
    threads = [threading.Thread(target=work, args=(browser,)) for browser in browsers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = store.records(Annotation)
    assert len(votes) == len({(v.comparison_id, v.annotator_id) for v in votes}) == 24
    assert store.verify().is_intact


# Decisions


def test_a_decision_is_the_signers_whatever_the_body_says(program: Program, store: Store) -> None:
    proposal = Proposal(action="retrain", reason="drift", fingerprint="f")
    store.append(proposal)
    vera, ada, auditor = (program(*who) for who in (("vera", "reviewer"), ("ada", "annotator"), ("otto", "auditor")))
    said = {"verdict": "approved", "reason": "yes"}
    path = f"proposals/{proposal.id}/decision"
    assert [who.post(path, json=said).status_code for who in (ada, auditor)] == [403, 403]
    assert vera.post(path, json=said | {"actor": "ada"}).status_code == 422
    assert vera.post(path, json=said | {"reason": ""}).status_code == 422
    assert vera.post(path, json=said).json()["actor"] == "vera"
    assert vera.post(path, json=said).status_code == 409
    assert vera.get(f"proposals/{proposal.id}/state").json()["decision"]["verdict"] == "approved"
    assert vera.post("proposals/nothing/decision", json=said).status_code == 404


def test_an_alert_is_raised_once_a_cause_and_goes_its_way(program: Program, store: Store) -> None:
    vera = program("vera", "reviewer")
    said = {"severity": "critical", "title": "odd votes", "fingerprint": "f"}
    first, second = (vera.post("alerts/raise", json=said).json()["id"] for _ in range(2))
    assert first == second
    assert [a["id"] for a in vera.get("alerts/open").json()] == [first]
    assert vera.post(f"alerts/{first}/acknowledge").json()["status"] == "acknowledged"
    assert vera.post(f"alerts/{first}/acknowledge").status_code == 409
    assert vera.post(f"alerts/{first}/resolve", json={"reason": ""}).status_code == 422
    assert vera.post(f"alerts/{first}/resolve", json={"reason": "holiday"}).json()["actor"] == "vera"
    assert vera.get("alerts/open").json() == []
    assert [a.actor for a in store.records(Alert)] == ["vera"]


# What was once a plain list comes in pages too


def follow(browser: TestClient, path: str) -> list[list[dict[str, Any]]]:
    """The pages of an array, by the `Link` header."""
    pages: list[list[dict[str, Any]]] = []
    address: str | None = f"{browser.base_url.path}{path}?limit=2"
    while address:
        answer = browser.get(f"http://127.0.0.1:5006{address}")
        pages.append(answer.json())
        link = answer.headers.get("link")
        address = link[1 : link.index(">")] if link else None
    return pages


def test_open_alerts_come_in_pages_the_most_severe_first(program: Program, store: Store) -> None:
    store.append([Alert(severity=s, title=s, text="") for s in ("info", "critical", "warning", "critical", "info")])
    vera = program("vera", "reviewer")
    first = vera.get("alerts/open").json()[0]["id"]
    vera.post(f"alerts/{first}/acknowledge")
    whole = vera.get("alerts/open").json()
    pages = follow(vera, "alerts/open")
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [alert for page in pages for alert in page] == whole
    assert [a["severity"] for a in whole] == ["critical", "critical", "warning", "info", "info"]
    assert [a["status"] for a in whole[:2]] == ["open", "acknowledged"]


def test_waiting_proposals_come_in_pages(program: Program, store: Store) -> None:
    waiting = [Proposal(action="retrain", reason=str(i), fingerprint=str(i)) for i in range(6)]
    store.append(waiting)
    vera = program("vera", "reviewer")
    vera.post(f"proposals/{waiting[1].id}/decision", json={"verdict": "rejected", "reason": "no"})
    pages = follow(vera, "proposals/waiting")
    assert [[p["reason"] for p in page] for page in pages] == [["0", "2"], ["3", "4"], ["5"]]


def test_webhooks_come_in_pages_under_their_lasting_ids(program: Program, store: Store) -> None:
    root = program("root", "admin")
    ids = [root.post("webhooks", json={"url": f"https://hooks.example/{i}"}).json()["webhook"]["id"] for i in range(5)]
    assert root.post(f"webhooks/{ids[0]}/revoke").status_code == 200
    pages = follow(root, "webhooks")
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [hook["id"] for page in pages for hook in page] == ids


# Admin: nobody gives away more than they have


SECRET_WORDS = ("secret_hash", "$argon2", "whsec_")


def test_secrets_are_shown_once(program: Program, store: Store) -> None:
    root = program("root", "admin")
    made = root.post("tokens", json={"name": "n", "role": "service"}).json()
    hook = root.post("webhooks", json={"url": "https://hooks.example/x"}).json()
    turned = root.post(f"webhooks/{hook['webhook']['id']}/rotate").json()
    assert made["secret"].startswith("rlhfw_")
    assert len({hook["secret"], turned["secret"]}) == 2
    shown = "".join(root.get(path).text for path in ("tokens", "webhooks", "members"))
    assert not [word for word in (*SECRET_WORDS, made["secret"]) if word in shown]
    assert "$argon2" not in json.dumps(made)


def test_a_secret_is_not_given_again_to_a_retry(program: Program) -> None:
    root, key = program("root", "admin"), {"Idempotency-Key": "k1"}
    first = root.post("tokens", json={"name": "n", "role": "service"}, headers=key)
    again = root.post("tokens", json={"name": "n", "role": "service"}, headers=key)
    assert (first.status_code, again.status_code) == (201, 409)
    assert "rlhfw_" not in again.text
    assert [t["name"] for t in root.get("tokens").json()["items"]].count("n") == 1


@pytest.mark.parametrize(
    ("scopes", "body", "status"),
    [
        (("token:manage",), {"role": "admin"}, 403),
        (("token:manage",), {"role": "annotator"}, 403),
        (("token:manage",), {"role": "admin", "scopes": ["sql:read"]}, 403),
        (("token:manage", "sql:read"), {"role": "admin", "scopes": ["sql:read"]}, 201),
        ((), {"role": "admin"}, 201),
        ((), {"role": "annotator", "scopes": ["sql:read"]}, 422),
        ((), {"role": "emperor"}, 422),
        ((), {"role": "admin", "lifetime_s": -1}, 422),
        ((), {"role": "admin", "scopes": ["no:such"]}, 422),
    ],
)
def test_a_token_gives_no_more_than_its_own(
    program: Program, scopes: tuple[str, ...], body: dict[str, Any], status: int
) -> None:
    answer = program("root", "admin", scopes).post("tokens", json={"name": "more"} | body)
    assert answer.status_code in (status, 403 if status == 422 else status), answer.text


def test_a_limited_token_lets_nobody_in(program: Program) -> None:
    desk = program("desk", "admin", ("member:manage", "member:read"))
    assert desk.post("members", json={"subject": "eve@example.org", "role": "admin"}).status_code == 403
    assert desk.get("members").json()["items"] == []


@pytest.mark.parametrize("role", ["researcher", "annotator", "reviewer", "auditor", "service"])
@pytest.mark.parametrize("path", ["tokens", "members", "webhooks"])
def test_only_an_admin_administers(program: Program, store: Store, role: Role, path: str) -> None:
    before = store.counts()
    who = program("x", role)
    bodies = {"tokens": {"name": "n", "role": "admin"}, "members": {"subject": "e@x.org", "role": "admin"}}
    assert who.post(path, json=bodies.get(path, {"url": "https://hooks.example/x"})).status_code == 403
    assert [kind.table for kind in (Webhook,) if store.counts().get(kind.table)] == []
    assert store.counts() == before | {"token": before.get("token", 0) + 1}  # only their own


def test_a_revoked_token_is_out_at_once(program: Program, store: Store) -> None:
    root, ada = program("root", "admin"), program("ada", "annotator")
    assert ada.get("queues").status_code == 200
    (token,) = store.records(Token, name="ada")
    assert root.post(f"tokens/{token.id}/revoke").json()["revoked_at"]
    assert ada.get("queues").status_code == 401


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/x", "https://169.254.169.254/", "ftp://x.org", "https://user@x.org/"]
)
def test_webhooks_lead_nowhere_inside(program: Program, store: Store, url: str) -> None:
    assert program("root", "admin").post("webhooks", json={"url": url}).status_code in (403, 422)
    assert store.records(Webhook) == []


# SQL and the audit: no more than the role may read


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM token",
        "SELECT * FROM current_token",
        "SELECT * FROM webhook",
        "SELECT * FROM member",
        "SELECT (SELECT max(secret_hash) FROM token) AS s",
        "WITH x AS (SELECT * FROM token) SELECT * FROM x",
        "WITH token AS (SELECT * FROM token) SELECT * FROM token",
        'SELECT * FROM "token"',
        "SELECT * FROM main.token",
        "SELECT * FROM prompt UNION ALL BY NAME SELECT secret_hash AS text FROM token",
        "FROM token",
        "TABLE token",
        "SELECT * FROM query_table('token')",
        "SELECT * FROM read_text('/etc/passwd')",
        "ATTACH 'x.duckdb'",
        "DELETE FROM prompt",
        "SELECT 1; SELECT 2",
        "SELECT getenv('HOME')",
        "PRAGMA database_list",
        "",
        "SELECT",
    ],
)
def test_sql_shows_no_secrets_and_reaches_nothing_else(program: Program, store: Store, query: str) -> None:
    for path in ("sql", "sql/arrow"):
        answer = program("rob", "researcher").post(path, json={"query": query})
        assert answer.status_code in (403, 422), answer.text
        assert "argon2" not in answer.text
    assert store.counts() == {"token": 2}


def test_sql_has_limits_and_parameters(program: Program, store: Store) -> None:
    store.append([Prompt(text=f"t{i}") for i in range(5)])
    rob = program("rob", "researcher")
    named = {"query": "SELECT text FROM prompt WHERE text = $which", "params": {"which": "t3"}}
    assert rob.post("sql", json=named).json() == {"columns": ["text"], "rows": [["t3"]]}
    assert rob.post("sql", json={"query": "SELECT text FROM prompt", "limit": 4}).status_code == 422
    slow = {"query": "SELECT count(*) FROM range(10000000) a, range(1000000) b", "timeout_s": 0.2}
    assert "longer than 0.2 s" in rob.post("sql", json=slow).json()["detail"]
    assert rob.post("sql", json={"query": "SELECT ?", "params": [1, 2]}).status_code == 422
    assert rob.post("sql", json={"query": "SELECT 'NaN'::DOUBLE AS x"}).json()["rows"] == [[None]]


@pytest.mark.parametrize(("role", "status"), [("auditor", 200), ("admin", 200), ("reviewer", 403), ("annotator", 403)])
def test_who_may_look_over_shoulders(program: Program, role: Role, status: int) -> None:
    who = program("x", role)
    assert [who.get(path).status_code for path in ("audit", "audit/verify", "store")] == [status] * 3


def test_the_audit_is_narrowed_and_paged(program: Program, store: Store) -> None:
    for i in range(7):
        store.as_actor(f"a{i % 2}").append(Prompt(text=str(i)))
    otto = program("otto", "auditor")
    seen, path = [], "audit?who=a1&what=prompt&limit=2"
    while path:
        page = otto.get(path).json()
        seen += [row["seq"] for row in page["items"]]
        path = f"audit?who=a1&what=prompt&limit=2&cursor={page['next']}" if page["next"] else ""
    assert seen == [2, 4, 6]
    assert otto.get("audit?since=2100-01-01T00:00:00Z").json()["items"] == []
    assert otto.get("audit?since=2020-01-01T00:00:00").status_code == 422
    assert otto.get("audit?who=nobody").json() == {"items": [], "next": None}


def test_a_backup_needs_its_right_and_names_no_path(program: Program, store: Store) -> None:
    assert program("rob", "researcher").post("store/backup").status_code == 403
    root = program("root", "admin")
    made = root.post("store/backup").json()
    assert (store.files("backups") / made["folder"] / "manifest.json").is_file()
    assert root.post("store/backup?folder=/tmp").status_code == 422


# Jobs


def test_jobs_are_asked_for_listed_and_cancelled(program: Program, store: Store) -> None:
    rob, otto = program("rob", "researcher"), program("otto", "auditor")
    asked = rob.post("jobs", json={"notebook": "loop", "params": {"size": "fast", "model": "tiny"}})
    assert (asked.status_code, asked.json()["state"]) == (202, "waiting")
    job_id = asked.json()["job"]["id"]
    assert otto.post("jobs", json={"notebook": "loop"}).status_code == 403
    assert otto.post(f"jobs/{job_id}/cancel").status_code == 403
    assert [item["state"] for item in otto.get("jobs").json()["items"]] == ["waiting"]
    assert otto.get(f"jobs/{job_id}/report").status_code == 404
    assert rob.post(f"jobs/{job_id}/cancel").json()["state"] == "cancelled"
    assert rob.post(f"jobs/{job_id}/cancel").status_code == 409
    assert [job.actor for job in store.records(Job)] == ["rob"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"notebook": "rm"}, 404),
        ({"notebook": "../loop"}, 404),
        ({"notebook": "loop", "params": {"store_path": "x"}}, 403),
        ({"notebook": "loop", "params": {"prompts": "/etc/passwd"}}, 403),
        ({"notebook": "loop", "params": {"seed": "1; import os"}}, 422),
        ({"notebook": "loop", "params": {"nothing": 1}}, 422),
        ({"notebook": "loop", "out": "/tmp"}, 422),
    ],
)
def test_a_job_that_may_not_be_is_refused(program: Program, store: Store, body: dict[str, Any], status: int) -> None:
    assert program("rob", "researcher").post("jobs", json=body).status_code == status
    assert store.records(Job) == []


def test_a_report_is_shown_without_rights_and_only_its_own(program: Program, store: Store) -> None:
    from rlhf_workbench.core.schema import JobEnd

    good, odd = Job(notebook="loop"), Job(notebook="loop")
    folder = store.files(f"jobs/{good.id}/1-loop")
    (folder / "loop.html").write_text("<script>alert(1)</script>")
    store.append([good, odd, JobEnd(job_id=good.id, status="done", report=f"{good.id}/1-loop/loop.ipynb")])
    store.append(JobEnd(job_id=odd.id, status="done", report=f"{good.id}/1-loop/loop.ipynb"))
    rob = program("rob", "researcher")
    shown = rob.get(f"jobs/{good.id}/report")
    assert shown.status_code == 200
    assert shown.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert rob.get(f"jobs/{odd.id}/report").status_code == 404


# Events


def lines_of(raw: bytes) -> list[int]:
    return [int(line[4:]) for line in raw.decode().splitlines() if line.startswith("id: ")]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), min_size=1, max_size=4))
def test_a_line_that_breaks_again_and_again_misses_nothing(breaks: list[tuple[int, int]]) -> None:
    """However often a client loses its line while others write, it gets each change once and in order."""

    async def follow() -> None:
        feed = Feed(store)
        await feed.start()
        seen, since = [], 0
        for n_written, n_read in breaks:
            writer = threading.Thread(target=lambda n=n_written: [store.append(Prompt(text="x")) for _ in range(n)])
            writer.start()
            line = feed.changes(since, beat_s=0.05)
            got: list[Change] = []
            async for changes in line:
                got += changes
                if len(got) >= n_read or (not changes and not writer.is_alive()):
                    break
            await line.aclose()  # type: ignore[attr-defined]
            writer.join()
            seen += [change.seq for change in got]
            since = seen[-1] if seen else 0
        async for changes in feed.changes(since, beat_s=0.05):
            if not changes and since >= store.last_change(None):
                break
            seen += [change.seq for change in changes]
            since = seen[-1] if seen else 0
        await feed.close()
        assert seen == list(range(1, store.last_change(None) + 1))

    with connect(":memory:") as store:
        asyncio.run(follow())


def test_only_readable_tables_are_told_and_a_lost_right_ends_the_line() -> None:
    async def follow() -> bytes:
        feed = Feed(store)
        await feed.start()
        rights = [{"prompt"}, {"prompt"}, set()]
        raw = b"".join([raw async for raw in event_lines(feed, lambda: rights.pop(0), since=0, beat_s=0.01)])
        await feed.close()
        return raw

    with connect(":memory:") as store:
        store.append([Prompt(text="a"), Model(name="m", kind="base")])
        raw = asyncio.run(asyncio.wait_for(follow(), 30))
    assert b'"table": "prompt"' in raw
    assert b"model" not in raw
    assert raw.count(b": beat") == 1


def test_a_client_that_takes_nothing_is_cut_off() -> None:
    async def follow() -> tuple[list[int], int]:
        feed = Feed(store, room=50)
        await feed.start()
        line = feed.changes(None, beat_s=5)
        first = asyncio.create_task(anext(line))
        while not feed._listeners:
            await asyncio.sleep(0)
        store.append(Prompt(text="0"))
        got = [change.seq for change in await first]
        for i in range(100):
            await asyncio.to_thread(store.append, Prompt(text=str(i)))
        while feed._listeners:
            await asyncio.sleep(0.01)
        async for changes in line:  # what was put down before the cut, then the end
            got += [change.seq for change in changes]
        await feed.close()
        return got, len(feed._listeners)

    with connect(":memory:") as store:
        got, n = asyncio.run(asyncio.wait_for(follow(), 60))
    assert n == 0
    assert got == list(range(1, len(got) + 1))
    assert len(got) < 101


def test_a_restored_store_does_not_leave_a_client_waiting() -> None:
    async def follow() -> list[int]:
        feed = Feed(store)
        await feed.start()
        line = feed.changes(since=10**6, beat_s=0.05)  # the number of a later past
        first = asyncio.create_task(anext(line))
        while not feed._listeners:
            await asyncio.sleep(0)
        await asyncio.to_thread(store.append, Prompt(text="new"))
        got = [change.seq for change in await first]
        while not got:
            got = [change.seq for change in await anext(line)]
        await feed.close()
        return got

    with connect(":memory:") as store:
        store.append(Prompt(text="old"))
        assert asyncio.run(asyncio.wait_for(follow(), 30)) == [2]


def test_a_service_without_feeds_says_so(program: Program) -> None:
    assert program("rob", "researcher").get("events").status_code == 409
    assert program("ada", "annotator").get("events").status_code == 403
    assert program("rob", "researcher").get("events", headers={"Last-Event-ID": "-1"}).status_code == 422


# Metrics


def test_no_client_makes_up_a_label(app: FastAPI, program: Program, store: Store) -> None:
    rob = program("rob", "researcher")
    for i in range(20):
        rob.get(f"queues/q{i}")
        rob.get(f"http://127.0.0.1:5006/nothing/{i}")
        rob.request(f"X{i}", f"http://127.0.0.1:5006/nothing/{i}")
    page = rob.get("http://127.0.0.1:5006/metrics").text
    assert 'method="GET",route="/v1/projects/{project}/queues/{queue}",status="404"' in page.replace(":path}", "}")
    assert 'method="other",route="other"' in page
    assert not [word for i in range(20) for word in (f'q{i}"', f"nothing/{i}", f'"X{i}"') if word in page]
    assert 'rlhfw_store_rows{project="pilot",table="token"} 1.0' in page
    assert "safety" not in page  # another project's figures are not for this token


@pytest.mark.parametrize(("is_alone", "status"), [(True, 200), (False, 401)])
def test_behind_a_proxy_this_machine_is_nobody_special(app: FastAPI, is_alone: bool, status: int) -> None:
    app.state.is_alone = is_alone
    here = TestClient(app, base_url="http://127.0.0.1:5006", client=("127.0.0.1", 4711))
    assert here.get("/metrics").status_code == status


@pytest.mark.parametrize("kind", ["read_only", "full"])
def test_a_store_that_cannot_be_written_is_not_ready(
    app: FastAPI, store: Store, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from rlhf_workbench.serve import metrics

    stranger = TestClient(app, base_url="http://127.0.0.1:5006")
    assert stranger.get("/readyz").json() == {"status": "ready"}
    if kind == "full":
        monkeypatch.setattr(metrics, "_ROOM", 2**80)
    else:
        monkeypatch.setattr(metrics.os, "access", lambda *_: False)
    assert (stranger.get("/readyz").status_code, stranger.get("/readyz").json()) == (503, {"status": "not ready"})
    app.state.is_alone = True
    here = TestClient(app, base_url="http://127.0.0.1:5006", client=("127.0.0.1", 4711))
    assert "pilot" in here.get("/readyz").json()["problems"]
    assert stranger.get("/healthz").status_code == 200
