"""The command line: help that reads well, one line for an error, one object for a program."""

import io
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from rlhf_workbench.cli import app, main
from rlhf_workbench.core.schema import DriftEvent, Prompt, Run
from rlhf_workbench.govern.triggers import propose_retraining
from rlhf_workbench.store.tables import connect


@pytest.fixture
def store_file(tmp_path: Path) -> Path:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        store.append([Prompt(text="<b>Why?</b>", topic="science"), Run(id="d", kind="watch_drift", key="", seed=0)])
        store.append(DriftEvent(stream="topic", detector="chi2", index=3, is_confirmed=True, run_id="d"))
        propose_retraining(store, run_id="t", seed=0, drift_run="d")
    return path


def test_help_names_every_verb_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in app.commands:
        assert f"\n  {name} " in text
        assert f"$ rlhfw {name}" in text


@pytest.mark.parametrize(
    "name", sorted(n for n, command in app.commands.items() if not isinstance(command, click.Group))
)
def test_every_verb_knows_the_shared_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert {"--store", "--seed", "--json"} <= set(text.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dance"], "No such command 'dance'"),
        (["info"], "there is no store"),
        (["info", "--seed", "-1"], "--seed"),
        (["demo", "--data", "x.parquet"], "go together"),
        (["demo", "--prompts", "nowhere.txt"], "there is no file nowhere.txt"),
        (["run", "dance"], "there is no job 'dance'; there are"),
        (["run", "loop", "-p", "speed", "9"], "has no parameter speed"),
        (["approve", "ID", "--reason", "because"], "there is no file"),
        (["approve", "ID"], "--reason"),
        (["sql", "DROP TABLE prompt"], "there is no store"),
    ],
)
def test_a_mistake_is_one_line_and_code_two(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.startswith("rlhfw: ")
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_audit_is_narrowed_by_who_what_and_since(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path, actor="ada") as store:
        store.append(Prompt(text="one"))
    with connect(path, actor="bob") as store:
        store.append(Prompt(text="two"))
        store.append(Run(id="d", kind="watch_drift", key="", seed=0))

    def shown(*words: str) -> list[tuple[str, str]]:
        assert main(["audit", "show", "--store", str(path), "--json", *words]) == 0
        rows = json.loads(capsys.readouterr().out)["changes"]
        return [(row["actor"], row["table_name"]) for row in rows if row["action"] == "append"]

    assert shown() == [("ada", "prompt"), ("bob", "prompt"), ("bob", "run")]
    assert shown("--who", "bob") == [("bob", "prompt"), ("bob", "run")]
    assert shown("--what", "prompt") == [("ada", "prompt"), ("bob", "prompt")]
    assert shown("--who", "bob", "--what", "prompt", "--since", "1h") == [("bob", "prompt")]
    assert shown("--since", "2001-01-01") == shown()
    assert shown("--since", "2999-01-01") == []
    assert shown("--who", "nobody") == []
    assert main(["audit", "show", "--store", str(path), "--what", "prompts"]) == 2
    assert "there is no table 'prompts'; the nearest are prompt" in capsys.readouterr().err
    assert main(["audit", "show", "--store", str(path), "--what", "nothing"]) == 2
    assert len(capsys.readouterr().err) < 200
    assert main(["audit", "show", "--store", str(path), "--since", "soon"]) == 2
    assert "is no moment" in capsys.readouterr().err


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


def test_a_new_plugin_without_its_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    new = ["plugins", "new", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main([*new, "lab-one"]) == 0
    assert "it is an aggregator, because --kind was not given; there are generator" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", Terminal("calibrator\n"))
    assert main([*new, "lab-two"]) == 0
    out = capsys.readouterr().out
    assert "rlhfw plugins check calibrator.lab-two" in out
    assert "was not given" not in out


def test_a_token_for_no_store_says_how_one_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--store", str(tmp_path / "no.duckdb")]
    assert main(["token", "new", "nightly", "--role", "service", *at]) == 2
    assert "or make one with `rlhfw serve`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_object(store_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["info"], ["proposals"], ["audit", "verify"], ["sql", "SELECT text FROM prompt"], ["jobs"]):
        assert main([*words, "--store", str(store_file), "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_a_proposal_is_decided_once(store_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(store_file)]
    main(["proposals", *store, "--json"])
    (waiting,) = json.loads(capsys.readouterr().out)["proposals"]
    assert waiting["state"] == "waiting"
    assert main(["approve", waiting["id"], "--reason", "seen it", "--as", "ada", *store]) == 0
    assert main(["reject", waiting["id"], "--reason", "no", *store]) == 2
    assert "was approved by ada: seen it" in capsys.readouterr().err


def test_a_tampered_store_is_code_one(store_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import duckdb

    assert main(["audit", "verify", "--store", str(store_file)]) == 0
    duckdb.connect(str(store_file)).execute("UPDATE prompt SET text = 'because'").close()
    assert main(["audit", "verify", "--store", str(store_file)]) == 1
    assert "change 1: prompt: a row was edited" in capsys.readouterr().out


def test_the_program_is_installed() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("rlhfw"), "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "0.1.0" in done.stdout
