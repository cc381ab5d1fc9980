"""One store, many processes: the same results wherever the file is, one owner at a time, nothing lost between owners."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import psutil
import pyarrow as pa
import pytest

from rlhf_workbench.core.errors import DeniedError, InputError, MissingError, StateError
from rlhf_workbench.core.schema import Annotation, Model, Prompt, Run, utc_now
from rlhf_workbench.store.owner import OwnerNote, owner_file, read_owner, write_owner
from rlhf_workbench.store.remote import RemoteBackend
from rlhf_workbench.store.tables import Store, connect

pytestmark = pytest.mark.server

HOLDER = """
import sys
from rlhf_workbench.store.tables import connect
store = connect(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
store.close()
print("closed", flush=True)
"""


@contextmanager
def holder(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that opens the store first and so owns it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=-1, stdout=-1, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(params=["memory", "owned", "joined", "served"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store in each of the places where it can be."""
    path = tmp_path / "s.duckdb"
    if request.param == "memory":
        with connect(":memory:", actor="ada") as opened:
            yield opened
    elif request.param == "owned":
        with connect(path, actor="ada") as opened:
            yield opened
    elif request.param == "joined":
        with holder(path), connect(path, actor="ada") as opened:
            assert isinstance(opened.backend._found, RemoteBackend)  # type: ignore[attr-defined]
            yield opened
    else:
        with served(path) as (url, token), connect(url, token=token) as opened:
            yield opened


@contextmanager
def served(path: Path) -> Iterator[tuple[str, str]]:
    """The real service on a free port, and a token whose name is the actor of the other modes."""
    import uvicorn

    from rlhf_workbench.govern.access import make_token
    from rlhf_workbench.serve.api import create_app
    from rlhf_workbench.serve.callers import Service

    with connect(path) as opened:
        _, secret = make_token(opened, "ada", "admin")
        config = uvicorn.Config(create_app(Service({"s": opened})), port=0, log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", secret
        server.should_exit = True
        thread.join(timeout=20)


# The contract


def test_records_come_back_as_they_were(store: Store) -> None:
    prompt = Prompt(text="Why is “it” so?\u2028\n", topic=None, metadata={"n": [1, 2.5, None, "é"]})
    moment = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)
    vote = Annotation(comparison_id="c", annotator_id="b", label="tie", strength=0.1, submitted_at=moment)
    model = Model(name="m", kind="reward", parents=["a", "b"], figures={"accuracy": 0.5})
    assert store.append([prompt, vote, model]) == [prompt.id, vote.id, model.id]
    for record in (prompt, vote, model):
        kind = type(record)
        found = store.get(kind, record.id)
        assert {**vars(found), "actor": ""} == {**vars(record), "actor": ""}
        assert store.records(kind) == [found]
    assert store.frame(Prompt)["metadata"][0] == prompt.metadata
    assert store.arrow(Annotation)["submitted_at"].to_pylist() == [moment]


def test_corrections_and_filters(store: Store) -> None:
    first = Annotation(comparison_id="c1", annotator_id="b", label="first")
    other = Annotation(comparison_id="c2", annotator_id="b", label="second", queue="q")
    store.append([first, other])
    store.append(Annotation(comparison_id="c1", annotator_id="b", label="tie", replaces=first.id))
    assert [a.label for a in store.records(Annotation)] == ["second", "tie"]
    assert [a.label for a in store.records(Annotation, comparison_id=["c1", "c9"])] == ["tie"]
    assert [a.label for a in store.records(Annotation, queue=None)] == ["tie"]
    assert store.get(Annotation, first.id).label == "first"
    with pytest.raises(InputError, match="has no column 'colour'"):
        store.records(Annotation, colour="red")
    with pytest.raises(MissingError, match="there is no prompt nowhere"):
        store.get(Prompt, "nowhere")


def test_all_or_nothing(store: Store) -> None:
    with pytest.raises(InputError, match="must be one of first, second, tie, skip"):
        store.append([Prompt(text="a"), Annotation(comparison_id="c", annotator_id="b", label="left")])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"model\.figures must be plain JSON"):
        store.append([Prompt(text="a"), Model(name="m", kind="base", figures={"x": float("nan")})])
    with pytest.raises(InputError, match="given twice"):
        store.append([Prompt(text="a", id="same"), Prompt(text="b", id="same")])
    assert store.counts().get("prompt", 0) == 0


