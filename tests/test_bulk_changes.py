"""Deleting and changing by filter: what goes, what stays, and who else is at work."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from test_filters import scoped_trees, trees, unhurried

from kotonoha_store import (
    Database,
    EmbeddingQueue,
    ErrorCode,
    InvalidInputError,
    KnowledgeChunk,
    KnowledgeChunkDeadLetter,
    KnowledgeRepository,
    Lease,
    LeaseLostError,
    Message,
    NewChunk,
    NotFoundError,
    Scope,
    SearchFilters,
    SessionArchiver,
    SessionRepository,
    SourceStatus,
    SourceType,
    StoreError,
    bulk_changes,
)
from kotonoha_store.columns import pack_vector
from kotonoha_store.filters import conditions, parameters, shape
from kotonoha_store.search_records import AnyFilters, BulkResult
from kotonoha_store.source_status import recompute_status
from kotonoha_store.term_index import fill_terms
from kotonoha_store.words import analyse, scope_terms, terms_literal

MODEL = "model-a"
JUNE = datetime(2024, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)
GUILD = SearchFilters(guild_id=1)

TABLES = (
    "knowledge_sources",
    "knowledge_chunks",
    "embedding_jobs",
    "chunk_terms",
    "knowledge_chunks_dlq",
    "term_frequencies",
)


@pytest.fixture
def knowledge(session: AsyncSession) -> KnowledgeRepository:
    return KnowledgeRepository(session)


@pytest.fixture
def queue(database: Database) -> EmbeddingQueue:
    return EmbeddingQueue(database)


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_changes, "_BATCH", 3)


def vectors(n: int) -> Any:
    return np.random.default_rng(n).standard_normal((n, 1536)).astype(np.float32)


def embedded(content: str, **values: Any) -> NewChunk:
    return NewChunk(content, embedding=vectors(1)[0], embedding_model=MODEL, **values)


def plain(*contents: str) -> list[NewChunk]:
    return [NewChunk(content) for content in contents]


async def query(session: AsyncSession, sql: str, **values: Any) -> list[Any]:
    result = await session.execute(text(sql), values)
    return [tuple(row) if len(row) > 1 else row[0] for row in result] if result.returns_rows else []


async def everything(session: AsyncSession) -> dict[str, list[Any]]:
    return {table: await query(session, f"SELECT to_jsonb(t)::text FROM {table} t ORDER BY 1") for table in TABLES}


async def sizes(session: AsyncSession) -> list[int]:
    return [(await query(session, f"SELECT count(*) FROM {table}"))[0] for table in TABLES]


async def bury(session: AsyncSession, *chunk_ids: int) -> None:
    """As the queue does, whatever state the chunk is in."""
    await query(
        session,
        "INSERT INTO knowledge_chunks_dlq (original_chunk_id, source_id, source_title, source_type, content, location,"
        " token_count, embedding_model, content_hash, guild_id, channel_id, thread_id, user_id, occurred_from,"
        " occurred_to, chunk_created_at)"
        " SELECT c.id, s.id, s.title, s.type, content, location, token_count, embedding_model, content_hash,"
        " c.guild_id, c.channel_id, c.thread_id, c.user_id, occurred_from, occurred_to, c.created_at"
        " FROM knowledge_chunks c JOIN knowledge_sources s ON s.id = source_id WHERE c.id = ANY(:ids)",
        ids=list(chunk_ids),
    )
    await query(session, "DELETE FROM knowledge_chunks WHERE id = ANY(:ids)", ids=list(chunk_ids))


async def add(
    knowledge: KnowledgeRepository,
    *new: NewChunk,
    scope: Scope | None = None,
    kind: SourceType = SourceType.WEB_PAGE,
    **values: Any,
) -> tuple[int, list[int]]:
    source_id = await knowledge.add_source(kind, values.pop("title", "a title"), scope=scope or Scope(1), **values)
    return source_id, await knowledge.add_chunks(source_id, new)


async def ids_of(session: AsyncSession, table: str, column: str = "id") -> list[int]:
    return await query(session, f"SELECT {column} FROM {table} ORDER BY 1")


# Each kind of filter


@dataclass(frozen=True)
class Kind:
    """A filter, and whether it keeps what is known of a dead letter whose source is gone."""

    wanted: AnyFilters
    keeps_orphans: bool = True


OURS = SearchFilters(guild_id=1)
KINDS = {
    "guild_id": Kind(SearchFilters(guild_id=1)),
    "channel_id": Kind(SearchFilters(channel_id=2)),
    "thread_id": Kind(SearchFilters(thread_id=3)),
    "user_id": Kind(SearchFilters(user_id=4)),
    "source_types": Kind(SearchFilters(source_types=["discord_session"])),
    "since": Kind(SearchFilters(since=JUNE)),
    "until": Kind(SearchFilters(until=JUNE + 9 * DAY)),
    "metadata": Kind(SearchFilters(metadata={"a": {"b": 1}}), keeps_orphans=False),
    "session_keys": Kind(SearchFilters(session_keys=["ours", "none"])),
    "models": Kind(SearchFilters(models=[MODEL])),
    "and": Kind(SearchFilters(guild_id=1) & SearchFilters(session_keys=["ours"])),
    "or": Kind(SearchFilters(guild_id=77) | SearchFilters(user_id=4)),
    "not": Kind(~SearchFilters(guild_id=9)),
    "not of metadata": Kind(~SearchFilters(metadata={"c": 0})),
    "nested": Kind(~(SearchFilters(source_types=["web_page"]) | ~SearchFilters(models=[MODEL]))),
}
by_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


async def ours_and_theirs(knowledge: KnowledgeRepository) -> list[tuple[int, list[int]]]:
    """Two sources that differ in all that can be asked for; each has two chunks."""
    location = {"session_key": "ours"}
    times = {"occurred_from": JUNE, "occurred_to": JUNE + DAY}
    ours = [embedded(content, location=location, **times) for content in ("a", "b")]
    theirs = [
        NewChunk("a", occurred_from=JUNE + 10 * DAY, occurred_to=JUNE - DAY),  # neither since nor until
        NewChunk("b"),
    ]
    return [
        await add(
            knowledge,
            *ours,
            scope=Scope(1, 2, 3, 4),
            kind=SourceType.DISCORD_SESSION,
            metadata={"a": {"b": 1, "c": 2}},
            session_key="ours",
            origin=(1, 0),
            archived_messages=[{"content": "a secret"}],
        ),
        await add(knowledge, *theirs, scope=Scope(9, 9, 9, 9), metadata={"c": 0}, session_key="theirs"),
    ]


@by_kind
async def test_each_kind_of_filter_deletes_what_it_keeps(
    knowledge: KnowledgeRepository, session: AsyncSession, kind: Kind
) -> None:
    (_, ours), (theirs_id, theirs) = await ours_and_theirs(knowledge)
    await bury(session, ours[1], theirs[1])
    expected = BulkResult(chunks=1, sources=1, dead_letters=1, dry_run=False)
    assert (await knowledge.delete_chunks(kind.wanted, everywhere=True, dry_run=True)) == BulkResult(1, 1, 1, True)
    assert (await knowledge.delete_chunks(kind.wanted, everywhere=True)) == expected
    assert await ids_of(session, "knowledge_sources") == [theirs_id]
    assert await ids_of(session, "knowledge_chunks") == theirs[:1]
    assert await ids_of(session, "knowledge_chunks_dlq", "original_chunk_id") == theirs[1:]


@by_kind
async def test_dead_letters_whose_source_is_gone_are_read_by_what_they_know(
    knowledge: KnowledgeRepository, session: AsyncSession, kind: Kind
) -> None:
    (_, ours), (_, theirs) = await ours_and_theirs(knowledge)
    await bury(session, *ours, *theirs)
    # Of theirs, too, except where only the source knew: that it is gone must not make them ours.
    gone = "DELETE FROM knowledge_sources"
    await query(session, gone if kind is not KINDS["not of metadata"] else f"{gone} WHERE guild_id = 1")
    number = 2 if kind.keeps_orphans else 0
    counted = await knowledge.delete_chunks(kind.wanted, everywhere=True, dry_run=True)
    deleted = await knowledge.delete_chunks(kind.wanted, everywhere=True)
    assert (counted.dead_letters, counted.sources) == (deleted.dead_letters, deleted.sources) == (number, 0)
    left = await ids_of(session, "knowledge_chunks_dlq", "original_chunk_id")
    assert left == (theirs if number else [*ours, *theirs])


@by_kind
async def test_each_kind_of_filter_changes_the_sources_of_what_it_keeps(
    knowledge: KnowledgeRepository, session: AsyncSession, kind: Kind
) -> None:
    (ours_id, ours), (theirs_id, theirs) = await ours_and_theirs(knowledge)
    await bury(session, ours[1], theirs[1])
    before = await knowledge.get_source(theirs_id)
    for dry_run in (True, False):
        done = await knowledge.update_sources(kind.wanted, metadata={"new": 1}, everywhere=True, dry_run=dry_run)
        assert done == BulkResult(chunks=1, sources=1, dead_letters=1, dry_run=dry_run)
        metadata = (await knowledge.get_source(ours_id)).metadata
        assert metadata == {"a": {"b": 1, "c": 2}} | ({} if dry_run else {"new": 1})
    assert await knowledge.get_source(theirs_id) == before


# Any filter, against what the same filter keeps of the chunks


@dataclass
class World:
    """What is stored. An empty source stands for one chunk with its scope, without time and model.

    Attributes:
        chunks, letters: id of the chunk (that it was): source.
        empty: id of the chunk that it stands for: source.
        gone: sources that only dead letters know of.
    """

    chunks: dict[int, int]
    letters: dict[int, int]
    empty: dict[int, int]
    gone: set[int]

    @property
    def members(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for chunk_id, source_id in (*self.chunks.items(), *self.letters.items(), *self.empty.items()):
            if source_id not in self.gone:
                found.setdefault(source_id, set()).add(chunk_id)
        return found

    def deletes(self, kept: set[int]) -> BulkResult:
        return BulkResult(
            chunks=len(kept & self.chunks.keys()),
            sources=sum(ids <= kept for ids in self.members.values()),
            dead_letters=len(kept & self.letters.keys()),
            dry_run=False,
        )

    def updates(self, kept: set[int]) -> set[int]:
        return {source_id for chunk_id, source_id in self.chunks.items() if chunk_id in kept}


DOCUMENTS: list[dict[str, Any]] = [{}, {"a": 1, "b": "1"}, {"a": True, "b": None}, {"a": {"a": 1}}, {"a": [1, "1"]}]


async def a_source(knowledge: KnowledgeRepository, rng: random.Random, number: int, *, known: bool) -> int:
    """``known``: to its chunks' dead letters, once it is gone."""
    key = rng.choice([None, "one", "two"])
    scope = Scope(*(rng.choice([None, 1, 2]) for _ in range(4)))
    chunks = [
        NewChunk(
            f"text {number} {index}",
            location={"session_key": key} if key or rng.random() < 0.5 else {},
            occurred_from=None if rng.random() < 0.3 else JUNE + rng.randrange(5) * DAY,
            occurred_to=None if rng.random() < 0.3 else JUNE + rng.randrange(5) * DAY,
            **(
                {"embedding": vectors(1)[0], "embedding_model": rng.choice(["model-a", "model-b"])}
                if rng.random() < 0.6
                else {}
            ),
        )
        for index in range(rng.choice([1, 1, 2, 3]))
    ]
    metadata = {} if known else rng.choice(DOCUMENTS)
    source_id = await knowledge.add_source(
        rng.choice(list(SourceType)[:2]), f"title {number}", scope=scope, metadata=metadata, session_key=key
    )
    await knowledge.add_chunks(source_id, chunks)
    return source_id


