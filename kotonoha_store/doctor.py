"""The doctor: what is wrong with a database, or soon will be, and what mends it.

Each check is a question of its own; one that cannot be asked (a privilege is lacking, a table is locked) becomes a
finding, and the others go on. Nothing is changed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import asyncpg

from kotonoha_store import doctor_server as server
from kotonoha_store import doctor_tables as tables
from kotonoha_store import migrations
from kotonoha_store.checks import check_number
from kotonoha_store.database import Database
from kotonoha_store.doctor_findings import Case, Finding, Severity, error, ok, warning, worst
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import ConfigurationError, SchemaOutdatedError, StoreError, StoreTimeoutError
from kotonoha_store.records import Progress

__all__ = ["DoctorReport", "Finding", "Severity", "examine"]

Check: TypeAlias = Callable[[Case], Awaitable[list[Finding]]]

_SERVER: Final[tuple[Check, ...]] = (
    server.server_version,
    server.pgvector,
    server.durability,
    server.defaults,
    server.connections,
    server.pooler,
    server.direct_url,
    server.role,
)
_TABLES: Final[tuple[Check, ...]] = (
    server.privileges,
    server.row_security,
    tables.constraints,
    tables.indexes,
    tables.vector_index,
    tables.vector_index_used,
    tables.build_time,
    tables.dead_rows,
    tables.deletions,
    tables.long_transactions,
    tables.queue,
    tables.dead_letters,
    tables.pauses,
    tables.words,
    tables.models,
)


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What :func:`examine` found.

    Attributes:
        findings: of every check, also those that are content.
        seconds: how long it took.
    """

    findings: tuple[Finding, ...]
    seconds: float

    @property
    def worst(self) -> Severity:
        return worst(*(finding.severity for finding in self.findings))

    @property
    def is_well(self) -> bool:
        """Whether nothing is a warning or worse."""
        return not any(finding.is_bad for finding in self.findings)


async def examine(
    database: Database,
    *,
    model: str | None = None,
    seconds_a_check: float = 15.0,
    progress: Progress | None = None,
    others: Sequence[Finding] = (),
) -> DoctorReport:
    """Ask everything.

    Args:
        model: the embedder's, whose vectors searches compare; None: any will do.
        seconds_a_check: how long one check may take.
        others: what the caller found by itself; first in the report.

    Raises:
        StoreUnavailableError: the database did not answer.
        ConfigurationError: it refused this user, password or database name.
        InvalidInputError: the seconds are out of range.
    """
    started = time.perf_counter()
    limit = check_number(seconds_a_check, "seconds_a_check", 0.1, 3600)
    with translated_errors():
        await database.ping()
    findings, at = await _schema(database, limit)
    checks = _SERVER + (_TABLES if at.state == "current" else ())
    for done, check in enumerate(checks):
        if progress is not None:
            progress(done, len(checks))
        findings += await _asked(check, database, model, at, limit)
    if progress is not None:
        progress(len(checks), len(checks))
    return DoctorReport((*others, *findings), time.perf_counter() - started)


async def _schema(database: Database, limit: float) -> tuple[list[Finding], migrations.SchemaState]:
    try:
        async with asyncio.timeout(limit):
            at = await migrations.state(database)
            if at.state == "empty":
                async with database.driver() as driver:
                    with translated_errors():
                        hidden = await server.hidden_schemas(driver)
                        name = await driver.fetchval("SELECT quote_ident(current_user)")
                if hidden:
                    seen = f"this role lacks USAGE on the schema {', '.join(hidden)}, which holds our tables"
                    grants = [f"GRANT USAGE ON SCHEMA {each} TO {name}" for each in hidden]
                    return [error("schema-privilege", seen, "have the schema's owner grant it", *grants)], at
                try:
                    await migrations.refuse_half_restored(database)
                except ConfigurationError as half_restored:
                    seen, _, mend = str(half_restored).partition("; ")
                    return [error("restore-unfinished", seen, mend)], at
    except (TimeoutError, StoreError) as failure:
        at = migrations.compare(None)
        return [_unasked("schema", failure, limit)], at
    try:
        at.check()
    except SchemaOutdatedError as outdated:
        seen, _, mend = str(outdated).partition("; ")
        return [error(f"schema-{at.state}", f"{seen}; its tables were not looked at", mend)], at
    return [ok("schema", f"revision {at.revision}")], at


async def _asked(
    check: Check, database: Database, model: str | None, at: migrations.SchemaState, limit: float
) -> list[Finding]:
    name = getattr(check, "__name__", "check").replace("_", "-")
    try:
        # A connection for each, since one that was cut off is not used again.
        async with asyncio.timeout(limit), database.driver() as driver:
            with translated_errors():
                return await check(Case(database, driver, model, at))
    except (TimeoutError, StoreError) as failure:
        return [_unasked(name, failure, limit)]


def _unasked(name: str, failure: Exception, limit: float) -> Finding:
    seen = f"this could not be looked at: {name}"
    cause = failure.__cause__
    if isinstance(cause, asyncpg.exceptions.InsufficientPrivilegeError):
        return warning(
            "unasked", f"{seen}, since this role lacks a privilege", "run the doctor as the owner of the tables"
        )
    if isinstance(failure, TimeoutError | StoreTimeoutError):
        mend = "see what holds a lock: SELECT * FROM pg_locks WHERE NOT granted; then run the doctor again"
        return warning("unasked", f"{seen}, no answer within {limit:g} s", mend)
    return warning("unasked", f"{seen} ({type(failure).__name__})", str(failure))
