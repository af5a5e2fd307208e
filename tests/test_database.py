"""Vectors in binary, JSON, URLs, time-outs, retries, dead connections, errors in our own words, transactions."""

import asyncio
import contextlib
import json
import logging
import socket
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import asyncpg
import numpy as np
import pytest
import stamina
from conftest import run_sql, settings_for
from sqlalchemy import URL, insert, literal, make_url, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import (
    ConfigurationError,
    Database,
    InvalidInputError,
    InvalidVectorError,
    KnowledgeChunk,
    KnowledgeRepository,
    KnowledgeSource,
    NotFoundError,
    SchemaOutdatedError,
    Session,
    Settings,
    SourceType,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    migrations,
)
from kotonoha_store.columns import HALF_MAX, PackedVector, check_vectors, pack_vector, unpack_vector
from kotonoha_store.database import connect_arguments, database_url, driver_connection, dump_json, register_codecs
from kotonoha_store.driver_errors import translate_error, translated_errors

DIMENSION = 1536
VECTOR = np.linspace(-1, 1, DIMENSION)


@asynccontextmanager
async def opened(url: URL, *, pool_timeout: float = 30.0, **values: object) -> AsyncIterator[Database]:
    async with Database(url, settings_for(url, **values), pool_timeout=pool_timeout) as database:
        yield database


async def run(database: Database, *statements: Any) -> None:
    """Execute statements in one transaction, with the errors in our own words."""
    with translated_errors():
        async with database.begin() as session:
            for statement in statements:
                await session.execute(text(statement) if isinstance(statement, str) else statement)


async def add_all(database: Database, *rows: object) -> None:
    """Add ORM objects, each flushed, in one transaction."""
    with translated_errors():
        async with database.begin() as session:
            for row in rows:
                session.add(row)
                await session.flush()


async def kill(url: URL, session: AsyncSession) -> None:
    """Terminate the backend under a session, and wait until the loop has heard of it."""
    pid = await session.scalar(text("SELECT pg_backend_pid()"))
    await run_sql(url, f"SELECT pg_terminate_backend({pid}, 30000)")
    await asyncio.sleep(0.05)


async def add_source(session: AsyncSession) -> int:
    source = KnowledgeSource(type=SourceType.WEB_PAGE, title="t")
    session.add(source)
    await session.flush()
    return source.id


# -- vectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vector",
    [
        VECTOR.tolist(),
        tuple(VECTOR),
        VECTOR,
        VECTOR.astype(np.float32),
        VECTOR.astype(np.float16),
        VECTOR.astype(">f4"),
        np.repeat(VECTOR, 2)[::2],
        pack_vector(VECTOR),
    ],
    ids=["list", "tuple", "float64", "float32", "float16", "big-endian", "strided", "packed"],
)
async def test_a_vector_comes_back_as_float16(session: AsyncSession, vector: Any) -> None:
    chunk = KnowledgeChunk(source_id=await add_source(session), content="c", embedding=vector, embedding_model="m")
    session.add(chunk)
    await session.flush()
    found = await session.scalar(select(KnowledgeChunk.embedding).where(KnowledgeChunk.id == chunk.id))
    assert found is not None
    assert (found.dtype, found.shape) == (np.float16, (DIMENSION,))
    np.testing.assert_array_equal(found, VECTOR.astype(np.float16))
    # The server reads the same numbers: nothing depends on our own codec alone.
    written = await session.scalar(
        text("SELECT embedding::text FROM knowledge_chunks WHERE id = :id"), {"id": chunk.id}
    )
    np.testing.assert_array_equal(np.array(json.loads(str(written)), np.float16), VECTOR.astype(np.float16))


