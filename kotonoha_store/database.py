"""The connection to PostgreSQL: engine, pool, codecs, time-outs and retries."""

import asyncio
import contextlib
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, Self, TypeAlias

import asyncpg
import stamina
from sqlalchemy import URL, event
from sqlalchemy.exc import DBAPIError, DisconnectionError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.util.concurrency import greenlet_spawn

from kotonoha_store import embedded, metrics
from kotonoha_store.checks import check_json
from kotonoha_store.columns import pack_vector, unpack_vector
from kotonoha_store.driver_errors import translate_error, translated_errors
from kotonoha_store.endpoints import connect_arguments, database_url, direct_url, is_pooled, parse_url, same_database
from kotonoha_store.errors import (
    ConfigurationError,
    InvalidInputError,
    StoreError,
    StoreUnavailableError,
)
from kotonoha_store.settings import Settings
from kotonoha_store.words import unpack_terms

# Its warnings would reach stderr by Python's handler of last resort, without saying what is retried.
logging.getLogger("stamina").addHandler(logging.NullHandler())

Executor: TypeAlias = AsyncSession | AsyncConnection

# The server is starting, stopping, full, or the connection broke: worth another try.
_RETRIABLE_CONNECT: Final = (
    OSError,
    TimeoutError,
    asyncpg.exceptions.CannotConnectNowError,
    asyncpg.exceptions.PostgresConnectionError,
    asyncpg.exceptions.TooManyConnectionsError,
)


def _is_retriable(error: Exception) -> bool:
    # A pooler says of everything that the protocol was violated: also of a database that does not exist.
    return isinstance(error, _RETRIABLE_CONNECT) and not isinstance(translate_error(error), ConfigurationError)


# Of the connection itself; from a statement the last two would mean something else.
_UNUSABLE_PARAMETER: Final = (
    asyncpg.exceptions.ClientConfigurationError,
    asyncpg.exceptions.UndefinedObjectError,
    asyncpg.DataError,
)


def dump_json(value: Any) -> str:
    """Serialise for ``jsonb``; integers of any size survive.

    Raises:
        InvalidInputError: see :func:`kotonoha_store.checks.check_json`; also an integer beyond 4,300 digits.
    """
    check_json(value)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise InvalidInputError(f"the JSON value cannot be stored: {error}") from None


