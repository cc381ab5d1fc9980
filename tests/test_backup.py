"""A backup is one moment of a store that lives on, and comes back as it was."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.cli import main
from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.schema import Annotation, Prompt
from rlhf_workbench.core.sealing import new_key
from rlhf_workbench.store.audit import verify
from rlhf_workbench.store.backup import Manifest, backup, check_backup, read_manifest, restore
from rlhf_workbench.store.copying import copy_database, read_contents
from rlhf_workbench.store.encryption import is_encrypted, open_cursor, open_database
from rlhf_workbench.store.handover import FileBackend
from rlhf_workbench.store.inventory import store_info
from rlhf_workbench.store.rewrite import compact, encrypt_store
from rlhf_workbench.store.tables import connect

KEY = "a key of sixteen bytes or more"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with some rows and a file beside it."""
    file = tmp_path / "pilot.duckdb"
    with connect(file) as store:
        store.append([Prompt(text=f"question {i}", metadata={"i": i}) for i in range(20)])
        store.append([Annotation(comparison_id="c", annotator_id="ann", label="tie", strength=None)])
        (store.files("models/reward") / "weights.bin").write_bytes(bytes(range(256)) * 100)
    return file


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def key(request: pytest.FixtureRequest, path: Path) -> str | None:
    if request.param:
        encrypt_store(path, request.param)
    found: str | None = request.param
    return found


def _back_up(path: Path, target: Path, key: str | None = None, files: Path | None = None) -> Manifest:
    with open_database(path, key) as con:
        return backup(open_cursor(con), target, key=key, files=files)


def test_what_comes_back_is_what_was_there(path: Path, key: str | None, tmp_path: Path) -> None:
    made = _back_up(path, tmp_path / "monday", key, path.with_suffix(".files"))
    assert {"annotation": 1, "audit": 2, "prompt": 20, "store_version": 1}.items() <= made.rows.items()
    assert (made.n_changes, made.is_encrypted) == (2, bool(key))
    again = tmp_path / "elsewhere" / "again.duckdb"
    again.parent.mkdir()
    assert restore(tmp_path / "monday", again, key=key) == made == check_backup(tmp_path / "monday", key)
    assert is_encrypted(again) == bool(key)
    with open_database(path, key) as old, open_database(again, key) as new:
        assert read_contents(old) == read_contents(new)
        assert verify(new).head == made.head
    weights = "pilot.files/models/reward/weights.bin"
    assert (again.parent / weights.replace("pilot", "again")).read_bytes() == (tmp_path / weights).read_bytes()
    assert sorted(file.name for file in again.parent.iterdir()) == ["again.duckdb", "again.duckdb.lock", "again.files"]


def test_a_backup_is_one_moment_while_others_write(path: Path, key: str | None, tmp_path: Path) -> None:
    """Rows of two tables are written in one transaction: no backup has one without the other, and its history is a prefix."""
    with open_database(path, key) as con:
        con.execute("CREATE TABLE a (i BIGINT); CREATE TABLE b (i BIGINT, text VARCHAR)")
        stop, n_written = threading.Event(), 0
        first_rows = threading.Event()

        def write() -> None:
            nonlocal n_written
            cursor = open_cursor(con)
            while not stop.is_set():
                cursor.execute("BEGIN")
                cursor.execute("INSERT INTO a VALUES (?)", [n_written])
                cursor.execute("INSERT INTO b SELECT ?, repeat('x', 50) FROM range(20)", [n_written])
                cursor.execute("COMMIT")
                n_written += 1
                first_rows.set()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert first_rows.wait(30)
            seen = []
            for turn in range(2):
                before = n_written
                backup(open_cursor(con), tmp_path / f"turn{turn}", key=key)
                after = n_written
                with open_database(tmp_path / f"turn{turn}" / "store.duckdb", key, read_only=True) as copy:
                    rows = copy.execute("SELECT i FROM a ORDER BY rowid").fetchall()
                    assert rows == [(i,) for i in range(len(rows))]
                    assert copy.execute("SELECT count(*), count(DISTINCT i) FROM b").fetchall() == [
                        (20 * len(rows), len(rows))
                    ]
                assert before <= len(rows) <= after
                assert after > before  # writing did go on
                seen.append(len(rows))
        finally:
            stop.set()
            writer.join()
        assert seen == sorted(seen)
        assert con.execute("SELECT count(*) FROM a").fetchall() == [(n_written,)]


