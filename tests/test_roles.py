"""Group roles: what each may do is what it needs, where nobody is a superuser, and beside other databases."""

import asyncio
import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from conftest import RUN, new_database, run_sql, settings_for
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from kotonoha_store import (
    ConfigurationError,
    Database,
    InvalidInputError,
    Message,
    SearchFilters,
    Store,
    migrations,
    roles,
)
from kotonoha_store.cli.app import app
from kotonoha_store.cli.commands import app as commands
from kotonoha_store.roles import Role

assert app is commands


async def rows(database: Database, sql: str, **values: Any) -> list[tuple[Any, ...]]:
    async with database.begin() as session:
        result = await session.execute(text(sql), values)
        return [tuple(row) for row in result] if result.returns_rows else []


# What the test suite cannot show by passing as these roles: that they may do nothing else.


@pytest.mark.role("app")
async def test_a_bot_that_is_a_member_of_app_does_its_whole_work(store: Store) -> None:
    async with store.begin() as tx:
        await tx.sessions.append("k", [Message.user("梅雨がないのはどこ？"), Message.assistant("北海道です。")] * 30)
    for words in ("雨の多い季節", "雨の少ない季節"):
        await store.add_document("梅雨", words * 50, uri="https://example.org/a", guild_id=1)
    archived = await store.archiver.run_once(idle_for=timedelta(0))
    assert archived.archived == 1
    found = await store.search("季節", threshold=None, mode="words", filters=SearchFilters(guild_id=1))
    assert found.hits
    async with store.begin() as tx:
        await tx.knowledge.update_sources(SearchFilters(guild_id=1), title="つゆ")
        assert (await tx.knowledge.delete_chunks(SearchFilters(guild_id=1))).sources == 1


@pytest.mark.parametrize(
    "statement",
    [
        "TRUNCATE sessions",
        "DROP TABLE sessions",
        "ALTER TABLE sessions ADD x int",
        "CREATE TABLE x ()",
        "DELETE FROM embedding_jobs",
        "INSERT INTO knowledge_chunks_dlq (content) VALUES ('')",
        "UPDATE alembic_version SET version_num = ''",
        "DELETE FROM term_frequencies",
        "UPDATE embedding_pauses SET failures = 0",
        "SELECT setval('sessions_id_seq', 1)",
    ],
)
@pytest.mark.role("app")
async def test_a_member_of_app_may_not(database: Database, statement: str) -> None:
    with pytest.raises(DBAPIError, match=r"permission denied|must be owner"):
        await rows(database, statement)


@pytest.mark.parametrize("table", ["sessions", "knowledge_sources", "chunk_terms"])
@pytest.mark.role("worker")
async def test_a_member_of_worker_deletes_no(database: Database, table: str) -> None:
    with pytest.raises(DBAPIError, match="permission denied"):
        await rows(database, f"DELETE FROM {table}")


@dataclass(frozen=True)
class Managed:
    """Databases of a role that may make roles and is no superuser, as services give."""

    admin: str
    first: URL
    second: URL
    prefix: str


@pytest.fixture(scope="module")
def admins(server_url: URL) -> Iterator[URL]:
    """A migrated database of that role; pgvector was there already."""
    admin = f"kt_{RUN}_admin"

    async def make(url: URL) -> None:
        await run_sql(server_url, f"CREATE ROLE {admin} LOGIN CREATEROLE PASSWORD '{RUN}'")
        await run_sql(server_url.set(database=url.database), "CREATE EXTENSION vector")
        await run_sql(server_url, f"ALTER DATABASE {url.database} OWNER TO {admin}")
        url = url.set(username=admin, password=RUN)
        async with Database(url, settings_for(url)) as database:
            await migrations.upgrade(database)

    with new_database(server_url) as url:
        asyncio.run(make(url))
        yield url.set(username=admin, password=RUN)
    asyncio.run(run_sql(server_url, f"DROP ROLE {admin}"))


@pytest.fixture
def managed(server_url: URL, admins: URL) -> Iterator[Managed]:
    prefix = f"kt_{RUN}_{uuid.uuid4().hex[:6]} \"Ö'\\"
    admin = str(admins.username)
    with ExitStack() as stack:
        urls = [stack.enter_context(new_database(server_url, template=str(admins.database))) for _ in range(2)]
        for url in urls:
            asyncio.run(run_sql(server_url, f"ALTER DATABASE {url.database} OWNER TO {admin}"))
        yield Managed(admin, *(url.set(username=admin, password=RUN) for url in urls), prefix)
    names = [*roles.names(prefix).values(), *(f"{prefix}_{name}" for name in ("bot", "other"))]
    quoted = ", ".join(each.replace('"', '""').join('""') for each in names)
    asyncio.run(run_sql(server_url, f"DROP ROLE IF EXISTS {quoted}"))


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


