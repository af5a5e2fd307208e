"""A small embedding server with OpenAI's protocol that misbehaves on request.

::

    async with EmbeddingServer() as server:
        server.script(status(429, headers={"retry-after": "2"}), hang(), ok)
        embedder = OpenAIEmbedder(base_url=server.base_url)

Each request takes the next behaviour of the script; when there is none left, ``server.default``, which is
:func:`ok` unless set to something else. A behaviour is any ``Callable[[dict], Reply]``: parsed body in, reply out.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Body = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the server sends, and how badly."""

    status: int = 200
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    after: asyncio.Event | None = None  # nothing is sent before
    delay: float = 0.0  # seconds before the first byte; infinity: never
    trickle: float = 0.0  # seconds between two bytes of the body
    close: bool = False  # hang up instead of answering
    cut: bool = False  # hang up in the middle of the body


Behaviour = Callable[[Body], Reply]


def vector_of(text: str, dimension: int = 1536) -> NDArray[np.float32]:
    """Return the vector of length 1 that the server gives this text: same text, same vector."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    vector = np.random.default_rng(seed).standard_normal(dimension)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def vectors_of(texts: list[str], size: int = 1536) -> NDArray[np.float32]:
    return np.stack([vector_of(text, size) for text in texts])


def texts_of(body: Body) -> list[str]:
    """Return the texts of a request, which may send one alone as a string."""
    return [body["input"]] if isinstance(body["input"], str) else list(body["input"])


def answer(
    body: Body,
    change: Callable[[list[Body]], list[Body]] = lambda items: items,
    *,
    vector: Callable[[str, int], NDArray[np.float32]] = vector_of,
    dimension: int | None = None,
    encoding: str | None = None,
) -> Reply:
    """Return a 200 whose items went through ``change``; the form of the vectors as asked for, or ``encoding``."""
    encoding = encoding or body.get("encoding_format", "float")
    size = dimension or body.get("dimensions", 1536)
    items: list[Body] = []
    for index, text in enumerate(texts_of(body)):
        numbers = vector(text, size).astype("<f4")
        embedding = base64.b64encode(numbers.tobytes()).decode() if encoding == "base64" else numbers.tolist()
        items.append({"object": "embedding", "index": index, "embedding": embedding})
    usage = {"prompt_tokens": len(items), "total_tokens": len(items)}
    whole = {"object": "list", "model": body.get("model"), "data": change(items), "usage": usage}
    return Reply(content=json.dumps(whole).encode())


def ok(body: Body) -> Reply:
    """A vector per text, in order."""
    return answer(body)


def status(code: int, *, headers: Mapping[str, str] | None = None, error: Mapping[str, Any] | None = None) -> Behaviour:
    """This status, with OpenAI's form of error body; ``error`` sets its message, type, param or code."""
    content = json.dumps({"error": {"message": "refused", "type": None, "param": None, "code": None, **(error or {})}})
    return lambda body: Reply(code, content.encode(), headers or {})


def echo(code: int) -> Behaviour:
    """This status, with the whole request, texts included, quoted in the error."""
    return lambda body: status(code, error={"message": f"bad request: {body}", "code": str(body)})(body)


def hang(body: Body) -> Reply:
    """No answer until the client gives up."""
    return Reply(delay=math.inf)


def held(until: asyncio.Event) -> Behaviour:
    """The right answer, once that has happened."""
    return lambda body: replace(ok(body), after=until)


def slow(seconds: float, then: Behaviour = ok) -> Behaviour:
    """``then``, after so many seconds."""
    return lambda body: replace(then(body), delay=seconds)


def trickle(body: Body) -> Reply:
    """A right answer, one byte in 10 ms: each read is quick and the whole takes for ever."""
    return replace(ok(body), trickle=0.01)


def close(body: Body) -> Reply:
    """The connection is closed without an answer."""
    return Reply(close=True)


def cut(body: Body) -> Reply:
    """The connection is closed in the middle of the answer."""
    return replace(ok(body), cut=True)


def short(body: Body) -> Reply:
    """The last item is missing."""
    return answer(body, lambda items: items[:-1])


def extra(body: Body) -> Reply:
    """There is an item too many."""
    return answer(body, lambda items: [*items, {**items[-1], "index": len(items)}])


def empty(body: Body) -> Reply:
    """There are no items."""
    return answer(body, lambda items: [])


def reordered(body: Body) -> Reply:
    """Backwards, with the right indexes."""
    return answer(body, lambda items: items[::-1])


def duplicate_index(body: Body) -> Reply:
    """Every index is 0."""
    return answer(body, lambda items: [{**item, "index": 0} for item in items])