def test_a_backup_while_the_store_appends_is_a_prefix_of_its_history(path: Path, tmp_path: Path) -> None:
    with connect(path) as store:
        stop, started = threading.Event(), threading.Event()

        def append() -> None:
            while not stop.is_set():
                store.append([Prompt(text="more"), Annotation(comparison_id="c", annotator_id="a", label="tie")])
                started.set()

        writer = threading.Thread(target=append)
        writer.start()
        try:
            assert started.wait(30)
            assert isinstance(store.backend, FileBackend)
            assert store.backend.owner
            made = backup(store.backend.owner.engine._con.cursor(), tmp_path / "monday")
        finally:
            stop.set()
            writer.join()
        heads = store.sql("SELECT hash FROM audit ORDER BY seq")["hash"].tolist()
    assert heads[made.n_changes - 1] == made.head
    assert made.n_changes < len(heads)
    assert made.problem == ""
    assert made.rows["prompt"] - 20 == made.rows["annotation"] - 1
    restore(tmp_path / "monday", tmp_path / "again.duckdb")
    with connect(tmp_path / "again.duckdb") as again:
        assert again.verify().head == made.head
        again.append(Prompt(text="life goes on"))
        assert again.verify().is_intact


@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
            st.none() | st.floats(allow_nan=False),
            st.none() | st.lists(st.text("ab'\"", max_size=2), max_size=3),
        ),
        max_size=8,
    ),
    gone=st.sets(st.integers(0, 7)),
)
def test_any_table_is_copied_row_by_row_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[object, ...]], gone: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("copy")
    target = folder / "copy.duckdb"
    connect(folder / "pilot.duckdb").close()
    with open_database(folder / "pilot.duckdb") as con:
        con.execute('CREATE TABLE "odd ""name" ("a b" VARCHAR, f DOUBLE, l VARCHAR[], j JSON, t TIMESTAMPTZ)')
        for row in rows:
            con.execute('INSERT INTO "odd ""name" VALUES (?, ?, ?, \'{"a": [1, null]}\', now())', row)
        for i in gone:
            con.execute('DELETE FROM "odd ""name" WHERE rowid = ?', [i])
        con.execute('CREATE VIEW z AS SELECT f FROM "odd ""name"; CREATE VIEW y AS SELECT f + 1 AS g FROM z')
        con.execute('CREATE INDEX i ON "odd ""name" (f)')
        query = 'SELECT * FROM "odd ""name" ORDER BY rowid'
        expected = con.execute(query).to_arrow_table().to_pylist()
        contents, _ = copy_database(con, target)
        with open_database(target) as copy:
            assert copy.execute(query).to_arrow_table().to_pylist() == expected
            assert read_contents(copy) == contents
            assert copy.execute("SELECT count(g) FROM y").fetchall() == con.execute("SELECT count(g) FROM y").fetchall()


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ("CREATE SEQUENCE s", "sequence s"),
        ("CREATE MACRO m(a) AS a", "macro m"),
        ("CREATE SCHEMA x", "schema x"),
        ("CREATE TYPE mood AS ENUM ('a')", "type mood"),
    ],
)
def test_what_no_store_has_is_not_left_out_silently(path: Path, tmp_path: Path, made: str, named: str) -> None:
    with open_database(path) as con:
        con.execute(made)
        with pytest.raises(StateError, match=named):
            copy_database(con, tmp_path / "copy.duckdb")
    assert not (tmp_path / "copy.duckdb").exists()


# --- what is refused


def _edit(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def _edit_manifest(folder: Path, **changes: object) -> None:
    said = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(said | changes))


def _retell(folder: Path) -> None:
    """Another store under the manifest of this one, with the hash made to fit."""
    (folder / "store.duckdb").unlink()
    with connect(folder / "store.duckdb") as store:
        store.append(Prompt(text="forged"))
    for beside in folder.glob("store.duckdb.*"):
        beside.unlink()
    sums = json.loads((folder / "manifest.json").read_text())["sha256"]
    sums["store.duckdb"] = hashlib.sha256((folder / "store.duckdb").read_bytes()).hexdigest()
    _edit_manifest(folder, sha256=sums)


