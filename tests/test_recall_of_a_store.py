"""Store.recall: what was said before, never what is another's."""

import asyncio
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from recall_data import KEY, contents, hit, tokens_of, users

from kotonoha_store import (
    ConfigurationError,
    EmbeddingError,
    HashingEmbedder,
    InvalidInputError,
    Message,
    NotFoundError,
    Recall,
    SearchFilters,
    SearchResult,
    Settings,
    Store,
    StoreError,
)
from kotonoha_store.tokens import count_tokens

pytestmark = pytest.mark.role("app", "worker")

# Through the store


async def append(store: Store, key: str, *contents: str, **scope: int) -> None:
    async with store.begin() as tx:
        await tx.sessions.append(key, users(*contents), **scope)


async def archive(store: Store) -> None:
    report = await store.archiver.run_once(idle_for=timedelta(0))
    assert not report.failed
    await store.embedding_worker.run_until_empty()


async def recalled(store: Store, key: str = KEY, query: str = "What about badgers?", **options: Any) -> Recall:
    return await store.recall(key, query, options.pop("max_tokens", 4000), **options)


def archiving(settings: Settings, **values: object) -> Settings:
    return settings.model_copy(update={"kb_min_session_length": 1, **values})


@pytest.fixture
async def bot(settings: Settings) -> Any:
    """Archives short sessions, and keeps two messages as context."""
    async with Store.open(archiving(settings, kb_archive_overlap_messages=2), embedder=HashingEmbedder()) as store:
        yield store


BADGERS = ("Badgers live in setts.", "Badgers eat worms.", "Badgers sleep by day.", "Badgers dig.", "Badgers are shy.")


async def test_a_conversation_and_what_was_said_before_it(bot: Store) -> None:
    await append(bot, KEY, *BADGERS, guild_id=1, channel_id=7)
    await append(bot, "channel:7 again", "Badgers are striped.", guild_id=1, channel_id=7)
    await archive(bot)
    await append(bot, KEY, "What do badgers eat?", guild_id=1, channel_id=7)
    recall = await recalled(bot)
    assert contents(recall.messages) == [*BADGERS[-2:], "What do badgers eat?"]
    said = "\n".join(f"user: {content}" for content in BADGERS)
    assert sorted(contents(recall.hits)) == ["user: Badgers are striped.", said]
    assert recall.tokens == tokens_of(recall.messages) + count_tokens(recall.context())
    assert "https://discord.com/channels/1/7" in recall.context()
    assert recall.result.plan == "hybrid"


async def test_nothing_that_is_still_in_the_session_after_several_archives(bot: Store) -> None:
    """Pruned twice: absolute places, overlapping chunks."""
    rounds = [[f"Badger fact {10 * turn + place}." for place in range(4)] for turn in range(3)]
    for facts in rounds:
        await append(bot, KEY, *facts, channel_id=7)
        await archive(bot)
    async with bot.begin() as tx:
        session = await tx.sessions.load(KEY)
    assert session.messages_offset == 10
    recall = await recalled(bot, query="Badger fact")
    shown = set(contents(recall.messages))
    assert len(shown) == 2
    assert len(recall.result.hits) >= 3
    lines = [{line.removeprefix("user: ") for line in found.content.split("\n")} for found in recall.hits]
    assert lines
    assert not any(of_hit <= shown for of_hit in lines)
    assert set().union(shown, *lines) == {fact for facts in rounds for fact in facts}


async def test_a_short_conversation_that_is_all_shown_is_no_hit(settings: Settings) -> None:
    async with Store.open(archiving(settings), embedder=HashingEmbedder()) as store:
        await append(store, KEY, *BADGERS, channel_id=7)
        await archive(store)
        recall = await recalled(store)
        assert contents(recall.messages) == list(BADGERS)
        assert len(recall.result.hits) == 1
        assert recall.hits == ()
        little = await recalled(store, max_tokens=30)
        assert 0 < len(little.messages) < len(BADGERS)


async def test_a_long_message_that_was_cut_is_shown_once(settings: Settings) -> None:
    settings = archiving(settings, kb_chunk_max_tokens=64)
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        async with store.begin() as tx:
            message = Message.user("Badgers: dig. " * 60, author="Ann with a name: as long as names can possibly be")
            await tx.sessions.append(KEY, message, channel_id=7)
        await archive(store)
        recall = await recalled(store)
        assert len(recall.messages) == 1
        assert len(recall.result.hits) > 1
        assert recall.hits == ()


