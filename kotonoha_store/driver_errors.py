"""The driver's errors in this library's words: told by SQLSTATE and constraint name, never by the server's message."""

import functools
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

import asyncpg
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from kotonoha_store import metrics
from kotonoha_store.errors import (
    ConfigurationError,
    InvalidInputError,
    NotFoundError,
    SchemaOutdatedError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
)

P = ParamSpec("P")
R = TypeVar("R")


def sqlstate_of(error: BaseException | None) -> str | None:
    """Return the server's code behind an error of any layer, this library's included."""
    while error is not None:
        if state := getattr(error, "sqlstate", None):
            return str(state)
        error = getattr(error, "orig", None) or error.__cause__
    return None


def translate_error(error: BaseException) -> StoreError | None:
    """Return our error for the driver's, told by SQLSTATE and constraint name, or None if it is not one of them.

    The server's own message may quote stored data, so it stays in ``__cause__``.
    """
    if isinstance(error, PoolTimeoutError):
        return StoreTimeoutError("no connection came free in time; raise DB_POOL_MAX_SIZE or hold connections shorter")
    driver_error: BaseException = error
    if isinstance(error, DBAPIError):
        adapted = error.orig
        driver_error = (adapted.__cause__ if adapted is not None else None) or adapted or error
    elif isinstance(error, AsyncAdapt_asyncpg_dbapi.Error):
        driver_error = error.__cause__ or error
    if isinstance(driver_error, asyncpg.DataError | asyncpg.exceptions.UnsupportedClientFeatureError) and not getattr(
        driver_error, "sqlstate", None
    ):
        return InvalidInputError("a value does not fit its column (its type or size); nothing was written")
    if isinstance(driver_error, asyncpg.exceptions.InvalidCachedStatementError):
        return StoreUnavailableError("the schema changed under this connection; try again")
    sqlstate = getattr(driver_error, "sqlstate", None)
    if sqlstate and sqlstate.startswith("08"):
        # A pooler's own, told by nothing else: 08P01 in connecting, 08003 when it closes a connection.
        for said, kind, message in _OF_A_POOLER:
            if said in str(driver_error):
                return kind(message)
    if sqlstate:
        return _from_sqlstate(sqlstate, getattr(driver_error, "constraint_name", None))
    if isinstance(driver_error, TimeoutError):
        return StoreTimeoutError("the database did not answer within DB_COMMAND_TIMEOUT (or DB_CONNECT_TIMEOUT)")
    if isinstance(driver_error, socket.gaierror):
        return StoreUnavailableError(
            "the host name of the database cannot be resolved; where DATABASE_URL has a password with odd characters "
            "(@ / # %), percent-encode them"
        )
    if isinstance(driver_error, OSError | asyncpg.InterfaceError | asyncpg.exceptions.InternalClientError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    ):
        return StoreUnavailableError(
            f"the database cannot be reached or the connection broke ({type(driver_error).__name__}); "
            "check that it runs, where DATABASE_URL or POSTGRES_HOST point, and whether it offers what sslmode asks for"
        )
    return None


_CONSTRAINTS: Final[dict[str, tuple[type[StoreError], str]]] = {
    "knowledge_chunks_source_id_fkey": (NotFoundError, "the source does not exist (any more); nothing was written"),
    "idx_sources_origin": (InvalidInputError, "these messages of the session are archived already"),
    "sessions_session_key_key": (InvalidInputError, "a session with this key exists already"),
}

_NO_DATABASE: Final = "the database does not exist; create it or correct its name"
_REFUSED: Final = "the server refused this user or password; correct DATABASE_URL or POSTGRES_PASSWORD"
_POOLER_UNKNOWN: Final = (
    "a prepared statement is not where it was made: a pooler in transaction mode stands between; "
    "set DB_POOLER=transaction"
)

# What pgbouncer's errors contain.
_OF_A_POOLER: Final[tuple[tuple[str, type[StoreError], str], ...]] = (
    (
        "query_wait_timeout",
        StoreTimeoutError,
        "the pooler had no connection to the server free in time (query_wait_timeout); raise its pool size, lower "
        "DB_POOL_MAX_SIZE, or see whether the server runs",
    ),
    (
        "max_client_conn",
        StoreUnavailableError,
        "the pooler takes no more clients (max_client_conn); raise that or lower DB_POOL_MAX_SIZE",
    ),
    (
        "server_login_retry",
        StoreUnavailableError,
        "the pooler cannot connect to the server; see that it runs and what the pooler's log says",
    ),
    (
        "unsupported startup parameter",
        ConfigurationError,
        "the pooler refuses a parameter of DATABASE_URL (after the ?); remove it there and set it for the role or the "
        "database instead (ALTER ROLE ... SET)",
    ),
    ("no such user", ConfigurationError, _REFUSED),
    ("authentication failed", ConfigurationError, _REFUSED),
    ("no such database", ConfigurationError, _NO_DATABASE),
    ("does not exist", ConfigurationError, f"{_NO_DATABASE}, or the role's"),
)