WEIGHTS = "files/models/reward/weights.bin"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (
        lambda f: _edit(f / "store.duckdb", lambda b: b[:9000] + bytes([b[9000] ^ 1]) + b[9001:]),
        "was changed",
    ),
    "cut": (lambda f: _edit(f / "store.duckdb", lambda b: b[:-4096]), "was changed"),
    "lost": (lambda f: (f / "store.duckdb").unlink(), "is missing"),
    "log added": (lambda f: (f / "store.duckdb.wal").write_bytes(b"x"), "was added"),
    "file changed": (lambda f: _edit(f / WEIGHTS, lambda b: b + b"x"), "was changed"),
    "file lost": (lambda f: (f / WEIGHTS).unlink(), "is missing"),
    "manifest cut": (lambda f: _edit(f / "manifest.json", lambda b: b[:50]), "is damaged"),
    "manifest lost": (lambda f: (f / "manifest.json").unlink(), "is not a backup"),
    "manifest of another kind": (lambda f: (f / "manifest.json").write_text("[1]"), "is damaged"),
    "other head": (lambda f: _edit_manifest(f, head="0" * 64), "does not hold what its manifest says"),
    "other rows": (lambda f: _edit_manifest(f, rows={"prompt": 3}), "does not hold what its manifest says"),
    "another store": (_retell, "does not hold what its manifest says"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_not_restored(path: Path, tmp_path: Path, damage: str) -> None:
    folder, again = tmp_path / "monday", tmp_path / "again.duckdb"
    _back_up(path, folder, files=path.with_suffix(".files"))
    act, problem = DAMAGES[damage]
    act(folder)
    attempts: list[Callable[[], object]] = [lambda: check_backup(folder), lambda: restore(folder, again)]
    for attempt in attempts:
        with pytest.raises((InputError, MissingError), match=problem):
            attempt()
    assert [file.name for file in tmp_path.glob("again*")] in ([], ["again.duckdb.lock"])


def test_nothing_is_written_over(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "monday"
    _back_up(path, folder, files=path.with_suffix(".files"))
    before = path.read_bytes()
    for present in ("again.duckdb", "again.duckdb.wal", "again.files"):
        (tmp_path / present).touch()
        with pytest.raises(StateError, match="move it away first"):
            restore(folder, tmp_path / "again.duckdb")
        (tmp_path / present).unlink()
    with pytest.raises(StateError, match="exists"):
        _back_up(path, folder)
    with connect(path), pytest.raises(StateError):  # a living store
        restore(folder, path)
    assert path.read_bytes() == before
    with pytest.raises(MissingError, match="no folder"):
        _back_up(path, tmp_path / "nowhere" / "monday")
    with pytest.raises(MissingError, match="no folder"):
        restore(folder, tmp_path / "nowhere" / "a.duckdb")


def test_an_encrypted_backup_needs_its_key(path: Path, tmp_path: Path) -> None:
    encrypt_store(path, KEY)
    _back_up(path, tmp_path / "monday", KEY)
    assert is_encrypted(tmp_path / "monday" / "store.duckdb")
    with pytest.raises(MissingError, match="there is no key"):
        restore(tmp_path / "monday", tmp_path / "again.duckdb")
    with pytest.raises(StateError, match="another key"):
        restore(tmp_path / "monday", tmp_path / "again.duckdb", key=new_key())
    assert not (tmp_path / "again.duckdb").exists()


def test_a_store_that_was_tampered_with_is_backed_up_with_the_evidence(path: Path, tmp_path: Path) -> None:
    with duckdb.connect(str(path)) as con:
        con.execute("UPDATE prompt SET text = 'another question' WHERE text = 'question 7'")
    made = _back_up(path, tmp_path / "monday")
    assert "change 1" in made.problem
    assert restore(tmp_path / "monday", tmp_path / "again.duckdb").problem == made.problem
    assert main(["store", "backup", str(tmp_path / "tuesday"), "--store", str(path)]) == 1
    assert compact(path).report.broken_seq == 1


def test_links_are_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of somebody else")
    (path.with_suffix(".files") / "link").symlink_to(tmp_path / "secret")
    (path.with_suffix(".files") / "folder").symlink_to(tmp_path)
    made = _back_up(path, tmp_path / "monday", files=path.with_suffix(".files"))
    assert sorted(made.sha256) == [WEIGHTS, "store.duckdb"]


# --- stopped in the middle

KILLED = """
import os, signal, sys
from pathlib import Path
import rlhf_workbench.store.backup as module
from rlhf_workbench.store.encryption import open_database
store, folder, act, *places = sys.argv[1:]
for place in places:
    pid = os.fork()
    if pid == 0:
        setattr(module, place, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        target = Path(folder) / place
        if act == "backup":
            module.backup(open_database(store), target, files=Path(store).with_suffix(".files"))
        else:
            module.restore(store, target / "again.duckdb")
    print(os.waitpid(pid, 0)[1])
"""


def _kill_at(store: Path, folder: Path, act: str, *places: str) -> None:
    """Die where the function of each name would have begun, each in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(store), str(folder), act, *places], capture_output=True, text=True
    )
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(places), done.stderr


def test_a_backup_that_was_killed_is_not_there_and_the_next_one_cleans_up(path: Path, tmp_path: Path) -> None:
    places = ("copy_database", "_copy_files", "_describe", "asdict", "sync_path")
    (tmp_path / "out").mkdir()
    _kill_at(path, tmp_path / "out", "backup", *places)
    assert [*(tmp_path / "out").glob("[!.]*")] == []
    assert len([*(tmp_path / "out").iterdir()]) == len(places)
    for place in places:
        with pytest.raises(MissingError, match="is not a backup"):
            read_manifest(tmp_path / "out" / place)
        _back_up(path, tmp_path / "out" / place)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(places)


def test_a_restoration_that_was_killed_left_no_store_and_can_be_done_again(path: Path, tmp_path: Path) -> None:
    _back_up(path, tmp_path / "monday")
    for place in ("_check_store", "sync_path"):
        (tmp_path / place).mkdir()
    _kill_at(tmp_path / "monday", tmp_path, "restore", "_check_store", "sync_path")
    for place in ("_check_store", "sync_path"):
        again = tmp_path / place / "again.duckdb"
        assert not again.exists()
        assert restore(tmp_path / "monday", again).n_changes == 2
        assert sorted(file.name for file in again.parent.iterdir()) == ["again.duckdb", "again.duckdb.lock"]


FULL = """
import resource, signal, sys
from pathlib import Path
from rlhf_workbench.core.errors import StateError
from rlhf_workbench.store.backup import backup
from rlhf_workbench.store.encryption import open_database
con = open_database(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    backup(con, sys.argv[2])
except StateError as error:
    print(error)
"""


def test_a_disk_that_fills_up_is_said_in_one_line_and_leaves_nothing(path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(tmp_path / "out" / "monday"), "20000"],
        capture_output=True,
        text=True,
    )
    assert "could not be written" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert [*(tmp_path / "out").iterdir()] == []


def test_too_little_room_is_known_before(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(StateError, match="1,000 left; make room"):
        _back_up(path, tmp_path / "monday")
    with pytest.raises(StateError, match="make room"):
        compact(path)
    with connect(path) as store:
        assert store.counts() == {"annotation": 1, "prompt": 20}


# --- looking


def test_compacting_gives_back_the_room_of_what_is_gone(path: Path, key: str | None) -> None:
    with open_database(path, key) as con:
        con.execute("CREATE TABLE gone AS SELECT hash(i) AS h FROM range(500000) r(i)")
        con.execute("CHECKPOINT; CREATE TABLE kept AS SELECT hash(i) AS h FROM range(100000) r(i)")
        con.execute("CHECKPOINT; DROP TABLE gone; CHECKPOINT")  # what is kept lies behind the hole
        expected = read_contents(con)
    done = compact(path, key)
    assert done.bytes_after < done.bytes_before / 2
    assert (done.bytes_after, done.report.is_intact) == (path.stat().st_size, True)
    with open_database(path, key) as con:
        assert read_contents(con) == expected


def test_info_says_what_is_there(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with connect(path) as store:
        head = store.verify().head
        found = store_info(store)
        assert (found.n_changes, found.head, found.is_encrypted) == (2, head, False)
        assert found.rows == {"annotation": 1, "prompt": 20}
        assert (found.files_bytes, found.owners) == (25600, ())
        # Asking about an open file must not drop its lock: closing a second handle would.
        other = f"import duckdb; duckdb.connect({str(path)!r})"
        assert "lock" in subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stderr
    with connect(":memory:") as store, pytest.raises(InputError, match="in memory"):
        store_info(store)
    assert main(["store", "info", "--json", "--store", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["head"] == head


def test_the_command_line_backs_up_and_brings_back(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file = tmp_path / "one.key"
    assert main(["store", "new-key", str(key_file)]) == 0
    with_key, at, again = ["--key-file", str(key_file)], ["--store", str(path)], ["--store", str(tmp_path / "b.duckdb")]
    assert main(["store", "encrypt", *at, *with_key]) == 0
    assert main(["store", "backup", str(tmp_path / "monday"), "--files", *at]) == 2  # no key
    assert main(["store", "backup", str(tmp_path / "monday"), "--files", *at, *with_key]) == 0
    assert main(["store", "restore", str(tmp_path / "monday"), *again]) == 2  # no key
    assert main(["store", "restore", str(tmp_path / "monday"), *again, *with_key]) == 0
    assert main(["store", "restore", str(tmp_path / "monday"), *again, *with_key]) == 2  # it is there
    assert main(["store", "decrypt", *again, *with_key]) == 0
    with connect(tmp_path / "b.duckdb") as store:
        assert store.counts() == {"annotation": 1, "prompt": 20}
    assert os.stat(tmp_path / "monday").st_mode & 0o077 == 0