async def test_parts_are_known_in_a_session_that_was_pruned(settings: Settings) -> None:
    settings = archiving(settings, kb_chunk_max_tokens=64, kb_archive_overlap_messages=1)
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        # No part of it but the first is in it as it stands, with the name before it.
        long = " ".join(f"Badger {number} digs." for number in range(60))
        await append(store, KEY, "Hamsters.", "Mice.", long, channel_id=7)
        await archive(store)
        recall = await recalled(store, query="dig")
        assert len(recall.messages) == 1
        assert len(recall.result.hits) > 2
        assert [found.content for found in recall.hits if "Hamsters" not in found.content] == []


async def test_token_based_chunks_are_shown_once(settings: Settings) -> None:
    settings = archiving(settings, kb_chunk_max_tokens=64, kb_chat_chunk_strategy="token_based")
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        await append(store, KEY, *(f"Badger {number} digs. " * 5 for number in range(5)), channel_id=7)
        await archive(store)
        recall = await recalled(store)
        assert len(recall.messages) == 5
        assert len(recall.result.hits) > 1
        assert recall.hits == ()


async def test_a_session_saved_anew_does_not_hide_what_it_said_before(bot: Store) -> None:
    await append(bot, KEY, *BADGERS, channel_id=7)
    await archive(bot)
    async with bot.begin() as tx:
        session = await tx.sessions.load(KEY)
        # As many as there were: by their places they are those that were archived.
        await tx.sessions.save(session, users("hello", "hello again"))
    recall = await recalled(bot)
    assert contents(recall.messages) == ["hello", "hello again"]
    assert len(recall.hits) == 1


async def test_a_session_begun_anew_does_not_hide_what_the_old_one_said(bot: Store) -> None:
    await append(bot, KEY, *BADGERS, channel_id=7)
    await archive(bot)
    async with bot.begin() as tx:
        await tx.sessions.delete(KEY)
    await append(bot, KEY, "hello", "you", "there", "once", "more", channel_id=7)
    recall = await recalled(bot)
    assert len(recall.messages) == 5
    assert len(recall.hits) == 1


async def test_a_session_put_back_shows_its_messages_once(bot: Store) -> None:
    await append(bot, KEY, *BADGERS, channel_id=7)
    await archive(bot)
    async with bot.begin() as tx:
        await tx.sessions.delete(KEY)
    await append(bot, KEY, "welcome back", *BADGERS, channel_id=7)
    assert (await recalled(bot)).hits == ()


async def test_the_last_of_5000_messages(store: Store) -> None:
    await append(store, KEY, *(f"m {number}" for number in range(5000)), channel_id=7)
    recall = await recalled(store, max_tokens=2000)
    kept = len(recall.messages)
    assert contents(recall.messages) == [f"m {number}" for number in range(5000 - kept, 5000)]
    assert 1990 <= recall.tokens <= 2000
    many = await recalled(store, max_tokens=100_000)
    assert contents(many.messages) == [f"m {number}" for number in range(4000, 5000)]


async def test_places_are_right_where_only_the_last_messages_were_read(store: Store) -> None:
    """A long message in many parts, which are known by their place: far back in a session of 5,000."""
    place = {"session_key": KEY, "first_message_index": 4998, "last_message_index": 4998}
    async with store.begin() as tx:
        messages = [*users(*["x"] * 4998), Message.user("badgers " * 60), Message.user("last")]
        await tx.sessions.append(KEY, messages, channel_id=7)
    hits = [hit(1, "Somebody…: badgers badgers", location=place)]

    async def found(*_: object, **__: object) -> SearchResult:
        return SearchResult(tuple(hits), "hybrid", True, 0, None)

    store.search = found  # type: ignore[method-assign]
    assert (await recalled(store, max_tokens=400, filters=SearchFilters(channel_id=7))).hits == ()


class Meanwhile(HashingEmbedder):
    """Does something else before it answers a query."""

    async def happens(self) -> None: ...

    async def embed_query(self, text: str) -> Any:
        await self.happens()
        return await super().embed_query(text)