@pytest.mark.parametrize(
    "vector",
    [
        [HALF_MAX, -HALF_MAX] * (DIMENSION // 2),
        [2.0**-24] + [0.0] * (DIMENSION - 1),
        [0.0] * (DIMENSION - 1) + [1e-3],
        list(range(DIMENSION)),
    ],
    ids=["largest", "smallest subnormal", "nearly zero", "integers"],
)
async def test_extremes_survive(session: AsyncSession, vector: list[float]) -> None:
    found = await session.scalar(select(literal(vector, KnowledgeChunk.embedding.type)))
    np.testing.assert_array_equal(found, np.array(vector, np.float16))


BAD_VECTORS = {
    "short": ([1.0] * (DIMENSION - 1), "1536 dimensions, got 1535"),
    "long": ([1.0] * (DIMENSION + 1), "1536 dimensions, got 1537"),
    "empty": ([], "1536 dimensions, got 0"),
    "NaN": ([float("nan")] + [1.0] * (DIMENSION - 1), "NaN"),
    "infinity": ([float("inf")] + [1.0] * (DIMENSION - 1), "infinity"),
    "70000": ([70000.0] + [1.0] * (DIMENSION - 1), "beyond half precision"),
    "1e300": ([1e300] + [1.0] * (DIMENSION - 1), "infinity"),
    "1e300 in an array": (np.full(DIMENSION, 1e300), "infinity"),
    "beyond a float": ([10**400] + [1.0] * (DIMENSION - 1), "1536 numbers"),
    "zeros": ([0.0] * DIMENSION, "all zeros"),
    "negative zeros": ([-0.0] * DIMENSION, "all zeros"),
    "vanishes": ([1e-9] * DIMENSION, "all zeros in half precision"),
    "None inside": ([None] + [1.0] * (DIMENSION - 1), "NaN"),
    "text": ("[" + ",".join(["1"] * DIMENSION) + "]", "1536 numbers"),
    "strings": (["1"] * DIMENSION, "1536 numbers"),
    "string inside": (["x"] + [1.0] * (DIMENSION - 1), "1536 numbers"),
    "bytes": (b"1" * DIMENSION, "1536 numbers"),
    "booleans": ([True] * DIMENSION, "1536 numbers"),
    "complex": (np.ones(DIMENSION, complex), "1536 numbers"),
    "dates": (np.ones(DIMENSION, "datetime64[s]"), "1536 numbers"),
    "2-d": ([[1.0] * DIMENSION], "flat sequence"),
    "ragged": ([[1.0], [1.0, 2.0]], "1536 numbers"),
    "a number": (1.0, "flat sequence"),
    "a dict": ({"a": 1.0}, "1536 numbers"),
    "an object": (object(), "1536 numbers"),
}


@pytest.mark.parametrize(("vector", "message"), BAD_VECTORS.values(), ids=BAD_VECTORS)
def test_a_bad_vector_is_refused(vector: object, message: str) -> None:
    with pytest.raises(InvalidVectorError, match=message):
        pack_vector(vector)


@pytest.mark.parametrize("name", ["short", "NaN", "70000", "zeros", "text", "2-d", "beyond a float"])
async def test_a_bad_vector_is_refused_on_every_way_in(session: AsyncSession, name: str) -> None:
    bad, message = BAD_VECTORS[name]
    source_id = await add_source(session)
    good = {"source_id": source_id, "content": "c", "embedding": VECTOR, "embedding_model": "m"}
    wrong = {**good, "embedding": bad}

    async def add() -> None:
        async with session.begin_nested():
            session.add(KnowledgeChunk(**wrong))

    with pytest.raises(InvalidVectorError, match=message):
        await add()
    with pytest.raises(InvalidVectorError, match=message):
        await session.execute(insert(KnowledgeChunk).values(**wrong))
    # executemany, and insertmanyvalues.
    with pytest.raises(InvalidVectorError, match=message):
        await session.execute(insert(KnowledgeChunk), [good, wrong])
    with pytest.raises(InvalidVectorError, match=message):
        await session.execute(insert(KnowledgeChunk).returning(KnowledgeChunk.id), [good, wrong])
    with pytest.raises(InvalidVectorError, match=message):
        await session.execute(update(KnowledgeChunk).values(embedding=bad))
    with pytest.raises(InvalidVectorError, match=message):
        await session.execute(select(KnowledgeChunk.embedding.cosine_distance(bad)))
    # Refused before the server saw it: the transaction goes on.
    assert not (await session.scalars(select(KnowledgeChunk.id).where(KnowledgeChunk.source_id == source_id))).all()


async def test_many_vectors_go_in_by_every_way(session: AsyncSession) -> None:
    source_id = await add_source(session)
    rows = [
        {"source_id": source_id, "content": str(i), "embedding": np.roll(VECTOR, i), "embedding_model": "m"}
        for i in range(5)
    ]
    session.add_all(KnowledgeChunk(**row) for row in rows)
    await session.flush()
    await session.execute(insert(KnowledgeChunk), rows)
    ids = (await session.scalars(insert(KnowledgeChunk).returning(KnowledgeChunk.id), rows)).all()
    assert len(ids) == 5
    found = await session.execute(
        select(KnowledgeChunk.content, KnowledgeChunk.embedding).where(KnowledgeChunk.source_id == source_id)
    )
    rows_found = found.all()
    assert len(rows_found) == 15
    for content, embedding in rows_found:
        np.testing.assert_array_equal(embedding, np.roll(VECTOR, int(content)).astype(np.float16))


async def test_a_vector_may_be_null(session: AsyncSession) -> None:
    session.add(KnowledgeChunk(source_id=await add_source(session), content="c", embedding=None))
    await session.flush()
    assert await session.scalar(select(KnowledgeChunk.embedding)) is None


async def test_distance_is_a_number(session: AsyncSession) -> None:
    session.add(KnowledgeChunk(source_id=await add_source(session), content="c", embedding=VECTOR, embedding_model="m"))
    await session.flush()
    distance = await session.scalar(select(KnowledgeChunk.embedding.cosine_distance(-VECTOR)))
    assert distance == pytest.approx(2, abs=1e-3)


async def test_a_packed_vector_of_another_dimension_is_refused_by_the_server(database: Database) -> None:
    packed = pack_vector([1.0, 2.0], 2)
    assert isinstance(packed, PackedVector)
    np.testing.assert_array_equal(unpack_vector(packed), [1, 2])
    with pytest.raises(InvalidInputError):
        await run(database, select(literal(packed, KnowledgeChunk.embedding.type)))


def test_the_message_names_the_row() -> None:
    rows = np.ones((3, DIMENSION))
    rows[2, 5] = np.nan
    with pytest.raises(InvalidVectorError, match="vector 2 holds NaN"):
        check_vectors(rows)


async def test_the_driver_takes_arrays_too(database: Database) -> None:
    async with database.begin() as session:
        await session.execute(text("SELECT 1"))
        driver = await driver_connection(session)
        found = await driver.fetchval("SELECT $1::halfvec", VECTOR)
        np.testing.assert_array_equal(found, VECTOR.astype(np.float16))


async def test_a_connection_made_before_the_first_migration_learns_the_codec(empty_url: URL) -> None:
    async with opened(empty_url, db_pool_max_size=1) as database:
        async with database.connect() as connection:
            pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        # By somebody else: this pool is not told.
        async with opened(empty_url) as other:
            await migrations.upgrade(other)
        async with database.begin() as session:
            assert await session.scalar(text("SELECT pg_backend_pid()")) == pid
            found = await session.scalar(select(literal(VECTOR, KnowledgeChunk.embedding.type)))
            np.testing.assert_array_equal(found, VECTOR.astype(np.float16))


async def test_without_the_extension_nothing_is_registered(empty_url: URL) -> None:
    connection = await asyncpg.connect(**connect_arguments(empty_url, settings_for(empty_url)))
    try:
        assert await register_codecs(connection) is False
    finally:
        await connection.close()


# -- JSON ---------------------------------------------------------------------------------------------------------


async def test_json_survives(session: AsyncSession) -> None:
    value = {
        "bigint": 2**63 - 1,
        "beyond": 10**100,
        "negative": -(2**64),
        "discord": 2**53 + 1,
        "float": 0.1,
        "text": "梅雨 \u2028 \\u0000 \x7f 😀",
        "nested": [[], {}, None, True, {"": ""}],
    }
    source = KnowledgeSource(type=SourceType.WEB_PAGE, title="t", source_metadata=value)
    session.add(source)
    await session.flush()
    await session.refresh(source)
    assert source.source_metadata == value
    assert isinstance(source.source_metadata["beyond"], int)


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
DEEP: Any = "deep"
for _ in range(100_000):
    DEEP = [DEEP]
BAD_JSON = {
    "NUL": ({"a": [{"b": "x\x00"}]}, r"JSON value\.a\[0\]\.b holds a NUL"),
    "NUL in a key": ({"a\x00": 1}, "key of JSON value"),
    "surrogate": ({"a": "\ud800"}, r"JSON value\.a holds a lone surrogate"),
    "NaN": ({"a": float("nan")}, r"JSON value\.a is nan"),
    "infinity": ({"a": [1, float("-inf")]}, r"JSON value\.a\[1\] is -inf"),
    "bytes": ({"a": b""}, r"JSON value\.a is of type bytes"),
    "number as key": ({"a": {1: 2}}, r"JSON value\.a has the key 1"),
    "too deep": ({"a": DEEP}, "levels deep"),
    "itself": ({"a": CYCLE}, "levels deep"),
    "digits": ({"a": 10**5000}, "4300 digits"),
}


@pytest.mark.parametrize(("value", "message"), BAD_JSON.values(), ids=BAD_JSON)
async def test_bad_json_is_refused_before_the_server_sees_it(session: AsyncSession, value: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        dump_json(value)
    with pytest.raises(InvalidInputError, match=message):
        await session.execute(insert(KnowledgeSource).values(type="web_page", title="t", source_metadata=value))
    assert await session.scalar(text("SELECT 1")) == 1


async def test_what_may_be_nested_is_stored(session: AsyncSession) -> None:
    value: Any = "deep"
    for _ in range(100):
        value = [value]
    session.add(KnowledgeSource(type=SourceType.WEB_PAGE, title="t", source_metadata={"a": value}))
    await session.flush()


async def test_none_is_null_and_not_a_json_null(session: AsyncSession) -> None:
    source = KnowledgeSource(type=SourceType.WEB_PAGE, title="t", archived_messages=None)
    session.add(source)
    await session.flush()
    assert await session.scalar(
        select(KnowledgeSource.archived_messages.is_(None)).where(KnowledgeSource.id == source.id)
    )
    with pytest.raises(InvalidInputError, match="23502"), translated_errors():
        await session.execute(update(KnowledgeSource).values(source_metadata=None))


# -- URLs ---------------------------------------------------------------------------------------------------------


def url_of(value: str, **values: object) -> URL | None:
    return database_url(Settings(_env_file=None, database_url=value, **values))


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg", "postgresql+psycopg2"]
)
async def test_every_spelling_of_postgresql_is_taken(shared_url: URL, scheme: str) -> None:
    given = shared_url.render_as_string(hide_password=False).replace("postgresql:", f"{scheme}:")
    assert url_of(given) == shared_url.set(drivername="postgresql")
    async with await Database.open(Settings(_env_file=None, database_url=given)) as database:
        await database.ping()


@pytest.mark.parametrize(
    "value", ["mysql://u:s3cret@h/db", "sqlite:///s3cret.db", "postgresqlx://u:s3cret@h/db", "http://s3cret"]
)
def test_other_systems_are_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match="postgresql://") as caught:
        url_of(value)
    assert "s3cret" not in everything(caught.value)


