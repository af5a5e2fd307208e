"""The tables of the core system, as ``alembic upgrade head`` leaves them.

The models mirror the DDL to the letter, column order included: a test compares ``pg_dump`` of a
migrated database with one made from this metadata. Beside each index stands the query it serves.
"""

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Connection,
    DateTime,
    Double,
    Enum,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    event,
    text,
)
from sqlalchemy import Uuid as UuidType
from sqlalchemy.dialects.postgresql import JSONB, TSVECTOR
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from kotonoha_store.columns import HalfVector
from kotonoha_store.records import SessionStatus, SourceStatus, SourceType


class Base(DeclarativeBase):
    """Declarative base of the core system's tables; ``Base.metadata`` is what migrations compare with."""

    # The names PostgreSQL itself would give, since the seed's script leaves the naming to it.
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "uq": "%(table_name)s_%(column_0_name)s_key",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "ck": "chk_%(constraint_name)s",
            "ix": "idx_%(table_name)s_%(column_0_name)s",
        }
    )


def _enum(python_enum: type[Any], name: str) -> Enum:
    return Enum(python_enum, name=name, values_callable=lambda members: [member.value for member in members])


# None is NULL, not JSON's null, which NOT NULL would let pass.
_JSON = JSONB(none_as_null=True)
_EMPTY_OBJECT = text("'{}'::jsonb")
_EMPTY_ARRAY = text("'[]'::jsonb")
_NOW = text("CURRENT_TIMESTAMP")

Id = Annotated[int, mapped_column(BigInteger, primary_key=True)]
Snowflake = Annotated[int | None, mapped_column(BigInteger)]
"""A Discord id: 64 bits, beyond what a JSON number in JavaScript holds."""
Moment = Annotated[datetime | None, mapped_column(DateTime(timezone=True))]
Now = Annotated[datetime, mapped_column(DateTime(timezone=True), server_default=_NOW)]
OptionalText = Annotated[str | None, mapped_column(Text)]
RequiredText = Annotated[str, mapped_column(Text)]
JsonObject = Annotated[dict[str, Any], mapped_column(_JSON, server_default=_EMPTY_OBJECT)]
Zero = Annotated[int, mapped_column(Integer, server_default=text("0"))]
One = Annotated[int, mapped_column(Integer, server_default=text("1"))]


class Session(Base):
    """Short-term memory: one conversation in progress, its messages in one JSON array."""

    __tablename__ = "sessions"

    id: Mapped[Id]
    session_key: Mapped[str] = mapped_column(Text, unique=True)
    session_type: Mapped[RequiredText]
    messages: Mapped[list[dict[str, Any]]] = mapped_column(_JSON, server_default=_EMPTY_ARRAY)
    status: Mapped[SessionStatus] = mapped_column(
        _enum(SessionStatus, "session_status_enum"), server_default=text("'active'")
    )
    guild_id: Mapped[Snowflake]
    channel_id: Mapped[Snowflake]
    thread_id: Mapped[Snowflake]
    user_id: Mapped[Snowflake]
    # Raised by every change; save() compares it.
    version: Mapped[One]
    # How many of the messages held now are archived already: they stay as context only.
    last_archived_message_index: Mapped[Zero]
    created_at: Mapped[Now]
    last_active_at: Mapped[Now]
    # How many messages were ever removed from the front: offset + position is an absolute index.
    messages_offset: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    # Raised by what is not a mere append (save, prune, restore); the archiver compares it.
    rewrite_version: Mapped[One]
    # last_active_at rounded up to five minutes, so that most appends change no indexed column (HOT).
    archive_due_at: Mapped[Now]
    # Set by the append that makes the session too long, taken back by the archiver.
    archive_requested_at: Mapped[Moment]

    __table_args__ = (
        CheckConstraint("last_archived_message_index >= 0 AND messages_offset >= 0", name="sessions_counters"),
        # sessions of a channel
        Index("idx_sessions_channel_id", "channel_id"),
        # sessions due for archiving, the longest quiet first
        Index("idx_sessions_archive_candidates", "archive_due_at", "id", postgresql_where=text("status = 'active'")),
        # sessions in use that have grown too long
        Index(
            "idx_sessions_archive_requested",
            "archive_requested_at",
            "id",
            postgresql_where=text("archive_requested_at IS NOT NULL"),
        ),
    )