async def test_messages_appended_and_archived_meanwhile(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Meanwhile()
    settings = archiving(settings, kb_archive_overlap_messages=0, db_pool_min_size=1, db_pool_max_size=1)
    async with Store.open(settings, embedder=embedder) as store:
        await append(store, KEY, *BADGERS, channel_id=7)

        async def happens() -> None:
            # With a single connection: none is held meanwhile.
            await archive(store)
            await append(store, KEY, "Badgers came later.", channel_id=7)

        monkeypatch.setattr(embedder, "happens", happens)
        recall = await asyncio.wait_for(recalled(store), 60)
        assert contents(recall.messages) == list(BADGERS)
        assert len(recall.result.hits) == 1
        assert recall.hits == ()


# Whose memory it is


async def remember(store: Store, what: str, **scope: int) -> None:
    await store.add_document(what, f"badgers: {what}", **scope)


async def titles(store: Store, key: str = KEY, **options: Any) -> set[str]:
    return {found.title for found in (await recalled(store, key, **options)).hits}


async def fill_scopes(store: Store) -> None:
    await remember(store, "guild 1", guild_id=1, channel_id=7)
    await remember(store, "guild 1, user 5", guild_id=1, channel_id=7, user_id=5)
    await remember(store, "guild 1, thread", guild_id=1, channel_id=7, thread_id=70)
    await remember(store, "guild 1, elsewhere", guild_id=1, channel_id=8, user_id=5)
    await remember(store, "guild 2", guild_id=2, channel_id=7)
    await remember(store, "guild 3", guild_id=3, channel_id=7, user_id=5)
    await remember(store, "no guild", channel_id=7)
    await remember(store, "no guild, user 5", channel_id=9, user_id=5)
    await remember(store, "nobody's")
    await store.embedding_worker.run_until_empty()


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ({"guild_id": 1, "channel_id": 7}, {"guild 1", "guild 1, user 5", "guild 1, thread"}),
        ({"guild_id": 2, "channel_id": 7, "user_id": 5}, {"guild 2"}),
        ({"channel_id": 7}, {"no guild"}),
        ({"guild_id": 1, "user_id": 5}, {"guild 1, user 5", "guild 1, elsewhere"}),
        ({"user_id": 5}, {"no guild, user 5"}),
        ({"guild_id": 1}, set()),
        ({}, set()),
    ],
)
@pytest.mark.parametrize("mode", ["hybrid", "words"])
async def test_the_own_scope(store: Store, scope: dict[str, int], expected: set[str], mode: Any) -> None:
    await fill_scopes(store)
    await append(store, KEY, "hello", **scope)
    assert await titles(store, mode=mode) == expected


async def test_a_session_without_any_scope_remembers_itself(bot: Store) -> None:
    await append(bot, KEY, *BADGERS)
    await append(bot, "another", "Badgers of another.")
    await archive(bot)
    recall = await recalled(bot)
    assert [found.location["session_key"] for found in recall.hits] == [KEY]


@pytest.mark.parametrize("mode", ["hybrid", "words"])
async def test_many_guilds_do_not_crowd_out_what_has_none(store: Store, mode: Any) -> None:
    for guild_id in range(1, 9):
        await remember(store, f"badgers badgers {guild_id}", guild_id=guild_id, channel_id=7)
    await remember(store, "no guild's badgers, and much that is about something else", channel_id=7)
    await store.embedding_worker.run_until_empty()
    await append(store, KEY, "hello", channel_id=7)
    assert await titles(store, mode=mode, top_k=1) == {"no guild's badgers, and much that is about something else"}


async def test_however_many_guilds_share_an_id_only_what_has_none_is_shown(store: Store) -> None:
    for guild_id in range(1, 120):
        await remember(store, f"{guild_id}", guild_id=guild_id, channel_id=7)
    await remember(store, "own", channel_id=7)
    await append(store, KEY, "hello", channel_id=7)
    recall = await recalled(store, mode="words", top_k=1)
    assert [hit.title for hit in recall.hits] == ["own"]
    assert recall.result.complete


