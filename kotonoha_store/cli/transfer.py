"""export, import jsonl."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kotonoha_store.cli.app import MOVE, AsJson, Size, app, import_app, open_database, pairs, plain, progress, show
from kotonoha_store.cli.imports import DryRun, Rejects, show_report
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.importers.jsonl import import_documents
from kotonoha_store.index_builds import BuildProgress
from kotonoha_store.transfer import ExportFilters, export_jsonl
from kotonoha_store.transfer_import import import_jsonl
from kotonoha_store.transfer_lines import is_export


@app.command(rich_help_panel=MOVE)
async def export(
    file: Annotated[str, typer.Argument(help="Where to, compressed where it ends in .gz; - for standard output.")],
    guild: Annotated[int | None, typer.Option(help="Only what is of this guild.")] = None,
    source: Annotated[
        list[int] | None, typer.Option(help="Only this source; may be repeated. Sessions are left out then.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write everything as lines of JSON, as it is at one moment: sessions, sources, chunks, vectors, dead letters.

    Work goes on meanwhile. The file is yours alone (0600), appears when it is whole, and ends with a checksum;
    `import jsonl` brings it back without loss, into this or another database.

    Example: kotonoha-store export all.jsonl.gz
    """
    path = None if file == "-" else Path(file)
    if path is None and (as_json or sys.stdout.isatty()):
        raise InvalidInputError("an export to standard output is the lines themselves; redirect it, without --json")
    filters = ExportFilters(guild, None if source is None else tuple(source))
    async with open_database() as database:
        with progress("Exporting", as_json) as report:
            result = await export_jsonl(database, path, filters=filters, overwrite=force, progress=report)
    if path is None:
        return
    rows = [
        ("file", file),
        ("sessions", result.sessions),
        ("sources", result.sources),
        ("chunks", result.chunks),
        ("dead letters", result.dead_letters),
        ("size", Size(result.file_size or result.size)),
        ("sha256", result.sha256),
    ]
    show(result, as_json, plain("Exported.", "bold"), pairs(rows))


@import_app.command("jsonl")
async def jsonl(
    file: Annotated[Path, typer.Argument(help="What `export` wrote, or documents, one a line; .gz too.")],
    rebuild: Annotated[
        bool | None,
        typer.Option(
            "--rebuild/--no-rebuild",
            help="Drop the HNSW index first and build it at the end; by default where no vector is stored yet.",
        ),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take what is intact of an export that was cut off or changed.")
    ] = False,
    rejects: Rejects = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Bring an export back, or load many documents, with or without vectors that are computed already.

    An export: what is there stays as it is; ids are kept where they are free. Documents: a JSON object a line with
    title, text (or chunks: content, location, token_count, occurred_from, occurred_to, embedding, embedding_model),
    and if wanted uri, type, guild_id, channel_id, thread_id, user_id, metadata, occurred_at, embedding_model. Run
    again, both go on where they were stopped; nothing is doubled. With many vectors --rebuild is faster; searches
    by meaning are slow meanwhile, and if it is killed, the next run or `reindex --broken` builds the index. Ends
    with 1 where records were set aside.

    Example: kotonoha-store import jsonl all.jsonl.gz --dry-run
    """
    async with open_database() as database:
        with progress("Importing", as_json) as report:

            def on_build(state: BuildProgress) -> None:
                report(state.done, state.total)

            if is_export(file):
                result = await import_jsonl(
                    database,
                    file,
                    dry_run=dry_run,
                    rejects=rejects,
                    partial=partial,
                    rebuild=rebuild,
                    progress=report,
                    on_build=on_build,
                )
            else:
                result = await import_documents(
                    database,
                    file,
                    dry_run=dry_run,
                    rejects=rejects,
                    rebuild=rebuild,
                    progress=report,
                    on_build=on_build,
                )
    show_report(result, as_json, rejects)
