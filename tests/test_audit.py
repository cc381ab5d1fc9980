"""Whatever is changed directly in the file, verify names the first change that does not fit."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rlhf_workbench.commands.audit import audit
from rlhf_workbench.core.schema import Annotation, DriftEvent, Model, Prompt, Record, Run, columns, utc_now
from rlhf_workbench.store.audit import START, link_hash, read_head, verify
from rlhf_workbench.store.frame import TamperedError
from rlhf_workbench.store.tables import connect

# Each tampering takes the number of a change (1 … 12) and says which change must be named.
TAMPER = {
    "edit a row": ("UPDATE prompt SET text = text || '!' WHERE audit_seq = {n}", "{n}"),
    "edit the actor": ("UPDATE audit SET actor = 'mallory' WHERE seq = {n}", "{n}"),
    "edit the time": ("UPDATE audit SET recorded_at = recorded_at + INTERVAL 1 SECOND WHERE seq = {n}", "{n}"),
    "edit the hash": ("UPDATE audit SET hash = repeat('0', 64) WHERE seq = {n}", "{n}"),
    "delete a row": ("DELETE FROM prompt WHERE audit_seq = {n}", "{n}"),
    "delete an audit row": ("DELETE FROM audit WHERE seq = {n}", "{n}"),
    "insert a row": ("INSERT INTO prompt SELECT * REPLACE ('new' AS id) FROM prompt WHERE audit_seq = {n}", "{n}"),
    "repeat an audit row": ("INSERT INTO audit SELECT * FROM audit WHERE seq = {n}", "{next}"),
    "a row of a change that never was": (
        "INSERT INTO prompt SELECT * REPLACE ('new' AS id, 99 AS audit_seq) FROM prompt WHERE audit_seq = {n}",
        "99",
    ),
    "a row of a change before the first": (
        "INSERT INTO prompt SELECT * REPLACE ('new' AS id, -1 AS audit_seq) FROM prompt WHERE audit_seq = {n}",
        "-1",
    ),
    "swap with the next": (
        "UPDATE prompt SET audit_seq = {n} + {next} - audit_seq WHERE audit_seq IN ({n}, {next})",
        "{n}",
    ),
}

# Without a head kept beside the file these are not seen: what is left is a shorter history that fits.
CUT = {
    "cut the end": "DELETE FROM audit WHERE seq > {n}; DELETE FROM prompt WHERE audit_seq > {n}",
    "cut everything": "DELETE FROM audit; DELETE FROM prompt",
}
STRUCTURE = {
    "another view": "CREATE OR REPLACE VIEW current_prompt AS SELECT * FROM prompt WHERE text <> '{n}.0'",
    "no view": "DROP VIEW current_prompt",
    "a column more": "ALTER TABLE prompt ADD COLUMN extra INTEGER",
    "another type": "ALTER TABLE annotation ALTER seconds TYPE VARCHAR",
    "no table": "DROP VIEW current_rating; DROP TABLE rating",
    "a row of no change": "INSERT INTO prompt SELECT * REPLACE ('x' AS id, NULL AS audit_seq) FROM prompt LIMIT 1",
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "s.duckdb"
    with connect(path) as store:
        for i in range(13):
            store.append([Prompt(text=f"{i}.{j}") for j in range(1 + i % 3)])
    return path


@pytest.mark.parametrize("n", [1, 7, 12])
@pytest.mark.parametrize("what", TAMPER)
def test_every_kind_of_tampering_is_found_and_named(honest: Path, tmp_path: Path, what: str, n: int) -> None:
    copy = tmp_path / "tampered.duckdb"
    copy.write_bytes(honest.read_bytes())
    statement, culprit = (part.format(n=n, next=n + 1) for part in TAMPER[what])
    with duckdb.connect(str(copy)) as con:
        con.execute("SET TimeZone = 'UTC'")
        con.execute(statement)
        report = verify(con)
    assert not report.is_intact
    assert report.broken_seq == int(culprit)
    assert report.problem


def test_an_honest_store_is_intact_and_the_head_moves(honest: Path) -> None:
    with connect(honest, read_only=True) as store:
        report = store.verify()
    assert report.is_intact
    assert report.n_changes == 13
    with connect(":memory:") as store:
        store.append(Annotation(comparison_id="c", annotator_id="a", label="tie"))
        before = store.verify().head
        store.append(Annotation(comparison_id="c", annotator_id="a", label="tie"))
        assert store.verify().head != before


@pytest.mark.parametrize("n", [1, 7, 12])
@pytest.mark.parametrize("what", CUT)
def test_a_cut_end_is_found_by_the_head_beside_the_file(honest: Path, tmp_path: Path, what: str, n: int) -> None:
    copy = tmp_path / "tampered.duckdb"
    copy.write_bytes(honest.read_bytes())
    copy.with_name(copy.name + ".head").write_bytes(honest.with_name(honest.name + ".head").read_bytes())
    duckdb.connect(str(copy)).execute(CUT[what].format(n=n)).close()
    for _ in range(2):  # opening it for writing does not cover the traces
        with connect(copy) as store:
            report = store.verify()
            assert not report.is_intact
            assert "the end was cut off" in report.problem or "the history was rewritten" in report.problem
            store.append(Prompt(text="after the deed"))


@pytest.mark.parametrize("what", STRUCTURE)
def test_changed_tables_and_views_are_found(honest: Path, tmp_path: Path, what: str) -> None:
    copy = tmp_path / "tampered.duckdb"
    copy.write_bytes(honest.read_bytes())
    duckdb.connect(str(copy)).execute(STRUCTURE[what].format(n=3)).close()
    with duckdb.connect(str(copy)) as con:
        con.execute("SET TimeZone = 'UTC'")
        report = verify(con)
    assert report.broken_seq == 0
    assert report.problem


# The tables that say how the chain is to be read.
FRAME = {
    "no version": "DELETE FROM store_version",
    "an earlier version": "UPDATE store_version SET version = 2",
    "the first version": "UPDATE store_version SET version = 1",
    "a later version": "UPDATE store_version SET version = 99",
    "an empty version": "UPDATE store_version SET version = NULL",
    "no columns": "DELETE FROM store_columns",
    "no columns of a table in use": "DELETE FROM store_columns WHERE table_name = 'prompt'",
    "no columns of an empty table": "DELETE FROM store_columns WHERE table_name = 'rating'",
    "another column": "UPDATE store_columns SET name = 'x' WHERE table_name = 'rating' AND name = 'value'",
    "columns of no version": "INSERT INTO store_columns SELECT * REPLACE (2 AS version) FROM store_columns",
    "no audit": "DROP TABLE audit",
    "an audit without hashes": "ALTER TABLE audit DROP hash",
    "an audit with numbers as text": "ALTER TABLE audit ALTER seq TYPE VARCHAR",
    "no table of versions": "DROP TABLE store_version",
    "no table of columns": "DROP TABLE store_columns",
    "no table of receipts": "DROP TABLE receipt",
}


@pytest.mark.parametrize("what", FRAME)
def test_a_changed_frame_is_one_line_and_covers_no_traces(honest: Path, tmp_path: Path, what: str) -> None:
    copy = tmp_path / "tampered.duckdb"
    copy.write_bytes(honest.read_bytes())
    duckdb.connect(str(copy)).execute(FRAME[what]).close()
    before = copy.read_bytes()
    said = CliRunner().invoke(audit, ["verify", "--store", str(copy)])
    assert isinstance(said.exception, SystemExit), said.exception
    assert said.exit_code == 1
    assert re.fullmatch(r"change 0: .*(store_version|store_columns|audit|receipt).*\n", said.output), said.output
    with pytest.raises(TamperedError, match="changed by other means"):
        connect(copy)
    assert copy.read_bytes() == before


KINDS = (Prompt, Annotation, Model, Run, DriftEvent)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All types of column, single rows and bulk, values there and missing."""
    path = tmp_path_factory.mktemp("audit") / "mixed.duckdb"
    with connect(path) as store:
        for i in range(8):
            store.append(
                [
                    Prompt(text="é" * i, metadata={"i": i}),
                    Annotation(comparison_id="c", annotator_id="a", label="tie", seconds=i / 7),
                ]
            )
            store.append([Model(name="m", kind="base", parents=["a", "b"][: i % 3]), Run(kind="k", key="x", seed=i)])
            store.append(DriftEvent(stream="s", detector="d", index=i, happened_at=utc_now(), is_confirmed=i % 2 == 0))
        store.append_table(Prompt, pa.table({"text": [f"{i}" for i in range(50)], "topic": ["a", None] * 25}))
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_any_cell_that_was_edited_is_found(
    mixed: Path, tmp_path: Path, kind: type[Record], data: st.DataObject
) -> None:
    copy = tmp_path / "tampered.duckdb"
    copy.write_bytes(mixed.read_bytes())
    name = data.draw(st.sampled_from([*columns(kind), "audit_seq"]))
    sql = columns(kind).get(name, "BIGINT")
    new = {
        "VARCHAR": f"coalesce({name}, '') || 'x'",
        "JSON": """'{"other": 1}'""",
        "BIGINT": f"coalesce({name}, 0) + 1",
        "DOUBLE": f"coalesce({name}, 0) + 1e-12",
        "BOOLEAN": f"NOT {name}",
        "TIMESTAMPTZ": f"coalesce({name}, now()) + INTERVAL 1 MICROSECOND",
        "VARCHAR[]": f"list_append({name}, 'x')",
    }[sql]
    value = data.draw(st.sampled_from([new, "NULL"]))
    with duckdb.connect(str(copy)) as con:
        con.execute("SET TimeZone = 'UTC'")
        ids = [
            i
            for (i,) in con.execute(
                f"SELECT id FROM {kind.table} WHERE {name} IS NOT NULL OR ? <> 'NULL' ORDER BY id", [value]
            ).fetchall()
        ]
        if not ids:
            return
        seq = con.execute(
            f"SELECT audit_seq FROM {kind.table} WHERE id = ?", [row := data.draw(st.sampled_from(ids))]
        ).fetchall()[0][0]
        con.execute(f"UPDATE {kind.table} SET {name} = {value} WHERE id = ?", [row])
        report = verify(con)
    assert report.broken_seq == (0 if (name, value) == ("audit_seq", "NULL") else seq)


