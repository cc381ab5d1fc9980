"""A real server on the loopback interface keeps its manners with slow, huge, broken, greedy and repeating clients."""

import contextlib
import json
import logging
import os
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed: pip install 'rlhf_workbench[serve]'")

import httpx
import uvicorn

from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.govern.access import make_token
from rlhf_workbench.serve.api import create_app
from rlhf_workbench.serve.callers import Service
from rlhf_workbench.serve.limits import Limits, RequestIds, patient_protocol
from rlhf_workbench.serve.running import add_parts
from rlhf_workbench.serve.web import Access, caller, routes
from rlhf_workbench.store.tables import Store, connect

pytestmark = pytest.mark.server
LIMITS = Limits(body_bytes=2**20, bulk_bytes=2**22, body_s=0.6, bulk_s=0.6, header_s=0.6, rate=1e6, burst=1e6)
PROMPTS = "/v1/projects/pilot/prompts"


@dataclass
class Running:
    """A server that is up."""

    store: Store
    secret: str
    port: int

    @property
    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.secret}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=30)

    def talk(self, *pieces: bytes) -> bytes:
        """Send raw bytes and read until the server hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as line:
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    line.sendall(piece)
            return b"".join(iter(lambda: line.recv(65536), b""))

    def head(self, path: str, *more: str) -> bytes:
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {self.secret}", *more]
        return "\r\n".join([*lines, "", ""]).encode()


def extra_routes() -> Any:
    """Routes that fail, for what no real route does."""
    router = routes("test")

    @router.get("/broken")
    def broken(access: Annotated[Access, caller("prompt:read")]) -> None:
        """Stumble."""
        raise ZeroDivisionError("the-inner-secret")

    return router


@contextlib.contextmanager
def serving(store: Store, limits: Limits = LIMITS) -> Iterator[Running]:
    """The service on a free port."""
    _, secret = make_token(store, f"rob-{uuid.uuid4().hex[:6]}", "researcher")
    service = Service({"pilot": store}, limits=limits)
    app = create_app(service)
    app.include_router(extra_routes())
    add_parts(app, service)
    config = uvicorn.Config(app, port=0, http=patient_protocol(limits.header_s), lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield Running(store, secret, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with connect(":memory:") as store, serving(store) as found:
        yield found


def count(running: Running) -> int:
    return running.store.counts().get("prompt", 0)


def test_a_body_that_trickles_is_cut_off_and_writes_nothing(running: Running) -> None:
    before = count(running)
    answer = running.talk(running.head(PROMPTS, "Content-Type: application/json", "Content-Length: 50"), b'{"text":')
    assert answer.startswith(b"HTTP/1.1 408"), answer[:200]
    assert b"application/problem+json" in answer
    assert count(running) == before


def test_a_head_that_trickles_is_hung_up_on(running: Running) -> None:
    assert running.talk(b"GET /healthz HTTP/1.1\r\nHost: 127.0") == b""


def test_half_a_request_writes_nothing(running: Running) -> None:
    before = count(running)
    with socket.create_connection(("127.0.0.1", running.port)) as line:
        line.sendall(running.head(PROMPTS, "Content-Type: application/json", "Content-Length: 15") + b'{"text": "a')
    with socket.create_connection(("127.0.0.1", running.port)) as line:
        head = running.head(PROMPTS + "/bulk", "Content-Type: application/x-ndjson", "Transfer-Encoding: chunked")
        line.sendall(head + b'12\r\n{"text": "whole"}\n\r\n')
    with running.client as client:
        assert client.get("/healthz").status_code == 200
    assert count(running) == before


def test_two_announced_gigabytes_are_refused_at_once(running: Running) -> None:
    head = running.head(PROMPTS, "Content-Type: application/json", f"Content-Length: {2 * 2**30}")
    answer = running.talk(head, b"x" * 1000)
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("path", [PROMPTS, PROMPTS + "/bulk"])
def test_an_endless_body_is_cut_off_without_being_kept(running: Running, path: str) -> None:
    form = "application/x-ndjson" if path.endswith("bulk") else "application/json"
    head = running.head(path, f"Content-Type: {form}", "Transfer-Encoding: chunked")
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = running.talk(head, *[piece] * 2000)  # 125 MiB
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB


@contextlib.contextmanager
def program(path: Path, spool: Path) -> Iterator[tuple[int, int]]:
    """`rlhfw serve` with the limits that users have, in a process of its own: its number and its port."""
    command = [sys.executable, "-c", "from rlhf_workbench.cli import main; raise SystemExit(main())", "serve"]
    options = ["--store", str(path), "--port", "0", "--no-open"]
    env = os.environ | {"TMPDIR": str(spool)}
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout
            found = next(match for line in process.stdout if (match := re.search(r"http://[^/]*:(\d+)/", line)))
            yield process.pid, int(found[1])
        finally:
            process.terminate()
            process.wait(30)


def most_memory(pid: int) -> int:
    """The most bytes that a process ever had in memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def stream(port: int, head: bytes, piece: bytes, most: int) -> tuple[int, bytes]:
    """Send pieces without an end until there is an answer; bytes sent, and the answer."""
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as line:
        line.sendall(head)
        with contextlib.suppress(ConnectionError):
            while sent < most and not select.select([line], [], [], 0)[0]:
                line.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += len(piece)
        return sent, b"".join(iter(lambda: line.recv(65536), b""))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_two_gigabytes_that_really_come_are_cut_off_at_the_limit(tmp_path: Path) -> None:
    path, spool = tmp_path / "pilot.duckdb", tmp_path / "spool"
    spool.mkdir()
    with connect(path) as store:
        _, secret = make_token(store, "rob", "researcher")
    row = b'{"text": "%s"}\n' % (b"x" * 1000)
    limits = [
        (PROMPTS, "json", Limits().body_bytes, 'send it in parts, or by the bulk route"'),
        (PROMPTS + "/bulk", "x-ndjson", Limits().bulk_bytes, 'send it in parts"'),
    ]
    with program(path, spool) as (pid, port), connect(path, read_only=True) as store:
        running = Running(store, secret, port)
        with running.client as client:
            assert client.post(PROMPTS, json={"text": "before"}).status_code == 201
        before, memory = store.counts(), most_memory(pid)
        for route, form, limit, advice in limits:
            head = running.head(route, f"Content-Type: application/{form}", "Transfer-Encoding: chunked")
            sent, answer = stream(port, head, row * 64, most=2 * 2**30)
            assert answer.startswith(b"HTTP/1.1 413"), (sent, answer[:200])
            assert f"larger than the {limit // 2**20} MiB that are taken here; {advice}".encode() in answer
            assert limit < sent < limit + 2**26  # what is on its way when the answer comes
            assert most_memory(pid) - memory < Limits().body_bytes + 2**26
            assert (store.counts(), [*spool.glob("*")]) == (before, [])
        with running.client as client:
            assert client.post(PROMPTS, json={"text": "after"}).status_code == 201
        assert store.counts() == before | {"prompt": 2}


