"""check, migrate, current, sql, downgrade."""

from typing import Annotated, Final

import typer
from rich.console import Group
from sqlalchemy import text

from kotonoha_store import migration_scripts, migrations
from kotonoha_store.cli.app import (
    SET_UP,
    AsJson,
    Yes,
    app,
    confirm,
    open_database,
    origin_of_address,
    pairs,
    plain,
    show,
)
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.migrations import SchemaState
from kotonoha_store.settings import Settings
from kotonoha_store.statistics import connection_report

Revision = Annotated[str, typer.Argument(help="A revision such as 0003; base: before the first; -1: one back.")]
# Else -1 would be an option.
_RELATIVE: Final = {"ignore_unknown_options": True}


@app.command(rich_help_panel=SET_UP)
async def check(as_json: AsJson = False) -> None:
    """Test the connection: server, pgvector, round trip, and where the schema stands.

    Needs no schema: it is the first thing to run. What is wrong beyond that, `doctor` finds.

    Example: kotonoha-store check --json
    """
    async with open_database(check=False) as database:
        report = await connection_report(database)
        state = await migrations.state(database)
        await database.check_direct_url()
    by = origin_of_address(Settings())
    server = f"PostgreSQL {report.server}{' (a read-only replica)' if report.is_replica else ''}"
    where = f"{report.host or 'a socket'}, {f'port {report.port}, ' if report.port else ''}{report.tls or 'no TLS'}"
    pgvector = report.pgvector or (
        f"not in this database; `migrate` creates {report.pgvector_available} where the role may"
        if report.pgvector_available
        else "not installed on this server"
    )
    people = pairs(
        [
            ("server", server),
            ("pgvector", pgvector),
            ("database", report.database),
            ("user", report.user),
            ("connected to", where),
            ("configured by", by),
            ("round trip", f"{report.round_trip_seconds * 1000:.2f} ms"),
            ("schema", _sentence(state)),
        ]
    )
    show({"connection": report, "configured_by": by, "schema": state}, as_json, people)


@app.command(rich_help_panel=SET_UP)
async def current(as_json: AsJson = False) -> None:
    """Say at which revision the schema is, and fail (5) unless it is this version's.

    Example: kotonoha-store current || kotonoha-store migrate
    """
    async with open_database(check=False) as database:
        state = await migrations.state(database)
    show(state, as_json, pairs([("revision", state.revision), ("needed", state.head), ("state", state.state)]))
    state.check()


@app.command(rich_help_panel=SET_UP)
async def migrate(
    revision: Annotated[str, typer.Argument(help="How far, such as 0003, or +1; the newest by default.")] = "head",
    as_json: AsJson = False,
) -> None:
    """Create the tables, or bring them to this version. Safe to run again, and by several at once.

    Where the role may not create the extension pgvector, the error says who can.

    Example: kotonoha-store migrate
    """
    async with open_database(check=False) as database:
        before = await _not_newer(database)
        await migrations.upgrade(database, migration_scripts.resolve(revision, before.revision))
        after = await migrations.state(database)
    changed = before.revision != after.revision
    line = f"migrated from {before.revision or 'nothing'} to {after.revision}" if changed else "nothing to do"
    result = {"from": before.revision, "to": after.revision, "changed": changed, "state": after.state}
    show(result, as_json, plain(f"{line}; {_sentence(after)}"))


@app.command("sql", rich_help_panel=SET_UP)
def sql(
    revisions: Annotated[str, typer.Argument(metavar="[FROM:]TO", help="Such as head, 0003, or 0003:head.")] = "head",
    downgrade: Annotated[bool, typer.Option("--downgrade", help="The way back: FROM:TO, such as head:0003.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the SQL of the migrations, for whoever has to run it by hand or look at it first.

    Asks no database; without FROM it begins with an empty one. KB_HNSW_M and KB_HNSW_EF_CONSTRUCTION are written in.
    What fills columns from rows that are there is done by `migrate` alone.

    Example: kotonoha-store sql 0003:head > upgrade.sql
    """
    if downgrade:
        start, separator, end = revisions.partition(":")
        if not separator:
            raise typer.BadParameter("a downgrade goes FROM:TO, such as head:0003")
        start = migrations.head() if start == "head" else start
        script = migration_scripts.downgrade_sql(start, end)
    else:
        script = migration_scripts.upgrade_sql(revisions)
    if as_json:
        show({"sql": script}, as_json)
    else:
        # As it is: neither wrapped nor without its tabs.
        typer.echo(script or "-- nothing to do", nl=False)


@app.command(rich_help_panel=SET_UP, context_settings=_RELATIVE)
async def downgrade(revision: Revision, yes: Yes = False, as_json: AsJson = False) -> None:
    """Bring the schema back to an earlier revision. Says what is lost, and asks.

    Tables and columns that came since are dropped with all that is in them: `backup` first.

    Example: kotonoha-store downgrade 0003
    """
    async with open_database(check=False) as database:
        state = await _not_newer(database)
        if state.revision is None:
            state.check()
        revision = migration_scripts.resolve(revision, state.revision)
        losses = migration_scripts.losses(str(state.revision), revision)
        counted = {table: await _count(database, table) for table in losses.tables}
        if not yes:
            tables = [f"the table {name} with {count} rows" for name, count in counted.items()]
            columns = [f"the column {name}" for name in losses.columns]
            lost = "\n".join(f"  {each}" for each in [*tables, *columns]) or "  nothing"
            typer.echo(f"From {state.revision} back to {revision}, this is lost:\n{lost}", err=True)
        confirm("Go on?", yes)
        await migrations.downgrade(database, revision)
        after = await migrations.state(database)
    result = {
        "from": state.revision,
        "to": after.revision,
        "dropped_tables": counted,
        "dropped_columns": losses.columns,
    }
    show(result, as_json, Group(plain(f"from {state.revision} back to {after.revision or 'nothing'}")))


async def _not_newer(database: Database) -> SchemaState:
    state = await migrations.state(database)
    if state.state == "newer":
        state.check()
    return state


async def _count(database: Database, table: str) -> int:
    async with database.connect() as connection:
        with translated_errors():
            exists = (await connection.execute(text("SELECT to_regclass(:name)"), {"name": table})).scalar()
            count = text(f"SELECT count(*) FROM {table}")  # noqa: S608  a name from our own scripts
            return (await connection.execute(count)).scalar_one() if exists else 0


def _sentence(state: SchemaState) -> str:
    if state.state == "current":
        return f"at {state.revision}, which this version needs"
    if state.state == "empty":
        return "empty; run `kotonoha-store migrate`"
    if state.state == "outdated":
        return f"at {state.revision}, this version needs {state.head}; run `kotonoha-store migrate`"
    return f"at {state.revision}, which this version (up to {state.head}) does not know; install a newer one"
