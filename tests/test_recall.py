"""What fits into a recall: the last messages and the best hits, each once, under its citation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from recall_data import KEY, contents, hit, of_session, tokens_of, users

from kotonoha_store import (
    Message,
    Recall,
    SearchHit,
    SearchResult,
)
from kotonoha_store.recall import assemble
from kotonoha_store.tokens import count_tokens

# What fits


def chosen(
    messages: Sequence[Message], hits: Sequence[SearchHit], max_tokens: int, *, first_index: int = 0, key: str = KEY
) -> Recall:
    result = SearchResult(tuple(hits), "hybrid", True, 0, "m")
    return assemble(messages, first_index, key, result, max_tokens=max_tokens)


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


def test_a_recall_can_be_compared_and_copied() -> None:
    recall = chosen(users("one"), [hit(1, "a")], 100)
    assert replace(recall, tokens=0) != recall
    assert replace(recall) == recall