# Two hundred random tamperings: any table, row, column and value.

AUDIT = {
    "seq": "BIGINT",
    "recorded_at": "TIMESTAMPTZ",
    "actor": "VARCHAR",
    "action": "VARCHAR",
    "table_name": "VARCHAR",
}
AUDIT |= {"n_rows": "BIGINT", "content": "VARCHAR", "hash": "VARCHAR"}
TABLES = {kind.table: columns(kind) | {"audit_seq": "BIGINT"} for kind in KINDS} | {"audit": AUDIT}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1), timezones=st.just(UTC))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "VARCHAR": TEXT,
    "JSON": st.dictionaries(TEXT, st.integers() | TEXT, max_size=2).map(json.dumps),
    "BIGINT": st.integers(-(2**62), 2**62) | st.integers(-3, 60),
    "DOUBLE": st.floats(allow_nan=False),
    "BOOLEAN": st.booleans(),
    "TIMESTAMPTZ": MOMENTS,
    "VARCHAR[]": st.lists(TEXT, max_size=3),
}


def row_of(con: duckdb.DuckDBPyConnection, data: st.DataObject, table: str) -> tuple[int, int]:
    """Any row: its place in the table, and the number of its change."""
    number = "seq" if table == "audit" else "audit_seq"
    rows = con.execute(f"SELECT rowid, {number} FROM {table} ORDER BY rowid").fetchall()
    found: tuple[int, int] = data.draw(st.sampled_from(rows))
    return found


