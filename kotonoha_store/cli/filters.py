"""Options that say where to search, shared by commands."""

from datetime import datetime
from typing import Annotated

import typer

from kotonoha_store.errors import InvalidInputError
from kotonoha_store.records import SourceType
from kotonoha_store.search_records import SearchFilters

_WHERE = "Where to look"

Guild = Annotated[int | None, typer.Option(help="Only of this guild (server).", rich_help_panel=_WHERE)]
Channel = Annotated[int | None, typer.Option(help="Only of this channel.", rich_help_panel=_WHERE)]
Thread = Annotated[int | None, typer.Option(help="Only of this thread.", rich_help_panel=_WHERE)]
User = Annotated[int | None, typer.Option(help="Only of this user.", rich_help_panel=_WHERE)]
Sources = Annotated[
    list[int] | None, typer.Option("--source", help="Only of this source; may be repeated.", rich_help_panel=_WHERE)
]
SourceTypes = Annotated[
    list[SourceType] | None,
    typer.Option("--source-type", help="Only of sources of this type; may be repeated.", rich_help_panel=_WHERE),
]
SessionKeys = Annotated[
    list[str] | None,
    typer.Option("--session-key", help="Only archived from this session; may be repeated.", rich_help_panel=_WHERE),
]
Since = Annotated[
    str | None,
    typer.Option(
        help="Only what was said at or after this time, ISO 8601: 2025-01-31 or 2025-01-31T18:00+09:00; "
        "without a zone it is this machine's.",
        rich_help_panel=_WHERE,
    ),
]
Until = Annotated[str | None, typer.Option(help="Only what was said before this time.", rich_help_panel=_WHERE)]
Everywhere = Annotated[
    bool, typer.Option("--everywhere", help="In all that is stored, whosever it is.", rich_help_panel=_WHERE)
]


def search_filters(
    *,
    guild: int | None = None,
    channel: int | None = None,
    thread: int | None = None,
    user: int | None = None,
    sources: list[int] | None = None,
    source_types: list[SourceType] | None = None,
    session_keys: list[str] | None = None,
    since: str | None = None,
    until: str | None = None,
) -> SearchFilters:
    """Make filters of the options.

    Raises:
        InvalidInputError: a value cannot be searched for.
    """
    start, end = moment(since, "--since"), moment(until, "--until")
    if start is not None and end is not None and start >= end:
        raise InvalidInputError("--since must lie before --until")
    return SearchFilters(
        guild_id=guild,
        channel_id=channel,
        thread_id=thread,
        user_id=user,
        # An option that was not given is an empty list, which would keep nothing.
        source_ids=tuple(sources) if sources else None,
        source_types=tuple(source_types) if source_types else None,
        session_keys=tuple(session_keys) if session_keys else None,
        since=start,
        until=end,
    )


def require_scope(filters: SearchFilters, everywhere: bool) -> None:
    """Refuse a search that names neither a scope nor ``--everywhere``: forgetting it must not be a leak."""
    if not everywhere and not filters.names_scope:
        raise InvalidInputError(
            "say where to look: --guild, --channel, --thread, --user, --source or --session-key, "
            "or --everywhere for all that is stored"
        )


def moment(value: str | None, option: str) -> datetime | None:
    """Read a time with its zone, or in this machine's.

    Raises:
        InvalidInputError: it is not one.
    """
    if value is None:
        return None
    try:
        given = datetime.fromisoformat(value)
        return given if given.tzinfo is not None else given.astimezone()
    except (ValueError, OverflowError, OSError):
        raise InvalidInputError(
            f"{option} takes a time as ISO 8601 has it, such as 2025-01-31 or 2025-01-31T18:00+09:00"
        ) from None
