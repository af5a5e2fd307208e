"""Migrations that are ended between any two statements, online and as a script, complete when they are run again."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import asyncpg
import pytest
from alembic import command
from conftest import run_sql, settings_for
from migrating import AWKWARD_ROWS, CHUNKS, HEAD, CrashError, fetch, fetch_value, opened, seeded, upgrade
from sqlalchemy import URL, event
from test_schema import describe

from kotonoha_store import Database, migrations
from kotonoha_store.database import connect_arguments

# So that, with the odd numbers of statements, each revision is ended at several places.
STEP = 11


async def check_rows(url: URL) -> None:
    """What the awkward rows must have become, however often the migration was begun."""
    assert await fetch_value(url, "SELECT count(*) FROM knowledge_chunks WHERE content_hash IS NULL") == 0
    assert await fetch_value(url, "SELECT count(*) FROM knowledge_sources WHERE title LIKE 'Chunks%'") == 1
    jobs = dict(await fetch(url, "SELECT chunk_id, attempts FROM embedding_jobs"))
    assert jobs == {-5: 0, 2: 2, 3: 3, 5: 0}
    assert await fetch_value(url, "SELECT guild_id FROM knowledge_sources WHERE id = 1") == 1
    assert not await fetch(url, "SELECT FROM pg_index WHERE NOT indisvalid")
    assert await fetch(url, "SELECT version_num FROM alembic_version") == [(HEAD,)]


# -- online -------------------------------------------------------------------------------------------------------


@contextmanager
def crash_before(database: Database, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Raise before the statement of this number on the migration's connections; gives those that ran."""
    ran: list[str] = []
    make_patient = database.patient

    def patient() -> Database:
        made = make_patient()

        @event.listens_for(made.engine.sync_engine, "before_cursor_execute")
        def count(_c: Any, _cursor: Any, sql: str, *_: Any) -> None:
            if len(ran) == number:
                raise CrashError(sql)
            ran.append(sql)

        return made

    with monkeypatch.context() as patch:
        patch.setattr(database, "patient", patient)
        yield ran


async def test_an_upgrade_that_is_ended_between_any_two_statements_completes(
    empty_url: URL, template: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    await seeded(empty_url)
    crashes = 0
    async with opened(empty_url) as database:
        for number in range(STEP, 1000, STEP):
            with crash_before(database, number, monkeypatch) as ran:
                try:
                    await migrations.upgrade(database)
                except CrashError:
                    crashes += 1
                else:
                    break
        assert len(ran) < number
    assert crashes > 5
    await check_rows(empty_url)
    assert await describe(empty_url) == await describe(template)
    assert await fetch_value(empty_url, "SELECT count(*) FROM chunk_terms") == 6


# -- as a script --------------------------------------------------------------------------------------------------


def script(revisions: str) -> list[str]:
    """The statements that `alembic upgrade --sql` prints, without the transactions that it puts around them."""
    config = migrations.alembic_config()
    config.attributes["settings"] = settings_for(URL.create("postgresql"))
    config.output_buffer = output = StringIO()
    command.upgrade(config, revisions, sql=True)
    statements = re.sub(r"^--.*\n", "", output.getvalue(), flags=re.MULTILINE).split(";\n\n")
    return [each for each in map(str.strip, statements) if each and each not in {"BEGIN", "COMMIT"}]


async def run_one_by_one(url: URL, statements: list[str]) -> None:
    """Each for itself, in autocommit; then the process is gone."""
    connection = await asyncpg.connect(**connect_arguments(url, settings_for(url)))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        connection.terminate()


async def test_the_script_runs_one_statement_at_a_time_and_again_after_any_of_them(
    empty_url: URL, template: URL
) -> None:
    first = script("0001")
    await run_one_by_one(empty_url, first[:STEP])
    await run_one_by_one(empty_url, first)
    await run_sql(empty_url, AWKWARD_ROWS, CHUNKS)
    statements = script("head")
    for number in range(len(first) + 1, len(statements), STEP):
        await run_one_by_one(empty_url, statements[:number])
    for _ in range(2):
        await run_one_by_one(empty_url, statements)
        await check_rows(empty_url)
        assert await describe(empty_url) == await describe(template)
    # The words of what was there, which the script says that it cannot write; then there is nothing more to do.
    await run_sql(empty_url, "UPDATE alembic_version SET version_num = '0002'")
    await upgrade(empty_url)
    assert await fetch_value(empty_url, "SELECT count(*) FROM chunk_terms") == 6
    await check_rows(empty_url)


async def test_a_namesake_in_another_schema_does_not_suppress_creation(empty_url: URL) -> None:
    """Every name of ours is there already, in a schema that the search_path names too."""
    await upgrade(empty_url)
    before = await describe(empty_url)
    await run_sql(empty_url, "CREATE SCHEMA app", f"ALTER DATABASE {empty_url.database} SET search_path = app, public")
    statements = script("head")
    for number in (len(statements) // 2, len(statements)):
        await run_one_by_one(empty_url, statements[:number])
    missing = """
        SELECT 'relation', relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind <> 'c'
        UNION ALL SELECT 'type', typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype = 'e'
        UNION ALL SELECT 'function', proname FROM pg_proc
            WHERE pronamespace = 'public'::regnamespace AND proname LIKE 'kotonoha%'
        UNION ALL SELECT 'trigger', tgname || relname FROM pg_trigger JOIN pg_class c ON c.oid = tgrelid
            WHERE NOT tgisinternal AND relnamespace = 'public'::regnamespace
        UNION ALL SELECT 'constraint', conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    """
    both = f"({missing}) EXCEPT ({missing.replace('public', 'app')})"
    assert await fetch(empty_url, both) == []
    await run_sql(empty_url, "DROP SCHEMA app CASCADE", f"ALTER DATABASE {empty_url.database} RESET search_path")
    assert await describe(empty_url) == before
