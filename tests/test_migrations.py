"""A store of every earlier version becomes one of today, with its history; a newer one is left alone."""

import gzip
import hashlib
import re
from pathlib import Path

import duckdb
import pytest
from click.testing import CliRunner

from rlhf_workbench.commands.audit import audit
from rlhf_workbench.core.errors import StateError
from rlhf_workbench.core.schema import Alert, Annotation, Generation, Model, Prompt
from rlhf_workbench.store.audit import verify
from rlhf_workbench.store.frame import SCHEMA_VERSION, OutdatedError
from rlhf_workbench.store.tables import connect

FIXTURES = sorted(Path(__file__).parent.glob("fixtures/store_v*.duckdb.gz"))


def unpack(fixture: Path, folder: Path) -> Path:
    path = folder / "old.duckdb"
    path.write_bytes(gzip.decompress(fixture.read_bytes()))
    return path


def test_there_is_a_fixture_of_every_earlier_version() -> None:
    assert [f.name for f in FIXTURES] == [f"store_v{n}.duckdb.gz" for n in range(1, SCHEMA_VERSION)]


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f.name)
def test_an_older_store_is_upgraded_with_its_history(fixture: Path, tmp_path: Path) -> None:
    path = unpack(fixture, tmp_path)
    with duckdb.connect(str(path), read_only=True) as con:
        before = con.execute("SELECT max(seq), max_by(hash, seq) FROM audit").fetchall()[0]
        texts = con.execute("SELECT text FROM prompt ORDER BY id").fetchall()
    with connect(path, actor="upgrader") as store:
        report = store.verify()
        assert report.is_intact, report.problem
        assert [(p.text,) for p in store.records(Prompt)] == texts
        assert len(store.records(Generation)) == 24
        assert [a.label for a in store.records(Annotation)] == ["tie"]  # the corrected one is not current
        assert store.records(Model)[0].parents == ["x", "y"]
        rows = store.audit_rows().to_pylist()
        assert (rows[before[0] - 1]["seq"], rows[before[0] - 1]["hash"]) == before
        assert (rows[-1]["action"], rows[-1]["actor"]) == ("upgrade", "upgrader")
        store.append([Alert(severity="info", title="new types work"), Prompt(text="new")])
    with connect(path) as store:
        assert store.verify().is_intact
        assert store.counts()["alert"] == 1


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f.name)
def test_tampering_with_old_rows_is_found_after_the_upgrade(fixture: Path, tmp_path: Path) -> None:
    path = unpack(fixture, tmp_path)
    connect(path).close()
    duckdb.connect(str(path)).execute(
        "UPDATE generation SET text = text || '.' WHERE seed = 1 AND audit_seq = 2"
    ).close()
    with connect(path) as store:
        report = store.verify()
    assert (report.broken_seq, report.problem) == (2, "generation: a row was edited after it was written")


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f.name)
def test_looking_at_an_older_store_does_not_upgrade_it(fixture: Path, tmp_path: Path) -> None:
    path = unpack(fixture, tmp_path)
    before = hashlib.md5(path.read_bytes()).hexdigest()
    verified = CliRunner().invoke(audit, ["verify", "--store", str(path)])
    assert (verified.exit_code, "changes are intact" in verified.output) == (0, True), verified.output
    shown = CliRunner().invoke(audit, ["show", "--store", str(path)])
    assert isinstance(shown.exception, OutdatedError)  # the program turns it into one line and exit code 2
    with pytest.raises(OutdatedError, match="open it once for writing"):
        connect(path, read_only=True)
    assert hashlib.md5(path.read_bytes()).hexdigest() == before
    duckdb.connect(str(path)).execute("UPDATE prompt SET text = 'x' WHERE audit_seq = 1").close()
    broken = CliRunner().invoke(audit, ["verify", "--store", str(path)])
    assert (broken.exit_code, broken.output[:9]) == (1, "change 1:")


def test_columns_of_an_earlier_version_are_bound_to_the_upgrade(tmp_path: Path) -> None:
    path = unpack(FIXTURES[0], tmp_path)
    with connect(path) as store:
        upgraded = store.verify().n_changes
    edited = "UPDATE store_columns SET type = 'DOUBLE' WHERE version = 1 AND table_name = 'rating' AND name = 'actor'"
    duckdb.connect(str(path)).execute(edited).close()
    with duckdb.connect(str(path), read_only=True) as con:
        report = verify(con)
    assert (report.broken_seq, "after the upgrade" in report.problem) == (upgraded, True)


def test_an_upgrade_that_fails_leaves_the_old_store(tmp_path: Path) -> None:
    path = unpack(FIXTURES[0], tmp_path)
    duckdb.connect(str(path)).execute("CREATE TABLE webhook (x INT)").close()  # stands in the way of the new one
    with pytest.raises(StateError, match="could not be upgraded and is as it was"):
        connect(path)
    with duckdb.connect(str(path)) as con:
        assert con.execute("SELECT max(version) FROM store_version").fetchall() == [(1,)]
        assert not con.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'store_columns'").fetchall()
        con.execute("DROP TABLE webhook")
    with connect(path) as store:
        assert store.verify().is_intact


def test_a_newer_store_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "newer.duckdb"
    connect(path).close()
    duckdb.connect(str(path)).execute(f"INSERT INTO store_version VALUES ({SCHEMA_VERSION + 1})").close()
    before = path.read_bytes()
    with pytest.raises(StateError, match=re.escape(f"has version {SCHEMA_VERSION + 1}, this program reads")):
        connect(path)
    assert path.read_bytes() == before
