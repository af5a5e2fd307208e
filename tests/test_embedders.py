"""Embedders: against a real HTTP server that misbehaves, the real OpenAI client in between."""

import asyncio
import logging
import os
import socket
import time
import traceback
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

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
    held,
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
    vectors_of,
    with_number,
    zero,
)
from pydantic import SecretStr

from kotonoha_store.embedders import (
    Embedder,
    OpenAIEmbedder,
    embedder_from_settings,
)
from kotonoha_store.errors import (
    EmbedderConfigurationError,
    EmbeddingError,
    ErrorCode,
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
    embedder = OpenAIEmbedder(api_key=KEY, base_url=server.base_url, timeout=60.0)
    yield embedder
    await embedder.aclose()


# --- What is sent, and what comes back


async def test_each_text_gets_its_own_vector(server: EmbeddingServer, embedder: OpenAIEmbedder) -> None:
    protocol: Embedder = embedder
    vectors = await protocol.embed_documents(TEXTS)
    assert vectors.shape == (3, 1536)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, vectors_of(TEXTS))
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
    np.testing.assert_array_equal(await embedder.embed_documents(TEXTS), vectors_of(TEXTS))


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
    np.testing.assert_array_equal(await embedder.embed_documents(TEXTS), vectors_of(TEXTS))


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
    np.testing.assert_array_equal(await embedder.embed_documents(TEXTS), vectors_of(TEXTS))


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
    np.testing.assert_array_equal(vectors[:, :1024], vectors_of(TEXTS, 1024))
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
    server.script(status(429, headers={"retry-after": formatdate(time.time() + 600, usegmt=True)}))
    with pytest.raises(RateLimitedError) as caught:
        await embedder.embed_query("hello")
    assert caught.value.retry_after == pytest.approx(600, abs=60)


@pytest.mark.parametrize("behaviour", [hang, trickle, slow(60.0)])
async def test_a_call_ends_after_its_timeout(server: EmbeddingServer, behaviour: Behaviour) -> None:
    embedder = OpenAIEmbedder(base_url=server.base_url, timeout=0.2)
    # By default, not by the script: on a busy machine a call may end before its request has arrived.
    server.default = behaviour
    async with asyncio.timeout(30):
        with pytest.raises(TransientEmbeddingError) as caught:
            await embedder.embed_documents(TEXTS)
    assert caught.value.code is ErrorCode.EMBEDDING_API_TIMEOUT
    server.default = ok
    # Its sockets serve on, with time enough now.
    embedder._timeout, embedder._client = 30.0, embedder._client.with_options(timeout=30.0)
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
    # Bound, so that the port is nobody else's meanwhile.
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        embedder = OpenAIEmbedder(base_url=f"http://127.0.0.1:{deaf.getsockname()[1]}/v1")
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
        (openai.APITimeoutError(request=None), "within 60 s", ErrorCode.EMBEDDING_API_TIMEOUT),  # type: ignore[arg-type]  # no request is read
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
    embedder = OpenAIEmbedder(
        api_key=SecretStr(KEY), base_url=server.base_url, timeout=0.3 if behaviour is hang else 60.0
    )
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
    np.testing.assert_array_equal(await embedder.embed_documents(TEXTS), vectors_of(TEXTS))


async def test_calls_run_side_by_side(server: EmbeddingServer, embedder: OpenAIEmbedder) -> None:
    answering = asyncio.Event()
    server.default = held(answering)
    batches = [[f"{i}", f"text {i}"] for i in range(8)]
    calls = [asyncio.create_task(embedder.embed_documents(batch)) for batch in batches]
    await server.until(lambda: server.in_flight == 8)
    answering.set()
    for batch, vectors in zip(batches, await asyncio.gather(*calls), strict=True):
        np.testing.assert_array_equal(vectors, vectors_of(batch))
    assert server.most_in_flight == 8


async def test_settings_reach_the_server(server: EmbeddingServer) -> None:
    embedder = embedder_from_settings(Settings(_env_file=None, openai_api_key=KEY, openai_base_url=server.base_url))
    assert embedder is not None
    await embedder.embed_query("hello")
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    await embedder.aclose()
