"""Calibration of models in a store: by slice, when to ask people, over time, in Evidently, as a command and as a job."""

import hashlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.cli import main
from rlhf_workbench.core.schema import (
    Annotation,
    Calibration,
    Comparison,
    Consensus,
    DriftEvent,
    Generation,
    Model,
    Prediction,
    Preference,
    Prompt,
    QueueItem,
    RunEnd,
    StreamState,
)
from rlhf_workbench.monitor.abstention import decide_pairs, doubt_threshold, measure_abstention
from rlhf_workbench.monitor.calibration_watch import CalibrationWatch, calibration_windows, watch_calibration
from rlhf_workbench.monitor.model_calibration import (
    calibrate_model,
    calibrated_predictions,
    correct_probabilities,
    current_calibration,
    doubtful_pairs,
    watch_model,
)
from rlhf_workbench.monitor.slices import calibration_by_slice, human_ceiling, slice_names, spiegelhalter_z
from rlhf_workbench.store.registry import run_once
from rlhf_workbench.store.tables import Store, connect

settings.register_profile("quick", max_examples=25, deadline=None)
settings.load_profile("quick")

Pairs = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]


def pairs(n: int, sharpness: float, rng: np.random.Generator) -> Pairs:
    """Probabilities whose log-odds are `sharpness` times what they should be, and outcomes."""
    logit = rng.normal(size=n) * 1.5
    return 1 / (1 + np.exp(-sharpness * logit)), rng.uniform(size=n) < 1 / (1 + np.exp(-logit))


# Slices


def test_a_slice_is_called_out_by_chance_no_more_often_than_promised() -> None:
    """Twenty slices of a calibrated model, 60 times: some slice is named in about 5 % of the times."""
    named = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        p, better = pairs(1000, 1.0, rng)
        rows = pd.DataFrame({"p_first": p, "first_is_better": better, "topic": rng.integers(0, 20, 1000).astype(str)})
        table = calibration_by_slice(rows, ["topic"], draws=3)
        named += (table["reading"] != "as it says").any()
    assert named <= 8  # 3 expected; more than 8 has a probability of 0.3 %


def test_the_slice_that_is_wrong_is_named_and_in_which_way() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for topic, sharpness in (("good", 1.0), ("sure", 2.5), ("shy", 0.3)):
        p, better = pairs(800, sharpness, rng)
        parts.append(pd.DataFrame({"p_first": p, "first_is_better": better, "topic": topic}))
    few = pd.DataFrame({"p_first": [0.99] * 5, "first_is_better": [False] * 5, "topic": "few"})
    table = calibration_by_slice(pd.concat([*parts, few]), ["topic"]).set_index("slice")
    wanted = {"good": "as it says", "sure": "too sure", "shy": "not sure enough", "few": "not enough data"}
    assert table["reading"].to_dict() == wanted
    assert (table["gap_lo"] <= table["gap"]).drop("few").all()


def test_slices_of_numbers_come_in_the_order_of_the_numbers() -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"p_first": rng.random(400), "first_is_better": rng.random(400) < 0.5, "words": range(5, 405)})
    found = calibration_by_slice(rows, ["words"], draws=3)["slice"]
    assert found.tolist() == ["5 to 104.8", "104.8 to 204.5", "204.5 to 304.2", "304.2 to 404"]


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=20, max_size=60), st.randoms(use_true_random=False))
def test_slices_do_not_depend_on_the_order_of_a_pair(rows: list[tuple[float, bool]], random: Any) -> None:
    swapped = [(1 - p, not b) if random.random() < 0.5 else (p, b) for p, b in rows]
    one, other = (
        calibration_by_slice(pd.DataFrame(part, columns=["p_first", "first_is_better"]).assign(t="x"), ["t"], draws=3)
        for part in (rows, swapped)
    )
    for name in ("accuracy", "confidence", "gap", "z"):
        assert one[name][0] == pytest.approx(other[name][0], abs=1e-6), name


def test_spiegelhalter_is_normal_for_a_calibrated_model() -> None:
    found = []
    for seed in range(300):
        p, better = pairs(200, 1.0, np.random.default_rng(seed))
        confidence = np.maximum(p, 1 - p)
        found.append(spiegelhalter_z(confidence, 1.0 * ((p > 0.5) == better))[0])
    assert abs(np.mean(found)) < 0.2
    assert np.std(found) == pytest.approx(1, abs=0.12)


