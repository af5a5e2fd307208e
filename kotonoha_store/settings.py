"""Every environment variable of the library, validated in one place.

Secrets are :class:`pydantic.SecretStr`: no repr, log line or error shows them.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kotonoha_store.errors import ConfigurationError

# Bounded, since timedelta and PostgreSQL's intervals are.
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Hours = Annotated[float, Field(le=1_000_000)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Size = Annotated[int, Field(ge=0, lt=2**31)]


def _number(value: object) -> object:
    """Variables are strings, which Literal[16] would refuse."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


class Settings(BaseSettings):
    """Settings from the environment and, when there is one, a ``.env`` file.

    Each field is read from the environment variable of its own name in capitals; as keyword
    arguments the names are lower case: ``Settings(kb_default_top_k=5)``.

    Raises:
        ConfigurationError: a value is out of its range, a keyword names no setting, or the ``.env`` file
            cannot be read; the message names the variable, never its value.
    """

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", extra="ignore", env_ignore_empty=True, frozen=True
    )

    # Where the database is. POSTGRES_HOST, when set, wins over DATABASE_URL; with neither, the
    # embedded server serves.
    database_url: SecretStr | None = None
    postgres_host: str | None = None
    postgres_port: Annotated[int, Field(ge=1, le=65535)] = 5433
    postgres_db: str = "kotonoha"
    postgres_user: str = "kotonoha"
    postgres_password: SecretStr | None = None
    # The same database without the pooler, for migrations, backups and LISTEN.
    database_direct_url: SecretStr | None = None
    # A streaming replica of it, which serves searches.
    database_replica_url: SecretStr | None = None
    kb_embedded_dir: Path | None = None
    kb_embedded_version: Annotated[Literal[16, 18], BeforeValidator(_number)] = 18

    # Connections. Seconds.
    db_pool_min_size: Size = 5
    db_pool_max_size: Count = 20
    db_command_timeout: Seconds = 60.0
    db_connect_timeout: Seconds = 10.0
    db_connect_attempts: Count = 5
    # Whether a pooler in transaction mode stands between: auto tells by the URL (-pooler, ports 6432, 6543).
    db_pooler: Literal["auto", "none", "transaction"] = "auto"

    # How long a search that must see a write waits for the replica to have it, before the primary answers.
    kb_replica_wait_seconds: Annotated[float, Field(ge=0, le=60)] = 1.0
    # A replica further behind than this is not asked.
    kb_replica_max_lag_seconds: Seconds = 30.0

    # The HNSW index, read when migrating. Ranges: pgvector, "Index options".
    kb_hnsw_m: Annotated[int, Field(ge=2, le=100)] = 16
    kb_hnsw_ef_construction: Annotated[int, Field(ge=4, le=1000)] = 64

    kb_similarity_threshold: Annotated[float, Field(ge=0, le=1)] = 0.7
    kb_default_top_k: Annotated[int, Field(ge=1, le=1000)] = 10
    # Up to how many candidates a search compares every one, instead of what was measured to be cheapest.
    kb_exact_search_limit: Size | None = None

    # Which embedder Store.open() makes. auto: OpenAI when OPENAI_API_KEY or OPENAI_BASE_URL is set.
    kb_embedder: Literal["auto", "openai", "local", "hashing"] = "auto"
    kb_embedding_model: str | None = None
    openai_api_key: SecretStr | None = None
    openai_base_url: str | None = None

    kb_embedding_max_retry: Count = 3
    kb_embedding_batch_size: Annotated[int, Field(ge=1, le=2048)] = 100
    kb_embedding_max_concurrent: Count = 5
    kb_embedding_interval_minutes: Annotated[float, Field(gt=0, le=60_000_000)] = 1.0
    # Renewed each third of it; what a killed worker held comes back after it.
    kb_embedding_lease_seconds: Annotated[float, Field(ge=1, le=86_400)] = 300.0
    # Of one request to the provider. OpenAI, "Create embeddings": at most 300,000 tokens over all inputs.
    kb_embedding_request_tokens: Count = 300_000
    # Whether a text that has a vector of the same model already gets that one instead of paying again.
    kb_embedding_reuse: bool = True

    # Whether long-running loops are woken by LISTEN; off, or behind a transaction pooler, they only poll.
    kb_listen: bool = True
    # How long running work may go on after a stop was asked for.
    kb_drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30.0

    kb_chunk_max_tokens: Annotated[int, Field(ge=16, le=8191)] = 4000
    kb_chunk_overlap_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2
    kb_chunk_insert_batch_size: Count = 100
    kb_chunk_update_batch_size: Count = 100

    kb_archive_threshold_hours: Annotated[Hours, Field(ge=0)] = 1.0
    kb_archive_batch_size: Count = 10
    kb_archive_interval_hours: Annotated[Hours, Field(gt=0)] = 1.0
    kb_archive_overlap_messages: Size = 5
    # From how many messages on a session is archived while it is in use.
    kb_archive_max_messages: Annotated[int, Field(ge=2, lt=2**31)] = 50
    kb_min_session_length: Size = 30

    kb_chat_chunk_strategy: Literal["message_based", "token_based"] = "message_based"
    kb_chat_chunk_size_messages: Count = 5
    kb_chat_chunk_overlap_messages: Size = 2

    def __init__(self, **values: Any) -> None:
        # extra="ignore" is for the .env file, which other programs share; in a call it is a slip.
        names = (name for name in values if not name.startswith("_"))
        if unknown := sorted(name for name in names if name.lower() not in type(self).model_fields):
            raise ConfigurationError(f"there is no setting named {', '.join(unknown)}")
        try:
            super().__init__(**values)
        except (UnicodeDecodeError, OSError):
            # From None: the error holds the file's bytes.
            raise ConfigurationError("the .env file cannot be read; it must be UTF-8 text") from None
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])).upper() or 'settings'}: {e['msg'].removeprefix('Value error, ')}"
                for e in error.errors(include_input=False, include_url=False)
            )
            # From None: pydantic's own error repeats the values, and one of them may be a secret.
            raise ConfigurationError(f"invalid settings: {problems}") from None

    @field_validator("openai_base_url")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        # HTTP clients log the URL.
        if value is not None and "@" in value.split("//", 1)[-1].split("/", 1)[0]:
            raise ValueError("must not hold a user or password; the key belongs in OPENAI_API_KEY")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.db_pool_min_size > self.db_pool_max_size:
            raise ValueError("DB_POOL_MIN_SIZE must not exceed DB_POOL_MAX_SIZE")
        # pgvector refuses to build the index otherwise.
        if self.kb_hnsw_ef_construction < 2 * self.kb_hnsw_m:
            raise ValueError("KB_HNSW_EF_CONSTRUCTION must be at least twice KB_HNSW_M")
        if self.kb_chat_chunk_overlap_messages >= self.kb_chat_chunk_size_messages:
            raise ValueError("KB_CHAT_CHUNK_OVERLAP_MESSAGES must be less than KB_CHAT_CHUNK_SIZE_MESSAGES")
        if self.kb_archive_max_messages <= self.kb_archive_overlap_messages:
            raise ValueError("KB_ARCHIVE_MAX_MESSAGES must be more than KB_ARCHIVE_OVERLAP_MESSAGES")
        return self

    @property
    def uses_embedded_server(self) -> bool:
        """Whether neither DATABASE_URL nor POSTGRES_HOST is set."""
        return self.database_url is None and self.postgres_host is None
