"""Sessions, archive, queue and dead letters beside a plain model, in whatever order they are used.

Any call may meet with a serialization failure or a deadlock, at a write or at the commit: then all is as before,
and the same call succeeds when it is repeated. STATE_MACHINE_EXAMPLES asks for more runs, and other ones each time.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import pytest
from archiving import NOW, archiver, query
from conftest import run_sql, settings_for
from crash_check import Found, damages, unsearchable
from embedding_server import vector_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from memory_model import OVERLAP, Chat, Chunk, Source, Stored
from sqlalchemy import URL

from kotonoha_store import (
    Database,
    EmbeddingQueue,
    ErrorCode,
    InvalidInputError,
    KnowledgeRepository,
    Lease,
    LeaseLostError,
    Message,
    NewChunk,
    SessionRepository,
    SourceType,
    StaleSessionError,
    StoreUnavailableError,
)

MODEL = "model"
MAX_ATTEMPTS = 2
MAX_MESSAGES = 6
HOUR = timedelta(hours=1)

TABLES = (
    "sessions",
    "knowledge_sources",
    "knowledge_chunks",
    "knowledge_chunks_dlq",
    "embedding_jobs",
    "chunk_terms",
)
FAULTS = (
    "CREATE TABLE faults (table_name text, at text, code text)",
    """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE wanted text := (SELECT code FROM faults WHERE table_name = TG_TABLE_NAME AND at = TG_ARGV[0]);
    BEGIN
        IF wanted IS NOT NULL THEN
            RAISE EXCEPTION 'injected' USING ERRCODE = wanted;
        END IF;
        RETURN coalesce(NEW, OLD);
    END $$
    """,
    *(
        f"CREATE TRIGGER fail_at_once BEFORE INSERT OR UPDATE OR DELETE ON {table}"
        " FOR EACH ROW EXECUTE FUNCTION fail('once')"
        for table in TABLES
    ),
    *(
        f"CREATE CONSTRAINT TRIGGER fail_at_commit AFTER INSERT OR UPDATE OR DELETE ON {table}"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail('commit')"
        for table in TABLES
    ),
)

T = TypeVar("T")


pick = st.integers(0, 10**6)


class Memory(RuleBasedStateMachine):
    def __init__(self, runner: asyncio.Runner, database: Database) -> None:
        super().__init__()
        self.runner = runner
        self.database = database
        self.chats: dict[int, Chat] = {}
        self.sources: dict[int, Source] = {}
        self.chunks: dict[int, Chunk] = {}
        self.leases: list[Lease] = []
        self.fault: tuple[str, str, str] | None = None
        self.said = 0
        self.sql(f"TRUNCATE {', '.join(TABLES)}, term_frequencies, faults RESTART IDENTITY CASCADE")

    # Tools

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def sql(self, statement: str) -> Any:
        return self.run(query(self.database, statement))

    def everything(self) -> Any:
        dumps = (f"(SELECT string_agg(t::text, '' ORDER BY t::text) FROM {table} AS t)" for table in TABLES)
        return self.sql(f"SELECT {', '.join(dumps)}")

    def do(self, act: Callable[[], Coroutine[Any, Any, T]], *, is_whole: bool = True) -> T:
        """Call it; where it meets with the fault that is waiting, nothing has changed, and it is called again.

        Args:
            is_whole: whether it is one transaction; else the fault goes on waiting.
        """
        if self.fault is None or not is_whole:
            return self.run(act())
        before = self.everything()
        self.sql("INSERT INTO faults VALUES ('{}', '{}', '{}')".format(*self.fault))
        try:
            return self.run(act())
        except StoreUnavailableError:
            self.fault = None
            assert self.everything() == before
        finally:
            self.sql("DELETE FROM faults")
        return self.run(act())

    def queue(self) -> EmbeddingQueue:
        """Of a worker that has just been started."""
        return EmbeddingQueue(self.database, lease=HOUR, max_attempts=MAX_ATTEMPTS)

    def archiver(self) -> Any:
        return archiver(
            self.database,
            overlap_messages=OVERLAP,
            max_messages=MAX_MESSAGES,
            chunk_size_messages=2,
            chunk_overlap_messages=1,
            concurrency=1,
        )

    def chat(self, data: st.DataObject) -> tuple[int, Chat]:
        session_id = data.draw(st.sampled_from(sorted(self.chats)))
        return session_id, self.chats[session_id]

    def archives(self) -> list[int]:
        return sorted(source_id for source_id, source in self.sources.items() if source.messages is not None)

    def jobs(self) -> list[int]:
        return sorted(chunk_id for chunk_id, chunk in self.chunks.items() if chunk.state == "waiting")

    def dead(self) -> list[int]:
        return sorted(chunk_id for chunk_id, chunk in self.chunks.items() if chunk.state == "dead")

    def add_source(self, source_id: int, source: Source) -> None:
        """Take over the chunks that were made of it."""
        self.sources[source_id] = source
        found = self.run(Found.read(self.database))
        for row in found.chunks:
            if row.source_id == source_id:
                self.chunks[row.id] = Chunk(source_id, row.content)
        if source.messages is not None:
            (row,) = (row for row in found.sources if row.id == source_id)
            assert list(unsearchable(found, row)) == []

    def remove_source(self, source_id: int) -> None:
        del self.sources[source_id]
        self.chunks = {key: chunk for key, chunk in self.chunks.items() if chunk.source_id != source_id}

    # What must hold

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        found = self.run(Found.read(self.database))
        assert damages(found, model=MODEL, ended=False) == []
        assert {
            row.id: (
                row.session_key,
                row.messages,
                row.messages_offset,
                row.last_archived_message_index,
                row.status == "active",
                row.archive_requested_at is not None,
            )
            for row in found.sessions
        } == {session_id: chat.row for session_id, chat in self.chats.items()}
        assert {
            row.id: Source(row.origin_session_id, row.origin_session_key, row.origin_first_index, row.archived_messages)
            for row in found.sources
        } == self.sources
        states = {row.id: (row.source_id, row.content, "waiting") for row in found.chunks}
        states |= {
            row.id: (row.source_id, row.content, "embedded") for row in found.chunks if row.embedding is not None
        }
        states |= {row.original_chunk_id: (row.source_id, row.content, "dead") for row in found.letters}
        assert states == {key: (chunk.source_id, chunk.content, chunk.state) for key, chunk in self.chunks.items()}
        assert {row.chunk_id: (row.attempts, row.lease_token) for row in found.jobs} == {
            key: (self.chunks[key].attempts, self.chunks[key].token) for key in self.jobs()
        }
        assert {row.original_chunk_id: len(row.history) for row in found.letters} == {
            key: self.chunks[key].deaths for key in self.dead()
        }

    # Faults and time

    def the_next_write_fails(self, data: st.DataObject) -> None:
        at, code = data.draw(st.sampled_from(["once", "commit"])), data.draw(st.sampled_from(["40001", "40P01"]))
        self.fault = (data.draw(st.sampled_from(TABLES)), at, code)

    @rule(data=st.data())
    def something_happens(self, data: st.DataObject) -> None:
        """One rule of many acts: of several, hypothesis leaves out most for the length of an example."""
        acts = [*[self.append] * 3, *[self.the_next_write_fails] * 3, self.archive_what_is_too_long, self.add_document]
        acts += [self.save, self.save, self.delete, self.archive, self.archive] if self.chats else []
        acts += [self.restore, self.restore] if self.archives() else []
        acts += [self.delete_source] if self.sources else []
        acts += [self.claim] * 5 if self.jobs() else []
        if self.leases:
            acts += [
                *[self.complete] * 3,
                *[self.bury] * 3,
                self.fail,
                self.fail,
                self.reuse,
                self.defer,
                self.heartbeat,
            ]
        acts += [*[self.requeue] * 4, self.discard] if self.dead() else []
        data.draw(st.sampled_from(acts), "act")(data)

    def time_passes(self) -> None:
        """Leases end, and what was put off is due."""
        self.sql("UPDATE embedding_jobs SET available_at = available_at - interval '2 hours'")
        for chunk in self.chunks.values():
            chunk.is_due = True

    # Sessions

    def append(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from("abc"))
        self.append_to(key, data.draw(st.lists(st.booleans(), min_size=1, max_size=5)))

    def append_to(self, key: str, are_users: list[bool]) -> None:
        new = [self.message("user" if is_user else "assistant") for is_user in are_users]

        async def append() -> Any:
            async with self.database.begin() as session:
                return await SessionRepository(session, archive_max_messages=MAX_MESSAGES).append(key, new)

        result = self.do(append)
        chat = self.chats.setdefault(result.session_id, Chat(key))
        chat.waiting += [message.to_stored() for message in new]
        chat.is_active = True
        chat.is_too_long = chat.is_too_long or len(chat.messages) > MAX_MESSAGES
        assert result.message_count == len(chat.messages)

    def message(self, role: str) -> Message:
        self.said += 1
        return Message(role=role, content=f"message {self.said}", message_id=self.said)

    def save(self, data: st.DataObject) -> None:
        _, chat = self.chat(data)
        edit = data.draw(st.sampled_from(["forget the first", "change one", "forget the last", "begin anew", "add"]))
        at, is_late = data.draw(pick), data.draw(st.booleans())
        record = self.run(self.load(chat.key))
        messages, archived = list(record.messages), len(chat.context)
        expected = archived
        if edit == "forget the first":
            gone = at % (len(messages) + 1)
            messages, expected = messages[gone:], max(0, archived - gone)
        elif edit == "change one" and messages:
            messages[at % len(messages)] = messages[at % len(messages)].model_copy(update={"content": f"edited {at}"})
        elif edit == "forget the last":
            messages, expected = messages[:-1], min(archived, max(0, len(messages) - 1))
        elif edit == "begin anew":
            messages, expected = [self.message("user")], 0
        else:
            messages += [self.message("assistant")]
        if is_late:
            self.append_to(chat.key, [True])

        async def save() -> Any:
            async with self.database.begin() as session:
                return await SessionRepository(session, archive_max_messages=MAX_MESSAGES).save(record, messages)

        if is_late:
            with pytest.raises(StaleSessionError):
                self.do(save)
            return
        saved = self.do(save)
        still = saved.last_archived_message_index
        # In doubt what was archived is archived once more; nothing passes for archived that is not.
        kept = [message["message_id"] for message in chat.context][archived - still :]
        assert [message.message_id for message in messages[:still]] == kept[: len(messages)]
        assert still == expected or (edit == "forget the last" and not chat.waiting)
        stored = [message.to_stored() for message in messages]
        chat.context, chat.waiting = stored[:still], stored[still:]
        chat.is_active, chat.is_too_long = True, len(stored) > MAX_MESSAGES

    async def load(self, key: str) -> Any:
        async with self.database.begin() as session:
            return await SessionRepository(session).load(key)

    def delete(self, data: st.DataObject) -> None:
        session_id, chat = self.chat(data)

        async def delete() -> None:
            async with self.database.begin() as session:
                await SessionRepository(session).delete(chat.key)

        self.do(delete)
        del self.chats[session_id]

    # Archive

    def archive(self, data: st.DataObject) -> None:
        session_id, chat = self.chat(data)
        result = self.do(lambda: self.archiver().archive(session_id))
        if not chat.is_active:
            assert result is None
            return
        new = chat.waiting
        is_worth_it = chat.is_too_long or any(message["role"] == "user" for message in new)
        if not is_worth_it:
            assert (result.source_id, result.messages) == (None, 0)
            chat.is_active = False
            return
        assert result.messages == len(new)
        assert (result.source_id is None) == (not new)
        first = chat.until
        chat.keep(first + len(new))
        if new:
            self.add_source(result.source_id, Source(session_id, chat.key, first, new))

    def archive_what_is_too_long(self, _: st.DataObject) -> None:
        too_long = {key: chat for key, chat in self.chats.items() if chat.is_too_long}
        # Of several some may be archived when it fails: each for itself.
        is_whole = len(too_long) == 1
        report = self.do(lambda: self.archiver().run_once(timedelta(days=1)), is_whole=is_whole)
        assert (report.archived, report.failed) == (len(too_long), ())
        for session_id, chat in too_long.items():
            first, waiting = chat.until, chat.waiting
            [(until, source_id)] = self.sql(
                "SELECT messages_offset + last_archived_message_index, knowledge_sources.id"
                " FROM sessions JOIN knowledge_sources ON origin_session_id = sessions.id"
                f" WHERE sessions.id = {session_id} AND origin_first_index = {first}"
            )
            assert first < until < first + len(waiting)
            chat.keep(until)
            assert len(chat.messages) <= MAX_MESSAGES
            self.add_source(source_id, Source(session_id, chat.key, first, waiting[: until - first]))

    def restore(self, data: st.DataObject) -> None:
        source_id = data.draw(st.sampled_from(self.archives()))
        source = self.sources[source_id]
        assert source.session_id is not None
        assert source.first is not None
        assert source.messages is not None
        of_session = [self.sources[key] for key in self.archives() if self.sources[key].session_id == source.session_id]
        chat = self.chats.get(source.session_id)
        is_newest = all(each.end <= source.end for each in of_session)
        if chat is None:
            may = is_newest and source.key not in {each.key for each in self.chats.values()}
        else:
            may = is_newest and chat.until == source.end
        if not may:
            with pytest.raises(InvalidInputError):
                self.do(lambda: self.archiver().restore(source_id))
            return
        result = self.do(lambda: self.archiver().restore(source_id))
        assert (result.session_id, result.messages) == (source.session_id, len(source.messages))
        chat = self.chats.setdefault(source.session_id, Chat(str(source.key)))
        before = {each.first + at: m for each in of_session for at, m in enumerate(each.messages or [])}  # type: ignore[operator]
        context: list[Stored] = []
        while len(context) < OVERLAP and (message := before.get(source.first - len(context) - 1)) is not None:
            context.insert(0, message)
        chat.until, chat.context, chat.waiting = source.first, context, source.messages + chat.waiting
        chat.is_active, chat.is_too_long = True, False
        self.remove_source(source_id)

    # Sources and queue

    def add_document(self, data: st.DataObject) -> None:
        words = data.draw(st.lists(st.sampled_from("xyz"), min_size=1, max_size=4))

        async def add() -> int:
            async with self.database.begin() as session:
                knowledge = KnowledgeRepository(session)
                source_id = await knowledge.add_source(SourceType.WEB_PAGE, "a page")
                await knowledge.add_chunks(source_id, [NewChunk(word) for word in words])
                return source_id

        self.add_source(self.do(add), Source())

    def delete_source(self, data: st.DataObject) -> None:
        source_id = data.draw(st.sampled_from(sorted(self.sources)))

        async def delete() -> None:
            async with self.database.begin() as session:
                await KnowledgeRepository(session).delete_source(source_id)

        self.do(delete)
        self.remove_source(source_id)

    def claim(self, data: st.DataObject) -> None:
        limit = data.draw(st.integers(1, 6))
        if data.draw(st.booleans(), "time passes"):
            self.time_passes()
        due = [
            row[0]
            for row in self.sql(
                "SELECT chunk_id FROM embedding_jobs WHERE available_at <= now() ORDER BY available_at, chunk_id"
            )
        ]
        assert set(due) == {chunk_id for chunk_id in self.jobs() if self.chunks[chunk_id].is_due}
        taken, buried = self.expected(due, limit)
        # Burying is a second transaction: what is claimed then is left as by a worker that died.
        lease = self.do(lambda: self.queue().claim(limit), is_whole=not buried)
        assert (list(lease.chunk_ids), list(lease.buried)) == (sorted(taken), buried)
        for chunk_id in buried:
            self.chunks[chunk_id].end("dead")
        for claimed in lease.chunks:
            chunk = self.chunks[claimed.chunk_id]
            chunk.attempts, chunk.token, chunk.is_due = chunk.attempts + 1, lease.token, False
            assert (claimed.attempt, claimed.content) == (chunk.attempts, chunk.content)
        if taken:
            # The newest first, and some that have ended.
            self.leases = [lease, *self.leases][:4]

    def expected(self, due: list[int], limit: int) -> tuple[list[int], list[int]]:
        """What is claimed and what is buried instead: one whose lease ran out comes alone."""
        buried: list[int] = []
        while True:
            batch: list[int] = []
            for chunk_id in due[:limit]:
                ran_out = self.chunks[chunk_id].token is not None
                if not ran_out or not batch:
                    batch.append(chunk_id)
                if ran_out:
                    break
            due = due[len(batch) :]
            exhausted = sorted(chunk_id for chunk_id in batch if self.chunks[chunk_id].attempts >= MAX_ATTEMPTS)
            buried += exhausted
            if len(exhausted) < len(batch) or not batch:
                return [chunk_id for chunk_id in batch if chunk_id not in exhausted], buried

    def part(self, data: st.DataObject) -> tuple[Lease, list[int], list[int], list[int]]:
        """A lease, some of its chunks, those of them that it still holds, and those that others have."""
        lease = data.draw(st.sampled_from(self.leases))
        ids = list(lease.chunk_ids)
        ids = data.draw(st.sampled_from([ids, ids[:1], ids[1:] or ids]))
        there = [chunk_id for chunk_id in ids if chunk_id in self.chunks]
        held = [chunk_id for chunk_id in there if self.chunks[chunk_id].token == lease.token]
        return lease, ids, held, sorted(set(there) - set(held))

    def settle(self, lost: list[int], act: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if not lost:
            return self.do(act)
        with pytest.raises(LeaseLostError) as caught:
            self.do(act)
        assert list(caught.value.chunk_ids) == lost
        return None

    def complete(self, data: st.DataObject) -> None:
        lease, ids, held, lost = self.part(data)
        texts = {chunk.chunk_id: chunk.content for chunk in lease.chunks}
        vectors = np.array([vector_of(texts[chunk_id]) for chunk_id in ids])
        self.settle(lost, lambda: self.queue().complete(lease, ids, vectors, MODEL))
        for chunk_id in held:
            self.chunks[chunk_id].end("embedded")

    def reuse(self, data: st.DataObject) -> None:
        lease, ids, held, _ = self.part(data)
        known = {chunk.content for chunk in self.chunks.values() if chunk.state == "embedded"}
        expected = {chunk_id for chunk_id in held if self.chunks[chunk_id].content in known}
        assert self.do(lambda: self.queue().reuse(lease, ids, MODEL)) == expected
        for chunk_id in expected:
            self.chunks[chunk_id].end("embedded")

    def defer(self, data: st.DataObject) -> None:
        lease, ids, held, lost = self.part(data)
        delay = data.draw(st.sampled_from([NOW, HOUR]))
        self.settle(lost, lambda: self.queue().defer(lease, ids, delay, ErrorCode.RATE_LIMIT))
        for chunk_id in held:
            self.chunks[chunk_id].attempts -= 1
            self.chunks[chunk_id].release(delay)

    def fail(self, data: st.DataObject) -> None:
        lease, ids, held, lost = self.part(data)
        delay = data.draw(st.sampled_from([NOW, HOUR]))
        buried = [chunk_id for chunk_id in held if self.chunks[chunk_id].attempts >= MAX_ATTEMPTS]
        result = self.settle(
            lost, lambda: self.queue().fail(lease, ids, ErrorCode.SERVER_ERROR, retry_in=delay, model=MODEL)
        )
        assert result in (None, buried)
        for chunk_id in held:
            if chunk_id in buried:
                self.chunks[chunk_id].end("dead")
            else:
                self.chunks[chunk_id].release(delay)

    def bury(self, data: st.DataObject) -> None:
        lease, ids, held, lost = self.part(data)
        self.settle(lost, lambda: self.queue().bury(lease, ids, ErrorCode.INVALID_INPUT, model=MODEL))
        for chunk_id in held:
            self.chunks[chunk_id].end("dead")

    def heartbeat(self, data: st.DataObject) -> None:
        lease, ids, held, lost = self.part(data)
        self.settle(lost, lambda: self.queue().heartbeat(lease, ids))
        for chunk_id in held:
            self.chunks[chunk_id].is_due = False

    # Dead letters

    def requeue(self, data: st.DataObject) -> None:
        chosen, how = self.letters(data)
        assert self.do(lambda: self.queue().requeue(**how)) == len(chosen)
        for chunk_id in chosen:
            chunk = self.chunks[chunk_id]
            self.chunks[chunk_id] = Chunk(chunk.source_id, chunk.content, deaths=chunk.deaths + 1)

    def discard(self, data: st.DataObject) -> None:
        chosen, how = self.letters(data)
        everything = {} if how else {"everything": True}
        assert self.do(lambda: self.queue().discard(**how, **everything)) == len(chosen)
        for chunk_id in chosen:
            del self.chunks[chunk_id]

    def letters(self, data: st.DataObject) -> tuple[list[int], Any]:
        """Some dead chunks, and how they are named."""
        one, whose = data.draw(st.sampled_from(self.dead())), data.draw(st.sampled_from(["all", "source", "one"]))
        if whose == "all":
            return self.dead(), {}
        source_id = self.chunks[one].source_id
        if whose == "source":
            return [key for key in self.dead() if self.chunks[key].source_id == source_id], {"source_id": source_id}
        [(letter_id,)] = self.sql(f"SELECT id FROM knowledge_chunks_dlq WHERE original_chunk_id = {one}")
        return [one], {"dead_letter_ids": [letter_id]}


async def opened(url: URL) -> Database:
    # Nothing here asks what survives a crash of the server.
    await run_sql(url, *FAULTS, f"ALTER DATABASE {url.database} SET synchronous_commit = off")
    return await Database.open(settings_for(url))


def test_whatever_is_done_in_whatever_order_ends_as_the_model_says(migrated_url: URL) -> None:
    examples = os.environ.get("STATE_MACHINE_EXAMPLES")
    profile = settings(
        max_examples=int(examples or 40),
        stateful_step_count=40,
        derandomize=examples is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with asyncio.Runner() as runner:
        database = runner.run(opened(migrated_url))
        try:
            run_state_machine_as_test(lambda: Memory(runner, database), settings=profile)
        finally:
            runner.run(database.close())