class KnowledgeSource(Base):
    """Long-term memory: one archived conversation, document or page."""

    __tablename__ = "knowledge_sources"

    id: Mapped[Id]
    type: Mapped[SourceType] = mapped_column(_enum(SourceType, "source_type_enum"))
    title: Mapped[RequiredText]
    uri: Mapped[OptionalText]
    status: Mapped[SourceStatus] = mapped_column(
        _enum(SourceStatus, "source_status_enum"), server_default=text("'pending'")
    )
    error_code: Mapped[OptionalText]
    error_message: Mapped[OptionalText]
    # "metadata" is taken on declarative classes.
    source_metadata: Mapped[JsonObject] = mapped_column("metadata")
    created_at: Mapped[Now]
    updated_at: Mapped[Now]
    guild_id: Mapped[Snowflake]
    channel_id: Mapped[Snowflake]
    thread_id: Mapped[Snowflake]
    user_id: Mapped[Snowflake]
    # SHA-256 over type, URI and scope: adding the same document again finds this row.
    document_key: Mapped[bytes | None] = mapped_column(LargeBinary)
    origin_session_id: Mapped[int | None] = mapped_column(BigInteger)
    # Absolute index of the first archived message.
    origin_first_index: Mapped[int | None] = mapped_column(BigInteger)
    # The messages as they were, for restore(); not in metadata, which is indexed.
    archived_messages: Mapped[list[dict[str, Any]] | None] = mapped_column(_JSON)
    origin_session_key: Mapped[OptionalText]

    __table_args__ = (
        CheckConstraint("(origin_session_id IS NULL) = (origin_first_index IS NULL)", name="sources_origin"),
        # searches filtered by metadata containment
        Index("idx_sources_metadata", "metadata", postgresql_using="gin"),
        # sources not completed yet
        Index("idx_sources_status", "status"),
        # searches filtered by source type
        Index("idx_sources_type", "type"),
        # adding a document again; at most one source per document
        Index("idx_sources_document_key", "document_key", unique=True),
        # a message is archived once
        Index("idx_sources_origin", "origin_session_id", "origin_first_index", unique=True),
        # searches filtered by session key
        Index(
            "idx_sources_origin_session_key",
            "origin_session_key",
            postgresql_where=text("origin_session_key IS NOT NULL"),
        ),
    )