class Database:
    """A pool of connections, and transactions on it.

    Use :meth:`open` (or ``Store.open``) and :meth:`close`, or ``async with``.
    """

    def __init__(
        self,
        url: URL,
        settings: Settings,
        *,
        server: embedded.EmbeddedServer | None = None,
        patient: bool = False,
        direct: bool = False,
        compared_with: "Database | None" = None,
        pool_timeout: float = 30.0,
    ) -> None:
        """
        Args:
            server: the embedded server that ``url`` points to, stopped by :meth:`close`.
            patient: statements may take as long as they take (building an index).
            direct: ``url`` leads to the server itself, whatever DB_POOLER says.
            compared_with: the first connection sees that it leads to the same database as this one's.
            pool_timeout: seconds to wait for another task's connection when DB_POOL_MAX_SIZE are in use.
        """
        self.settings = settings
        self._url = url
        self._direct = direct
        self._compared_with = compared_with
        is_own = server is not None or settings.uses_embedded_server
        self._names_direct_url = direct and settings.database_direct_url is not None and not is_own
        self.is_pooled: Final = not direct and is_pooled(url, settings)
        """Whether each transaction has another connection to the server: see DB_POOLER."""
        self._arguments = connect_arguments(
            url,
            settings,
            command_timeout=None if patient else settings.db_command_timeout,
            pooled=self.is_pooled,
        )
        self._server = server
        # A migration needs a second connection, for its lock.
        pool_max_size = max(settings.db_pool_max_size, 2 if patient else 1)
        self.engine: AsyncEngine = _create_engine(
            self._connect,
            pool_min_size=min(settings.db_pool_min_size, pool_max_size),
            pool_max_size=pool_max_size,
            pool_timeout=pool_timeout,
            keep_prepared=not self.is_pooled,
        )
        metrics.watch_pool(self.engine)
        # Closed for good: a statement after its block would begin a transaction that nobody commits.
        self.session_factory = async_sessionmaker(self.engine, expire_on_commit=False, close_resets_only=False)
        self._closed = False

    @classmethod
    async def open(cls, settings: Settings | None = None, *, patient: bool = False) -> Self:
        """Make a database from the settings; start the embedded server when they name none.

        No connection is made yet. ``patient``: without the time-out for statements.

        Raises:
            ConfigurationError: the settings cannot be used, or the embedded server cannot be started.
        """
        settings = settings or Settings()
        url = database_url(settings)
        if url is not None:
            return cls(url, settings, patient=patient)
        name = settings.postgres_db
        server = await asyncio.to_thread(
            embedded.start, settings.kb_embedded_dir, version=settings.kb_embedded_version, databases=(name,)
        )
        return cls(parse_url(server.url(name)), settings, server=server, patient=patient, direct=True)

    @property
    def direct_url(self) -> URL:
        """Where the server itself answers, for migrations, index builds and backups.

        Raises:
            ConfigurationError: behind a pooler in transaction mode, where DATABASE_DIRECT_URL is not set.
        """
        return self._url if self._direct else direct_url(self._url, self.settings)

    @property
    def can_listen(self) -> bool:
        """Whether LISTEN works: not through a pooler in transaction mode, unless DATABASE_DIRECT_URL is set."""
        return not self.is_pooled or self.settings.database_direct_url is not None

    def patient(self) -> "Database":
        """The same database past any pooler and without the time-out for statements; close it after use.

        For whatever keeps state in its session, or takes long: migrations, CREATE INDEX CONCURRENTLY.

        Raises:
            ConfigurationError: see :attr:`direct_url`.
        """
        other = None if self._direct or self.settings.database_direct_url is None else self
        with _naming_direct_url(other is not None):
            return Database(self.direct_url, self.settings, patient=True, direct=True, compared_with=other)

    async def check_direct_url(self) -> None:
        """See that DATABASE_DIRECT_URL, where it is set, leads to the same database as DATABASE_URL.

        :meth:`patient` does so by itself.

        Raises:
            ConfigurationError: it does not, or its server refuses it.
            StoreUnavailableError: one of the two did not answer.
        """
        if not self._direct and self.settings.database_direct_url is not None:
            async with self.patient() as direct:
                await direct.ping()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; the embedded server stops when no other process uses it."""
        self._closed = True
        await self.engine.dispose()
        if self._server is not None:
            server, self._server = self._server, None
            await asyncio.to_thread(server.stop)

    async def _connect(self) -> Any:
        with _naming_direct_url(self._names_direct_url):
            connection = await self._connect_again()
        if self._compared_with is not None:
            try:
                await self._compare(connection, self._compared_with)
            except BaseException:
                connection.terminate()
                raise
            self._compared_with = None
        return connection

    @staticmethod
    async def _compare(connection: Any, with_: "Database") -> None:
        # Apart from its pool, all of which may be in use by whoever waits for this one.
        other = await with_._connect_once(with_._arguments)
        try:
            is_same = await same_database(connection, other)
        finally:
            other.terminate()
        if not is_same:
            raise ConfigurationError(
                "DATABASE_DIRECT_URL leads to another database than DATABASE_URL (or POSTGRES_HOST); correct it: "
                "the same database of the same server, past the pooler"
            )

    async def _connect_again(self) -> Any:
        # Connecting is safe to repeat; statements are not, and are never retried here.
        async for attempt in stamina.retry_context(
            on=_is_retriable,
            attempts=self.settings.db_connect_attempts,
            timeout=60.0,
            wait_initial=0.1,
            wait_max=3.0,
        ):
            with attempt:
                return await self._connect_once(self._arguments)
        raise AssertionError("stamina leaves its loop by return or raise")

    @staticmethod
    async def _connect_once(arguments: dict[str, Any]) -> Any:
        try:
            return await asyncpg.connect(**arguments)
        except _UNUSABLE_PARAMETER as error:
            raise ConfigurationError(
                "DATABASE_URL has a parameter (after the ?) that the driver or the server refuses "
                f"({type(error).__name__}); correct or remove it"
            ) from error
        except ValueError as error:
            # A certificate that is refused is one of these, too.
            if isinstance(error, OSError):
                raise
            raise ConfigurationError(
                f"the host or port in DATABASE_URL or POSTGRES_HOST cannot be used ({type(error).__name__}); correct it"
            ) from error

    async def connect_apart(self) -> Any:
        """Make a driver's connection outside the pool and past any pooler, in one try; the caller closes it.

        Raises:
            ConfigurationError: see :attr:`direct_url`.
            StoreUnavailableError: it could not be made now.
            StoreError: this database was closed, or can never be reached so.
        """
        self._refuse_if_closed()
        is_named = not self._direct and self.settings.database_direct_url is not None
        with _naming_direct_url(is_named or self._names_direct_url), translated_errors():
            arguments = connect_arguments(
                self.direct_url, self.settings, command_timeout=self.settings.db_command_timeout, pooled=False
            )
            return await self._connect_once(arguments)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """One transaction: commits on a clean exit, rolls back on any exception, cancellation included.

        Raises:
            StoreUnavailableError: no connection could be made or had.
            StoreError: this database was closed.
        """
        self._refuse_if_closed()
        async with self.session_factory() as session:
            with translated_errors():
                await session.connection()
            async with _committed(session):
                yield session

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """As :meth:`begin`, without the ORM: for short transactions of many statements a second."""
        self._refuse_if_closed()
        connection = self.engine.connect()
        with translated_errors():
            await connection.start()
        try:
            async with _committed(connection):
                yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A connection in AUTOCOMMIT: each statement stands for itself."""
        self._refuse_if_closed()
        with translated_errors():
            connection = await self.engine.connect()
        try:
            yield await connection.execution_options(isolation_level="AUTOCOMMIT")
        finally:
            await connection.close()

    @asynccontextmanager
    async def driver(self) -> AsyncIterator[Any]:
        """The driver's own connection, from the pool and in autocommit: for single statements at full speed."""
        self._refuse_if_closed()
        with translated_errors():
            pooled = await self.engine.raw_connection()
        driver: Any = pooled.driver_connection
        is_clean = True
        try:
            yield driver
        except BaseException as error:
            # Cancelled or timed out, a BEGIN or COMMIT may still be under way: the next one's transaction would be
            # a savepoint within it, and never be committed.
            is_clean = isinstance(error, Exception) and not isinstance(error, OSError | asyncpg.InterfaceError)
            raise
        finally:
            is_clean = driver.is_closed() or (is_clean and not driver.is_in_transaction())
            await greenlet_spawn(pooled.close if is_clean else pooled.invalidate)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StoreError("this store was closed at the end of its `async with` block; open it again")

    async def ping(self) -> None:
        """Make one round trip.

        Raises:
            StoreUnavailableError: the database did not answer.
            ConfigurationError: it refused this user, password or database name.
        """
        async with self.connect() as connection:
            with translated_errors():
                await connection.exec_driver_sql("SELECT 1")


