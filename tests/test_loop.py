"""The whole loop, as a newcomer runs it: real steps, real libraries, a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from rlhf_workbench.core.schema import DriftEvent, Model, ModelCard, Proposal, Run, RunEnd, Snapshot
from rlhf_workbench.store.tables import Store, connect

RLHFW = Path(sys.executable).with_name("rlhfw")
DATA = Path(__file__).parents[2] / "shared" / "data" / "preferences"
STEPS = [
    *(
        "ingest_prompts",
        "generate_comparisons",
        "enqueue_batches",
        "annotate_queue",
        "build_consensus",
        "freeze_snapshot",
    ),
    *("train_reward", "train_policy", "calibrate_model", "write_model_cards", "annotate_queue", "watch_drift"),
    "propose_retraining",
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def rlhfw(folder: Path, *words: str) -> dict[str, Any]:
    """What a call prints as JSON; nothing but that may be on stdout."""
    done = subprocess.run([RLHFW, *words, "--json"], cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "off a terminal the program is quiet"
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def figures(store: Store) -> dict[str, Any]:
    """Every figure of every finished run, without ids and paths, which differ from store to store."""
    kinds = {run.id: run.kind for run in store.records(Run)}
    found: dict[str, Any] = {}
    for end in store.records(RunEnd, status="done"):
        plain = {k: v for k, v in end.figures.items() if not _is_name(k)}
        found.setdefault(kinds[end.run_id], []).append(json.dumps(plain, sort_keys=True))
    return found


def _is_name(key: str) -> bool:
    return key.endswith(("_id", "_ids", "seconds", "report", "queues", "sizes", "share_of_topics", "path"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("first")
    facts = rlhfw(folder, "demo", "--fast")
    with connect(folder / "workbench.duckdb", read_only=True) as store:
        return folder, {**facts, "figures": figures(store)}


def test_every_step_ran_and_left_rows(first: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = first
    with connect(folder / "workbench.duckdb", read_only=True) as store:
        runs = store.records(Run)
        assert [run.kind for run in runs][: len(STEPS)] == STEPS
        assert all(end.status == "done" for end in store.records(RunEnd))
        assert all(run.seed == 0 and len(run.code_hash) == 64 and "duckdb" in run.versions for run in runs)
        tokens = store.sql("SELECT sum(output_tokens) AS n FROM run_end")["n"][0]
        assert tokens == store.sql("SELECT sum(output_tokens) AS n FROM generation")["n"][0] > 0
        (snapshot,) = store.records(Snapshot)
        models = [m for m in store.records(Model) if m.kind != "base"]
        assert {m.kind for m in models} == {"reward", "policy"}
        assert all(m.snapshot_id == snapshot.id and m.parents and m.content_hash for m in models)
        assert {card.model_id for card in store.records(ModelCard)} == {m.id for m in models}
        assert store.verify().is_intact


def test_the_alarm_proposes_once_and_waits(first: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = first
    with connect(folder / "workbench.duckdb", read_only=True) as store:
        confirmed = store.records(DriftEvent, is_confirmed=True)
        assert confirmed
        assert all(event.metadata["period"] == "current" for event in confirmed), "none on the control stream"
        assert len(store.records(Proposal)) == 1
    assert [p["state"] for p in rlhfw(folder, "proposals")["proposals"]] == ["waiting"]


def test_the_report_reads_well(first: tuple[Path, dict[str, Any]]) -> None:
    _, facts = first
    cells = nbformat.read(facts["notebook"], 4).cells
    outputs = [o for cell in cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type in ("error", "stream")]
    pages = [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert sum("<img" in page for page in pages) >= 10
    assert all(page.startswith("<p>") and "nan" not in page.split("</p>")[0] for page in pages)
    report = Path(facts["report"]).read_text(encoding="utf-8")
    assert "ingest_prompts" in report
    assert "run_once(" not in report, "the page is for readers, without code"


def test_a_second_demo_reuses_everything(first: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = first
    with connect(folder / "workbench.duckdb", read_only=True) as store:
        before = len(store.records(Run))
    rlhfw(folder, "demo", "--fast")
    with connect(folder / "workbench.duckdb", read_only=True) as store:
        new = [run.kind for run in store.records(Run)][before:]
    assert new == ["propose_retraining"], "only the repeated alarm is tried again"


def test_a_demo_killed_again_and_again_goes_on_where_it_stopped(
    first: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """And the same seed gives the same figures as without the interruptions."""
    finished: set[str] = set()
    for step in ("generate_comparisons", "annotate_queue", "train_reward"):
        process = subprocess.Popen(
            [RLHFW, "demo", "--fast"], cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
        )
        _wait_for_step(tmp_path, step, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
        _wait_until_free(tmp_path / "workbench.duckdb")
        with connect(tmp_path / "workbench.duckdb") as store:
            assert store.verify().is_intact
            done = {end.run_id for end in store.records(RunEnd, status="done")}
        assert done > finished, f"nothing was kept before {step}"
        finished = done
    rlhfw(tmp_path, "demo", "--fast")
    with connect(tmp_path / "workbench.duckdb", read_only=True) as store:
        assert figures(store) == first[1]["figures"]
        assert store.verify().is_intact
        kept = {end.run_id for end in store.records(RunEnd, status="done")}
        assert finished <= kept, "what was finished is used, not done again"
        kinds = pd.Series([run.kind for run in store.records(Run) if run.id in kept]).value_counts()
        assert kinds["train_reward"] == kinds["generate_comparisons"] == 1


def _wait_for_step(folder: Path, step: str, process: "subprocess.Popen[bytes]") -> None:
    """Until the executed copy shows that the cell before the step is done, and a little into it."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        for copy in folder.glob("runs/*/loop.ipynb"):
            try:
                cells = nbformat.read(copy, 4).cells
            except Exception:
                continue
            running = next(
                (c for c in cells if c.cell_type == "code" and "run_once(" in c.source and f"{step}," in c.source), None
            )
            if running is not None and running.metadata.get("papermill", {}).get("status") == "running":
                time.sleep(1.0)
                return
        time.sleep(0.1)
    raise AssertionError(f"{step} was never reached")


def _wait_until_free(path: Path) -> None:
    """The kernel notices within seconds that its parent is gone."""
    from rlhf_workbench.core.errors import StateError

    for _ in range(100):
        try:
            connect(path).close()
            return
        except StateError:
            time.sleep(0.2)
    raise AssertionError("the store stayed locked for 20 s after the kill")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Why?\n\n   \nWhy?\nHow?\nWhere?\n", "3 prompts (2 empty lines and 1 duplicates left out), needs 90"),
        (b"Why?\n" + b"x" * 1_000_000 + b"\n", "line 2"),
        (b"Why?\nHow \xff?\n", "line 2"),
        (b"\n\n", "prompt"),
    ],
)
def test_a_strange_prompts_file_is_refused_before_anything_is_written(
    content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    words = [RLHFW, "demo", "--fast", "--prompts", "p.txt"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    with connect(tmp_path / "workbench.duckdb", read_only=True) as store:
        assert "prompt" not in store.counts()


def test_own_prompts_without_topics(tmp_path: Path) -> None:
    """Empty lines and duplicates are left out, and the report says so."""
    lines = [f"What is the number {i} good for?" for i in range(90)]
    (tmp_path / "p.txt").write_text("\n".join([*lines, "", lines[0]]), encoding="utf-8")
    facts = rlhfw(tmp_path, "demo", "--fast", "--prompts", "p.txt")
    report = Path(facts["report"]).read_text(encoding="utf-8")
    assert "90 prompts in 1 topics; 1 empty lines and 1 duplicates were left out." in report


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, which a user's clone does not have")
def test_people_s_votes(tmp_path: Path) -> None:
    tables = [f"--{name}={DATA}/ukpconvarg1_{table}.parquet" for name, table in (("data", "pairs"), ("votes", "votes"))]
    rlhfw(tmp_path, "demo", "--fast", *tables)
    with connect(tmp_path / "workbench.duckdb", read_only=True) as store:
        counts = store.counts()
        assert counts["comparison"] == 10_749
        assert store.sql("SELECT count(*) AS n FROM annotation WHERE annotator_id <> 'gold'")["n"][0] == 53_630
        found = {run.kind: end.figures for run in store.records(Run) for end in store.records(RunEnd, run_id=run.id)}
    assert found["build_consensus"]["accuracy"] > 0.92
    assert found["train_reward"]["tfidf_accuracy"] > found["train_reward"]["longer_accuracy"] > 0.76
