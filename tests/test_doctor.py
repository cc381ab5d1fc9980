"""The doctor finds what is wrong: every finding is provoked for real."""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlhf_workbench.cli import main
from rlhf_workbench.core.plugins import GROUP
from rlhf_workbench.serve import doctor, installation
from rlhf_workbench.serve.doctor import check_disk, check_machine, check_owner, check_port, check_private, examine
from rlhf_workbench.serve.installation import Finding
from rlhf_workbench.store.owner import OwnerNote, owner_file, write_owner

Shelf = Callable[..., None]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Puts the description of a package in front of all others."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def put(name: str, version: str, *lines: str, entries: str = "") -> None:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
        (info / "METADATA").write_text(text + "\n")
        (info / "entry_points.txt").write_text(entries)
        importlib.invalidate_caches()

    return put


def only(findings: list[Finding], subject: str) -> Finding:
    """The finding about a subject."""
    found = [finding for finding in findings if finding.subject == subject]
    assert len(found) == 1, findings
    return found[0]


def is_complete(finding: Finding) -> bool:
    """Whether it says what, why and what to do."""
    return all((finding.found, finding.why, finding.advice)) and finding.level != "ok"


# What is installed.


def test_a_clash_of_versions_names_both(shelf: Shelf) -> None:
    assert [f.level for f in installation.check_versions()] == ["ok"]
    shelf("numpy", "9.9.0")
    shelf("trl", "1.14.0")
    found = installation.check_versions()
    assert {f.subject for f in found} == {"numpy", "trl"}
    numpy = only(found, "numpy")
    assert (numpy.level, numpy.found) == ("problem", "9.9.0 is installed, rlhf_workbench needs <2.3,>=2.1")
    assert numpy.advice == "pip install 'numpy<2.3,>=2.1'"
    assert all(map(is_complete, found))


def test_extensions_must_have_the_version_of_duckdb(shelf: Shelf) -> None:
    assert [f.level for f in installation.check_extensions()] == ["ok"]
    shelf("duckdb-extension-httpfs", "1.4.0")
    found = only(installation.check_extensions(), "duckdb-extension-httpfs")
    assert found.level == "problem"
    assert found.found.startswith("1.4.0, but DuckDB is ")
    assert is_complete(found)


def test_a_missing_extra_says_what_it_is_for(shelf: Shelf) -> None:
    asked = [f"Provides-Extra: {e}" for e in ("train", "apps", "dev")]
    needs = ["nothing-like-this>=1; extra == 'train'", "nothing-either; extra == 'dev'", "numpy; extra == 'apps'"]
    needs += ["nothing-on-mars; sys_platform == 'mars'"]
    shelf("rlhf_workbench", "0.1.0", *asked, *(f"Requires-Dist: {line}" for line in needs))
    found = installation.check_extras()
    assert [(f.subject, f.level, f.found) for f in found] == [("extra train", "warning", "missing: nothing-like-this")]
    assert "preference optimisation" in found[0].why
    assert "rlhf_workbench[train]" in found[0].advice
    assert [f.level for f in installation.check_versions()] == ["ok"]


def test_what_is_always_needed_and_missing_is_a_problem(shelf: Shelf) -> None:
    shelf("rlhf_workbench", "0.1.0", "Requires-Dist: nothing-like-this>=1", "Requires-Python: >=3.99")
    assert only(installation.check_versions(), "nothing-like-this").found == "is not installed"
    python = installation.check_python()
    assert python.level == "problem"
    assert python.found.endswith("needs >=3.99")
    assert is_complete(python)


def test_two_copies_of_a_package_are_both_named(shelf: Shelf, tmp_path: Path) -> None:
    shelf("rlhf_workbench", "0.0.9", "Requires-Dist: numpy")
    found = only(installation.check_copies(), "rlhf-workbench")
    assert str(tmp_path / "shelf") in found.found
    assert "0.0.9" in found.found
    assert is_complete(found)


