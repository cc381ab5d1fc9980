"""Files go in whole or not at all, come out as they were, and a bad one is told where and why."""

import gzip
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import rows

from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.files import MAX_LINE, file_kind, read_rows, write_rows
from rlhf_workbench.core.formats import FORMATS, parse_line, render
from rlhf_workbench.core.messages import Example, answer, hh_text, question
from rlhf_workbench.core.schema import Annotation, Comparison, Consensus, Generation, Preference, Prompt, Rating, new_id
from rlhf_workbench.store import exchange
from rlhf_workbench.store.datasets import dataset_examples
from rlhf_workbench.store.exchange import check_file, export_dataset, import_file
from rlhf_workbench.store.snapshots import freeze_snapshot
from rlhf_workbench.store.tables import Store, connect

PREFERENCES = Path(__file__).parents[2] / "shared" / "data" / "preferences"
GOOD = {"prompt": "Hi", "chosen": "Ho", "rejected": "No"}
LINE = json.dumps(GOOD).encode() + b"\n"
needs_data = pytest.mark.skipif(not PREFERENCES.is_dir(), reason="needs ../shared/data, which a clone does not have")


@pytest.fixture
def store() -> Iterator[Store]:
    with connect(":memory:") as opened:
        yield opened


@pytest.fixture(scope="module")
def big_store() -> Iterator[Store]:
    with connect(":memory:") as opened:
        yield opened


def lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_imported_is_exported(name: str, big_store: Store, tmp_path: Path, data: st.DataObject) -> None:
    given_rows = data.draw(st.lists(rows(name), min_size=1, max_size=12))
    path, again, dataset = tmp_path / "in.jsonl", tmp_path / "out.jsonl", new_id()
    path.write_bytes(lines(given_rows))
    report = import_file(big_store, path, dataset=dataset)
    assert (report.format, report.n_rows) == (name, len(given_rows))
    assert export_dataset(big_store, dataset, again, overwrite=True) == len(given_rows)
    assert again.read_bytes() == path.read_bytes()


def test_a_pair_becomes_a_labelled_comparison(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines([GOOD | {"topic": "x", "split": "test", "prompt": f"Hi {i // 2}"} for i in range(40)]))
    report = import_file(store, path, run_id="r1")
    assert (report.n_prompts, report.n_repeated, report.n_equal) == (20, 20, 0)
    assert store.counts() == {"prompt": 20, "generation": 80, "comparison": 40, "annotation": 40}
    answers = {g.id: g.text for g in store.records(Generation)}
    votes = {a.comparison_id: a for a in store.records(Annotation)}
    for pair in store.records(Comparison, dataset="pairs", run_id="r1"):
        label = votes[pair.id].label
        assert (answers[pair.first_id], answers[pair.second_id]) == (("Ho", "No") if label == "first" else ("No", "Ho"))
        assert pair.metadata["split"] == "test"
    assert {a.label for a in votes.values()} == {"first", "second"}
    assert {a.queue for a in votes.values()} == {"import:pairs"}
    assert {p.topic for p in store.records(Prompt)} == {"x"}
    assert store.verify().is_intact


def test_the_order_of_answers_depends_on_the_content_alone(tmp_path: Path) -> None:
    orders = []
    (tmp_path / "p.jsonl").write_bytes(lines([GOOD | {"prompt": str(i)} for i in range(200)]))
    for _ in range(2):
        with connect(":memory:") as store:
            import_file(store, tmp_path / "p.jsonl")
            orders.append([a.label for a in store.records(Annotation)])
    assert orders[0] == orders[1]
    assert 70 < orders[0].count("first") < 130