@contextmanager
def _naming_direct_url(is_named: bool) -> Iterator[None]:
    """Let errors of connecting by DATABASE_DIRECT_URL say so."""
    if not is_named:
        yield
        return
    try:
        with translated_errors():
            yield
    except StoreError as error:
        message = re.sub(r"\bDATABASE_URL\b( or POSTGRES_\w+)?", "DATABASE_DIRECT_URL", str(error))
        if "DATABASE_DIRECT_URL" not in message:
            message = f"DATABASE_DIRECT_URL: {message}"
        raise type(error)(message) from error.__cause__


@asynccontextmanager
async def _committed(unit: Executor) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        # Where the connection is gone the server has rolled back; the caller's error is the one to raise.
        with contextlib.suppress(DBAPIError, asyncpg.InterfaceError, asyncpg.exceptions.InternalClientError, OSError):
            await unit.rollback()
        raise
    try:
        with translated_errors():
            await unit.commit()
    except PendingRollbackError as error:
        raise StoreUnavailableError(
            "the connection broke, or a flush failed, earlier in this transaction; nothing was written: run it again"
        ) from error


def _create_engine(
    connect: Callable[[], Awaitable[Any]],
    *,
    pool_min_size: int,
    pool_max_size: int,
    pool_timeout: float,
    keep_prepared: bool,
) -> AsyncEngine:
    def creator() -> Any:
        # What async_creator does, which does not pass the size on. Of a statement without a name nobody says that its
        # result has changed: SQLAlchemy must not keep what it knows of that.
        return engine.dialect.dbapi.connect(  # type: ignore[union-attr]  # asyncpg's is there
            async_creator_fn=connect, prepared_statement_cache_size=100 if keep_prepared else 0
        )

    # QueuePool reads 0 as "no limit".
    kept = max(pool_min_size, 1)
    engine = create_async_engine(
        "postgresql+asyncpg://",
        creator=creator,
        # The recomputed source status relies on each statement seeing what was committed before it.
        isolation_level="READ COMMITTED",
        json_serializer=dump_json,
        pool_size=kept,
        max_overflow=pool_max_size - kept,
        pool_timeout=pool_timeout,
        pool_use_lifo=True,
        # Messages are private: SQLAlchemy would print them in errors and logs.
        hide_parameters=True,
    )

    @event.listens_for(engine.sync_engine, "checkout")
    def _ready(dbapi_connection: Any, record: Any, proxy: Any) -> None:
        if record.info.setdefault("pid", os.getpid()) != os.getpid():
            # A forked child must not use its parent's socket, nor close it.
            record.dbapi_connection = proxy.dbapi_connection = None
            raise DisconnectionError("this connection belongs to another process")
        # asyncpg hears of a closed socket by itself: this costs no round trip, as pre-ping would. Behind a pooler that
        # would prove nothing: the transaction may get another connection than the ping, and the pooler hears of
        # closed ones itself.
        if dbapi_connection.driver_connection.is_closed():
            raise DisconnectionError("the server closed this connection")
        # A connection made before the first migration has no codec yet.
        if "codecs" not in record.info and dbapi_connection.run_async(register_codecs):
            record.info["codecs"] = True

    @event.listens_for(engine.sync_engine, "invalidate")
    def _forget(_: Any, record: Any, __: Any) -> None:
        record.info.clear()

    return engine