def edit(con: duckdb.DuckDBPyConnection, data: st.DataObject) -> set[int]:
    """Another value in some cell."""
    table = data.draw(st.sampled_from(sorted(TABLES)))
    name = data.draw(st.sampled_from(sorted(TABLES[table])))
    sql = TABLES[table][name]
    place, seq = row_of(con, data, table)
    value = data.draw(st.none() | VALUES[sql])
    same = con.execute(f"SELECT {name} IS NOT DISTINCT FROM ?::{sql} FROM {table} WHERE rowid = ?", [value, place])
    assume(not same.fetchall()[0][0])
    con.execute(f"UPDATE {table} SET {name} = ? WHERE rowid = ?", [value, place])
    if name == "audit_seq":
        return {0 if value is None else min(seq, value)}
    if name != "seq":
        return {seq}
    if value is None or value < 1:
        return {1, value or 1}
    return {seq} if value > seq else {value, value + 1}  # two changes with the same number


def delete(con: duckdb.DuckDBPyConnection, data: st.DataObject) -> set[int]:
    """Some row less."""
    table = data.draw(st.sampled_from(sorted(TABLES)))
    place, seq = row_of(con, data, table)
    con.execute(f"DELETE FROM {table} WHERE rowid = ?", [place])
    return {seq}


