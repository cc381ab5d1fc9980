"""`rlhfw serve` as a program: link, sign-in, API, events, metrics, and every way to end."""

import asyncio
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

httpx = pytest.importorskip("httpx", reason="needs the extra serve: pip install 'rlhf_workbench[serve]'")
pytest.importorskip("bokeh_fastapi", reason="needs the extra serve: pip install 'rlhf_workbench[serve]'")

import uvicorn
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from rlhf_workbench.cli import main
from rlhf_workbench.commands.serve import Place, _listening, check_place, is_here, project_names, serve
from rlhf_workbench.core.errors import InputError, MissingError
from rlhf_workbench.core.schema import (
    Delivery,
    DriftEvent,
    Firing,
    Job,
    JobEnd,
    Observation,
    Prompt,
    QueueItem,
    QueueState,
    utc_now,
)
from rlhf_workbench.govern.access import make_token
from rlhf_workbench.serve import limits
from rlhf_workbench.serve.running import Server, listen
from rlhf_workbench.store.tables import connect

pytestmark = pytest.mark.server
RLHFW = "from rlhf_workbench.cli import main; raise SystemExit(main())"


@dataclass
class Served:
    """A running service, and somebody signed in."""

    process: "subprocess.Popen[str]"
    url: str
    link: str
    browser: Any  # an httpx.Client

    def post(self, path: str, body: Any) -> Any:
        """As a page of the service sends it."""
        return self.browser.post(path, json=body, headers={"Origin": self.url})


@contextmanager
def served(*stores: Path, options: tuple[str, ...] = ()) -> Iterator[Served]:
    words = [word for store in stores for word in ("--store", str(store))]
    command = [sys.executable, "-c", RLHFW, "serve", *words, "--port", "0", "--no-open", "--json", *options]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    assert process.stdout
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        said = json.loads(line)
        with httpx.Client(base_url=said["url"], timeout=30, verify=False) as browser:
            if said["link"]:
                assert browser.get(said["link"]).status_code == 303
            yield Served(process, said["url"], said["link"], browser)
    finally:
        process.kill()
        process.communicate()


