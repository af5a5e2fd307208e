"""Deleting and changing by filter: what goes, what stays, and what is refused."""

import json
from types import MappingProxyType
from typing import Any

import pytest
from bulk_data import (
    DAY,
    GUILD,
    JUNE,
    TABLES,
    add,
    bury,
    embedded,
    everything,
    ids_of,
    plain,
    query,
    sizes,
    wrong_terms,
)
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import (
    Database,
    InvalidInputError,
    KnowledgeChunk,
    KnowledgeChunkDeadLetter,
    KnowledgeRepository,
    NewChunk,
    Scope,
    SearchFilters,
    SourceStatus,
    SourceType,
)
from kotonoha_store.search_records import AnyFilters, BulkResult

pytestmark = pytest.mark.role("app", "worker")

# What goes, and what stays


@pytest.fixture
def knowledge(session: AsyncSession) -> KnowledgeRepository:
    return KnowledgeRepository(session)


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
    before = await query(
        session, "SELECT to_jsonb(s) FROM knowledge_sources s WHERE guild_id IS DISTINCT FROM 1 ORDER BY id"
    )
    assert (await knowledge.delete_chunks(GUILD)).sources == len(SourceType)
    assert await query(session, "SELECT to_jsonb(s) FROM knowledge_sources s ORDER BY id") == before


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
        await knowledge.update_sources(GUILD, title="x", guild_id=2)


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


@pytest.mark.role("superuser")
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