async def driver_connection(unit: Executor) -> Any:
    """The asyncpg connection under a session or connection, for COPY and for many rows at once.

    SQLAlchemy begins the transaction with the first statement: execute one before.
    """
    connection = unit if isinstance(unit, AsyncConnection) else await unit.connection()
    return (await connection.get_raw_connection()).driver_connection


async def ensure_codecs(unit: Executor) -> None:
    """See to it that the connection knows ``halfvec`` and ``tsvector``, should its engine be the caller's own."""
    connection = unit if isinstance(unit, AsyncConnection) else await unit.connection()
    info = connection.info
    if "codecs" not in info and await register_codecs(await driver_connection(unit)):
        info["codecs"] = True


async def register_codecs(connection: Any) -> bool:
    """Teach an asyncpg connection ``tsvector``, and pgvector's ``halfvec``, whichever schema it lives in: in binary.

    Returns:
        Whether the extension is there.
    """
    schema = await connection.fetchval(
        "SELECT n.nspname FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace"
        " JOIN pg_depend d ON d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'"
        " JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'vector' WHERE t.typname = 'halfvec'"
    )
    if schema is None:
        return False
    await connection.set_type_codec(
        "halfvec",
        schema=schema,
        # HalfVector hands over packed bytes; whoever uses the driver directly may pass an array.
        encoder=lambda value: value if isinstance(value, bytes) else pack_vector(value),
        decoder=unpack_vector,
        format="binary",
    )
    await connection.set_type_codec(
        "tsvector", schema="pg_catalog", encoder=_as_bytes, decoder=unpack_terms, format="binary"
    )
    return True


def _as_bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise InvalidInputError(f"terms are written as pack_terms() makes them, not as {type(value).__name__}")
    return value