@pytest.mark.parametrize(
    "value", ["s3cret", "u:s3cret@h/db", "postgresql://u:s3cret@h:port/db", "://s3cret", "  s3cret"]
)
def test_garbage_is_refused_without_showing_it(value: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read") as caught:
        url_of(value)
    assert "s3cret" not in everything(caught.value)


@pytest.mark.parametrize("port", [0, -1, 65536, 999999])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    url = make_url(f"postgresql://h:{port}/db")
    with pytest.raises(ConfigurationError, match="port"):
        connect_arguments(url, settings_for(url))


def everything(error: BaseException) -> str:
    """What a log with the traceback would show, without the lines of source that it quotes."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join([str(error), repr(error), *(line for line in lines if not line.startswith("    "))])


@pytest.mark.parametrize(
    "query",
    [
        "sslmode=disable",
        "sslmode=prefer",
        "channel_binding=require",
        "gssencmode=disable&keepalives=1&keepalives_idle=5&tcp_user_timeout=100",
        "connect_timeout=5",
        "connect_timeout=0",
        "prepared_statement_cache_size=0",
        "application_name=mine",
        "options=-c%20work_mem%3D5MB%20-csearch_path%3Dpublic",
        "target_session_attrs=any",
    ],
)
async def test_parameters_of_libpq_are_taken(shared_url: URL, query: str) -> None:
    url = url_of(f"{shared_url.render_as_string(hide_password=False)}&{query}")
    assert url is not None
    async with opened(url) as database, database.connect() as connection:
        name = await connection.scalar(text("SHOW application_name"))
        assert name == ("mine" if "application_name" in query else "kotonoha_store")
        if "work_mem" in query:
            assert await connection.scalar(text("SHOW work_mem")) == "5MB"


@pytest.mark.parametrize("value", ["soon", "nan", "inf", "1&connect_timeout=2"])
def test_a_connect_timeout_that_is_no_number_is_refused(value: str) -> None:
    url = make_url(f"postgresql://h/db?connect_timeout={value}")
    with pytest.raises(ConfigurationError, match="connect_timeout"):
        connect_arguments(url, settings_for(url))


def test_connect_timeout_wins_over_the_setting_and_0_means_for_ever() -> None:
    for query, expected in (("", 10.0), ("?connect_timeout=3", 3.0), ("?connect_timeout=0", None)):
        url = make_url(f"postgresql://h/db{query}")
        assert connect_arguments(url, Settings(_env_file=None))["timeout"] == expected


@pytest.mark.parametrize("query", ["sslmode=s3cret", "no_such_parameter=s3cret", "work_mem=s3cret"])
async def test_an_unusable_parameter_is_a_matter_of_configuration(shared_url: URL, query: str) -> None:
    async with opened(shared_url.update_query_string(query)) as database:
        with pytest.raises(ConfigurationError, match="parameter") as caught:
            await database.ping()
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is not None


async def test_postgres_host_wins_over_database_url(shared_url: URL) -> None:
    host, port = shared_url.query.get("host", shared_url.host), shared_url.query.get("port", shared_url.port)
    settings = Settings(
        _env_file=None,
        database_url="postgresql://nobody@127.0.0.1:1/nothing",
        postgres_host=str(host),
        postgres_port=int(str(port or 5432)),
        postgres_user=shared_url.username,
        postgres_password=shared_url.password,
        postgres_db=shared_url.database,
    )
    async with await Database.open(settings) as database, database.connect() as connection:
        assert await connection.scalar(text("SELECT current_database()")) == shared_url.database


def test_names_in_a_url_are_decoded_once() -> None:
    url = url_of("postgresql://o%40u@h/d%20%2541?host=%2Frun")
    assert url is not None
    arguments = connect_arguments(url, settings_for(url))
    assert (arguments["user"], arguments["database"]) == ("o@u", "d %41")


def test_a_host_is_kept_apart_from_a_socket() -> None:
    common = {"_env_file": None, "postgres_user": "u", "postgres_db": "d", "postgres_password": "p"}
    by_name = database_url(Settings(postgres_host="db.example.com", postgres_port=6543, **common))
    assert by_name is not None
    assert (by_name.host, by_name.port, by_name.query) == ("db.example.com", 6543, {})
    by_socket = database_url(Settings(postgres_host="/run/pg", postgres_port=6543, **common))
    assert by_socket is not None
    assert (by_socket.host, by_socket.query) == (None, {"host": "/run/pg", "port": "6543"})


def test_nothing_set_means_the_embedded_server() -> None:
    assert database_url(Settings(_env_file=None)) is None


ODD_PASSWORDS = ["p@ss:w/o?r#d", "100%", "%41", "a b+c", "é梅😀", "'\"\\", "[]", "$x`"]


@pytest.mark.parametrize("password", ODD_PASSWORDS)
async def test_odd_passwords_reach_the_driver_as_they_are(password: str) -> None:
    by_url = url_of(f"postgresql://{quote('o@u', safe='')}:{quote(password, safe='')}@h:1/d")
    by_parts = database_url(
        Settings(_env_file=None, postgres_host="h", postgres_port=1, postgres_user="o@u", postgres_password=password)
    )
    for url in (by_url, by_parts):
        assert url is not None
        arguments = connect_arguments(url, settings_for(url))
        assert arguments["password"] == password
        assert password not in arguments["dsn"]
        assert url.username == "o@u"


async def test_odd_names_of_user_and_database_connect(server_url: URL) -> None:
    name = "kt o@d/d%20 é"
    await run_sql(server_url, f'DROP DATABASE IF EXISTS "{name}"', f'CREATE DATABASE "{name}"')
    await run_sql(server_url, f'DROP ROLE IF EXISTS "{name}"', f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'p%40:/'")
    try:
        url = server_url.set(database=name, username=name, password="p%40:/")
        async with opened(url) as database, database.connect() as connection:
            found = (await connection.execute(text("SELECT current_user::text, current_database()::text"))).one()
        assert tuple(found) == (name, name)
    finally:
        await run_sql(server_url, f'DROP DATABASE "{name}"', f'DROP ROLE "{name}"')


# -- secrets ------------------------------------------------------------------------------------------------------


async def test_secrets_are_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = Settings(
        _env_file=None,
        database_url="postgresql://u:s3cret-one@127.0.0.1:1/x",
        postgres_password="s3cret-two",
        openai_api_key="s3cret-three",
        db_connect_attempts=2,
    )
    async with await Database.open(settings) as database:
        with pytest.raises(StoreUnavailableError) as caught:
            await database.ping()
        shown = [repr(settings), str(settings), everything(caught.value), caplog.text, repr(database._url)]
        shown.append(repr(database.engine))
    assert not [text for text in shown if "s3cret" in text]
    # Something was logged: the retry.
    assert "stamina" in caplog.text


async def test_stored_text_is_in_no_message(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StoreError) as caught:
        await add_all(database, *(Session(session_key="private", session_type="private words") for _ in range(2)))
    assert "private" not in str(caught.value)
    assert "private words" not in str(caught.value.__cause__)
    assert "private" not in caplog.text


# -- connecting ---------------------------------------------------------------------------------------------------


async def test_a_server_that_starts_late_is_waited_for(shared_url: URL) -> None:
    """A port that listens only after a while, with the real server behind it."""
    # Bound from the start, so that nobody else takes it: it refuses until it listens.
    late = socket.socket()
    late.bind(("127.0.0.1", 0))
    port = late.getsockname()[1]

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arguments = shared_url.query
        if (directory := arguments.get("host")) is not None:
            path = f"{directory}/.s.PGSQL.{arguments.get('port', '5432')}"
            up_reader, up_writer = await asyncio.open_unix_connection(path)
        else:
            up_reader, up_writer = await asyncio.open_connection(shared_url.host, shared_url.port or 5432)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            except ConnectionError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))

    async def listen_late() -> asyncio.Server:
        await asyncio.sleep(0.4)
        return await asyncio.start_server(relay, sock=late)

    url = URL.create("postgresql", shared_url.username, shared_url.password, "127.0.0.1", port, shared_url.database)
    task = asyncio.create_task(listen_late())
    async with opened(url, db_connect_attempts=10) as database:
        await database.ping()
    server = await task
    server.close()
    # The relays end with their connections.
    async with asyncio.timeout(30):
        while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)


async def counting_server() -> tuple[asyncio.Server, list[int]]:
    connections: list[int] = []

    async def slam(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        writer.close()

    return await asyncio.start_server(slam, "127.0.0.1", 0), connections


async def test_attempts_are_bounded() -> None:
    server, connections = await counting_server()
    port = server.sockets[0].getsockname()[1]
    async with server, opened(URL.create("postgresql", "u", "p", "127.0.0.1", port, "x"), db_connect_attempts=3) as db:
        with pytest.raises(StoreUnavailableError) as caught:
            await db.ping()
    # The driver itself tries again without TLS, where the server did not want it.
    assert len(connections) in (3, 6)
    assert caught.value.__cause__ is not None


async def test_a_server_that_never_answers_times_out() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = URL.create("postgresql", "u", "p", "127.0.0.1", silent.getsockname()[1], "x")
        async with opened(url, db_connect_attempts=2, db_connect_timeout=0.1) as database:
            with pytest.raises(StoreTimeoutError, match="DB_CONNECT_TIMEOUT"):
                # Sooner than by the default.
                await asyncio.wait_for(database.ping(), 15)


async def test_what_will_not_mend_itself_is_not_tried_again(shared_url: URL, caplog: pytest.LogCaptureFixture) -> None:
    for url, message in (
        (shared_url.set(database="no_such_database"), "does not exist"),
        (shared_url.set(username="no_such_role"), "refused this user or password"),
    ):
        async with opened(url, db_connect_attempts=5) as database:
            with pytest.raises(ConfigurationError, match=message) as caught:
                await database.ping()
        assert caught.value.__cause__ is not None
    assert "stamina" not in caplog.text


async def test_a_full_server_is_tried_again(shared_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, attempts = asyncpg.connect, [0]

    async def full_at_first(**arguments: Any) -> Any:
        attempts[0] += 1
        if attempts[0] < 3:
            raise asyncpg.TooManyConnectionsError("sorry, too many clients already")
        return await connect(**arguments)

    with monkeypatch.context() as patched:
        patched.setattr(asyncpg, "connect", full_at_first)
        async with opened(shared_url, db_connect_attempts=2) as database:
            with pytest.raises(StoreUnavailableError, match="53300"):
                await database.ping()
        attempts[0] = 0
        async with opened(shared_url, db_connect_attempts=3) as database:
            await database.ping()
    assert attempts == [3]


@pytest.mark.parametrize("way", ["begin", "transaction", "connect", "driver"])
async def test_a_server_that_is_starting_is_unavailable_by_each_way(
    shared_url: URL, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    async def starting(**_: Any) -> Any:
        raise asyncpg.CannotConnectNowError("the database system is starting up")

    monkeypatch.setattr(asyncpg, "connect", starting)
    async with opened(shared_url, db_connect_attempts=1) as database:
        with pytest.raises(StoreUnavailableError, match="57P03"):
            async with getattr(database, way)():
                pass


async def test_nothing_is_tried_again_where_stamina_is_off(caplog: pytest.LogCaptureFixture) -> None:
    stamina.set_active(False)
    try:
        async with opened(URL.create("postgresql", "u", "p", "127.0.0.1", 1, "x")) as database:
            with pytest.raises(StoreUnavailableError):
                await database.ping()
    finally:
        stamina.set_active(True)
    assert "stamina" not in caplog.text


# -- the pool -----------------------------------------------------------------------------------------------------


async def test_a_killed_connection_is_replaced_at_the_next_use(shared_url: URL, server_url: URL) -> None:
    async with opened(shared_url) as database:
        async with database.begin() as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await run_sql(server_url, f"SELECT pg_terminate_backend({pid}, 30000)")
        await asyncio.sleep(0.05)
        async with database.begin() as session:
            assert await session.scalar(text("SELECT pg_backend_pid()")) != pid
            # With its codec.
            found = await session.scalar(select(literal(VECTOR, KnowledgeChunk.embedding.type)))
            assert isinstance(found, np.ndarray)


async def test_a_connection_killed_in_use_is_told_and_the_next_works(shared_url: URL) -> None:
    async with opened(shared_url) as database:
        with pytest.raises(StoreUnavailableError):
            await run(database, "SELECT pg_terminate_backend(pg_backend_pid())")
        await database.ping()


async def test_the_callers_error_outlives_a_dead_connection(shared_url: URL, server_url: URL) -> None:
    async def work() -> None:
        async with database.begin() as session:
            await kill(server_url, session)
            raise ZeroDivisionError

    async with opened(shared_url) as database:
        with pytest.raises(ZeroDivisionError):
            await work()
        await database.ping()


async def test_a_commit_on_a_dead_connection_is_told(shared_url: URL, server_url: URL) -> None:
    async def work() -> None:
        async with database.begin() as session:
            await kill(server_url, session)

    async with opened(shared_url) as database:
        with pytest.raises(StoreUnavailableError):
            await work()
        await database.ping()


async def test_an_exhausted_pool_gives_a_time_out(shared_url: URL) -> None:
    async with opened(shared_url, db_pool_max_size=1, pool_timeout=0.1) as database:
        async with database.begin():
            with pytest.raises(StoreTimeoutError, match="DB_POOL_MAX_SIZE"):
                await database.ping()
            with pytest.raises(StoreTimeoutError, match="DB_POOL_MAX_SIZE"):
                async with database.begin():
                    pass
        await database.ping()


async def test_the_pool_does_not_outgrow_its_size(shared_url: URL) -> None:
    async with opened(shared_url, db_pool_min_size=0, db_pool_max_size=3) as database:

        async def hold() -> int:
            async with database.begin() as session:
                return int(await session.scalar(text("SELECT pg_backend_pid() FROM pg_sleep(0.02)")) or 0)

        assert len(set(await asyncio.gather(*(hold() for _ in range(12))))) <= 3


async def test_closing_ends_every_connection(migrated_url: URL, server_url: URL) -> None:
    async with opened(migrated_url) as database:
        await asyncio.gather(*(database.ping() for _ in range(4)))
    async with opened(server_url) as database, database.connect() as connection, asyncio.timeout(30):
        query = text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name")
        while await connection.scalar(query, {"name": migrated_url.database}):  # noqa: ASYNC110  the server tells nobody
            await asyncio.sleep(0.01)


# -- time-outs ----------------------------------------------------------------------------------------------------


async def test_a_slow_statement_times_out_and_the_connection_goes_on(shared_url: URL) -> None:
    async with opened(shared_url, db_command_timeout=1.0, db_pool_max_size=1) as database:
        with pytest.raises(StoreTimeoutError, match="DB_COMMAND_TIMEOUT"):
            await run(database, "SELECT pg_sleep(30)")
        # The only connection of the pool.
        async with database.driver() as driver:
            running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(30)%' AND state = 'active'"
            assert await driver.fetchval(f"{running} AND pid <> pg_backend_pid()", timeout=60) == 0


async def test_a_time_out_of_the_server_is_told(shared_url: URL) -> None:
    url = shared_url.update_query_dict({"options": "-cstatement_timeout=100"})
    async with opened(url) as database:
        with pytest.raises(StoreTimeoutError, match="57014"):
            await run(database, "SELECT pg_sleep(30)")


async def test_a_patient_database_has_no_time_out(shared_url: URL) -> None:
    async with opened(shared_url, db_command_timeout=0.1) as database, database.patient() as patient:
        await run(patient, "SELECT pg_sleep(0.3)")


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "kind", "message"),
    [
        ("SELECT * FROM no_such_table", SchemaOutdatedError, "alembic upgrade head"),
        ("SELECT no_such_column FROM sessions", SchemaOutdatedError, "alembic upgrade head"),
        ("SELECT NULL::no_such_type", SchemaOutdatedError, "alembic upgrade head"),
        ("SELECT no_such_function()", SchemaOutdatedError, "search_path"),
        ("INSERT INTO knowledge_chunks (source_id, content) VALUES (-1, 'c')", NotFoundError, "source does not exist"),
        ("INSERT INTO embedding_jobs (chunk_id) VALUES (-1)", InvalidInputError, "embedding_jobs_chunk_id_fkey"),
        ("INSERT INTO sessions (session_key) VALUES ('k')", InvalidInputError, "23502"),
        ("SELECT 1/0", InvalidInputError, "22012"),
        ("SELECT 9223372036854775807 + 1", InvalidInputError, "22003"),
        ("SELECT 'x'::int", InvalidInputError, "22P02"),
        ("SELECT CAST('[1,2]' AS halfvec(3))", InvalidInputError, "22000"),
        ("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$", StoreUnavailableError, "try again"),
        ("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$", StoreUnavailableError, "try again"),
        ("DO $$ BEGIN RAISE SQLSTATE '53300'; END $$", StoreUnavailableError, "resources"),
        ("DO $$ BEGIN RAISE SQLSTATE '53100'; END $$", StoreUnavailableError, "resources"),
        ("DO $$ BEGIN RAISE SQLSTATE '54000'; END $$", InvalidInputError, "too large"),
        ("DO $$ BEGIN RAISE SQLSTATE '55P03'; END $$", StoreTimeoutError, "lock"),
        ("DO $$ BEGIN RAISE SQLSTATE '57P01'; END $$", StoreUnavailableError, "shutting down"),
        ("DO $$ BEGIN RAISE SQLSTATE '58030'; END $$", StoreUnavailableError, "its log"),
        ("DO $$ BEGIN RAISE SQLSTATE '08006'; END $$", StoreUnavailableError, "connection broke"),
        ("DO $$ BEGIN RAISE SQLSTATE '42501'; END $$", ConfigurationError, "privilege"),
        ("SET TRANSACTION READ ONLY; DELETE FROM sessions", ConfigurationError, "read-only"),
    ],
)
async def test_errors_are_told_by_sqlstate(
    shared_url: URL, statement: str, kind: type[StoreError], message: str
) -> None:
    async with opened(shared_url) as database:
        with pytest.raises(kind, match=message) as caught:
            await run(database, *(statement.split("; ") if statement.startswith("SET") else [statement]))
        assert isinstance(caught.value.__cause__, DBAPIError)
        await database.ping()


async def test_a_key_that_exists_is_told(database: Database) -> None:
    with pytest.raises(InvalidInputError, match="session with this key exists"):
        await run(database, insert(Session).values([{"session_key": "k", "session_type": "t"}] * 2))


async def test_an_integer_beyond_64_bits_is_invalid(database: Database) -> None:
    with pytest.raises(InvalidInputError):
        await run(database, select(Session.id).where(Session.guild_id == 2**63))


async def test_a_schema_that_changes_under_a_connection_is_worth_another_try(database: Database) -> None:
    query = text("SELECT * FROM sessions")
    async with database.connect() as connection:
        await connection.execute(query)
        await connection.execute(text("ALTER TABLE sessions ADD COLUMN extra int"))
        with pytest.raises(StoreUnavailableError, match="try again"), translated_errors():
            await connection.execute(query)
        await connection.execute(query)


async def test_a_real_deadlock_is_worth_another_try(database: Database) -> None:
    async with database.begin() as session:
        session.add_all([Session(session_key=key, session_type="t") for key in "ab"])
    locked = [asyncio.Event(), asyncio.Event()]

    async def lock(first: str, then: str, own: int) -> None:
        statement = "UPDATE sessions SET version = 2 WHERE session_key = '{}'"
        with translated_errors():
            async with database.begin() as session:
                await session.execute(text("SET LOCAL deadlock_timeout = '50ms'"))
                await session.execute(text(statement.format(first)))
                locked[own].set()
                await locked[1 - own].wait()
                await session.execute(text(statement.format(then)))

    results = await asyncio.gather(lock("a", "b", 0), lock("b", "a", 1), return_exceptions=True)
    failed = [result for result in results if result is not None]
    assert [type(error) for error in failed] == [StoreUnavailableError]
    assert "40P01" in str(failed[0])


def test_what_is_not_the_databases_stays_as_it_is() -> None:
    assert translate_error(ValueError("x")) is None
    with pytest.raises(ZeroDivisionError), translated_errors():
        raise ZeroDivisionError
    error = InvalidInputError("x")
    with pytest.raises(InvalidInputError) as caught, translated_errors():
        raise error
    assert caught.value is error


# -- transactions -------------------------------------------------------------------------------------------------


async def count_sessions(database: Database) -> int:
    async with database.connect() as connection:
        return int(await connection.scalar(text("SELECT count(*) FROM sessions")) or 0)


async def test_a_transaction_commits_on_a_clean_exit_and_only_then(database: Database) -> None:
    async with database.begin() as session:
        session.add(Session(session_key="k", session_type="t"))
        await session.flush()
        assert await count_sessions(database) == 0
    assert await count_sessions(database) == 1


async def test_what_was_not_flushed_is_committed_too(database: Database) -> None:
    async with database.begin() as session:
        session.add(Session(session_key="k", session_type="t"))
    assert await count_sessions(database) == 1


async def test_a_transaction_rolls_back_on_an_error(database: Database) -> None:
    async def work() -> None:
        async with database.begin() as session:
            session.add(Session(session_key="k", session_type="t"))
            await session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    assert await count_sessions(database) == 0


async def test_an_error_in_the_commit_is_ours(database: Database) -> None:
    with pytest.raises(InvalidInputError, match="session with this key exists"):
        async with database.begin() as session:
            session.add_all([Session(session_key="k", session_type="t") for _ in range(2)])
    assert await count_sessions(database) == 0


@pytest.mark.parametrize("statement", ["SELECT pg_sleep(600)", None])
async def test_a_transaction_rolls_back_on_cancellation(migrated_url: URL, statement: str | None) -> None:
    async with opened(migrated_url, db_pool_max_size=2) as database:
        started = asyncio.Event()

        async def work() -> None:
            async with database.begin() as session:
                session.add(Session(session_key="k", session_type="t"))
                await session.flush()
                started.set()
                if statement is None:
                    await asyncio.sleep(600)
                else:
                    await session.execute(text(statement))

        for _ in range(3):
            started.clear()
            task = asyncio.create_task(work())
            await started.wait()
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await count_sessions(database) == 0
        # Nothing is left open, no connection is lost to the pool.
        assert database.engine.pool.checkedout() == 0
        async with database.connect() as connection, asyncio.timeout(30):
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL"
            )
            # The server takes its time to end what was cancelled.
            while await connection.scalar(text(f"{query} AND pid <> pg_backend_pid()")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_each_statement_of_connect_stands_for_itself(database: Database) -> None:
    async with database.connect() as connection:
        await connection.execute(text("INSERT INTO sessions (session_key, session_type) VALUES ('k', 't')"))
        assert await count_sessions(database) == 1
        with pytest.raises(DBAPIError):
            await connection.execute(text("SELECT 1/0"))
        assert await connection.scalar(text("SELECT 1")) == 1
        await connection.execute(text("VACUUM sessions"))
    # The next user of the connection has transactions again.
    with pytest.raises(InvalidInputError):
        await run(database, "DELETE FROM sessions", "SELECT 1/0")
    assert await count_sessions(database) == 1


async def test_transactions_read_what_was_committed_meanwhile(shared_url: URL) -> None:
    """Whatever the server's default: the status of a source is recomputed so."""
    url = shared_url.update_query_dict({"options": "-cdefault_transaction_isolation=serializable"})
    async with opened(url) as database, database.begin() as session:
        assert await session.scalar(text("SHOW transaction_isolation")) == "read committed"


async def test_objects_stay_readable_after_the_commit(database: Database) -> None:
    async with database.begin() as session:
        row = Session(session_key="k", session_type="t")
        session.add(row)
    assert row.session_key == "k"
    assert row.id > 0


async def test_a_statement_after_an_error_says_that_the_transaction_has_ended(database: Database) -> None:
    async with database.begin() as session:
        with pytest.raises(NotFoundError):
            await KnowledgeRepository(session).get_source(1)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1 / 0"))
        with pytest.raises(StoreError, match="an earlier error ended this transaction"):
            await KnowledgeRepository(session).get_source(1)


async def test_an_error_that_nobody_foresaw_is_a_store_error_without_its_text(database: Database) -> None:
    with pytest.raises(StoreError, match="P0001") as caught, translated_errors():
        async with database.connect() as connection:
            await connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'private'; END $$"))
    assert "private" not in str(caught.value)


async def test_a_forked_child_does_not_use_its_parents_connection(database: Database) -> None:
    async with database.connect() as connection:
        record = (await connection.get_raw_connection())._connection_record
        backend = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        # As a child finds it.
        record.info["pid"] = -1
        parents = (await connection.get_raw_connection()).driver_connection
    async with database.connect() as connection:
        assert (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one() != backend
    assert not parents.is_closed()
    await parents.close()


async def test_a_lost_connection_whose_error_is_swallowed_fails_the_commit_in_our_words(database: Database) -> None:
    for begin in (database.begin, database.transaction):
        with pytest.raises(StoreUnavailableError, match="run it again"):  # noqa: PT012
            async with begin() as unit:
                with contextlib.suppress(Exception):
                    await unit.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