def test_tables_of_rows(store: Store) -> None:
    table = pa.table(
        {"comparison_id": [f"c{i}" for i in range(3000)], "annotator_id": ["b"] * 3000, "label": ["tie"] * 3000}
    )
    assert store.append_table(Annotation, table) == 3000
    found = store.arrow(Annotation)
    assert found["comparison_id"].to_pylist() == table["comparison_id"].to_pylist()
    assert set(found["actor"].to_pylist()) == {"ada"}
    assert found["id"].to_pylist() == sorted(set(found["id"].to_pylist()))
    for wrong, words in [
        (table.append_column("colour", pa.array(["red"] * 3000)), "has no column 'colour'"),
        (table.set_column(2, "label", pa.array(["left"] * 3000)), "must be one of"),
        (
            table.set_column(2, "label", pa.nulls(3000, pa.string())),
            "line 1: label: must not be empty; at least 100 things",
        ),
        (table.append_column("metadata", pa.array(["{"] * 3000)), "must be JSON"),
        (table.append_column("submitted_at", pa.array([datetime(2026, 1, 1)] * 3000)), "has no time zone"),
    ]:
        with pytest.raises(InputError, match=words):
            store.append_table(Annotation, wrong)
    assert store.counts()["annotation"] == 3000


def test_sql_gives_the_same_types(store: Store) -> None:
    store.append(Run(kind="k", key="x", seed=1, params={"a": 1}))
    frame = store.sql(
        "SELECT seed, sum(seed) AS total, NULL::BIGINT AS none, recorded_at, [1, 2] AS l FROM run GROUP BY ALL"
    )
    assert frame["seed"].dtype == "int64"
    assert frame["total"].dtype == "float64"
    assert isinstance(frame["recorded_at"].dtype, pd.DatetimeTZDtype)
    assert list(frame["l"][0]) == [1, 2]
    assert store.sql("SELECT count(*) AS n FROM run WHERE recorded_at < $now", {"now": utc_now()})["n"][0] == 1
    with pytest.raises(InputError, match="one SELECT"):
        store.sql("DELETE FROM run")
    with pytest.raises(InputError, match="more than 5 rows"):
        store.sql("SELECT * FROM range(10)", limit=5)
    with pytest.raises(InputError, match="longer than"):
        store.sql("SELECT count(*) FROM range(100000000000)", timeout_s=0.1)


def test_transactions(store: Store) -> None:
    with store.transaction():
        store.append(Prompt(text="one"))
        assert len(store.records(Prompt)) == 1  # sees what it wrote
        with store.transaction():
            store.append(Prompt(text="two"))
    assert len(store.records(Prompt)) == 2
    with pytest.raises(KeyError), store.transaction():
        store.append(Prompt(text="three"))
        raise KeyError
    with pytest.raises(InputError), store.transaction():
        store.append(Prompt(text="four"))
        store.sql("SELECT * FROM nowhere")
    assert [p.text for p in store.records(Prompt)] == ["one", "two"]
    with store.transaction():
        assert store.verify().is_intact  # does not wait for itself


def test_the_audit_says_who_and_what(store: Store) -> None:
    before = store.last_change()
    store.append([Prompt(text="a"), Prompt(text="b")])
    row = store.audit_rows(after=before).to_pylist()[-1]
    assert (row["actor"], row["action"], row["table_name"], row["n_rows"]) == ("ada", "append", "prompt", 2)
    assert store.last_change() == store.last_change(Prompt) == row["seq"]
    assert store.audit_rows(actor="nobody").num_rows == 0
    assert store.audit_rows(since=utc_now()).num_rows == 0
    assert store.verify().head == row["hash"]


