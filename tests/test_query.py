"""A query reads the tables it may, for a while, and does nothing else."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from rlhf_workbench.core.errors import DeniedError, InputError
from rlhf_workbench.core.schema import Annotation, Prompt, Token
from rlhf_workbench.store.query import OPEN_TABLES, check_query
from rlhf_workbench.store.tables import Store, connect

HOSTILE = [
    # files
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_csv_auto('/etc/passwd')",
    "SELECT * FROM read_json('{marker}')",
    "SELECT * FROM read_parquet('/tmp/*.parquet')",
    "SELECT * FROM parquet_metadata('x.parquet')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM '{marker}'",
    'SELECT * FROM "/etc/hosts.csv"',
    "SELECT (SELECT content FROM read_text('{marker}'))",
    "WITH x AS (FROM read_text('{marker}')) FROM x",
    "FROM prompt WHERE text IN (SELECT content FROM read_text('{marker}'))",
    "COPY prompt TO '{out}'",
    "COPY (SELECT 1) TO '{out}' (FORMAT parquet)",
    "COPY prompt FROM '{marker}'",
    "EXPORT DATABASE '{out}'",
    "IMPORT DATABASE '{out}'",
    # other databases, extensions, the network
    "ATTACH '{out}' AS other",
    "ATTACH 'https://example.org/x.duckdb' AS other",
    "DETACH memory",
    "USE memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SELECT * FROM read_csv('https://example.org/x.csv')",
    "SELECT * FROM 's3://bucket/x.parquet'",
    "CREATE SECRET s (TYPE s3, KEY_ID 'a', SECRET 'b')",
    "SELECT * FROM duckdb_secrets()",
    # settings and the surroundings
    "SET enable_external_access = true",
    "SET memory_limit = '1KB'",
    "RESET lock_configuration",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "SELECT getenv('HOME')",
    "SELECT current_setting('secret_directory')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM pragma_database_size()",
    "SELECT getvariable('x')",
    "SELECT write_log('x')",
    # writing
    "INSERT INTO prompt SELECT * FROM prompt",
    "UPDATE prompt SET text = 'x'",
    "DELETE FROM prompt",
    "TRUNCATE prompt",
    "DROP TABLE audit",
    "DROP VIEW current_prompt",
    "ALTER TABLE prompt ADD COLUMN x INT",
    "CREATE TABLE x (a INT)",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE OR REPLACE VIEW current_prompt AS SELECT 1",
    "CREATE MACRO f(a) AS a",
    "WITH x AS (DELETE FROM prompt RETURNING *) SELECT * FROM x",
    "INSERT INTO prompt (text) VALUES ('x') RETURNING text",
    "MERGE INTO prompt USING prompt p ON true WHEN MATCHED THEN DELETE",
    "SELECT nextval('s')",
    "CHECKPOINT",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "VACUUM",
    "PREPARE p AS DELETE FROM prompt",
    "EXECUTE p",
    # round about
    "SELECT 1; DELETE FROM prompt",
    "SELECT * FROM query('DELETE FROM prompt')",
    "SELECT * FROM query('SELECT * FROM token')",
    "SELECT * FROM query_table('token')",
    "SELECT * FROM json_execute_serialized_sql('{{}}')",
    "SELECT * FROM python_map_function()",
    "SELECT * FROM pandas_scan(0)",
    "SELECT * FROM seq_scan('prompt')",
    "EXPLAIN ANALYZE DELETE FROM prompt",
    "SELECT * FROM main.prompt",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM pg_catalog.pg_tables",
    "SELECT * FROM sqlite_master",
    "SELECT * FROM receipt",
    "",
    ";",
    "\x00",
]
SECRETS = [
    "SELECT * FROM token",
    "SELECT * FROM current_webhook",
    "SELECT * FROM TOKEN",
    'SELECT * FROM "Token" AS t',
    "SELECT (SELECT max(secret_hash) FROM token)",
    "WITH token AS (SELECT * FROM token) SELECT * FROM token",
    "WITH x AS (WITH y AS (SELECT * FROM webhook) FROM y) FROM x",
    "SELECT * FROM prompt JOIN token USING (id)",
    "SELECT 1 WHERE EXISTS (FROM token)",
    "SELECT * FROM (VALUES (1)) v(a), LATERAL (SELECT * FROM token)",
    "SELECT count(*) FROM prompt UNION ALL SELECT count(*) FROM token",
    "DESCRIBE token",
    "SUMMARIZE token",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with connect(tmp_path_factory.mktemp("query") / "s.duckdb") as opened:
        opened.append([Prompt(text="Why?"), Token(name="t", role="admin", secret_hash="hush")])
        yield opened


def test_there_are_enough_hostile_statements() -> None:
    assert len(set(HOSTILE)) >= 60


@pytest.mark.parametrize("query", HOSTILE)
def test_a_hostile_statement_is_refused_and_does_nothing(store: Store, tmp_path: Path, query: str) -> None:
    marker, out = tmp_path / "marker.txt", tmp_path / "out"
    marker.write_text("[1]")
    before = store.verify()
    with pytest.raises(InputError):
        store.sql(query.format(marker=marker, out=out))
    assert store.verify() == before
    assert not out.exists()


@pytest.mark.parametrize("query", SECRETS)
def test_secrets_are_for_the_owner_of_the_file(store: Store, query: str) -> None:
    with pytest.raises(DeniedError, match="may not be read"):
        check_query(query, OPEN_TABLES)
    check_query(query)  # whoever has the file has its content


OUTSIDE = ("/etc", "https:", "INSTALL", "LOAD", "SECRET", "s3:", "enable_external_access")


@pytest.mark.parametrize("query", [q for q in HOSTILE if any(word in q for word in OUTSIDE)])
def test_the_second_wall_stands_without_the_first(store: Store, query: str) -> None:
    """What the check of the parsed statement would let through by mistake still cannot reach outside."""
    with store.backend.owner.engine.reader() as con, pytest.raises(duckdb.Error):  # type: ignore[attr-defined]
        con.execute(query).fetchall()


def test_good_queries_work(store: Store) -> None:
    for query in (
        "SELECT text FROM prompt",
        "FROM current_prompt SELECT count(*)",
        "WITH a AS (SELECT 1 AS x), b AS (SELECT x + 1 AS y FROM a) SELECT * FROM a, b",
        "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r WHERE i < 5) SELECT sum(i) FROM r",
        "SELECT row_number() OVER (ORDER BY id) FROM prompt QUALIFY row_number() OVER () = 1",
        "SELECT i FROM range(3) t(i) WHERE i IN (SELECT unnest([1, 2]))",
        "SELECT metadata->>'x' FROM prompt",
        "SELECT table_name, count(*) FROM audit GROUP BY ALL ORDER BY 1",
        "DESCRIBE prompt",
        "SUMMARIZE prompt",
        "VALUES (1), (2)",
        "SELECT list_transform([1, 2], lambda x: x + 1)",
        "SELECT 1 -- a comment",
        "SELECT * FROM prompt ORDER BY random() LIMIT 1;",
    ):
        assert len(store.sql(query)) >= 1, query


def test_time_and_rows_are_limited(store: Store) -> None:
    with pytest.raises(InputError, match=r"longer than 0\.2 s"):
        store.sql("SELECT count(*) FROM range(100000000000) a", timeout_s=0.2)
    with pytest.raises(InputError, match="more than 100 rows"):
        store.sql("SELECT * FROM range(100000000000)", limit=100)
    assert len(store.sql("SELECT * FROM range(100)", limit=100)) == 100
    assert store.sql("SELECT count(*) AS n FROM prompt")["n"].tolist() == [1]  # the connection is as good as before


def test_parameters_are_values(store: Store) -> None:
    text = "'; DROP TABLE prompt; --"
    assert store.sql("SELECT ? AS x", [text])["x"].tolist() == [text]
    assert store.sql("SELECT $a AS x", {"a": text})["x"].tolist() == [text]
    with pytest.raises(InputError, match="failed"):
        store.sql("SELECT ? AS x", [])


def test_a_query_inside_a_transaction_sees_what_was_written_and_cannot_write(store: Store) -> None:
    with pytest.raises(InputError), store.transaction():
        store.append(Annotation(comparison_id="c", annotator_id="a", label="tie"))
        assert store.sql("SELECT count(*) AS n FROM annotation")["n"].tolist() == [1]
        store.sql("DELETE FROM annotation")
    assert store.counts().get("annotation", 0) == 0


def test_bulk_text_is_no_sql(store: Store) -> None:
    text = "x'); DELETE FROM prompt; --"
    store.append_table(Prompt, pa.table({"text": [text] * 20}))
    assert len(store.arrow(Prompt, text=text)) == 20
