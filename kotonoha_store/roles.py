"""Group roles with least privilege: what an application, a worker, a reader and a backup may do, and no more.

Five roles that cannot log in: ``<prefix>_owner`` owns the tables, and whoever migrates is a member of it;
``_app`` keeps sessions and knowledge, archives and searches, and so may read dead letters, and retitle and delete them
as it does their sources; ``_worker`` archives, embeds and looks after dead letters; ``_readonly`` reads;
``_backup`` reads what pg_dump does. A login role is made a member:
``GRANT kotonoha_app TO mybot``. A bot that also runs the workers is a member of both.

Roles belong to the whole server, privileges to one database: the same prefix may serve several databases.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sqlalchemy import Enum, text
from sqlalchemy.ext.asyncio import AsyncConnection

from kotonoha_store import migrations, role_queries
from kotonoha_store.checks import check_text
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import sqlstate_of, translated_errors
from kotonoha_store.errors import ConfigurationError, InvalidInputError, SchemaOutdatedError, StoreError
from kotonoha_store.models import Base

DEFAULT_PREFIX: Final = "kotonoha"

# One at a time within a database; not the migrations' lock, so that a waiting one never keeps an index build waiting.
_LOCK_ID: Final = migrations.LOCK_ID + 1
_ATTEMPTS: Final = 10
# Changing an owner stops every query of that table behind it: rather give up.
_LOCK_TIMEOUT: Final = "SET LOCAL lock_timeout = '10s'"


class Role(StrEnum):
    """What the group roles are for; the value is the name's ending."""

    OWNER = "owner"
    APP = "app"
    WORKER = "worker"
    READONLY = "readonly"
    BACKUP = "backup"


_READ: Final = "SELECT"
_ADD: Final = "SELECT, INSERT"
_KEEP: Final = "SELECT, INSERT, UPDATE, DELETE"

_TABLES: Final[dict[Role, dict[str, str]]] = {
    Role.APP: {
        "sessions": _KEEP,
        "knowledge_sources": _KEEP,
        "knowledge_chunks": _KEEP,
        "chunk_terms": "SELECT, INSERT, DELETE",
        "term_frequencies": _READ,
        "embedding_jobs": _ADD,
        "embedding_pauses": _READ,
        "knowledge_chunks_dlq": "SELECT, UPDATE, DELETE",
        "alembic_version": _READ,
    },
    Role.WORKER: {
        "sessions": "SELECT, UPDATE",
        "knowledge_sources": "SELECT, INSERT, UPDATE",
        "knowledge_chunks": _KEEP,
        "chunk_terms": "SELECT, INSERT",
        "term_frequencies": _READ,
        "embedding_jobs": _KEEP,
        "embedding_pauses": _KEEP,
        "knowledge_chunks_dlq": _KEEP,
        "alembic_version": _READ,
    },
}
# Of tables that a later version adds, until it runs this again.
_LATER_TABLES: Final[dict[Role, str]] = {Role.APP: _KEEP, Role.WORKER: _KEEP, Role.READONLY: _READ, Role.BACKUP: _READ}
_SEQUENCES: Final[dict[Role, str]] = {Role.APP: "USAGE", Role.WORKER: "USAGE", Role.BACKUP: _READ}
_FUNCTIONS: Final[dict[Role, str]] = {Role.APP: "EXECUTE", Role.WORKER: "EXECUTE"}

OUR_TABLES: Final = (*sorted(Base.metadata.tables), "alembic_version")
_OUR_TYPES: Final = sorted(
    {
        str(column.type.name)
        for table in Base.metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, Enum)
    }
)


@dataclass(frozen=True, slots=True)
class Grants:
    """What :func:`grant` did.

    Attributes:
        schema: where the tables are.
        roles: the names of the group roles, by what they are for.
        created: those that were made now.
        members: who was a member of those that were there: they have these privileges too.
        statements: what was run, in order; running them again changes nothing.
    """

    schema: str
    roles: dict[Role, str]
    created: tuple[str, ...]
    members: dict[str, tuple[str, ...]]
    statements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dropped:
    """What :func:`drop` did.

    Attributes:
        dropped: the roles that are gone.
        kept: those that are in use, and why; their privileges are as they were.
    """

    dropped: tuple[str, ...]
    kept: dict[str, str]


