"""import files."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import RenderableType

from kotonoha_store.cli.app import (
    FINDINGS,
    AsJson,
    Yes,
    confirm,
    import_app,
    open_store,
    pairs,
    plain,
    progress,
    show,
)
from kotonoha_store.cli.imports import headline, set_aside
from kotonoha_store.importers.files import import_files
from kotonoha_store.records import Scope, SourceType

_UNSCOPED: Final = (
    "Without --guild, --channel, --thread or --user, searches find these documents only by --everywhere; importing "
    "the files again with one of them makes a second copy."
)


class _Type(StrEnum):
    DOCUMENT_FILE = "document_file"
    WEB_PAGE = "web_page"


@import_app.command("files")
async def files(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Files, and folders with all below them.")],
    glob: Annotated[
        list[str] | None,
        typer.Option(
            help="Which files of folders, such as *.md; may be repeated. By default text, Markdown, HTML, PDF."
        ),
    ] = None,
    guild: Annotated[int | None, typer.Option(help="The guild that the documents are of.")] = None,
    channel: Annotated[int | None, typer.Option(help="The channel that they are of.")] = None,
    thread: Annotated[int | None, typer.Option(help="The thread that they are of.")] = None,
    user: Annotated[int | None, typer.Option(help="The user whose they are.")] = None,
    type_: Annotated[
        _Type | None, typer.Option("--type", help="What they become; by default web_page for HTML, else document_file.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Where the folder is published; hits link there. By default its name.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="The folder that addresses are relative to; by default the one given.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of files of text, such as shift_jis; by default it is found.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete documents of these folders whose file is gone; try --dry-run first.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read everything, and only say what would change.")
    ] = False,
    rejects: Annotated[
        Path | None,
        typer.Option(
            help="A file for the list of files that could not be read; that of an earlier import begins anew."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="How many files are parsed at once.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="How long the parsing of one may take.")] = 60,
    max_mib: Annotated[int, typer.Option(min=1, max=1024, help="Longer files are set aside.")] = 100,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Import text, Markdown, HTML and PDF files as documents, which hits quote with page or section.

    Imported again, an unchanged file changes nothing, and of a changed one only the changed parts are embedded
    again. Hidden files, symbolic links and what is no text are passed over and counted; what cannot be read is set
    aside with the reason, and then the exit code is 1. Embed the new parts by `embed` or a `worker`.

    Example: kotonoha-store import files manuals/ --guild 1 --base-url https://example.org/manuals/
    """
    if prune and not dry_run:
        confirm("Delete the documents of these folders whose files are gone (--dry-run lists them)?", yes)
    async with open_store(embedder=False) as store:
        with progress("Importing files", as_json) as report:
            result = await import_files(
                store,
                paths,
                globs=glob or (),
                root=root,
                base_url=base_url,
                scope=Scope(guild_id=guild, channel_id=channel, thread_id=thread, user_id=user),
                source_type=None if type_ is None else SourceType(type_.value),
                encoding=encoding,
                prune=prune,
                dry_run=dry_run,
                rejects=rejects,
                concurrency=concurrency,
                seconds=seconds,
                max_bytes=max_mib * 2**20,
                progress=report,
            )
    chunks = result.inner["chunks"]
    people: list[RenderableType] = [
        headline(result),
        pairs(
            [
                ("files read", result.read),
                (
                    "would import" if dry_run else "imported",
                    f"{result.imported} ({result.details['new']} new, {result.details['changed']} changed)",
                ),
                ("unchanged", result.unchanged),
                ("passed over", result.skipped),
                ("set aside", result.rejected),
                (
                    "chunks",
                    f"{chunks.imported} new, {chunks.unchanged} kept, {result.details['removed_chunks']} removed",
                ),
                *([("pruned", result.details["pruned"])] if prune else []),
            ]
        ),
        *(plain(note) for note in result.notes),
        *([plain(_UNSCOPED)] if (guild, channel, thread, user) == (None,) * 4 else []),
        *set_aside(result, rejects),
    ]
    show(result, as_json, *people)
    if result.has_rejects:
        raise typer.Exit(FINDINGS)
