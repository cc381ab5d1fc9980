"""The store keeps what it acknowledged, all or nothing, and gives back what it was given."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.errors import InputError, MissingError, StateError
from rlhf_workbench.core.schema import RECORDS, Annotation, Model, Prompt, columns, new_id
from rlhf_workbench.store import changes
from rlhf_workbench.store.digest import arrow_hash
from rlhf_workbench.store.tables import connect

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=40)
PAYLOAD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    text=TEXT,
    topic=st.none() | TEXT,
    metadata=st.dictionaries(TEXT, PAYLOAD, max_size=3),
    n=st.sampled_from([1, 6, 7, 20, 300]),
)
def test_what_goes_in_comes_out(text: str, topic: str | None, metadata: dict[str, object], n: int) -> None:
    """All ways in: a few rows as values, some as lists, many as Arrow."""
    records = [Prompt(text=text, topic=topic, metadata=metadata) for _ in range(n)]
    with connect(":memory:") as store:
        store.append(records)
        assert store.records(Prompt) == records
        assert store.verify().is_intact


def test_list_columns_and_absent_values_survive() -> None:
    model = Model(name="m", kind="reward", parents=["a", "b"])
    with connect(":memory:") as store:
        store.append(model)
        assert store.get(Model, model.id) == model
        assert store.records(Model, snapshot_id=None) == [model]


@pytest.mark.parametrize("n", [1, 20, 300])
def test_a_wrong_record_keeps_all_others_out(n: int) -> None:
    with connect(":memory:") as store:
        bad = Annotation(comparison_id="c", annotator_id="a", label="left")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="first, second, tie, skip"):
            store.append([*(Prompt(text=str(i)) for i in range(n)), bad])
        assert store.counts() == {}


def test_a_time_without_zone_is_refused() -> None:
    naive = datetime(2026, 1, 1)
    with connect(":memory:") as store, pytest.raises(InputError, match="no time zone"):
        store.append(Annotation(comparison_id="c", annotator_id="a", label="tie", submitted_at=naive))


def test_an_error_inside_a_transaction_undoes_everything() -> None:
    with connect(":memory:") as store:
        store.append(Prompt(text="before"))
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.append(Prompt(text="one"))
            store.append([Prompt(text="many") for _ in range(20)])
            raise ZeroDivisionError
        store.append(Prompt(text="after"))
        assert [p.text for p in store.records(Prompt)] == ["before", "after"]
        assert store.verify().is_intact


def test_filters() -> None:
    with connect(":memory:") as store:
        store.append([Prompt(text="a", topic="x"), Prompt(text="b", topic="y"), Prompt(text="c")])
        assert [p.text for p in store.records(Prompt, topic=["x", "y"])] == ["a", "b"]
        assert [p.text for p in store.records(Prompt, topic=None)] == ["c"]
        assert store.records(Prompt, topic=[]) == []
        with pytest.raises(InputError, match="no column 'colour'"):
            store.records(Prompt, colour="red")
        with pytest.raises(MissingError, match="there is no prompt"):
            store.get(Prompt, "nobody")


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE prompt",
        "SELECT 1; DELETE FROM prompt",
        "INSERT INTO prompt SELECT * FROM prompt",
        "ATTACH 'x'",
        "SELEC 1",
        "",
    ],
)
def test_sql_only_reads(query: str) -> None:
    with connect(":memory:") as store, pytest.raises(InputError):
        store.sql(query)


def test_a_second_process_joins_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        code = f"""
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.store import changes
from rlhf_workbench.store.digest import arrow_hash
from rlhf_workbench.store.tables import connect
with connect({str(path)!r}, actor="other") as store:
    store.append(Prompt(text="from the other process"))
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        assert [p.text for p in store.records(Prompt)] == ["from the other process"]
        assert store.audit_rows()["actor"].to_pylist() == ["other"]


def test_a_foreign_program_in_the_way_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    connect(path).close()
    code = f"import duckdb; con = duckdb.connect({str(path)!r}); print('open', flush=True); input()"
    foreign = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert foreign.stdout
        assert foreign.stdout.readline() == "open\n"
        with pytest.raises(StateError, match=f"process {foreign.pid} is writing to"):
            connect(path)
    finally:
        foreign.communicate("\n")


def test_files_that_are_no_store_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.duckdb"
    text.write_text("hello " * 1000)
    foreign = tmp_path / "foreign.duckdb"
    duckdb.connect(str(foreign)).execute("CREATE TABLE t (x INT)").close()
    newer = tmp_path / "newer.duckdb"
    connect(newer).close()
    duckdb.connect(str(newer)).execute("UPDATE store_version SET version = 99").close()
    for path, words in [(text, "cannot open"), (foreign, "not a store"), (newer, "version 99")]:
        with pytest.raises(StateError, match=words):
            connect(path)
    with pytest.raises(MissingError, match="no folder"):
        connect(tmp_path / "nowhere" / "s.duckdb")
    with pytest.raises(MissingError, match="there is no store"):
        connect(tmp_path / "none.duckdb", read_only=True)