class KnowledgeChunk(Base):
    """A piece of a source; ``embedding`` is NULL until a worker has embedded it."""

    __tablename__ = "knowledge_chunks"

    id: Mapped[Id]
    source_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("knowledge_sources.id", ondelete="CASCADE"))
    content: Mapped[RequiredText]
    embedding: Mapped[NDArray[np.float16] | None] = mapped_column(HalfVector())
    location: Mapped[JsonObject]
    token_count: Mapped[int | None] = mapped_column(Integer)
    # Written when the chunk is buried or queued again, never while it is tried.
    retry_count: Mapped[Zero]
    created_at: Mapped[Now]
    # Which model made the vector; written with it.
    embedding_model: Mapped[OptionalText]
    # SHA-256 of the content.
    content_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    # Copies of the source's, so that a filter needs no join; set at insertion, never changed.
    guild_id: Mapped[Snowflake]
    channel_id: Mapped[Snowflake]
    thread_id: Mapped[Snowflake]
    user_id: Mapped[Snowflake]
    occurred_from: Mapped[Moment]
    occurred_to: Mapped[Moment]

    __table_args__ = (
        CheckConstraint("embedding IS NULL OR embedding_model IS NOT NULL", name="chunks_embedding_model"),
        # searches by meaning
        Index(
            "idx_chunks_embedding",
            "embedding",
            postgresql_using="hnsw",
            postgresql_ops={"embedding": "halfvec_cosine_ops"},
            postgresql_with={"m": 16, "ef_construction": 64},
        ),
        # the chunks of a source; the cascade of its deletion
        Index("idx_chunks_source_id", "source_id"),
        # the searchable chunks of a source, oldest first
        Index(
            "idx_chunks_searchable",
            "source_id",
            "created_at",
            postgresql_where=text("embedding IS NOT NULL AND token_count > 0"),
        ),
        # whether a source has chunks that wait
        Index("idx_chunks_queue", "source_id", "id", postgresql_where=text("embedding IS NULL")),
        # vectors of the same text, which need not be paid for again. The model as its hash, and no condition: else a
        # search would leave the HNSW graph for it as long as statistics know of no embedded chunk.
        Index("idx_chunks_content_hash", "content_hash", text("hashtextextended(embedding_model, 0)")),
        # searches within a scope
        Index("idx_chunks_guild_id", "guild_id", postgresql_where=text("guild_id IS NOT NULL")),
        Index("idx_chunks_channel_id", "channel_id", postgresql_where=text("channel_id IS NOT NULL")),
        Index("idx_chunks_thread_id", "thread_id", postgresql_where=text("thread_id IS NOT NULL")),
        Index("idx_chunks_user_id", "user_id", postgresql_where=text("user_id IS NOT NULL")),
        # searches within a time range
        Index("idx_chunks_occurred_to", "occurred_to", postgresql_where=text("occurred_to IS NOT NULL")),
        Index("idx_chunks_occurred_from", "occurred_from", postgresql_where=text("occurred_from IS NOT NULL")),
    )