async def make_world(
    session: AsyncSession, seed: int, filters: Callable[[list[int]], list[AnyFilters]]
) -> tuple[World, list[tuple[AnyFilters, set[int]]]]:
    """Store chunks, ask what each filter keeps of them; then bury some, and take away others and some sources."""
    rng = random.Random(seed)
    knowledge = KnowledgeRepository(session)
    fates = ["alive", "mixed", "mixed", "mixed", "buried", "gone", "empty"] * 4
    of_fate = {await a_source(knowledge, rng, n, known=fate == "gone"): fate for n, fate in enumerate(fates)}
    empty = [source_id for source_id, fate in of_fate.items() if fate == "empty"]
    await query(session, "DELETE FROM knowledge_chunks WHERE source_id = ANY(:ids)", ids=empty)
    await query(
        session,
        "INSERT INTO knowledge_chunks (source_id, content, guild_id, channel_id, thread_id, user_id)"
        " SELECT id, 'x', guild_id, channel_id, thread_id, user_id FROM knowledge_sources WHERE id = ANY(:ids)",
        ids=empty,
    )
    wanted = [(each, await kept_chunks(session, each)) for each in filters(list(of_fate))]

    found = dict(await query(session, "SELECT id, source_id FROM knowledge_chunks ORDER BY id"))
    share = {"alive": 0.0, "mixed": 0.5, "buried": 1.0, "gone": 1.0, "empty": 0.0}
    letters = {chunk: source for chunk, source in found.items() if rng.random() < share[of_fate[source]]}
    await bury(session, *letters)
    await query(session, "DELETE FROM knowledge_chunks WHERE source_id = ANY(:ids)", ids=empty)
    gone = {source_id for source_id, fate in of_fate.items() if fate == "gone"}
    await query(session, "DELETE FROM knowledge_sources WHERE id = ANY(:ids)", ids=list(gone))
    await recompute_status(session, list(of_fate))
    rest = {chunk: source for chunk, source in found.items() if chunk not in letters}
    return (
        World(
            chunks={chunk: source for chunk, source in rest.items() if of_fate[source] != "empty"},
            letters=letters,
            empty={chunk: source for chunk, source in rest.items() if of_fate[source] == "empty"},
            gone=gone,
        ),
        wanted,
    )