ACLS = """
    SELECT relname::text, relowner::regrole::text, relacl::text FROM pg_class
    WHERE relnamespace = 'public'::regnamespace
    UNION ALL
    SELECT proname, proowner::regrole::text, proacl::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL
    SELECT defaclobjtype::text, defaclrole::regrole::text, defaclacl::text FROM pg_default_acl
    ORDER BY 1, 2
"""


async def test_on_a_managed_server_two_databases_are_granted_at_once_and_again(managed: Managed) -> None:
    async with (
        Database(managed.first, settings_for(managed.first)) as first,
        Database(managed.second, settings_for(managed.second)) as second,
    ):
        done = await asyncio.gather(*(roles.grant(each, prefix=managed.prefix) for each in (first, second, first)))
        assert {name for each in done for name in each.created} == set(done[0].roles.values())
        before = await rows(first, ACLS)
        await roles.grant(first, prefix=managed.prefix)
        assert await rows(first, ACLS) == before
        assert await roles.missing(first, prefix=managed.prefix) == ()

        # The second database uses them too, so nothing is taken from the first either.
        names = roles.names(managed.prefix)
        kept = await roles.drop(first, prefix=managed.prefix)
        assert (kept.dropped, set(kept.kept)) == ((), set(names.values()))
        assert await rows(first, ACLS) == before

        await roles.revoke(first, prefix=managed.prefix)
        assert await rows(first, "SELECT DISTINCT tableowner::text FROM pg_tables WHERE schemaname = 'public'") == [
            (managed.admin,)
        ]
        bot = f"{managed.prefix}_bot"
        await rows(second, f"CREATE ROLE {quoted(bot)} IN ROLE {quoted(names[Role.READONLY])}")
        gone = await roles.drop(second, prefix=managed.prefix)
        assert set(gone.dropped) == {names[Role.APP], names[Role.WORKER], names[Role.BACKUP]}
        assert gone.kept[names[Role.READONLY]] == f"it has members: {bot}"
        assert set(gone.kept) == {names[Role.READONLY], names[Role.OWNER]}


@pytest.mark.parametrize("has_stray", [False, True])
async def test_another_prefix_and_back_and_the_abandoned_one_is_dropped(
    managed: Managed, server_url: URL, has_stray: bool
) -> None:
    alpha, beta = managed.prefix, f"{managed.prefix} b;"
    migrator, owner = f"{alpha}_other", roles.names(alpha)[Role.OWNER]
    async with Database(managed.first, settings_for(managed.first)) as database:
        await roles.grant(database, prefix=alpha)
        await rows(database, f"CREATE ROLE {quoted(migrator)} LOGIN IN ROLE {quoted(owner)}")
        await roles.grant(database, prefix=beta)
        if has_stray:
            # As earlier versions left it.
            await rows(database, f"GRANT {quoted(roles.names(beta)[Role.OWNER])} TO {quoted(owner)}")
            await roles.grant(database, prefix=beta)
        member = "SELECT pg_has_role(:role, :owner, 'MEMBER')"
        other = roles.names(beta)[Role.OWNER]
        assert await rows(database, member, role=migrator, owner=other) == [(True,)]
        assert await rows(database, member, role=owner, owner=other) == [(False,)]
        for prefix in (alpha, beta, alpha):
            await roles.grant(database, prefix=prefix)
            assert await roles.missing(database, prefix=prefix) == ()
        gone = await roles.drop(database, prefix=beta)
        assert (set(gone.dropped), gone.kept) == (set(roles.names(beta).values()), {})
        assert await roles.missing(database, prefix=alpha) == ()
        await migrations.downgrade(database, "0003")


async def test_tables_made_later_are_covered_and_whoever_migrated_goes_on(managed: Managed) -> None:
    names = roles.names(managed.prefix)
    async with Database(managed.first, settings_for(managed.first)) as database:
        await roles.grant(database, prefix=managed.prefix)
        await migrations.downgrade(database, "0002")
        await migrations.upgrade(database)
        await rows(database, "CREATE TABLE later (id bigserial PRIMARY KEY)")
        checks = [(names[Role.APP], "INSERT", True), (names[Role.READONLY], "SELECT", True)]
        checks += [(names[Role.READONLY], "INSERT", False), (names[Role.BACKUP], "SELECT", True)]
        for name, privilege, expected in checks:
            for table in ("later", "chunk_terms"):
                found = await rows(
                    database, "SELECT has_table_privilege(:name, :table, :what)", name=name, table=table, what=privilege
                )
                assert found == [(expected,)], (name, privilege, table)
        sequence = "SELECT has_sequence_privilege(:name, 'later_id_seq', 'USAGE')"
        found = await rows(database, sequence, name=names[Role.APP])
        assert found == [(True,)]


