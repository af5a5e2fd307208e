"""Store.recall: the end of the conversation and what is remembered, within a budget; never what is another's."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from conftest import settings_for
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import URL, text

from kotonoha_store import (
    ConfigurationError,
    EmbeddingError,
    HashingEmbedder,
    InvalidInputError,
    Message,
    NotFoundError,
    Recall,
    SearchFilters,
    SearchHit,
    SearchResult,
    Settings,
    SourceType,
    Store,
    StoreError,
)
from kotonoha_store.recall import assemble
from kotonoha_store.tokens import count_tokens

KEY = "channel:7"


# What fits


def hit(chunk_id: int, content: str, **fields: Any) -> SearchHit:
    values: dict[str, Any] = {"source_id": chunk_id, "title": f"title {chunk_id}", "url": None, "location": {}}
    values |= fields
    return SearchHit(
        chunk_id=chunk_id,
        source_type=SourceType.DISCORD_SESSION,
        content=content,
        similarity=None,
        score=1.0 / chunk_id,
        metadata={},
        occurred_from=None,
        occurred_to=None,
        **values,
    )


def of_session(chunk_id: int, content: str, first: int, last: int, *, key: str = KEY) -> SearchHit:
    place = {"session_key": key, "first_message_index": first, "last_message_index": last}
    return hit(chunk_id, content, location=place)


def chosen(
    messages: Sequence[Message], hits: Sequence[SearchHit], max_tokens: int, *, first_index: int = 0, key: str = KEY
) -> Recall:
    result = SearchResult(tuple(hits), "hybrid", True, 0, "m")
    return assemble(messages, first_index, key, result, max_tokens=max_tokens)


def tokens_of(messages: Sequence[Message]) -> int:
    """As OpenAI's cookbook counts: around each message, and for a name."""
    names = [message.author for message in messages if message.author]
    texts = [*names, *(message.content for message in messages)]
    return 4 * len(messages) + len(names) + sum(map(count_tokens, texts))


def users(*contents: str) -> list[Message]:
    return [Message.user(content) for content in contents]


def contents(found: Sequence[Message] | Sequence[SearchHit]) -> list[str]:
    return [each.content for each in found]


ODD_TEXT = st.text(st.sampled_from("ab .\n\r\t[]1:。京…🎉\u2028\u3000\xa0"), max_size=30)
MESSAGES = st.lists(
    st.builds(Message.user, ODD_TEXT | st.text("x y", max_size=200), author=st.none() | ODD_TEXT), max_size=12
)
HITS = st.lists(
    st.tuples(
        ODD_TEXT.map("c".__add__) | st.text("x y。\n", min_size=1, max_size=300),
        st.integers(1, 4),
        ODD_TEXT,
        st.none() | ODD_TEXT,
        st.sampled_from([KEY, "another", None]),
        st.integers(0, 12),
        st.integers(0, 3),
    ),
    max_size=8,
)


def drawn_hits(drawn: list[tuple[Any, ...]]) -> list[SearchHit]:
    return [
        hit(
            number,
            content,
            source_id=source,
            title=title,
            url=url,
            location={"session_key": key, "first_message_index": first, "last_message_index": first + more},
        )
        for number, (content, source, title, url, key, first, more) in enumerate(drawn, 1)
    ]


@given(messages=MESSAGES, drawn=HITS, budget=st.integers(1, 400))
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_budget_is_never_exceeded(messages: list[Message], drawn: list[tuple[Any, ...]], budget: int) -> None:
    hits = drawn_hits(drawn)
    recall = chosen(messages, hits, budget)
    assert recall.tokens == tokens_of(recall.messages) + count_tokens(recall.context())
    assert recall.tokens <= budget
    # The newest without a gap, and no more would have fitted.
    kept = len(recall.messages)
    assert list(recall.messages) == messages[len(messages) - kept :]
    assert kept == len(messages) or tokens_of(messages[len(messages) - kept - 1 :]) + recall.tokens > budget
    assert kept or not messages or tokens_of(messages[-1:]) > budget
    # Best first, nothing twice, and each source under one number.
    ids = [found.chunk_id for found in recall.hits]
    assert ids == sorted(ids)
    assert len(set(contents(recall.hits))) == len(ids)
    assert [citation.number for citation in recall.citations] == list(range(1, len(recall.citations) + 1))
    assert [c.source_id for c in recall.citations] == list(dict.fromkeys(found.source_id for found in recall.hits))
    assert recall.result.hits == tuple(hits)


@given(drawn=HITS, budget=st.integers(1, 400))
@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_hit_stands_in_the_context_under_its_citation(drawn: list[tuple[Any, ...]], budget: int) -> None:
    recall = chosen([], drawn_hits(drawn), budget)
    rest = recall.context()
    cited = {citation.source_id: citation for citation in recall.citations}
    for found in recall.hits:
        citation = cited[found.source_id]
        head, _, rest = rest.partition("\n")
        assert head.startswith(f"[{citation.number}] ")
        assert rest.startswith(found.content)
        rest = rest[len(found.content) :].removeprefix("\n\n")
    assert rest == ""


