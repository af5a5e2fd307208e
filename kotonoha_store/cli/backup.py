"""backup, restore."""

from pathlib import Path
from typing import Annotated

import typer

from kotonoha_store import backup as backups
from kotonoha_store.backup_contents import Manifest, manifest_path
from kotonoha_store.cli.app import (
    MOVE,
    AsJson,
    Size,
    Yes,
    app,
    confirm,
    open_database,
    pairs,
    plain,
    progress,
    show,
    table,
)
from kotonoha_store.errors import StoreError

Jobs = Annotated[int | None, typer.Option(min=1, max=64, help="Connections that restore at once; default: up to 4.")]


@app.command(rich_help_panel=MOVE)
async def backup(
    file: Annotated[Path, typer.Argument(help="Where to write the dump; its manifest comes beside it as FILE.json.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Restore it into a database made for it, compare, and drop that again.")
    ] = False,
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """Write a backup by pg_dump, while the database is in use: its schema with all tables in it.

    Passes by a pooler (DATABASE_DIRECT_URL). The file is readable by you alone, and not encrypted: messages are in it.
    Needs pg_dump of the server's version or newer; the extra `embedded` brings 16 and 18. Roles and privileges are not
    in it: run `grants` after restoring.

    Example: kotonoha-store backup kotonoha.dump --verify
    """
    async with open_database(check=False) as database:
        with progress("Bytes written", as_json) as report:
            manifest = await backups.backup(database, file, force=force, progress=report)
        if verify:
            try:
                with progress("Restoring to compare", as_json) as report:
                    await backups.verify(database, file, jobs=jobs, progress=report)
            except StoreError as error:
                raise type(error)(f"{file} was written, but not verified: {error}") from error
        left = await backups.leftovers(database) if verify else ()
    _show(manifest, file, "verified" if verify else "written", left, as_json)


@app.command(rich_help_panel=MOVE)
async def restore(
    file: Annotated[Path, typer.Argument(help="What `backup` wrote, with its manifest FILE.json beside it.")],
    to: Annotated[
        str | None, typer.Option(help="The name of the database on the same server; default: the configured one.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Drop that database first, with all that is in it.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify-only", help="Restore into a database made for it, compare, and drop that again.")
    ] = False,
    jobs: Jobs = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Restore a backup into a new or empty database, and compare each table with the manifest.

    The file is looked at first: a truncated or changed one is refused. Interrupted, run it again with --replace.
    Afterwards `migrate` brings an older backup to this version, and `grants` gives the group roles their privileges.

    Example: kotonoha-store restore kotonoha.dump --to kotonoha_again
    """
    if verify and (to is not None or replace):
        raise typer.BadParameter("--verify-only makes a database of its own: leave out --to and --replace")
    async with open_database(check=False) as database:
        if verify:
            with progress("Restoring to compare", as_json) as report:
                manifest = await backups.verify(database, file, jobs=jobs, progress=report)
            _show(manifest, file, "verified", await backups.leftovers(database), as_json)
            return
        if replace:
            confirm(f"Drop the database {to or database.direct_url.database} with all that is in it?", yes)
        with progress("Restoring", as_json) as report:
            done = await backups.restore(database, file, to=to, replace=replace, jobs=jobs, progress=report)
    rows = [(name, each.rows) for name, each in done.manifest.tables.items()]
    where = f"restored into {done.database}; every table has the rows and the checksum of the backup"
    show(
        {"database": done.database, "created": done.created, "schema": done.state, "tables": done.manifest.tables},
        as_json,
        table("table", "rows", rows=rows),
        plain(where),
        plain("next: kotonoha-store grants, where group roles are used"),
    )
    done.state.check()


def _show(manifest: Manifest, file: Path, what: str, left: tuple[str, ...], as_json: bool) -> None:
    summary = pairs(
        [
            (what, str(file)),
            ("manifest", str(manifest_path(file))),
            ("size", Size(manifest.size)),
            ("revision", manifest.revision),
            ("server", manifest.server),
            ("rows", sum(each.rows for each in manifest.tables.values())),
        ]
    )
    lines = [
        plain(f"{name} is left of a verification that was killed (or runs): DROP DATABASE {name}") for name in left
    ]
    show({"file": str(file), what: True, "manifest": manifest, "leftovers": left}, as_json, summary, *lines)
