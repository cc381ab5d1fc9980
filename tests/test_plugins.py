"""Plugins: contracts that catch what they are meant for, faults that carry a name, packages that install and work."""

import copy
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlhf_workbench.cli import main
from rlhf_workbench.core import formats
from rlhf_workbench.core.contracts import broken_promises, check_plugin, plugin_checks
from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.messages import Example
from rlhf_workbench.core.packages import module_name, new_package
from rlhf_workbench.core.plugins import (
    GROUP,
    PROTOCOLS,
    PluginError,
    find_plugin,
    find_plugins,
    kind_of_plugin,
    load_plugin,
    plugin_table,
)
from rlhf_workbench.core.schema import Alert, Comparison, Generation, Prompt
from rlhf_workbench.core.starters import STARTERS
from rlhf_workbench.monitor.detectors import StreamWatch
from rlhf_workbench.quality.consensus import aggregate_votes
from rlhf_workbench.store.exchange import export_dataset, import_file
from rlhf_workbench.store.tables import connect

OURS = [
    plugin for plugin in find_plugins() if plugin.distribution == "rlhf_workbench" and plugin.name != "smollm2-135m"
]
PROMISES = {kind: list(dict(plugin_checks(starter))) for kind, starter in STARTERS.items()}


@pytest.mark.parametrize("plugin", OURS, ids=lambda p: f"{p.kind}.{p.name}")
def test_own_parts_keep_their_contracts(plugin: Any) -> None:
    check_plugin(plugin)


def test_own_parts_cover_every_kind() -> None:
    assert {plugin.kind for plugin in OURS} == set(PROTOCOLS) == set(STARTERS)
    assert all(PROMISES.values())


# Every check is shown one plugin that breaks just its promise: a starter with one method wrapped.


def spoil(kind: str, **methods: Callable[..., Any]) -> type[Any]:
    """A starter some of whose methods are replaced; each gets the class it replaces as first argument."""
    good = STARTERS[kind]

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: method(super(spoilt, self), *args, **kwargs)

    spoilt = type(f"Spoilt{good.__name__}", (good,), {name: wrap(method) for name, method in methods.items()})
    return spoilt


_count = iter(range(10**9))


def generator(change: Callable[[list[str]], list[str]]) -> type[Any]:
    return spoil("generator", answer=lambda good, asked, *, seed=0: change(good.answer(asked, seed=seed)))


def source(change: Callable[[pd.DataFrame], pd.DataFrame]) -> type[Any]:
    return spoil("source", annotate=lambda good, pairs, *, seed=0: change(good.annotate(pairs, seed=seed)))


def aggregator(change: Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame]) -> type[Any]:
    return spoil("aggregator", aggregate=lambda good, votes, labels: change(good.aggregate(votes, labels), votes))


def acquisition(change: Callable[[Any, int], Any]) -> type[Any]:
    return spoil("acquisition", select=lambda good, features, k, **kw: change(good.select(features, k, **kw), k))


def measured(change: Callable[[float, str], float]) -> type[Any]:
    return spoil("symbol", measure=lambda good, prompt, answer: change(good.measure(prompt, answer), answer))


