"""rlhfw chart: files, quantities, frozen limits, notes."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlhf_workbench.cli import main
from rlhf_workbench.core.schema import Annotation, ChartSignal, ControlLimits, Observation
from rlhf_workbench.store.tables import connect

START = datetime(2026, 1, 5, tzinfo=UTC)
ORANGE = [12, 15, 8, 10, 4, 7, 16, 9, 14, 10, 5, 6, 17, 12, 22, 8, 10, 5, 13, 11, 20, 18, 24, 15, 9, 12, 7, 13, 9, 6]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: Any) -> Any:
        code = main([str(word) for word in ("chart", *words)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out) if "--json" in words else out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: Any) -> str:
        assert main([str(word) for word in ("chart", *words)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("rlhfw: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture
def juice(tmp_path: Path) -> Path:
    path = tmp_path / "juice.csv"
    pd.DataFrame({"wrong": ORANGE, "cans": 50, "half_hour": range(1, 31)}).to_csv(path, index=False)
    return path


@pytest.fixture
def store_file(tmp_path: Path) -> Path:
    path = tmp_path / "s.duckdb"
    kl = [*np.random.default_rng(4).normal(2, 0.1, 40), 5.0]
    seconds = np.random.default_rng(0).lognormal(3, 0.3, (2, 60))
    with connect(path) as store:
        store.append(
            [
                Observation(stream="kl", value=float(v), model_id="m1", happened_at=START + timedelta(days=i))
                for i, v in enumerate(kl)
            ]
        )
        store.append(
            [
                Annotation(
                    comparison_id=str(i),
                    annotator_id=name,
                    label="tie",
                    seconds=float(s),
                    submitted_at=START + timedelta(minutes=i),
                )
                for name, row in zip(("ada", "ben"), seconds, strict=True)
                for i, s in enumerate(row)
            ]
        )
    return path


def test_a_file_is_charted_with_its_hits(said: Any, juice: Path) -> None:
    facts = said(juice, "--value", "wrong", "--n", "cans", "--rules", "limits", "--json")
    assert facts["kind"] == "p"
    assert [hit["index"] + 1 for hit in facts["hits"]] == [15, 23]
    assert facts["hits"][0] == {"rule": "limits", "index": 14, "points": [14], "panel": "proportion"}
    point = facts["points"][14]
    assert (point["index"], point["value"], point["n"], point["label"]) == (14, 0.44, 50.0, 14)
    assert [round(point[name], 4) for name in ("lower", "center", "upper")] == [0.0524, 0.2313, 0.4102]
    text = said(juice, "--value", "wrong", "--n", "50", "--rules", "limits")
    assert "wrong: p chart of 30 points" in text
    assert "limits at 14: proportion, points 14" in text
    assert said("show", juice, "--value", "wrong", "--n", "50", "--rules", "limits") == text


def test_every_rule_set_and_kind_is_reached(said: Any, juice: Path) -> None:
    assert said(juice, "--value", "wrong", "--rules", "none", "--json")["hits"] == []
    assert said(juice, "--value", "wrong", "--kind", "c", "--json")["kind"] == "c"
    assert said(juice, "--value", "wrong", "--value", "half_hour", "--json")["kind"] == "t2"
    assert (
        said(juice, "--value", "wrong", "--kind", "ewma", "--set", "weight", "0.1", "--json")["parameters"]["weight"]
        == 0.1
    )
    nelson, western = (
        said(juice, "--value", "wrong", "--n", "50", "--rules", r, "--json") for r in ("nelson", "western-electric")
    )
    assert {hit["rule"].rsplit("-", 1)[0] for hit in nelson["hits"]} == {"nelson"}
    assert {hit["rule"].rsplit("-", 1)[0] for hit in western["hits"]} == {"western-electric"}


def test_a_standard_is_given_by_hand(said: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(json.dumps({"x": v, "day": f"2026-01-{i + 1:02}"}) + "\n" for i, v in enumerate([9, 10, 14]))
    )
    words = (path, "--value", "x", "--at", "day", "--set", "mean", "10", "--set", "sigma", "1", "--json")
    facts = said(*words)
    assert facts["parameters"] == {"mean": 10, "sigma": 1}
    assert [hit["index"] for hit in facts["hits"]] == [2]
    assert facts["points"][2]["label"].startswith("2026-01-03")
    cusum = said(*words[:-1], "--kind", "cusum", "--set", "h", "3", "--json")
    assert (cusum["points"][2]["value"], cusum["points"][2]["upper"]) == (3.5, 3.0)
    assert cusum["companion"]["label"] == "sum below"


def test_a_picture_is_written(said: Any, juice: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said(juice, "--value", "wrong", "--plot", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_is_said_in_one_line(refused: Any, juice: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("x\n")
    stuck = tmp_path / "stuck.csv"
    stuck.write_text("x,t\n3,2026-01-02\n3,2026-01-01\n")
    for words, message in (
        ((juice,), "--value"),
        ((tmp_path / "nowhere.csv", "--value", "x"), "there is no file"),
        ((juice, "--value", "cost"), "there is no column 'cost'; there are wrong, cans, half_hour"),
        ((juice, "--value", "wrong", "--n", "9"), "is above its size"),
        ((juice, "--value", "wrong", "--kind", "q"), "there is no chart 'q'"),
        ((juice, "--value", "wrong", "--rules", "murphy"), "there is no set of rules"),
        ((juice, "--value", "wrong", "--set", "weight", "x"), "--set needs a name and a number"),
        ((juice, "--value", "wrong", "--set", "weight", "1"), "has no setting weight"),
        ((juice, "--value", "wrong", "--set", "mean", "1"), "sigma is missing"),
        ((empty, "--value", "x"), "there is no column 'x'"),
        ((stuck, "--value", "x"), "do not vary"),
        ((stuck, "--value", "x", "--at", "t"), "time goes backwards at row 2"),
        (("kl", "--n", "3", "--store", tmp_path / "no.duckdb"), "--n is for a file"),
        (("kl", "--store", tmp_path / "no.duckdb"), "there is no store"),
        (("freeze", "kl", "--store", tmp_path / "no.duckdb"), "--reason"),
        (("freeze", "kl", "--reason", "?", "--store", tmp_path / "no.duckdb"), "there is no store"),
        (("note", "x", "--store", tmp_path / "no.duckdb"), "nothing to note"),
    ):
        assert message in refused(*words), words
    assert not (tmp_path / "no.duckdb").exists()


def test_from_frozen_limits_to_a_noted_cause(said: Any, refused: Any, store_file: Path) -> None:
    store = ("--store", store_file)
    first = said("kl", "--who", "m1", *store, "--json")
    assert (first["name"], first["limits"], len(first["points"])) == ("kl of m1", None, 41)
    words = ("--who", "m1", "--reason", "first 40 days", "--through", (START + timedelta(days=39)).isoformat())
    frozen = said("freeze", "kl", *words, "--as", "ada", *store, "--json")
    assert (frozen["version"], frozen["actor"], frozen["n_points"]) == (1, "ada", 40)
    judged = said("kl", "--who", "m1", *store, "--json")
    assert judged["limits"] == {"id": frozen["id"], "version": 1, "reason": "first 40 days", "n_points": 40}
    assert judged["points"][0]["upper"] < first["points"][0]["upper"]
    assert said("kl", "--who", "m1", "--fresh", *store, "--json")["points"] == first["points"]
    found = said("watch", "--rules", "limits", *store, "--json")
    assert [(one["rule"], one["index"]) for one in found["signals"]] == [("limits", 40), ("limits of moving range", 40)]
    assert said("watch", "--rules", "limits", *store, "--json")["signals"] == []
    pending = said("signals", *store, "--json")["signals"]
    assert [one["wanted"] for one in pending] == ["propose", "propose"]
    noted = said(
        "note", pending[0]["id"], "--cause", "learning rate", "--action", "lowered it", "--as", "ben", *store, "--json"
    )
    assert (noted["cause"], noted["action"], noted["actor"]) == ("learning rate", "lowered it", "ben")
    assert len(said("signals", *store, "--json")["signals"]) == 1
    assert len(said("signals", "--all", *store, "--json")["signals"]) == 2
    assert "there is no chart_signal x" in refused("note", "x", "--cause", "?", *store)
    assert "no limits of version 2" in refused("kl", "--who", "m1", "--version", "2", *store)
    with connect(store_file, read_only=True) as opened:
        assert len(opened.records(ControlLimits)) == 1
        assert len(opened.records(ChartSignal)) == 2
        assert opened.verify().is_intact


def test_one_chart_for_each_annotator(said: Any, refused: Any, store_file: Path) -> None:
    store = ("--store", store_file)
    charts = said("speed", "--by", "annotator", *store, "--json")["charts"]
    assert [one["name"] for one in charts] == ["speed of ada", "speed of ben"]
    assert {one["kind"] for one in charts} == {"xbar_s"}
    assert len(charts[0]["points"]) == 6
    few = said("speed", "--by", "annotator", "--every", "60", *store, "--json")["charts"]
    assert all("not enough data" in one["error"] for one in few)
    hourly = said("speed", "--who", "ada", "--every", "30min", *store, "--json")
    assert [point["n"] for point in hourly["points"]] == [30, 30]
    assert "not by model" in refused("speed", "--by", "model", *store)
    assert "some of ada, ben" in refused("speed", "--who", "eve", *store)
    assert "there is no quantity or stream 'mood'" in refused("mood", *store)


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chart", "--help"]) == 0
    text = capsys.readouterr().out
    assert {"show", "freeze", "watch", "signals", "note"} <= set(text.split())
    assert "$ rlhfw chart gold_accuracy --by annotator" in text


def test_a_chart_of_shares_without_sizes_names_the_option(refused: Any, juice: Path) -> None:
    assert "kind p needs the size of each sample; name its column, or one number for all, with --n" in refused(
        juice, "--value", "wrong", "--kind", "p"
    )
