"""Words of chunks that other programs inserted, filled in by the store."""

import asyncio

import pytest
from conftest import settings_for
from recall_data import contents
from sqlalchemy import URL, text

from kotonoha_store import (
    SearchFilters,
    SourceType,
    Store,
)

# Words of chunks that other programs inserted


async def insert_elsewhere(store: Store, count: int, *, sources: int = 3) -> None:
    """As a program does that knows nothing of words."""
    async with store.begin() as tx:
        ids = [await tx.knowledge.add_source(SourceType.WEB_PAGE, f"page {number}") for number in range(sources)]
        await tx.session.execute(
            text(
                "INSERT INTO knowledge_chunks (source_id, content, channel_id)"
                " SELECT (CAST(:ids AS bigint[]))[1 + i % :sources], 'badger number' || i || ' digs', 7"
                " FROM generate_series(1, :count) i"
            ),
            {"ids": ids, "sources": sources, "count": count},
        )


async def counts(store: Store) -> tuple[int, float | None]:
    """How many chunks have words, and how many are thought to."""
    async with store.begin() as tx:
        written = await tx.session.scalar(text("SELECT count(*) FROM chunk_terms"))
        known = await tx.session.scalar(text("SELECT frequency FROM term_frequencies WHERE term = ''"))
    return written or 0, known


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kotonoha_store.term_index.FILL_BATCH", 10)


async def test_words_are_filled_in(store: Store, small_batches: None) -> None:
    await insert_elsewhere(store, 35)
    assert (await counts(store))[0] == 0
    missed = await store.search("number17", mode="words", filters=SearchFilters(channel_id=7))
    assert missed.hits == ()
    await store.fill_terms()
    assert await counts(store) == (35, 35.0)
    found = await store.search("number17", mode="words", filters=SearchFilters(channel_id=7))
    assert contents(found.hits) == ["badger number17 digs"]
    await store.fill_terms()
    assert await counts(store) == (35, 35.0)


async def test_how_rare_words_are_is_counted_again_after_filling(store: Store, small_batches: None) -> None:
    """Rows below the newest id are no growth that the usual count would see."""
    await insert_elsewhere(store, 30)
    async with store.begin() as tx:
        await tx.session.execute(text("UPDATE knowledge_chunks SET id = id + 1000 WHERE content LIKE '%number3 %'"))
    await insert_late(store)
    assert await counts(store) == (1, 1.0)
    await store.fill_terms()
    assert await counts(store) == (30, 30.0)


async def insert_late(store: Store) -> None:
    """The words of the newest chunk alone, counted."""
    from kotonoha_store.term_index import fill_terms, refresh_terms

    async with store.begin() as tx:
        newest = await tx.session.scalar(text("SELECT max(id) FROM knowledge_chunks"))
        assert newest is not None
        await fill_terms(tx.session, ids=[newest])
        await refresh_terms(tx.session, force=True)


async def test_words_are_filled_in_by_two_at_once(migrated_url: URL, small_batches: None) -> None:
    async with Store.open(settings_for(migrated_url)) as one, Store.open(settings_for(migrated_url)) as other:
        await insert_elsewhere(one, 95, sources=7)
        await asyncio.wait_for(asyncio.gather(one.fill_terms(), other.fill_terms(), one.fill_terms()), 60)
        assert await counts(one) == (95, 95.0)


async def test_nothing_to_fill_in(store: Store) -> None:
    await store.fill_terms()
    assert await counts(store) == (0, None)