async def kept_chunks(session: AsyncSession, wanted: AnyFilters) -> set[int]:
    statement = select(KnowledgeChunk.id).where(*conditions(shape(wanted)))
    return set((await session.execute(statement, parameters(wanted))).scalars())


def any_filters(source_ids: list[int], number: int) -> list[AnyFilters]:
    found: list[AnyFilters] = []
    some_ids = st.sampled_from([*source_ids[:14], -1])

    # Hypothesis' own loop is not ours: it finds the filters, the event loop of the test asks for them.
    @hypothesis_settings(unhurried, max_examples=number)
    @given(trees(some_ids) | scoped_trees(some_ids))
    def collect(wanted: AnyFilters) -> None:
        found.append(wanted)

    collect()
    return found


async def statuses(session: AsyncSession) -> dict[int, tuple[str, Any]]:
    rows = await query(session, "SELECT id, status::text, to_jsonb(s)::text FROM knowledge_sources s")
    return {row[0]: row[1:] for row in rows}


async def expected_status(session: AsyncSession, source_id: int, before: str) -> str:
    (chunks, waiting, dead) = (
        await query(
            session,
            "SELECT count(*), count(*) FILTER (WHERE embedding IS NULL),"
            " (SELECT count(*) FROM knowledge_chunks_dlq WHERE source_id = :id)"
            " FROM knowledge_chunks WHERE source_id = :id",
            id=source_id,
        )
    )[0]
    if waiting:
        return before
    return "completed" if not dead else "partial" if chunks else "failed"


@pytest.mark.usefixtures("_small_batches")
async def test_any_filter_deletes_what_it_keeps_and_the_dry_run_says_so(session: AsyncSession) -> None:
    world, wanted = await make_world(session, 1, lambda source_ids: any_filters(source_ids, 150))
    knowledge = KnowledgeRepository(session)
    start = await everything(session)
    before = await statuses(session)
    seen = {"chunks": 0, "sources": 0, "dead_letters": 0, "left": 0, "refused": 0}
    for filters, kept in wanted:
        if not filters.names_scope:
            seen["refused"] += 1
            with pytest.raises(InvalidInputError, match="name the scope"):
                await knowledge.delete_chunks(filters)
        expected = world.deletes(kept)
        point = await session.begin_nested()
        counted = await knowledge.delete_chunks(filters, everywhere=not filters.names_scope, dry_run=True)
        assert await everything(session) == start
        assert await knowledge.delete_chunks(filters, everywhere=not filters.names_scope) == expected, filters
        assert counted == BulkResult(expected.chunks, expected.sources, expected.dead_letters, dry_run=True), filters

        left = sorted(world.chunks.keys() - kept)
        assert await ids_of(session, "knowledge_chunks") == left
        assert await ids_of(session, "chunk_terms", "chunk_id") == left
        waiting = await query(session, "SELECT id FROM knowledge_chunks WHERE embedding IS NULL ORDER BY id")
        assert await ids_of(session, "embedding_jobs", "chunk_id") == waiting
        buried = sorted(world.letters.keys() - kept)
        assert await ids_of(session, "knowledge_chunks_dlq", "original_chunk_id") == buried
        after = await statuses(session)
        assert after.keys() == {source_id for source_id, ids in world.members.items() if not ids <= kept}
        for source_id, now in after.items():
            if world.members[source_id] & kept:
                assert now[0] == await expected_status(session, source_id, before[source_id][0])
            else:
                assert now == before[source_id]
        for name in ("chunks", "sources", "dead_letters"):
            seen[name] += bool(getattr(expected, name))
        seen["left"] += bool(left) and bool(expected.chunks)
        await point.rollback()
    assert await everything(session) == start
    assert min(seen.values()) > 10, seen


@pytest.mark.usefixtures("_small_batches")
async def test_any_filter_changes_its_sources_and_the_dry_run_says_so(session: AsyncSession) -> None:
    world, wanted = await make_world(session, 2, lambda source_ids: any_filters(source_ids, 60))
    knowledge = KnowledgeRepository(session)
    start = await everything(session)
    seen = {"some": 0, "none": 0}
    for filters, kept in wanted:
        sources = world.updates(kept)
        expected = (
            sum(source in sources for source in world.chunks.values()),
            len(sources),
            sum(source in sources for source in world.letters.values()),
        )
        changes: dict[str, Any] = {"metadata": {"new": 1, "a": None}, "title": "Renamed"}
        point = await session.begin_nested()
        counted = await knowledge.update_sources(filters, **changes, everywhere=True, dry_run=True)
        assert await everything(session) == start
        assert await knowledge.update_sources(filters, **changes, everywhere=True) == BulkResult(*expected, False)
        assert counted == BulkResult(*expected, dry_run=True), filters

        changed = "metadata @> '{\"new\": 1}' AND NOT metadata ? 'a' AND title = 'Renamed'"
        found = await query(session, f"SELECT id FROM knowledge_sources WHERE {changed}")
        assert set(found) == sources
        retitled = await query(
            session, "SELECT DISTINCT source_id FROM knowledge_chunks_dlq WHERE source_title = 'Renamed'"
        )
        assert set(retitled) == sources & set(world.letters.values())
        assert await wrong_terms(session) == []
        seen["some" if sources else "none"] += 1
        await point.rollback()
    assert await everything(session) == start
    assert min(seen.values()) > 3, seen


async def wrong_terms(session: AsyncSession) -> list[int]:
    """Chunks whose terms are not those of their text and of their source's title."""
    rows = await query(
        session,
        "SELECT c.id, s.title, c.content, c.guild_id, c.channel_id, c.thread_id, c.user_id FROM knowledge_chunks c"
        " JOIN knowledge_sources s ON s.id = c.source_id",
    )
    wrong = []
    for chunk_id, title, content, *ids in rows:
        names = dict(zip(("guild_id", "channel_id", "thread_id", "user_id"), ids, strict=True))
        literal = terms_literal(analyse(title, content), scope_terms(**names))
        # As text: vectors that were received in another order differ in their padding.
        right = (
            "SELECT terms::text = CAST(CAST(:terms AS text) AS tsvector)::text FROM chunk_terms WHERE chunk_id = :id"
        )
        if await query(session, right, terms=literal, id=chunk_id) != [True]:
            wrong.append(chunk_id)
    return wrong


# What goes, and what stays


