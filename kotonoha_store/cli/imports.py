"""import sqlite, import discord."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import RenderableType

from kotonoha_store.cli.app import (
    FINDINGS,
    AsJson,
    import_app,
    open_database,
    open_store,
    pairs,
    plain,
    progress,
    show,
    table,
)
from kotonoha_store.importers.discord import CONVERSATION_GAP, import_discord
from kotonoha_store.importers.report import Counts, ImportReport
from kotonoha_store.importers.sqlite import import_sqlite

DryRun = Annotated[bool, typer.Option("--dry-run", help="Read and compare everything, write nothing to the database.")]
Rejects = Annotated[
    Path | None,
    typer.Option(
        help="A file (JSON lines, yours alone) for what cannot be taken, with the reasons; that of an earlier import "
        "is begun anew."
    ),
]

_SHOWN: Final = 10


@import_app.command("sqlite")
async def sqlite(
    file: Annotated[Path, typer.Argument(help="The old bot's SQLite file; it is only read.")],
    guild: Annotated[int | None, typer.Option(help="The id of the bot's server, which the file does not name.")] = None,
    timezone: Annotated[str, typer.Option(help="Of times without a zone, such as Asia/Tokyo.")] = "UTC",
    rejects: Rejects = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Import the sessions of the old bot's SQLite file; `archive` makes them searchable then.

    The file has a table `sessions` with the columns session_key, session_type, messages, created_at, last_active_at,
    and if wanted channel_id, thread_id, user_id. `messages` is a JSON list of objects {role, content, timestamp}, the
    oldest first; role is user, assistant, system, developer, tool or function, times are ISO 8601.

    Run again, it goes on where it was stopped and adds what is new. Sessions that were changed here are left as they
    are. What was written is read back and compared. Ends with 1 where records were set aside.

    Example: kotonoha-store import sqlite sessions.db --guild 123 --timezone Asia/Tokyo --rejects rejects.jsonl
    """
    async with open_database() as database:
        with progress("Importing sessions", as_json) as report:
            result = await import_sqlite(
                database,
                file,
                guild_id=guild,
                timezone=timezone,
                rejects=rejects,
                dry_run=dry_run,
                progress=report,
            )
    unscoped = "Without --guild, searches find what has no channel, thread or user of its own only by --everywhere."
    show_report(result, as_json, rejects, *([unscoped] if guild is None else []))


@import_app.command("discord")
async def discord(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Exported .json files, or folders of them.")],
    bot_id: Annotated[
        list[int] | None,
        typer.Option(help="The account whose messages are the assistant's; may be repeated. By default all bots."),
    ] = None,
    gap_hours: Annotated[
        float, typer.Option(min=0.01, max=100_000, help="After so long a silence another conversation begins.")
    ] = CONVERSATION_GAP / timedelta(hours=1),
    rejects: Rejects = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Import chats that DiscordChatExporter wrote (--format Json); `embed` or a `worker` embeds them then.

    Each channel and thread becomes a session, archived by conversation, so that hits link to the messages. Messages
    that are known by their id are passed over: run it again to go on, or with a longer export. Edits and deletions
    after the import are not followed. Ends with 1 where messages or files were set aside.

    Example: kotonoha-store import discord exports/ --bot-id 456 --rejects rejects.jsonl
    """
    async with open_store(embedder=False) as store:
        with progress("Importing messages", as_json) as report:
            result = await import_discord(
                store,
                paths,
                bot_ids=bot_id,
                gap=timedelta(hours=gap_hours),
                rejects=rejects,
                dry_run=dry_run,
                progress=report,
            )
    further = (
        "The sessions' keys are discord:<channel id>, of threads discord:<thread id>.",
        "Next: `kotonoha-store embed`, then `kotonoha-store search WORDS --channel ID` (or --thread, --guild).",
    )
    show_report(result, as_json, rejects, *(() if dry_run else further))


def headline(report: ImportReport) -> RenderableType:
    """What became of it all, in a sentence."""
    if report.is_dry_run:
        return plain("Dry run: nothing was written.", "bold")
    if report.imported or any(counts.imported for counts in report.inner.values()):
        return plain("Imported.", "bold")
    return plain("Nothing was imported." if report.has_rejects else "Nothing new to import.", "bold")


def set_aside(report: ImportReport, rejects: Path | None) -> list[RenderableType]:
    """The first of what was set aside, and where the rest is."""
    if not report.rejections:
        return []
    first = report.rejections[:_SHOWN]
    people: list[RenderableType] = [table("set aside", "because", rows=[(each.where, each.reason) for each in first])]
    more = max(report.set_aside, len(report.rejections)) - len(first)
    and_more = [f"and {more} more"] if more else []
    if rejects is not None:
        people.append(plain("; ".join([*and_more, f"{rejects} keeps all"])))
    else:
        people.append(plain("; ".join([*and_more, "--rejects FILE keeps all, with their reasons"])))
    return people


def show_report(report: ImportReport, as_json: bool, rejects: Path | None, *further: str) -> None:
    """Print what an import did, and end with 1 where records were set aside."""
    kinds: list[tuple[str, Counts]] = [(report.what, report), *report.inner.items()]
    rows = [
        (kind, each.read, each.imported, each.unchanged, each.kept, each.skipped, each.rejected) for kind, each in kinds
    ]
    imported = "would import" if report.is_dry_run else "imported"
    # Only archiving tells.
    unknown = ("sources", "chunks") if report.is_dry_run else ()
    people: list[RenderableType] = [
        headline(report),
        table("", "read", imported, "unchanged", "kept", "left out", "set aside", rows=rows),
        pairs([(key.replace("_", " "), value) for key, value in report.details.items() if key not in unknown]),
        *(plain(note) for note in (*report.notes, *further)),
        *set_aside(report, rejects),
    ]
    show(report, as_json, *people)
    if report.has_rejects:
        raise typer.Exit(FINDINGS)
