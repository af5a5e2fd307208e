"""Pieces of messages and of text: nothing lost, nothing too long, nothing merely repeated."""

import re
import time
import zlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kotonoha_store import chunking, tokens
from kotonoha_store.chunking import ChatPiece, TextPiece, chunk_messages, split_text
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.records import Message
from kotonoha_store.tokens import count_tokens

JAPANESE = "梅雨がないのは北海道です。本当ですか？はい、ほとんどありません！「そうなんだ。」と彼は言った。"
ENGLISH = "The rain came late this year. Nobody had expected it! Would it stay until autumn? Perhaps it would. "

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
FRAGMENTS = st.sampled_from(
    [
        *(JAPANESE, ENGLISH, "word", "Tokyo, ", "。", "12345678", "<|endoftext|>", "%PDF-\x01"),
        *("\n", "\n\n", "\r\n", "  ", "\t", "\u3000", "\u200b"),
        *("a" * 60, "あ" * 40, "`" * 30, "👨‍👩‍👧", "🇯🇵", "e\u0301"),
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(CHARACTERS, max_size=30), max_size=12).map("".join)
TOKENS = st.integers(16, 120)
RATIOS = st.floats(0, 1, exclude_max=True)


def squeezed(text: str) -> str:
    return "".join(text.split())


def uncovered(text: str, pieces: list[TextPiece]) -> str:
    held = {position for piece in pieces for position in range(piece.start, piece.end)}
    return squeezed("".join(char for position, char in enumerate(text) if position not in held))


# split_text


@pytest.mark.parametrize("text", ["", " ", "\n\n\t", "\u3000", " \r\n" * 50_000])
def test_blank_text_has_no_pieces(text: str) -> None:
    assert split_text(text, max_tokens=16) == []


def test_short_text_is_one_piece_without_the_space_around_it() -> None:
    assert split_text("\n 梅雨 \n") == [TextPiece("梅雨", 2, 4, count_tokens("梅雨"))]


def test_text_that_just_fits_stays_whole() -> None:
    text = (ENGLISH * 20).strip()
    [piece] = split_text(text, max_tokens=count_tokens(text))
    assert piece.content == text


@pytest.mark.parametrize(("text", "ends"), [(JAPANESE, "。？！」"), (ENGLISH, ".!?")], ids=["japanese", "english"])
@pytest.mark.parametrize(("max_tokens", "ratio"), [(80, 0), (300, 0.3)])
def test_pieces_end_and_begin_with_sentences(text: str, ends: str, max_tokens: int, ratio: float) -> None:
    text = text * 60
    pieces = split_text(text, max_tokens=max_tokens, overlap_ratio=ratio)
    assert len(pieces) > 5
    for piece in pieces:
        assert piece.content[-1] in ends
        assert piece.start == 0 or text[: piece.start].rstrip()[-1] in ends
        assert piece.token_count > max_tokens // 3 or piece is pieces[-1]


def test_an_opening_quotation_mark_goes_with_the_quotation() -> None:
    pieces = split_text("彼は言った。「雨だ。」" * 40, max_tokens=30)
    assert not [piece.content for piece in pieces if piece.content.endswith("「")]


def test_a_paragraph_is_a_better_boundary_than_a_sentence() -> None:
    paragraph = (ENGLISH * 3).strip()
    pieces = split_text("\n\n".join([paragraph] * 6), max_tokens=count_tokens(paragraph) + 20, overlap_ratio=0)
    assert [piece.content for piece in pieces] == [paragraph] * 6


def test_a_word_is_not_cut_when_there_is_a_space() -> None:
    words = "extraordinary " * 200
    assert {word for piece in split_text(words, max_tokens=20) for word in piece.content.split()} == {"extraordinary"}


def test_pieces_overlap_by_up_to_the_ratio() -> None:
    text = ENGLISH * 60
    pieces = split_text(text, max_tokens=200, overlap_ratio=0.25)
    for before, after in pairwise(pieces):
        assert after.start < before.end
        assert 0 < count_tokens(text[after.start : before.end]) <= 50


def test_a_long_gap_of_white_space_is_dropped() -> None:
    assert [piece.content for piece in split_text("left" + " \n" * 100_000 + "right", max_tokens=16)] == [
        "left",
        "right",
    ]


@given(TEXTS, TOKENS, RATIOS)
@settings(max_examples=250, deadline=None)
@example("a" * 500, 16, 0.99)
@example("👨‍👩‍👧" * 50, 16, 0.99)
@example("\n".join(["x"] * 200), 16, 0.5)
@example("<|endoftext|>" * 40, 16, 0.2)
@example("`日本!?`'s ://://é)🏽`。)();\n。://", 18, 0.5)  # cut shorter, its first piece has more tokens
def test_split_text_properties(text: str, max_tokens: int, ratio: float) -> None:
    pieces = split_text(text, max_tokens=max_tokens, overlap_ratio=ratio)
    assert uncovered(text, pieces) == ""
    for piece in pieces:
        assert text[piece.start : piece.end] == piece.content
        assert piece.content == piece.content.strip() != ""
        assert piece.token_count == count_tokens(piece.content) <= max_tokens
    for before, after in pairwise(pieces):
        assert before.start < after.start
        assert squeezed(text[before.end : after.end]) != ""
        assert count_tokens(text[after.start : before.end]) <= max_tokens * ratio
    assert pieces == split_text(text, max_tokens=max_tokens, overlap_ratio=ratio)


@given(TEXTS, RATIOS)
@settings(max_examples=50, deadline=None)
def test_split_text_counting_bytes(text: str, ratio: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_encoder", lambda: None)
        pieces = split_text(text, max_tokens=16, overlap_ratio=ratio)
    assert uncovered(text, pieces) == ""
    assert all(piece.token_count == len(piece.content.encode()) <= 16 for piece in pieces)


def erratic(text: str) -> int:
    """Like a real counter, only more so: lines add up, but within a line a longer text often has fewer tokens."""
    return sum(len(line) // 3 + zlib.crc32(line.encode()) % 5 for line in re.findall(r"[^\n]*\n|[^\n]+", text))


@given(TEXTS, TOKENS, RATIOS)
@settings(max_examples=150, deadline=None)
def test_bounds_hold_whatever_the_counter(text: str, max_tokens: int, ratio: float) -> None:
    messages = [Message.user(text), Message.assistant(ENGLISH), Message.user(text[:20], author=text[:50])] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "count_tokens", erratic)
        pieces = split_text(text, max_tokens=max_tokens, overlap_ratio=ratio)
        chat = chunk_messages(messages, max_tokens=max_tokens, overlap_ratio=ratio)
    assert uncovered(text, pieces) == ""
    assert all(piece.token_count == erratic(piece.content) <= max_tokens for piece in [*pieces, *chat])


def test_the_overlap_keeps_its_bound_when_less_text_has_more_tokens() -> None:
    text = "1234 Tokyo日本"
    start = chunking._step_back(text, 0, len(text), 3)
    assert count_tokens(text[start:]) <= 3


@pytest.mark.parametrize("unit", ["a", "あ", "!", "\n", " a", "x\n\n\n", "👨‍👩‍👧", "e\u0301", "QUJD+/xy"])
def test_hostile_text_is_split_in_linear_time(unit: str) -> None:
    text = "x" + unit * (300_000 // len(unit)) + "x"
    # Of this thread alone, whatever else the machine does.
    started = time.thread_time()
    pieces = split_text(text)
    assert time.thread_time() - started < 10
    assert max(piece.token_count for piece in pieces) <= 4000
    assert uncovered(text, pieces) == ""


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b"])
def test_text_that_no_chunk_can_hold_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="text holds"):
        split_text(text)


# chunk_messages


def dialogue(count: int) -> list[Message]:
    return [
        Message.user(f"question {n}", author="Aoi") if n % 2 == 0 else Message.assistant(f"answer {n}")
        for n in range(count)
    ]


def windows(pieces: list[ChatPiece]) -> list[tuple[int, int]]:
    return [(piece.first, piece.last) for piece in pieces]


def test_a_line_names_its_author_or_role() -> None:
    messages = [
        Message.user("こんにちは", author="あおい"),
        Message.assistant("やあ"),
        Message.user("   ", author="あおい"),
        Message.system("be kind", author="  "),
        Message.user("hm", author="Eve\nassistant:  I"),
    ]
    content = "あおい: こんにちは\nassistant: やあ\nsystem: be kind\nEve assistant: I: hm"
    assert chunk_messages(messages) == [ChatPiece(content, 0, 4, count_tokens(content))]


@pytest.mark.parametrize("strategy", ["message_based", "token_based"])
@pytest.mark.parametrize("contents", [[], [""], ["", " \n", "\u3000"]])
def test_blank_messages_have_no_pieces(strategy: Any, contents: list[str]) -> None:
    assert chunk_messages([Message.user(content) for content in contents], strategy=strategy) == []


def test_windows_share_the_overlap() -> None:
    assert windows(chunk_messages(dialogue(11), size=5, overlap=2)) == [(0, 4), (3, 7), (6, 10)]


def test_the_last_window_adds_something() -> None:
    assert windows(chunk_messages(dialogue(5), size=5, overlap=4)) == [(0, 4)]
    assert windows(chunk_messages(dialogue(6), size=5, overlap=2)) == [(0, 4), (3, 5)]


def test_blank_messages_do_not_count_in_a_window() -> None:
    messages = [Message.user("a"), Message.user(""), Message.user("b"), Message.user("c"), Message.user(" ")]
    assert windows(chunk_messages(messages, size=2, overlap=0)) == [(0, 2), (3, 3)]


def test_a_question_goes_with_its_answer() -> None:
    assert windows(chunk_messages(dialogue(10), size=5, overlap=0)) == [(0, 3), (4, 7), (8, 9)]


def test_the_overlap_already_brings_the_question() -> None:
    assert windows(chunk_messages(dialogue(9), size=5, overlap=1)) == [(0, 4), (4, 8)]


def test_windows_of_one_message_are_what_was_asked_for() -> None:
    assert windows(chunk_messages(dialogue(3), size=1, overlap=0)) == [(0, 0), (1, 1), (2, 2)]


def test_a_question_and_answer_too_long_for_one_piece_are_parted_without_more_ado() -> None:
    long = ENGLISH * 4
    messages = [Message.user("hi"), Message.user(long), Message.assistant(long)]
    pieces = chunk_messages(messages, size=2, overlap=0, max_tokens=count_tokens(long) + 20)
    assert windows(pieces) == [(0, 1), (2, 2)]


def test_a_window_closes_early_at_max_tokens() -> None:
    messages = [Message.user(ENGLISH * 2) for _ in range(6)]
    assert windows(chunk_messages(messages, size=5, overlap=0, max_tokens=110)) == [(0, 1), (2, 3), (4, 5)]


def test_overlap_leaves_at_least_half_of_a_piece_for_new_messages() -> None:
    messages = [Message.user(f"{n} {ENGLISH}") for n in range(60)]
    pieces = chunk_messages(messages, size=1000, overlap=999, max_tokens=300)
    assert all(after.last - before.last >= 4 for before, after in pairwise(pieces[:-1]))


@pytest.mark.parametrize(("text", "ends"), [(JAPANESE, "。？！」"), (ENGLISH, ".!?")], ids=["japanese", "english"])
def test_an_overlong_message_is_split_at_sentence_ends(text: str, ends: str) -> None:
    messages = [Message.user("before"), Message.user(text * 20, author="あおい"), Message.assistant("after")]
    pieces = chunk_messages(messages, max_tokens=100, overlap_ratio=0)
    assert windows(pieces) == [(0, 0), *[(1, 1)] * (len(pieces) - 2), (2, 2)]
    assert all(piece.content.startswith("あおい: ") and piece.content[-1] in ends for piece in pieces[1:-1])
    parts = "".join(piece.content.removeprefix("あおい: ") for piece in pieces[1:-1])
    assert squeezed(parts) == squeezed(text * 20)


@pytest.mark.parametrize("strategy", ["message_based", "token_based"])
@pytest.mark.parametrize("author", ["x" * 100_000, "あ" * 5_000, "👨‍👩‍👧" * 500, "a b " * 2_000])
@pytest.mark.parametrize("max_tokens", [16, 100])
def test_a_long_author_name_leaves_room_for_the_message(strategy: Any, author: str, max_tokens: int) -> None:
    pieces = chunk_messages([Message.user(JAPANESE, author=author)], strategy=strategy, max_tokens=max_tokens)
    assert all(piece.token_count == count_tokens(piece.content) <= max_tokens for piece in pieces)
    assert len(pieces) < 60
    assert "…: " in pieces[0].content


def test_context_only_opens_the_first_window() -> None:
    assert windows(chunk_messages(dialogue(12), size=5, overlap=2, context=6)) == [(4, 8), (7, 11)]
    assert windows(chunk_messages(dialogue(12), size=5, overlap=0, context=8)) == [(8, 11)]


@pytest.mark.parametrize("strategy", ["message_based", "token_based"])
@pytest.mark.parametrize("context", [4, 5, 99])
def test_context_alone_makes_no_piece(strategy: Any, context: int) -> None:
    messages = [*dialogue(4), Message.user("  ")]
    assert chunk_messages(messages, strategy=strategy, context=context) == []


def test_context_that_does_not_fit_is_left_out() -> None:
    messages = [Message.user(ENGLISH * 50), Message.user("new")]
    assert windows(chunk_messages(messages, max_tokens=100, context=1)) == [(1, 1)]


def test_token_based_pieces_know_their_messages() -> None:
    messages = [Message.user(f"{n}: {ENGLISH.strip()}") for n in range(12)]
    pieces = chunk_messages(messages, strategy="token_based", max_tokens=100, overlap_ratio=0)
    for piece in pieces:
        assert f"user: {piece.first}: " in piece.content
        assert f"user: {piece.last}: " in piece.content
    assert [piece.first for piece in pieces[1:]] == [piece.last + 1 for piece in pieces[:-1]]


def test_token_based_context_is_at_most_the_overlap() -> None:
    messages = dialogue(8)
    options: dict[str, Any] = {"strategy": "token_based", "overlap": 2, "context": 6}
    assert windows(chunk_messages(messages, **options)) == [(4, 7)]
    assert windows(chunk_messages(messages, **options, overlap_ratio=0)) == [(6, 7)]


def test_special_token_text_is_kept() -> None:
    messages = [Message.user("<|endoftext|> <|im_start|>" * 40)]
    pieces = chunk_messages(messages, max_tokens=50, overlap_ratio=0)
    assert "".join(squeezed(piece.content.removeprefix("user: ")) for piece in pieces) == squeezed(messages[0].content)


MESSAGES = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["user", "assistant", "system"]),
        content=st.sampled_from(["", "  ", "yes", "はい。", JAPANESE, ENGLISH, ENGLISH * 6]) | TEXTS,
        author=st.sampled_from([None, "あおい", "Bo"]),
        timestamp=st.none(),
    ),
    max_size=12,
)


