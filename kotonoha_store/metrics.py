"""What can be measured while a store works, under the names that Prometheus scrapes.

With the extra ``metrics`` the figures stand in prometheus_client's default registry: serve them with
``prometheus_client.start_http_server`` or ``make_asgi_app``. Without it, the same names are objects that do nothing.
A registry takes each name once, so this module cannot be loaded a second time in one process (``importlib.reload``).
All times are seconds.
"""

import threading
from collections.abc import Iterator
from typing import Any, Final
from weakref import WeakSet

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

try:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector

    IS_MEASURING: Final = True
except ImportError:
    IS_MEASURING = False  # type: ignore[misc]  # Final in the other branch

    class _Nothing:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def labels(self, *_: object, **__: object) -> "_Nothing":
            return self

        def _ignore(self, *_: object, **__: object) -> None:
            pass

        inc = dec = set = observe = _ignore

    Counter = Gauge = Histogram = _Nothing  # type: ignore[assignment,misc]  # stands in for the classes of the client

# From an indexed lookup to DB_COMMAND_TIMEOUT; from a local model's answer to a slow provider's; one session's archive.
_QUERY_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_EMBEDDING_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ARCHIVE_BUCKETS: Final = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

EMBEDDING_SECONDS: Final = Histogram(
    "embedding_processing_seconds",
    "One request to the embedder, failed ones included",
    buckets=_EMBEDDING_BUCKETS,
)
PENDING_CHUNKS: Final = Gauge(
    "pending_chunks_count", "Chunks that wait for their vector", multiprocess_mode="mostrecent"
)
DEAD_LETTERS: Final = Gauge("dead_letters_count", "Chunks that could not be embedded", multiprocess_mode="mostrecent")
OLDEST_JOB_SECONDS: Final = Gauge(
    "oldest_job_age_seconds",
    "How long the oldest waiting chunk has waited, 0 without any",
    multiprocess_mode="mostrecent",
)
PAUSED_PROVIDERS: Final = Gauge(
    "paused_providers_count", "Embedding providers that are left alone", multiprocess_mode="mostrecent"
)
EMBEDDING_ERRORS: Final = Counter(
    "embedding_errors_total", "Requests to the embedder that failed, by error code", ["error_type"]
)
EMBEDDINGS: Final = Counter("embedding_processed_total", "Chunks that got their vector")
QUERY_SECONDS: Final = Histogram(
    "db_query_duration_seconds",
    "One call of a repository, by module and method, waiting for connection and locks included",
    ["query_type"],
    buckets=_QUERY_BUCKETS,
)
ARCHIVE_SECONDS: Final = Histogram("session_archive_seconds", "The archive of one session", buckets=_ARCHIVE_BUCKETS)
SESSIONS_ARCHIVED: Final = Counter("sessions_archived_total", "Archives of a session, of a part of it included")
ARCHIVE_ERRORS: Final = Counter(
    "sessions_archived_errors_total", "Archives of a session that failed, by type of error", ["error_type"]
)
REPLICA_FALLBACKS: Final = Counter(
    "replica_fallbacks_total", "Reads for the replica that the primary answered, by reason", ["reason"]
)

QUEUE_GAUGES: Final = (PENDING_CHUNKS, DEAD_LETTERS, OLDEST_JOB_SECONDS, PAUSED_PROVIDERS)
"""What :meth:`EmbeddingQueue.depth` and :meth:`EmbeddingQueue.pauses` bring up to date."""

_engines: Final[WeakSet[AsyncEngine]] = WeakSet()
_engines_lock: Final = threading.Lock()


def watch_pool(engine: AsyncEngine) -> None:
    """Count the engine's pool in ``db_pool_size`` for as long as the engine lives."""
    # Locked: a scrape iterates in a thread of its own.
    with _engines_lock:
        _engines.add(engine)


def pool_sizes() -> dict[str, int]:
    """Return how many connections of all pools are ``in_use`` and ``idle``."""
    with _engines_lock:
        pools = [engine.pool for engine in _engines]
    sizes = {"in_use": 0, "idle": 0}
    for pool in pools:
        if isinstance(pool, QueuePool):
            sizes["in_use"] += pool.checkedout()
            sizes["idle"] += pool.checkedin()
    return sizes


if IS_MEASURING:

    class _PoolSizes(Collector):
        # Read at the scrape: a gauge set at checkout and checkin would tax every statement.
        def collect(self) -> Iterator[Any]:
            family = GaugeMetricFamily("db_pool_size", "Connections of the pools, by state", labels=["state"])
            for state, size in pool_sizes().items():
                family.add_metric([state], size)
            yield family

    REGISTRY.register(_PoolSizes())