_WRITER = """
import sys
import threading
from rlhf_workbench.core.schema import Prompt
from rlhf_workbench.store import changes
from rlhf_workbench.store.digest import arrow_hash
from rlhf_workbench.store.tables import connect
store = connect(sys.argv[1])
for i in range(10_000):
    store.append([Prompt(text=str(i), topic=sys.argv[2]), Prompt(text=str(i), topic="twin of " + sys.argv[2])])
    print(i, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    for trial in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(trial)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout
        assert writer.stdout.readline() == "0\n"
        time.sleep(0.05 + 0.07 * trial)
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged = [int(line) for line in writer.stdout.read().split("\n")[:-1] if line]
        writer.wait(timeout=10)
        writer.stdout.close()
        with connect(path) as store:
            kept = [int(p.text) for p in store.records(Prompt, topic=str(trial))]
            twins = store.records(Prompt, topic=f"twin of {trial}")
            assert kept[: len(acknowledged) + 1] == [0, *acknowledged][: len(kept)]
            assert len(kept) >= len(acknowledged) + 1
            assert len(twins) == len(kept)
            assert store.verify().is_intact


def test_every_record_type_has_its_table() -> None:
    with connect(":memory:") as store:
        for kind in RECORDS:
            assert [*columns(kind), "audit_seq"] == list(store.sql(f"SELECT * FROM current_{kind.table}").columns)


def test_times_are_utc(tmp_path: Path) -> None:
    moment = datetime(2026, 11, 23, 3, 21, 12, 345678, tzinfo=UTC)
    with connect(tmp_path / "s.duckdb") as store:
        store.append(Annotation(comparison_id="c", annotator_id="a", label="tie", submitted_at=moment))
    with connect(tmp_path / "s.duckdb") as store:
        assert store.records(Annotation)[0].submitted_at == moment


@pytest.mark.parametrize("n", [1, 6, 7, 40])
def test_values_that_are_equal_but_not_the_same_stay_as_they_were(n: int, tmp_path: Path) -> None:
    signs = [0.0 if i % 2 else -0.0 for i in range(n)]
    votes = [Annotation(comparison_id="c", annotator_id="a", label="tie", seconds=s, is_swapped=False) for s in signs]
    with connect(tmp_path / "s.duckdb") as store:
        ready = threading.Barrier(n + 1)

        def write(vote: Annotation) -> None:
            ready.wait(30)
            store.append(vote)

        threads = [threading.Thread(target=write, args=[vote]) for vote in votes]
        for thread in threads:
            thread.start()
        with store.transaction():  # all wait for it, and then share a commit
            ready.wait(30)
        for thread in threads:
            thread.join(30)
        store.append(votes_again := [replace(vote, id=new_id()) for vote in votes])
        found = {vote.id: vote for vote in store.records(Annotation)}
        for vote in [*votes, *votes_again]:
            assert found[vote.id] == vote
            assert str(found[vote.id].seconds) == str(vote.seconds)
        table = {"comparison_id": ["c"] * 200, "annotator_id": ["a"] * 200, "label": ["tie"] * 200}
        store.append_table(Annotation, pa.table(table | {"seconds": [0.0, -0.0] * 100}))
        assert store.verify().is_intact  # also where single records are read with those of a table
        store.append_table(
            Annotation, pa.table({name: cells[:20] for name, cells in table.items()} | {"seconds": [-0.0] * 20})
        )
        for vote in votes:
            store.append(replace(vote, id=new_id()))
        assert store.verify().is_intact


@pytest.mark.parametrize("n", [20, 200])
def test_tables_whose_minus_zeros_were_hashed_with_their_sign_are_intact(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So they were before -0.0 counted as 0.0."""
    table = {"comparison_id": ["c"] * n, "annotator_id": ["a"] * n, "label": ["tie"] * n, "seconds": [-0.0] * n}
    path = tmp_path / "s.duckdb"
    with connect(path) as store:
        monkeypatch.setattr(changes, "arrow_hash", partial(arrow_hash, signed_zero=True))
        store.append_table(Annotation, pa.table(table))
        monkeypatch.undo()
        assert store.verify().is_intact
        for i in range(40):  # its rows are read with those of single records
            store.append(Annotation(comparison_id=f"c{i}", annotator_id="a", label="tie", seconds=-0.0))
        assert store.verify().is_intact
    with duckdb.connect(str(path)) as con:
        con.execute("UPDATE annotation SET seconds = 1e-300 WHERE id = (SELECT min(id) FROM annotation)")
    with connect(path) as store:
        assert not store.verify().is_intact