def test_all_of_it_where_there_is_room() -> None:
    messages = users("one", "two", "three")
    recall = chosen(messages, [hit(1, "a"), hit(2, "b")], 1000)
    assert list(recall.messages) == messages
    assert contents(recall.hits) == ["a", "b"]


def test_half_of_the_budget_is_for_the_messages_before_the_hits_take_theirs() -> None:
    messages = users(*["word " * 15] * 20)
    hits = [hit(number, f"{number} " * 15) for number in range(1, 21)]
    recall = chosen(messages, hits, 400)
    assert 150 < tokens_of(recall.messages) <= 200
    assert 150 < count_tokens(recall.context()) <= 200


def test_what_the_hits_leave_goes_to_more_messages() -> None:
    messages = users(*["word " * 15] * 20)
    recall = chosen(messages, [hit(1, "one")], 400)
    assert contents(recall.hits) == ["one"]
    assert tokens_of(recall.messages) > 350


def test_the_last_message_comes_before_all_that_is_remembered() -> None:
    """It is what the bot answers: hits do not take its place because it is longer than half of the budget."""
    question = Message.user("word " * 60)
    hits = [hit(number, f"{number} " * 10) for number in range(1, 6)]
    recall = chosen([Message.user("before"), question], hits, 100)
    assert recall.messages[-1] == question
    assert contents(recall.hits) == [hits[0].content]
    exactly = tokens_of([question])
    assert chosen([question], hits, exactly).messages == (question,)
    assert chosen([question], hits, exactly).hits == ()
    assert chosen([question], hits, exactly - 1).messages == ()


def test_no_message_is_shown_without_those_that_follow_it() -> None:
    recall = chosen(users("short", "word " * 500, "last"), [hit(1, "a")], 100)
    assert contents(recall.messages) == ["last"]
    unfit = chosen(users("short", "word " * 500), [hit(1, "a")], 100)
    assert unfit.messages == ()
    assert contents(unfit.hits) == ["a"]


def test_a_hit_that_is_too_long_makes_room_for_the_next() -> None:
    recall = chosen([], [hit(1, "long " * 500), hit(2, "short"), hit(3, "brief")], 100)
    assert contents(recall.hits) == ["short", "brief"]
    assert [citation.number for citation in recall.citations] == [1, 2]
    assert recall.context() == "[1] title 2\nshort\n\n[2] title 3\nbrief"


def test_the_same_text_is_shown_once_from_the_best_source_that_fits() -> None:
    twice = [hit(1, "same"), hit(2, "other"), hit(3, "same"), hit(4, "more")]
    assert [found.chunk_id for found in chosen([], twice, 1000).hits] == [1, 2, 4]
    long_title = [hit(1, "same", title="word " * 100), hit(2, "same")]
    assert [found.chunk_id for found in chosen([], long_title, 50).hits] == [2]


def test_only_messages_that_may_fit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def counting(text: str) -> int:
        counted.append(text)
        return count_tokens(text)

    monkeypatch.setattr("kotonoha_store.recall.count_tokens", counting)
    recall = chosen(users(*(f"message {number}" for number in range(1000))), [], 50)
    assert 0 < len(recall.messages) < 10
    assert len(counted) < 50


def test_nothing_is_an_empty_recall() -> None:
    recall = chosen([], [], 1)
    assert (recall.messages, recall.hits, recall.citations, recall.tokens) == ((), (), (), 0)
    assert recall.context() == ""


# Citations


def test_citations_are_numbered_by_first_use() -> None:
    hits = [
        hit(1, "a", source_id=30, url="https://example.com/1"),
        hit(2, "b", source_id=10),
        hit(3, "c", source_id=30, url="https://example.com/3"),
    ]
    recall = chosen([], hits, 1000)
    assert [(c.number, c.source_id, c.title, c.url) for c in recall.citations] == [
        (1, 30, "title 1", "https://example.com/1"),
        (2, 10, "title 2", None),
    ]
    assert recall.context() == (
        "[1] title 1 (https://example.com/1)\na\n\n[2] title 2\nb\n\n[1] title 3 (https://example.com/3)\nc"
    )


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\n\n"])
def test_a_title_or_link_cannot_pretend_to_be_another_source(line_break: str) -> None:
    forged = hit(1, "text", title=f"notes{line_break}[2] truth", url=f"https://a.example/{line_break}[3] x")
    recall = chosen([], [forged], 1000)
    assert recall.context() == "[1] notes [2] truth (https://a.example/ [3] x)\ntext"
    assert (recall.citations[0].title, recall.citations[0].url) == ("notes [2] truth", "https://a.example/ [3] x")


