"""Sessions: one append is one statement, and nothing that was said is lost."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import settings_for
from sqlalchemy import URL, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import (
    Database,
    InvalidInputError,
    Message,
    NotFoundError,
    Scope,
    SessionArchiver,
    SessionRecord,
    SessionRepository,
    SessionStatus,
    Settings,
    StaleSessionError,
    StoreUnavailableError,
)
from kotonoha_store.endpoints import database_url
from kotonoha_store.sessions import KEY_MAX_BYTES, DueSession, _append, _due

pytestmark = pytest.mark.role("app")

BIG = 2**63 - 1


@pytest.fixture
def sessions(session: AsyncSession) -> SessionRepository:
    return SessionRepository(session)


async def append(database: Database, key: str, *contents: str, **scope: Any) -> None:
    async with database.begin() as session:
        await SessionRepository(session).append(key, [Message.user(content) for content in contents], **scope)


async def load(database: Database, key: str) -> SessionRecord:
    async with database.begin() as session:
        return await SessionRepository(session).load(key)


def contents(record: SessionRecord) -> list[str]:
    return [message.content for message in record.messages]


def users(*texts: str) -> list[Message]:
    return [Message.user(content) for content in texts]


async def store_raw(session: AsyncSession, key: str, messages: str) -> None:
    await session.execute(
        text("INSERT INTO sessions (session_key, session_type, messages) VALUES (:key, 'chat', cast(:m AS jsonb))"),
        {"key": key, "m": messages},
    )


async def make_quiet(session: AsyncSession, key: str, since: timedelta) -> None:
    """As if the last append had been so long ago."""
    await session.execute(
        text(
            "UPDATE sessions SET last_active_at = now() - cast(:since AS interval), archive_due_at ="
            " date_bin('5 minutes', now() - :since, timestamptz '2000-01-01 00:00Z') + interval '5 minutes'"
            " WHERE session_key = :key"
        ),
        {"key": key, "since": since},
    )


# Append


async def test_the_first_append_creates_and_the_next_extend(sessions: SessionRepository) -> None:
    first = await sessions.append("k", Message.user("one"))
    second = await sessions.append("k", [Message.assistant("two"), Message.user("three")])
    assert (first.version, first.message_count) == (1, 1)
    assert (second.session_id, second.version, second.message_count) == (first.session_id, 2, 3)
    record = await sessions.load("k")
    assert contents(record) == ["one", "two", "three"]
    assert (record.id, record.version, record.message_count) == (first.session_id, 2, 3)
    assert (record.session_type, record.status, record.scope) == ("chat", SessionStatus.ACTIVE, Scope())
    assert (record.messages_offset, record.last_archived_message_index, record.rewrite_version) == (0, 0, 1)


async def test_a_message_comes_back_as_it_went_in(sessions: SessionRepository) -> None:
    message = Message(
        role="tool",
        content="梅雨 👩‍👩‍👧 \\u0000 \u2028 '\"\\",
        timestamp=datetime(2024, 6, 1, 12, 30, 15, 123456, tzinfo=UTC),
        author="花子",
        message_id=BIG,
        metadata={"n": 2**70, "x": [None, True, 1.5, {"": "\uffff"}]},
    )
    await sessions.append("k", message)
    assert (await sessions.load("k")).messages == (message,)


async def test_an_archived_session_becomes_active_again(sessions: SessionRepository, session: AsyncSession) -> None:
    await sessions.append("k", Message.user("one"))
    await session.execute(text("UPDATE sessions SET status = 'archived', last_archived_message_index = 1"))
    assert (await sessions.load("k")).status is SessionStatus.ARCHIVED
    await sessions.append("k", Message.user("two"))
    record = await sessions.load("k")
    assert (record.status, record.last_archived_message_index) == (SessionStatus.ACTIVE, 1)


async def test_type_and_scope_stay_and_unknown_ids_are_filled_in(sessions: SessionRepository) -> None:
    await sessions.append("k", Message.user("1"), session_type="thread", guild_id=BIG)
    await sessions.append("k", Message.user("2"), session_type="dm", channel_id=-BIG - 1, user_id=0)
    await sessions.append("k", Message.user("3"), guild_id=BIG, thread_id=BIG - 1)
    record = await sessions.load("k")
    assert record.session_type == "thread"
    assert record.scope == Scope(guild_id=BIG, channel_id=-BIG - 1, thread_id=BIG - 1, user_id=0)


@pytest.mark.parametrize("name", ["guild_id", "channel_id", "thread_id", "user_id"])
async def test_another_scope_is_refused_and_changes_nothing(sessions: SessionRepository, name: str) -> None:
    await sessions.append("k", Message.user("mine"), guild_id=1, channel_id=1, thread_id=1, user_id=1)
    with pytest.raises(InvalidInputError, match="belongs to another"):
        await sessions.append("k", Message.user("theirs"), **{name: 2})
    record = await sessions.load("k")
    assert (contents(record), record.version) == (["mine"], 1)


@pytest.fixture
async def patient(settings: Settings) -> AsyncIterator[Database]:
    """As ``database``; who waits for a connection has time, since who has one appends again and again."""
    url = database_url(settings)
    assert url is not None
    async with Database(url, settings, pool_timeout=300) as database:
        yield database


async def test_fifty_writers_on_one_session_lose_nothing(patient: Database) -> None:
    database = patient

    async def write(writer: int) -> None:
        for number in range(20):
            await append(database, "k", f"{writer} {number}")

    await asyncio.gather(*(write(writer) for writer in range(50)))
    record = await load(database, "k")
    assert (record.message_count, record.version) == (1000, 1000)
    pairs = [tuple(map(int, content.split())) for content in contents(record)]
    for writer in range(50):
        assert [number for who, number in pairs if who == writer] == list(range(20))


async def test_an_archiver_beside_the_writers_takes_each_message_once(database: Database, patient: Database) -> None:
    archiver = SessionArchiver(database, min_session_length=0, overlap_messages=5)
    done = asyncio.Event()
    reports = []
    changed = asyncio.Condition()

    async def archived(times: int) -> None:
        async with changed, asyncio.timeout(60):
            await changed.wait_for(lambda: sum(report.archived for report in reports) >= times)

    async def write(writer: int) -> None:
        for number in range(20):
            # The archiver gets between the writers, whoever is served first.
            if number in (7, 14):
                await archived(number // 7)
            await append(patient, "k", f"{writer} {number}")

    async def archive() -> None:
        while not done.is_set():
            report = await archiver.run_once(idle_for=timedelta(0))
            async with changed:
                reports.append(report)
                changed.notify_all()

    archiving = [asyncio.create_task(archive()), asyncio.create_task(archive())]
    await asyncio.gather(*(write(writer) for writer in range(50)))
    done.set()
    await asyncio.gather(*archiving)

    record = await load(database, "k")
    async with database.begin() as session:
        rows = (
            await session.execute(
                text("SELECT origin_first_index, archived_messages FROM knowledge_sources ORDER BY origin_first_index")
            )
        ).all()
        chunks = (
            await session.execute(
                text(
                    "SELECT cast(location ->> 'first_message_index' AS int),"
                    " cast(location ->> 'last_message_index' AS int), content FROM knowledge_chunks"
                )
            )
        ).all()
    assert len(rows) > 1
    assert [report.failed for report in reports] == [()] * len(reports)
    # Absolute indexes: each source goes on where the one before it ended.
    said: list[str] = []
    for first, messages in rows:
        assert first == len(said)
        said += [message["content"] for message in messages]
    assert record.messages_offset + record.last_archived_message_index == len(said)
    said += contents(record)[record.last_archived_message_index :]
    assert sorted(said) == sorted(f"{writer} {number}" for writer in range(50) for number in range(20))
    for writer in range(50):
        assert [s for s in said if s.startswith(f"{writer} ")] == [f"{writer} {number}" for number in range(20)]
    assert said[record.messages_offset :] == contents(record)
    for first, last, content in chunks:
        assert content.split("\n") == [f"user: {line}" for line in said[first : last + 1]]


@pytest.mark.parametrize("limit", [None, 20])
async def test_most_appends_are_hot(database: Database, limit: int | None) -> None:
    for number in range(21):
        async with database.begin() as session:
            # The last one asks for archiving, which is in an index.
            await SessionRepository(session, archive_max_messages=limit).append("k", Message.user(str(number)))
    counts = text(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'sessions' AND n_tup_upd >= 20"
    )
    async with asyncio.timeout(30):
        while True:
            async with database.begin() as session:
                # A backend reports when it has been idle for a moment, or is asked to.
                await session.execute(text("SELECT pg_stat_force_next_flush()"))
                row = (await session.execute(counts)).one_or_none()
            if row is not None:
                break
            await asyncio.sleep(0.1)
    # Two at most may cross a boundary of five minutes or find their page full.
    assert row.n_tup_hot_upd >= row.n_tup_upd - 2 - (limit is not None)


async def test_the_due_time_changes_every_five_minutes_only(sessions: SessionRepository, session: AsyncSession) -> None:
    await sessions.append("k", Message.user("1"))
    row = (
        await session.execute(
            text("SELECT archive_due_at - last_active_at, extract(epoch FROM archive_due_at) FROM sessions")
        )
    ).one()
    assert timedelta(0) < row[0] <= timedelta(minutes=5)
    assert row[1] % 300 == 0


@pytest.mark.parametrize(
    "key", ["", "\x00", "a\x00b", "\ud800", "k" * (KEY_MAX_BYTES + 1), "雨" * 667], ids=lambda key: repr(key[:4])
)
async def test_an_unusable_key_is_refused(sessions: SessionRepository, key: str) -> None:
    with pytest.raises(InvalidInputError, match="session_key"):
        await sessions.append(key, Message.user("x"))
    with pytest.raises(InvalidInputError, match="session_key"):
        await sessions.load(key)
    with pytest.raises(InvalidInputError, match="session_key"):
        await sessions.delete(key)


async def test_the_longest_key_fits_the_index(sessions: SessionRepository) -> None:
    # Random, since a long run of one letter is compressed before it reaches the index.
    key = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=KEY_MAX_BYTES))
    await sessions.append(key, Message.user("x"))
    assert (await sessions.load(key)).session_key == key


@pytest.mark.parametrize("name", ["guild_id", "channel_id", "thread_id", "user_id"])
@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, True, "1", 1.0])
async def test_an_id_that_is_no_bigint_is_refused(sessions: SessionRepository, name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=name):
        await sessions.append("k", Message.user("x"), **{name: value})


async def test_an_append_without_messages_or_with_a_bad_type_is_refused(sessions: SessionRepository) -> None:
    with pytest.raises(InvalidInputError, match="at least one"):
        await sessions.append("k", [])
    with pytest.raises(InvalidInputError, match="session_type"):
        await sessions.append("k", Message.user("x"), session_type="\x00")
    assert await sessions.find("k") is None


async def test_metadata_spoilt_after_validation_is_refused_too(sessions: SessionRepository) -> None:
    message = Message.user("x", metadata={"a": {"b": 1}})
    message.metadata["a"] = {"b": "\x00"}
    with pytest.raises(InvalidInputError, match=r"metadata\.a\.b holds a NUL"):
        await sessions.append("k", message)


async def test_ten_megabytes_of_text_fit(sessions: SessionRepository) -> None:
    content = "雨が降る。" * 700_000
    await sessions.append("k", Message.user(content))
    await sessions.append("k", Message.user("more"))
    assert contents(await sessions.load("k")) == [content, "more"]
    assert contents(await sessions.load("k", last=1)) == ["more"]


async def test_a_cancelled_append_is_done_or_undone(database: Database) -> None:
    await append(database, "k", "0")
    chance = random.Random(7)
    for number in range(1, 41):
        task = asyncio.create_task(append(database, "k", *(f"{number} {part}" for part in range(3))))
        await asyncio.sleep(chance.random() * 0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    # Whoever is left must be able to work, and see whole appends only.
    await append(database, "k", "last")
    record = await load(database, "k")
    said = contents(record)
    assert (said[0], said[-1]) == ("0", "last")
    for start in range(1, len(said) - 1, 3):
        number = said[start].split()[0]
        assert said[start : start + 3] == [f"{number} {part}" for part in range(3)]
    assert (len(said) - 2) % 3 == 0
    assert record.version == 2 + (len(said) - 2) // 3


async def test_a_killed_connection_is_told_and_the_next_call_works(database: Database) -> None:
    await append(database, "k", "kept")

    async def append_twice() -> None:
        async with database.begin() as session:
            sessions = SessionRepository(session)
            await sessions.append("k", Message.user("lost"))
            backend = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            async with database.begin() as other:
                await other.execute(text("SELECT pg_terminate_backend(:pid, 30000)"), {"pid": backend})
            await sessions.append("k", Message.user("lost too"))

    with pytest.raises(StoreUnavailableError):
        await append_twice()
    await append(database, "k", "next")
    assert contents(await load(database, "k")) == ["kept", "next"]


# Load


async def test_the_last_messages_alone(sessions: SessionRepository) -> None:
    await sessions.append("k", users("1", "2", "3"))
    for last, expected in [(0, []), (1, ["3"]), (2, ["2", "3"]), (3, ["1", "2", "3"]), (10**9, ["1", "2", "3"])]:
        record = await sessions.load("k", last=last)
        assert contents(record) == expected
        assert record.message_count == 3
    with pytest.raises(InvalidInputError, match="negative"):
        await sessions.load("k", last=-1)


async def test_load_find_and_get(sessions: SessionRepository) -> None:
    with pytest.raises(NotFoundError, match="'k'"):
        await sessions.load("k")
    assert await sessions.find("k") is None
    assert await sessions.get(1) is None
    await sessions.append("k", Message.user("x"))
    record = await sessions.load("k")
    assert await sessions.find("k") == record
    assert await sessions.get(record.id) == record
    with pytest.raises(InvalidInputError):
        await sessions.get(2**63)


async def test_messages_of_another_program_are_loaded_without_loss(
    sessions: SessionRepository, session: AsyncSession
) -> None:
    deep = "[" * 400 + "]" * 400
    stored = [
        {"role": "user", "content": None},
        {"content": "no role", "name": "花子", "metadata": {"name": "other"}},
        {"role": "user", "content": ["parts"], "timestamp": "yesterday", "metadata": "text"},
        "a string",
        None,
        17,
        {"role": "x" * 100, "content": "c", "message_id": 2**70, "timestamp": "0001-01-01T00:00:00+14:00"},
    ]
    raw = json.dumps(stored, ensure_ascii=False)[:-1] + f', {{"role": "user", "extra": {deep}}}]'
    await store_raw(session, "k", raw)
    record = await sessions.load("k")
    assert record.message_count == len(record.messages) == 8
    assert [(m.role, m.content, m.timestamp) for m in record.messages[:7]] == [
        ("user", "", None),
        ("user", "no role", None),
        ("user", "", None),
        ("user", "", None),
        ("user", "", None),
        ("user", "", None),
        ("user", "c", None),
    ]
    assert [m.metadata for m in record.messages[:7]] == [
        {},
        {"name": "other", "stored.name": "花子"},
        {"content": ["parts"], "timestamp": "yesterday", "metadata": "text"},
        {"stored": "a string"},
        {"stored": None},
        {"stored": 17},
        {"role": "x" * 100, "message_id": 2**70, "timestamp": "0001-01-01T00:00:00+14:00"},
    ]
    kept = record.messages[7].metadata["stored"]
    assert isinstance(kept, str)
    assert json.loads(kept) == {"role": "user", "extra": json.loads(deep)}
    # What was read can be written again.
    saved = await sessions.save(record, record.messages)
    assert saved.messages == record.messages


# Save


async def test_save_replaces_all_messages(sessions: SessionRepository) -> None:
    await sessions.append("k", users("1", "2"))
    record = await sessions.load("k")
    saved = await sessions.save(record, [*record.messages[:1], Message.assistant("other")])
    assert contents(saved) == ["1", "other"]
    assert (saved.version, saved.rewrite_version) == (record.version + 1, record.rewrite_version + 1)
    assert await sessions.load("k") == saved
    assert contents(await sessions.save(saved, [])) == []


async def test_a_stale_record_is_refused(sessions: SessionRepository) -> None:
    await sessions.append("k", Message.user("1"))
    record = await sessions.load("k")
    await sessions.append("k", Message.user("2"))
    with pytest.raises(StaleSessionError, match="version 1"):
        await sessions.save(record, [])
    assert contents(await sessions.load("k")) == ["1", "2"]
    await sessions.delete("k")
    with pytest.raises(StaleSessionError, match="gone"):
        await sessions.save(record, [])


async def test_a_record_of_the_last_messages_cannot_be_saved(sessions: SessionRepository) -> None:
    await sessions.append("k", users("1", "2"))
    partial = await sessions.load("k", last=1)
    with pytest.raises(InvalidInputError, match="load the whole session"):
        await sessions.save(partial, [])
    whole = await sessions.load("k", last=2)
    assert contents(await sessions.save(whole, whole.messages)) == ["1", "2"]


async def test_save_makes_the_session_active_and_due_later(sessions: SessionRepository, session: AsyncSession) -> None:
    await sessions.append("k", Message.user("1"))
    await make_quiet(session, "k", timedelta(hours=5))
    await session.execute(text("UPDATE sessions SET status = 'archived'"))
    record = await sessions.load("k")
    saved = await sessions.save(record, record.messages)
    assert saved.status is SessionStatus.ACTIVE
    assert saved.last_active_at > record.last_active_at
    assert await sessions.due_for_archiving(timedelta(minutes=1), limit=1) == []


async def test_save_never_gives_an_archived_index_to_another_message(
    sessions: SessionRepository, session: AsyncSession
) -> None:
    await sessions.append("k", users("1", "2", "3"))
    await session.execute(text("UPDATE sessions SET messages_offset = 10, last_archived_message_index = 2"))
    record = await sessions.load("k")
    cleared = await sessions.save(record, [])
    assert (cleared.messages_offset, cleared.last_archived_message_index) == (12, 0)
    longer = await sessions.save(cleared, users("a", "b", "c"))
    assert (longer.messages_offset, longer.last_archived_message_index) == (12, 0)


async def test_save_beside_append_loses_nothing_silently(database: Database) -> None:
    stale = 0
    for round_ in range(30):
        key = f"k{round_}"
        await append(database, key, "start")
        record = await load(database, key)

        async def save(record: SessionRecord = record) -> None:
            async with database.begin() as session:
                await SessionRepository(session).save(record, users("saved"))

        pair = [save(), append(database, key, "appended")]
        if round_ % 2:
            pair.reverse()
        results = await asyncio.gather(*pair, return_exceptions=True)
        said = contents(await load(database, key))
        if any(isinstance(result, StaleSessionError) for result in results):
            stale += 1
            assert said == ["start", "appended"]
        else:
            assert results == [None, None]
            assert said == ["saved", "appended"]
    assert stale < 30


async def test_a_save_that_waits_for_an_append_is_refused(database: Database) -> None:
    await append(database, "k", "start")
    record = await load(database, "k")

    async def save() -> None:
        async with database.begin() as session:
            await SessionRepository(session).save(record, users("saved"))

    async with database.begin() as session:
        await SessionRepository(session).append("k", Message.user("appended"))
        task = asyncio.create_task(save())
        await asyncio.sleep(0.2)
        assert not task.done()
    with pytest.raises(StaleSessionError):
        await task
    assert contents(await load(database, "k")) == ["start", "appended"]


# Delete and list


async def test_delete(sessions: SessionRepository) -> None:
    await sessions.append("k", Message.user("1"))
    await sessions.append("other", Message.user("1"))
    await sessions.delete("k")
    assert await sessions.find("k") is None
    assert await sessions.find("other") is not None
    with pytest.raises(NotFoundError, match="'k'"):
        await sessions.delete("k")


async def test_lists_come_in_pages(sessions: SessionRepository) -> None:
    ids = [(await sessions.append(f"k{n}", users(*"x" * (n + 1)), guild_id=n)).session_id for n in range(5)]
    first = await sessions.list(limit=2)
    second = await sessions.list(limit=2, after_id=first[-1].id)
    assert [summary.id for summary in [*first, *second]] == ids[:4]
    assert [summary.message_count for summary in first] == [1, 2]
    assert (first[1].session_key, first[1].scope) == ("k1", Scope(guild_id=1))
    assert await sessions.list(after_id=ids[-1]) == []
    for size in (1, 2, 5, 6):
        assert [summary.id async for summary in sessions.iterate(page_size=size)] == ids
    with pytest.raises(InvalidInputError, match="limit"):
        await sessions.list(limit=0)


async def test_lists_are_filtered(sessions: SessionRepository, session: AsyncSession) -> None:
    names = ("guild_id", "channel_id", "thread_id", "user_id")
    for index, name in enumerate(names):
        await sessions.append(name, Message.user("x"), **{name: BIG - index})
    await session.execute(text("UPDATE sessions SET status = 'archived' WHERE session_key = 'user_id'"))
    for index, name in enumerate(names):
        assert [s.session_key for s in await sessions.list(**{name: BIG - index})] == [name]
    assert [s.session_key for s in await sessions.list(status=SessionStatus.ARCHIVED)] == ["user_id"]
    assert [s.session_key async for s in sessions.iterate(status=SessionStatus.ACTIVE, page_size=1)] == [*names[:3]]
    assert await sessions.list(guild_id=BIG, channel_id=BIG - 1) == []


# Due for archiving


async def test_what_is_due_is_told_to_the_second(sessions: SessionRepository, session: AsyncSession) -> None:
    idle_for = timedelta(hours=1)
    for key, quiet in [
        ("just not", timedelta(minutes=59, seconds=59)),
        ("just", timedelta(hours=1)),
        ("long", timedelta(hours=2)),
        ("in the same slot", timedelta(hours=1, seconds=1)),
        ("archived", timedelta(days=1)),
    ]:
        await sessions.append(key, Message.user("x"))
        await make_quiet(session, key, quiet)
    await session.execute(text("UPDATE sessions SET status = 'archived' WHERE session_key = 'archived'"))
    due = await sessions.due_for_archiving(idle_for, limit=10)
    keys = [(await sessions.get(entry.id)).session_key for entry in due]
    assert keys[0] == "long"
    assert sorted(keys) == ["in the same slot", "just", "long"]
    assert len(await sessions.due_for_archiving(timedelta(0), limit=10)) == 4


async def test_due_sessions_come_in_pages(sessions: SessionRepository, session: AsyncSession) -> None:
    for number in range(5):
        await sessions.append(f"k{number}", Message.user("x"))
    # All due at the same time: the id decides.
    everything = await sessions.due_for_archiving(timedelta(0), limit=10)
    assert len(everything) == 5
    paged: list[DueSession] = []
    for size in (2, 2, 1, 0):
        page = await sessions.due_for_archiving(timedelta(0), limit=2, after=paged[-1] if paged else None)
        assert len(page) == size
        paged += page
    assert paged == everything


async def explain(session: AsyncSession, statement: Any) -> str:
    """The plan of a statement with its values bound."""
    compiled = statement.compile(dialect=postgresql.asyncpg.dialect(), compile_kwargs={"render_postcompile": True})
    connection = await session.connection()
    driver = (await connection.get_raw_connection()).driver_connection
    processors, parameters = compiled._bind_processors, compiled.params
    values = [processors.get(name, lambda value: value)(parameters[name]) for name in compiled.positiontup]
    return "\n".join(row[0] for row in await driver.fetch(f"EXPLAIN {compiled.string}", *values))


@pytest.mark.role("superuser")
async def test_the_queries_use_their_indexes(session: AsyncSession) -> None:
    await session.execute(
        text(
            "INSERT INTO sessions (session_key, session_type, status, last_active_at, archive_due_at)"
            " SELECT 'plan' || n, 'chat',"
            " cast(CASE WHEN n % 20 = 0 THEN 'active' ELSE 'archived' END AS session_status_enum),"
            " now() - n * interval '1 minute', now() - n * interval '1 minute' FROM generate_series(1, 20000) n"
        )
    )
    await session.execute(text("ANALYZE sessions"))
    for after in (None, DueSession(1, datetime(2024, 1, 1, tzinfo=UTC))):
        plan = await explain(session, _due(timedelta(hours=1), 10, after))
        assert "idx_sessions_archive_candidates" in plan
        assert "Sort" not in plan
    statement = _append(50)
    values = dict.fromkeys(statement.names) | {"new_key": "plan1", "new_type": "chat", "new_messages": "[]"}
    values |= statement.constants
    driver = (await (await session.connection()).get_raw_connection()).driver_connection
    rows = await driver.fetch(f"EXPLAIN {statement.sql}", *statement.arguments(values))
    plan = "\n".join(row[0] for row in rows)
    assert "Conflict Arbiter Indexes: sessions_session_key_key" in plan


async def test_the_pool_is_not_needed_twice(migrated_url: URL) -> None:
    """Each call uses the one connection of its transaction."""
    async with Database(migrated_url, settings_for(migrated_url, db_pool_max_size=1)) as database:
        await append(database, "k", "1")
        async with asyncio.timeout(60), database.begin() as session:
            sessions = SessionRepository(session)
            await sessions.save(await sessions.load("k"), users("2"))
            assert [summary.session_key async for summary in sessions.iterate()] == ["k"]


@pytest.mark.parametrize(
    ("kept", "archived"),
    [
        (lambda old: old, 5),
        (lambda old: [*old, Message.user("more")], 5),
        (lambda old: old[3:], 2),
        (lambda old: old[6:], 0),
        (lambda old: [], 0),
        (lambda old: [Message.user("summary")], 0),
        (lambda old: [old[0], edited(old[1]), *old[2:]], 5),
        (lambda old: [old[0], Message.user("another"), *old[2:]], 0),
        (lambda old: [*old[:5], old[6]], 5),
        (lambda old: [*old[:4], *old[5:]], 0),
    ],
    ids=[
        "same",
        "longer",
        "trimmed",
        "trimmed beyond",
        "cleared",
        "replaced",
        "edited",
        "another in its place",
        "new one out",
        "old one out",
    ],
)
async def test_what_a_save_moves_to_the_front_is_not_taken_for_archived(
    session: AsyncSession, kept: Callable[[list[Message]], list[Message]], archived: int
) -> None:
    """Five archived messages that stay as context, and two new ones."""
    sessions = SessionRepository(session)
    said = [Message.user(f"message {number}") for number in range(7)]
    await sessions.append("k", said)
    await session.execute(
        text("UPDATE sessions SET last_archived_message_index = 5, messages_offset = 3 WHERE session_key = 'k'")
    )
    saved = await sessions.save(await sessions.load("k"), kept(said))
    assert saved.last_archived_message_index == archived
    assert saved.messages_offset + archived == 8, "an absolute index is never given twice"


def edited(message: Message, **changes: Any) -> Message:
    return Message(**{**message.model_dump(), "content": "edited", **changes})


@pytest.mark.parametrize(
    ("new", "archived"),
    [
        (lambda old: [*old, Message.user("more")], 3),
        (lambda old: [*users("quite", "different", "words"), *users("all", "new")], 0),
        (lambda old: [edited(old[0]), edited(old[1]), *old[2:], Message.user("more")], 3),
        (lambda old: [old[0], edited(old[1], message_id=99), old[2]], 0),
        (lambda old: [old[0], edited(old[1], timestamp=None), old[2]], 3),
        (lambda old: [old[0], old[1], edited(old[2], role="assistant")], 0),
        (lambda old: [old[0], old[1], edited(old[2], timestamp=datetime.now(UTC))], 0),
        (lambda old: [Message.system("before"), *old], 0),
        (lambda old: old[1:], 2),
        (lambda old: [edited(old[1]), old[2]], 0),
    ],
    ids=[
        "longer",
        "others",
        "edited",
        "another id",
        "same id",
        "another role",
        "another time",
        "one before",
        "trimmed",
        "trimmed and edited",
    ],
)
async def test_where_all_is_archived_a_save_marks_only_the_same_messages(
    session: AsyncSession, new: Callable[[list[Message]], list[Message]], archived: int
) -> None:
    """In doubt a message is archived twice rather than never."""
    sessions = SessionRepository(session)
    said = [Message.user("0", message_id=1), Message.assistant("1", message_id=2), Message.user("2")]
    await sessions.append("k", said)
    await session.execute(text("UPDATE sessions SET last_archived_message_index = 3, messages_offset = 7"))
    saved = await sessions.save(await sessions.load("k"), new(said))
    assert saved.last_archived_message_index == archived
    assert saved.messages_offset + archived == 10


async def test_a_list_by_something_that_is_no_id_is_refused(session: AsyncSession) -> None:
    with pytest.raises(InvalidInputError, match="guild_id must be a 64-bit integer"):
        await SessionRepository(session).list(guild_id="1")


async def test_a_new_message_in_place_of_an_archived_one_is_not_lost(session: AsyncSession) -> None:
    """As a bot does that puts a summary before what it keeps: the summary was never archived."""
    repository = SessionRepository(session)
    await repository.append("key", [Message.user("old"), Message.user("kept"), Message.user("waiting")])
    await session.execute(text("UPDATE sessions SET last_archived_message_index = 2 WHERE session_key = 'key'"))
    record = await repository.load("key")
    summary = Message.system("a summary", message_id=777)
    saved = await repository.save(record, [summary, *record.messages[1:]])
    assert saved.last_archived_message_index == 0
