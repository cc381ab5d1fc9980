"""Jobs that the service runs: their processes, their ends, and what a dead service leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra jobs: pip install 'rlhf_workbench[jobs]'")
pytest.importorskip("papermill", reason="needs the extra jobs: pip install 'rlhf_workbench[jobs]'")

from rlhf_workbench.core.errors import DeniedError, InputError, MissingError, StateError
from rlhf_workbench.core.schema import Job, JobEnd, Prompt
from rlhf_workbench.serve import jobs
from rlhf_workbench.serve.worker import Worker, check_job, end_tree, waiting_jobs
from rlhf_workbench.store.tables import Store, connect

PARAMETERS = 'store_path = "x"\nseed = 0\nb = 2\nnote = ""\nshare = 0.5\nfresh = False\ncolumns = {}'
SUM = "import pathlib\nassert b, 'b must not be zero'\npathlib.Path('sum.txt').write_text(str(40 + b))"
# Says through a pipe who it is and who its child is; then neither ends by itself.
HANG = """import json, os, subprocess
child = subprocess.Popen(["sleep", "1000"])
with open("ready", "w") as pipe:
    json.dump([os.getpid(), child.pid, os.getppid()], pipe)
child.wait()"""


def write_job(folder: Path, name: str, code: str) -> None:
    """A job notebook of one cell."""
    parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_markdown_cell(f"# {name}\n> Why?"), parameters, nbformat.v4.new_code_cell(code)]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), folder / f"{name}.ipynb")


@pytest.fixture
def notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_job(folder, "sum", SUM)
    write_job(folder, "hang", HANG)
    monkeypatch.setattr(jobs, "jobs_folder", lambda: folder)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with connect(tmp_path / "s.duckdb") as opened:
        os.mkfifo(opened.files("inputs") / "ready")
        yield opened


@pytest.fixture
def worker(notebooks: Path, store: Store) -> Iterator[Worker]:
    made = Worker(store)
    made.start()
    yield made
    made.stop()


def until(is_true: Callable[[], Any], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(worker: Worker, job: Job) -> JobEnd:
    until(lambda: worker.state(job).end)
    end = worker.state(job).end
    assert end
    return end


# What may be asked for


def test_the_right_parameters_come_back_typed(notebooks: Path) -> None:
    given = {"b": 3, "note": "pairs.jsonl", "share": 1, "fresh": True, "columns": {"chosen": "better"}}
    assert check_job("sum", given) == given | {"share": 1.0}


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"store_path": "other.duckdb"}, DeniedError),
        ({"out": "elsewhere"}, DeniedError),
        ({"c": 1}, InputError),
        ({"b": "3"}, InputError),
        ({"b": 3.5}, InputError),
        ({"b": True}, InputError),
        ({"b": None}, InputError),
        ({"fresh": 1}, InputError),
        ({"note": 1}, InputError),
        ({"share": float("nan")}, InputError),
        ({"note": "/etc/passwd"}, DeniedError),
        ({"note": "../s.duckdb"}, DeniedError),
        ({"note": "a/../../s.duckdb"}, DeniedError),
        ({"note": "~/.ssh/id"}, DeniedError),
        ({"note": "https://evil.example/x.csv"}, DeniedError),
        ({"note": "file:///etc/passwd"}, DeniedError),
        ({"note": "\\\\host\\share"}, DeniedError),
        ({"columns": {"chosen": "/etc/passwd"}}, DeniedError),
        ({"columns": {"/etc/passwd": "chosen"}}, DeniedError),
        ({"columns": {"a": [{"b": "../x"}]}}, DeniedError),
    ],
)
def test_the_wrong_ones_are_refused(notebooks: Path, params: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        check_job("sum", params)


@pytest.mark.parametrize("name", ["rm", "", "../sum", "sum.ipynb", "_hidden"])
def test_only_known_notebooks_run(notebooks: Path, name: str) -> None:
    write_job(notebooks, "_hidden", SUM)
    with pytest.raises(MissingError):
        check_job(name, {})


def test_a_refused_job_leaves_no_record(notebooks: Path, store: Store) -> None:
    with pytest.raises(DeniedError):
        Worker(store).ask("sum", {"note": "/etc/passwd"}, "ada")
    assert store.records(Job) == []


# Running


def test_jobs_end_with_a_report_or_a_reason(worker: Worker, store: Store) -> None:
    good, bad = worker.ask("sum", {"b": 2}, "ada"), worker.ask("sum", {"b": 0}, "ben")
    end = ended(worker, good)
    assert (end.status, end.error) == ("done", None)
    report = store.files("jobs") / end.report
    assert report.is_file()
    assert report.with_suffix(".html").is_file()
    assert report.is_relative_to(store.files("jobs") / good.id)
    assert (store.files("inputs") / "sum.txt").read_text() == "42"
    end = ended(worker, bad)
    assert end.status == "failed"
    assert "b must not be zero" in str(end.error)
    assert (store.files("jobs") / end.report).is_file()  # the copy so far
    assert store.get(Job, bad.id).actor == "ben"
    assert waiting_jobs(store) == []


def test_a_job_writes_into_the_store_that_the_service_holds(worker: Worker, store: Store, notebooks: Path) -> None:
    code = "from rlhf_workbench.core.schema import Prompt\nfrom rlhf_workbench.store.tables import connect\n"
    write_job(notebooks, "write", code + "connect(store_path, actor='job').append(Prompt(text=note))")
    end = ended(worker, worker.ask("write", {"note": "from the job"}, "ada"))
    assert (end.status, end.error) == ("done", None)
    assert [(prompt.text, prompt.actor) for prompt in store.records(Prompt)] == [("from the job", "local")]
    assert store.audit_rows(table="prompt")["actor"].to_pylist() == ["job"]
    assert store.verify().is_intact


def test_cancelling_kills_everything_that_the_job_started(worker: Worker, store: Store) -> None:
    job, later = worker.ask("hang", {"note": "a secret"}, "ada"), worker.ask("sum", {}, "ada")
    family = json.loads((store.files("inputs") / "ready").read_text())
    assert [worker.state(j).state for j in (job, later)] == ["running", "waiting"]  # one at a time
    assert all(is_alive(pid) for pid in family)
    assert not any("a secret" in word for pid in family for word in psutil.Process(pid).cmdline())
    worker.cancel(job.id, "eve")
    end = ended(worker, job)
    assert (end.status, end.actor) == ("cancelled", "eve")
    assert not any(is_alive(pid) for pid in family)
    assert ended(worker, later).status == "done"
    with pytest.raises(StateError, match="is cancelled"):
        worker.cancel(job.id, "eve")
    assert len(store.records(JobEnd, job_id=job.id)) == 1


def test_a_waiting_job_is_cancelled_without_a_process(notebooks: Path, store: Store) -> None:
    worker = Worker(store)
    job = worker.ask("sum", {}, "ada")
    worker.cancel(job.id, "ada")
    worker.start()
    other = worker.ask("sum", {}, "ada")
    assert ended(worker, other).status == "done"
    worker.stop()
    assert worker.state(job).state == "cancelled"
    assert not (store.files("jobs") / job.id).exists()


def test_a_stopped_worker_leaves_the_job_to_the_next(notebooks: Path, store: Store) -> None:
    first = Worker(store)
    first.start()
    job = first.ask("hang", {}, "ada")
    family = json.loads((store.files("inputs") / "ready").read_text())
    first.stop()
    assert not any(is_alive(pid) for pid in family)
    assert store.records(JobEnd) == []
    marks = store.files("jobs") / job.id / "attempts.txt"
    assert marks.read_text().split() == ["started", "stopped"]
    marks.write_text("started\nstopped\n" * 5)  # more often than a crash is forgiven
    write_job(notebooks, "hang", SUM)
    second = Worker(store)
    second.start()
    assert ended(second, job).status == "done"
    second.stop()


# A service that is killed


SERVICE = """
import sys
from pathlib import Path
from rlhf_workbench.serve import jobs
from rlhf_workbench.serve.worker import Worker, waiting_jobs
from rlhf_workbench.store.tables import connect
jobs.jobs_folder = lambda: Path(sys.argv[1])
worker = Worker(connect(sys.argv[2]))
worker.start()
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_service_takes_its_jobs_along_and_finds_them_again(notebooks: Path, store: Store) -> None:
    job = Worker(store).ask("hang", {}, "ada")
    path, ready = store.path, store.files("inputs") / "ready"
    store.close()
    for _ in range(3):
        service = subprocess.Popen([sys.executable, "-c", SERVICE, str(notebooks), str(path)], stdin=-1)
        family = json.loads(ready.read_text())
        service.send_signal(signal.SIGKILL)
        service.communicate()
        until(lambda family=family: not any(is_alive(pid) for pid in family))  # type: ignore[misc]
    with connect(str(path)) as again:
        worker = Worker(again)
        worker.start()
        end = ended(worker, job)
        worker.stop()
        assert end.status == "failed"
        assert "died 3 times" in str(end.error)
        assert again.verify().is_intact


FAMILY = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"])
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is gone before it is looked for; a child that goes while its tree is ended, and that nobody buries."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not psutil.pid_exists(gone.pid)
    end_tree(gone.pid)
    family = subprocess.Popen([sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert family.stdout
    child = int(family.stdout.readline())
    kill = psutil.Process.kill

    def kill_too_late(process: psutil.Process) -> None:
        kill(process)
        raise psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(psutil.Process, "kill", kill_too_late)
    end_tree(family.pid)
    family.communicate()
    assert family.returncode == -signal.SIGKILL
    assert not is_alive(child)


def test_a_child_that_dies_by_itself_is_a_failed_job(worker: Worker, store: Store) -> None:
    job = worker.ask("hang", {}, "ada")
    kernel, sleeper, runner = json.loads((store.files("inputs") / "ready").read_text())
    os.kill(runner, signal.SIGKILL)
    end = ended(worker, job)
    assert end.status == "failed"
    assert "left no outcome" in str(end.error)
    end_tree(sleeper)
    until(lambda: not is_alive(kernel))  # it watches its parent