def idle(seconds: float) -> float:
    """Burn a processor for a while."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return 0.0


def touch(name: str, kind: str, spoiler: Callable[[Any], None]) -> type[Any]:
    """A starter that changes its first argument afterwards."""

    def method(good: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        found = copy.deepcopy(getattr(good, name)(given, *args, **kwargs))
        spoiler(given)
        return found

    return spoil(kind, **{name: method})


def lenient(name: str, kind: str, instead: Any) -> type[Any]:
    """A starter that answers where it must refuse."""

    def method(good: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(good, name)(*args, **kwargs)
        except InputError:
            return instead

    return spoil(kind, **{name: method})


def mirrored(posterior: pd.DataFrame) -> pd.DataFrame:
    """A little probability taken from the second and given to the first."""
    moved = 0.02 * posterior["second"]
    return posterior.assign(first=posterior["first"] + moved, second=posterior["second"] - moved)


def towards_first_vote(posterior: pd.DataFrame, votes: pd.DataFrame, by: str | None) -> pd.DataFrame:
    """Half the weight goes to one vote: the first in the table, or the one whose annotator comes first by name."""
    first = (votes.sort_values(by) if by else votes).drop_duplicates("task").set_index("task")["label"]
    told = pd.get_dummies(first).reindex(index=posterior.index, columns=posterior.columns, fill_value=0).astype(float)
    return (posterior + told) / 2


class Early(STARTERS["detector"]):  # type: ignore[misc,name-defined]
    """Raises an alarm at a 1 that comes fifth, after a 0."""

    seen = 0

    def update(self, value: float) -> bool:
        self.seen += 1
        return bool(super().update(value)) or (self.seen == 5 and value == 1 and 0 in self.recent)

    def state(self) -> dict[str, Any]:
        return super().state() | {"seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.seen = state.get("seen", self.seen)


class Bored(Early):
    """Raises an alarm after 100 equal values."""

    def update(self, value: float) -> bool:
        is_alarm = bool(STARTERS["detector"].update(self, value))
        self.seen = self.seen + 1 if not self.recent or set(self.recent) == {value} else 0
        return is_alarm or self.seen == 100


BROKEN: dict[str, type[Any]] = {
    "generator.one_text_each": generator(lambda said: [*said[:-1], " "] if said else said),
    "generator.same_seed": generator(lambda said: [f"{text} {next(_count)}" for text in said]),
    "generator.nothing_asked": generator(lambda said: said or ["What?"]),
    "generator.no_question": lenient("answer", "generator", ["What?"]),
    "generator.input_untouched": touch("answer", "generator", lambda asked: asked and asked.reverse()),
    "source.known_words": source(lambda votes: votes.replace({"label": {"first": "left"}})),
    "source.about_the_pairs": source(lambda votes: votes.assign(task="t99").drop_duplicates("task")),
    "source.one_vote_each": source(lambda votes: pd.concat([votes, votes])),
    "source.same_seed": source(lambda votes: votes.assign(worker=f"w{next(_count)}")),
    "source.nothing_asked": source(
        lambda votes: votes if len(votes) else pd.DataFrame([("t0", "w", "tie")], columns=list(votes))
    ),
    "source.missing_column": lenient("annotate", "source", pd.DataFrame(columns=["task", "worker", "label"])),
    "source.input_untouched": touch("annotate", "source", lambda pairs: pairs.insert(0, "seen", True)),
    "aggregator.a_row_a_task": aggregator(lambda p, _: p.assign(sure=0.0)),
    "aggregator.rows_sum_to_one": aggregator(lambda p, _: p * (1 - 1e-5)),
    "aggregator.follows_agreement": aggregator(lambda p, _: p.assign(first=1 - p["tie"], second=0.0)),
    "aggregator.row_order": aggregator(lambda p, votes: towards_first_vote(p, votes, None)),
    "aggregator.worker_names": aggregator(lambda p, votes: towards_first_vote(p, votes, "worker")),
    "aggregator.label_swap": aggregator(lambda p, _: mirrored(p)),
    "aggregator.same_again": aggregator(lambda p, _: p * (1 + 1e-9 * next(_count))),
    "aggregator.unknown_label": lenient("aggregate", "aggregator", None),
    "aggregator.no_votes": lenient("aggregate", "aggregator", pd.DataFrame()),
    "aggregator.input_untouched": touch("aggregate", "aggregator", lambda v: v.sort_values("label", inplace=True)),
    "calibrator.stays_a_probability": spoil("calibrator", apply=lambda good, p, f: good.apply(p, f) * 3 - 1),
    "calibrator.monotone_if_it_says_so": spoil(
        "calibrator", apply=lambda good, p, f: np.where(np.abs(np.asarray(p) - 0.5) > 0.499, 0.5, good.apply(p, f))
    ),
    "calibrator.swap": spoil("calibrator", apply=lambda good, p, f: good.apply(p, f) ** 1.01),
    "calibrator.does_no_harm": spoil("calibrator", apply=lambda good, p, f: 0.5 + 0.01 * (np.asarray(p) - 0.5)),
    "calibrator.keeps_as_json": spoil("calibrator", fit=lambda good, p, y: good.fit(p, y) | {"seen": {1, 2}}),
    "calibrator.bad_input": lenient("fit", "calibrator", {"factor": 1.0}),
    "calibrator.same_again": spoil("calibrator", fit=lambda good, p, y: good.fit(p, y) | {"at": next(_count)}),
    "calibrator.input_untouched": touch("fit", "calibrator", lambda p: p.sort()),
    "exporter.writes_the_plain_case": spoil("exporter", write=lambda good, e: [good.write(e)]),
    "exporter.round_trip": spoil(
        "exporter", read=lambda good, row: replace(good.read(row), answers=good.read(row).answers[::-1])
    ),
    "exporter.json_rows": spoil("exporter", write=lambda good, e: good.write(e) | {7: True}),
    "exporter.same_again": spoil("exporter", write=lambda good, e: good.write(e) | {"at": next(_count)}),
    "exporter.foreign_row": lenient("read", "exporter", Example(messages=[], answers=())),
    "exporter.wrong_number_of_answers": spoil(
        "exporter",
        write=lambda good, e: good.write(e if len(e.answers) == 2 else replace(e, answers=e.answers * 2)),
        read=lambda good, row: (
            replace(e, answers=e.answers[:1], is_good=row["better"][0]["content"] == "An apple.")
            if (e := good.read(row)).answers[0] == e.answers[1]
            else e
        ),
    ),
    "exporter.input_untouched": touch(
        "write", "exporter", lambda e: e.messages.append({"role": "user", "content": ""})
    ),
    "acquisition.k_different_pairs": acquisition(lambda found, k: np.repeat(found[:1], k)),
    "acquisition.knows_what_was_asked": spoil(
        "acquisition",
        select=lambda good, f, k, *, asked=(), **kw: good.select(f, k + (len(asked) > 0), **kw),
    ),
    "acquisition.same_seed": acquisition(lambda found, k: np.roll(found, next(_count))),
    "acquisition.k_out_of_range": lenient("select", "acquisition", np.arange(30)),
    "acquisition.input_untouched": touch("select", "acquisition", lambda features: features.sort(axis=0)),
    "curriculum.every_row_once": spoil("curriculum", order=lambda good, d, *, seed=0: good.order(d, seed=seed)[1:]),
    "curriculum.same_seed": spoil(
        "curriculum", order=lambda good, d, *, seed=0: np.roll(good.order(d, seed=seed), next(_count))
    ),
    "curriculum.input_untouched": touch("order", "curriculum", lambda d: d.sort()),
    "detector.silent_on_few": Early,
    "detector.silent_when_constant": Bored,
    "detector.notices_a_shift": spoil("detector", update=lambda good, v: good.update(v) and False),
    "detector.replay_is_identical": spoil("detector", update=lambda good, v: good.update(v) and next(_count) % 2 == 0),
    "detector.state_survives": spoil("detector", restore=lambda good, state: good.restore(state | {"recent": []})),
    "detector.value_out_of_range": lenient("update", "detector", False),
    "channel.takes_every_alert": spoil(
        "channel", send=lambda good, a: good.send(a) if a.title.isprintable() else 1 / 0
    ),
    "channel.returns_nothing": spoil("channel", send=lambda good, a: good.send(a) or True),
    "channel.input_untouched": touch("send", "channel", lambda alert: alert.metadata.clear()),
    "symbol.from_zero_to_one": measured(lambda value, text: 2.0 if text.startswith("?!") else value),
    "symbol.examples_come_out_right": measured(lambda value, text: 0.0 if "more questions" in text else value),
    "symbol.has_a_name": type("Named", (STARTERS["symbol"],), {"name": "Offers More"}),
    "symbol.nothing_said": measured(lambda value, text: value if text.strip() else 0.2),
    "symbol.blank_around": measured(lambda value, text: value if text == text.strip() else value * 0.9),
    "symbol.same_again": measured(lambda value, text: value * (1 - 1e-9 * (next(_count) % 1000))),
    "symbol.long_texts_are_quick": measured(lambda value, text: value if len(text) < 1e5 else idle(2.1)),
}
# What a broken plugin breaks besides, because the one follows from the other.
ALSO = {
    "aggregator.a_row_a_task": {"follows_agreement", "row_order", "worker_names", "label_swap", "same_again"},
    "aggregator.same_again": {"rows_sum_to_one"},
    "aggregator.follows_agreement": {"label_swap"},
    "aggregator.unknown_label": {"no_votes"},
    "aggregator.no_votes": {"unknown_label"},
    "calibrator.stays_a_probability": {"does_no_harm", "swap"},
    "exporter.writes_the_plain_case": {"round_trip", "json_rows", "input_untouched"},
    "exporter.json_rows": {"round_trip", "input_untouched", "same_again"},
    "calibrator.keeps_as_json": {"same_again"},
    "detector.replay_is_identical": {"state_survives", "notices_a_shift"},
    "calibrator.input_untouched": {"bad_input"},
    "symbol.same_again": {"blank_around"},
}


def test_every_check_is_shown_a_plugin_that_breaks_it() -> None:
    assert set(BROKEN) == {f"{kind}.{check}" for kind, checks in PROMISES.items() for check in checks}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_caught_by_the_check_meant_for_it(name: str) -> None:
    kind, check = name.split(".")
    broken = broken_promises(BROKEN[name], kind)
    assert check in broken
    assert set(broken) <= {check} | ALSO.get(name, set()), broken
    assert not broken_promises(STARTERS[kind])


def test_the_error_lists_every_broken_promise_and_departures_are_not_asked() -> None:
    broken = BROKEN["aggregator.unknown_label"]
    with pytest.raises(PluginError, match=r"breaks 2 of 10 promises:\n  unknown_label: .*\n  no_votes: "):
        check_plugin(broken)
    honest = type("Honest", (broken,), {"departures": {"unknown_label": "why not", "no_votes": "why not"}})
    check_plugin(honest)
    assert len(dict(plugin_checks(honest))) == 8
    with pytest.raises(InputError, match="no_votess"):
        check_plugin(type("Slip", (broken,), {"departures": {"no_votess": "slip"}}))


def test_an_object_that_is_two_kinds_needs_the_kind_said() -> None:
    both = type("Both", (STARTERS["channel"], STARTERS["curriculum"]), {})
    with pytest.raises(InputError, match="name the kind"):
        kind_of_plugin(both())
    check_plugin(both, "channel")
    with pytest.raises(InputError, match="is no plugin"):
        check_plugin(dict)


# Faults carry a name, and the others go on.


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts packages with plugins onto the path."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    formats._plugin_format.cache_clear()
    modules: list[str] = []

    def put(distribution: str, code: str, *entries: str, version: str = "1.2") -> None:
        module = distribution.replace("-", "_")
        modules.append(module)
        (folder / f"{module}.py").write_text(code)
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"{entry} = {module}:{entry.rpartition('.')[2]}" for entry in entries]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
        importlib.invalidate_caches()

    yield put
    formats._plugin_format.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


SEND = "    def send(self, alert):\n        {}\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1 / 0", r"failed when it was imported \(ZeroDivisionError: division by zero\)"),
        ("import sys; sys.exit(3)", r"failed when it was imported \(SystemExit: 3\)"),
        (
            "from rlhf_workbench.core.errors import InputError\nraise InputError('x')",
            r"failed when it was imported \(InputError: x\)",
        ),
        ("other = 1", r"failed when it was imported \(AttributeError: .*'part'\)"),
        ("part = 1", r"failed when it was made \(TypeError: 'int' object is not callable\)"),
        ("class part:\n    def __init__(self): self.x", r"failed when it was made \(AttributeError: "),
        ("class part:\n    pass", r"is no channel: part lacks send"),
        ("class part:\n" + SEND.format("{}['a']"), r"failed in send \(KeyError: 'a'\)"),
        ("class part:\n" + SEND.format("raise SystemExit"), r"failed in send \(SystemExit\)"),
        ("class part:\n" + SEND.format("self.send(alert)"), r"failed in send \(RecursionError: "),
    ],
)
def test_a_plugin_that_raises_is_named_and_the_others_go_on(shelf: Callable[..., None], code: str, said: str) -> None:
    shelf("lab-broken", code, "channel.part")
    shelf("lab-fine", "class fine:\n" + SEND.format("self.last = alert.title"), "channel.fine")
    alert = Alert(severity="info", title="hello")
    with pytest.raises(PluginError, match=r"channel plugin 'part' of lab-broken 1.2 " + said):
        load_plugin("channel", "part").send(alert)
    fine = load_plugin("channel", "fine")
    fine.send(alert)
    assert fine.last == "hello"
    states = plugin_table().set_index("distribution")["state"]
    assert states["lab-fine"] == "ok"
    assert ("lab-broken 1.2" in states["lab-broken"]) == ("in send" not in said)
    assert (states.loc["rlhf_workbench"] == "ok").all()


def test_nothing_is_imported_before_it_is_used(shelf: Callable[..., None]) -> None:
    shelf("lab-lazy", "class part:\n" + SEND.format("pass"), "channel.part")
    assert find_plugin("channel", "part").version == "1.2"
    assert "lab_lazy" not in sys.modules
    load_plugin("channel", "part")
    assert "lab_lazy" in sys.modules


def test_the_command_that_checks_tells_by_its_exit_code(
    shelf: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    good = "from rlhf_workbench.core.starters import ThreeBands as bands\n"
    code = good + "class short(bands):\n    def order(self, *a, **k): return super().order(*a, **k)[1:]"
    shelf("lab-order", code, "curriculum.bands", "curriculum.short")
    assert main(["plugins", "check", "bands"]) == 0
    assert "curriculum bands of lab-order 1.2: 3 of 3 kept" in capsys.readouterr().out
    assert main(["plugins", "check", "curriculum.short", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["is_kept"]
    assert {name for name, state in said["checks"].items() if state != "ok"} == {"every_row_once"}
    assert main(["plugins", "check", "curriculum.nothing"]) == 2
    assert "installed: bands, quick" in capsys.readouterr().err


def test_errors_on_purpose_stay_what_they_are(shelf: Callable[..., None]) -> None:
    body = SEND.format("raise InputError('no title')")
    shelf("lab-strict", f"from rlhf_workbench.core.errors import InputError\nclass part:\n{body}", "channel.part")
    with pytest.raises(InputError, match=r"^no title$"):
        load_plugin("channel", "part").send(Alert(severity="info", title=""))


def test_two_packages_with_one_name_are_both_named(shelf: Callable[..., None]) -> None:
    for name in ("lab-one", "lab-two"):
        shelf(name, "class part:\n" + SEND.format("pass"), "channel.part")
    with pytest.raises(StateError, match=r"lab-one 1.2 and lab-two 1.2 both bring a channel 'part'"):
        find_plugin("channel", "part")
    states = plugin_table().set_index("distribution")["state"]
    assert states["lab-one"].startswith("broken: ")


def test_entry_points_of_no_kind_are_listed_as_broken(shelf: Callable[..., None]) -> None:
    shelf("lab-odd", "class part:\n    pass", "gizmo.part", "part")
    states = plugin_table().set_index("distribution").loc["lab-odd", "state"]
    assert states.str.contains("entry points are named KIND.NAME").all()


def test_what_a_plugin_prints_does_not_spoil_json(
    shelf: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    shelf("lab-loud", "print('hello')\nclass part:\n" + SEND.format("print('ding')"), "channel.part")
    assert main(["plugins", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["plugins"]
    assert "hello" in err
    assert main(["plugins", "check", "part", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_kept"]


# Used by name.


def test_an_aggregator_of_a_plugin_is_a_method_of_consensus(shelf: Callable[..., None]) -> None:
    code = "from rlhf_workbench.core.starters import SmoothedMajority as smooth\n"
    code += "class counts:\n    def aggregate(self, votes, labels): return votes\n"
    code += (
        "class halves(smooth):\n    def aggregate(self, votes, labels): return super().aggregate(votes, labels) / 2\n"
    )
    shelf("lab-votes", code, "aggregator.smooth", "aggregator.counts", "aggregator.halves")
    votes = pd.DataFrame([("t1", "a", "first"), ("t1", "b", "first")], columns=["task", "worker", "label"])
    found = aggregate_votes(votes, "smooth")
    assert found.posterior.loc["t1", "first"] == pytest.approx((2 + 1 / 3) / 3)
    assert found.annotators["accuracy"].tolist() == pytest.approx([(2 + 1 / 3) / 3] * 2)
    for name in ("counts", "halves"):
        with pytest.raises(PluginError, match=rf"'{name}' of lab-votes 1.2 returned no posterior"):
            aggregate_votes(votes, name)
    with pytest.raises(InputError, match=r"method must be one of symmetric, .*counts, .*smooth.*, got 'dance'"):
        aggregate_votes(votes, "dance")


def test_a_detector_of_a_plugin_joins_a_panel(shelf: Callable[..., None]) -> None:
    shelf("lab-watch", "from rlhf_workbench.core.starters import RecentMean as recent", "detector.recent")
    watch = StreamWatch(("recent", "CUSUM"), k=2)
    alarms = [alarm for value in [0.0] * 60 + [1.0] * 30 for alarm in watch.update(value)]
    assert [alarm.is_confirmed for alarm in alarms[:1]] == [True]
    assert set(alarms[0].detectors) == {"recent", "CUSUM"}
    with pytest.raises(MissingError, match=r"there is no detector 'dance'; known: ADWIN, .*recent"):
        StreamWatch(("dance",), k=1)


def test_a_format_of_a_plugin_exports_and_imports(
    shelf: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from rlhf_workbench.core.starters import BetterAndWorse as better\n"
    code += "class wrong:\n    def write(self, example): return [1]\n    def read(self, row): return row"
    shelf("lab-format", code, "exporter.better", "exporter.wrong")
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps({"prompt": "Name a fruit.", "chosen": "Apple.", "rejected": "Brick."}) + "\n")
    path, out = tmp_path / "s.duckdb", tmp_path / "out.jsonl"
    with connect(path) as store:
        import_file(store, rows, dataset="pilot")
    assert main(["export", "pilot", str(out), "--format", "better", "--store", str(path)]) == 0
    row = json.loads(out.read_text())
    assert row["worse"] == [{"role": "assistant", "content": "Brick."}]
    assert main(["import", str(out), "--format", "better", "--dataset", "again", "--store", str(path)]) == 0
    with connect(path) as store:
        assert export_dataset(store, "again", tmp_path / "again.jsonl", format="trl") == 1
        assert json.loads((tmp_path / "again.jsonl").read_text()) == json.loads(rows.read_text())
        assert {len(store.records(kind)) for kind in (Prompt, Comparison, Generation)} == {2, 4}
    capsys.readouterr()
    wrong = ["export", "pilot", str(tmp_path / "w.jsonl"), "--format", "wrong", "--store", str(path)]
    assert main(wrong) == 2
    assert "'wrong' of lab-format 1.2 wrote a list where a row is needed" in capsys.readouterr().err


# New packages.


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", "A", "a b", "a--b", "-a", "a-", "1a", "é", "a\n", "a.b"),
        *("class", "json", "numpy", "rlhf-workbench", "a" * 51, "--kind", "$(x)", "test_\0"),
    ],
)
def test_a_name_that_could_do_harm_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        module_name(name)
    with pytest.raises(InputError):
        new_package(name, "channel", tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "my-votes").symlink_to(tmp_path / "nowhere")
    (tmp_path / "my-order").mkdir()
    for name in ("my-votes", "my-order"):
        with pytest.raises(StateError, match="exists"):
            new_package(name, "aggregator", tmp_path)
    with pytest.raises(MissingError, match="no folder"):
        new_package("my-bell", "channel", tmp_path / "nowhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my-order", "my-votes"]
    assert not list((tmp_path / "my-order").iterdir())


def _python(words: list[str], folder: Path, library: Path) -> subprocess.CompletedProcess[str]:
    """A new process that sees what was installed into a folder."""
    environment = os.environ | {"PYTHONPATH": str(library), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_new_packages_of_every_kind_install_and_pass(tmp_path: Path) -> None:
    names = {kind: f"lab-{kind}" for kind in PROTOCOLS} | {"channel": "sequence"}  # a class that an import is called
    for kind, name in names.items():
        assert main(["plugins", "new", name, "--kind", kind, "--folder", str(tmp_path)]) == 0
    folders = [str(tmp_path / name) for name in names.values()]
    for words in (["ruff", "format", "--check"], ["ruff", "check", "--select", "E,F,I,B,UP"]):
        done = _python([*words, *folders], tmp_path, tmp_path)
        assert done.returncode == 0, done.stdout
    library = tmp_path / "library"
    quietly = ["pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    done = _python([*quietly, "--target", str(library), *folders], tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "listing.py").write_text("from rlhf_workbench.cli import main; main(['plugins', '--json'])")
    shown = _python(["listing"], tmp_path, library)
    assert shown.returncode == 0, shown.stderr
    listed = {(row["kind"], row["name"]): row for row in json.loads(shown.stdout)["plugins"]}
    for kind, name in names.items():
        row = listed[kind, name]
        assert (row["distribution"], row["version"], row["state"]) == (name, "0.1.0", "ok")
    done = _python(["pytest", "-q", "-p", "no:cacheprovider", *folders], tmp_path, library)
    assert done.returncode == 0, done.stdout
    n_checks = sum(map(len, PROMISES.values()))
    assert f"{n_checks} passed" in done.stdout