def until(is_true: Callable[[], Any], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def next_event(lines: Iterator[str]) -> dict[str, Any]:
    for line in lines:
        if line.startswith("data: "):
            found: dict[str, Any] = json.loads(line[6:])
            return found
    raise AssertionError("the line ended")


# From the link to the last word


@pytest.mark.slow
def test_a_whole_visit(tmp_path: Path) -> None:
    pilot, safety = tmp_path / "pilot.duckdb", tmp_path / "safety.duckdb"
    with connect(pilot) as store:
        _, token = make_token(store, "rob", "researcher")
    with served(pilot, safety) as service:
        stranger = httpx.Client(base_url=service.url, timeout=30)
        program = httpx.Client(base_url=service.url, timeout=30, headers={"Authorization": f"Bearer {token}"})

        # the link works once, and nobody else gets in
        assert stranger.get(service.link).status_code == 403
        assert stranger.get("/").headers["location"] == "/signin?next=/"
        assert [stranger.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
        assert stranger.get("/v1/projects/pilot/prompts").status_code == 401

        # the pages of both projects, and the API as a page and as a program
        for path in ("/", "/projects/safety"):
            assert "<title>RLHF Workbench</title>" in service.browser.get(path).text
        assert service.browser.get("/v1/projects").json() == {"pilot": "admin", "safety": "admin"}
        assert program.get("/v1/projects").json() == {"pilot": "researcher"}
        assert program.get("/v1/projects/safety/prompts").status_code == 404
        assert "/v1/projects/{project}/prompts" in stranger.get("/docs").text
        assert {path.split("/")[1] for path in stranger.get("/openapi.json").json()["paths"]} <= {
            "v1", "docs", "openapi.json", "healthz", "readyz", "metrics"
        }  # fmt: skip
        said = {"severity": "info", "title": "hello"}
        assert service.browser.post("/v1/projects/pilot/alerts/raise", json=said).status_code == 403  # no origin
        assert service.post("/v1/projects/pilot/alerts/raise", said).status_code == 201

        # another process joins, and the page's line tells of it
        with program.stream("GET", "/v1/projects/pilot/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == ": hello"
            with connect(pilot, actor="notebook") as joined:
                joined.append([Prompt(text="a"), Prompt(text="b")])
            event = next_event(lines)
            assert (event["table"], event["rows"]) == ("prompt", 2)
        with program.stream("GET", "/v1/projects/pilot/events", headers={"Last-Event-ID": "0"}) as stream:
            assert next_event(stream.iter_lines())["table"] == "alert"  # the token before it is not for researchers

        # metrics count all that; a full page for this machine
        page = stranger.get("/metrics").text
        assert 'rlhfw_store_rows{project="pilot",table="prompt"} 2.0' in page
        assert 'project="safety"' in page
        assert 'project="safety"' not in program.get("/metrics", headers={"Via": "proxy"}).text
        assert 'route="/v1/projects/{project}/events",status="200"' in page

        # an orderly end, with lines open
        with program.stream("GET", "/v1/projects/pilot/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == ": hello"
            service.process.send_signal(signal.SIGTERM)
            for _ in lines:
                pass  # the line ends, and is not cut
        out, err = service.process.communicate(timeout=60)
        assert (service.process.returncode, out, err) == (0, "", "")
    with connect(pilot) as store:
        assert store.counts() == {"prompt": 2, "token": 1, "alert": 1}
        assert store.verify().is_intact


MIDWAY = """
import sys
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.store.tables import connect
with connect(sys.argv[1], token=sys.argv[2]) as store, store.transaction():
    store.append(Prompt(text="half"))
    print("midway", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_remote_client_killed_in_a_transaction_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path / "pilot.duckdb"
    with connect(path) as store:
        _, token = make_token(store, "rob", "researcher")
    with served(path) as service:
        client = subprocess.Popen([sys.executable, "-c", MIDWAY, service.url, token], stdin=-1, stdout=-1, text=True)
        assert client.stdout
        assert client.stdout.readline() == "midway\n"
        client.kill()
        client.communicate()
        begin = time.monotonic()
        with connect(service.url, token=token) as store:
            store.append(Prompt(text="whole"))
            assert [p.text for p in store.records(Prompt)] == ["whole"]
        assert time.monotonic() - begin < 25  # less than the silence after which any transaction is given up


def test_behind_a_proxy_a_lost_line_is_no_lost_client(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(limits, "patient_protocol", lambda header_s, is_direct: told.append(is_direct))
    for is_behind in (False, True):
        config = _listening(None, SimpleNamespace(limits=limits.Limits()), Place(is_behind_proxy=is_behind))
        assert config.timeout_keep_alive > 30, "a transaction may be silent for half a minute"
    assert told == [True, False]


def test_libraries_are_left_out_of_collections_while_it_serves() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Is not asked."""

    async def hang_up() -> None:
        """No lines are open."""

    def ready() -> None:
        frozen.append(gc.get_freeze_count())
        server.should_exit = True

    frozen: list[int] = []
    server = Server(uvicorn.Config(app, lifespan="off", log_config=None), SimpleNamespace(hang_up=hang_up), ready)
    asyncio.run(server.serve(sockets=[listen("127.0.0.1", 0)]))
    assert [n > 10_000 for n in (*frozen, gc.get_freeze_count())] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_every_acknowledged_write_is_there_after_the_end(tmp_path: Path, number: int) -> None:
    path = tmp_path / "pilot.duckdb"
    acknowledged = []
    with served(path) as service:
        for i in range(40):
            answer = service.post("/v1/projects/pilot/alerts/raise", {"severity": "info", "title": f"t{i}"})
            assert answer.status_code == 201
            acknowledged.append(answer.json()["id"])
        service.process.send_signal(number)
        service.process.wait(60)
        assert service.process.returncode == (0 if number == signal.SIGINT else -signal.SIGKILL)
    with served(path) as again:  # needs no repair, and the old session is nothing here
        found = again.browser.get("/v1/projects/pilot/alerts/open").json()
        assert [alert["id"] for alert in found] == acknowledged
        assert again.browser.get("/readyz").status_code == 200
    with connect(path) as store:
        assert store.verify().is_intact


def write_until_lost(url: str, secret: str, acknowledged: list[str]) -> None:
    """Post prompts and note those that were acknowledged, until nobody answers."""
    headers = {"Authorization": f"Bearer {secret}"}
    with httpx.Client(base_url=f"{url}/v1/projects/pilot/", headers=headers, timeout=30) as client:
        while True:
            try:
                answer = client.post("prompts", json=[{"text": "x" * 200}, {"text": "y"}])
            except httpx.TransportError:
                return
            assert answer.status_code == 201, answer.text
            acknowledged.extend(answer.json()["ids"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_kills_under_many_writers_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path, draw = tmp_path / "pilot.duckdb", random.Random(5)
    acknowledged: list[str] = []
    with connect(path) as store:
        secret = make_token(store, "rob", "researcher")[1]
    for _ in range(5):
        with served(path) as service, ThreadPoolExecutor(4) as pool:
            before = len(acknowledged)
            writing = [pool.submit(write_until_lost, service.url, secret, acknowledged) for _ in range(4)]
            until(lambda before=before: len(acknowledged) > before + 20)
            time.sleep(draw.uniform(0.0, 0.3))
            service.process.kill()
            service.process.wait(30)
            for one in writing:
                one.result(60)  # no error but the kill
    with connect(path) as store:  # needs no repair
        kept = store.arrow(Prompt)["id"].to_pylist()
        assert store.verify().is_intact
        store.append(Prompt(text="and on it goes"))
    assert len(acknowledged) > 100
    assert not set(acknowledged) - set(kept)
    assert len(set(kept)) == len(kept)
    assert len(kept) % 2 == 0  # both of a request or none


@pytest.mark.slow
def test_a_served_store_is_backed_up_and_brought_back_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder, again = tmp_path / "pilot.duckdb", tmp_path / "monday", tmp_path / "elsewhere" / "again.duckdb"
    again.parent.mkdir()
    with connect(path) as store:
        secret = make_token(store, "rob", "researcher")[1]
    with served(path) as service, ThreadPoolExecutor(1) as pool:
        acknowledged: list[str] = []
        writing = pool.submit(write_until_lost, service.url, secret, acknowledged)
        until(lambda: len(acknowledged) > 20)
        before = list(acknowledged)
        assert main(["store", "backup", str(folder), "--store", str(path), "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert main(["store", "restore", str(folder), "--store", str(again)]) == 0
        assert main(["store", "restore", str(folder), "--store", str(path)]) == 2  # never over one that is there
        with connect(again) as copy:
            kept = copy.arrow(Prompt)["id"].to_pylist()
            assert copy.verify().is_intact
            assert copy.verify().n_changes == made["n_changes"]
            copy.append(Prompt(text="only here"))
        n_then = len(acknowledged)
        until(lambda: len(acknowledged) > n_then)  # the service went on all the while
        service.process.kill()
        writing.result(60)
    assert not set(before) - set(kept)
    with connect(path) as store:
        served_ids = store.arrow(Prompt)["id"].to_pylist()
        assert not set(acknowledged) - set(served_ids)
        assert kept == served_ids[: len(kept)]  # one moment of it
        assert store.verify().is_intact


@pytest.mark.slow
def test_a_job_outlives_its_service(tmp_path: Path) -> None:
    """A job that was running when the service was killed is run again by the next one, and can be cancelled there."""
    path = tmp_path / "pilot.duckdb"
    jobs = "/v1/projects/pilot/jobs"
    with served(path) as service:
        asked = service.post(jobs, {"notebook": "loop", "params": {"size": "fast", "model": "tiny"}}).json()
        job = f"{jobs}/{asked['job']['id']}"
        until(lambda: service.browser.get(job).json()["state"] == "running")
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait(30)
    with served(path) as again:
        until(lambda: again.browser.get(job).json()["state"] == "running")
        assert again.post(f"{job}/cancel", {}).status_code == 202
        until(lambda: again.browser.get(job).json()["state"] == "cancelled")
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(60) == 0
    with connect(path) as store:
        assert [end.status for end in store.records(JobEnd)] == ["cancelled"]
        assert len(store.records(Job)) == 1


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """A certificate that we signed ourselves, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = utc_now()
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    files[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(secret)
    return str(files[0]), str(files[1])


@pytest.mark.slow
def test_with_a_certificate_the_line_is_sealed(tmp_path: Path, certificate: tuple[str, str]) -> None:
    with served(tmp_path / "s.duckdb", options=("--cert", certificate[0], "--key", certificate[1])) as service:
        assert service.url.startswith("https://127.0.0.1:")
        (cookie,) = service.browser.cookies.jar
        assert (cookie.name, cookie.secure) == ("__Host-rlhfw_session", True)
        assert service.browser.get("/v1/projects").json() == {"s": "admin"}
        with pytest.raises(httpx.HTTPError):
            httpx.get(service.url.replace("https", "http"), timeout=10)


# What is in the way, in one line


def failing(*words: str) -> str:
    """What the program says on its way out."""
    command = [sys.executable, "-c", RLHFW, "serve", "--no-open", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    return ended.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = failing("--store", str(tmp_path / "s.duckdb"), "--port", str(port))
    assert f"port {port}: Address already in use" in said
    assert "--port" in said


def test_a_store_that_somebody_has_is_named(tmp_path: Path) -> None:
    with connect(tmp_path / "s.duckdb"):
        said = failing("--store", str(tmp_path / "s.duckdb"), "--port", "0")
    assert f"in use by process {os.getpid()}" in said


@pytest.mark.parametrize(
    ("place", "cure"),
    [
        ({"host": "0.0.0.0"}, "--behind-proxy"),
        ({"host": "192.0.2.7"}, "--cert"),
        ({"host": "::"}, "--cert"),
        ({"host": "rlhf.example"}, "--cert"),
        ({"is_behind_proxy": True}, "--public-url"),
        ({"is_behind_proxy": True, "public_url": "http://rlhf.example"}, "--public-url"),
        ({"cert": Path("c.pem")}, "--key"),
    ],
)
def test_nobody_is_served_in_the_clear(place: dict[str, Any], cure: str) -> None:
    with pytest.raises(InputError, match=cure):
        check_place(Place(**place))


def test_a_certificate_must_be_one(tmp_path: Path, certificate: tuple[str, str]) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    cert, key = map(Path, certificate)
    check_place(Place(cert=cert, key=key))
    for wrong in (Place(cert=tmp_path / "text.pem", key=key), Place(cert=cert, key=tmp_path / "text.pem")):
        with pytest.raises(InputError, match="PEM form"):
            check_place(wrong)


def test_a_certificate_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"c\.pem"):
        check_place(Place(cert=tmp_path / "c.pem", key=tmp_path / "k.pem"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_is_known(host: str) -> None:
    assert is_here(host)


def test_two_stores_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="both project 'a'"):
        project_names([Path("x/a.duckdb"), Path("a.db")])


def test_the_command_says_what_it_takes() -> None:
    text = CliRunner().invoke(serve, ["--help"]).output
    assert {"--store", "--port", "--host", "--behind-proxy", "--public-url", "--json", "--seed"} <= set(text.split())


# Rules beside the service


@pytest.mark.slow
def test_an_event_is_acted_upon_by_itself_and_once(tmp_path: Path) -> None:
    """A paused queue, an alert in the log, and nothing twice after the service was started again."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "channels: [log]\nrules:\n  - {name: r, watch: drift_events, at_least: 1, do: pause_queue, with: {queue: q}}\n"
    )
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        store.append(QueueItem(queue="q", comparison_id="c"))
    for _ in range(2):
        with served(path, options=("--rules", str(rules))), connect(path) as store:
            store.append(DriftEvent(stream="eve", detector="DDM", index=1, is_confirmed=True))
            until(lambda store=store: store.records(QueueState, status="paused"))
            until(lambda store=store: store.records(Delivery, webhook_id="channel.log", status="delivered"))
            assert len(store.records(Firing)) == len(store.records(QueueState)) == len(store.records(Delivery)) == 1


def test_rules_with_a_mistake_are_told_before_anything_is_served(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("rules:\n  - {name: r, wacht: drift_events}\n")
    words = ["--rules", str(tmp_path / "rules.yaml"), "--store", str(tmp_path / "s.duckdb")]
    command = [sys.executable, "-c", RLHFW, "serve", "--no-open", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "line 2: rule 'r': wacht is not known; did you mean 'watch'?" in done.stderr


@pytest.mark.slow
def test_a_change_of_a_posted_stream_becomes_an_alert_by_itself(tmp_path: Path) -> None:
    path, rng = tmp_path / "pilot.duckdb", np.random.default_rng(0)
    with connect(path) as store:
        _, token = make_token(store, "judge", "service")
        store.append([Observation(stream="live", value=float(e)) for e in rng.random(2000) < 0.1])
    with served(path) as service:
        headers = {"Authorization": f"Bearer {token}"}
        alerts = "/v1/projects/pilot/alerts/open"
        with httpx.Client(base_url=service.url, timeout=30, headers=headers) as judge:
            for error in rng.random(150) < 0.6:
                body = {"stream": "live", "value": float(error)}
                assert judge.post("/v1/projects/pilot/observations", json=body).status_code == 201
            until(lambda: service.browser.get(alerts).json())
        (alert,) = service.browser.get(alerts).json()
        assert alert["title"] == "live changed"
        assert "A rise from 0.1" in alert["text"]
    with connect(path) as store:
        assert store.verify().is_intact