_SQLSTATES: Final[dict[str, tuple[type[StoreError], str]]] = {
    "0A000": (ConfigurationError, "the server does not support this (row-level security with COPY?)"),
    "25P02": (StoreError, "an earlier error ended this transaction; leave its block and begin another"),
    "26000": (ConfigurationError, _POOLER_UNKNOWN),
    "28": (ConfigurationError, _REFUSED),
    "3D000": (ConfigurationError, _NO_DATABASE),
    "3F000": (ConfigurationError, "no schema of the search_path exists, or the role may not use it; correct it"),
    "42501": (
        ConfigurationError,
        "this role lacks a privilege; make it a member of kotonoha_app (a bot) or kotonoha_worker (archives, embeds), "
        "which `kotonoha-store grants` makes, or connect as the owner",
    ),
    "25006": (
        ConfigurationError,
        "a read-only transaction (store.read()) or server (a replica?) cannot write; write in store.begin(), and point "
        "DATABASE_URL at the primary",
    ),
    "42P01": (SchemaOutdatedError, "a table is missing; run `alembic upgrade head` or `await store.migrate()`"),
    "42703": (SchemaOutdatedError, "a column is missing; run `alembic upgrade head` or `await store.migrate()`"),
    "42P05": (ConfigurationError, _POOLER_UNKNOWN),
    "42704": (SchemaOutdatedError, "a type is missing; run `alembic upgrade head` or `await store.migrate()`"),
    "42883": (
        SchemaOutdatedError,
        "no such operator or function: is pgvector in the search_path, is each id a number?",
    ),
    "57014": (StoreTimeoutError, "the statement was cancelled by a time-out; nothing was written"),
    "55P03": (StoreTimeoutError, "a lock could not be had in time; try again"),
    "40": (StoreUnavailableError, "a concurrent transaction forced a rollback; try again"),
    "53": (StoreUnavailableError, "the server is out of resources (connections, memory or disk); try again later"),
    "54": (InvalidInputError, "the value is too large for PostgreSQL"),
    "57P": (StoreUnavailableError, "the server is shutting down or starting; try again"),
    "58": (StoreUnavailableError, "the server reports a system error; see its log"),
    "08": (StoreUnavailableError, "the connection broke; try again"),
    "22": (InvalidInputError, "a value does not have the form or range that its column needs; nothing was written"),
    "23": (InvalidInputError, "a value breaks a rule of the table; nothing was written"),
}


def _from_sqlstate(sqlstate: str, constraint: str | None) -> StoreError | None:
    if constraint in _CONSTRAINTS:
        kind, message = _CONSTRAINTS[constraint]
        return kind(message)
    for length in (5, 3, 2):
        if (found := _SQLSTATES.get(sqlstate[:length])) is not None:
            kind, message = found
            detail = f"{sqlstate}, {constraint}" if constraint else sqlstate
            return kind(f"{message} (SQLSTATE {detail})")
    return StoreError(f"the server refused the statement (SQLSTATE {sqlstate}); nothing was written")


_DRIVER_ERRORS: Final = (
    DBAPIError,
    # Of SQLAlchemy 2.1, from a connection that could not be made for the driver's own use.
    AsyncAdapt_asyncpg_dbapi.Error,
    PoolTimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.exceptions.InternalClientError,
    OSError,
)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise the driver's errors as this library's, with the original as ``__cause__``."""
    try:
        yield
    except _DRIVER_ERRORS as error:
        if (translation := translate_error(error)) is None:
            raise
        raise translation from error


def translated(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Decorate a coroutine that talks to the database and nothing else: see :func:`translated_errors`.

    Its duration is observed as ``db_query_duration_seconds{query_type="<module>.<method>"}``, failed calls included.
    """
    module = method.__module__.rpartition(".")[2]
    # Once, since looking a label up costs more than observing.
    duration = metrics.QUERY_SECONDS.labels(query_type=f"{module}.{method.__name__.lstrip('_')}")

    @functools.wraps(method)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        started = time.perf_counter()
        try:
            with translated_errors():
                return await method(*args, **kwargs)
        finally:
            duration.observe(time.perf_counter() - started)

    return wrapper