def test_the_ceiling_is_what_simulated_people_agree() -> None:
    """Five people who are each right with 0.8: one agrees with the majority of the other four as computed."""
    rng = np.random.default_rng(0)
    right = rng.uniform(size=(2000, 5)) < 0.8
    votes = pd.DataFrame(
        {"comparison_id": np.repeat(np.arange(2000), 5), "label": np.where(right.ravel(), "first", "second")}
    )
    p_more, p_level = 0.8192, 0.1536  # of four with 0.8: three or four right; two
    wanted = 0.8 * (p_more + p_level / 2) + 0.2 * (1 - p_more - p_level / 2)
    found = human_ceiling(votes)
    assert found["agreement"] == pytest.approx(wanted, abs=0.015)
    assert found["low"] < wanted < found["high"]
    assert found["comparisons"] == 2000
    turned = votes.assign(label=votes["label"].map({"first": "second", "second": "first"}))
    assert human_ceiling(turned)["agreement"] == pytest.approx(found["agreement"])
    assert np.isnan(human_ceiling(votes.head(1))["agreement"])


# Abstention


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_coverage_holds_for_good_and_bad_models(alpha: float, sharpness: float) -> None:
    covered, wrong = [], []
    for seed in range(150):
        p, better = pairs(260, sharpness, np.random.default_rng(seed))
        found = measure_abstention(p[60:], better[60:], doubt_threshold(p[:60], better[:60], alpha=alpha), alpha)
        covered.append(found.covered)
        wrong.append(found.wrong)
    error = np.std(covered) / np.sqrt(len(covered))
    assert 1 - alpha - 3 * error <= np.mean(covered) <= 1 - alpha + 1 / 61 + 3 * error
    assert np.mean(wrong) <= alpha + 3 * error


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1))
def test_who_decides_does_not_depend_on_the_order(p: list[float], threshold: float) -> None:
    one, other = decide_pairs(p, threshold), decide_pairs(1 - np.array(p), threshold)
    opposite = {"first": "second", "second": "first", "people": "people"}
    near = np.abs(np.minimum(p, 1 - np.array(p)) - threshold) < 1e-9  # 1 - (1 - p) may be on the other side
    near |= np.abs(np.maximum(p, 1 - np.array(p)) - threshold) < 1e-9
    assert [opposite[w] for w in other[~near]] == one[~near].tolist()


def test_too_few_known_pairs_promise_nothing() -> None:
    assert doubt_threshold([0.9] * 8, [1] * 8, alpha=0.1) == 1.0
    assert doubt_threshold([0.9] * 9, [1] * 9, alpha=0.1) == pytest.approx(0.1)
    assert (decide_pairs([0.999, 0.001], 1.0) == "people").all()


# The watch


def test_the_budget_of_false_alarms_is_kept_and_not_wasted() -> None:
    """30,000 rows of a calibrated model with a budget of one in 500: at most 60 on average."""
    p, better = pairs(30_000, 1.0, np.random.default_rng(0))
    exact = watch_calibration(p, better, watch=CalibrationWatch(budget=1 / 500, tolerance=0))
    assert 15 <= len(exact) <= 60 + 3 * 60**0.5
    tolerant = watch_calibration(p[:10_000], better[:10_000], watch=CalibrationWatch(budget=1 / 500))
    assert len(tolerant) <= 20


@pytest.mark.parametrize(("sharpness", "reading"), [(2.0, "too sure"), (0.4, "not sure enough")])
def test_a_change_is_noticed_soon_and_named(sharpness: float, reading: str) -> None:
    delays, names = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        parts = pairs(1000, 1.0, rng), pairs(1500, sharpness, rng)
        p, better = (np.concatenate(values) for values in zip(*parts, strict=True))
        alarms = [a for a in watch_calibration(p, better) if a.index >= 1000]
        delays.append(alarms[0].index - 1000)
        names.append(alarms[0].metadata["reading"].startswith(reading))
        low, high = alarms[0].metadata["gap_interval"]
        assert low <= alarms[0].metadata["gap"] <= high
    assert np.median(delays) < 600
    assert sum(names) >= 5


