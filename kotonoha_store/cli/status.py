"""status, stats, sessions."""

from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from kotonoha_store import statistics
from kotonoha_store.cli.app import (
    FINDINGS,
    INSPECT,
    AsJson,
    Size,
    app,
    open_database,
    open_store,
    pairs,
    plain,
    progress,
    show,
    table,
)
from kotonoha_store.cli.filters import Channel, Guild, Thread, User
from kotonoha_store.records import SCOPE_FIELDS, SessionRecord, SessionStatus
from kotonoha_store.statistics import StoreStatistics, StoreStatus


@app.command(rich_help_panel=INSPECT)
async def status(as_json: AsJson = False) -> None:
    """Show what is stored and what waits: sessions, sources, chunks, queue, dead letters, paused providers, sizes.

    Rows of tables are the server's estimate; everything else is counted.

    Example: kotonoha-store status
    """
    async with open_database() as database:
        result = await statistics.store_status(database)
    show(result, as_json, *_status(result))


@app.command(rich_help_panel=INSPECT)
async def stats(
    refresh: Annotated[
        bool, typer.Option("--refresh", help="First fill in missing words, count terms anew, and ANALYZE the tables.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what searches and the planner go by: vectors by model, words, dead rows, last VACUUM, use of indexes.

    `status` is quick and says what is stored; this reads every chunk's row. Use `--refresh` after other programs
    wrote chunks, after a large import or deletion, and when searches by words rank badly. It ends with 1 where
    this role may not ANALYZE a table.

    Example: kotonoha-store stats --refresh
    """
    refused: tuple[str, ...] = ()
    async with open_store(embedder=False) as store:
        if refresh:
            await store.fill_terms()
        # Reading all of a large table takes longer than DB_COMMAND_TIMEOUT.
        async with store.database.patient() as patient:
            if refresh:
                with progress("Analysing tables", as_json) as report:
                    refused = await statistics.analyze(patient, progress=report)
            result = await statistics.store_statistics(patient)
    people = _statistics(result)
    if refused:
        people.append(plain(f"\nnot analysed, since this role may not: {', '.join(refused)}", style="yellow"))
    show({"statistics": result, "refreshed": refresh, "not_analysed": refused}, as_json, *people)
    if refused:
        raise typer.Exit(FINDINGS)


@app.command(rich_help_panel=INSPECT)
async def sessions(
    state: Annotated[SessionStatus | None, typer.Option("--status", help="Only those of this status.")] = None,
    guild: Guild = None,
    channel: Channel = None,
    thread: Thread = None,
    user: User = None,
    after: Annotated[int, typer.Option(help="The last id of the page before.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many, of messages the last.")] = 50,
    key: Annotated[
        str | None, typer.Option(help="Only this session, with the messages it still holds.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List sessions in the order of their ids, without their messages; or show one, with its last messages.

    With --key only --limit counts. Messages that were archived and trimmed are in its sources: `search --session-key`.

    Example: kotonoha-store sessions --key thread:42
    """
    if key is not None:
        if after or any(each is not None for each in (state, guild, channel, thread, user)):
            raise typer.BadParameter("--key names one session: give no other condition with it")
        async with open_store(embedder=False) as store, store.begin() as tx:
            one = await tx.sessions.load(key, last=limit)
        value = {**asdict(replace(one, messages=())), "messages": [each.to_stored() for each in one.messages]}
        show({"session": value}, as_json, *_session(one))
        return
    async with open_store(embedder=False) as store, store.begin() as tx:
        found = await tx.sessions.list(
            after_id=after,
            limit=limit,
            status=state,
            guild_id=guild,
            channel_id=channel,
            thread_id=thread,
            user_id=user,
        )
    rows = [
        (each.id, each.session_key, each.session_type, each.status, each.message_count, each.last_active_at)
        for each in found
    ]
    columns = ("id", "key", "type", "status", "messages", "last active")
    show({"sessions": found}, as_json, table(*columns, rows=rows))


def _session(session: SessionRecord) -> list[RenderableType]:
    first = session.messages_offset + session.message_count - len(session.messages)
    rows = [
        (number, each.timestamp, each.author, each.role, each.content)
        for number, each in enumerate(session.messages, first)
    ]
    shown = f"{len(session.messages)} of {session.message_count}"
    return [
        pairs(
            [
                ("key", session.session_key),
                ("id", session.id),
                ("type", session.session_type),
                ("status", session.status),
                *((name, None if (at := getattr(session.scope, name)) is None else str(at)) for name in SCOPE_FIELDS),
                ("last active", session.last_active_at),
                ("messages", shown if session.message_count > len(session.messages) else session.message_count),
            ]
        ),
        plain(""),
        table("number", "time", "author", "role", "text", rows=rows),
    ]


def _status(result: StoreStatus) -> list[RenderableType]:
    queue = result.queue
    tables = {each.name: each for each in result.tables}
    indexes = {name: sum(each.bytes for each in result.indexes if each.table == name) for name in tables}
    people: list[RenderableType] = [
        _heading("Sessions"),
        pairs((status.value, count) for status, count in result.sessions.items()),
        _heading("Sources"),
        pairs((status.value, count) for status, count in result.sources.items()),
        _heading("Chunks"),
        pairs([("all", result.chunks), ("waiting for a vector", queue.ready + queue.waiting)]),
        _heading("Embedding queue"),
        pairs(
            [
                ("ready", queue.ready),
                ("leased", queue.leased),
                ("put off", queue.waiting - queue.leased),
                ("dead letters", queue.dead),
                ("oldest", None if queue.oldest_seconds is None else f"{queue.oldest_seconds:.0f} s"),
            ]
        ),
    ]
    if result.pauses:
        columns = ("provider", "paused for", "failures", "last error")
        rows = [(each.provider, each.remaining, each.failures, each.error_code) for each in result.pauses]
        people += [_heading("Providers that failed lately"), table(*columns, rows=rows)]
    people += [
        _heading("Tables"),
        table(
            "table",
            "rows",
            "size",
            "indexes",
            rows=[(each.name, each.rows, Size(each.bytes), Size(indexes[each.name])) for each in result.tables],
        ),
        _heading("Largest indexes"),
        table("index", "size", rows=[(each.name, Size(each.bytes)) for each in result.indexes[:8]]),
        plain(f"\nthe whole database: {Size(result.database_bytes)}"),
    ]
    return people


def _statistics(result: StoreStatistics) -> list[RenderableType]:
    return [
        _heading("Vectors"),
        table("model", "chunks", rows=[(model or "unknown", count) for model, count in result.models]),
        _heading("Chunks"),
        pairs(
            [
                ("all", result.chunks),
                ("without a vector", result.chunks_without_vector),
                ("without words", result.chunks_without_words),
                ("when terms were counted", result.terms_counted),
                ("common terms", result.common_terms),
            ]
        ),
        _heading("Tables"),
        table(
            "table",
            "live rows",
            "dead rows",
            "vacuumed",
            "analysed",
            "full scans",
            "index scans",
            "cache hits",
            rows=[
                (
                    each.name,
                    each.live_rows,
                    each.dead_rows,
                    each.vacuumed_at,
                    each.analysed_at,
                    each.sequential_scans,
                    each.index_scans,
                    None if each.cache_hit is None else f"{each.cache_hit:.1%}",
                )
                for each in result.tables
            ],
        ),
        _heading("Indexes"),
        table(
            "index",
            "table",
            "scans",
            "size",
            "valid",
            rows=[(each.name, each.table, each.scans, Size(each.bytes), each.is_valid) for each in result.indexes],
        ),
    ]


def _heading(name: str) -> Text:
    return Text(f"\n{name}", style="bold")
