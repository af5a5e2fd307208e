"""The doctor: each defect made for real, found, and gone once its mend was done."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import date, timedelta
from typing import Any

import asyncpg
import pytest
from conftest import new_database, run_sql, settings_for
from sqlalchemy import URL
from sqlalchemy.schema import CreateTable
from typer.testing import CliRunner

from kotonoha_store import (
    ConfigurationError,
    Database,
    ErrorCode,
    HashingEmbedder,
    KnowledgeChunk,
    Message,
    Store,
    StoreUnavailableError,
    doctor,
    doctor_tables,
    index_builds,
    migrations,
    roles,
)
from kotonoha_store.cli.commands import app
from kotonoha_store.database import connect_arguments
from kotonoha_store.doctor import DoctorReport, Finding, Severity, examine
from kotonoha_store.doctor_server import judge_pgvector, judge_server

MODEL = HashingEmbedder().model
# The tests connect as a superuser, which is told each time.
BASE = {"role-superuser"}


@pytest.fixture(scope="module")
def shared(server_url: URL, template: URL) -> Iterator[URL]:
    """A database that every test leaves as it was: that is what a mend is for."""
    with new_database(server_url, template=str(template.database)) as url:
        yield url


async def report_of(url: URL, **values: object) -> DoctorReport:
    async with Database(url, settings_for(url, **values)) as database:
        return await examine(database, model=MODEL)


async def bad(url: URL, **values: object) -> dict[str, Finding]:
    report = await report_of(url, **values)
    assert all(finding.mend for finding in report.findings if finding.is_bad)
    return {finding.code: finding for finding in report.findings if finding.is_bad and finding.code not in BASE}


async def is_mended(url: URL, code: str, *, by: URL | None = None, **values: object) -> Finding:
    """The defect is the only one found, and its statements make the doctor content."""
    found = await bad(url, **values)
    assert list(found) == [code], found
    assert found[code].sql
    await run_sql(by or url, *found[code].sql)
    assert await bad(url, **values) == {}
    return found[code]


def test_a_migrated_database_is_well(shared: URL) -> None:
    report = asyncio.run(report_of(shared))
    assert [finding.code for finding in report.findings if finding.is_bad] == ["role-superuser"]
    assert report.worst is Severity.WARNING
    seen = {finding.code: finding.severity for finding in report.findings}
    for code in (
        "schema",
        "server-version",
        "pgvector",
        "durability",
        "defaults",
        "connections",
        "pooler",
        "privileges",
    ):
        assert seen[code] is Severity.OK
    for code in ("indexes", "hnsw", "dead-rows", "queue", "dead-letters", "providers", "words", "models"):
        assert seen[code] is Severity.OK
    # Rightly so, without a single vector.
    assert seen["hnsw-used"] in (Severity.OK, Severity.INFO)


@pytest.mark.parametrize(
    ("code", "statements"),
    [
        (
            "index-invalid",
            ["UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_chunks_source_id'::regclass"],
        ),
        (
            "index-leftover",
            [
                "CREATE INDEX idx_chunks_source_id_ccnew ON knowledge_chunks (source_id)",
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_chunks_source_id_ccnew'::regclass",
            ],
        ),
        (
            "hnsw-operator-class",
            [
                "DROP INDEX idx_chunks_embedding",
                "CREATE INDEX idx_chunks_embedding ON knowledge_chunks USING hnsw (embedding halfvec_l2_ops)",
            ],
        ),
        ("isolation", ["ALTER DATABASE {database} SET default_transaction_isolation = 'serializable'"]),
        ("isolation", ["ALTER ROLE {user} IN DATABASE {database} SET default_transaction_isolation = 'serializable'"]),
        ("read-only", ["ALTER DATABASE {database} SET default_transaction_read_only = on"]),
        ("enable-indexscan", ["ALTER DATABASE {database} SET enable_indexscan = off"]),
        ("trigger-missing", ["DROP TRIGGER trg_jobs_notify ON embedding_jobs"]),
        ("trigger-disabled", ["ALTER TABLE knowledge_sources DISABLE TRIGGER trg_sources_touch_updated_at"]),
        ("foreign-key-missing", ["ALTER TABLE knowledge_chunks DROP CONSTRAINT knowledge_chunks_source_id_fkey"]),
        ("autovacuum-off", ["ALTER TABLE embedding_jobs SET (autovacuum_enabled = false)"]),
        ("pgvector-version", ["UPDATE pg_extension SET extversion = '0.8.1' WHERE extname = 'vector'"]),
        (
            "provider-configuration",
            [
                "INSERT INTO embedding_pauses (provider, failures, error_code)"
                " VALUES ('it''s a model', 3, 'AUTHENTICATION_ERROR')"
            ],
        ),
    ],
)
async def test_a_defect_is_found_and_its_statements_mend_it(shared: URL, code: str, statements: Sequence[str]) -> None:
    user = (await rows(shared, "SELECT quote_ident(current_user)"))[0][0]
    await run_sql(shared, *(each.format(database=shared.database, user=user) for each in statements))
    await is_mended(shared, code)
    # What it printed of the models is still theirs.
    assert "FOREIGN KEY" in str(CreateTable(KnowledgeChunk.__table__))


async def test_an_index_that_a_cancelled_build_left_invalid_is_found(shared: URL) -> None:
    """As it comes about: duplicates that were not there before."""
    await run_sql(
        shared,
        "DROP INDEX idx_sources_document_key",
        "INSERT INTO knowledge_sources (type, title, document_key)"
        " SELECT 'web_page', 'a', 'k' FROM generate_series(1, 2)",
    )
    with pytest.raises(asyncpg.UniqueViolationError):
        await run_sql(
            shared, "CREATE UNIQUE INDEX CONCURRENTLY idx_sources_document_key ON knowledge_sources (document_key)"
        )
    await run_sql(shared, "DELETE FROM knowledge_sources")
    finding = await is_mended(shared, "index-invalid")
    assert "idx_sources_document_key" in finding.seen


async def test_a_missing_index_is_found_and_built_by_the_command_that_is_named(shared: URL) -> None:
    await run_sql(shared, "DROP INDEX idx_chunks_embedding", "DROP INDEX idx_embedding_jobs_available_at")
    report = await report_of(shared)
    found = [finding for finding in report.findings if finding.code == "index-missing"]
    assert len(found) == 2
    assert {finding.mend for finding in found} == {"run `kotonoha-store reindex --broken`"}
    async with Database(shared, settings_for(shared)) as database:
        await index_builds.reindex(database, [])
    assert await bad(shared) == {}


async def test_an_index_in_the_making_is_no_defect(shared: URL) -> None:
    """A build that waits for a transaction is INVALID until it is done."""
    blocker = await connect(shared)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("INSERT INTO sessions (session_key, session_type) VALUES ('a', 'b')")
    builder = await connect(shared)
    build = asyncio.create_task(builder.execute("REINDEX INDEX CONCURRENTLY idx_sessions_channel_id"))
    try:
        async with asyncio.timeout(30):
            while not await rows(shared, "SELECT FROM pg_class WHERE relname LIKE 'idx_sessions%_ccnew'"):  # noqa: ASYNC110  the server tells nobody
                await asyncio.sleep(0.01)
        found = {finding.code: finding for finding in (await report_of(shared)).findings}
        assert found["index-leftover"].severity is Severity.INFO
    finally:
        await transaction.rollback()
        await build
        await blocker.close()
        await builder.close()
    assert await bad(shared) == {}


async def test_options_of_the_index_beside_the_settings(shared: URL) -> None:
    found = await bad(shared, kb_hnsw_m=24, kb_hnsw_ef_construction=100)
    assert list(found) == ["hnsw-options"]
    async with Database(shared, settings_for(shared, kb_hnsw_m=24, kb_hnsw_ef_construction=100)) as database:
        await index_builds.reindex(database)
    assert await bad(shared, kb_hnsw_m=24, kb_hnsw_ef_construction=100) == {}
    # Nobody said otherwise.
    assert await bad(shared) == {}
    async with Database(shared, settings_for(shared)) as database:
        await index_builds.reindex(database, m=16, ef_construction=64)


async def test_an_extension_outside_the_search_path(migrated_url: URL) -> None:
    await run_sql(migrated_url, 'CREATE SCHEMA "else where"', 'ALTER EXTENSION vector SET SCHEMA "else where"')
    found = await bad(migrated_url)
    assert found["pgvector-schema"].severity is Severity.ERROR
    await run_sql(migrated_url, *found["pgvector-schema"].sql)
    assert await bad(migrated_url) == {}


async def test_an_index_of_that_name_on_a_table_of_another_schema_is_not_ours(migrated_url: URL) -> None:
    await run_sql(
        migrated_url,
        "CREATE SCHEMA kb",
        "ALTER TABLE knowledge_chunks SET SCHEMA kb",
        "DROP INDEX kb.idx_chunks_embedding",
        "CREATE TABLE others (embedding halfvec(3))",
        "CREATE INDEX idx_chunks_embedding ON others USING hnsw (embedding halfvec_l2_ops)",
        "UPDATE pg_extension SET extversion = '0.8.1' WHERE extname = 'vector'",
        f"ALTER DATABASE {migrated_url.database} SET search_path = public, kb",
    )
    found = await bad(migrated_url)
    assert {"index-missing", "pgvector-version"} == set(found)
    assert found["pgvector-version"].sql == ("ALTER EXTENSION vector UPDATE",)
    await run_sql(migrated_url, "CREATE INDEX idx_chunks_embedding ON kb.knowledge_chunks (created_at)")
    found = await bad(migrated_url)
    assert found["pgvector-version"].sql[1] == "REINDEX INDEX CONCURRENTLY kb.idx_chunks_embedding"
    assert found["hnsw-operator-class"].sql[0] == "DROP INDEX CONCURRENTLY kb.idx_chunks_embedding"
    await run_sql(migrated_url, *found["hnsw-operator-class"].sql, *found["pgvector-version"].sql[:1])
    assert await bad(migrated_url) == {}
    assert await rows(migrated_url, "SELECT FROM pg_index WHERE indrelid = 'others'::regclass")


async def test_a_database_that_was_never_migrated(empty_url: URL) -> None:
    found = await bad(empty_url)
    assert list(found) == ["schema-empty"]
    assert "kotonoha-store migrate" in str(found["schema-empty"].mend)
    # This role may not create the extension.
    name = f"kt_{uuid.uuid4().hex[:8]}"
    await run_sql(empty_url, f"CREATE ROLE {name} LOGIN PASSWORD 'p'")
    found = await bad(empty_url.set(username=name, password="p"))
    assert list(found) == ["schema-empty", "pgvector-missing"]
    await run_sql(empty_url, f"DROP ROLE {name}", *found["pgvector-missing"].sql)
    assert list(await bad(empty_url)) == ["schema-empty"]


async def test_a_database_that_is_half_restored_is_named_and_not_migrated(empty_url: URL) -> None:
    await run_sql(empty_url, "CREATE TABLE kotonoha_restore_unfinished ()")
    found = await bad(empty_url)
    assert list(found) == ["restore-unfinished"]
    assert "--replace" in str(found["restore-unfinished"].mend)
    async with Database(empty_url, settings_for(empty_url)) as database:
        with pytest.raises(ConfigurationError, match="an interrupted restore left"):
            await migrations.upgrade(database)


async def test_settings_without_an_effect_and_a_missing_embedder_are_named(
    shared: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", shared.render_as_string(hide_password=False))
    monkeypatch.setenv("KB_EMBEDER", "hashing")
    done = await asyncio.to_thread(CliRunner().invoke, app, ["doctor", "--json"])
    found = {each["code"]: each for each in json.loads(done.stdout)["findings"] if each["severity"] == "warning"}
    assert found["unknown-setting"]["mend"] == "write KB_EMBEDDER"
    assert "OPENAI_API_KEY" in found["embedder"]["mend"]


@pytest.mark.parametrize(("revision", "code", "said"), [("0001", "outdated", "migrate"), ("9999", "newer", "install")])
async def test_a_schema_of_another_version(shared: URL, revision: str, code: str, said: str) -> None:
    ((now,),) = await rows(shared, "SELECT version_num FROM alembic_version")
    await run_sql(shared, f"UPDATE alembic_version SET version_num = '{revision}'")
    found = await bad(shared)
    await run_sql(shared, f"UPDATE alembic_version SET version_num = '{now}'")
    assert list(found) == [f"schema-{code}"]
    assert said in str(found[f"schema-{code}"].mend)


async def test_dead_vectors(shared: URL) -> None:
    await run_sql(
        shared,
        "ALTER TABLE knowledge_chunks SET (autovacuum_enabled = false)",
        "INSERT INTO knowledge_sources (type, title) VALUES ('web_page', 'a')",
        "INSERT INTO knowledge_chunks (source_id, content)"
        " SELECT id, 'c' FROM knowledge_sources, generate_series(1, 1500)",
        "DELETE FROM knowledge_sources",
    )
    report = await report_of(shared)
    found = {finding.code: finding for finding in report.findings}
    assert "1500 dead rows" in found["dead-vectors"].seen
    assert "recall-check" in str(found["deletions"].mend)
    assert "autovacuum_enabled" in found["autovacuum-off"].sql[0]
    await run_sql(shared, *found["dead-vectors"].sql, *found["autovacuum-off"].sql)
    assert await bad(shared) == {}


async def test_a_search_that_goes_past_the_index(shared: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Store.open(settings_for(shared), embedder=HashingEmbedder()) as store:
        for number in range(3):
            await store.add_document("t", f"text number {number}", uri=f"u{number}")
        await store.embedding_worker.run_until_empty()
        found = {finding.code: finding for finding in (await report_of(shared)).findings}
        assert found["hnsw-used"].severity is Severity.INFO
        assert "3 vectors" in found["hnsw-used"].seen
        monkeypatch.setattr(doctor_tables, "_MANY_VECTORS", 3)
        assert list(await bad(shared)) == ["hnsw-used"]
        await run_sql(shared, f"ALTER DATABASE {shared.database} SET enable_seqscan = off")
        found = {finding.code: finding for finding in (await report_of(shared)).findings}
        assert found["hnsw-used"].severity is Severity.OK
        await run_sql(shared, f"ALTER DATABASE {shared.database} RESET enable_seqscan")

        # The same vectors, of somebody else's model.
        monkeypatch.undo()
        await run_sql(shared, "UPDATE knowledge_chunks SET embedding_model = 'other' WHERE id % 2 = 0")
        found = await bad(shared)
        assert list(found) == ["models-mixed"]
        assert "kotonoha-store reembed" in str(found["models-mixed"].mend)
        await run_sql(shared, "UPDATE knowledge_chunks SET embedding_model = 'other'")
        found = await bad(shared)
        assert list(found) == ["models-foreign"]
        assert found["models-foreign"].severity is Severity.ERROR

        await run_sql(shared, "DELETE FROM chunk_terms WHERE chunk_id % 2 = 1")
        assert "words-missing" in await bad(shared)
        await store.fill_terms()
        assert "words-missing" not in await bad(shared)
    await run_sql(shared, "DELETE FROM knowledge_sources")


async def test_a_queue_that_nobody_serves(shared: URL) -> None:
    async with Store.open(settings_for(shared), embedder=HashingEmbedder()) as store:
        await store.add_document("t", "one text")
        await store.add_document("t", "another text")
        assert await bad(shared) == {}
        await store.queue.claim(1)
        await run_sql(shared, "UPDATE embedding_jobs SET available_at = now() - interval '20 minutes'")
        found = await bad(shared)
        assert list(found) == ["queue-age", "expired-leases"]
        assert "kotonoha-store worker" in str(found["queue-age"].mend)

        # A pause explains it.
        await store.queue.pause("p", timedelta(hours=1), ErrorCode.RATE_LIMIT)
        assert await bad(shared) == {}
        await store.queue.resume("p")

        await store.embedding_worker.run_until_empty()
        assert await bad(shared) == {}

        await store.add_document("t", "a third text")
        lease = await store.queue.claim()
        await store.queue.bury(lease, lease.chunk_ids, ErrorCode.INVALID_INPUT)
        found = await bad(shared)
        assert list(found) == ["dead-letters"]
        assert "1 of INVALID_INPUT" in found["dead-letters"].seen
        assert await store.queue.requeue() == 1
        await store.embedding_worker.run_until_empty()
        assert await bad(shared) == {}
    await run_sql(shared, "DELETE FROM knowledge_sources")


async def test_chunks_that_were_taken_out_of_the_queue_are_queued_again(shared: URL) -> None:
    async with Store.open(settings_for(shared), embedder=HashingEmbedder()) as store:
        await store.add_document("t", "one text")
        await run_sql(shared, "DELETE FROM embedding_jobs")
        await is_mended(shared, "never-embedded")
        await store.embedding_worker.run_until_empty()
        assert await rows(shared, "SELECT FROM knowledge_chunks WHERE embedding IS NULL") == []
    await run_sql(shared, "DELETE FROM knowledge_sources")


async def test_a_roles_own_limit_is_compared_with_its_own_connections(
    shared: URL, server_url: URL, group: tuple[URL, str]
) -> None:
    url, _ = group
    others = [await connect(server_url) for _ in range(4)]
    for each in others:
        await each.execute("SET application_name = 'another program'")
    pool = {"db_pool_min_size": 1, "db_pool_max_size": 4}
    await run_sql(shared, f"ALTER ROLE {url.username} CONNECTION LIMIT 5")
    assert "connections" not in await bad(url, **pool)
    await run_sql(shared, f"ALTER ROLE {url.username} CONNECTION LIMIT 3")
    found = await bad(url, **pool)
    assert "raise the role's CONNECTION LIMIT" in str(found["connections"].mend)
    for each in others:
        await each.close()


async def test_a_pool_beyond_what_the_server_has(shared: URL) -> None:
    found = await bad(shared, db_pool_max_size=10_000)
    assert list(found) == ["connections"]
    fitting = int(str(found["connections"].mend).split("DB_POOL_MAX_SIZE=")[1].split(" ")[0])
    assert await bad(shared, db_pool_max_size=fitting) == {}


async def test_poolers_that_are_known_and_unknown(shared: URL) -> None:
    assert "DATABASE_DIRECT_URL" in str((await bad(shared, db_pooler="transaction"))["pooler"].mend)
    direct = shared.render_as_string(hide_password=False)
    assert await bad(shared, db_pooler="transaction", database_direct_url=direct) == {}
    url = shared.update_query_dict({"pgbouncer": "true"})
    assert "DB_POOLER=auto" in str((await bad(url, db_pooler="none"))["pooler"].mend)


async def test_a_direct_url_to_another_database_is_found_and_nothing_goes_there(
    shared: URL, empty_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = empty_url.render_as_string(hide_password=False)
    found = await bad(shared, database_direct_url=wrong)
    assert found["direct-url"].severity is Severity.ERROR
    async with Database(shared, settings_for(shared, database_direct_url=wrong)) as database:
        for work in (migrations.downgrade(database, "0003"), index_builds.reindex(database)):
            with pytest.raises(ConfigurationError, match="DATABASE_DIRECT_URL leads to another database"):
                await work
    monkeypatch.setenv("DATABASE_URL", shared.render_as_string(hide_password=False))
    monkeypatch.setenv("DATABASE_DIRECT_URL", wrong)
    checked = await asyncio.to_thread(CliRunner().invoke, app, ["check"])
    assert (checked.exit_code, "DATABASE_DIRECT_URL leads to another" in checked.stderr) == (3, True)

    nowhere = empty_url.set(database="nowhere").render_as_string(hide_password=False)
    seen = (await bad(shared, database_direct_url=nowhere))["direct-url"].seen
    assert "DATABASE_DIRECT_URL: the database does not exist" in seen


async def test_pages_that_a_crash_would_tear(shared: URL) -> None:
    """A setting of the whole server: it is put back by the mend itself."""
    await run_sql(shared, "ALTER SYSTEM SET full_page_writes = off", "SELECT pg_reload_conf()")
    await settled(shared, "full_page_writes", "off")
    found = await bad(shared)
    await run_sql(shared, *found["durability-full_page_writes"].sql)
    await settled(shared, "full_page_writes", "on")
    await run_sql(shared, "ALTER SYSTEM RESET full_page_writes")
    assert await bad(shared) == {}


async def test_a_transaction_that_was_forgotten(shared: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_tables, "_LONG_TRANSACTION_SECONDS", 0)
    forgotten = await connect(shared)
    pid = forgotten.get_server_pid()
    await forgotten.execute("BEGIN")
    found = await bad(shared)
    assert list(found) == ["long-transaction"]
    await run_sql(shared, *found["long-transaction"].sql)
    # The server ends it when it comes to it, and the driver hears of that.
    async with asyncio.timeout(30):
        while await rows(shared, f"SELECT FROM pg_stat_activity WHERE pid = {pid}"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while not forgotten.is_closed():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert await bad(shared) == {}


async def test_a_statement_timeout_below_what_a_build_takes(shared: URL) -> None:
    await run_sql(
        shared,
        f"ALTER DATABASE {shared.database} SET statement_timeout = '5s'",
        "UPDATE pg_class SET reltuples = 1000000 WHERE oid = 'knowledge_chunks'::regclass",
    )
    found = {finding.code: finding for finding in (await report_of(shared)).findings}
    await run_sql(
        shared,
        f"ALTER DATABASE {shared.database} RESET statement_timeout",
        "UPDATE pg_class SET reltuples = -1 WHERE oid = 'knowledge_chunks'::regclass",
    )
    assert found["statement-timeout"].severity is Severity.INFO
    assert "1667 s" in found["statement-timeout"].seen


@pytest.fixture
async def group(shared: URL) -> AsyncIterator[tuple[URL, str]]:
    """A login role of its own, and the prefix of the group roles."""
    name = f"kt_{uuid.uuid4().hex[:8]}"
    await run_sql(shared, f"CREATE ROLE {name}_login LOGIN PASSWORD 'p'")
    async with Database(shared, settings_for(shared)) as database:
        yield shared.set(username=f"{name}_login", password="p"), name
        await roles.drop(database, prefix=name)
    await run_sql(shared, f"DROP OWNED BY {name}_login", f"DROP ROLE {name}_login")


async def test_a_role_without_privileges_is_given_them_by_the_statements_named(
    shared: URL, group: tuple[URL, str]
) -> None:
    url, _ = group
    await run_sql(shared, f"GRANT SELECT ON alembic_version TO {url.username}")
    found = {finding.code: finding for finding in (await report_of(url)).findings if finding.is_bad}
    assert found["privileges"].severity is Severity.ERROR
    assert "role-superuser" not in found
    # What it may not read is told, and the other checks went on.
    assert {"privileges", "unasked"} == set(found)
    await run_sql(shared, *found["privileges"].sql)
    assert (await report_of(url)).is_well
    # And they are enough.
    async with Store.open(settings_for(url), embedder=HashingEmbedder()) as store:
        await store.add_document("t", "a text")
        async with store.begin() as tx:
            await tx.sessions.append("k", Message.user("a message"), session_type="thread")
    await run_sql(
        shared,
        "DELETE FROM knowledge_sources",
        "DELETE FROM sessions",
        f"REVOKE USAGE ON SEQUENCE sessions_id_seq FROM {url.username}",
    )
    found = await bad(url)
    assert found["privileges"].sql == (f"GRANT USAGE ON SEQUENCE sessions_id_seq TO {url.username}",)


async def test_members_of_the_group_roles_are_well(
    shared: URL, group: tuple[URL, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, prefix = group
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.setenv("KB_EMBEDDER", "hashing")
    async with Database(shared, settings_for(shared)) as database:
        await roles.grant(database, prefix=prefix)
    for role in ("app", "worker"):
        await run_sql(shared, f"GRANT {prefix}_{role} TO {url.username}")
        done = await asyncio.to_thread(CliRunner().invoke, app, ["doctor"])
        assert done.exit_code == 0, done.output
        await run_sql(shared, f"REVOKE {prefix}_{role} FROM {url.username}")
    await run_sql(shared, f"GRANT {prefix}_readonly TO {url.username}")
    report = await report_of(url)
    assert report.is_well
    assert "this role only reads" in [finding.seen for finding in report.findings]
    await run_sql(shared, f"REVOKE {prefix}_readonly FROM {url.username}", f"ALTER ROLE {url.username} BYPASSRLS")
    assert "role-bypassrls" in await bad(url)


async def test_a_role_that_may_become_a_superuser_or_not_enter_the_schema_is_told(
    shared: URL, group: tuple[URL, str]
) -> None:
    url, prefix = group
    await run_sql(
        shared,
        f"CREATE ROLE {prefix}_super SUPERUSER",
        f"GRANT {prefix}_super TO {url.username}",
        "REVOKE USAGE ON SCHEMA public FROM PUBLIC",
    )
    found = await bad(url)
    assert "SET ROLE" in found["role-membership"].seen
    assert found["schema-privilege"].sql == (f"GRANT USAGE ON SCHEMA public TO {url.username}",)
    await run_sql(shared, *found["role-membership"].sql, *found["schema-privilege"].sql)
    assert {"role-membership", "schema-privilege", "schema-empty"}.isdisjoint(await bad(url))
    await run_sql(shared, "GRANT USAGE ON SCHEMA public TO PUBLIC", f"DROP ROLE {prefix}_super")


async def test_row_level_security_without_a_policy_is_found(shared: URL, group: tuple[URL, str]) -> None:
    url, prefix = group
    async with Database(shared, settings_for(shared)) as database:
        await roles.grant(database, prefix=prefix)
    await run_sql(shared, f"GRANT {prefix}_app TO {url.username}", "ALTER TABLE sessions ENABLE ROW LEVEL SECURITY")
    await is_mended(url, "row-security", by=shared)
    await run_sql(shared, "DROP POLICY kotonoha_store ON sessions", "ALTER TABLE sessions DISABLE ROW LEVEL SECURITY")


async def test_what_cannot_be_asked_is_told_and_the_others_go_on(shared: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = doctor._asked

    async def patiently(check: doctor.Check, *arguments: Any) -> list[Finding]:
        *others, limit = arguments
        # Those that wait for the lock: on a machine that stands still others would be told as well.
        return await asked(check, *others, limit if check in (doctor_tables.indexes, doctor_tables.queue) else 60.0)

    monkeypatch.setattr(doctor, "_asked", patiently)
    locker = await connect(shared)
    async with locker.transaction():
        await locker.execute("LOCK TABLE embedding_jobs")
        async with Database(shared, settings_for(shared)) as database, asyncio.timeout(30):
            report = await examine(database, model=MODEL, seconds_a_check=0.5)
    await locker.close()
    unasked = [finding.seen for finding in report.findings if finding.code == "unasked"]
    assert any("queue, no answer within 0.5 s" in seen for seen in unasked), unasked
    assert {"dead-letters", "words", "models"} <= {finding.code for finding in report.findings}


async def test_a_database_that_does_not_answer_is_an_error() -> None:
    url = URL.create("postgresql", "nobody", "s3cr3t", "127.0.0.1", 1, "kotonoha")
    async with Database(url, settings_for(url, db_connect_attempts=1)) as database:
        with pytest.raises(StoreUnavailableError):
            await examine(database)


@pytest.mark.parametrize(
    ("major", "minor", "text", "today", "severity", "said"),
    [
        (18, 4, "18.4", date(2026, 6, 1), Severity.OK, "18.4"),
        (15, 9, "15.9", date(2026, 6, 1), Severity.ERROR, "too old"),
        (19, 0, "19beta1", date(2026, 6, 1), Severity.WARNING, "no release"),
        (19, 1, "19.1", date(2027, 6, 1), Severity.WARNING, "not tested"),
        (17, 1, "17.1", date(2026, 6, 1), Severity.WARNING, "extensions built"),
        (16, 5, "16.5", date(2026, 6, 1), Severity.WARNING, "extensions built"),
        (18, 2, "18.2", date(2026, 6, 1), Severity.WARNING, "substring"),
        (16, 20, "16.20", date(2028, 11, 9), Severity.OK, "16.20"),
        (16, 20, "16.20", date(2028, 11, 10), Severity.WARNING, "no corrections since 2028-11-09"),
    ],
)
def test_versions_of_the_server(major: int, minor: int, text: str, today: date, severity: Severity, said: str) -> None:
    (finding,) = judge_server(major, minor, text, today)
    assert finding.severity is severity
    assert said in finding.seen


@pytest.mark.parametrize(
    ("version", "available", "severity", "said", "mend"),
    [
        ("0.7.4", "0.7.4", Severity.ERROR, "too old", "install pgvector 0.8.4"),
        ("0.8.0", "0.8.5", Severity.WARNING, "CVE-2026-3172", "has 0.8.5 already"),
        ("0.8.1", None, Severity.WARNING, "can damage an HNSW index", "install pgvector 0.8.4"),
        ("0.8.3", "0.8.3", Severity.WARNING, "not repaired", "install"),
        ("0.8.4", "0.8.5", Severity.INFO, "the server has 0.8.5", "update"),
    ],
)
def test_versions_of_pgvector(version: str, available: str | None, severity: Severity, said: str, mend: str) -> None:
    (finding,) = judge_pgvector(version, available, graph="idx_chunks_embedding")
    assert finding.severity is severity
    assert said in finding.seen
    assert mend in str(finding.mend)
    assert ("REINDEX INDEX CONCURRENTLY idx_chunks_embedding" in finding.sql) == (version in ("0.8.0", "0.8.1"))


def test_a_share_is_neither_all_nor_nothing_unless_it_is() -> None:
    assert [doctor_tables._percent(number, 3224) for number in (3224, 3208, 16, 1612)] == [
        "100 %",
        ">99 %",
        "<1 %",
        "50 %",
    ]


def test_the_newest_pgvector_is_well() -> None:
    assert judge_pgvector("0.8.5", "0.8.5", graph="idx_chunks_embedding") == []
    assert judge_pgvector("0.10.0", "0.10.0", graph="idx_chunks_embedding") == []


def test_the_command_prints_findings_and_ends_with_1(shared: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", shared.render_as_string(hide_password=False))
    monkeypatch.setenv("KB_EMBEDDER", "hashing")
    asyncio.run(run_sql(shared, f"ALTER DATABASE {shared.database} SET enable_indexscan = off"))
    people = CliRunner().invoke(app, ["doctor"])
    machine = CliRunner().invoke(app, ["doctor", "--json"])
    asyncio.run(run_sql(shared, f"ALTER DATABASE {shared.database} RESET enable_indexscan"))
    assert (people.exit_code, machine.exit_code) == (1, 1)
    assert f"ALTER DATABASE {shared.database} RESET enable_indexscan;" in people.output
    said = json.loads(machine.output)
    assert said["is_well"] is False
    (finding,) = (each for each in said["findings"] if each["code"] == "enable-indexscan")
    assert finding["sql"] == [f"ALTER DATABASE {shared.database} RESET enable_indexscan"]


async def connect(url: URL) -> Any:
    return await asyncpg.connect(**connect_arguments(url, settings_for(url)))


async def rows(url: URL, query: str) -> list[Any]:
    connection = await connect(url)
    try:
        found: list[Any] = await connection.fetch(query)
        return found
    finally:
        await connection.close()


async def settled(url: URL, name: str, value: str) -> None:
    """A reload reaches new connections only when the postmaster has heard of it."""
    async with asyncio.timeout(30):
        while (await rows(url, f"SELECT current_setting('{name}')"))[0][0] != value:  # noqa: ASYNC110  the server tells nobody
            await asyncio.sleep(0.02)