def names(prefix: str = DEFAULT_PREFIX) -> dict[Role, str]:
    """Return the names of the group roles.

    Raises:
        InvalidInputError: the prefix cannot begin a role's name.
    """
    check_text(prefix, "prefix")
    result = {role: f"{prefix}_{role}" for role in Role}
    # PostgreSQL would cut a longer name without a word.
    if not prefix.strip() or max(len(name.encode()) for name in result.values()) > 63:
        raise InvalidInputError("the prefix of the roles must have 1 to 54 bytes")
    if prefix.startswith("pg") and "_" in f"{prefix}_"[2:3]:
        raise InvalidInputError("names of roles that begin with pg_ are PostgreSQL's own; choose another prefix")
    return result


async def script(database: Database, *, prefix: str = DEFAULT_PREFIX, schema: str | None = None) -> tuple[str, ...]:
    """Return the statements that :func:`grant` would run now, for somebody else to run.

    Raises: as :func:`grant`.
    """
    wanted = names(prefix)
    async with database.transaction() as connection:
        with translated_errors():
            facts = await _look(connection, wanted, schema)
    return (*_make_roles(facts), *_change_owners(facts), *_privileges(facts))


async def grant(database: Database, *, prefix: str = DEFAULT_PREFIX, schema: str | None = None) -> Grants:
    """Make the group roles where they are missing, and give each what it needs in this database, and no more.

    Tables, types and functions of ours come to belong to the owner role; this role, and whose they were, become
    members of it. Tables that these make later are covered by default privileges. Safe to run again, and by several
    at once; to be run again after each upgrade.

    Args:
        prefix: what the names begin with.
        schema: where the tables are, if not where the search_path finds them.

    Raises:
        ConfigurationError: this role may not make roles, or does not own the tables; or a role of that name can log
            in and so is no group of ours. The message says what to do.
        InvalidInputError: the prefix cannot begin a role's name.
        SchemaOutdatedError: the tables are not there.
        StoreTimeoutError: a table was in use too long to change its owner. Run it again.
    """
    wanted = names(prefix)
    done: list[str] = []
    with _privileged():
        before = await _apply(database, wanted, schema, _make_roles, done)
        # One by one: an application's transaction that holds two tables would deadlock with one that wants both.
        while _change_owners(facts := await _apply(database, wanted, schema, _next_owner, done)):
            pass
        await _apply(database, wanted, schema, _privileges, done)
    if lacking := await missing(database, prefix=prefix, schema=schema):
        raise ConfigurationError(
            f"not everything could be granted: {lacking[0]} is missing ({len(lacking)} in all); run it as the role "
            f"that owns the schema {facts.schema} and this database, or as a superuser"
        )
    created = tuple(name for name in wanted.values() if name not in before.existing)
    members = {name: facts.members[name] for name in wanted.values() if facts.members.get(name)}
    return Grants(facts.schema, wanted, created, members, tuple(done))


async def missing(database: Database, *, prefix: str = DEFAULT_PREFIX, schema: str | None = None) -> tuple[str, ...]:
    """Return what the group roles lack, as ``kotonoha_app: INSERT on sessions``; empty when all is well.

    Raises:
        SchemaOutdatedError: the tables are not there.
    """
    wanted = names(prefix)
    async with database.transaction() as connection:
        with translated_errors():
            facts = await _look(connection, wanted, schema)
            if absent := [name for name in wanted.values() if name not in facts.existing]:
                return tuple(f"{name}: the role itself" for name in absent)
            expected = [
                (facts.names[role], "table", f"{_quoted(facts.schema)}.{_quoted(table)}", table, privilege)
                for role in _LATER_TABLES
                for table in facts.tables
                for privilege in privileges_on(role, table).split(", ")
            ]
            expected += [
                (facts.names[role], "sequence", f"{_quoted(facts.schema)}.{_quoted(sequence)}", sequence, privilege)
                for role, privilege in _SEQUENCES.items()
                for sequence in facts.sequences
            ]
            expected += [
                (facts.names[role], "function", function, function, privilege)
                for role, privilege in _FUNCTIONS.items()
                for function in facts.functions
            ]
            for name in wanted.values():
                expected.append((name, "schema", facts.schema, f"the schema {facts.schema}", "USAGE"))
                expected.append((name, "database", facts.database, "this database", "CONNECT"))
            columns = ("roles", "kinds", "objects", "labels", "privileges")
            values = {name: [each[i] for each in expected] for i, name in enumerate(columns)}
            found = await connection.execute(role_queries.LACKING, values)
            return tuple(f"{row.role}: {row.privilege} on {row.label}" for row in found)