def insert(con: duckdb.DuckDBPyConnection, data: st.DataObject) -> set[int]:
    """A row like another, in its change or in any."""
    table = data.draw(st.sampled_from(sorted(TABLES)))
    place, seq = row_of(con, data, table)
    if table == "audit":
        con.execute("INSERT INTO audit SELECT * FROM audit WHERE rowid = ?", [place])
        return {seq + 1}
    new = data.draw(st.just(seq) | VALUES["BIGINT"])
    con.execute(
        f"INSERT INTO {table} SELECT * REPLACE (? AS id, ? AS audit_seq) FROM {table} WHERE rowid = ?",
        [data.draw(TEXT), new, place],
    )
    return {new}


def swap(con: duckdb.DuckDBPyConnection, data: st.DataObject) -> set[int]:
    """Two rows of a table in each other's place; in the audit, two changes in another order."""
    table = data.draw(st.sampled_from(sorted(TABLES)))
    (one, first), (other, second) = (row_of(con, data, table) for _ in range(2))
    assume(first != second)
    number = "seq" if table == "audit" else "audit_seq"
    con.execute(f"UPDATE {table} SET {number} = ? - {number} WHERE rowid IN (?, ?)", [first + second, one, other])
    return {min(first, second)}


def rewrite(con: duckdb.DuckDBPyConnection, data: st.DataObject) -> set[int]:
    """Somebody else did it, and every later hash fits; only the head beside the file tells."""
    _, start = row_of(con, data, "audit")
    actor = data.draw(TEXT)
    rows = con.execute("SELECT * FROM audit ORDER BY seq").fetchall()
    assume(rows[start - 1][2] != actor)
    con.execute("UPDATE audit SET actor = ? WHERE seq = ?", [actor, start])
    previous = START
    for *values, _ in con.execute("SELECT * FROM audit ORDER BY seq").fetchall():
        previous = link_hash(previous, dict(zip(AUDIT, values, strict=False)))
        con.execute("UPDATE audit SET hash = ? WHERE seq = ?", [previous, values[0]])
    return {len(rows)}


WAYS = (edit, edit, edit, delete, insert, swap, rewrite)  # most often an edit: there are most to choose from


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_random_tamperings_are_found_and_named(mixed: Path, tmp_path: Path) -> None:
    copy, head, found = tmp_path / "tampered.duckdb", read_head(mixed), list[str]()

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def tamper(data: st.DataObject) -> None:
        copy.write_bytes(mixed.read_bytes())
        way = data.draw(st.sampled_from(WAYS))
        with duckdb.connect(str(copy)) as con:
            con.execute("SET TimeZone = 'UTC'; SET threads = 1")
            culprits = way(con, data)
            report = verify(con, head)
        assert report.broken_seq in culprits, report
        assert report.problem
        assert ("the history was rewritten" in report.problem) == (way is rewrite), report
        found.append(way.__name__)

    tamper()
    assert len(found) >= 200
    assert set(found) == {way.__name__ for way in WAYS}
