"""An encrypted store shows nothing without its key, and is never lost on the way to another key."""

import base64
import contextlib
import importlib.util
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import keyring
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keyring.backend import KeyringBackend

from rlhf_workbench.cli import main
from rlhf_workbench.core.errors import InputError, MissingError, StateError, WorkbenchError
from rlhf_workbench.core.files import write_rows
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.core.sealing import SealedReader, SealedWriter, new_key, seal, subkey, unseal
from rlhf_workbench.store.audit import verify
from rlhf_workbench.store.encryption import find_key, is_encrypted, open_cursor, open_database
from rlhf_workbench.store.exchange import export_dataset, import_file
from rlhf_workbench.store.rewrite import alone_with, compact, decrypt_store, encrypt_store, rotate_key
from rlhf_workbench.store.tables import connect

FIRST, SECOND = "first key, sixteen bytes or more", "second key, sixteen bytes or more"
MARK = "MARK-of-what-nobody-may-read"
PIECE = 1 << 16
BESIDE = ["pilot.duckdb", "pilot.duckdb.head", "pilot.duckdb.lock"]
Act = Callable[[], object]


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHFW_STORE_KEY", raising=False)
    monkeypatch.delenv("RLHFW_STORE_KEY_FILE", raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plain store with a hundred prompts in ten changes."""
    file = tmp_path / "pilot.duckdb"
    with connect(file) as store:
        for i in range(10):
            store.append([Prompt(text=f"{MARK} {i} {j}", metadata={"note": MARK}) for j in range(10)])
    return file


# --- sealing


@settings(max_examples=30, deadline=None)
@example(plain=b"", cuts=[])
@example(plain=bytes(PIECE), cuts=[PIECE - 1, PIECE])
@example(plain=bytes(2 * PIECE + 1), cuts=[1, PIECE, 2 * PIECE])
@given(plain=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_a_sealed_file_gives_back_what_was_written_in_any_portions(plain: bytes, cuts: list[int]) -> None:
    box, places = io.BytesIO(), [0, *sorted(min(cut, len(plain)) for cut in cuts), len(plain)]
    with SealedWriter(box, FIRST) as writer:
        for start, end in itertools.pairwise(places):
            writer.write(plain[start:end])
    with io.BufferedReader(SealedReader(io.BytesIO(box.getvalue()), FIRST)) as reader:
        assert reader.read() == plain
        for start in places:
            assert reader.seek(start) == start
            assert reader.read(7) == plain[start : start + 7]
        assert reader.seek(0, io.SEEK_END) == len(plain)


def _is_refused(data: bytes) -> bool:
    try:
        unseal(data, FIRST)
    except InputError:
        return True
    return False


def test_every_changed_byte_every_cut_and_every_swap_is_noticed() -> None:
    small = seal(b"port 8012", FIRST)
    assert unseal(small, FIRST) == b"port 8012"
    assert all(_is_refused(small[:i] + bytes([small[i] ^ 1]) + small[i + 1 :]) for i in range(len(small)))
    assert all(_is_refused(small[:i]) for i in range(len(small)))
    assert _is_refused(small + b"\0")

    large = seal(bytes(3 * PIECE), FIRST)  # three equal pieces
    size = PIECE + 16
    pieces = [large[32 + i * size : 32 + (i + 1) * size] for i in range(3)]
    assert unseal(large[:32] + b"".join(pieces), FIRST) == bytes(3 * PIECE)
    for order in ([0], [0, 1], [1, 0, 2], [0, 0, 2], [0, 2], [0, 1, 2, 2], [2], []):
        assert _is_refused(large[:32] + b"".join(pieces[i] for i in order)), order
    other = seal(bytes(3 * PIECE), FIRST)
    assert _is_refused(large[:32] + pieces[0] + other[32 + size : 32 + 2 * size] + pieces[2])


def test_a_seal_is_for_one_key_one_purpose_and_never_twice_the_same() -> None:
    sealed = seal(b"text", FIRST, "owner")
    for key, purpose in ((SECOND, "owner"), (FIRST, "export")):
        with pytest.raises(InputError, match="another key"):
            unseal(sealed, key, purpose)
    assert len({seal(b"text", FIRST) for _ in range(50)}) == 50


def test_a_writer_that_was_left_by_an_error_leaves_no_file_that_can_be_read() -> None:
    box = io.BytesIO()
    with pytest.raises(KeyError), SealedWriter(box, FIRST) as writer:
        writer.write(bytes(2 * PIECE + 5))
        raise KeyError
    with pytest.raises(InputError, match="cut off"):
        SealedReader(io.BytesIO(box.getvalue()), FIRST)


@given(key=st.binary(min_size=16, max_size=80), purpose=st.text(max_size=20), salt=st.binary(min_size=1, max_size=32))
@settings(max_examples=30, deadline=None)
def test_subkeys_are_hkdf(key: bytes, purpose: str, salt: bytes) -> None:
    assert subkey(key, purpose, salt) == HKDF(SHA256(), 32, salt, purpose.encode()).derive(key)


# --- keys


def test_where_a_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, beside, named = (tmp_path / name for name in ("pilot.duckdb", "pilot.key", "other.key"))
    assert find_key(store) is None
    for file, text in ((beside, "of the file beside"), (named, "of the named file")):
        file.write_text(f"{text}\n")
        file.chmod(0o600)
    assert find_key(store) == "of the file beside"
    monkeypatch.setenv("RLHFW_STORE_KEY_FILE", str(named))
    assert find_key(store) == "of the named file"
    monkeypatch.setenv("RLHFW_STORE_KEY", "of the environment")
    assert find_key(store) == "of the environment"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o644])
def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "pilot.key"
    file.write_text(FIRST)
    file.chmod(mode)
    with pytest.raises(InputError, match="chmod 600") as caught:
        find_key(tmp_path / "pilot.duckdb")
    assert FIRST not in str(caught.value)


@pytest.mark.parametrize(("content", "problem"), [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "as text")])
def test_a_key_file_without_a_key_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "pilot.key"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(InputError, match=problem):
        find_key(tmp_path / "pilot.duckdb")


class Ring(KeyringBackend):
    """A keyring in memory."""

    priority = 1

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.kept[service, username]


@pytest.fixture
def ring() -> Iterator[Ring]:
    before, ours = keyring.get_keyring(), Ring()
    keyring.set_keyring(ours)
    yield ours
    keyring.set_keyring(before)


def test_the_keyring_is_asked_when_wanted(tmp_path: Path, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "pilot.duckdb"
    keyring.set_password("rlhf_workbench", str(store.resolve()), FIRST)
    assert find_key(store) is None
    monkeypatch.setenv("RLHFW_STORE_KEY", "keyring")
    assert find_key(store) == FIRST
    with pytest.raises(MissingError, match="keyring set rlhf_workbench"):
        find_key(tmp_path / "other.duckdb")


def test_a_machine_without_a_keyring_is_told_so(tmp_path: Path, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyring.backends.fail import Keyring as NoKeyring

    keyring.set_keyring(NoKeyring())  # type: ignore[no-untyped-call]
    monkeypatch.setenv("RLHFW_STORE_KEY", "keyring")
    with pytest.raises(MissingError, match="no keyring; set RLHFW_STORE_KEY"):
        find_key(tmp_path / "pilot.duckdb")


# --- opening


@pytest.mark.parametrize(
    ("made_with", "opened_with", "kind", "problem"),
    [
        (FIRST, None, MissingError, "there is no key"),
        (FIRST, SECOND, StateError, "another key"),
        (None, FIRST, InputError, "is not encrypted"),
        (FIRST, "short", InputError, "at least 16"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_the_wrong_key_is_one_clear_line_without_the_key(
    tmp_path: Path,
    made_with: str | None,
    opened_with: str | None,
    kind: type[WorkbenchError],
    problem: str,
    read_only: bool,
) -> None:
    file = tmp_path / "a.duckdb"
    open_database(file, made_with).close()
    before = file.read_bytes()
    with pytest.raises(kind, match=problem) as caught:
        open_database(file, opened_with, read_only)
    told = "".join(traceback.format_exception(caught.value))
    derived = [base64.b64encode(subkey(key, "duckdb file")).decode() for key in (FIRST, SECOND)]
    assert "\n" not in str(caught.value)
    assert not any(secret in told for secret in (FIRST, SECOND, *derived))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "key", ["it's a key; DROP TABLE x --", "ключ'\"\\ \n\0 of many kinds", bytes(range(256)), b"'" * 16]
)
def test_any_key_will_do(tmp_path: Path, key: str | bytes) -> None:
    file = tmp_path / "it's a store.duckdb"
    with open_database(file, key) as con:
        con.execute("CREATE TABLE t AS SELECT 1 AS a")
    with open_database(file, key, read_only=True) as con:
        assert con.execute("SELECT a FROM t").fetchall() == [(1,)]
        with pytest.raises(duckdb.Error, match="read-only"):
            con.execute("INSERT INTO t VALUES (2)")


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"rlhf_workbench\[encrypt\]"):
        open_database(tmp_path / "a.duckdb", FIRST)
    open_database(tmp_path / "plain.duckdb").close()


@pytest.mark.parametrize("key", [None, FIRST])
def test_an_open_database_is_closed_in_and_looks_the_same_from_every_cursor(tmp_path: Path, key: str | None) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    with open_database(tmp_path / "a.duckdb", key) as con:
        con.execute("CREATE TABLE t AS SELECT 1 AS a; CREATE VIEW v AS SELECT a + 1 AS b FROM t")
        cursor = open_cursor(con)
        assert cursor.execute("SELECT a, b FROM t, v").fetchall() == [(1, 2)]
        cursor.execute("BEGIN; INSERT INTO t VALUES (5); ROLLBACK")
        assert con.execute("SELECT count(*) FROM t").fetchall() == [(1,)]
        for hostile in (
            f"SELECT * FROM read_csv('{tmp_path}/a.csv')",
            f"ATTACH '{tmp_path}/b.duckdb' AS b",
            f"COPY t TO '{tmp_path}/out.csv'",
            "SET enable_external_access = true",
            "INSTALL httpfs",
        ):
            with pytest.raises(duckdb.Error):
                cursor.execute(hostile)
        assert con.execute("SELECT current_setting('TimeZone')").fetchall() == [("UTC",)]


# --- nothing in plain text

SPILL = f"""
import os, signal, sys
from rlhf_workbench.store.encryption import open_database
con = open_database(sys.argv[1], os.environ.get("KEY"))
con.execute("SET memory_limit = '40MB'; SET wal_autocheckpoint = '1GB'")
con.execute("INSERT INTO prompt (id, text, metadata) VALUES ('1', '{MARK} in the log', '{{\\"a\\": \\"{MARK}\\"}}')")
wide = "md5(i::VARCHAR) || '{MARK}' || sha256(i::VARCHAR)"
reader = con.execute(f"SELECT {{wide}} AS s FROM range(400000) r(i) ORDER BY s DESC").to_arrow_reader(1000)
reader.read_next_batch()
os.kill(os.getpid(), signal.SIGKILL)
"""


def _where(folder: Path) -> set[str]:
    """Endings of the files that hold the marker."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.suffix for file in files if MARK.encode() in file.read_bytes()}


@pytest.mark.parametrize("key", [None, FIRST])
def test_no_file_beside_an_encrypted_store_shows_a_word(path: Path, key: str | None) -> None:
    """The same on a plain store, where the words must be found: else the test would prove nothing."""
    folder = path.parent
    assert _where(folder) == {".duckdb"}
    if key:
        encrypt_store(path, key)
    assert _where(folder) == (set() if key else {".duckdb"})

    killed = subprocess.run([sys.executable, "-c", SPILL, str(path)], env=os.environ | ({"KEY": key} if key else {}))
    assert killed.returncode == -signal.SIGKILL
    endings = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert {".duckdb", ".wal", ".tmp"} <= endings
    assert _where(folder) == (set() if key else {".duckdb", ".wal", ".tmp"})

    with open_database(path, key) as con:
        assert con.execute("SELECT count(*) FROM prompt WHERE contains(text, ?)", [MARK]).fetchall() == [(101,)]
        con.execute("CHECKPOINT")
        assert _where(folder) <= (set() if key else {".duckdb", ".tmp"})
    with alone_with(path):
        assert sorted(file.name for file in folder.iterdir()) == BESIDE
    if key:
        rotate_key(path, key, SECOND)
        compact(path, SECOND)
        assert _where(folder) == set()
        decrypt_store(path, SECOND)
        assert _where(folder) == {".duckdb"}


@pytest.mark.parametrize("key", [None, FIRST])
def test_what_is_written_through_the_store_shows_nowhere(
    tmp_path: Path, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is open: file, log, head and the owner's note; the note of a plain store can be read."""
    file = tmp_path / "pilot.duckdb"
    if key:
        monkeypatch.setenv("RLHFW_STORE_KEY", key)
    with connect(file, actor=MARK) as store:
        store.append([Prompt(text=f"{MARK} {i}", metadata={"note": MARK}) for i in range(100)])
        store.append(Prompt(text=MARK, topic=MARK))
        with connect(file) as second:
            assert second.counts() == {"prompt": 101}
        assert {file.suffix for file in tmp_path.iterdir()} >= {".duckdb", ".wal", ".owner", ".lock"}
        assert (".wal" in _where(tmp_path)) == (key is None)
        assert _where(tmp_path) <= (set() if key else {".duckdb", ".wal"})
        note = (tmp_path / "pilot.duckdb.owner").read_bytes()
        assert (b"127.0.0.1" in note) == (key is None)
        assert store.verify().is_intact
    assert _where(tmp_path) == (set() if key else {".duckdb"})
    assert is_encrypted(file) == bool(key)


def _lies_in(folder: Path) -> bytes:
    """All that this process has in a folder, files without a name included."""
    links = [Path(entry) for entry in Path("/proc/self/fd").iterdir()]
    opened = [link for link in links if link.exists() and os.readlink(link).startswith(str(folder))]
    return b"".join(file.read_bytes() for file in [*opened, *folder.iterdir()])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see files without a name")
@pytest.mark.parametrize("key", [None, FIRST])
def test_a_large_upload_shows_nothing_in_the_folder_for_temporary_files(
    tmp_path: Path, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed: pip install 'rlhf_workbench[serve]'")
    from fastapi.testclient import TestClient

    from rlhf_workbench.govern.access import make_token
    from rlhf_workbench.serve import records
    from rlhf_workbench.serve.api import create_app
    from rlhf_workbench.serve.callers import Service

    temporary, seen, write = tmp_path / "temporary", [], records._write
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    if key:
        monkeypatch.setenv("RLHFW_STORE_KEY", key)

    def look_and_write(*what: Any) -> Any:
        seen.append(_lies_in(temporary))
        return write(*what)

    monkeypatch.setattr(records, "_write", look_and_write)
    with connect(tmp_path / "pilot.duckdb") as store:
        headers = {"Authorization": f"Bearer {make_token(store, 'rob', 'researcher')[1]}"}
        rob = TestClient(create_app(Service({"pilot": store})), headers=headers)
        lines = "".join(json.dumps({"text": f"{MARK} {i} " + "x" * 9000}) + "\n" for i in range(1000))
        bulk = {"content": lines, "headers": {"Content-Type": "application/x-ndjson"}}
        answer = rob.post("/v1/projects/pilot/prompts/bulk", **bulk)
        assert answer.json() == {"written": 1000}
        assert [p.text[: len(MARK) + 2] for p in store.records(Prompt)][:2] == [f"{MARK} 0", f"{MARK} 1"]
    assert len(seen[0]) > 8 * 2**20
    assert (MARK.encode() in seen[0]) == (key is None)
    assert _lies_in(temporary) == b""


def test_what_stays_plain_beside_an_encrypted_store_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rlhf_workbench.serve.doctor import check_plain_files

    weights = path.with_suffix(".files") / "models" / "weights.bin"
    weights.parent.mkdir(parents=True)
    weights.write_text(MARK)
    weights.with_name("pairs.sealed").write_bytes(seal(MARK.encode(), FIRST))
    assert check_plain_files(path) == []  # a plain store promises nothing
    key_file = path.with_name("one.key")
    key_file.touch(mode=0o600)
    key_file.write_text(FIRST)
    assert main(["store", "encrypt", "--store", str(path), "--key-file", str(key_file)]) == 0
    assert f"not encrypted: 1 in {path.with_suffix('.files')}" in capsys.readouterr().out
    found = check_plain_files(path)
    assert [(finding.level, finding.subject) for finding in found] == [("warning", "plain files")]
    assert "1 files" in found[0].found
    weights.unlink()
    assert check_plain_files(path) == []


def test_a_wrong_key_is_told_where_it_was_found(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt_store(path, FIRST)
    wrong, right = path.with_name("wrong.key"), path.with_name("right.key")
    for file, key in ((wrong, SECOND), (right, FIRST)):
        file.touch(mode=0o600)
        file.write_text(key)
    for words in (["store", "info"], ["audit", "show"], ["audit", "verify"], ["store", "compact"]):
        at = [*words, "--store", str(path)]
        assert main([*at, "--key-file", str(wrong)]) == 2
        assert f"than that of the key file {wrong}" in capsys.readouterr().err
        assert main([*at, "--key-file", str(right)]) == 0
        capsys.readouterr()
    monkeypatch.setenv("RLHFW_STORE_KEY", SECOND)
    assert main(["store", "info", "--store", str(path)]) == 2
    assert "than that of RLHFW_STORE_KEY; give the right one there" in capsys.readouterr().err


def test_a_sealed_export_shows_nothing_and_comes_back(path: Path) -> None:
    folder = path.parent
    rows = [{"prompt": f"{MARK} {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)]
    write_rows(folder / "pairs.jsonl", rows)
    key_file = folder / "pilot.key"
    assert main(["store", "new-key", str(key_file)]) == 0
    assert main(["store", "new-key", str(key_file)]) == 2  # a key is never written over
    out = folder / "out"
    out.mkdir()
    at = ["--store", str(folder / "pairs.duckdb")]
    assert main(["import", str(folder / "pairs.jsonl"), *at]) == 0
    assert main(["export", "pairs", str(out / "a.jsonl.sealed"), "--encrypt", *at]) == 2  # no key
    assert main(["store", "unseal", str(folder / "pairs.jsonl"), str(out / "b"), *at, "--key-file", str(key_file)]) == 2
    with_key = ["--key-file", str(key_file)]
    assert main(["export", "pairs", str(out / "c.jsonl.sealed"), "--encrypt", *at, *with_key]) == 0
    assert main(["import", str(out / "c.jsonl.sealed"), *at]) == 2  # no key
    assert main(["import", str(out / "c.jsonl.sealed"), *at, *with_key]) == 0

    key = key_file.read_text().strip()
    with connect(folder / "pairs.duckdb") as store:
        for kind in ("jsonl", "jsonl.gz", "csv", "parquet"):
            assert export_dataset(store, "pairs", out / f"a.{kind}.sealed", format="trl", key=key) == 20
            assert import_file(store, out / f"a.{kind}.sealed", dataset=kind, key=key).n_rows == 20
            with pytest.raises(InputError, match="another key"):
                import_file(store, out / f"a.{kind}.sealed", dataset="other", key=new_key())
            with pytest.raises(InputError, match="there is no key"):
                import_file(store, out / f"a.{kind}.sealed", dataset="other")
        with pytest.raises(InputError, match=r"name it a.jsonl.sealed"):
            export_dataset(store, "pairs", out / "a.jsonl", key=key)
    assert _where(out) == set()
    assert main(["store", "unseal", str(out / "a.jsonl.sealed"), str(out / "a.jsonl"), *at, *with_key]) == 0
    assert (out / "a.jsonl").read_text().count(MARK) == 20


# --- never lost

FORKS = """
import os, signal, sys
from pathlib import Path
from rlhf_workbench.store.rewrite import compact, decrypt_store, encrypt_store, rotate_key
import rlhf_workbench.store.tables, psutil, filelock
path, first, second = Path(sys.argv[1]), os.environ["FIRST"], os.environ["SECOND"]
acts = {
    "encrypt": lambda: encrypt_store(path, first),
    "rotate": lambda: rotate_key(path, first, second),
    "compact": lambda: compact(path, second),
    "decrypt": lambda: decrypt_store(path, second),
}


def stop_before(touch):
    # Die when a file of the folder is touched for the n-th time: opened, renamed, removed, copied.
    seen = 0

    def look(event, args):
        nonlocal seen
        if event.startswith(("open", "os.", "shutil.")) and str(args[0]).startswith(str(path.parent)):
            seen += 1
            if seen == touch:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


for line in sys.stdin:
    act, touch = line.split()
    pid = os.fork()
    if pid == 0:
        stop_before(int(touch))
        acts[act]()
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
STEPS = {None: ("encrypt", FIRST), FIRST: ("rotate", SECOND), SECOND: ("decrypt", None)}


def _opening_key(path: Path) -> str | None:
    """The one of our keys that opens the store; all its rows must be there, and its chain whole."""
    keys: list[str | None] = [FIRST, SECOND] if is_encrypted(path) else [None]
    for key in keys:
        try:
            con = open_database(path, key)
        except StateError:
            continue
        assert con.execute("SELECT count(*), count(DISTINCT id) FROM prompt").fetchall() == [(100, 100)]
        report = verify(con)
        assert (report.is_intact, report.n_changes) == (True, 10)
        con.close()
        return key
    raise AssertionError("no key opens the store")


@pytest.fixture
def ask(path: Path) -> Iterator[Callable[[str, int], tuple[int, Callable[[], int]]]]:
    """Begin an act in a process of its own: gives its number, and how to wait for its end."""
    forks = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"FIRST": FIRST, "SECOND": SECOND},
    )
    assert forks.stdin
    assert forks.stdout
    to, answers = forks.stdin, forks.stdout

    def begin(act: str, touch: int = 0) -> tuple[int, Callable[[], int]]:
        print(act, touch, file=to, flush=True)
        return int(answers.readline()), lambda: int(answers.readline())

    yield begin
    forks.communicate()
    assert forks.returncode == 0


def _check_and_clean(path: Path) -> str | None:
    """The key that opens the store now; nothing is left beside it after the next call."""
    key = _opening_key(path)
    with alone_with(path):
        assert sorted(file.name for file in path.parent.iterdir()) == BESIDE
    return key


def test_killed_before_each_touch_of_a_file_the_store_opens_with_the_old_key_or_the_new_one(
    path: Path, ask: Callable[[str, int], tuple[int, Callable[[], int]]]
) -> None:
    statuses, keys = [], []
    for touch in range(1, 60):
        _, wait = ask("encrypt", touch)
        statuses.append(wait())
        keys.append(_check_and_clean(path))
        if keys[-1]:
            break
    assert len(keys) > 5
    assert {*keys[:-1]} == {None}
    assert keys[-1] == FIRST
    assert {*statuses} <= {0, signal.SIGKILL}


def test_killed_at_any_moment_the_store_opens_with_the_old_key_or_the_new_one(
    path: Path, ask: Callable[[str, int], tuple[int, Callable[[], int]]]
) -> None:
    draw, key, killed = random.Random(7), None, 0
    took: dict[str, float] = {}
    for turn in range(150):
        if killed >= 30:
            break
        act, new = STEPS[key]
        if key == SECOND and turn % 2:
            act, new = "compact", SECOND
        started = time.perf_counter()
        pid, wait = ask(act, 0)
        if act in took:  # the first of each is left alone, to know how long it takes
            time.sleep(draw.uniform(0, took[act]))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = wait()
        took.setdefault(act, time.perf_counter() - started)
        assert status in (0, signal.SIGKILL)
        killed += status == signal.SIGKILL
        now = _check_and_clean(path)
        assert now == new if status == 0 else now in (key, new)
        key = now
    assert killed >= 30


# --- refusals

HOLD = """
import os, sys, filelock
from rlhf_workbench.store.encryption import open_database
lock = filelock.FileLock(sys.argv[1] + ".lock")
if sys.argv[2] == "lock":
    lock.acquire()
con = open_database(sys.argv[1], os.environ.get("KEY"))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("key", [None, FIRST])
@pytest.mark.parametrize("how", ["lock", "file only"])
def test_an_open_store_is_left_alone_and_its_process_named(path: Path, key: str | None, how: str) -> None:
    if key:
        encrypt_store(path, key)
    env = os.environ | ({"KEY": key} if key else {})
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert holder.stdout
    assert holder.stdout.readline() == "open\n"
    acts: list[Act] = [lambda: encrypt_store(path, FIRST), lambda: compact(path)]
    if key:
        acts = [lambda: rotate_key(path, FIRST, SECOND), lambda: decrypt_store(path, FIRST), lambda: compact(path, key)]
    for act in acts if how == "lock" else acts[:1]:  # a file that is only open is waited for, a little
        with pytest.raises(StateError, match=f"process {holder.pid}"):
            act()
    holder.communicate()
    assert compact(path, key).report.is_intact


def test_what_cannot_be_done_changes_nothing(path: Path) -> None:
    plain = path.read_bytes()
    wrong: list[Act] = [lambda: decrypt_store(path, FIRST), lambda: rotate_key(path, FIRST, SECOND)]
    wrong += [lambda: compact(path, FIRST)]
    for act in wrong:
        with pytest.raises(InputError, match="is not encrypted"):
            act()
    with pytest.raises(InputError, match="at least 16"):
        encrypt_store(path, "short")
    assert path.read_bytes() == plain
    encrypt_store(path, FIRST)
    sealed = path.read_bytes()
    with pytest.raises(StateError, match="encrypted already"):
        encrypt_store(path, SECOND)
    with pytest.raises(InputError, match="the old one"):
        rotate_key(path, FIRST, FIRST)
    wrong = [lambda: decrypt_store(path, SECOND), lambda: rotate_key(path, SECOND, FIRST)]
    wrong += [lambda: compact(path, SECOND)]
    for act in wrong:
        with pytest.raises(StateError, match="another key"):
            act()
    with pytest.raises(MissingError, match="there is no key"):
        compact(path)
    assert path.read_bytes() == sealed
    with pytest.raises(MissingError, match="there is no store"):
        encrypt_store(path.with_name("other.duckdb"), FIRST)
    assert sorted(file.name for file in path.parent.iterdir()) == BESIDE


def test_a_plain_owner_file_does_not_survive_encryption(path: Path) -> None:
    path.with_name("pilot.duckdb.owner").write_text("token")
    path.chmod(0o600)
    encrypt_store(path, FIRST)
    assert not path.with_name("pilot.duckdb.owner").exists()
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_command_line_asks_for_no_key_in_its_words(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [path.with_name("one.key"), path.with_name("two.key")]
    for file in files:
        assert main(["store", "new-key", str(file)]) == 0
    at, one, two = ["--store", str(path)], ["--key-file", str(files[0])], ["--key-file", str(files[1])]
    assert main(["store", "encrypt", *at]) == 2
    assert "there is no key" in capsys.readouterr().err
    assert main(["store", "encrypt", *at, *one]) == 0
    assert main(["store", "decrypt", *at, *two]) == 2
    assert main(["store", "rotate-key", *at, *one, "--new-key-file", str(files[1])]) == 0
    assert main(["store", "compact", *at, *two]) == 0
    assert main(["store", "decrypt", *at, *two]) == 0
    said = "".join(capsys.readouterr())
    assert not any(file.read_text().strip() in said for file in files)
    with connect(path) as store:
        assert store.counts() == {"prompt": 100}