async def revoke(database: Database, *, prefix: str = DEFAULT_PREFIX) -> tuple[str, ...]:
    """Take from the group roles all they have in this database; their tables come to belong to this role.

    The roles themselves stay, see :func:`drop`.

    Returns:
        The statements that were run.

    Raises: as :func:`grant`.
    """
    done: list[str] = []
    with _privileged():
        await _take_back(database, list(names(prefix).values()), done)
    return tuple(done)


async def drop(database: Database, *, prefix: str = DEFAULT_PREFIX) -> Dropped:
    """Drop the group roles that nobody uses, with what they have in this database.

    One that has members, or is used in another database, is kept as it is.

    Raises: as :func:`grant`.
    """
    # The owner last: its default privileges name the others.
    wanted = [*names(prefix).values()][::-1]
    dropped: list[str] = []
    kept: dict[str, str] = {}
    with _privileged():
        async with database.transaction() as connection:
            with translated_errors():
                uses = await _uses(connection, wanted, names(prefix)[Role.OWNER])
        for name, who in uses.items():
            if name == names(prefix)[Role.OWNER] and kept:
                # Its default privileges name them.
                kept[name] = "others are kept, and what it makes is for them"
                continue
            if who:
                kept[name] = who
                continue
            await _take_back(database, [name], [])
            if reason := await _drop(database, name):
                kept[name] = reason
            else:
                dropped.append(name)
    return Dropped(tuple(dropped), kept)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is there before anything is done."""

    names: dict[Role, str]
    database: str
    user: str
    is_superuser: bool
    schema: str
    schema_is_open: bool
    owns_database: bool
    vector_schema: str | None
    tables: tuple[str, ...]
    sequences: tuple[str, ...]
    functions: tuple[str, ...]
    # Kind, name and owner of what belongs to somebody else than the owner role.
    foreign: tuple[tuple[str, str, str], ...]
    # Whose default privileges this role may set.
    migrators: tuple[str, ...]
    # Former owners that need to become members of the owner role.
    outside: tuple[str, ...]
    # Owner roles of other prefixes that were made members of this one's.
    strays: tuple[str, ...]
    existing: frozenset[str]
    members: dict[str, tuple[str, ...]]


async def _look(connection: AsyncConnection, wanted: dict[Role, str], schema: str | None) -> _Facts:
    where = (await connection.execute(role_queries.WHERE, {"schema": schema})).one_or_none()
    if where is None:
        raise SchemaOutdatedError(
            f"there are no tables of ours in the schema {schema}"
            if schema is not None
            else "the database was never migrated; run `kotonoha-store migrate` or `alembic upgrade head`"
        )
    roles = (await connection.execute(role_queries.ROLES, {"names": list(wanted.values())})).all()
    for role in roles:
        if role.is_foreign:
            raise ConfigurationError(
                f"the role {role.rolname} is there already and can log in, so it is no group of this library's; "
                "choose another --prefix"
            )
    owner = wanted[Role.OWNER]
    looked_for = {"schema": where.oid, "tables": list(OUR_TABLES), "types": _OUR_TYPES}
    objects = (await connection.execute(role_queries.OBJECTS, looked_for)).all()
    endings = [str(each) for each in Role if each is not Role.OWNER]
    belonging = {"owner": owner, "owners": sorted({each.owner for each in objects}), "endings": endings}
    owners = (await connection.execute(role_queries.OWNERS, belonging)).all()
    owner_names = {each.oid: each.rolname for each in owners}
    foreign = tuple(
        (each.kind, each.quoted, owner_names[each.owner])
        for each in objects
        # A column's sequence goes with its table.
        if each.kind != "SEQUENCE" and owner_names[each.owner] != owner
    )
    former = {each[2] for each in foreign} | {where.role}
    # Of another prefix: its members go on migrating; were it one itself, there would be no way back.
    groups = [each for each in owners if each.is_group]
    former |= {
        owner_names[member]
        for each in groups
        if each.rolname in former
        for member in each.members
        if member in owner_names
    }
    former -= {each.rolname for each in groups} | {owner}
    migrators = {each.rolname for each in owners if each.is_ours and not each.is_group}
    # An administrator who merely runs this makes tables for others too: those are nobody's of these groups.
    runner = set() if where.is_superuser else {where.role}
    migrators &= (
        runner | {owner_names[each.owner] for each in objects} | {each.rolname for each in owners if each.has_owner}
    )
    return _Facts(
        names=wanted,
        database=where.database,
        user=where.role,
        is_superuser=where.is_superuser,
        schema=where.schema,
        schema_is_open=where.is_open,
        owns_database=where.owns_database,
        vector_schema=where.vector_schema,
        tables=tuple(each.name for each in objects if each.kind == "TABLE"),
        sequences=tuple(each.name for each in objects if each.kind == "SEQUENCE"),
        functions=tuple(each.quoted for each in objects if each.kind == "FUNCTION"),
        foreign=foreign,
        migrators=tuple({owner: None, **dict.fromkeys(sorted(migrators))}),
        outside=tuple(
            each.rolname for each in owners if each.rolname in former and not (each.rolsuper or each.is_member)
        ),
        strays=tuple(each.rolname for each in groups if each.has_owner),
        existing=frozenset(each.rolname for each in roles),
        members={each.rolname: tuple(each.members) for each in roles},
    )


def _make_roles(facts: _Facts) -> list[str]:
    """The roles, and who may act as the owner."""
    result = []
    for name in facts.names.values():
        if name not in facts.existing:
            # Whoever makes it at the same time, in any database, is waited for.
            block = (
                f"BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {_literal(name)})"
                f" THEN CREATE ROLE {_quoted(name)} NOLOGIN; END IF;"
                " EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END"
            )
            result.append(f"DO {_literal(block)}")
    owner = _quoted(facts.names[Role.OWNER])
    # Since PostgreSQL 16 whoever makes a role may grant it, but neither is nor becomes it.
    result += [f"REVOKE {owner} FROM {_quoted(name)}" for name in facts.strays]
    result += [f"GRANT {owner} TO {_quoted(name)} WITH INHERIT TRUE, SET TRUE" for name in facts.outside]
    schema = _quoted(facts.schema)
    everybody = _list(facts.names.values())
    result.append(f"GRANT USAGE ON SCHEMA {schema} TO {everybody}")
    result.append(f"GRANT CREATE ON SCHEMA {schema} TO {owner}")
    return result


def _change_owners(facts: _Facts) -> list[str]:
    owner = _quoted(facts.names[Role.OWNER])
    return [f"ALTER {kind} {name} OWNER TO {owner}" for kind, name, _ in facts.foreign]


def _next_owner(facts: _Facts) -> list[str]:
    first = _change_owners(facts)[:1]
    return [_LOCK_TIMEOUT, *first] if first else []


def _privileges(facts: _Facts) -> list[str]:
    """What each may do. Taken away and given in one transaction, so that nobody notices."""
    schema = _quoted(facts.schema)
    groups: dict[Role, str] = {role: _quoted(name) for role, name in facts.names.items() if role is not Role.OWNER}
    everybody = ", ".join(groups.values())
    result = []
    if facts.schema_is_open:
        # As databases from before PostgreSQL 15 have it: anyone could put a function in front of ours.
        result.append(f"REVOKE CREATE ON SCHEMA {schema} FROM PUBLIC")
    if facts.owns_database:
        result.append(
            f"GRANT CONNECT ON DATABASE {_quoted(facts.database)} TO {_quoted(facts.names[Role.OWNER])}, {everybody}"
        )
    if facts.vector_schema is not None:
        result.append(f"GRANT USAGE ON SCHEMA {_quoted(facts.vector_schema)} TO {everybody}")
    for table in facts.tables:
        name = f"{schema}.{_quoted(table)}"
        result.append(f"REVOKE ALL ON TABLE {name} FROM PUBLIC, {everybody}")
        result += [f"GRANT {privileges_on(role, table)} ON TABLE {name} TO {group}" for role, group in groups.items()]
    for sequence in facts.sequences:
        name = f"{schema}.{_quoted(sequence)}"
        result.append(f"REVOKE ALL ON SEQUENCE {name} FROM PUBLIC, {everybody}")
        result += [f"GRANT {what} ON SEQUENCE {name} TO {groups[role]}" for role, what in _SEQUENCES.items()]
    for function in facts.functions:
        result.append(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC, {everybody}")
        result += [f"GRANT {what} ON FUNCTION {function} TO {groups[role]}" for role, what in _FUNCTIONS.items()]
    for migrator in facts.migrators:
        start = f"ALTER DEFAULT PRIVILEGES FOR ROLE {_quoted(migrator)} IN SCHEMA {schema} GRANT"
        for kind, given in (("TABLES", _LATER_TABLES), ("SEQUENCES", _SEQUENCES), ("FUNCTIONS", _FUNCTIONS)):
            result += [f"{start} {what} ON {kind} TO {groups[role]}" for role, what in given.items()]
    return result


def privileges_on(role: Role, table: str) -> str:
    """Return what this role may do to one of :data:`OUR_TABLES`, as GRANT writes it."""
    return _TABLES[role][table] if role in _TABLES else _READ


async def _uses(connection: AsyncConnection, wanted: Sequence[str], owner: str) -> dict[str, str | None]:
    """Who uses each of the roles that are there, in words; None when nobody does."""
    result: dict[str, str | None] = {}
    for row in await connection.execute(role_queries.USES, {"names": list(wanted), "owner": owner}):
        result[row.name] = None
        if row.databases:
            result[row.name] = f"it is used in the database {', '.join(row.databases)}"
        if row.members:
            result[row.name] = f"it has members: {', '.join(row.members)}"
    return result


async def _take_back(database: Database, wanted: Sequence[str], done: list[str]) -> None:
    async def statements(connection: AsyncConnection) -> list[str]:
        result = [_LOCK_TIMEOUT]
        for query in (role_queries.OWNED, role_queries.GRANTED):
            result += (await connection.execute(query, {"names": list(wanted)})).scalars()
        return result

    await _in_turn(database, statements, done)


async def _drop(database: Database, name: str) -> str | None:
    """Drop a role that nothing here refers to; else return why not."""
    try:
        async with database.transaction() as connection:
            with translated_errors():
                await connection.exec_driver_sql(f"DROP ROLE IF EXISTS {_quoted(name)}")
    except StoreError as error:
        # Used since it was looked for.
        if sqlstate_of(error) == "2BP01":
            return "it has come into use"
        raise
    return None


async def _apply(
    database: Database,
    wanted: dict[Role, str],
    schema: str | None,
    make: Callable[[_Facts], list[str]],
    done: list[str],
) -> _Facts:
    facts: _Facts | None = None

    async def statements(connection: AsyncConnection) -> list[str]:
        nonlocal facts
        facts = await _look(connection, wanted, schema)
        return make(facts)

    await _in_turn(database, statements, done)
    assert facts is not None  # noqa: S101  set by the first look
    return facts


async def _in_turn(
    database: Database, make: Callable[[AsyncConnection], Awaitable[list[str]]], done: list[str]
) -> None:
    """Run statements in one transaction, one such at a time in this database.

    Roles and memberships are the server's: those who change them from another database are met, and it is tried again.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            async with database.transaction() as connection:
                with translated_errors():
                    await connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _LOCK_ID})
                    statements = await make(connection)
                    for statement in statements:
                        await connection.exec_driver_sql(statement)
        except StoreError as error:
            if attempt == _ATTEMPTS or sqlstate_of(error) not in _RACES:
                raise
            await asyncio.sleep(random.uniform(0, 0.05 * attempt))  # noqa: S311  no secret
        else:
            done.extend(each for each in statements if each != _LOCK_TIMEOUT)
            return


# "tuple concurrently updated", unique_violation in a catalog, duplicate_object, deadlock_detected.
_RACES: Final = frozenset({"XX000", "23505", "42710", "40P01"})


@contextmanager
def _privileged() -> Iterator[None]:
    """Say what a role needs that may not do this."""
    try:
        yield
    except ConfigurationError as error:
        if sqlstate_of(error) != "42501":
            raise
        raise ConfigurationError(
            "this role may not do that: it needs CREATEROLE (or roles made by an admin from `kotonoha-store grants "
            "--sql`), and the tables or membership in whose they are; connect as the role that migrated, or as an admin"
        ) from error


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str) -> str:
    # However standard_conforming_strings is set.
    prefix = "E" if "\\" in value else ""
    return prefix + "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _list(values: Iterable[str]) -> str:
    return ", ".join(_quoted(value) for value in values)
