"""archive, embed, worker."""

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import typer
from sqlalchemy import select

from kotonoha_store.cli.app import (
    FINDINGS,
    USE,
    AsJson,
    app,
    open_store,
    pairs,
    plain,
    progress,
    require_embedder,
    show,
    table,
)
from kotonoha_store.embedding_queue import EmbeddingQueue
from kotonoha_store.errors import ConfigurationError, InvalidInputError, StoreError
from kotonoha_store.models import Session
from kotonoha_store.records import Progress
from kotonoha_store.service_loop import stop_on_signals

_LOOK_SECONDS: Final = 0.5
_PAGE: Final = 1000


@app.command(rich_help_panel=USE)
async def archive(
    idle_hours: Annotated[
        float | None,
        typer.Option(
            min=0, help="How long a session has been quiet; KB_ARCHIVE_THRESHOLD_HOURS by default, 0 takes all."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which sessions are due.")] = False,
    as_json: AsJson = False,
) -> None:
    """Archive the sessions that are due now: they become sources, and their chunks are queued for embedding.

    A session that fails stays as it was and is named; then the exit code is 1. `worker` does this all the time.

    Example: kotonoha-store archive --idle-hours 0
    """
    async with open_store(embedder=False) as store:
        hours = store.settings.kb_archive_threshold_hours if idle_hours is None else idle_hours
        try:
            idle_for = timedelta(hours=hours)
        except (OverflowError, ValueError):
            raise InvalidInputError("--idle-hours must be a number of hours that a calendar holds") from None
        if dry_run:
            async with store.begin() as tx:
                due = [each.id for each in await tx.sessions.due_for_archiving(idle_for, limit=_PAGE)]
                due += [each.id for each in await tx.sessions.requested_for_archiving(limit=_PAGE)]
                columns = (Session.id, Session.session_key, Session.last_active_at)
                statement = select(*columns).where(Session.id.in_(due[:_PAGE])).order_by(Session.id)
                rows = [
                    (each.id, each.session_key, each.last_active_at) for each in await tx.session.execute(statement)
                ]
            value = [{"id": each, "session_key": key, "last_active_at": active} for each, key, active in rows]
            more = [plain(f"the first {_PAGE}; there may be more")] if len(rows) >= _PAGE else []
            people = table("id", "key", "last active", rows=rows)
            show({"due": value}, as_json, people, *more)
            return
        report = await store.archiver.run_once(idle_for)
    failed = [
        {"session_id": each, "error": type(error).__name__, "message": _reason(error)} for each, error in report.failed
    ]
    result = {
        "archived": report.archived,
        "skipped": report.skipped,
        "messages": report.messages,
        "chunks": report.chunks,
        "failed": failed,
    }
    shown = [("archived", report.archived), ("too short or nothing new", report.skipped), ("messages", report.messages)]
    people = pairs([*shown, ("chunks queued", report.chunks), ("failed", len(failed))])
    show(result, as_json, people, *(plain(f"session {each['session_id']}: {each['message']}") for each in failed))
    if failed:
        raise typer.Exit(FINDINGS)


@app.command(rich_help_panel=USE)
async def embed(as_json: AsJson = False) -> None:
    """Embed what waits in the queue, until nothing can be claimed now.

    What failed and was put off waits for its time: run it again, or leave it to `worker`. Ends with 1 where chunks
    failed, became dead letters, or wait for a provider that is paused.

    Example: kotonoha-store embed
    """
    async with open_store() as store:
        require_embedder(store)
        worker = store.embedding_worker
        with progress("Embedding", as_json) as report:
            async with _watched(store.queue, report):
                done = await worker.run_until_empty()
        depth = await store.queue.depth()
        pauses = await store.queue.pauses()
    paused = [each for each in pauses if each.remaining > timedelta(0)] if depth.ready else []
    people = pairs(
        [
            ("embedded", done.embedded),
            ("of these from an equal text", done.reused),
            ("put off", done.deferred),
            ("failed, will be tried again", done.failed),
            ("now dead letters", done.buried),
            ("still waiting", depth.ready + depth.waiting),
        ]
    )
    notes = [plain(f"{each.provider} is paused for {each.remaining} ({each.error_code})") for each in paused]
    show({**asdict(done), "ready": depth.ready, "waiting": depth.waiting, "paused": paused}, as_json, people, *notes)
    if done.failed or done.buried or done.deferred or paused:
        raise typer.Exit(FINDINGS)


@app.command(rich_help_panel=USE)
async def worker(
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve Prometheus' metrics on this port (extra metrics).")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="On which address.")] = "127.0.0.1",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line, to stderr.")] = False,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
    as_json: Annotated[
        bool, typer.Option("--json", help="As --log-json, and at the end one JSON object that says it stopped.")
    ] = False,
) -> None:
    """Archive and embed until SIGTERM or Ctrl-C. Start as many as you like, on as many machines.

    Logs to stderr, without the texts. Told to stop, it begins nothing more; what is running has KB_DRAIN_SECONDS to
    end, then its leases are given back and it ends with 0. A second signal ends it at once. A database or provider
    that fails for a while is waited for.

    Example: kotonoha-store worker --metrics-port 9100 --log-json
    """
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise typer.BadParameter("--log-level is DEBUG, INFO, WARNING or ERROR")
    # Signals first: who starts this in a container may stop it while it still connects.
    with _logging(level, log_json or as_json), stop_on_signals() as stop, _metrics(metrics_host, metrics_port):
        async with open_store() as store:
            require_embedder(store)
            await store.run(stop)
    show({"stopped": True}, as_json)


@asynccontextmanager
async def _watched(queue: EmbeddingQueue, report: Progress) -> AsyncIterator[None]:
    """Say now and then how far the queue has come; what is queued meanwhile counts as well."""

    async def look() -> None:
        start = most = None
        while True:
            with contextlib.suppress(StoreError):  # the work itself says what is wrong
                depth = await queue.depth()
                left = depth.ready + depth.leased
                start = left if start is None else start
                most = max(start, left)
                start = most
                report(most - left, most)
            await asyncio.sleep(_LOOK_SECONDS)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.wait([looking])


@contextlib.contextmanager
def _metrics(host: str, port: int | None) -> Any:
    if port is None:
        yield
        return
    try:
        from prometheus_client import start_http_server
    except ImportError:
        raise ConfigurationError('metrics need the extra metrics: pip install "kotonoha-store[metrics]"') from None
    try:
        server, thread = start_http_server(port, addr=host)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such address"
        raise ConfigurationError(f"no metrics on {host}, port {port}: {reason}") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def _logging(level: int, as_json: bool) -> Any:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root, previous = logging.getLogger(), logging.getLogger().level
    # A line a request, and two a connection.
    clients = [logging.getLogger(name) for name in ("httpx", "httpx2", "alembic")]
    root.addHandler(handler)
    root.setLevel(level)
    for client in clients:
        client.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(previous)
        for client in clients:
            client.setLevel(logging.NOTSET)


_STANDARD: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        own = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        error = {"exception": record.exc_info[0].__name__} if record.exc_info and record.exc_info[0] else {}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps({**own, **error, **line}, ensure_ascii=True, default=str)


def _reason(error: Exception) -> str:
    # Only our own messages are known to quote nothing.
    return str(error) if isinstance(error, StoreError) else type(error).__name__
