"""Whether the checker of the crash tests sees what it is there to see, and whether a broken package would be found."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from archiving import NOW, append, archiver, before_writing, talk
from crash_check import Sent, violations
from numpy.typing import NDArray
from working import Scripted, add, raising, right, sql

from kotonoha_store import (
    Database,
    EmbeddingQueue,
    EmbeddingReport,
    EmbeddingWorker,
    Message,
    SessionRepository,
    UnembeddableTextError,
    archive_writes,
    queue_statements,
)

BAD = "is refused"


async def check(database: Database, **options: Any) -> list[str]:
    return await violations(database, model=Scripted.model, is_blameless=lambda text: BAD not in text, **options)


# What it looks at


async def embed(database: Database) -> None:
    def refuse(texts: list[str]) -> Any:
        return (raising(UnembeddableTextError("")) if any(BAD in text for text in texts) else right)(texts)

    embedder = Scripted(*[refuse] * 50)
    await EmbeddingWorker(EmbeddingQueue(database), embedder).run_until_empty()


@pytest.fixture
async def whole(database: Database) -> dict[str, Any]:
    """A session that is half archived, a document with a dead letter, one that is dead; what is known of them."""
    await append(database, "k", talk(8))
    await archiver(database, overlap_messages=2).run_once(NOW)
    await append(database, "k", talk(3, start=8))
    ids = [*await add(database, "one", "two", BAD), *await add(database, f"{BAD} too")]
    documents: dict[int, list[str]] = {}
    wanted = ", ".join(map(str, ids))
    for source_id, content in await sql(
        database, f"SELECT source_id, content FROM knowledge_chunks WHERE id IN ({wanted})"
    ):
        documents.setdefault(source_id, []).append(content)
    await embed(database)
    sent = Sent(talk(11))
    assert await check(database, documents=documents, sent={"k": [sent]}) == []
    return {"documents": documents, "sent": {"k": [sent]}}


FIRST = "(SELECT min(id) FROM knowledge_chunks)"
LAST = "(SELECT max(id) FROM knowledge_chunks)"


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (f"INSERT INTO embedding_jobs (chunk_id) VALUES ({FIRST})", "is embedded and still queued"),
        (f"UPDATE knowledge_chunks SET embedding = NULL WHERE id = {FIRST}", "is neither embedded nor queued"),
        (
            f"WITH waiting AS (UPDATE knowledge_chunks SET embedding = NULL WHERE id = {LAST} RETURNING id)"
            " INSERT INTO embedding_jobs (chunk_id) SELECT id FROM waiting",
            "was never finished",
        ),
        (f"INSERT INTO embedding_jobs (chunk_id, attempts) VALUES ({FIRST}, -1)", "attempt -1"),
        (
            "INSERT INTO knowledge_chunks_dlq (original_chunk_id, source_id, content)"
            " SELECT original_chunk_id, source_id, content FROM knowledge_chunks_dlq",
            "was buried 2 times",
        ),
        (f"UPDATE knowledge_chunks_dlq SET original_chunk_id = {FIRST}", "is a dead letter and a chunk"),
        ("UPDATE knowledge_chunks_dlq SET source_id = 1000000", "has no source"),
        ("UPDATE knowledge_chunks_dlq SET content = 'harmless'", "nothing was wrong with its text"),
        (
            "UPDATE knowledge_chunks SET embedding = ("
            f"SELECT embedding FROM knowledge_chunks WHERE id = {LAST}) WHERE id = {FIRST}",
            "the vector of another text",
        ),
        (f"UPDATE knowledge_chunks SET embedding_model = 'other' WHERE id = {FIRST}", "embedded by other"),
        (f"UPDATE knowledge_chunks SET content_hash = '\\x00' WHERE id = {FIRST}", "the hash of another text"),
        ("UPDATE knowledge_sources SET status = 'processing'", "is processing and not completed"),
        ("UPDATE knowledge_sources SET status = 'completed'", "is completed and not partial"),
        ("UPDATE knowledge_sources SET status = 'partial'", "is partial and not failed"),
        ("UPDATE knowledge_sources SET error_code = NULL", "error None, dead letters: True"),
        (f"DELETE FROM knowledge_chunks WHERE id = {FIRST}", "of 2"),
        (f"DELETE FROM knowledge_chunks WHERE id = {FIRST}", "is in no chunk"),
        (f"DELETE FROM knowledge_chunks WHERE id = {LAST}", "or others than the 3 that were added"),
        (
            "UPDATE knowledge_sources SET origin_first_index = 1 WHERE origin_first_index = 0",
            "0 archived, then a source from 1 on",
        ),
        ("UPDATE sessions SET messages_offset = messages_offset + 1", "8 are archived, by its own account 9"),
        ("UPDATE sessions SET messages = jsonb_set(messages, '{0}', '{}')", "the context is not what was archived"),
        ("UPDATE sessions SET messages = messages - 4", "messages [110] are lost"),
        ("UPDATE sessions SET messages = messages || (messages -> 4)", "messages [110] are there more than once"),
        (
            "UPDATE sessions SET messages = messages - 2 || (messages -> 2)",
            "the messages of a writer are in another order",
        ),
        ("UPDATE sessions SET messages = jsonb_set(messages, '{4,content}', '1')", "messages [110] are not what"),
        ("UPDATE sessions SET messages = jsonb_set(messages, '{4,message_id}', '7')", "messages [7] were never sent"),
        ("DELETE FROM sessions", "session k is gone"),
        ("INSERT INTO sessions (session_key, session_type) VALUES ('new', 'chat')", "sessions that nobody made"),
    ],
)
async def test_each_damage_is_seen(database: Database, whole: dict[str, Any], damage: str, seen: str) -> None:
    await sql(database, damage)
    assert any(seen in violation for violation in await check(database, **whole))


async def test_what_may_or_may_not_be_there_is_no_damage(database: Database, whole: dict[str, Any]) -> None:
    [sent] = whole["sent"]["k"]
    sent.messages += [Message.user("unsure", message_id=500)]
    assert await check(database, **whole) == ["session k: messages [500] are lost"]
    sent.unsure.add(500)
    assert await check(database, **whole) == []
    assert await check(database, **whole | {"sent": whole["sent"] | {"never": [Sent(sent.messages[-1:], {500})]}}) == []


# A broken package


class Held(Scripted):
    """Answers when it is told to."""

    def __init__(self, *calls: Any) -> None:
        super().__init__(*calls)
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()

    async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked.set()
        await self.go_on.wait()
        return await super().embed_documents(texts)


@pytest.mark.parametrize("is_fenced", [True, False])
async def test_without_the_fence_a_late_worker_buries_a_text_that_nothing_is_wrong_with(
    database: Database, monkeypatch: pytest.MonkeyPatch, is_fenced: bool
) -> None:
    """Its provider, of all, refused it; another worker, whose provider does not, has the lease by now."""
    statements = [each for each in vars(queue_statements).values() if hasattr(each, "cache_clear")]
    if not is_fenced:
        ours = queue_statements.EmbeddingJob.chunk_id == queue_statements.func.any(queue_statements._IDS)
        # Named, so that it is still a parameter.
        monkeypatch.setattr(queue_statements, "_is_ours", lambda: ours & queue_statements._TOKEN.is_not(None))
    for statement in statements:
        statement.cache_clear()
    try:
        await add(database, "harmless")
        late, present = Held(raising(UnembeddableTextError(""))), Held()
        reports = []
        for embedder in (late, present):
            await sql(database, "UPDATE embedding_jobs SET available_at = now()")
            reports.append(asyncio.create_task(EmbeddingWorker(EmbeddingQueue(database), embedder).run_once()))
            await embedder.asked.wait()
        for embedder, report in zip((late, present), reports, strict=True):
            embedder.go_on.set()
            await report
    finally:
        for statement in statements:
            statement.cache_clear()
    lost = EmbeddingReport(claimed=1, lost=1)
    if is_fenced:
        assert [report.result() for report in reports] == [lost, EmbeddingReport(claimed=1, embedded=1)]
        assert await check(database) == []
    else:
        assert [report.result() for report in reports] == [EmbeddingReport(claimed=1, buried=1), lost]
        assert "nothing was wrong with its text" in str(await check(database))


@pytest.mark.parametrize("is_checked", [True, False])
async def test_an_archive_of_a_session_that_was_rewritten_meanwhile_is_noticed(
    database: Database, monkeypatch: pytest.MonkeyPatch, is_checked: bool
) -> None:
    """The check of the version removed: what is cut off the front is no longer what was read there."""
    if not is_checked:
        broken = archive_writes._WRITE_SESSION.replace("rewrite_version = $2", "$2::integer IS NOT NULL")
        assert broken != archive_writes._WRITE_SESSION
        monkeypatch.setattr(archive_writes, "_WRITE_SESSION", broken)
    await append(database, "k", talk(10))

    async def forget_the_first() -> None:
        async with database.begin() as session:
            repository = SessionRepository(session)
            record = await repository.load("k")
            await repository.save(record, record.messages[4:])
        await append(database, "k", talk(6, start=10))

    before_writing(monkeypatch, forget_the_first)
    await archiver(database, overlap_messages=2).run_once(NOW)
    await embed(database)
    found = await check(database, sent={"k": [Sent(talk(12, start=4))]})
    assert found == [] if is_checked else "is in no chunk" in str(found)