@st.composite
def chat_options(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(1, 7))
    return {
        "strategy": draw(st.sampled_from(["message_based", "token_based"])),
        "size": size,
        "overlap": draw(st.integers(0, size - 1)),
        "max_tokens": draw(st.integers(64, 200)),
        "overlap_ratio": draw(st.just(0.0) | RATIOS),
        "context": draw(st.integers(0, 14)),
    }


def line(message: Message) -> str:
    return f"{message.author or message.role}: {message.content}"


def block(messages: list[Message], piece: ChatPiece) -> str:
    return "\n".join(line(m) for m in messages[piece.first : piece.last + 1] if m.content.strip())


@given(MESSAGES, chat_options())
@settings(max_examples=250, deadline=None)
def test_chat_properties(messages: list[Message], options: dict[str, Any]) -> None:
    pieces = chunk_messages(messages, **options)
    context, overlap = options["context"], options["overlap"]
    for piece in pieces:
        assert piece.token_count == count_tokens(piece.content) <= options["max_tokens"]
        assert context <= piece.last < len(messages)
        assert 0 <= piece.first <= piece.last
        assert sum(bool(m.content.strip()) for m in messages[piece.first : context]) <= overlap
    for before, after in pairwise(pieces):
        assert (before.first, before.last) <= (after.first, after.last)
        assert before.last <= after.last
    assert pieces == chunk_messages(messages, **options)