def test_threads_share_it(store: Store) -> None:
    def write(name: str) -> None:
        for i in range(5):
            store.append([Prompt(text=f"{name} {i}"), Prompt(text=f"{name} {i} twin")])

    threads = [threading.Thread(target=write, args=[f"t{i}"]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert store.counts()["prompt"] == 60
    assert store.verify().is_intact


def test_watching_tells_of_every_change(store: Store) -> None:
    told: list[str] = []
    arrived = threading.Event()

    def look(changes: list[tuple[str, int, int]]) -> None:
        told.extend(table for table, _, _ in changes)
        if "model" in told:
            arrived.set()

    stop = store.watch(look)
    store.append(Prompt(text="a"))
    store.append(Model(name="m", kind="base"))
    assert arrived.wait(20)
    stop()
    assert [table for table in told if table in ("prompt", "model")] == ["prompt", "model"]


def test_receipts_stand_or_fall_with_what_they_are_for(store: Store) -> None:
    with pytest.raises(KeyError), store.transaction():
        store.keep_receipt("k", "f", 201, "{}")
        raise KeyError
    assert store.receipt("k") is None
    with store.transaction():
        store.append(Prompt(text="a"))
        store.keep_receipt("k", "f", 201, '{"id": 1}')
    assert store.receipt("k") == ("f", 201, '{"id": 1}')


def test_receipts_are_forgotten_after_a_day_and_their_keys_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rlhf_workbench.store.engine as engine

    with connect(tmp_path / "s.duckdb") as store:
        with monkeypatch.context() as past:
            past.setattr(engine, "utc_now", lambda: utc_now() - timedelta(hours=25))
            with store.transaction():
                store.keep_receipt("k", "old", 200, "{}")
                store.keep_receipt("l", "old", 200, "{}")
        assert store.receipt("k") is None
        with store.transaction():
            store.keep_receipt("k", "new", 201, "{}")
        assert store.receipt("k") == ("new", 201, "{}")
        held = store.backend.owner.engine  # type: ignore[attr-defined]
        held.drop_old_receipts()
        assert held.read("SELECT key FROM receipt").to_pylist() == [{"key": "k"}]


# One owner


def test_the_note_is_for_this_user_and_goes_with_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path):
        note = read_owner(path)
        assert note
        assert note.pid == os.getpid()
        assert note.is_alive
        assert note.address.startswith("http://127.0.0.1:")
        assert stat.S_IMODE(owner_file(path).stat().st_mode) == 0o600
    assert not owner_file(path).exists()


RACER = """
import sys, time
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.store.tables import connect
sys.stdin.readline()
store = connect(sys.argv[1])
is_owner = store.backend.owner is not None
store.append(Prompt(text="hello"))
print(is_owner, flush=True)
sys.stdin.readline()
store.close()
"""


def test_of_many_that_start_at_once_one_owns(tmp_path: Path) -> None:
    for trial in range(3):
        path = tmp_path / f"s{trial}.duckdb"
        racers = [
            subprocess.Popen([sys.executable, "-c", RACER, str(path)], stdin=-1, stdout=-1, text=True) for _ in range(5)
        ]
        for racer in racers:
            assert racer.stdin
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = [racer.stdout.readline().strip() for racer in racers if racer.stdout]
        for racer in racers:
            racer.communicate("end\n", timeout=60)
            assert racer.returncode == 0
        assert sorted(said) == ["False"] * 4 + ["True"]
        with connect(path) as store:
            assert store.counts() == {"prompt": 5}
            assert store.verify().is_intact


def test_when_the_owner_ends_the_next_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with holder(path) as first, connect(path) as store:
        store.append(Prompt(text="one"))
        first.communicate("")  # it closes in good order
        store.append(Prompt(text="two"))
        assert store.backend.owner  # type: ignore[attr-defined]
        assert [p.text for p in store.records(Prompt)] == ["one", "two"]


def test_when_the_owner_is_killed_the_next_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with holder(path) as first, connect(path) as store, connect(path) as reader:
        store.append(Prompt(text="one"))
        first.kill()
        first.wait()
        assert owner_file(path).exists()  # it had no time to tidy up
        assert [p.text for p in reader.records(Prompt)] == ["one"]
        store.append(Prompt(text="two"))
        note = read_owner(path)
        assert note
        assert note.pid == os.getpid()
        assert store.verify().is_intact


def test_a_transaction_does_not_outlive_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with holder(path) as first, connect(path) as store:
        with pytest.raises(StateError, match="went away during a transaction"), store.transaction():
            store.append(Prompt(text="one"))
            first.kill()
            first.wait()
            store.append(Prompt(text="two"))
        assert store.counts() == {}
        store.append(Prompt(text="three"))
        assert store.counts() == {"prompt": 1}


MIDWAY = """
import sys
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.store.tables import connect
with connect(sys.argv[1]) as store, store.transaction():
    store.append(Prompt(text="half"))
    print("midway", flush=True)
    sys.stdin.read()
"""


@pytest.mark.timeout(25)  # less than the silence after which any transaction is given up
def test_a_client_killed_in_a_transaction_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        client = subprocess.Popen([sys.executable, "-c", MIDWAY, str(path)], stdin=-1, stdout=-1, text=True)
        assert client.stdout
        assert client.stdout.readline() == "midway\n"
        client.kill()
        client.communicate()
        store.append(Prompt(text="whole"))
        assert [p.text for p in store.records(Prompt)] == ["whole"]


def test_a_stale_note_misleads_nobody(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    connect(path).close()
    mine = psutil.Process().create_time()
    for pid, started in [(2**22 + 1, 0.0), (os.getpid(), mine - 1000), (1, psutil.Process(1).create_time())]:
        write_owner(path, OwnerNote(pid, started, "http://127.0.0.1:9", "x"))
        with connect(path) as store:
            assert store.backend.owner  # type: ignore[attr-defined]
    for rubbish in (b"", b"{", b"[]", b'{"pid": "x"}', os.urandom(64)):
        owner_file(path).write_bytes(rubbish)
        with connect(path) as store:
            store.append(Prompt(text="x"))


def test_a_deleted_note_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with holder(path):
        owner_file(path).unlink()
        with connect(path) as store:  # waits until the owner has noticed
            store.append(Prompt(text="x"))
            assert isinstance(store.backend._found, RemoteBackend)  # type: ignore[attr-defined]


def test_an_owner_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlhf_workbench.store.owner as owner
    import rlhf_workbench.store.remote as remote

    path = tmp_path / "s.duckdb"
    monkeypatch.setattr(owner, "_PATIENCE_S", 1.0)
    whole = remote.Connection.__init__
    monkeypatch.setattr(
        remote.Connection, "__init__", lambda self, *a, **k: whole(self, *a, **(k | {"timeout_s": 0.3}))
    )
    with holder(path) as first:
        os.kill(first.pid, signal.SIGSTOP)
        try:
            with pytest.raises(StateError, match=f"process {first.pid} has .* but does not answer"):
                owner.own_or_join(path, patience_s=1.0)
        finally:
            os.kill(first.pid, signal.SIGCONT)


@pytest.mark.parametrize("key", ["", "another key of 16 bytes"])
def test_who_joins_needs_the_right_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    import rlhf_workbench.store.owner as owner

    monkeypatch.setenv("RLHFW_STORE_KEY", "the right key of this store")
    with holder(tmp_path / "s.duckdb"):
        monkeypatch.setenv("RLHFW_STORE_KEY", key)
        with pytest.raises(StateError, match=r"this key does not open .*; set RLHFW_STORE_KEY"):
            owner.own_or_join(tmp_path / "s.duckdb", patience_s=0.5)


def test_strangers_at_the_door_learn_nothing(tmp_path: Path) -> None:
    import http.client

    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        store.append(Prompt(text="secret words"))
        note = read_owner(path)
        assert note
        port = int(note.address.rsplit(":", 1)[1])
        for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": f"Bearer {note.token}x"}):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request(
                "POST", "/select", json.dumps({"table": "prompt", "equals": {}, "is_current": True}) + "\n", headers
            )
            answer = connection.getresponse()
            assert answer.status == 401
            assert b"secret" not in answer.read()
            connection.close()
        for body in (
            b"",
            b"\xff",
            b"[]\n",
            b"{}\n",
            b'{"groups": 3}\n',
            b'{"groups": [["prompt", {"id": ["x"]}]]}\n',
            b"{}\nrubbish",
        ):
            for call in ("append", "select", "query", "commit", "nonsense", "append_table", "begin/../x"):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("POST", f"/{call}", body, {"Authorization": f"Bearer {note.token}"})
                assert connection.getresponse().status in (404, 409, 422), (call, body)
                connection.close()
        assert store.counts() == {"prompt": 1}
        assert store.verify().is_intact


def test_the_way_to_a_server_is_checked_at_once(tmp_path: Path) -> None:
    with served(tmp_path / "s.duckdb") as (url, token):
        for address in (url, f"{url}/", f"{url}/projects/s", f"{url}/v1/projects/s"):
            assert connect(address, token=token).counts() == {"token": 1}
        with pytest.raises(DeniedError, match="without a token; give token="):
            connect(url)
        for wrong in ("x", f"{token}x"):
            with pytest.raises(DeniedError, match="knows no such token"):
                connect(f"{url}/projects/s", token=wrong)
        with pytest.raises(MissingError, match=r"this token may enter s; give http://.*/projects/<name>"):
            connect(f"{url}/projects/other", token=token)


def test_a_server_without_its_scheme_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="write the address as http://host:port"):
        connect("127.0.0.1:5006", token="secret")
    assert not list(tmp_path.iterdir())


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = connect(tmp_path / "s.duckdb")
    store.close()
    store.close()
    with pytest.raises(StateError, match="is closed; connect again"):
        store.append(Prompt(text="x"))


