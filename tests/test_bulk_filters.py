"""Deleting and changing by any filter, against what the same filter keeps."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from bulk_data import DAY, JUNE, MODEL, add, bury, embedded, everything, ids_of, query, vectors, wrong_terms
from filter_reading import scoped_trees, trees, unhurried
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import (
    InvalidInputError,
    KnowledgeChunk,
    KnowledgeRepository,
    NewChunk,
    Scope,
    SearchFilters,
    SourceType,
    bulk_changes,
)
from kotonoha_store.filters import conditions, parameters, shape
from kotonoha_store.search_records import AnyFilters, BulkResult
from kotonoha_store.source_status import recompute_status

pytestmark = pytest.mark.role("app", "worker")

# Each kind of filter


@pytest.fixture
def knowledge(session: AsyncSession) -> KnowledgeRepository:
    return KnowledgeRepository(session)


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_changes, "_BATCH", 3)


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
