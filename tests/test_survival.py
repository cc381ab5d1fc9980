"""Whatever dies, fills up or goes missing: what was acknowledged is there, once, and the chain fits."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from endless_writer import work

from rlhf_workbench.core.errors import StateError
from rlhf_workbench.core.schema import Annotation, Prompt
from rlhf_workbench.core.sealing import new_key
from rlhf_workbench.store.encryption import find_key, is_encrypted
from rlhf_workbench.store.owner import read_owner
from rlhf_workbench.store.tables import connect

pytestmark = [pytest.mark.server, pytest.mark.slow]
KILLS = 200


def victim(workers: list[BaseProcess], path: Path, draw: random.Random) -> BaseProcess:
    """The owner half of the time, otherwise one of those who joined."""
    note = read_owner(path, find_key(path))
    owner = [w for w in workers if note and w.pid == note.pid]
    return owner[0] if owner and draw.random() < 0.5 else draw.choice(workers)


def wait_for_more(said: Path) -> None:
    """Until something more was acknowledged, so that every kill hits a store at work."""
    before, deadline = said.stat().st_size if said.exists() else 0, time.monotonic() + 30
    while (said.stat().st_size if said.exists() else 0) == before:
        assert time.monotonic() < deadline, "nobody took over"
        time.sleep(0.005)


def give_key(path: Path) -> None:
    """A key beside the store, where every worker finds it."""
    file = path.with_suffix(".key")
    file.touch(mode=0o600)
    file.write_text(new_key())


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kills", "has_key"), [(KILLS, False), (20, True)], ids=["plain", "encrypted"])
def test_kills_lose_nothing_that_was_acknowledged(tmp_path: Path, kills: int, has_key: bool) -> None:
    path, said, draw = tmp_path / "s.duckdb", tmp_path / "said", random.Random(7)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["endless_writer"])
    made = 0
    if has_key:
        give_key(path)

    def start() -> BaseProcess:
        nonlocal made
        made += 1
        worker = context.Process(target=work, args=(path, said, made), daemon=True)
        worker.start()
        return worker

    workers = [start() for _ in range(4)]
    owners_killed = 0
    for _ in range(kills):
        wait_for_more(said)
        time.sleep(draw.uniform(0.0, 0.15))
        found = victim(workers, path, draw)
        assert found.is_alive(), "a worker ended by itself"
        note = read_owner(path, find_key(path))
        owners_killed += bool(note and note.pid == found.pid)
        os.kill(found.pid or 0, signal.SIGKILL)
        found.join(10)
        workers[workers.index(found)] = start()
    assert all(worker.is_alive() for worker in workers)  # no error but the kills
    for worker in workers:
        worker.kill()
        worker.join(10)
    acknowledged = said.read_text().split()
    with connect(path) as store:
        kept = [*store.arrow(Prompt)["id"].to_pylist(), *store.arrow(Annotation)["id"].to_pylist()]
        assert store.verify().is_intact
        pairs = store.sql(
            "SELECT count(*) AS n FROM prompt p ANTI JOIN annotation a ON a.comparison_id = p.id WHERE p.text = 'of two'"
        )
        assert pairs["n"][0] == 0  # both or none
        store.append(Prompt(text="and on it goes"))
    assert is_encrypted(path) == has_key
    assert owners_killed >= kills // 4
    assert len(acknowledged) > kills
    assert not set(acknowledged) - set(kept)
    assert max(Counter(kept).values()) == 1


# What runs out or goes missing


def small_disk(folder: Path, size: str) -> None:
    """A file system of this size, or a skip where one may not be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    small_disk(disk, "24m")
    try:
        with connect(disk / "s.duckdb") as store:
            kept: list[str] = []
            with pytest.raises(StateError, match="free some space and try again"):
                for _ in range(200):
                    kept += store.append([Prompt(text=os.urandom(1000).hex()) for _ in range(200)])
            assert kept
            assert store.records(Prompt)[-1].id == kept[-1]  # it still answers
            filler = disk / "filler"
            size = os.statvfs(disk)
            filler.write_bytes(b"")
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            assert os.statvfs(disk).f_blocks > size.f_blocks
            kept += store.append([Prompt(text="there is room again")])
            assert [p.id for p in store.records(Prompt)] == kept
            assert store.verify().is_intact
        with connect(disk / "s.duckdb") as store:
            assert [p.id for p in store.records(Prompt)] == kept
            assert store.verify().is_intact
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_full_disk_is_507_and_the_service_lives(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed: pip install 'rlhf_workbench[serve]'")
    from fastapi.testclient import TestClient

    from rlhf_workbench.govern.access import make_token
    from rlhf_workbench.serve.api import create_app
    from rlhf_workbench.serve.callers import Service

    disk = tmp_path / "disk"
    small_disk(disk, "24m")
    try:
        with connect(disk / "s.duckdb") as store:
            bearer = {"Authorization": f"Bearer {make_token(store, 'rob', 'researcher')[1]}"}
            app = create_app(Service({"pilot": store}))
            rob = TestClient(app, base_url="http://127.0.0.1:5006/v1/projects/pilot/", headers=bearer)
            kept: list[str] = []
            for _ in range(200):
                answer = rob.post("prompts", json=[{"text": os.urandom(1000).hex()} for _ in range(200)])
                if answer.status_code != 201:
                    break
                kept += answer.json()["ids"]
            assert answer.status_code == 507, answer.text
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["title"] == "Insufficient Storage"
            assert "free some space and try again" in answer.json()["detail"]
            assert "507" in app.openapi()["paths"]["/v1/projects/{project}/prompts"]["post"]["responses"]
            assert kept
            assert rob.get(f"prompts/{kept[-1]}").status_code == 200  # it still answers
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            answer = rob.post("prompts", json={"text": "there is room again"})
            assert answer.status_code == 201, answer.text
            assert [p.id for p in store.records(Prompt)] == [*kept, answer.json()["id"]]
            assert store.verify().is_intact
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def as_nobody(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user who owns nothing, not even the interpreter: so all is imported before."""
    program = (
        "import os\nfrom rlhf_workbench.core.schema import Prompt\nfrom rlhf_workbench.store.tables import connect\n"
    )
    program += "with connect(':memory:') as store:\n    store.append(Prompt(text='x'))\n    store.verify()\n"
    program += "os.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n" + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        store.append(Prompt(text="x"))
    for file in tmp_path.glob("s.duckdb*"):
        file.chmod(0o644)
    opening = f"s = connect({str(path)!r}"
    refused = as_nobody(f"{opening})")
    assert "StateError: the folder" in refused.stderr
    assert "open with read_only=True" in refused.stderr
    looked = as_nobody(f"{opening}, read_only=True); print(s.counts(), s.verify().is_intact)")
    assert looked.stdout == "{'prompt': 1} True\n", looked.stderr


def test_a_clock_that_was_set_back_disturbs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlhf_workbench.core.schema as schema
    import rlhf_workbench.store.engine as engine

    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        store.append([Prompt(text=str(i)) for i in range(5)])
        past = datetime(2001, 1, 1, tzinfo=UTC)
        monkeypatch.setattr(engine, "utc_now", lambda: past)
        monkeypatch.setattr(schema.time, "time_ns", lambda: int(past.timestamp() * 1e9))
        store.append([Prompt(text=str(i), recorded_at=past) for i in range(5, 10)])
        assert [p.text for p in store.records(Prompt)] == [str(i) for i in range(10)]
        assert store.audit_rows().to_pylist()[-1]["recorded_at"] == past
        assert store.verify().is_intact


@pytest.mark.parametrize("name", ["owner", "lock", "head"])
def test_a_file_beside_the_store_that_was_deleted_is_no_loss(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        store.append(Prompt(text="one"))
        path.with_name(f"s.duckdb.{name}").unlink()
        store.append(Prompt(text="two"))
        assert store.verify().is_intact
    with connect(path) as store:
        assert store.counts() == {"prompt": 2}
        assert store.verify().is_intact


def test_too_many_open_files_is_an_error_and_no_end(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        store.append(Prompt(text="one"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        try:
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            store.append(Prompt(text="two"))
        finally:
            for number in opened:
                os.close(number)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert store.counts() == {"prompt": 2}
        assert store.verify().is_intact