def test_broken_plugins_and_their_needs(shelf: Shelf) -> None:
    assert [f.level for f in installation.check_plugins()] == ["ok"]
    entries = f"[{GROUP}]\nchannel.bell = nowhere_at_all:Bell\n"
    shelf("lab-bell", "1.2", "Requires-Dist: numpy<1", entries=entries)
    found = installation.check_plugins()
    assert "lab-bell 1.2" in only(found, "plugin channel.bell").found
    assert "lab-bell needs <1" in only(found, "numpy").found
    assert all(map(is_complete, found))


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(shelf: Shelf, tmp_path: Path) -> None:
    shelf("rlhf_workbench", "0.1.0", "Requires-Dist: !!! not a requirement")
    found = examine(tmp_path / "s.duckdb", port=1)
    for subject in ("versions", "extras", "copies"):
        assert "could not be looked at (InvalidRequirement" in only(found, subject).found
    assert only(found, "disk")
    assert only(found, "memory")


# Rights.

_ASK = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from rlhf_workbench.serve.doctor import check_cache, check_writable
if os.geteuid() == 0:  # root may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
found = [check_writable("store", Path(path)) for path in sys.argv[1:]] + [check_cache()]
print(json.dumps([asdict(each) for each in found]))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are only for who runs it."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_what_cannot_be_written_is_a_problem(open_folder: Path) -> None:
    store, cache, mine = open_folder / "s.duckdb", open_folder / "cache", open_folder / "mine"
    store.write_bytes(b"x")
    cache.mkdir()
    mine.mkdir()
    store.chmod(0o444)
    for folder, rights in ((cache, 0o555), (mine, 0o777), (open_folder, 0o555)):
        folder.chmod(rights)
    paths = [store, open_folder / "new.duckdb", open_folder / "s.files", mine / "new.duckdb"]
    done = subprocess.run(
        [sys.executable, "-c", _ASK, *map(str, paths)],
        env=os.environ | {"RLHFW_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    open_folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    found = [Finding(**each) for each in json.loads(done.stdout)]
    assert [f.level for f in found] == ["problem", "problem", "problem", "ok", "problem"]
    assert found[0].found == f"{store} is not writable (-r--r--r--)"
    assert found[-1].subject == "cache"
    assert all(is_complete(f) for f in found if f.level != "ok")


def test_a_cache_that_is_a_file_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("RLHFW_CACHE", str(tmp_path / "cache"))
    assert doctor.check_cache().level == "problem"


@pytest.mark.parametrize("rights", [0o644, 0o640, 0o604, 0o620, 0o601, 0o777])
def test_a_secret_that_others_may_touch_is_a_problem(rights: int, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    assert check_private("key file", secret) == []
    secret.write_text("marker-of-a-secret")
    secret.chmod(0o600)
    assert [f.level for f in check_private("key file", secret)] == ["ok"]
    secret.chmod(rights)
    (found,) = check_private("key file", secret)
    assert (found.level, found.advice) == ("problem", f"chmod 600 {secret}")
    assert f"{rights:03o}" in found.found
    assert is_complete(found)


def test_every_place_of_a_secret_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHFW_STORE_KEY_FILE", str(tmp_path / "elsewhere"))
    secrets = [tmp_path / name for name in ("s.key", "s.duckdb.owner", "elsewhere")]
    for secret in secrets:
        secret.write_text("marker-of-a-secret")
        secret.chmod(0o644)
    found = examine(tmp_path / "s.duckdb")
    assert {f.advice for f in found if f.level == "problem"} == {f"chmod 600 {secret}" for secret in secrets}
    assert "marker-of-a-secret" not in str(found)


# The owner.


_OWN = """
import sys
from rlhf_workbench.store.tables import connect
store = connect(sys.argv[1])
print("mine", flush=True)
sys.stdin.read()
"""


def test_an_owner_is_alive_then_killed(tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    assert check_owner(store) == []
    command = [sys.executable, "-c", _OWN, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        alive = check_owner(store)
        process.kill()
    assert [f.found for f in alive] == [f"process {process.pid} owns the store and is alive"]
    gone = check_owner(store)
    assert [f.level for f in gone] == ["warning"]
    assert f"process {process.pid}, which is gone" in gone[0].found
    assert is_complete(gone[0])


def test_a_number_that_went_to_another_process_is_gone(tmp_path: Path) -> None:
    store, started = tmp_path / "s.duckdb", psutil.Process().create_time()
    write_owner(store, OwnerNote(os.getpid(), started - 60, "http://127.0.0.1:1", "marker-of-a-secret"))
    assert "is gone" in check_owner(store)[0].found
    assert "marker-of-a-secret" not in str(examine(store))


def test_the_owner_file_of_an_encrypted_store_needs_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, key = tmp_path / "s.duckdb", "a key of more than sixteen bytes"
    write_owner(store, OwnerNote(os.getpid(), psutil.Process().create_time(), "http://127.0.0.1:1", "t"), key)
    assert "cannot be read" in check_owner(store)[0].found
    monkeypatch.setenv("RLHFW_STORE_KEY", key)
    assert [f.level for f in check_owner(store)] == ["ok"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"pid": null, "started": 1}', '{"pid": "x", "started": 1}', "\0"]
)
def test_an_owner_file_that_says_nothing_is_a_warning(text: str, tmp_path: Path) -> None:
    owner_file(tmp_path / "s.duckdb").write_text(text)
    found = check_owner(tmp_path / "s.duckdb")
    assert [f.level for f in found] == ["warning"]
    assert "cannot be read as an owner file" in found[0].found


# The machine.


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """A disk of a size: a real one where this process may mount it, else one that says so."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def make(size_mb: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=20).returncode == 0
        except OSError:
            done = False
        if done:
            mounted.append(folder)
        else:
            usage = type(doctor.shutil.disk_usage("/"))(size_mb * 2**20, 0, size_mb * 2**20)
            monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
        return folder / "s.duckdb"

    yield make
    for each in mounted:
        subprocess.run(["umount", str(each)], check=True, timeout=20)


@pytest.mark.parametrize(("size_mb", "level"), [(50, "problem"), (1000, "warning"), (4000, "ok")])
def test_a_disk_that_is_nearly_full(small_disk: Callable[[int], Path], size_mb: int, level: str) -> None:
    found = check_disk(small_disk(size_mb))
    assert found.level == level
    assert level == "ok" or is_complete(found)


def test_a_store_that_does_not_fit_twice(small_disk: Callable[[int], Path]) -> None:
    store = small_disk(4000)
    with store.open("wb") as file:
        file.truncate(10 * 2**30)  # takes no room: a file with a hole
    assert check_disk(store).level == "problem"


def test_little_memory_and_odd_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(check_machine(500 * 2**20), "memory").level == "warning"
    assert only(check_machine(2**33), "memory").level == "ok"
    for value, level in (("many", "problem"), ("9999", "warning"), ("1", "ok")):
        monkeypatch.setenv("RLHFW_THREADS", value)
        found = only(check_machine(2**33), "threads")
        assert found.level == level
        assert level == "ok" or is_complete(found)


def test_a_port_that_is_taken_names_who_holds_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = check_port(port)
        assert found.level == "warning"
        assert f"process {os.getpid()}" in found.found
        assert is_complete(found)
    assert check_port(port).level == "ok"


# The command.


def test_problems_are_code_one_and_come_first(tmp_path: Path, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "s.duckdb")
    assert main(["doctor", "--store", store]) == 0
    assert "problems: 0," in capsys.readouterr().out
    shelf("numpy", "9.9.0")
    assert main(["doctor", "--store", store]) == 1
    text = capsys.readouterr().out
    assert text.startswith("problem  numpy: 9.9.0 is installed")
    assert "→ pip install 'numpy<2.3,>=2.1'" in text
    assert main(["doctor", "--store", store, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["is_well"]
    assert said["findings"][0]["subject"] == "numpy"
    assert not list(tmp_path.glob("s.*"))
