"""The whole library behind one object: :class:`Store`."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum
from functools import cached_property, partial
from time import perf_counter
from typing import Any, Final, Literal, TypedDict

from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import migrations
from kotonoha_store.archiver import SessionArchiver
from kotonoha_store.bulk_load import LoadReport, NewDocument, OnRejected, load_documents
from kotonoha_store.checks import check_count
from kotonoha_store.columns import VectorLike
from kotonoha_store.database import Database
from kotonoha_store.document_parts import TextPart, document_chunks
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.embedders import Embedder, embedder_from_settings
from kotonoha_store.embedding_queue import EmbeddingQueue
from kotonoha_store.errors import ConfigurationError, InvalidInputError, NotFoundError, StoreError
from kotonoha_store.health import LIMIT_SECONDS, CheckResult, Health, HealthReport
from kotonoha_store.knowledge import KnowledgeRepository
from kotonoha_store.recall import TOKENS_A_MESSAGE, Recall, assemble
from kotonoha_store.recall_check import RecallReport, recall_check
from kotonoha_store.records import DocumentResult, Progress, Scope, SessionRecord, SourceType
from kotonoha_store.replicas import Replica, ReplicaStatus, parse_position, write_position
from kotonoha_store.retrieval import SearchRepository
from kotonoha_store.search_records import AnyFilters, Fusion, SearchFilters, SearchResult
from kotonoha_store.search_request import Match, check_query, check_search
from kotonoha_store.selectivity import Effort, Remembered, Selectivity
from kotonoha_store.sessions import SessionRepository
from kotonoha_store.settings import Settings
from kotonoha_store.term_index import FIRST_ID, fill_terms, refresh_terms
from kotonoha_store.worker import EmbeddingWorker


class _Default(Enum):
    """Told apart from None, which means no threshold."""

    FROM_SETTINGS = "from settings"


FROM_SETTINGS: Final = _Default.FROM_SETTINGS


SearchMode = Literal["meaning", "words", "hybrid"]


_RECALL_MESSAGES: Final = 1000


class _Page(TypedDict):
    """What every search takes."""

    top_k: int
    offset: int
    filters: AnyFilters | None
    everywhere: bool
    neighbours: int


class _Ranking(TypedDict):
    """What searches by meaning take beside that."""

    model: str
    threshold: float | None
    effort: Effort
    diversity: float | None


@dataclass(frozen=True, slots=True)
class UnitOfWork:
    """The repositories of one transaction.

    Attributes:
        session: SQLAlchemy's AsyncSession, for statements of your own on the exported models.
        from_replica: whether it is a transaction of :meth:`Store.read` on the replica.
    """

    session: AsyncSession = field(repr=False)
    sessions: SessionRepository = field(repr=False)
    knowledge: KnowledgeRepository = field(repr=False)
    search: SearchRepository = field(repr=False)
    from_replica: bool = False


class Store:
    """Sessions, archive, queue and search of one database.

    Made by :meth:`open`. One per process is enough; any number of tasks may use it at once.
    """

    def __init__(
        self, database: Database, settings: Settings, embedder: Embedder | None, replica: Replica | None = None
    ) -> None:
        self.database = database
        self.settings = settings
        self._replica = replica
        self._embedder = embedder
        self._selectivities: Remembered[AnyFilters, Selectivity] = Remembered()

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings | None = None, embedder: Embedder | None = None) -> AsyncIterator["Store"]:
        """Open the store for the length of an ``async with`` block.

        Args:
            settings: from the environment where none are given. Where they name no database, the
                embedded server serves.
            embedder: made from the settings where none is given, and closed at the end; one that is
                given stays open.

        Raises:
            ConfigurationError: the settings cannot be used, or the embedded server cannot be started.
        """
        settings = settings or Settings()
        if embedder is not None and (isinstance(embedder, type) or not hasattr(embedder, "embed_documents")):
            raise ConfigurationError("embedder must be an embedder, such as HashingEmbedder() or OpenAIEmbedder()")
        own = embedder_from_settings(settings) if embedder is None else None
        try:
            async with await Database.open(settings) as database, AsyncExitStack() as stack:
                replica = Replica.from_settings(settings, database)
                if replica is not None:
                    stack.push_async_callback(replica.close)
                yield cls(database, settings, embedder or own, replica)
        finally:
            if own is not None:
                await own.aclose()

    async def migrate(self) -> None:
        """Bring the database to this library's revision; see :func:`kotonoha_store.migrations.upgrade`.

        Raises:
            ExtensionMissingError, ConfigurationError, StoreTimeoutError, StoreUnavailableError
        """
        await migrations.upgrade(self.database)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[UnitOfWork]:
        """One transaction: commits on a clean exit, rolls back on any exception."""
        async with self.database.begin() as session:
            yield self._unit(session)

    @asynccontextmanager
    async def read(self, *, after: str | None = None) -> AsyncIterator[UnitOfWork]:
        """One transaction that only reads, on the replica where DATABASE_REPLICA_URL names one that can be used.

        Else on the primary. What the block reads may be up to KB_REPLICA_MAX_LAG_SECONDS old.

        Args:
            after: what :meth:`write_position` returned: everything written before is seen.

        Raises:
            InvalidInputError: ``after`` is something else.
            StoreUnavailableError: the server was lost within the block. Run it again: another one answers.
            ConfigurationError: the block writes.
        """
        position = parse_position(after)
        async with AsyncExitStack() as stack:
            yield await self._reading(stack, position)

    async def write_position(self) -> str:
        """Return a token of everything committed so far: reads with ``after=token`` see it, whoever answers.

        A text, such as ``0/3000028``, that may be passed on to other processes. Costs a round trip to the primary.

        Raises:
            StoreUnavailableError: the primary did not answer.
        """
        return await write_position(self.database)

    async def replica_status(self) -> ReplicaStatus | None:
        """Ask the replica how it stands, within some seconds; None when DATABASE_REPLICA_URL is not set."""
        return None if self._replica is None else await self._replica.status()

    @property
    def embedder(self) -> Embedder:
        """The embedder that was given or configured.

        Raises:
            ConfigurationError: there is none.
        """
        if self._embedder is None:
            raise ConfigurationError(
                "no embedder is configured: set OPENAI_API_KEY, or KB_EMBEDDER=local with KB_EMBEDDING_MODEL, "
                "or KB_EMBEDDER=hashing (finds wording, not meaning), or pass embedder= to Store.open(); "
                "a search by vector may name its model= instead"
            )
        return self._embedder

    @cached_property
    def queue(self) -> EmbeddingQueue:
        """The queue of chunks that wait for their vector."""
        return EmbeddingQueue(
            self.database,
            lease=timedelta(seconds=self.settings.kb_embedding_lease_seconds),
            max_attempts=self.settings.kb_embedding_max_retry,
            update_batch_size=self.settings.kb_chunk_update_batch_size,
        )

    @cached_property
    def embedding_worker(self) -> EmbeddingWorker:
        """A worker on that queue with the store's embedder.

        Raises:
            ConfigurationError: there is no embedder.
        """
        settings = self.settings
        return EmbeddingWorker(
            self.queue,
            self.embedder,
            batch_size=settings.kb_embedding_batch_size,
            concurrency=settings.kb_embedding_max_concurrent,
            request_tokens=settings.kb_embedding_request_tokens,
            reuse=settings.kb_embedding_reuse,
            interval=timedelta(minutes=settings.kb_embedding_interval_minutes),
            listen=settings.kb_listen,
            drain=timedelta(seconds=settings.kb_drain_seconds),
        )

    @cached_property
    def archiver(self) -> SessionArchiver:
        """An archiver with the settings' thresholds and chunk sizes."""
        settings = self.settings
        return SessionArchiver(
            self.database,
            idle_for=timedelta(hours=settings.kb_archive_threshold_hours),
            batch_size=settings.kb_archive_batch_size,
            overlap_messages=settings.kb_archive_overlap_messages,
            max_messages=settings.kb_archive_max_messages,
            min_session_length=settings.kb_min_session_length,
            # At most a quarter of the pool: the bot's own queries come first.
            concurrency=min(5, max(1, settings.db_pool_max_size // 4)),
            strategy=settings.kb_chat_chunk_strategy,
            chunk_size_messages=settings.kb_chat_chunk_size_messages,
            chunk_overlap_messages=settings.kb_chat_chunk_overlap_messages,
            chunk_max_tokens=settings.kb_chunk_max_tokens,
            chunk_overlap_ratio=settings.kb_chunk_overlap_ratio,
            insert_batch_size=settings.kb_chunk_insert_batch_size,
            interval=timedelta(hours=settings.kb_archive_interval_hours),
            listen=settings.kb_listen,
            drain=timedelta(seconds=settings.kb_drain_seconds),
        )

    @cached_property
    def health_checks(self) -> Health:
        """What :meth:`health` looks at; other systems register their checks here."""
        checks = Health(self.database, self.queue)
        if self._replica is not None:
            checks.register("replica", partial(_replica_check, self._replica))
        return checks

    async def health(self, limit_seconds: float = LIMIT_SECONDS) -> HealthReport:
        """Look whether this process can do its work; never takes longer than the limit, whatever hangs.

        Raises:
            InvalidInputError: the limit is not a number of seconds, 0.05 to 600.
        """
        return await self.health_checks.report(limit_seconds)

    async def run(self, stop: asyncio.Event | None = None) -> None:
        """Archive and embed, until ``stop`` is set or the task is cancelled: what a worker process does.

        See :meth:`SessionArchiver.run` and :meth:`EmbeddingWorker.run`. Any number of processes may.

        Raises:
            ConfigurationError: there is no embedder.
            SchemaOutdatedError: the database was not migrated.
        """
        stop = asyncio.Event() if stop is None else stop
        worker = self.embedding_worker
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.archiver.run(stop))
                group.create_task(worker.run(stop))
        except ExceptionGroup as errors:
            # The first is why the other was cancelled.
            raise errors.exceptions[0] from errors.exceptions[0].__cause__

    async def add_document(
        self,
        title: str,
        text: str | Sequence[TextPart],
        *,
        uri: str | None = None,
        source_type: SourceType = SourceType.DOCUMENT_FILE,
        guild_id: int | None = None,
        channel_id: int | None = None,
        thread_id: int | None = None,
        user_id: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        occurred_at: datetime | None = None,
    ) -> DocumentResult:
        """Split a text into chunks and queue them for embedding.

        Added again under the same type, URI and scope, a changed text replaces the old one; chunks
        that did not change keep their vectors. Without a URI each call adds a new document.

        Args:
            text: the whole text, or its parts, such as pages, that no chunk reaches beyond.
            occurred_at: the time that searches by time range compare, with its zone.

        Raises:
            InvalidInputError: a blank title or text, or a value that PostgreSQL cannot store.
        """
        if occurred_at is not None and (not isinstance(occurred_at, datetime) or occurred_at.tzinfo is None):
            raise InvalidInputError("occurred_at must be a datetime with its zone, such as tzinfo=datetime.UTC")
        scope = Scope(guild_id=guild_id, channel_id=channel_id, thread_id=thread_id, user_id=user_id)
        chunks = await asyncio.to_thread(
            document_chunks,
            text,
            uri=uri,
            occurred_at=occurred_at,
            max_tokens=self.settings.kb_chunk_max_tokens,
            overlap_ratio=self.settings.kb_chunk_overlap_ratio,
        )
        async with self.begin() as tx:
            return await tx.knowledge.put_document(
                title,
                chunks,
                type=source_type,
                uri=uri,
                scope=scope,
                metadata=metadata,
                model=None if self._embedder is None else self._embedder.model,
            )

    async def load_documents(
        self,
        documents: Iterable[NewDocument] | AsyncIterable[NewDocument],
        *,
        rebuild: bool | None = None,
        total: int | None = None,
        progress: Progress | None = None,
        on_rejected: OnRejected | None = None,
    ) -> LoadReport:
        """Add many documents, with or without their vectors; see :func:`kotonoha_store.bulk_load.load_documents`.

        Called again after an interruption it goes on; nothing is doubled.

        Args:
            rebuild: whether the HNSW index is dropped meanwhile and built at the end; None: where no vector is stored.

        Raises:
            InvalidInputError, ConfigurationError, StoreUnavailableError: see there.
        """
        return await load_documents(
            self.database, documents, rebuild=rebuild, total=total, progress=progress, on_rejected=on_rejected
        )

    async def search(
        self,
        query: str | VectorLike,
        *,
        mode: SearchMode = "meaning",
        top_k: int | None = None,
        offset: int = 0,
        threshold: float | _Default | None = FROM_SETTINGS,
        filters: AnyFilters | None = None,
        everywhere: bool = False,
        model: str | None = None,
        effort: Effort = "balanced",
        match: Match = "any",
        fusion: Fusion | None = None,
        diversity: float | None = None,
        neighbours: int = 0,
        after: str | None = None,
    ) -> SearchResult:
        """Find chunks by meaning, by words, or by both.

        Where DATABASE_REPLICA_URL names a replica that can be used, it answers (``result.from_replica``): what was
        written within the last KB_REPLICA_MAX_LAG_SECONDS may be missing, unless ``after`` asks for it.

        Args:
            query: a text, embedded here, or (by meaning) a vector of shape (1536,).
            mode: ``meaning``: :meth:`SearchRepository.nearest`; ``words``, in texts and titles:
                :meth:`SearchRepository.matching`, which needs no embedder; ``hybrid``:
                :meth:`SearchRepository.hybrid`, which finds the most.
            top_k: at most so many hits; KB_DEFAULT_TOP_K by default.
            offset: how many of the first hits to pass over, for the next page.
            threshold: least similarity; by meaning KB_SIMILARITY_THRESHOLD by default, else none. The right
                value depends on the model: 0.7 hides most true hits of text-embedding-3-small.
            filters: what to search in; must name a scope unless ``everywhere``.
            model: which model made the vector given as query; the store's embedder's by default.
            effort: ``fast``, ``balanced``, ``thorough`` or ``exact``: how thoroughly the index is searched.
            match: by words: ``any`` or ``all`` of them.
            fusion: hybrid: how meaning and words are weighed.
            diversity: by meaning or hybrid, 0 to 1: hits that differ from each other.
            neighbours: how many chunks before and after each hit to bring along.
            after: what :meth:`write_position` returned: everything written before is found. A replica is waited for
                up to KB_REPLICA_WAIT_SECONDS, then the primary answers.

        Raises:
            InvalidInputError: no scope, a blank query, or a value out of range.
            InvalidVectorError: the vector cannot be compared.
            ModelMismatchError: there are vectors in this scope, but none of the query's model.
            EmbeddingError: the query could not be embedded.
        """
        top_k = self.settings.kb_default_top_k if top_k is None else top_k
        if isinstance(threshold, _Default):
            threshold = self.settings.kb_similarity_threshold if mode == "meaning" else None
        # Before the embedder is paid for an answer that nobody will use.
        check_search(
            top_k,
            threshold,
            SearchFilters() if filters is None else filters,
            everywhere,
            offset=offset,
            effort=effort,
            diversity=diversity,
            neighbours=neighbours,
        )
        _check_mode(query, mode, threshold=threshold, diversity=diversity, match=match, fusion=fusion)
        position = parse_position(after)
        if isinstance(query, str) and model is not None and (mode == "words" or model != self.embedder.model):
            raise InvalidInputError("model= says who made a vector; a text is embedded by the store's own embedder")
        page: _Page = {
            "top_k": top_k,
            "offset": offset,
            "filters": filters,
            "everywhere": everywhere,
            "neighbours": neighbours,
        }
        if mode == "words":
            return await self._searched(lambda search: search.matching(str(query), match=match, **page), position)
        started = perf_counter()
        if isinstance(query, str):
            model = self.embedder.model
            # Before a connection is taken: none is held while the embedder works.
            vector: VectorLike = await self.embedder.embed_query(check_query(query))
        else:
            vector, model = query, model or self.embedder.model
        embedding = perf_counter() - started
        ranking: _Ranking = {"model": model, "threshold": threshold, "effort": effort, "diversity": diversity}

        def run(search: SearchRepository) -> Awaitable[SearchResult]:
            if mode == "meaning":
                return search.nearest(vector, **ranking, **page)
            return search.hybrid(str(query), vector, fusion=fusion, **ranking, **page)

        result = await self._searched(run, position)
        return replace(result, timings=replace(result.timings, embedding=embedding))

    async def recall(
        self,
        session_key: str,
        query: str,
        max_tokens: int,
        *,
        filters: AnyFilters | None = None,
        everywhere: bool = False,
        mode: Literal["words", "hybrid"] = "hybrid",
        top_k: int | None = None,
        fusion: Fusion | None = None,
        after: str | None = None,
    ) -> Recall:
        """Return what a bot puts in its prompt: the session's last messages and what it remembers beside them.

        The last message comes first, the others before it up to half of the budget; then the hits; what these leave
        goes to more messages, 1,000 at most.

        Args:
            session_key: of the conversation; it need not exist yet where ``filters`` are given.
            query: usually what the person just said.
            max_tokens: of messages and hits together (cl100k_base).
            filters: what to search in. By default the session's own channel; without a channel its user, else
                the session alone: whoever reads along there has read it before. Where the session has no guild,
                only what has none either.
            mode: ``hybrid``, or ``words`` where there is no embedder.
            top_k: how many hits to choose from; KB_DEFAULT_TOP_K by default.
            after: as for :meth:`search`, and the messages come from the replica then, too. Without it they come from
                the primary: the last one was written just now.

        Raises:
            NotFoundError: no session has this key, and no filters are given.
            InvalidInputError: a blank query, or a value out of range.
            ModelMismatchError: nothing was found, and the vectors in this scope are of another model.
            ConfigurationError: ``hybrid`` without an embedder.
            EmbeddingError: the query could not be embedded.
        """
        check_count(max_tokens, "max_tokens", 1, 2**31 - 1)
        if mode not in ("words", "hybrid"):
            raise InvalidInputError(f"mode must be words or hybrid, got {mode!r}")
        fitting = min(_RECALL_MESSAGES, max_tokens // TOKENS_A_MESSAGE)
        async with self.begin() if after is None else self.read(after=after) as tx:
            session = await tx.sessions.find(session_key, last=fitting)
        search = partial(
            self.search,
            query,
            mode=mode,
            top_k=top_k,
            everywhere=everywhere,
            threshold=None,
            fusion=fusion,
            after=after,
        )
        if filters is not None or everywhere:
            result = await search(filters=filters)
        elif session is not None:
            result = await search(filters=_own_scope(session))
        else:
            raise NotFoundError(f"no session has the key {session_key!r}; name what to search in by filters=")
        messages = () if session is None else session.messages
        end = 0 if session is None else session.messages_offset + session.message_count
        # Off the event loop: counting tokens of long messages is work.
        return await asyncio.to_thread(
            assemble, messages, end - len(messages), session_key, result, max_tokens=max_tokens
        )

    async def recall_check(
        self, *, model: str | None = None, sample: int = 50, top_k: int = 10, wanted: float = 0.98
    ) -> RecallReport:
        """Measure how much of what is nearest the index finds; see :func:`kotonoha_store.recall_check.recall_check`.

        Args:
            model: whose vectors; the store's embedder's by default.

        Raises:
            NotFoundError: there are no vectors of this model.
            InvalidInputError: a value is out of range.
        """
        model = self.embedder.model if model is None else model
        return await recall_check(self.database, model, sample=sample, top_k=top_k, wanted=wanted)

    async def fill_terms(self) -> None:
        """Write the words of chunks that have none, such as other programs inserted.

        Raises:
            StoreUnavailableError: the database did not answer. Call it again: what was written stays.
        """
        after_id: int | None = FIRST_ID
        while after_id is not None:
            async with self.database.transaction() as connection:
                with translated_errors():
                    after_id = await fill_terms(connection, after_id=after_id)
                    await refresh_terms(connection, force=after_id is None)

    async def _searched(
        self, run: Callable[[SearchRepository], Awaitable[SearchResult]], after: int | None
    ) -> SearchResult:
        if self._replica is not None and await self._replica.is_ready():
            try:
                async with self._replica.driver(after) as connection:
                    return replace(await run(self._search(connection)), from_replica=True)
            except InvalidInputError:
                raise
            except StoreError as error:
                self._replica.failed(error)
        async with self.database.driver() as connection:
            return await run(self._search(connection))

    async def _reading(self, stack: AsyncExitStack, after: int | None) -> UnitOfWork:
        if self._replica is not None and await self._replica.is_ready():
            try:
                session = await stack.enter_async_context(self._replica.begin(after))
                return replace(self._unit(session), from_replica=True)
            except StoreError as error:
                self._replica.failed(error)
        session = await stack.enter_async_context(self.database.begin())
        with translated_errors():
            await (await session.connection()).exec_driver_sql("SET TRANSACTION READ ONLY")
        return self._unit(session)

    def _unit(self, session: AsyncSession) -> UnitOfWork:
        return UnitOfWork(
            session=session,
            sessions=SessionRepository(session, archive_max_messages=self.settings.kb_archive_max_messages),
            knowledge=self._knowledge(session),
            search=self._search(session),
        )

    def _search(self, connection: AsyncSession | Any) -> SearchRepository:
        return SearchRepository(
            connection, exact_limit=self.settings.kb_exact_search_limit, selectivities=self._selectivities
        )

    def _knowledge(self, session: AsyncSession) -> KnowledgeRepository:
        return KnowledgeRepository(
            session,
            insert_batch_size=self.settings.kb_chunk_insert_batch_size,
            update_batch_size=self.settings.kb_chunk_update_batch_size,
        )


async def _replica_check(replica: Replica) -> CheckResult:
    # No longer than that: while the primary hangs, what is known of the replica is to be told nevertheless.
    status = await replica.status(within=LIMIT_SECONDS / 4)
    details = {"is_used": status.is_used, "reason": status.reason, "lag_seconds": status.lag_seconds}
    if status.is_used:
        return CheckResult(details=details)
    return CheckResult("warning", f"the replica is passed over ({status.reason}); the primary answers", details)


def _own_scope(session: SessionRecord) -> AnyFilters:
    scope = session.scope
    # The same channel's id in a guild is another's channel.
    guild = SearchFilters(without=("guild_id",)) if scope.guild_id is None else SearchFilters(guild_id=scope.guild_id)
    if scope.channel_id is not None:
        return guild & SearchFilters(channel_id=scope.channel_id)
    if scope.user_id is not None:
        return guild & SearchFilters(user_id=scope.user_id)
    return SearchFilters(session_keys=(session.session_key,))


def _check_mode(query: object, mode: str, **given: Any) -> None:
    """Refuse what the mode would pass over in silence."""
    if mode not in ("meaning", "words", "hybrid"):
        raise InvalidInputError(f"mode must be meaning, words or hybrid, got {mode!r}")
    if mode != "meaning" and not isinstance(query, str):
        raise InvalidInputError(f"a search by {mode} needs the query as text")
    meaningless: dict[str, dict[str, Any]] = {
        "meaning": {"match": "any", "fusion": None},
        "words": {"threshold": None, "diversity": None, "fusion": None},
        "hybrid": {"match": "any"},
    }
    for name, default in meaningless[mode].items():
        if given[name] != default:
            raise InvalidInputError(f"{name} has no meaning in a search by {mode}; leave it out or choose another mode")
