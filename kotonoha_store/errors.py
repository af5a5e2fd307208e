"""Every error that this library raises on purpose.

::

    StoreError
    ├── ConfigurationError            a setting, an extra or a server is not as needed
    │   ├── ExtensionMissingError     the server lacks pgvector
    │   └── EmbedderConfigurationError  (also an EmbeddingError)
    ├── InvalidInputError             (also a ValueError) the value cannot be stored or searched
    │   └── InvalidVectorError
    ├── NotFoundError                 no such session, source or dead letter
    ├── StaleSessionError             somebody changed the session first
    ├── LeaseLostError                the job belongs to another worker now
    ├── ModelMismatchError            the vectors found are of another embedding model
    ├── SchemaOutdatedError           the database is not at this library's revision
    ├── StoreUnavailableError         the database did not answer; trying again makes sense
    │   └── StoreTimeoutError
    └── EmbeddingError                the embedder did not return a vector for each text
        ├── RateLimitedError
        ├── TransientEmbeddingError
        ├── UnembeddableTextError
        └── EmbedderConfigurationError

Each message says what happened and what to do about it. The driver's own error, where there
was one, is kept as ``__cause__``.
"""

from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy.exc import DontWrapMixin


class ErrorCode(StrEnum):
    """Why a chunk could not be embedded, as stored with jobs, dead letters and sources."""

    EMBEDDING_API_TIMEOUT = "EMBEDDING_API_TIMEOUT"
    RATE_LIMIT = "RATE_LIMIT"
    AUTHENTICATION_ERROR = "AUTHENTICATION_ERROR"
    PERMISSION_ERROR = "PERMISSION_ERROR"
    NOT_FOUND = "NOT_FOUND"
    SERVER_ERROR = "SERVER_ERROR"
    INVALID_INPUT = "INVALID_INPUT"
    UNKNOWN_ERROR = "UNKNOWN_ERROR"
    EMBEDDING_MAX_RETRIES_EXCEEDED = "EMBEDDING_MAX_RETRIES_EXCEEDED"


class StoreError(Exception):
    """Root of every error below; catch it to catch them all."""


class ConfigurationError(StoreError):
    """A setting is missing or wrong, an extra is not installed, or the server lacks something.

    Trying again will not help; the message names the setting, the extra or the statement.
    """


class ExtensionMissingError(ConfigurationError):
    """The server has no usable ``vector`` extension and this role may not create it."""


class InvalidInputError(StoreError, ValueError, DontWrapMixin):
    """The value can be neither stored nor searched. Nothing was written; correct the value."""

    # DontWrapMixin: raised by a column type on bind, it reaches the caller as it is.


class InvalidVectorError(InvalidInputError):
    """Wrong dimension, NaN, infinity, beyond half precision, or a vector of zeros."""


class NotFoundError(StoreError, LookupError):
    """No row has that key or id. It may have been deleted meanwhile."""


class StaleSessionError(StoreError):
    """The session changed after it was loaded. Load it again, repeat the change, save."""


class LeaseLostError(StoreError):
    """Another worker holds these jobs now. Drop the result; nothing of it was written.

    Attributes:
        chunk_ids: the chunks whose lease was lost.
    """

    def __init__(self, message: str, chunk_ids: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.chunk_ids = tuple(chunk_ids)


class ModelMismatchError(StoreError):
    """There are vectors in the scope searched, but none of the query's own model.

    Search with the embedder that made them, or embed the chunks again with the new one.
    """


class SchemaOutdatedError(StoreError):
    """A table or column is missing. Run ``alembic upgrade head`` or ``await store.migrate()``."""


class StoreUnavailableError(StoreError):
    """The database could not be reached or ended the connection. Trying again makes sense."""


class StoreTimeoutError(StoreUnavailableError):
    """A statement ran longer than ``DB_COMMAND_TIMEOUT``, or no connection came free in time."""


class EmbeddingError(StoreError):
    """The embedder did not return one usable vector per text.

    Attributes:
        code: what is stored with the chunk.
    """

    code: ErrorCode = ErrorCode.UNKNOWN_ERROR

    def __init__(self, message: str, *, code: ErrorCode | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class RateLimitedError(EmbeddingError):
    """The provider asks to wait; the texts are not at fault.

    Attributes:
        retry_after: seconds the provider asked for, or None if it did not say.
    """

    code = ErrorCode.RATE_LIMIT

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TransientEmbeddingError(EmbeddingError):
    """A time-out, a lost connection, a 5xx or a malformed answer; the same call may succeed later."""

    code = ErrorCode.SERVER_ERROR


class UnembeddableTextError(EmbeddingError):
    """The provider refuses at least one of these texts for what it is. Split the batch to find it.

    With code INVALID_INPUT the text becomes a dead letter at once, with any other one after its attempts.
    """

    code = ErrorCode.INVALID_INPUT


class EmbedderConfigurationError(EmbeddingError, ConfigurationError):
    """Key, permission, model name or dimension is wrong: no text can be embedded until it is mended."""

    code = ErrorCode.AUTHENTICATION_ERROR