def test_the_watch_goes_on_where_it_stopped() -> None:
    p, better = pairs(900, 1.8, np.random.default_rng(1))
    whole = CalibrationWatch(budget=1e-2)
    told = [e.index for e in watch_calibration(p, better, watch=whole)]
    parts, watch = [], CalibrationWatch(budget=1e-2)
    for cut in (slice(0, 1), slice(1, 437), slice(437, 900)):
        parts += [e.index for e in watch_calibration(p[cut], better[cut], watch=watch)]
        watch = CalibrationWatch(**json.loads(json.dumps(watch.state())))
    assert parts == told != []
    assert watch.state() == whole.state()


def test_windows_hold_every_row_once() -> None:
    p, better = pairs(1049, 1.0, np.random.default_rng(0))
    table = calibration_windows(p, better, window=100)
    assert table["n"].sum() == 1049
    assert (table["start"][1:].to_numpy() == table["end"][:-1].to_numpy()).all()
    assert table["n"].min() >= 50


# Models in a store


def filled(store: Store, n: int, *, sharpness: float = 2.0, seed: int = 0, people: int = 3) -> str:
    """A model's predictions on n comparisons, odd ones in the test split, with votes; its id."""
    rng = np.random.default_rng(seed)
    prompts = [Prompt(text="Why <b>?", topic="<script>science"), Prompt(text="How do I cook rice?", topic=None)]
    model = Model(name="reward <script>alert(1)</script>", kind="reward", snapshot_id="s1")
    rows: list[Any] = [*prompts, model]
    p, better = pairs(n, sharpness, rng)
    for i in range(n):
        prompt = prompts[i % 2]
        first, second = (
            Generation(prompt_id=prompt.id, text=f"{side} {'word ' * int(rng.integers(1, 30))}") for side in "ab"
        )
        pair = Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id)
        texts = (first.text, second.text) if better[i] else (second.text, first.text)
        about: dict[str, Any] = {"comparison_id": pair.id, "split": "test" if i % 2 else "calibration"}
        told = {
            "snapshot_id": "s1",
            "prompt": [],
            "chosen": texts[0],
            "rejected": texts[1],
            "p_chosen": 0.6 + 0.1 * (i % 4),
        }
        rows += [
            first,
            second,
            pair,
            Preference(**told, **about),
            Prediction(model_id=model.id, p_first=float(p[i]), **about),
        ]
        for k in range(people):
            says = bool(better[i]) == (rng.uniform() < 0.85)
            rows.append(Annotation(comparison_id=pair.id, annotator_id=f"p{k}", label="first" if says else "second"))
    store.append(rows)
    return model.id


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A store with a calibrated model; the figures."""
    pytest.importorskip("evidently")
    path = tmp_path_factory.mktemp("calibrated") / "s.duckdb"
    with connect(path) as store:
        model_id = filled(store, 400)
        figures = run_once(store, calibrate_model, seed=0, model_id=model_id, method="beta").figures
    return path, model_id, figures


def test_what_was_learnt_is_kept_with_the_model_and_used(calibrated: tuple[Path, str, dict[str, Any]]) -> None:
    path, model_id, figures = calibrated
    with connect(path, read_only=True) as store:
        kept = current_calibration(store, model_id)
        assert kept is not None
        assert (kept.id, kept.method, kept.n_fitted, kept.snapshot_id) == (figures["calibration_id"], "beta", 200, "s1")
        assert store.get(Calibration, kept.id).run_id == store.records(RunEnd)[0].run_id
        said = calibrated_predictions(store, model_id)
        assert said["p_calibrated"].tolist() == correct_probabilities(kept, said["p_first"]).tolist()
        swapped = correct_probabilities(kept, 1 - said["p_first"])
        assert (1 - swapped) == pytest.approx(said["p_calibrated"], abs=1e-9)
        shrunk = (said["p_calibrated"] - 0.5).abs() <= (said["p_first"] - 0.5).abs() + 0.02
        assert shrunk.mean() > 0.95, "a model that is too sure becomes less sure"
        assert correct_probabilities(None, [0.3]).tolist() == [0.3]
        assert store.verify().is_intact


def test_the_figures_say_for_whom_and_how_far(calibrated: tuple[Path, str, dict[str, Any]]) -> None:
    _, _, figures = calibrated
    slices = pd.DataFrame(figures["slices"])
    assert set(slices["by"]) == {"topic", "prompt_words", "longer_words", "strength", "annotator_id"}
    assert set(slices.loc[slices["by"] == "annotator_id", "slice"]) == {"p0", "p1", "p2"}
    assert slices.loc[slices["by"] == "topic", "n"].sum() == 200
    assert 0.75 < figures["human_ceiling"]["agreement"] < 0.95
    assert figures["abstention"]["covered"] > 0.8
    assert figures["abstention"]["decided"] + 1e-9 >= figures["abstention"]["wrong"]


def test_files_are_what_the_run_says_they_are(calibrated: tuple[Path, str, dict[str, Any]]) -> None:
    path, _, figures = calibrated
    with connect(path, read_only=True) as store:
        for name, key in (("report", "sha256_of_report"), ("json_report", "sha256_of_json_report")):
            file = store.files() / figures[name]
            assert hashlib.sha256(file.read_bytes()).hexdigest() == figures[key]
        found = json.loads((store.files() / figures["json_report"]).read_text(encoding="utf-8"))
        page = (store.files() / figures["report"]).read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert "Expected calibration error" in page
    titles = json.dumps(found)
    for part in ("ece", "debiased_ece", "ValueDrift", "DriftedColumnsCount", "RowCount", "longer_words", "topic"):
        assert part in titles, f"{part} is missing in the report"


def test_the_suite_fails_when_the_calibration_is_bad() -> None:
    pytest.importorskip("evidently")
    with connect(":memory:") as store:
        figures = calibrate_model(store, run_id="r", seed=0, model_id=filled(store, 400, sharpness=4), method="none")
    verdicts = {name.split(":")[0]: verdict for name, verdict in figures["tests"].items()}
    assert verdicts["Expected calibration error (15 bins)"] == "FAIL"
    assert verdicts["Negative log-likelihood"] == "SUCCESS", "none leaves it as it was"


def test_the_workspace_opens_in_another_process_by_evidently_alone(
    calibrated: tuple[Path, str, dict[str, Any]],
) -> None:
    path, _, figures = calibrated
    with connect(path, read_only=True) as store:
        folder = store.files("evidently")
    code = """