async def test_nothing_that_a_user_said_is_left(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    """In whatever column of whatever table: only other users' texts remain."""
    user = Scope(guild_id=1, user_id=4)
    said = {"scope": user, "archived_messages": [{"content": "geheim"}], "title": "geheim"}
    _, ids = await add(knowledge, *plain("geheim geheim", "geheim geheim 1"), **said, origin=(1, 0))
    await bury(session, ids[0])
    _, ids = await add(knowledge, *plain("geheim geheim 2"), **said)
    await bury(session, ids[0])
    await add(knowledge, **said)
    orphan, ids = await add(knowledge, *plain("geheim geheim 3"), **said)
    await bury(session, ids[0])
    await query(session, "DELETE FROM knowledge_sources WHERE id = :id", id=orphan)
    await add(knowledge, embedded("harmless"), scope=Scope(guild_id=1, user_id=5))

    deleted = await knowledge.delete_chunks(SearchFilters(user_id=4))
    assert deleted == BulkResult(chunks=1, sources=3, dead_letters=3, dry_run=False)
    assert "geheim" not in json.dumps(await everything(session))
    assert (await sizes(session))[:5] == [1, 1, 0, 1, 0]
    assert "harmless" in await query(session, "SELECT term FROM term_frequencies")


async def test_where_nothing_is_left_no_word_is(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    await add(knowledge, *plain("eins zwei", "eins drei"))
    await add(knowledge, *plain("eins zwei"), scope=Scope())
    assert (await sizes(session))[-1] > 3
    deleted = await knowledge.delete_chunks(SearchFilters(), everywhere=True)
    assert deleted == BulkResult(chunks=3, sources=2, dead_letters=0, dry_run=False)
    assert await sizes(session) == [0] * len(TABLES)


async def test_a_dead_letter_outside_of_the_filter_keeps_its_source(
    knowledge: KnowledgeRepository, session: AsyncSession
) -> None:
    old, new = ({"occurred_from": moment, "occurred_to": moment} for moment in (JUNE, JUNE + 5 * DAY))
    messages = [{"content": "x"}]
    source_id, ids = await add(
        knowledge, embedded("old", **old), NewChunk("new", **new), origin=(1, 0), archived_messages=messages
    )
    await bury(session, ids[1])
    by_time = GUILD & SearchFilters(until=JUNE + DAY)
    assert await knowledge.delete_chunks(by_time) == BulkResult(1, 0, 0, False)
    source = await knowledge.get_source(source_id)
    assert (source.status, source.title) == (SourceStatus.FAILED, "a title")
    assert await query(session, "SELECT archived_messages FROM knowledge_sources") == [messages]
    # The rest of it goes, and the source with it, although it has no chunk any more.
    assert await knowledge.delete_chunks(GUILD) == BulkResult(0, 1, 1, False)
    assert (await sizes(session))[:5] == [0] * 5


async def test_the_status_of_what_remains_follows(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    old, new = ({"occurred_from": moment, "occurred_to": moment} for moment in (JUNE, JUNE + 5 * DAY))
    ids = []
    for chunks in (
        [NewChunk("waits", **old), embedded("done", **new)],
        [embedded("done", **old), NewChunk("waits", **new)],
        [embedded("done", **new), NewChunk("dead", **old)],
    ):
        source_id, (_, second) = await add(knowledge, *chunks)
        ids.append(source_id)
    await bury(session, second)
    await query(session, "UPDATE knowledge_sources SET status = 'partial', error_code = 'X' WHERE id = :id", id=ids[2])
    deleted = await knowledge.delete_chunks(GUILD & SearchFilters(until=JUNE + DAY))
    assert deleted == BulkResult(chunks=2, sources=0, dead_letters=1, dry_run=False)
    found = [await knowledge.get_source(source_id) for source_id in ids]
    assert [source.status for source in found] == ["completed", "pending", "completed"]
    assert found[2].error_code is None


async def test_a_dead_letter_that_names_no_source_goes_by_its_own_columns(
    knowledge: KnowledgeRepository, session: AsyncSession
) -> None:
    _, ids = await add(knowledge, *plain("a", "b"))
    await bury(session, *ids)
    await query(session, "UPDATE knowledge_chunks_dlq SET source_id = NULL")
    await query(session, "UPDATE knowledge_chunks_dlq SET guild_id = 2 WHERE original_chunk_id = :id", id=ids[1])
    await query(session, "DELETE FROM knowledge_sources")
    for dry_run in (True, False):
        assert await knowledge.delete_chunks(GUILD, dry_run=dry_run) == BulkResult(0, 0, 1, dry_run)
    assert await ids_of(session, "knowledge_chunks_dlq", "original_chunk_id") == ids[1:]


async def test_what_is_of_another_tenant_stays(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    for guild in (1, 2, None):
        for kind in SourceType:
            await add(knowledge, *plain("x"), scope=Scope(guild), kind=kind)
    before = await query(session, "SELECT to_jsonb(s) FROM knowledge_sources s WHERE guild_id IS DISTINCT FROM 1")
    assert (await knowledge.delete_chunks(GUILD)).sources == len(SourceType)
    assert await query(session, "SELECT to_jsonb(s) FROM knowledge_sources s") == before


async def test_what_keeps_nothing_changes_nothing(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    await add(knowledge, *plain("a"), metadata={"a": 1})
    await add(knowledge)
    start = await everything(session)
    for wanted in (SearchFilters(guild_id=2), SearchFilters(source_ids=[]), SearchFilters(source_ids=[-(2**63)])):
        for dry_run in (True, False):
            assert await knowledge.delete_chunks(wanted, dry_run=dry_run) == BulkResult(0, 0, 0, dry_run)
            changed = await knowledge.update_sources(wanted, title="x", metadata={"x": 1}, dry_run=dry_run)
            assert changed == BulkResult(0, 0, 0, dry_run)
    nothing = ~SearchFilters()
    assert await knowledge.delete_chunks(nothing, everywhere=True) == BulkResult(0, 0, 0, False)
    assert await everything(session) == start


async def test_every_column_of_a_chunk_can_be_asked_of_a_dead_letter_and_of_an_empty_source() -> None:
    """Should a filter come to ask for it."""
    for column in KnowledgeChunk.__table__.c:
        assert column.name in {"id", "created_at", "embedding"} or column.name in KnowledgeChunkDeadLetter.__table__.c


async def test_more_than_a_statement_takes_parameters(database: Database) -> None:
    number = 40_000
    async with database.begin() as session:
        knowledge = KnowledgeRepository(session)
        await add(knowledge, *plain("stays"), scope=Scope(2))
        await query(
            session,
            "INSERT INTO knowledge_sources (type, title, guild_id)"
            " SELECT 'web_page', 'x', 1 FROM generate_series(1, :n)",
            n=number,
        )
        await query(
            session,
            "INSERT INTO knowledge_chunks (source_id, content, guild_id)"
            " SELECT id, 'x', 1 FROM knowledge_sources WHERE guild_id = 1",
        )
    expected = BulkResult(number, number, 0, False)
    async with database.begin() as session:
        assert await KnowledgeRepository(session).update_sources(GUILD, metadata={"n": 1}) == expected
    async with database.begin() as session:
        assert await KnowledgeRepository(session).delete_chunks(GUILD) == expected
        assert (await sizes(session))[:5] == [1, 1, 1, 1, 0]


# Input


@pytest.mark.parametrize("wanted", [SearchFilters(), SearchFilters(metadata={"a": 1}), ~GUILD, GUILD | SearchFilters()])
@pytest.mark.parametrize("dry_run", [True, False])
async def test_without_a_scope_nothing_is_done(
    knowledge: KnowledgeRepository, session: AsyncSession, wanted: AnyFilters, dry_run: bool
) -> None:
    await add(knowledge, *plain("a"))
    start = await everything(session)
    with pytest.raises(InvalidInputError, match=r"^name the scope to delete in: .*everywhere=True to delete from all"):
        await knowledge.delete_chunks(wanted, dry_run=dry_run)
    with pytest.raises(InvalidInputError, match=r"^name the scope to change: .*everywhere=True to change the sources"):
        await knowledge.update_sources(wanted, title="x", dry_run=dry_run)
    assert await everything(session) == start


@pytest.mark.parametrize("wanted", [None, {"guild_id": 1}, "guild_id", 1, [GUILD], SearchFilters])
async def test_what_is_no_filter_is_refused(knowledge: KnowledgeRepository, wanted: Any) -> None:
    with pytest.raises(InvalidInputError, match="filters must be"):
        await knowledge.delete_chunks(wanted, everywhere=True)
    with pytest.raises(InvalidInputError, match="filters must be"):
        await knowledge.update_sources(wanted, title="x", everywhere=True)


def itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["me"] = value
    return value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing to change"),
        ({"metadata": {}}, "nothing to change"),
        ({"title": ""}, "title must not be blank"),
        ({"title": " \n\u3000"}, "title must not be blank"),
        ({"title": "a\x00"}, "title holds a NUL"),
        ({"title": "\ud800"}, "title holds a lone surrogate"),
        ({"title": 5}, "title must be text"),
        ({"title": b"x"}, "title must be text"),
        ({"metadata": [("a", 1)]}, "metadata must be a mapping"),
        ({"metadata": "a"}, "metadata must be a mapping"),
        ({"metadata": {1: 2}}, "the key 1"),
        ({"metadata": {"\x00": None}}, "a key of metadata holds a NUL"),
        ({"metadata": {"\ud800": None}}, "a key of metadata holds a lone surrogate"),
        ({"metadata": {"a": {"b": ["\x00"]}}}, r"metadata\.a\.b\[0\] holds a NUL"),
        ({"metadata": {"a": float("nan")}}, r"metadata\.a is nan"),
        ({"metadata": {"a": float("-inf")}}, r"metadata\.a is -inf"),
        ({"metadata": {"a": MappingProxyType({})}}, r"metadata\.a is of type mappingproxy"),
        ({"metadata": {"a": {1}}}, "set"),
        ({"metadata": {"a": itself()}}, "nested"),
        ({"metadata": {"a": 10**5000}}, "cannot be stored"),
        ({"title": "fine", "metadata": {"a": float("nan")}}, "nan"),
    ],
)
async def test_what_cannot_be_stored_is_refused(
    knowledge: KnowledgeRepository, session: AsyncSession, changes: dict[str, Any], message: str
) -> None:
    await add(knowledge, *plain("a"))
    start = await everything(session)
    with pytest.raises(InvalidInputError, match=message):
        await knowledge.update_sources(GUILD, **changes)
    assert await everything(session) == start


async def test_scope_columns_cannot_be_changed(knowledge: KnowledgeRepository) -> None:
    with pytest.raises(TypeError, match="guild_id"):
        await knowledge.update_sources(GUILD, title="x", guild_id=2)  # type: ignore[call-arg]


# Changing sources


async def test_metadata_is_merged_key_by_key(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    source_id, _ = await add(
        knowledge, *plain("a"), metadata={"stays": 1, "goes": {"x": 1}, "deep": {"x": 1, "y": 2}, "null": None}
    )
    other, _ = await add(knowledge, *plain("a"))
    changes = {"goes": None, "absent": None, "deep": {"z": [None, 2**63]}, "梅雨": "\"'\\", "big": 2**200}
    done = await knowledge.update_sources(GUILD, metadata=MappingProxyType(changes))
    assert done == BulkResult(chunks=2, sources=2, dead_letters=0, dry_run=False)
    new = {"deep": {"z": [None, 2**63]}, "梅雨": "\"'\\", "big": 2**200}
    assert (await knowledge.get_source(source_id)).metadata == {"stays": 1, "null": None, **new}
    assert (await knowledge.get_source(other)).metadata == new
    assert {source.title for source in await knowledge.list_sources()} == {"a title"}
    assert await query(session, "SELECT DISTINCT title FROM knowledge_sources") == ["a title"]


@pytest.mark.parametrize("stored", ["[1]", "5", "null", '"a"'])
async def test_metadata_of_another_program_that_is_no_object_gives_way(
    knowledge: KnowledgeRepository, session: AsyncSession, stored: str
) -> None:
    await add(knowledge, *plain("a"))
    await query(session, "UPDATE knowledge_sources SET metadata = CAST(:it AS jsonb)", it=stored)
    await knowledge.update_sources(GUILD, metadata={"a": None})
    assert await query(session, "SELECT metadata FROM knowledge_sources") == [json.loads(stored)]
    await knowledge.update_sources(GUILD, metadata={"a": None, "b": 1})
    assert await query(session, "SELECT metadata FROM knowledge_sources") == [{"b": 1}]


async def test_a_new_title_is_found_by_its_words(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    source_id, ids = await add(knowledge, *plain("one", "two", "three"), title="Tokyo tower")
    same_id, _ = await add(knowledge, *plain("four"), title="京都 Station")
    _, _ = await add(knowledge, *plain("five"), scope=Scope(2), title="Tokyo tower")
    await bury(session, ids[2])
    before = await everything(session)
    done = await knowledge.update_sources(GUILD & SearchFilters(source_ids=[source_id, same_id]), title="京都 Station")
    assert done == BulkResult(chunks=3, sources=2, dead_letters=1, dry_run=False)
    held = "SELECT chunk_id FROM chunk_terms WHERE terms @@ CAST(:it AS tsquery) ORDER BY 1"
    assert await query(session, held, it="'京都' & '#guild_id=1'") == [*ids[:2], ids[2] + 1]
    assert await query(session, held, it="'tokyo'") == [ids[2] + 2]
    assert await wrong_terms(session) == []
    assert (await query(session, "SELECT source_title FROM knowledge_chunks_dlq")) == ["京都 Station"]
    assert (await knowledge.get_source(source_id)).metadata == {}
    after = await everything(session)
    for table in ("knowledge_chunks", "embedding_jobs"):
        assert after[table] == before[table]


async def test_words_of_a_title_that_does_not_change_are_left_alone(
    knowledge: KnowledgeRepository, session: AsyncSession
) -> None:
    await add(knowledge, *plain("one"))
    before = await query(session, "SELECT ctid::text FROM chunk_terms")
    await knowledge.update_sources(GUILD, title="a title")
    assert await query(session, "SELECT ctid::text FROM chunk_terms") == before
    await knowledge.update_sources(GUILD, title="another")
    assert await query(session, "SELECT ctid::text FROM chunk_terms") != before
    # Merged into the index already.
    assert await query(session, "SELECT gin_clean_pending_list('idx_chunk_terms_terms')") == [0]


async def test_a_source_without_chunks_is_not_changed(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    await add(knowledge)
    _, ids = await add(knowledge, *plain("dead"))
    await bury(session, *ids)
    start = await everything(session)
    assert await knowledge.update_sources(GUILD, title="new") == BulkResult(0, 0, 0, False)
    assert await everything(session) == start


# Transactions


@pytest.mark.parametrize("change", ["delete", "update"])
async def test_a_rollback_leaves_all_as_it_was(database: Database, change: str) -> None:
    async with database.begin() as session:
        _, ids = await add(KnowledgeRepository(session), *plain("a", "b"), embedded("c"))
        await bury(session, ids[0])
        start = await everything(session)

    async def change_and_fail() -> None:
        async with database.begin() as session:
            if change == "delete":
                await KnowledgeRepository(session).delete_chunks(GUILD)
            else:
                await KnowledgeRepository(session).update_sources(GUILD, title="x", metadata={"a": 1})
            assert await everything(session) != start
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await change_and_fail()
    async with database.begin() as session:
        assert await everything(session) == start


async def seen_waiting(database: Database, number: int = 1) -> None:
    """Return once so many transactions wait for a lock."""
    statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(20):
        while True:
            async with database.begin() as session:
                if (await query(session, statement))[0] >= number:
                    return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def waiting_for(database: Database, change: Coroutine[Any, Any, Any]) -> AsyncIterator["asyncio.Task[Any]"]:
    """Start it, and go on once it waits for the caller."""
    task = asyncio.create_task(change)
    try:
        await seen_waiting(database)
        yield task
    except BaseException:
        task.cancel()
        raise


async def delete_by(database: Database, wanted: AnyFilters = GUILD, **options: Any) -> BulkResult:
    async with database.begin() as session:
        return await KnowledgeRepository(session).delete_chunks(wanted, **options)


async def update_by(database: Database, wanted: AnyFilters = GUILD, **options: Any) -> BulkResult:
    async with database.begin() as session:
        return await KnowledgeRepository(session).update_sources(wanted, **options)


async def added(database: Database, *new: NewChunk, **values: Any) -> tuple[int, list[int]]:
    async with database.begin() as session:
        return await add(KnowledgeRepository(session), *new, **values)


WRITES: dict[str, Callable[[EmbeddingQueue, Lease, Sequence[int]], Coroutine[Any, Any, Any]]] = {
    "complete": lambda queue, lease, ids: queue.complete(lease, ids, vectors(len(ids)), MODEL),
    "defer": lambda queue, lease, ids: queue.defer(lease, ids, MINUTE),
    "fail": lambda queue, lease, ids: queue.fail(lease, ids, ErrorCode.SERVER_ERROR, retry_in=MINUTE),
    "bury": lambda queue, lease, ids: queue.bury(lease, ids, ErrorCode.INVALID_INPUT),
}
each_write = pytest.mark.parametrize("write", WRITES)


@each_write
@pytest.mark.parametrize("max_attempts", [1, 3])
async def test_a_worker_passes_over_what_was_deleted_under_its_lease(
    database: Database, write: str, max_attempts: int
) -> None:
    queue = EmbeddingQueue(database, max_attempts=max_attempts)
    _, ours = await added(database, *plain("a", "b"))
    _, theirs = await added(database, *plain("c"), scope=Scope(2))
    lease = await queue.claim()
    assert (await delete_by(database)).chunks == 2
    await WRITES[write](queue, lease, [*ours, *theirs])
    async with database.begin() as session:
        left = set(await query(session, "SELECT original_chunk_id FROM knowledge_chunks_dlq"))
        left |= set(await ids_of(session, "knowledge_chunks"))
        assert left == set(theirs)
        assert await query(session, "SELECT 1 FROM embedding_jobs WHERE lease_token IS NOT NULL") == []


@each_write
@pytest.mark.parametrize("survives", [True, False])
async def test_a_worker_gets_on_while_its_chunks_are_being_deleted(
    database: Database, queue: EmbeddingQueue, write: str, survives: bool
) -> None:
    """``survives``: the source, by an older chunk that the filter does not keep."""
    old = [embedded("old", occurred_from=JUNE, occurred_to=JUNE)] if survives else []
    new = [NewChunk(content, occurred_from=JUNE + DAY, occurred_to=JUNE + DAY) for content in "ab"]
    source_id, ids = await added(database, *old, *new)
    ours = ids[len(old) :]
    _, theirs = await added(database, *plain("c"), scope=Scope(2))
    lease = await queue.claim()
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_chunks(GUILD & SearchFilters(since=JUNE + DAY))
        working = asyncio.create_task(WRITES[write](queue, lease, [*ours, *theirs]))
        # Whoever writes less than a vector or a dead letter does not even wait.
        await (seen_waiting(database) if write in ("complete", "bury") else asyncio.wait_for(working, 20))
    await asyncio.wait_for(working, 20)
    async with database.begin() as session:
        assert await ids_of(session, "knowledge_chunks") == [*ids[: len(old)], *([] if write == "bury" else theirs)]
        assert await ids_of(session, "knowledge_chunks_dlq", "original_chunk_id") == (theirs if write == "bury" else [])
        assert await query(session, "SELECT 1 FROM embedding_jobs WHERE lease_token IS NOT NULL") == []
        found = await query(session, "SELECT status::text FROM knowledge_sources WHERE id = :id", id=source_id)
        assert found == (["completed"] if survives else [])


async def test_it_waits_for_a_worker_that_is_writing_and_sees_what_it_wrote(
    database: Database, queue: EmbeddingQueue
) -> None:
    """By models, which the worker's write decides."""
    _, ids = await added(database, *plain("a", "b"))
    lease = await queue.claim()
    async with database.begin() as session:
        # Halfway through complete(): the source is locked, the vector written.
        await query(session, "SELECT 1 FROM knowledge_sources FOR NO KEY UPDATE")
        await query(session, "DELETE FROM embedding_jobs WHERE chunk_id = :id", id=ids[0])
        driver = (await (await session.connection()).get_raw_connection()).driver_connection
        await driver.execute(
            "UPDATE knowledge_chunks SET embedding = $2, embedding_model = $3 WHERE id = $1",
            ids[0],
            bytes(pack_vector(vectors(1)[0])),
            MODEL,
        )
        not_embedded = GUILD & ~SearchFilters(models=[MODEL])
        async with waiting_for(database, delete_by(database, not_embedded)) as deleting:
            pass
    assert await deleting == BulkResult(chunks=1, sources=0, dead_letters=0, dry_run=False)
    with pytest.raises(LeaseLostError):
        # The first one is embedded already, by whoever held its lease then.
        await queue.complete(lease, ids, vectors(2), MODEL)
    async with database.begin() as session:
        assert await query(session, "SELECT id FROM knowledge_chunks WHERE embedding IS NOT NULL") == ids[:1]
        assert await query(session, "SELECT status::text FROM knowledge_sources") == ["completed"]


async def test_a_chunk_added_before_the_lock_is_deleted_too(database: Database) -> None:
    source_id, _ = await added(database, *plain("a"))
    async with database.begin() as session:
        await KnowledgeRepository(session).add_chunks(source_id, plain("b", "c"))
        counted = await delete_by(database, dry_run=True)
        async with waiting_for(database, delete_by(database)) as deleting:
            pass
    assert counted == BulkResult(chunks=1, sources=1, dead_letters=0, dry_run=True)
    assert await deleting == BulkResult(chunks=3, sources=1, dead_letters=0, dry_run=False)
    async with database.begin() as session:
        assert (await sizes(session))[:5] == [0] * 5


async def test_a_chunk_added_after_the_lock_finds_no_source(database: Database) -> None:
    source_id, _ = await added(database, *plain("a"))

    async def add_late() -> None:
        async with database.begin() as session:
            await KnowledgeRepository(session).add_chunks(source_id, plain("late"))

    async with database.begin() as session:
        await KnowledgeRepository(session).delete_chunks(GUILD)
        async with waiting_for(database, add_late()) as adding:
            pass
    with pytest.raises(NotFoundError):
        await adding


async def test_a_chunk_that_another_program_adds_without_locking_keeps_its_source(database: Database) -> None:
    """Its foreign key alone locks the source: it must not go by the cascade of a source that seemed empty."""
    source_id, ids = await added(database, *plain("a"))
    async with database.begin() as session:
        foreign = await query(
            session,
            "INSERT INTO knowledge_chunks (source_id, content, guild_id) VALUES (:id, 'other', 2) RETURNING id",
            id=source_id,
        )
        async with waiting_for(database, delete_by(database)) as deleting:
            pass
    assert await deleting == BulkResult(chunks=1, sources=0, dead_letters=0, dry_run=False)
    async with database.begin() as session:
        assert await ids_of(session, "knowledge_chunks") == foreign != ids
        assert await ids_of(session, "knowledge_sources") == [source_id]


@pytest.mark.parametrize("change", ["delete", "update"])
async def test_sources_are_locked_first_and_in_order(database: Database, change: str) -> None:
    """While it waits for the first source it holds nothing of the others, nor any chunk, job or dead letter."""
    (first, chunks), (second, _), _ = [await added(database, *plain("a", "b")) for _ in range(3)]
    async with database.begin() as session:
        await bury(session, chunks[0])
        # What is read in another order than that of the ids: the first is last in the table now.
        await query(session, "UPDATE knowledge_sources SET uri = 'x' WHERE id = :id", id=first)
    work = delete_by(database) if change == "delete" else update_by(database, title="new", metadata={"a": 1})
    async with database.begin() as session:
        await query(session, "SELECT 1 FROM knowledge_sources WHERE id = :id FOR NO KEY UPDATE", id=first)
        async with waiting_for(database, work) as working, database.begin() as other:
            for table in ("knowledge_chunks", "embedding_jobs", "knowledge_chunks_dlq", "chunk_terms"):
                assert await query(other, f"SELECT 1 FROM {table} FOR UPDATE NOWAIT")
            rest = "SELECT id FROM knowledge_sources WHERE id <> :id ORDER BY id FOR UPDATE NOWAIT"
            assert (await query(other, rest, id=first))[0] == second
    assert (await working).sources == 3


async def test_dead_letters_that_no_source_guards_are_locked_in_order(database: Database) -> None:
    """Else two who delete the same ones could each hold what the other waits for."""
    _, ids = await added(database, *plain("a", "b", "c"))
    async with database.begin() as session:
        await bury(session, *ids)
        await query(session, "DELETE FROM knowledge_sources")
        first, *others = await ids_of(session, "knowledge_chunks_dlq")
        # It is read last now.
        await query(session, "UPDATE knowledge_chunks_dlq SET retry_count = 1 WHERE id = :id", id=first)
    async with database.begin() as session:
        await query(session, "SELECT 1 FROM knowledge_chunks_dlq WHERE id = :id FOR UPDATE", id=first)
        async with waiting_for(database, delete_by(database)) as deleting, database.begin() as other:
            rest = "SELECT id FROM knowledge_chunks_dlq WHERE id <> :id ORDER BY id FOR UPDATE NOWAIT"
            assert await query(other, rest, id=first) == others
    assert (await deleting).dead_letters == 3


async def test_a_dry_run_waits_for_nobody(database: Database) -> None:
    await added(database, *plain("a"))
    async with database.begin() as session:
        await query(session, "LOCK TABLE knowledge_sources, knowledge_chunks, embedding_jobs IN EXCLUSIVE MODE")
        assert await asyncio.wait_for(delete_by(database, dry_run=True), 5) == BulkResult(1, 1, 0, True)
        assert await asyncio.wait_for(update_by(database, title="x", dry_run=True), 5) == BulkResult(1, 1, 0, True)


async def test_a_source_that_is_just_being_deleted_is_passed_over(database: Database) -> None:
    source_id, _ = await added(database, *plain("a"))
    other, _ = await added(database, *plain("b"))
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_source(source_id)
        async with waiting_for(database, delete_by(database)) as deleting:
            pass
    assert await deleting == BulkResult(chunks=1, sources=1, dead_letters=0, dry_run=False)
    with pytest.raises(NotFoundError):
        async with database.begin() as session:
            await KnowledgeRepository(session).delete_source(other)


async def test_a_document_added_again_while_it_is_deleted_is_there_afterwards(database: Database) -> None:
    async def put(*contents: str) -> Any:
        async with database.begin() as session:
            return await KnowledgeRepository(session).put_document(
                "title", plain(*contents), uri="https://example.com", scope=Scope(1)
            )

    await put("a", "b")
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_chunks(GUILD)
        async with waiting_for(database, put("b", "c")) as putting:
            pass
    result = await putting
    assert (result.added, result.kept) == (2, 0)
    async with database.begin() as session:
        assert (await sizes(session))[:5] == [1, 2, 2, 2, 0]


async def test_of_two_changes_the_second_sees_what_the_first_left(database: Database) -> None:
    await added(database, *plain("a"), metadata={"version": 1})
    wanted = GUILD & SearchFilters(metadata={"version": 1})
    async with database.begin() as session:
        done = await KnowledgeRepository(session).update_sources(wanted, metadata={"version": 2})
        assert done.sources == 1
        async with waiting_for(database, update_by(database, wanted, metadata={"version": 3})) as updating:
            pass
        async with waiting_for(database, delete_by(database, wanted)) as deleting:
            pass
    assert (await updating).sources == 0
    assert await deleting == BulkResult(0, 0, 0, False)
    async with database.begin() as session:
        assert await query(session, "SELECT metadata FROM knowledge_sources") == [{"version": 2}]


@pytest.mark.parametrize("by_migration", [True, False])
async def test_words_that_are_just_being_filled_in_are_waited_for(database: Database, by_migration: bool) -> None:
    """A migration does not lock the sources."""
    _, ids = await added(database, *plain("a", "b"))
    async with database.begin() as session:
        await query(session, "DELETE FROM chunk_terms")
    async with database.begin() as session:
        if by_migration:
            await query(session, "INSERT INTO chunk_terms (chunk_id, terms) SELECT id, '' FROM knowledge_chunks")
        else:
            await fill_terms(session)
        async with waiting_for(database, update_by(database, title="new")) as updating:
            pass
    assert (await updating).sources == 1
    async with database.begin() as session:
        assert await ids_of(session, "chunk_terms", "chunk_id") == ids
        assert await wrong_terms(session) == []


async def test_everybody_at_once(database: Database) -> None:
    """Nobody is killed by a deadlock, and no table has what another one lacks."""
    rng = random.Random(7)
    queue = EmbeddingQueue(database, max_attempts=1)
    archiver = SessionArchiver(database, idle_for=timedelta(0), min_session_length=1, overlap_messages=0)
    done: dict[str, int] = {}

    def wanted() -> AnyFilters:
        guild = SearchFilters(guild_id=rng.randint(1, 2))
        return rng.choice(
            [
                guild,
                guild & SearchFilters(user_id=rng.randint(1, 3)),
                guild & SearchFilters(since=JUNE + rng.randrange(5) * DAY),
                guild & ~SearchFilters(models=[MODEL]),
                SearchFilters(session_keys=[f"key {rng.randrange(4)}"]),
                SearchFilters(metadata={"n": rng.randrange(3)}) & guild,
            ]
        )

    def some() -> list[NewChunk]:
        times = [JUNE + rng.randrange(5) * DAY for _ in range(rng.randint(1, 4))]
        return [NewChunk(f"text {rng.randrange(9)}", occurred_from=time, occurred_to=time) for time in times]

    def scope() -> Scope:
        return Scope(guild_id=rng.randint(1, 2), user_id=rng.randint(1, 3))

    async def put() -> None:
        async with database.begin() as session:
            await KnowledgeRepository(session).put_document(
                f"title {rng.randrange(3)}",
                some(),
                uri=f"u{rng.randrange(6)}",
                scope=scope(),
                metadata={"n": rng.randrange(3)},
            )

    async def extend() -> None:
        async with database.begin() as session:
            knowledge = KnowledgeRepository(session)
            sources = await knowledge.list_sources(limit=50)
            if sources:
                await knowledge.add_chunks(rng.choice(sources).id, some())

    async def work() -> None:
        lease = await queue.claim(10)
        if lease.chunks:
            write = rng.choice(list(WRITES))
            await asyncio.sleep(rng.random() * 0.01)
            await WRITES[write](queue, lease, lease.chunk_ids)

    async def archive() -> None:
        async with database.begin() as session:
            await SessionRepository(session).append(
                f"key {rng.randrange(4)}",
                [Message.user(f"hello {rng.randrange(9)}")],
                guild_id=1,
            )
        report = await archiver.run_once()
        assert report.failed == ()

    async def delete_one() -> None:
        async with database.begin() as session:
            knowledge = KnowledgeRepository(session)
            if sources := await knowledge.list_sources(limit=50):
                await knowledge.delete_source(rng.choice(sources).id)

    async def delete() -> None:
        await delete_by(database, wanted())

    async def change() -> None:
        await update_by(database, wanted(), title=f"title {rng.randrange(3)}", metadata={"n": rng.randrange(3)})

    async def requeue() -> None:
        await queue.requeue()

    async def again(name: str, action: Callable[[], Coroutine[Any, Any, None]], pause: float) -> None:
        for _ in range(40):
            with suppress(NotFoundError, LeaseLostError):
                await action()
                done[name] = done.get(name, 0) + 1
            await asyncio.sleep(rng.random() * pause)

    actions: dict[str, tuple[Callable[[], Coroutine[Any, Any, None]], float]] = {
        "put": (put, 0.01),
        "extend": (extend, 0.02),
        "work": (work, 0.01),
        "archive": (archive, 0.05),
        "delete one": (delete_one, 0.05),
        "delete": (delete, 0.03),
        "delete too": (delete, 0.03),
        "change": (change, 0.02),
        "requeue": (requeue, 0.05),
    }
    async with asyncio.TaskGroup() as group:
        for name, (action, pause) in actions.items():
            group.create_task(again(name, action, pause))
    assert min(done.get(name, 0) for name in actions) > 5, done
    async with database.begin() as session:
        assert await wrong_terms(session) == []
        waiting = await query(session, "SELECT id FROM knowledge_chunks WHERE embedding IS NULL ORDER BY id")
        assert await ids_of(session, "embedding_jobs", "chunk_id") == waiting
        orphans = "SELECT 1 FROM knowledge_chunks_dlq d WHERE NOT EXISTS"
        assert await query(session, f"{orphans} (SELECT FROM knowledge_sources s WHERE s.id = d.source_id)") == []
        empty = (
            "SELECT 1 FROM knowledge_sources s WHERE NOT EXISTS (SELECT FROM knowledge_chunks WHERE source_id = s.id)"
            " AND NOT EXISTS (SELECT FROM knowledge_chunks_dlq WHERE source_id = s.id)"
        )
        assert await query(session, empty) == []
    for guild in (1, 2):
        counted = await delete_by(database, SearchFilters(guild_id=guild), dry_run=True)
        deleted = await delete_by(database, SearchFilters(guild_id=guild))
        assert (counted.chunks, counted.sources, counted.dead_letters) == (
            deleted.chunks,
            deleted.sources,
            deleted.dead_letters,
        )
    async with database.begin() as session:
        assert await sizes(session) == [0] * len(TABLES)


async def test_a_failure_of_the_server_is_told_in_our_words(database: Database) -> None:
    await added(database, *plain("a"))
    async with database.begin() as session:
        await query(session, "DROP TABLE knowledge_chunks_dlq")
    with pytest.raises(StoreError, match="a table is missing"):
        await delete_by(database)