def no_index(body: Body) -> Reply:
    """The items have no index."""
    return answer(body, lambda items: [{"embedding": item["embedding"]} for item in items])


def ragged(body: Body) -> Reply:
    """The last vector is shorter than the others (floats, whatever was asked for)."""
    return answer(
        body, lambda items: [*items[:-1], {**items[-1], "embedding": items[-1]["embedding"][:-1]}], encoding="float"
    )


def with_number(number: float) -> Behaviour:
    """The last vector's first number is replaced, by NaN for one."""

    def spoil(body: Body) -> Reply:
        bad = texts_of(body)[-1]

        def vector(text: str, dimension: int) -> NDArray[np.float32]:
            numbers = vector_of(text, dimension)
            if text == bad:
                numbers[0] = number
            return numbers

        return answer(body, vector=vector)

    return spoil


nan = with_number(math.nan)
"""The last vector holds NaN."""

infinite = with_number(math.inf)
"""The last vector holds infinity."""


def zero(body: Body) -> Reply:
    """Every vector is zero."""
    return answer(body, vector=lambda text, dimension: np.zeros(dimension, dtype=np.float32))


def dimension(size: int) -> Behaviour:
    """Vectors of this length, whatever was asked for."""
    return lambda body: answer(body, dimension=size)


def encoded(form: str) -> Behaviour:
    """``float`` or ``base64``, whatever was asked for."""
    return lambda body: answer(body, encoding=form)


def not_json(body: Body) -> Reply:
    """A 200 with a page of HTML."""
    return Reply(content=b"<html>Bad gateway</html>", headers={"content-type": "text/html"})


def poison(predicate: Callable[[str], bool], then: Behaviour = ok) -> Behaviour:
    """400 where any text of the batch satisfies ``predicate``, otherwise ``then``. Made for ``server.default``."""
    refuse = status(400, error={"type": "invalid_request_error"})
    return lambda body: refuse(body) if any(map(predicate, texts_of(body))) else then(body)


class EmbeddingServer:
    """The server, as an async context manager; listens on 127.0.0.1 and a free port of its own.

    Attributes:
        requests: parsed bodies in order of arrival.
        headers: the requests' headers, names in lower case.
        default: what happens when the script is empty.
        connections: sockets open now.
        in_flight, most_in_flight: requests without an answer now, and at most so far.
    """

    def __init__(self, default: Behaviour = ok) -> None:
        self.default = default
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self._script: deque[Behaviour] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()

    def script(self, *behaviours: Behaviour) -> None:
        """Add behaviours, one for each request to come."""
        self._script.extend(behaviours)

    @property
    def texts(self) -> list[str]:
        """Every text received, in order, repetitions included."""
        return [text for body in self.requests for text in texts_of(body)]

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until ``condition`` is true of requests, connections or in_flight; TimeoutError after 30 s."""
        async with asyncio.timeout(30):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop listening and drop every connection; :attr:`base_url` refuses connections from now on."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _count(self, connections: int = 0, in_flight: int = 0) -> None:
        self.connections += connections
        self.in_flight += in_flight
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self._changed.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._count(connections=1)
        try:
            while await self._serve_one(reader, writer):
                pass
        # Cancelled by aclose(): in 3.11 a streams callback that ends cancelled logs an error.
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._count(connections=-1)
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        if not head[0].startswith("POST /v1/embeddings "):
            return await self._send(writer, Reply(404, b'{"error": {"message": "no such path"}}'))
        body = json.loads(content)
        self.requests.append(body)
        self.headers.append(headers)
        behaviour = self._script.popleft() if self._script else self.default
        self._count(in_flight=1)
        try:
            reply = behaviour(body)
            if reply.after is not None:
                await reply.after.wait()
            if reply.delay:
                # A client that gives up hangs up; waiting for that, too, keeps `connections` true.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if math.isinf(reply.delay) else reply.delay):
                        await reader.read(1)
                        return False
            return await self._send(writer, reply)
        finally:
            self._count(in_flight=-1)

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        if reply.close:
            return False
        headers = {"content-type": "application/json", "content-length": str(len(reply.content)), **reply.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {reply.status} Whatever\r\n{lines}\r\n".encode("latin-1"))
        if reply.cut:
            writer.write(reply.content[: len(reply.content) // 2])
        elif reply.trickle:
            for i in range(len(reply.content)):
                writer.write(reply.content[i : i + 1])
                await writer.drain()
                await asyncio.sleep(reply.trickle)
        else:
            writer.write(reply.content)
        await writer.drain()
        return not reply.cut