def test_the_service_lives_after_all_that(running: Running) -> None:
    with running.client as client:
        assert client.post(PROMPTS, json={"text": "still here"}).status_code == 201


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status"),
    [
        ("GET", "/v1/nothing", {}, b"", 404),
        ("PUT", PROMPTS, {}, b"", 405),
        ("POST", PROMPTS, {"Content-Type": "application/json"}, b'{"text": ', 400),
        ("POST", PROMPTS, {"Content-Type": "application/json"}, b'{"text": "\\ud800"}', 400),
        ("POST", PROMPTS, {"Content-Type": "application/json"}, b"[" * 100_000, 400),
        ("POST", PROMPTS, {"Content-Type": "application/json"}, b'{"text": "a", "metadata": {"x": 1e999}}', 422),
        ("POST", PROMPTS, {"Content-Type": "application/json"}, b'{"text": 1}', 422),
        ("POST", PROMPTS, {"Content-Type": "text/plain"}, b"text", 415),
        ("POST", PROMPTS, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"{}", 415),
        ("POST", PROMPTS + "/bulk", {"Content-Type": "application/json"}, b"{}", 415),
        ("GET", PROMPTS + "/export", {"Accept": "text/html"}, b"", 406),
        ("GET", PROMPTS + "?limit=0", {}, b"", 422),
        ("GET", PROMPTS + "?limit=1001", {}, b"", 422),
        ("GET", PROMPTS + "?topc=x", {}, b"", 422),
        ("GET", PROMPTS + "?cursor=nonsense", {}, b"", 422),
        ("GET", PROMPTS + "/none", {}, b"", 404),
        ("POST", PROMPTS, {"Content-Type": "application/json", "Idempotency-Key": "a b"}, b'{"text": "a"}', 422),
    ],
)
def test_every_error_is_a_problem(
    running: Running, method: str, path: str, headers: dict[str, str], content: bytes, status: int
) -> None:
    before = count(running)
    with running.client as client:
        answer = client.request(method, path, headers=headers, content=content)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert len(answer.json()["detail"]) > 10
    assert count(running) == before


