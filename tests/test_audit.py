"""Whatever is changed directly in the file, verify names the first change that does not fit."""

from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.schema import Annotation, DriftEvent, Model, Prompt, Record, Run, columns, utc_now
from rlhf_workbench.store.audit import verify
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


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(what=st.sampled_from(sorted(TAMPER)), n=st.integers(1, 12))
def test_every_tampering_is_found_and_named(honest: Path, tmp_path: Path, what: str, n: int) -> None:
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
            assert "the end was cut off" in report.problem
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
        store.append_table(Prompt, pa.table({"text": [f"{i}" for i in range(500)], "topic": ["a", None] * 250}))
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
