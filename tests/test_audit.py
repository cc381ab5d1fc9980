"""Whatever is changed directly in the file, verify names the first change that does not fit."""

from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_workbench.core.schema import Annotation, Prompt
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
    duckdb.connect(str(copy)).execute(statement).close()
    with connect(copy, read_only=True) as store:
        report = store.verify()
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