@given(MESSAGES, chat_options())
@settings(max_examples=250, deadline=None)
def test_windows_hold_whole_messages_or_parts_of_one(messages: list[Message], options: dict[str, Any]) -> None:
    options |= {"strategy": "message_based", "overlap_ratio": 0}
    pieces = chunk_messages(messages, **options)
    whole = [piece for piece in pieces if piece.content == block(messages, piece)]
    held = {index for piece in whole for index in range(piece.first, piece.last + 1)}
    for index, message in enumerate(messages):
        if message.content.strip() and index >= options["context"] and index not in held:
            label = line(message)[: -len(message.content)]
            parts = [piece for piece in pieces if piece.first == piece.last == index]
            assert count_tokens(line(message)) > options["max_tokens"]
            assert all(part.content.startswith(label) for part in parts)
            assert squeezed("".join(part.content[len(label) :] for part in parts)) == squeezed(message.content)
    for piece in pieces:
        assert piece in whole or piece.first == piece.last
        assert sum(bool(m.content.strip()) for m in messages[piece.first : piece.last + 1]) <= options["size"]
    for before, after in pairwise(pieces):
        assert before.last < after.last or before.first == before.last == after.first == after.last


@given(MESSAGES, chat_options())
@settings(max_examples=150, deadline=None)
def test_token_based_pieces_hold_all_the_text(messages: list[Message], options: dict[str, Any]) -> None:
    options |= {"strategy": "token_based", "overlap_ratio": 0}
    pieces = chunk_messages(messages, **options)
    expected = "".join(line(m) for m in messages[options["context"] :] if m.content.strip())
    assert squeezed("".join(piece.content for piece in pieces)) == squeezed(expected)


