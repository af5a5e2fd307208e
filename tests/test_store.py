"""The whole journey, and what the store adds to its parts."""

from datetime import timedelta

import pytest

from kotonoha_store import (
    ConfigurationError,
    HashingEmbedder,
    InvalidInputError,
    Message,
    SearchFilters,
    Settings,
    Store,
)


async def test_a_conversation_goes_in_and_is_found_again(store: Store) -> None:
    async with store.begin() as tx:
        await tx.sessions.append(
            "thread:42",
            [
                Message.user("梅雨がないのはどこ？", message_id=2**62 + 1),
                Message.assistant("北海道と小笠原諸島には梅雨がありません。"),
                Message.user("I adopted a puppy named Biscuit last week."),
            ],
            session_type="thread",
            guild_id=1,
            channel_id=2,
            thread_id=42,
        )
    report = await store.archiver.run_once(idle_for=timedelta(0))
    assert (report.archived, report.messages) == (1, 3)
    embedded = await store.embedding_worker.run_until_empty()
    assert embedded.embedded == report.chunks

    result = await store.search("梅雨 北海道", threshold=None, filters=SearchFilters(guild_id=1))

    assert "北海道" in result.hits[0].content
    assert result.hits[0].title == "梅雨がないのはどこ？"
    assert result.hits[0].url == f"https://discord.com/channels/1/42/{2**62 + 1}"
    assert result.complete
    other = await store.search("梅雨 北海道", threshold=None, filters=SearchFilters(guild_id=2))
    assert other.hits == ()


async def test_a_search_without_a_scope_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="everywhere=True"):
        await store.search("anything")


async def test_without_an_embedder_the_error_says_how_to_get_one(settings: Settings) -> None:
    async with Store.open(settings) as store:
        with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
            await store.search("anything", everywhere=True)


async def test_the_embedder_that_was_given_stays_open(settings: Settings) -> None:
    embedder = HashingEmbedder()
    async with Store.open(settings, embedder=embedder):
        pass
    assert (await embedder.embed_query("still here")).shape == (1536,)


async def test_adding_a_document_again_keeps_what_did_not_change(store: Store) -> None:
    first = await store.add_document("梅雨", "梅雨は雨の多い季節です。", uri="https://example.com", guild_id=1)
    await store.embedding_worker.run_until_empty()
    again = await store.add_document("梅雨", "梅雨は雨の多い季節です。", uri="https://example.com", guild_id=1)
    assert (again.source_id, again.added, again.kept, again.removed) == (first.source_id, 0, 1, 0)
    assert (await store.queue.depth()).ready == 0
    changed = await store.add_document("梅雨", "梅雨は六月に始まる。", uri="https://example.com", guild_id=1)
    assert (changed.source_id, changed.added, changed.kept, changed.removed) == (first.source_id, 1, 0, 1)
    elsewhere = await store.add_document("梅雨", "梅雨は雨の多い季節です。", uri="https://example.com", guild_id=2)
    assert elsewhere.source_id != first.source_id