async def test_filters_take_the_place_of_the_own_scope(store: Store) -> None:
    await fill_scopes(store)
    await append(store, KEY, "hello", guild_id=1, channel_id=7)
    assert await titles(store, filters=SearchFilters(guild_id=2)) == {"guild 2"}
    both = SearchFilters(guild_id=2) | SearchFilters(guild_id=3)
    assert await titles(store, filters=both) == {"guild 2", "guild 3"}
    assert len(await titles(store, everywhere=True, top_k=20)) == 9


async def test_a_session_that_does_not_exist_yet(store: Store) -> None:
    await fill_scopes(store)
    with pytest.raises(NotFoundError, match="'new'"):
        await recalled(store, "new")
    recall = await recalled(store, "new", filters=SearchFilters(guild_id=2))
    assert recall.messages == ()
    assert [citation.title for citation in recall.citations] == ["guild 2"]
    assert len((await recalled(store, "new", everywhere=True)).hits) > 1


async def test_a_new_channel_remembers_nothing(store: Store) -> None:
    await append(store, KEY, "hello", guild_id=1, channel_id=7)
    recall = await recalled(store)
    assert (contents(recall.messages), recall.hits, recall.context()) == (["hello"], (), "")
    assert recall.tokens == tokens_of(recall.messages)


@pytest.mark.parametrize("query", ["？！…", "🦡", '"badgers"', "badgers " * 2000, "%_\\' OR 1=1 --"])
@pytest.mark.parametrize("mode", ["hybrid", "words"])
async def test_any_question_is_answered(store: Store, query: str, mode: Any) -> None:
    await append(store, KEY, "hello", guild_id=1, channel_id=7)
    await fill_scopes(store)
    assert contents((await recalled(store, query=query, mode=mode)).messages) == ["hello"]


# What is refused


async def test_by_words_no_embedder_is_needed(settings: Settings) -> None:
    async with Store.open(settings) as store:
        await append(store, KEY, "hello", guild_id=1, channel_id=7)
        await remember(store, "setts", guild_id=1, channel_id=7)
        recall = await recalled(store, mode="words")
        assert [citation.title for citation in recall.citations] == ["setts"]
        assert recall.result.plan == "words"
        with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
            await recalled(store)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"query": ""}, "blank"),
        ({"query": " \n\u3000"}, "blank"),
        ({"query": 5}, "query"),
        ({"query": np.ones(1536)}, "query"),
        ({"query": "a\x00"}, "NUL"),
        ({"mode": "meaning"}, "mode must be words or hybrid"),
        ({"mode": []}, "mode must be words or hybrid"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1001}, "top_k"),
        ({"filters": {"guild_id": 1}}, "filters must be SearchFilters"),
        ({"filters": SearchFilters()}, "name the scope"),
        ({"session_key": ""}, "session_key"),
        ({"session_key": 7}, "session_key"),
        ({"session_key": "\x00"}, "NUL"),
    ],
)
async def test_what_no_recall_can_be_made_of(store: Store, arguments: dict[str, Any], said: str) -> None:
    await append(store, KEY, "hello", channel_id=7)
    with pytest.raises(InvalidInputError, match=said):
        await store.recall(**{"session_key": KEY, "query": "badgers", "max_tokens": 100, **arguments})


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 2**31 - 1])
async def test_the_least_and_the_largest_budget(store: Store, max_tokens: int) -> None:
    await append(store, KEY, "", "hello", channel_id=7)
    await remember(store, "setts", channel_id=7)
    recall = await recalled(store, max_tokens=max_tokens)
    assert recall.tokens <= max_tokens
    assert len(recall.messages) == (2 if max_tokens > 100 else 0)


async def test_an_embedder_that_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Meanwhile()

    async def fails() -> None:
        raise EmbeddingError("the service is down")

    settings = settings.model_copy(update={"db_pool_max_size": 1})
    async with Store.open(settings, embedder=embedder) as store:
        await append(store, KEY, "hello", channel_id=7)
        monkeypatch.setattr(embedder, "happens", fails)
        for _ in range(3):
            with pytest.raises(EmbeddingError, match="the service is down"):
                await recalled(store)
        assert contents((await recalled(store, mode="words")).messages) == ["hello"]


async def test_a_closed_store_says_so(settings: Settings) -> None:
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        pass
    for call in (recalled(store), store.recall_check(), store.fill_terms()):
        with pytest.raises(StoreError, match="was closed"):
            await call