def test_a_labelled_answer_becomes_a_rating(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "kto.jsonl"
    path.write_bytes(lines([{"prompt": "Hi", "completion": c, "label": c == "Ho"} for c in ("Ho", "No")]))
    import_file(store, path)
    assert [(r.value, r.annotator_id, r.dataset) for r in store.records(Rating)] == [
        (1.0, "import", "kto"),
        (0.0, "import", "kto"),
    ]
    assert store.counts() == {"prompt": 1, "generation": 2, "rating": 2}


CHAT = {"prompt": question("Hi"), "chosen": answer("Ho"), "rejected": answer("No")}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
OPENAI = {"input": {"messages": question("Hi")}, "preferred_output": answer("a"), "non_preferred_output": answer("b")}
KTO = {"prompt": "Hi", "completion": "Ho", "label": True}


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != name}


BAD: dict[str, tuple[bytes, str]] = {
    "chosen missing": (LINE * 16 + lines([without(GOOD, "chosen")]), "line 17: 'chosen' is missing; needs prompt, chosen"),
    "prompt missing": (lines([without(GOOD, "prompt")]), "line 1: 'prompt' is missing; needs prompt, chosen and rejected"),
    "other columns": (lines([{"text": "Hi"}]), "line 1: columns text match no format; needs prompt, chosen"),
    "no columns": (lines([{}]), "line 1: columns (none) match no format"),
    "not JSON": (LINE + b'{"prompt": "a" "b"}\n', "line 2: not JSON at column 16: Expecting ',' delimiter"),
    "cut off": (LINE + LINE[:20], "line 2: not JSON at column"),
    "two on a line": (LINE.strip() + LINE, "line 1: not JSON at column"),
    "a list": (LINE + b"[1]\n", "line 2: a row must be an object with columns, got a list"),
    "a text": (b'"Hi"\n', "line 1: a row must be an object with columns, got text"),
    "invalid UTF-8": (LINE + b'{"prompt": "\xe9"}\n', "line 2: invalid UTF-8 (0xe9 at byte 13 of the line)"),
    "UTF-16": ("{}".encode("utf-16"), "line 1: the file is UTF-16; save it as UTF-8"),
    "a number": (LINE + lines([GOOD | {"rejected": 3}]), "line 2: 'rejected' must be text, got a number"),
    "null": (LINE + lines([GOOD | {"rejected": None}]), "line 2: 'rejected' must be text, got null"),
    "empty file": (b"", "is empty; needs at least one row"),
    "blank lines only": (b"\n \n", "is empty; needs at least one row"),
    "empty answer": (LINE * 2 + lines([GOOD | {"chosen": ""}]), "line 3: 'chosen' is empty"),
    "blank answer": (lines([GOOD | {"chosen": " \n\u2003"}]), "line 1: 'chosen' is empty"),
    "blank question": (lines([CHAT | {"prompt": question(" ")}]), "line 1: 'prompt' is empty: its last user turn"),
    "empty turn": (lines([CHAT, CHAT | {"rejected": answer("")}]), "line 2: 'rejected' is empty: the assistant says"),
    "NUL": (LINE + lines([GOOD | {"chosen": "a\0b"}]), "line 2: 'chosen' contains a NUL character; remove it"),
    "raw NUL": (LINE + b'{"prompt": "a\0"}\n', "line 2: not JSON at column 14: Invalid control character"),
    "NUL deep inside": (lines([GOOD | {"x": {"y": ["\0"]}}]), "line 1: 'x'.y[0] contains a NUL character"),
    "half a surrogate pair": (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n', "line 1: 'prompt' contains half"),
    "NaN": (LINE[:-2] + b', "score": NaN}\n', "line 1: NaN is not JSON"),
    "too large a number": (LINE[:-2] + b', "score": 1e999}\n', "line 1: 'score' is inf"),
    "name twice": (LINE[:-2] + b', "chosen": "x"}\n', "line 1: 'chosen' appears twice in one object"),
    "very long line": (LINE + b'{"prompt": "' + b"x" * MAX_LINE, "line 2: longer than 10,000,000 bytes"),
    "deeply nested": (LINE + b"[" * 100_000 + b"\n", "line 2: nested too deeply"),
    "nested deeply": (LINE[:-2] + b', "x": ' + b"[" * 900 + b"]" * 900 + b"}\n", "is nested too deeply; at most 100"),
    "hh that stops": (lines([HH, HH | {"rejected": "\n\nHuman: a\n\nAssistant:"}]), "line 2: 'rejected' is empty"),
    "mixed formats": (LINE * 4 + lines([CHAT]), "line 5: this row is trl-chat, but line 1 is trl; one format a file"),
    "hh among trl": (LINE + lines([HH]), "line 2: this row is hh-rlhf, but line 1 is trl"),
    "pair among kto": (lines([KTO, GOOD]), "line 2: this row is trl, but line 1 is kto"),
    "label as number": (lines([KTO, KTO | {"label": 1}]), "line 2: 'label' must be true or false, got a number"),
    "label as text": (lines([KTO | {"label": "true"}]), "line 1: 'label' must be true or false, got text"),
    "no label": (lines([without(KTO, "label")]), "line 1: 'label' is missing; needs prompt, completion and label"),
    "unknown role": (lines([CHAT | {"prompt": [{"role": "human", "content": "a"}]}]), "'prompt'[0] has the role 'human'"),
    "not a message": (lines([CHAT | {"chosen": ["Ho"]}]), "line 1: 'chosen'[0] must be a message like"),
    "no messages": (lines([CHAT | {"chosen": []}]), "line 1: 'chosen' is empty; needs at least one message"),
    "content a number": (lines([CHAT | {"chosen": [{"role": "assistant", "content": 3}]}]), "has a number as content"),
    "answer by the user": (lines([CHAT | {"chosen": question("Ho")}]), "'chosen' must start and end with an assistant"),
    "only a system turn": (lines([CHAT | {"prompt": [{"role": "system", "content": "a"}]}]), "'prompt' has no user turn"),
    "nothing in common": (lines([{"chosen": question("a") + answer("b"), "rejected": question("c") + answer("b")}]), "no question in common"),
    "hh without answer": (lines([HH, HH | {"rejected": "\n\nHuman: a"}]), "line 2: 'chosen' and 'rejected' have no question"),
    "hh with empty answer": (lines([HH | {"rejected": "\n\nHuman: a\n\nAssistant: "}]), "line 1: 'rejected' is empty"),
    "hh not at the start": (lines([HH, HH | {"chosen": "Human: a"}]), "line 2: 'chosen' must begin with"),
    "openai half": (lines([without(OPENAI, "non_preferred_output")]), "'non_preferred_output' is missing; needs input"),
    "openai without messages": (lines([OPENAI | {"input": {}}]), "line 1: 'messages' is missing; needs input (with"),
    "openai null tools": (lines([OPENAI | {"input": OPENAI["input"] | {"tools": None}}]), "'tools' is null; leave it out"),
    "score as text": (lines([{"prompt": "a", **{k: question("a") + answer(k) for k in ("chosen", "rejected")}, "score_chosen": "8"}]), "'score_chosen' must be a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_where_and_why(case: str, store: Store, tmp_path: Path) -> None:
    content, words = BAD[case]
    path = tmp_path / "FILE.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        import_file(store, path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    assert store.counts() == {}


def test_a_named_format_is_held_to(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE)
    with pytest.raises(InputError, match="line 1: 'completion' is missing"):
        import_file(store, path, format="kto")
    with pytest.raises(InputError, match="there is no format 'csv'; choose one of trl, "):
        import_file(store, path, format="csv")


OTHER_FILES: dict[str, tuple[str, bytes, str]] = {
    "json object": ("a.json", b'{"data": []}', "a.json holds an object; needs a list of objects"),
    "json empty": ("a.json", b"", "is empty; needs at least one row"),
    "json bad row": ("a.json", b"[" + LINE + b"," + b'{"prompt": "a"}]', "row 2: 'chosen' is missing"),
    "json syntax": ("a.json", b"[\n{]", "a.json: not JSON at line 2, column 2"),
    "csv cells": ("a.csv", b"prompt,chosen,rejected\na,b,c\nd,e\n", "line 3: 2 cells, but the heading has 3"),
    "csv heading": ("a.csv", b"prompt,chosen,chosen\na,b,c\n", "a column appears twice in the heading"),
    "csv empty cell": ("a.csv", b'prompt,chosen,rejected\n"a\nb",b,\n', "line 3: 'rejected' is empty"),
    "csv quotes": ("a.csv", b'prompt,chosen,rejected\n"a"b,b,c\n', "line 2: not CSV"),
    "csv label": ("a.csv", b"prompt,completion,label\na,b,maybe\n", "line 2: 'label' must be true or false, got text"),
    "csv heading only": ("a.csv", b"prompt,chosen,rejected\n", "is empty; needs at least one row"),
    "parquet": ("a.parquet", b"PAR1 no", "a.parquet cannot be read as Parquet"),
    "gzip": ("a.jsonl.gz", LINE, "line 1: the file is damaged or cut off"),
    "gzip cut": ("a.jsonl.gz", gzip.compress(LINE * 1000)[:-20], "the file is damaged or cut off"),
    "ending": ("a.txt", LINE, "has an ending that is not known; needs one of .jsonl"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_kinds_of_files_are_told_where_and_why(case: str, store: Store, tmp_path: Path) -> None:
    name, content, words = OTHER_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        import_file(store, tmp_path / name)
    assert words in str(caught.value)
    assert store.counts() == {}


def test_what_is_harmless_is_accepted_and_said(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") + b"\n\n" + LINE.rstrip())
    report = import_file(store, path)
    assert report.n_rows == 2
    assert report.notes == ("a byte order mark at the start was left out", "2 blank lines were left out")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_every_kind_of_file_goes_both_ways(name: str, store: Store, tmp_path: Path) -> None:
    given_rows = [GOOD | {"prompt": text} for text in ("two\r\nlines", 'a "quote", a comma', "\u2028☃\r", " x ")]
    write_rows(tmp_path / name, given_rows)
    import_file(store, tmp_path / name, dataset="d")
    assert export_dataset(store, "d", tmp_path / f"out-{name}") == 4
    assert [row for _, row in read_rows(tmp_path / f"out-{name}", [])] == given_rows
    assert file_kind(name) in ("jsonl", "json", "csv", "parquet")


def test_a_file_that_cannot_hold_the_rows_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([CHAT, CHAT | {"x": 1}]))
    import_file(store, tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="row 1 does not fit into CSV: 'prompt' is not text"):
        export_dataset(store, "a", tmp_path / "b.csv")
    with pytest.raises(InputError, match=r"row 1 would change in Parquet \(a missing value becomes null\)"):
        export_dataset(store, "a", tmp_path / "b.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_dataset_is_imported_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    import_file(store, tmp_path / "a.jsonl")
    with pytest.raises(StateError, match="there is a dataset 'a' with 1 rows already; choose another name"):
        import_file(store, tmp_path / "a.jsonl")
    import_file(store, tmp_path / "a.jsonl", dataset="b")
    assert store.counts()["comparison"] == 2


def test_two_at_once_import_one_dataset(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([GOOD | {"prompt": str(i)} for i in range(500)]))
    outcomes: list[str] = []

    def work() -> None:
        try:
            import_file(store, tmp_path / "a.jsonl")
            outcomes.append("done")
        except StateError:
            outcomes.append("refused")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["done", "refused", "refused", "refused"]
    assert store.counts()["comparison"] == 500


def test_an_error_while_writing_leaves_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE * 50)
    store.append(Prompt(text="here before"))
    monkeypatch.setattr(exchange, "_PORTION", 10)
    check = exchange.check_file

    def check_then_break(*args: Any, **kwargs: Any) -> Any:
        report = check(*args, **kwargs)
        path.write_bytes(LINE * 49 + b"{}\n")  # the file changes between checking and writing
        return report

    monkeypatch.setattr(exchange, "check_file", check_then_break)
    with pytest.raises(InputError, match="line 50"):
        import_file(store, path)
    assert store.counts() == {"prompt": 1}
    assert store.verify().is_intact
    path.write_bytes(LINE * 50)
    monkeypatch.setattr(exchange, "check_file", check)
    assert import_file(store, path).n_rows == 50
    assert store.verify().is_intact


CHILD = """
import sys
from rlhf_workbench.store import exchange
from rlhf_workbench.store.tables import Store, connect
exchange._PORTION = 100
append = Store.append
def told(self, records):
    ids = append(self, records)
    print("portion", flush=True)
    return ids
Store.append = told
store = connect(sys.argv[1])
exchange.import_file(store, sys.argv[2])
print("done", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("until", ["portion", "portion portion portion", "done"])
def test_a_kill_leaves_all_or_nothing(until: str, tmp_path: Path) -> None:
    path, file = tmp_path / "s.duckdb", tmp_path / "a.jsonl"
    file.write_bytes(lines([GOOD | {"prompt": str(i)} for i in range(3000)]))
    command = [sys.executable, "-c", CHILD, str(path), str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        for _ in until.split():
            while (line := child.stdout.readline().strip()) and line != until.split()[0]:
                pass
        child.send_signal(signal.SIGKILL)
    with connect(path) as store:
        assert store.verify().is_intact
        assert store.counts().get("comparison", 0) == (3000 if until == "done" else 0)
        if until != "done":
            assert store.counts() == {}
            assert import_file(store, file).n_rows == 3000
        assert store.verify().is_intact


def test_an_export_is_whole_or_absent(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([GOOD, GOOD | {"topic": "x"}]))
    import_file(store, tmp_path / "a.jsonl")
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="row 2 cannot be written as openai: openai has no place for topic"):
        export_dataset(store, "a", out, format="openai")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    assert export_dataset(store, "a", out, format="openai", allow_loss=True) == 2
    before = out.read_bytes()
    with pytest.raises(StateError, match=r"exists; choose another name.*--overwrite"):
        export_dataset(store, "a", out)
    with pytest.raises(InputError, match="row 2 cannot be written"):
        export_dataset(store, "a", out, format="hh-rlhf", overwrite=True)
    assert out.read_bytes() == before
    assert export_dataset(store, "a", out, overwrite=True) == 2
    with pytest.raises(MissingError, match="there is no folder"):
        export_dataset(store, "a", tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(MissingError, match=r"there is no dataset 'b' \(known: a\)"):
        export_dataset(store, "b", tmp_path / "b.jsonl")


def loop(store: Store) -> None:
    """Three comparisons as the loop makes them: one for each answer, and a tie."""
    prompt = Prompt(text="Hi", topic="greeting")
    first, second = (Generation(prompt_id=prompt.id, text=text) for text in ("Ho", "No"))
    store.append([prompt, first, second])
    for p_first, p_second, p_tie, label in ((0.8, 0.1, 0.1, "first"), (0.2, 0.7, 0.1, "second"), (0, 0, 1, "tie")):
        pair = Comparison(prompt_id=prompt.id, first_id=first.id, second_id=second.id, dataset="loop")
        chances = {"p_first": p_first, "p_second": p_second, "p_tie": p_tie}
        said = Consensus(comparison_id=pair.id, method="ds", label=label, n_votes=5, run_id="c1", **chances)  # type: ignore[arg-type]
        store.append([pair, said])


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_loop_made_goes_out_in_every_format(name: str, store: Store, tmp_path: Path) -> None:
    loop(store)
    n_rows = export_dataset(store, "loop", tmp_path / "out.jsonl", format=name)
    assert n_rows == (4 if FORMATS[name].is_single else 2)
    found = [parse_line(name, row) for _, row in read_rows(tmp_path / "out.jsonl", [])]
    texts = [[said[0]["content"] for said in example.answers] for example in found]
    assert texts == ([["Ho"], ["No"], ["No"], ["Ho"]] if FORMATS[name].is_single else [["Ho", "No"], ["No", "Ho"]])
    if FORMATS[name].is_open:
        assert (found[0].frame["p_chosen"], found[0].frame["topic"]) == (pytest.approx(0.85), "greeting")


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_may_have_said_nothing(name: str, store: Store, tmp_path: Path) -> None:
    prompt = Prompt(text="Hi")
    pair = [Generation(prompt_id=prompt.id, text=text) for text in ("Ho", "")]
    asked = Comparison(prompt_id=prompt.id, first_id=pair[0].id, second_id=pair[1].id, dataset="d")
    said = Consensus(comparison_id=asked.id, method="m", label="first", n_votes=1, p_first=1.0, p_second=0.0)
    store.append([prompt, *pair, asked, said])
    assert export_dataset(store, "d", tmp_path / "out.jsonl", format=name) > 0
    with pytest.raises(InputError, match="is empty"):
        import_file(store, tmp_path / "out.jsonl", dataset="again", format=name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_snapshot_goes_out_in_every_format(name: str, store: Store, tmp_path: Path) -> None:
    loop(store)
    found = freeze_snapshot(store, run_id="r", seed=0, name="frozen", consensus_run="c1")
    wanted = f"frozen@{found['content_hash'][:8]}"
    assert export_dataset(store, wanted, tmp_path / "a.jsonl", format=name) == (4 if FORMATS[name].is_single else 2)
    assert export_dataset(store, "frozen", tmp_path / "b.jsonl", format=name) > 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    splits = {row.split for row in store.records(Preference)}
    if FORMATS[name].is_open:
        assert {row["split"] for _, row in read_rows(tmp_path / "a.jsonl", [])} == splits


def test_an_imported_dataset_goes_through_consensus_into_a_snapshot(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("krippendorff", reason="needs the collect extra")
    from rlhf_workbench.quality.consensus import build_consensus

    (tmp_path / "a.jsonl").write_bytes(lines([GOOD | {"prompt": str(i), "split": "test"} for i in range(5)]))
    import_file(store, tmp_path / "a.jsonl")
    build_consensus(store, run_id="c", seed=0, queue="import:a", method="majority")
    freeze_snapshot(store, run_id="s", seed=0, name="a", consensus_run="c")
    rows = store.records(Preference)
    assert [(r.chosen, r.rejected, r.p_chosen, r.split) for r in rows] == [("Ho", "No", 1.0, "test")] * 5


def test_comparisons_without_a_label_are_not_guessed(store: Store, tmp_path: Path) -> None:
    store.append(Comparison(prompt_id="p", first_id="a", second_id="b", dataset="new"))
    with pytest.raises(StateError, match="none of the 1 comparisons of 'new' has a label yet"):
        export_dataset(store, "new", tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="labels must be imported or consensus"):
        dataset_examples(store, "new", labels="mine")  # type: ignore[arg-type]


def test_the_consensus_may_overrule_the_file(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([GOOD | {"prompt": str(i), "n": i} for i in range(6)]))
    import_file(store, tmp_path / "a.jsonl")
    for pair in store.records(Comparison):
        chances = {"p_first": 1.0, "p_second": 0.0}
        store.append(Consensus(comparison_id=pair.id, method="ds", label="first", n_votes=3, **chances))  # type: ignore[arg-type]
    export_dataset(store, "a", tmp_path / "voted.jsonl", labels="consensus")
    voted = [row for _, row in read_rows(tmp_path / "voted.jsonl", [])]
    first = {c.id: c.first_id for c in store.records(Comparison)}
    texts = {g.id: g.text for g in store.records(Generation)}
    assert [row["chosen"] for row in voted] == [texts[i] for i in first.values()]
    assert [row["n"] for row in voted] == list(range(6))
    export_dataset(store, "a", tmp_path / "same.jsonl")
    assert (tmp_path / "same.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


@needs_data
@pytest.mark.parametrize("format", ["hh-rlhf", "trl-chat", "trl-implicit", "openai", "ultrafeedback"])
def test_real_dialogues_go_both_ways(format: str, store: Store, tmp_path: Path) -> None:
    import pandas as pd

    table = pd.read_parquet(PREFERENCES / "hh_harmless_base.parquet")
    given_rows = []
    for row in table.itertuples():
        pair = (answer(str(row.chosen)), answer(str(row.rejected)))
        if not (row.chosen and row.rejected):
            continue  # two dialogues in which silence was preferred
        example = Example(messages=json.loads(str(row.prompt)), answers=pair)
        try:
            given_rows.append(render(format, example))
        except InputError as error:
            assert "read back with other turns" in str(error)  # noqa: PT017
    assert len(given_rows) >= 0.99 * len(table)
    path = tmp_path / "hh.jsonl.gz"
    write_rows(path, given_rows)
    assert import_file(store, path).format == format
    assert export_dataset(store, "hh", tmp_path / "again.jsonl") == len(given_rows)
    assert [row for _, row in read_rows(tmp_path / "again.jsonl", [])] == given_rows


@needs_data
def test_real_tables_go_both_ways(store: Store, tmp_path: Path) -> None:
    import pandas as pd

    table = pd.read_parquet(PREFERENCES / "pandalm_testset.parquet")
    columns = [name for name in table.columns if name.startswith("annotator")]
    pairs = [
        {"prompt": row["instruction"], "chosen": row[a], "rejected": row[b], "votes": row[columns].tolist()}
        for _, row in table.iterrows()
        for a, b in [("response1", "response2") if row[columns[0]] == 1 else ("response2", "response1")]
        if all(str(row[name]).strip() for name in ("instruction", "response1", "response2"))
    ]
    write_rows(tmp_path / "pandalm.parquet", pairs)
    report = import_file(store, tmp_path / "pandalm.parquet")
    assert (report.format, report.n_rows) == ("trl", len(pairs))
    export_dataset(store, "pandalm", tmp_path / "again.parquet")
    assert [row for _, row in read_rows(tmp_path / "again.parquet", [])] == pairs


@needs_data
def test_silent_answers_are_left_out_only_when_asked(store: Store, tmp_path: Path) -> None:
    import pandas as pd

    table = pd.read_parquet(PREFERENCES / "hh_harmless_base.parquet")
    texts = [(hh_text(json.loads(row.prompt)), row.chosen, row.rejected) for row in table.itertuples()]
    given_rows = [{"chosen": f"{t}\n\nAssistant: {a}", "rejected": f"{t}\n\nAssistant: {b}"} for t, a, b in texts]
    write_rows(tmp_path / "hh.jsonl", given_rows)
    with pytest.raises(InputError, match=r"line \d+: 'chosen' is empty: .*; skip_empty leaves such rows out"):
        import_file(store, tmp_path / "hh.jsonl")
    report = import_file(store, tmp_path / "hh.jsonl", skip_empty=True)
    kept = [row for row, (_, a, b) in zip(given_rows, texts, strict=True) if a and b]
    assert report.n_rows == len(kept) == len(given_rows) - 2
    assert report.notes[0].startswith("2 with an empty question or answer left out: line ")
    export_dataset(store, "hh", tmp_path / "again.jsonl")
    assert [row for _, row in read_rows(tmp_path / "again.jsonl", [])] == kept


def test_checking_needs_no_store(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([GOOD, GOOD, GOOD | {"chosen": "No"}]))
    report = check_file(tmp_path / "a.jsonl")
    assert (report.dataset, report.n_rows, report.n_repeated, report.n_equal) == ("a", 3, 1, 1)