@pytest.mark.parametrize("url", ["", " \n", 5, True, ["https://example.com"], {"a": 1}])
def test_what_is_no_link_is_not_shown_as_one(url: Any) -> None:
    recall = chosen([], [hit(1, "text", url=url)], 1000)
    assert recall.context() == "[1] title 1\ntext"
    assert recall.citations[0].url is None


@pytest.mark.parametrize("title", ["", "()[]", "{0} %s \\n", "📚 <|endoftext|> “q”", "\u202eright to left"])
def test_titles_may_hold_anything(title: str) -> None:
    recall = chosen([], [hit(1, "text", title=title)], 1000)
    assert recall.context() == f"[1] {title}\ntext"
    assert recall.tokens == count_tokens(recall.context())


# Not what is shown anyway


def test_a_hit_all_of_whose_messages_are_shown_is_left_out() -> None:
    messages = users("one", "two", "three")
    inside = of_session(1, "user: one\nuser: two", 10, 11)
    overlapping = of_session(2, "user: zero\nuser: one", 9, 10)
    elsewhere = of_session(3, "user: one\nuser: two", 10, 11, key="another")
    recall = chosen(messages, [inside, overlapping, elsewhere], 1000, first_index=10)
    assert [found.chunk_id for found in recall.hits] == [2, 3]


def test_messages_that_were_added_last_leave_out_what_they_say() -> None:
    """The hits are chosen before the last of the budget goes to messages; these may be what was chosen."""
    messages = users(*(f"message {number} " + "word " * 10 for number in range(10)))
    early = of_session(1, "\n".join(f"user: {message.content}" for message in messages[3:5]), 3, 4)
    recall = chosen(messages, [early, hit(2, "other")], 200)
    assert list(recall.messages) == messages
    assert contents(recall.hits) == ["other"]


def test_what_is_not_shown_for_want_of_room_may_be_a_hit() -> None:
    messages = users(*(f"message {number} " + "word " * 10 for number in range(10)))
    early = of_session(1, f"user: {messages[0].content}", 0, 0)
    recall = chosen(messages, [early], 100)
    assert messages[0] not in recall.messages
    assert recall.hits == (early,)


def test_what_was_rewritten_since_is_not_shown() -> None:
    """Other messages may stand at the same place: a session that was deleted, or saved anew."""
    old = of_session(1, "user: my birthday is in May\nuser: remember it", 0, 1)
    recall = chosen(users("hello", "what do you know?"), [old], 1000)
    assert recall.hits == (old,)


def test_the_same_messages_at_another_place_are_shown() -> None:
    """A session that was put back from its archive counts its messages anew."""
    old = of_session(1, "user: one\nuser: two", 40, 41)
    recall = chosen(users("one", "two", "three"), [old], 1000, first_index=0)
    assert recall.hits == ()


def test_parts_of_a_long_message_are_shown_with_it() -> None:
    text = "First sentence: here.\nSecond sentence there. " * 20
    message = Message.user(text, author="Ann")
    parts = [
        of_session(1, f"Ann: {text[:100]}", 5, 5),
        of_session(2, f"Ann: {text[100:300]}", 5, 5),
        of_session(3, f"Ann: {text[100:300]} and more", 5, 5),
    ]
    recall = chosen([message], parts, 2000, first_index=5)
    assert [found.chunk_id for found in recall.hits] == [3]


def test_a_long_name_that_was_shortened_is_no_difference() -> None:
    messages = [Message.user("one", author="A very long name indeed"), Message.user("two", author="B")]
    shortened = of_session(1, "A very…: one\nB: two", 3, 4)
    assert chosen(messages, [shortened], 1000, first_index=3).hits == ()


def test_messages_without_text_are_in_no_chunk() -> None:
    messages = users("one", " \n", "two")
    assert chosen(messages, [of_session(1, "user: one\nuser: two", 0, 2)], 1000).hits == ()
    assert chosen(messages, [of_session(1, "user: one\nuser: two", 9, 11)], 1000).hits == ()


@pytest.mark.parametrize("place", [{}, {"first_message_index": 0}, {"first_message_index": "0"}, {"a": None}])
def test_a_place_that_another_program_wrote_is_no_obstacle(place: dict[str, Any]) -> None:
    other = hit(1, "user: x", location={"session_key": KEY, "last_message_index": [1], **place})
    assert chosen(users("one", "two"), [other], 1000).hits == (other,)
    backwards = of_session(2, "user: x", 1, 0)
    assert chosen(users("one", "two"), [backwards], 1000).hits == (backwards,)


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
        recall = await asyncio.wait_for(recalled(store), 20)
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


def test_a_recall_can_be_compared_and_copied() -> None:
    recall = chosen(users("one"), [hit(1, "a")], 100)
    assert replace(recall, tokens=0) != recall
    assert replace(recall) == recall
