"""The PostgreSQL memory of a conversational AI.

Sessions (short-term memory) are archived into sources and chunks (long-term memory); chunks wait in a
queue until a worker has embedded them; search finds them again. Start with :class:`Store`.
"""

from kotonoha_store.archive_restore import RestoredSession
from kotonoha_store.archiver import ArchivedSession, ArchiveReport, SessionArchiver
from kotonoha_store.bulk_load import LoadReport, NewDocument
from kotonoha_store.columns import EMBEDDING_DIMENSION, HalfVector
from kotonoha_store.database import Database
from kotonoha_store.document_parts import TextPart
from kotonoha_store.embedders import Embedder, HashingEmbedder, OpenAIEmbedder, SentenceTransformerEmbedder
from kotonoha_store.embedding_queue import EmbeddingQueue
from kotonoha_store.errors import (
    ConfigurationError,
    EmbedderConfigurationError,
    EmbeddingError,
    ErrorCode,
    ExtensionMissingError,
    InvalidInputError,
    InvalidVectorError,
    LeaseLostError,
    ModelMismatchError,
    NotFoundError,
    RateLimitedError,
    SchemaOutdatedError,
    StaleSessionError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    TransientEmbeddingError,
    UnembeddableTextError,
)
from kotonoha_store.health import CheckResult, HealthReport
from kotonoha_store.knowledge import KnowledgeRepository
from kotonoha_store.models import (
    Base,
    ChunkTerms,
    EmbeddingJob,
    EmbeddingPause,
    KnowledgeChunk,
    KnowledgeChunkDeadLetter,
    KnowledgeSource,
    Session,
    TermFrequency,
)
from kotonoha_store.recall import Citation, Recall
from kotonoha_store.recall_check import RecallReport
from kotonoha_store.records import (
    AppendResult,
    ClaimedChunk,
    DeadLetter,
    DocumentResult,
    EmbeddingReport,
    Lease,
    Message,
    NewChunk,
    ProviderPause,
    QueueDepth,
    Requeued,
    Scope,
    SessionRecord,
    SessionStatus,
    SessionSummary,
    SourceRecord,
    SourceStatus,
    SourceType,
)
from kotonoha_store.replicas import ReplicaStatus
from kotonoha_store.retrieval import SearchRepository
from kotonoha_store.search_records import (
    AnyFilters,
    BulkResult,
    CombinedFilters,
    Fusion,
    Neighbour,
    SearchFilters,
    SearchHit,
    SearchResult,
    SearchTimings,
)
from kotonoha_store.service_loop import stop_on_signals
from kotonoha_store.sessions import SessionRepository
from kotonoha_store.settings import Settings
from kotonoha_store.store import Store, UnitOfWork
from kotonoha_store.worker import EmbeddingWorker

__all__ = [
    "EMBEDDING_DIMENSION",
    "AnyFilters",
    "AppendResult",
    "ArchiveReport",
    "ArchivedSession",
    "Base",
    "BulkResult",
    "CheckResult",
    "ChunkTerms",
    "Citation",
    "ClaimedChunk",
    "CombinedFilters",
    "ConfigurationError",
    "Database",
    "DeadLetter",
    "DocumentResult",
    "Embedder",
    "EmbedderConfigurationError",
    "EmbeddingError",
    "EmbeddingJob",
    "EmbeddingPause",
    "EmbeddingQueue",
    "EmbeddingReport",
    "EmbeddingWorker",
    "ErrorCode",
    "ExtensionMissingError",
    "Fusion",
    "HalfVector",
    "HashingEmbedder",
    "HealthReport",
    "InvalidInputError",
    "InvalidVectorError",
    "KnowledgeChunk",
    "KnowledgeChunkDeadLetter",
    "KnowledgeRepository",
    "KnowledgeSource",
    "Lease",
    "LeaseLostError",
    "LoadReport",
    "Message",
    "ModelMismatchError",
    "Neighbour",
    "NewChunk",
    "NewDocument",
    "NotFoundError",
    "OpenAIEmbedder",
    "ProviderPause",
    "QueueDepth",
    "RateLimitedError",
    "Recall",
    "RecallReport",
    "ReplicaStatus",
    "Requeued",
    "RestoredSession",
    "SchemaOutdatedError",
    "Scope",
    "SearchFilters",
    "SearchHit",
    "SearchRepository",
    "SearchResult",
    "SearchTimings",
    "SentenceTransformerEmbedder",
    "Session",
    "SessionArchiver",
    "SessionRecord",
    "SessionRepository",
    "SessionStatus",
    "SessionSummary",
    "Settings",
    "SourceRecord",
    "SourceStatus",
    "SourceType",
    "StaleSessionError",
    "Store",
    "StoreError",
    "StoreTimeoutError",
    "StoreUnavailableError",
    "TermFrequency",
    "TextPart",
    "TransientEmbeddingError",
    "UnembeddableTextError",
    "UnitOfWork",
    "stop_on_signals",
]