import json, sys
from evidently.ui.workspace import Workspace
workspace = Workspace(sys.argv[1])
(project,) = workspace.list_projects()
(run,) = workspace.list_runs(project.id)
model = workspace.get_run(project.id, run)
results = [r for r in model.metric_results.values() if r.display_name.startswith("Expected calibration")]
print(json.dumps([str(project.id), str(run), results[0].value, len(project.dashboard.model().panels)]))
assert not any(name.startswith("rlhf_workbench") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=200, env={"DO_NOT_TRACK": "1", "PATH": "/usr/bin"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    project, run, value, panels = json.loads(done.stdout.splitlines()[-1])
    assert (project, run) == (figures["evidently_project_id"], figures["evidently_run_id"])
    assert value == pytest.approx(figures["ece_after"])
    assert panels >= 6


@pytest.mark.server
def test_the_ui_shows_the_report_and_asks_nobody(calibrated: tuple[Path, str, dict[str, Any]]) -> None:
    """Evidently's own server on loopback; every other connection of its process is refused and would be seen."""
    path, _, figures = calibrated
    with connect(path, read_only=True) as store:
        folder = store.files("evidently")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = """
import socket, sys
from pathlib import Path
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        print("CALLS", address, file=sys.stderr, flush=True)
        raise OSError("refused")
    return real(self, address)
socket.socket.connect = connect
from rlhf_workbench.monitor.workspace import serve_workspace
serve_workspace(Path(sys.argv[1]), int(sys.argv[2]))
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(port)], stderr=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{port}/api/projects/{figures['evidently_project_id']}"
        listed = json.loads(_patient(f"{address}/reports", process))
        shown = json.loads(_patient(f"{address}/{figures['evidently_run_id']}/data", process))
    finally:
        process.terminate()
        _, said = process.communicate(timeout=20)
    assert figures["evidently_run_id"] in json.dumps(listed)
    assert "Expected calibration error" in json.dumps(shown)
    assert "CALLS" not in said


def _patient(address: str, process: "subprocess.Popen[str]") -> bytes:
    """What an address answers, as soon as the server is there."""
    for _ in range(400):
        try:
            with urllib.request.urlopen(address, timeout=20) as answer:
                body: bytes = answer.read()
                return body
        except OSError:
            assert process.poll() is None, "the server is gone"
            time.sleep(0.25)
    raise AssertionError(f"{address} did not answer")


def test_pairs_with_too_much_doubt_go_to_a_queue_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("evidently")
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        model_id = filled(store, 200, people=0)
        answers = [Generation(prompt_id="p", text=text) for text in "ab"]
        new = [Comparison(prompt_id="p", first_id=answers[0].id, second_id=answers[1].id) for _ in range(4)]
        said = zip(new, (0.999, 0.45, 0.001, 0.53), strict=True)
        store.append([*answers, *new, *(Prediction(model_id=model_id, comparison_id=c.id, p_first=p) for c, p in said)])
        assert doubtful_pairs(store, model_id) == [new[3].id, new[1].id]
    words = ["calibrate", "--model", model_id, "--method", "temperature", "--store", str(path), "--ask", "doubts"]
    for asked in (2, 0):
        assert main([*words, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["asked"] == asked
    assert facts["open_with"].startswith("DO_NOT_TRACK=1 evidently ui --workspace")
    with connect(path, read_only=True) as store:
        assert sorted(i.comparison_id for i in store.records(QueueItem, queue="doubts")) == sorted(
            [new[1].id, new[3].id]
        )
    assert main(["calibrate", "--model", "nobody", "--store", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_is_watched_from_run_to_run_and_each_alarm_is_recorded_once() -> None:
    """Outcomes also come from the consensus of later comparisons; those used for fitting are left out."""
    with connect(":memory:") as store:
        model_id = filled(store, 100, sharpness=1.0, people=0)
        first = watch_model(store, run_id="r1", seed=0, model_id=model_id, budget=1e-2, tolerance=0.05)
        assert (first["rows"], first["alarms"]) == (50, 0)
        rng = np.random.default_rng(5)
        p, better = pairs(600, 4.0, rng)
        rows: list[Any] = []
        for value, is_first in zip(p, better, strict=True):
            pair = Comparison(prompt_id="p", first_id="a", second_id="b")
            said = {"p_first": float(is_first), "p_second": 1.0 - is_first, "label": "first" if is_first else "second"}
            rows += [pair, Consensus(comparison_id=pair.id, method="majority", n_votes=3, **said)]
            rows.append(Prediction(model_id=model_id, comparison_id=pair.id, p_first=float(value)))
        store.append(rows)
        second = watch_model(store, run_id="r2", seed=0, model_id=model_id, budget=1e-2, tolerance=0.05)
        third = watch_model(store, run_id="r3", seed=0, model_id=model_id, budget=1e-2, tolerance=0.05)
        assert (second["rows"], second["seen"], third["rows"]) == (600, 650, 0)
        events = store.records(DriftEvent, stream=f"calibration/{model_id}")
        assert [e.id for e in events] == second["event_ids"] != []
        assert all(e.is_confirmed and e.happened_at and 0 < e.severity <= 1 for e in events)
        assert store.records(StreamState)[-1].seen == 650


@pytest.mark.slow
def test_the_job_runs_for_the_newest_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("papermill")
    pytest.importorskip("evidently")
    with connect(tmp_path / "s.duckdb") as store:
        filled(store, 300)
    words = ["run", "calibrate", "--store", str(tmp_path / "s.duckdb"), "--out", str(tmp_path / "runs"), "--json"]
    assert main(words) == 0
    page = Path(json.loads(capsys.readouterr().out)["report"]).read_text(encoding="utf-8")
    assert "held-out pairs the ECE is" in page
    assert "misses tolerated" in page
    assert "<script>science" not in page
    with connect(tmp_path / "s.duckdb", read_only=True) as store:
        assert len(store.records(Calibration)) == 1
        assert [end.status for end in store.records(RunEnd)] == ["done", "done"]


def test_slices_of_numbers_that_agree_in_many_digits_stay_apart() -> None:
    moments = pd.Series(1_700_000_000 + np.arange(200.0))
    names = slice_names(moments)
    assert names.value_counts(sort=False).tolist() == [50] * 4
    assert names.iloc[0] == "1.7e+09 to 1.70000005e+09"