class ChunkTerms(Base):
    """The words of a chunk and of its title, for searches by word (see :mod:`kotonoha_store.words`).

    A table of its own, because an update of a chunk would re-enter the GIN index too.
    """

    __tablename__ = "chunk_terms"

    chunk_id: Mapped[int] = mapped_column(
        BigInteger, ForeignKey("knowledge_chunks.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    # Read as text; written by COPY in its binary format.
    terms: Mapped[str] = mapped_column(TSVECTOR)
    # Title and content as phrases are looked up in them; NULL where folding changes nothing.
    folded: Mapped[OptionalText]

    __table_args__ = (
        # searches by word
        Index(
            "idx_chunk_terms_terms",
            "terms",
            postgresql_using="gin",
            postgresql_with={"gin_pending_list_limit": 16384},
        ),
    )


class TermFrequency(Base):
    """How rare the common terms are, from a sample of the chunks.

    The empty term has the number of chunks, ``#`` the newest chunk's id, when they were counted.
    """

    __tablename__ = "term_frequencies"

    # By bytes, so that terms with the same beginning stand together.
    term: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)
    # Share of all chunks, 0 to 1.
    frequency: Mapped[float] = mapped_column(Double)


class KnowledgeChunkDeadLetter(Base):
    """A chunk that could not be embedded, with all that is needed to queue it again.

    No foreign keys, on purpose: a dead letter outlives its source.
    """

    __tablename__ = "knowledge_chunks_dlq"

    id: Mapped[Id]
    original_chunk_id: Mapped[int | None] = mapped_column(BigInteger)
    source_id: Mapped[int | None] = mapped_column(BigInteger)
    source_title: Mapped[OptionalText]
    content: Mapped[RequiredText]
    error_code: Mapped[OptionalText]
    error_message: Mapped[OptionalText]
    retry_count: Mapped[Zero]
    created_at: Mapped[Now]
    last_retry_at: Mapped[Moment]
    source_type: Mapped[SourceType | None] = mapped_column(_enum(SourceType, "source_type_enum"))
    location: Mapped[JsonObject]
    token_count: Mapped[int | None] = mapped_column(Integer)
    # The model whose embedder gave up.
    embedding_model: Mapped[OptionalText]
    content_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    guild_id: Mapped[Snowflake]
    channel_id: Mapped[Snowflake]
    thread_id: Mapped[Snowflake]
    user_id: Mapped[Snowflake]
    occurred_from: Mapped[Moment]
    occurred_to: Mapped[Moment]
    chunk_created_at: Mapped[Moment]
    # Earlier deaths, the oldest first: code, attempts, model, when it was buried and queued again.
    history: Mapped[list[dict[str, Any]]] = mapped_column(_JSON, server_default=_EMPTY_ARRAY)

    __table_args__ = (
        # whether a source has dead letters
        Index("idx_dlq_source_id", "source_id"),
    )


class EmbeddingJob(Base):
    """The queue: one row per chunk still to embed, deleted when it is done.

    A table of its own, because an update of a chunk re-enters every index on it, the HNSW graph included.
    """

    __tablename__ = "embedding_jobs"

    chunk_id: Mapped[int] = mapped_column(
        BigInteger, ForeignKey("knowledge_chunks.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    # When it may be claimed; while it is leased, when the lease ends.
    available_at: Mapped[Now]
    lease_token: Mapped[UUID | None] = mapped_column(UuidType)
    # Counted at the claim, so that a text that kills its worker is counted too.
    attempts: Mapped[Zero]
    error_code: Mapped[OptionalText]
    created_at: Mapped[Now]
    # Of a chunk that was a dead letter: see there.
    history: Mapped[list[dict[str, Any]] | None] = mapped_column(_JSON)

    __table_args__ = (
        # the claim: due jobs, the longest due first
        Index("idx_embedding_jobs_available_at", "available_at", "chunk_id"),
    )


class EmbeddingPause(Base):
    """A provider that is left alone for a while, by all workers."""

    __tablename__ = "embedding_pauses"

    provider: Mapped[str] = mapped_column(Text, primary_key=True)
    paused_until: Mapped[Now]
    # Failed calls since the last one that succeeded.
    failures: Mapped[Zero]
    error_code: Mapped[OptionalText]
    updated_at: Mapped[Now]


TOUCH_FUNCTION: Final = """\
CREATE OR REPLACE FUNCTION kotonoha_touch_updated_at() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$$"""

TOUCH_TRIGGER: Final = """\
CREATE OR REPLACE TRIGGER trg_sources_touch_updated_at
BEFORE UPDATE ON knowledge_sources
FOR EACH ROW EXECUTE FUNCTION kotonoha_touch_updated_at()"""


# PostgreSQL sends equal notifications of one transaction once.
NOTIFY_FUNCTION: Final = """\
CREATE OR REPLACE FUNCTION kotonoha_notify_jobs() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    NOTIFY kotonoha_embedding_jobs;
    RETURN NULL;
END
$$"""

NOTIFY_TRIGGER: Final = """\
CREATE OR REPLACE TRIGGER trg_jobs_notify
AFTER INSERT ON embedding_jobs
FOR EACH STATEMENT EXECUTE FUNCTION kotonoha_notify_jobs()"""


# By its owner's right, since only that one may merge. Counted again when there are half as many chunks more, by
# their ids, since counting reads all. Terms of a scope (#) are no words.
REFRESH_TERMS_FUNCTION: Final = """\
CREATE OR REPLACE FUNCTION kotonoha_refresh_terms(force boolean DEFAULT false) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    AS $$
DECLARE
    sample_size CONSTANT integer := 2000;
    newest bigint := (SELECT max(chunk_id) FROM chunk_terms);
    known double precision := (SELECT frequency FROM term_frequencies WHERE term = '');
    counted_to double precision := (SELECT frequency FROM term_frequencies WHERE term = '#');
    size double precision := pg_relation_size('chunk_terms');
    counted_size double precision := (SELECT frequency FROM term_frequencies WHERE term = '#size');
    drawn bigint[];
    sample bigint[];
    chunks double precision;
BEGIN
    -- While the index is still being built there is nothing to merge.
    PERFORM gin_clean_pending_list(indexrelid) FROM pg_index
    WHERE indexrelid = to_regclass('idx_chunk_terms_terms') AND indisvalid;
    -- One id far above the others hides growth, which the size shows.
    IF abs(newest - counted_to) < known / 2 AND size < 1.5 * counted_size + 1000000 AND NOT force THEN
        RETURN;
    END IF;
    -- Whoever is counting already counts for all; with an old snapshot two that count would collide.
    IF NOT pg_try_advisory_xact_lock(7205110862154902382)
        OR current_setting('transaction_isolation') <> 'read committed'
    THEN
        RETURN;
    END IF;
    IF newest IS NULL THEN
        DELETE FROM term_frequencies;
        RETURN;
    END IF;
    IF newest > sample_size THEN
        drawn := ARRAY(SELECT DISTINCT 1 + floor(random() * newest)::bigint FROM generate_series(1, sample_size));
        sample := ARRAY(SELECT chunk_id FROM chunk_terms WHERE chunk_id = ANY (drawn));
        chunks := newest * (cardinality(sample)::double precision / cardinality(drawn));
    END IF;
    -- All of few; and where most ids are gone, the newest.
    IF coalesce(cardinality(sample), 0) < sample_size / 10 THEN
        sample := ARRAY(SELECT chunk_id FROM chunk_terms ORDER BY chunk_id DESC LIMIT sample_size);
        IF cardinality(sample) < sample_size THEN
            chunks := cardinality(sample);
        ELSE
            -- What VACUUM counted, where it did.
            chunks := greatest(
                chunks, sample_size, (SELECT reltuples FROM pg_class WHERE oid = 'chunk_terms'::regclass)
            );
        END IF;
    END IF;
    DELETE FROM term_frequencies;
    INSERT INTO term_frequencies (term, frequency)
    SELECT '', chunks
    UNION ALL
    SELECT '#', newest
    UNION ALL
    SELECT '#size', size
    UNION ALL (
        SELECT word, ndoc::double precision / cardinality(sample)
        FROM ts_stat(format('SELECT terms FROM chunk_terms WHERE chunk_id = ANY (%L::bigint[])', sample))
        WHERE word NOT LIKE '#%' AND (ndoc > 1 OR cardinality(sample) < sample_size / 10)
        ORDER BY ndoc DESC, word
        LIMIT 10000
    );
END
$$"""

# Of the tables' own schema: a caller's temporary table of the same name, with a trigger, would have the owner's right.
REFRESH_TERMS_PATH: Final = """\
DO $$ BEGIN EXECUTE format(
    'ALTER FUNCTION kotonoha_refresh_terms(boolean) SET search_path = %I, pg_temp', current_schema()
); END $$"""


# Uncompressed: a search reads the terms of its best candidates.
TERMS_STORAGE: Final = "ALTER TABLE chunk_terms ALTER COLUMN terms SET STORAGE EXTERNAL"

# Each append reads and writes the whole array; lz4 does both in a fraction of pglz's time.
MESSAGES_COMPRESSION: Final = """\
DO $$ BEGIN
    ALTER TABLE sessions ALTER COLUMN messages SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END $$"""

# In the row itself and not beside it: an exact scan reads one page where it read two or three.
VECTOR_STORAGE: Final = "ALTER TABLE knowledge_chunks ALTER COLUMN embedding SET STORAGE PLAIN"


# What SQLAlchemy has no construct for, so that metadata.create_all() makes the same database.
@event.listens_for(Base.metadata, "before_create")
def _create_extension(_: MetaData, connection: Connection, **__: Any) -> None:
    connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS vector")


@event.listens_for(Base.metadata, "after_create")
def _finish(_: MetaData, connection: Connection, **__: Any) -> None:
    connection.exec_driver_sql(TOUCH_FUNCTION)
    connection.exec_driver_sql(TOUCH_TRIGGER)
    connection.exec_driver_sql(NOTIFY_FUNCTION)
    connection.exec_driver_sql(NOTIFY_TRIGGER)
    connection.exec_driver_sql(MESSAGES_COMPRESSION)
    connection.exec_driver_sql(VECTOR_STORAGE)
    connection.exec_driver_sql(TERMS_STORAGE)
    connection.exec_driver_sql(REFRESH_TERMS_FUNCTION)
    connection.exec_driver_sql(REFRESH_TERMS_PATH)
