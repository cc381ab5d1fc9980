"""`connect(path, read_only=True)`: nothing on the disk changes, and whoever wants to write need not wait."""

import ctypes
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from filelock import FileLock

from rlhf_workbench.core.errors import StateError
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.store.encryption import open_database
from rlhf_workbench.store.looking import Look, is_locked, lock_file
from rlhf_workbench.store.owner import Ownership
from rlhf_workbench.store.remote import RemoteBackend
from rlhf_workbench.store.tables import Store, connect

pytestmark = pytest.mark.server

KEY = "a key of sixteen characters or more"
# A writer whose process is killed leaves a log that nobody worked into the file, its note, and an old receipt.
KILLED = """
import os, sys
from datetime import timedelta
from rlhf_workbench.core.schema import Prompt, utc_now
from rlhf_workbench.store.tables import connect
store = connect(sys.argv[1])
store.append([Prompt(text=str(i)) for i in range(50)])
with store.transaction():
    store.keep_receipt("k", "f", 201, "{}")
engine = store.backend.owner.engine
with engine.transaction():
    engine._group.is_touched = True
    engine._con.execute("UPDATE receipt SET recorded_at = ?", [utc_now() - timedelta(days=2)])
os._exit(9)
"""
READ = """
from rlhf_workbench.core.schema import Prompt
store = connect({path!r}, read_only=True)
print(store.counts(), store.verify().is_intact, len(store.records(Prompt)), store.last_change(), store.files("models").name)
with store.backend._found.engine.reader() as con:
    print({folder!r} in con.execute("SELECT current_setting('temp_directory')").fetchone()[0])
import time; time.sleep({rest})
store.close()
"""


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def key(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key, and with one where the store looks for it."""
    if request.param:
        monkeypatch.setenv("RLHFW_STORE_KEY", request.param)


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """What lies in a folder: hash, mode and moment of the last change of each file."""
    return {
        str(file.relative_to(folder)): (
            hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "",
            file.stat().st_mode,
            file.stat().st_mtime_ns,
        )
        for file in [folder, *folder.rglob("*")]
    }


def give_up_rights() -> None:
    """From the next program on, root reads and writes only what its owner allows: PR_CAPBSET_DROP of prctl(2)."""
    library = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert library.prctl(24, capability, 0, 0, 0) == 0


def look(path: Path, rest: float = 0.0, without_rights: bool = False) -> str:
    """Read in a process of its own."""
    program = "from rlhf_workbench.store.tables import connect\n"
    program += READ.format(path=str(path), folder=str(path.parent), rest=rest)
    how: dict[str, Any] = {"preexec_fn": give_up_rights} if without_rights else {}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("end", ["closed", "killed"])
@pytest.mark.usefixtures("key")
def test_looking_changes_no_byte(tmp_path: Path, end: str) -> None:
    path = tmp_path / "s.duckdb"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, timeout=60)
    if end == "closed":
        connect(path).close()
        path.with_name("s.duckdb.lock").unlink()
        path.with_name("s.duckdb.head").unlink()  # an owner would write it again
    else:
        assert path.with_name("s.duckdb.owner").exists()
        assert [*tmp_path.glob("s.duckdb*wal*")]
    before = state(tmp_path)
    assert (
        look(path, rest=2.5) == "{'prompt': 50} True 50 1 models\nFalse\n"
    )  # an owner forgets receipts after a second
    assert state(tmp_path) == before
    with connect(path) as store:  # and it is a store like any other
        store.append(Prompt(text="later"))
        assert (store.counts(), store.verify().is_intact) == ({"prompt": 51}, True)


@pytest.mark.skipif(
    os.geteuid() != 0 or sys.platform != "linux", reason="only root on Linux can give a folder away and up its rights"
)
@pytest.mark.usefixtures("key")
def test_a_folder_of_somebody_else_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, timeout=60)
    for file in (tmp_path, *tmp_path.glob("s.duckdb*")):
        os.chown(file, 65534, 65534)
        file.chmod(0o755 if file.is_dir() else 0o444)
    try:
        before = state(tmp_path)
        assert look(path, without_rights=True) == "{'prompt': 50} True 50 1 models\nFalse\n"
        assert state(tmp_path) == before
        write = f"open({str(tmp_path / 'new')!r}, 'w')"
        tried = subprocess.run([sys.executable, "-c", write], preexec_fn=give_up_rights, check=False, stderr=-3)
        assert tried.returncode == 1, "the folder could be written to"
    finally:
        for file in (tmp_path, *tmp_path.glob("*")):
            os.chown(file, 0, 0)


def test_a_tampered_store_is_found_by_looking(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        store.append([Prompt(text="one"), Prompt(text="two")])
    duckdb.connect(str(path)).execute("UPDATE prompt SET text = 'three' WHERE text = 'two'").close()
    with connect(path, read_only=True) as store:
        assert isinstance(store.backend._found, Look)  # type: ignore[attr-defined]
        assert store.verify().problem == "prompt: a row was edited after it was written"
    path.with_name("s.duckdb.head").write_text(f"{7:020d} {'a' * 64}\n")
    with connect(path, read_only=True) as store:
        assert "the head kept beside the store" in store.verify().problem or store.verify().broken_seq == 1


# Making room

WRITER = """
import sys
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.store.tables import connect
print("ready", flush=True)
sys.stdin.readline()
with connect(sys.argv[1]) as store:
    store.append(Prompt(text="written"))
    print(store.backend.owner is not None, flush=True)
    sys.stdin.read()
"""


@contextmanager
def waiting_writer(path: Path) -> Iterator[Callable[[], None]]:
    """Another process that, when it is told to, opens the store for writing and writes."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=-1, stdout=-1, text=True)
    assert process.stdin
    assert process.stdout

    def write() -> None:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "True\n"

    try:
        assert process.stdout.readline() == "ready\n"
        yield write
    finally:
        process.communicate("", timeout=30)


@contextmanager
def writer(path: Path) -> Iterator[None]:
    """Another process that opened the store for writing, and wrote."""
    with waiting_writer(path) as write:
        write()
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with one prompt."""
    with connect(tmp_path / "s.duckdb") as store:
        store.append(Prompt(text="first"))
    return tmp_path / "s.duckdb"


def where(store: Store) -> type:
    """What a store holds on to."""
    return type(store.backend._found)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("key")
def test_a_reader_makes_room_for_a_writer_and_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    connect(path).close()
    told: list[object] = []
    with connect(path, read_only=True) as one, connect(path, read_only=True) as two:
        one.watch(told.append)
        assert (one.counts(), where(one)) == ({}, Look)
        for n in (1, 2):  # looks, joins, looks again
            with writer(path):
                assert (one.counts(), where(one)) == ({"prompt": n}, RemoteBackend)
                assert two.counts() == {"prompt": n}
            assert (two.counts(), where(two)) == ({"prompt": n}, Look)
            assert (one.last_change(), where(one)) == (n, Look)
        deadline = time.monotonic() + 10
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert told == [[("prompt", 1, 1)], [("prompt", 2, 1)]]


def test_a_writer_of_the_same_process_gets_room_too(path: Path) -> None:
    with connect(path, read_only=True) as reader:
        assert reader.counts() == {"prompt": 1}
        with connect(path) as store:
            store.append(Prompt(text="second"))
            assert (reader.counts(), where(reader)) == ({"prompt": 2}, Ownership)
        with pytest.raises(StateError, match="opened for reading only"):
            reader.append(Prompt(text="third"))
    with connect(path, read_only=True) as reader, reader.transaction():
        with pytest.raises(StateError, match="in a transaction; end it before you open it for writing"):
            connect(path)
        assert not is_locked(path)


def test_a_long_query_is_interrupted_and_done_again_by_the_owner(path: Path) -> None:
    endless = "SELECT count(*) AS n FROM range(3000000) a, range(3000000) b WHERE a.range + b.range < 0"
    found: list[object] = []

    def ask() -> None:
        try:
            reader.sql(endless, timeout_s=6.0)
        except Exception as error:
            found.append(error)

    with connect(path, read_only=True) as reader, waiting_writer(path) as write:
        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)
        write()
        assert thread.is_alive(), "the end of the query was not waited for"
        assert where(reader) in (Look, RemoteBackend)
        thread.join(timeout=30)
        assert where(reader) is RemoteBackend
        assert [str(error) for error in found] == ["the query took longer than 6 s; narrow it, or raise timeout_s"]


def test_a_transaction_of_a_reader_is_waited_for_and_then_ended(path: Path) -> None:
    with connect(path, read_only=True) as reader:
        with pytest.raises(StateError, match=r"went away during a transaction: .* do it again"), reader.transaction():
            assert reader.counts() == {"prompt": 1}
            with FileLock(lock_file(path)):
                time.sleep(1.0)
                reader.counts()
        assert reader.counts() == {"prompt": 1}


def test_a_file_that_this_process_is_about_to_close_is_waited_for(path: Path) -> None:
    writer = duckdb.connect(str(path))
    with pytest.raises(StateError, match=rf"this process \(PID {os.getpid()}\) has .* open; close it first"):
        open_database(path, read_only=True, patience_s=0.1)
    later = threading.Timer(0.3, writer.close)
    later.start()
    with open_database(path, read_only=True, patience_s=30) as con:
        assert con.execute("SELECT count(*) FROM prompt").fetchall() == [(1,)]
    later.join()


ENDLESS = """
import sys
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.store.tables import connect
store = connect(sys.argv[1])
while True:
    store.append(Prompt(text="x"))
    print(".", end="", flush=True)
"""


def test_a_reader_outlives_writers_that_are_killed_and_sees_all_that_was_acknowledged(path: Path) -> None:
    said, seen = 1, 0
    with connect(path, read_only=True) as reader:
        for _ in range(4):
            process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(path)], stdout=subprocess.PIPE)
            assert process.stdout
            assert process.stdout.read(1) == b"."
            for _ in range(20):
                before, seen = seen, reader.counts()["prompt"]
                assert seen >= before
            process.kill()
            said += 1 + len(process.communicate()[0])
            assert reader.counts()["prompt"] >= said
            assert reader.verify().is_intact