def test_a_slip_of_ours_shows_a_number_and_nothing_else(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rlhf_workbench.serve"), "propagate", True)
    with running.client as client:
        answer = client.get("/v1/projects/pilot/broken")
    assert answer.status_code == 500
    assert "the-inner-secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.json()["incident"] in caplog.text
    assert "the-inner-secret" in caplog.text


def test_numbers_headers_and_a_log_without_secrets(running: Running) -> None:
    handler = logging.Handler()
    lines: list[str] = []
    handler.emit = lambda record: lines.append(f"{record.request} {record.getMessage()}")  # type: ignore[attr-defined, method-assign]
    handler.addFilter(RequestIds())
    log = logging.getLogger("rlhf_workbench.access")
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        with running.client as client:
            own = client.get(f"{PROMPTS}?token=query-secret&limit=3", headers={"X-Request-Id": "my-request-1"})
            made = client.get("/healthz", headers={"X-Request-Id": "bad id!!", "Cookie": "rlhfw_session=cookie-secret"})
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert own.headers["x-request-id"] == "my-request-1"
    assert len(made.headers["x-request-id"]) == 16
    for name in ("x-content-type-options", "referrer-policy", "content-security-policy", "x-frame-options"):
        assert name in own.headers
    text = "\n".join(lines)
    assert "my-request-1" in text
    assert "limit=3" in text
    for secret in ("query-secret", "cookie-secret", running.secret):
        assert secret not in text


def test_greed_is_slowed_down_and_forgiven() -> None:
    limits = Limits(
        rate=1, burst=5, stranger_rate=1, stranger_burst=3
    )  # a second each: slow machines must be greedy too
    with connect(":memory:") as store, serving(store, limits) as running, running.client as client:
        answers = [client.get("/v1/projects/pilot/prompts") for _ in range(20)]
        late = next(answer for answer in answers if answer.status_code == 429)
        assert int(late.headers["retry-after"]) >= 1
        assert late.headers["content-type"] == "application/problem+json"
        guesses = [client.get(PROMPTS, headers={"Authorization": "Bearer guess"}).status_code for _ in range(20)]
        assert {401, 429} == set(guesses)
        statuses = {200, 429}
        while client.get(PROMPTS).status_code != 200:  # others' guesses do not lock out who was right before
            assert {client.get(PROMPTS).status_code} <= statuses


def test_the_same_key_is_answered_the_same_and_another_request_is_not(running: Running) -> None:
    before, key = count(running), {"Idempotency-Key": str(uuid.uuid4())}
    with running.client as client:
        first, again = (client.post(PROMPTS, json={"text": "once"}, headers=key) for _ in range(2))
        other = client.post(PROMPTS, json={"text": "twice"}, headers=key)
        elsewhere = client.post("/v1/projects/pilot/drift-events", json=DRIFT, headers=key)
        failed = client.post(PROMPTS, json={"txt": "wrong"}, headers={"Idempotency-Key": "k-failed"})
        mended = client.post(PROMPTS, json={"text": "right"}, headers={"Idempotency-Key": "k-failed"})
    assert (first.status_code, first.content) == (again.status_code, again.content)
    assert first.headers["location"] == again.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
    assert other.status_code == 422
    assert elsewhere.status_code == 201
    assert [failed.status_code, mended.status_code] == [422, 201]
    assert count(running) == before + 2


DRIFT = {"stream": "s", "detector": "adwin", "index": 1}


def test_twenty_equal_requests_at_once_write_once(running: Running) -> None:
    before, key = count(running), {"Idempotency-Key": str(uuid.uuid4())}

    def send(_: int) -> httpx.Response:
        with running.client as client:
            return client.post(PROMPTS, json={"text": "all at once"}, headers=key)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(send, range(20)))
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.content for answer in answers if answer.status_code == 201}) == 1
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 409)
    assert count(running) == before + 1


def test_bulk_uploads_are_answered_once_too(running: Running) -> None:
    before = count(running)
    headers = {"Idempotency-Key": str(uuid.uuid4()), "Content-Type": "application/x-ndjson"}
    lines = b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(50))
    with running.client as client:
        answers = [client.post(PROMPTS + "/bulk", content=lines, headers=headers) for _ in range(3)]
        other = client.post(PROMPTS + "/bulk", content=lines + b"\n", headers=headers)
    assert {(answer.status_code, answer.content) for answer in answers} == {(201, b'{"written":50}')}
    assert other.status_code == 422
    assert count(running) == before + 50


def test_a_key_outlives_a_restart_and_other_people_have_their_own(tmp_path: Path) -> None:
    path, key = tmp_path / "pilot.duckdb", {"Idempotency-Key": "restart-1"}
    with connect(path) as store, serving(store) as running:
        secret = running.secret
        with running.client as client:
            first = client.post(PROMPTS, json={"text": "kept"}, headers=key)
    with connect(path) as store, serving(store) as running:
        with running.client as client:
            theirs = client.post(PROMPTS, json={"text": "kept"}, headers=key)
            again = client.post(PROMPTS, json={"text": "kept"}, headers={**key, "Authorization": f"Bearer {secret}"})
        assert again.content == first.content
        assert theirs.json()["id"] != first.json()["id"]
        assert len(store.records(Prompt)) == 2
