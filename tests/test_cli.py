"""The command line: help that reads well, one line for an error, one object for a program."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
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
        (["approve", "ID", "--reason", "because"], "there is no store"),
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


def commands(group: click.Group, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name), command


def needed(command: click.Command, file: Path) -> list[str]:
    """Words for all that a command insists on."""
    words: list[str] = []
    for given in (one for one in command.params if one.required):
        values = {"folder": str(file.parent / "new"), "out": str(file.parent / "out")}
        value = (
            str(file) if isinstance(given.type, click.Path) else "https://example.org" if given.name == "url" else "x"
        )
        value = given.type.choices[0] if isinstance(given.type, click.Choice) else values.get(str(given.name), value)
        words += [given.opts[0], value] if isinstance(given, click.Option) else [value]
    return words


MAKES_ONE = {"demo", "run", "import", "serve", "store restore"}
NEEDS_NONE = {
    "drift",
    "jobs",
    "model",
    "store new-key",
    "store unseal",
    "doctor",
    "plugins check",
    "plugins new",
    "trigger check",
}
MORE = {  # a way that leads into the store
    "calibrate": ["--model", "x"],
    "chart note": ["--cause", "x"],
    "form measure": ["--dataset", "x"],
}
IN_STORE = [(words, command) for words, command in commands(app) if " ".join(words) not in MAKES_ONE | NEEDS_NONE]


def test_the_lists_name_commands_that_are_there() -> None:
    names = {" ".join(words) for words, _ in commands(app)}
    assert {*MAKES_ONE, *NEEDS_NONE, *MORE} <= names


@pytest.mark.parametrize(("words", "command"), IN_STORE, ids=[" ".join(words) for words, _ in IN_STORE])
@pytest.mark.parametrize("has_key", [False, True])
def test_every_command_refuses_a_store_that_is_not_there_alike_and_makes_nothing(
    words: tuple[str, ...],
    command: click.Command,
    has_key: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if has_key:
        monkeypatch.setenv("RLHFW_STORE_KEY", "a key of sixteen characters or more")
    monkeypatch.chdir(tmp_path)
    missing, file = tmp_path / "missing.duckdb", tmp_path / "file.yaml"
    file.write_text("rules: []\n")
    name = " ".join(words)
    assert main([*words, *needed(command, file), *MORE.get(name, []), "--store", str(missing)]) == 2, name
    out, err = capsys.readouterr()
    assert f"there is no store {missing}, and one that is there is needed; give its path (--store" in err
    assert (err.count("\n"), out) == (1, "")
    assert [*tmp_path.iterdir()] == [file]


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