async def test_what_an_administrator_makes_beside_ours_is_not_granted(managed: Managed, server_url: URL) -> None:
    url = server_url.set(database=managed.first.database)
    async with Database(url, settings_for(url)) as database:
        await roles.grant(database, prefix=managed.prefix)
        await rows(database, "CREATE TABLE payroll ()")
        allowed = "SELECT has_table_privilege(:role, 'payroll', 'SELECT')"
        assert await rows(database, allowed, role=f"{managed.prefix}_app") == [(False,)]


async def test_nobody_else_creates_in_our_schema(managed: Managed, server_url: URL) -> None:
    """As databases have it that were made before PostgreSQL 15."""
    await run_sql(server_url.set(database=managed.first.database), "GRANT CREATE ON SCHEMA public TO PUBLIC")
    async with Database(managed.first, settings_for(managed.first)) as database:
        await roles.grant(database, prefix=managed.prefix)
        name = roles.names(managed.prefix)[Role.APP]
        assert await rows(database, "SELECT has_schema_privilege(:name, 'public', 'CREATE')", name=name) == [(False,)]


async def test_what_was_taken_away_is_named(managed: Managed) -> None:
    async with Database(managed.first, settings_for(managed.first)) as database:
        assert len(await roles.missing(database, prefix=managed.prefix)) == len(Role)
        await roles.grant(database, prefix=managed.prefix)
        name = roles.names(managed.prefix)[Role.WORKER]
        await rows(database, f"REVOKE UPDATE ON embedding_jobs FROM {quoted(name)}")
        assert await roles.missing(database, prefix=managed.prefix) == (f"{name}: UPDATE on embedding_jobs",)


@pytest.mark.parametrize("prefix", ["", " ", "x" * 55, "pg", "a\0b", "語" * 20])
def test_a_prefix_that_names_no_role_is_refused(prefix: str) -> None:
    with pytest.raises(InvalidInputError):
        roles.names(prefix)


async def test_somebody_elses_login_role_becomes_no_group(managed: Managed, server_url: URL) -> None:
    name = roles.names(managed.prefix)[Role.APP]
    await run_sql(server_url, f"CREATE ROLE {quoted(name)} LOGIN")
    async with Database(managed.first, settings_for(managed.first)) as database:
        with pytest.raises(ConfigurationError, match="choose another --prefix"):
            await roles.grant(database, prefix=managed.prefix)


def cli(url: URL, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    return CliRunner().invoke(app, [*arguments])


def test_the_printed_statements_do_the_same(managed: Managed, monkeypatch: pytest.MonkeyPatch, server_url: URL) -> None:
    prefix = managed.prefix
    printed = cli(managed.first, monkeypatch, "grants", "--prefix", prefix, "--sql")
    assert printed.exit_code == 0, printed.output
    asyncio.run(run_sql(managed.first, printed.stdout))

    async def missing() -> tuple[str, ...]:
        async with Database(managed.first, settings_for(managed.first)) as database:
            return await roles.missing(database, prefix=prefix)

    assert asyncio.run(missing()) == ()
    again = cli(managed.first, monkeypatch, "grants", "--prefix", prefix, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["created"] == []
    gone = cli(managed.first, monkeypatch, "grants", "--prefix", prefix, "--drop", "--yes", "--json")
    assert len(json.loads(gone.stdout)["dropped"]) == len(Role)


def test_a_role_that_may_not_make_roles_is_told_what_it_needs(
    managed: Managed, monkeypatch: pytest.MonkeyPatch, server_url: URL
) -> None:
    other = f"{managed.prefix}_other"
    asyncio.run(run_sql(server_url, f"CREATE ROLE {quoted(other)} LOGIN PASSWORD '{RUN}'"))
    url = managed.first.set(username=other, password=RUN)
    refused = cli(url, monkeypatch, "grants", "--prefix", managed.prefix, "--schema", "public")
    assert refused.exit_code == 3
    assert "CREATEROLE" in refused.stderr
    assert refused.stderr.count("\n") == 1
