"""Token counts: exact, without the network, quick on anything."""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kotonoha_store import tokens
from kotonoha_store.tokens import count_tokens

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
WORDS = st.lists(
    st.sampled_from(["word", "語", "12345", " ", "  ", "\n", "\r\n", "'s", "don't", "。", "、", "_", "é", "👨‍👩‍👧"])
)


def reference(text: str) -> int:
    encode = tokens._encoder()
    assert encode is not None
    return len(encode(text))


@pytest.fixture
def without_bpe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "bpe_openai", None)
    tokens._encoder.cache_clear()
    yield
    tokens._encoder.cache_clear()


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("hello world", 2), ("tiktoken is great!", 6), ("お誕生日おめでとう", 9), ("\n", 1)],
)
def test_published_counts(text: str, count: int) -> None:
    assert count_tokens(text) == count


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|fim_prefix|>", "<|endofprompt|>", "<|im_start|>"])
def test_special_token_text_is_ordinary_text(name: str) -> None:
    assert count_tokens(name) > 1
    assert count_tokens(f"before {name} after") > count_tokens("before  after")


def test_a_lone_surrogate_does_not_raise() -> None:
    assert count_tokens("a\ud800b") > 0


@given(ANY_TEXT)
def test_short_text_is_counted_exactly(text: str) -> None:
    assert count_tokens(text) == reference(text)


@given(ANY_TEXT | WORDS.map("".join))
@example("it's 1234567 o'clock, isn't it?  \n\n yes")
@settings(max_examples=300)
def test_cutting_at_a_break_keeps_the_count(text: str) -> None:
    for match in tokens._BREAK.finditer(text):
        assert count_tokens(text[: match.end()]) + count_tokens(text[match.end() :]) == count_tokens(text)


@given(st.lists(ANY_TEXT | WORDS.map("".join)))
@example(["a  \n\n", "(b)。", "!\r", "c \t"])
@settings(max_examples=300)
def test_the_counts_of_lines_add_up(texts: list[str]) -> None:
    lines = [f"user: {text}" for text in texts] + ["user: "]
    counted = sum(count_tokens(f"{line}\n") for line in lines[:-1]) + count_tokens(lines[-1])
    assert counted == count_tokens("\n".join(lines))


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox jumps over the lazy dog, 12345 times.\r\n\r\n  It's fine. " * 2_500,
        "吾輩は猫である。名前はまだ無い。どこで生れたか、とんと見当がつかぬ。\n" * 4_000,
    ],
    ids=["english", "japanese"],
)
def test_long_text_is_counted_exactly_in_slices(text: str) -> None:
    assert len(text) > 2 * tokens.SLICE_CHARS
    assert count_tokens(text) == reference(text)


@given(ANY_TEXT, st.integers(1, 20))
def test_slices_lose_nothing(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "SLICE_CHARS", size)
        parts = list(tokens._slices(text))
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("a" * 10_000_000, 1_250_000, 1_251_000),
        ("あ" * 1_000_000, 1_000_000, 1_000_100),
        (" " * 2_000_000, 15_625, 15_900),
        ("QUJD+/xyz0" * 100_000, 400_000, 1_000_000),
    ],
    ids=["letter", "kana", "spaces", "base64"],
)
def test_hostile_text_is_counted_quickly(text: str, least: int, most: int) -> None:
    count_tokens("load")
    # Of this thread alone, whatever else the machine does.
    started = time.thread_time()
    count = count_tokens(text)
    assert time.thread_time() - started < 10
    assert least <= count <= most


@pytest.mark.usefixtures("without_bpe")
def test_without_bpe_openai_bytes_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert count_tokens("aé日😀") == 1 + 2 + 3 + 4
        assert count_tokens("\ud800") == 3
    # Whatever the collection of an earlier test's garbage makes others say.
    said = [record.getMessage() for record in caplog.records if record.name == tokens.__name__]
    assert len(said) == 1
    assert "bpe_openai" in said[0]


@given(ANY_TEXT)
def test_bytes_are_an_upper_bound(text: str) -> None:
    assert count_tokens(text) <= len(text.encode())


def test_importing_loads_no_table() -> None:
    code = "import sys, kotonoha_store.tokens, kotonoha_store.chunking; sys.exit('bpe_openai' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_survives_warnings_as_errors() -> None:
    code = "from kotonoha_store.tokens import count_tokens; assert count_tokens('hello world') == 2"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