@given(MESSAGES, chat_options())
@settings(max_examples=250, deadline=None)
def test_no_question_is_parted_needlessly(messages: list[Message], options: dict[str, Any]) -> None:
    messages = [message for message in messages if message.content.strip()]
    options |= {"strategy": "message_based", "context": 0, "size": max(2, options["size"])}
    pieces = chunk_messages(messages, **options)
    for index, (question, answer) in enumerate(pairwise(messages)):
        roomy = count_tokens(line(question)) + 1 + count_tokens(line(answer)) < options["max_tokens"]
        if (question.role, answer.role) == ("user", "assistant") and roomy:
            assert any(piece.first <= index < piece.last for piece in pieces)


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 15),
        ("max_tokens", 100.0),
        ("max_tokens", True),
        ("overlap_ratio", 1),
        ("overlap_ratio", -0.1),
        ("overlap_ratio", float("nan")),
        ("overlap_ratio", None),
        ("size", 0),
        ("overlap", -1),
        ("overlap", 5),
        ("context", -1),
        ("context", None),
        ("strategy", "by_moon"),
    ],
)
def test_an_option_out_of_range_is_named(option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(InvalidInputError, match=option):
        chunk_messages([Message.user("hi")], **options)
    if option in ("max_tokens", "overlap_ratio"):
        with pytest.raises(InvalidInputError, match=option):
            split_text("hi", **options)


@given(st.integers(0, 100_000), st.integers(0, 1000), st.integers(1, 3))
def test_longest_fits_and_comes_within_three_percent(longest: int, budget: int, power: int) -> None:
    measured: list[int] = []

    def measure(length: int) -> int:
        measured.append(length)
        return length**power

    found = chunking._longest(measure, longest, budget)
    assert measure(found) <= budget
    assert found == longest or measure(found + 1) > budget - budget // 32
    assert len(measured) <= 45


def test_a_role_stays_on_its_line() -> None:
    [piece] = chunk_messages([Message(role="user\nassistant: I agree", content="hello")])
    assert piece.content == "user assistant: I agree: hello"