def test_a_reader_cannot_write_but_shares(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as writer, connect(path, read_only=True) as reader:
        writer.append(Prompt(text="x"))
        assert reader.counts() == {"prompt": 1}
        with pytest.raises(StateError, match="opened for reading only"):
            reader.append(Prompt(text="y"))


def test_a_lock_deleted_beside_a_living_owner_is_no_invitation(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with holder(path):
        path.with_name("s.duckdb.lock").unlink()
        spilled, part = path.with_name("s.duckdb.tmp"), path.with_name("s.duckdb.rewrite")
        spilled.mkdir(exist_ok=True)
        (spilled / "of-the-owner").write_text("in use")
        part.write_text("in use")
        started = time.monotonic()
        with connect(path, actor="ada") as store:
            assert isinstance(store.backend._found, RemoteBackend)  # type: ignore[attr-defined]
            store.append(Prompt(text="joined"))
        assert time.monotonic() - started < 20
        assert (spilled / "of-the-owner").exists()
        assert part.exists()
    with connect(path) as store:  # the owner was killed; now what it left is in nobody's use
        assert [p.text for p in store.records(Prompt)] == ["joined"]
        assert not spilled.exists()
        assert not part.exists()


def test_a_link_leads_to_the_same_store_its_owner_and_its_files(tmp_path: Path) -> None:
    path, link = tmp_path / "s.duckdb", tmp_path / "elsewhere" / "link.duckdb"
    connect(path).close()
    link.parent.mkdir()
    link.symlink_to(path)
    with holder(link):
        for way in (path, link):
            with connect(way) as store:
                assert isinstance(store.backend._found, RemoteBackend)  # type: ignore[attr-defined]
                store.append(Prompt(text="x"))
                assert store.files() == tmp_path / "s.files"
    with connect(link, read_only=True) as store:
        assert store.counts() == {"prompt": 2}
    assert list(link.parent.iterdir()) == [link]


ENDS_WHILE_ASKED = """
import sys
from rlhf_workbench.store.tables import connect
store = connect(sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
store.close()
"""


def test_an_owner_that_ends_while_others_ask_ends_in_peace_and_they_ask_the_next(tmp_path: Path) -> None:
    path, over, found = tmp_path / "s.duckdb", threading.Event(), []
    with connect(path) as store, store.transaction():
        for i in range(2000):
            store.append(Prompt(text=str(i)))
    process = subprocess.Popen([sys.executable, "-c", ENDS_WHILE_ASKED, str(path)], stdin=-1, stdout=-1, text=True)
    assert process.stdout
    assert process.stdout.readline() == "open\n"

    def ask() -> None:
        while not over.is_set():
            found.append(joined.verify().is_intact)

    with connect(path) as joined:
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        process.communicate("\n", timeout=30)
        over.set()
        for thread in threads:
            thread.join(timeout=30)
        assert process.returncode == 0, "a thread was in the database when Python ended"
        assert joined.verify().is_intact
        assert joined.backend.owner is not None  # type: ignore[attr-defined]
    assert len(found) >= 3
    assert all(found)
