"""grants."""

from typing import Annotated

import typer

from kotonoha_store import roles
from kotonoha_store.cli.app import FINDINGS, MAINTAIN, AsJson, Yes, app, confirm, open_database, plain, show, table
from kotonoha_store.errors import InvalidInputError

_PURPOSE = {
    roles.Role.OWNER: "owns the tables; whoever migrates is a member",
    roles.Role.APP: "sessions, knowledge, archive, searches; reads dead letters, and deletes them with their sources",
    roles.Role.WORKER: "archive, embedding, dead letters",
    roles.Role.READONLY: "reads everything",
    roles.Role.BACKUP: "what pg_dump needs",
}


@app.command(rich_help_panel=MAINTAIN)
async def grants(
    prefix: Annotated[str, typer.Option(help="What the roles' names begin with.")] = roles.DEFAULT_PREFIX,
    schema: Annotated[str | None, typer.Option(help="Where the tables are; default: by the search_path.")] = None,
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements and run nothing.")] = False,
    revoke: Annotated[bool, typer.Option("--revoke", help="Take back all they have in this database.")] = False,
    drop: Annotated[bool, typer.Option("--drop", help="Drop those that nobody uses, with what they have.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make the group roles (owner, app, worker, readonly, backup), and grant each what it needs and no more.

    Then make login roles members: GRANT kotonoha_app, kotonoha_worker TO mybot. Run it as the role that migrated (with
    CREATEROLE) or as an admin, and again after each upgrade; running it twice changes nothing. The tables come to
    belong to the owner role, whose members go on migrating them.

    Example: kotonoha-store grants
    """
    if sum((sql, revoke, drop)) > 1:
        raise InvalidInputError("--sql, --revoke and --drop exclude each other")
    async with open_database(check=schema is None and not (revoke or drop)) as database:
        if sql:
            statements = await roles.script(database, prefix=prefix, schema=schema)
            if as_json:
                show({"statements": statements}, as_json)
            else:
                typer.echo("BEGIN;\n" + "".join(f"{each};\n" for each in statements) + "COMMIT;")
            return
        if revoke:
            confirm(f"Take from {prefix}_app and the others all they have in this database?", yes)
            statements = await roles.revoke(database, prefix=prefix)
            show({"statements": statements}, as_json, plain(f"{len(statements)} privileges and owners taken back"))
            return
        if drop:
            confirm(f"Drop {prefix}_app and the others, where nobody uses them?", yes)
            gone = await roles.drop(database, prefix=prefix)
            lines = [(name, "dropped") for name in gone.dropped]
            lines += [(name, f"kept: {why}") for name, why in gone.kept.items()]
            show(gone, as_json, table("role", "", rows=lines) if lines else plain("there are no such roles"))
            if gone.kept:
                raise typer.Exit(FINDINGS)
            return
        done = await roles.grant(database, prefix=prefix, schema=schema)
        rows = [
            (name, "made" if name in done.created else "there", _PURPOSE[role], ", ".join(done.members.get(name, ())))
            for role, name in done.roles.items()
        ]
        app_role = done.roles[roles.Role.APP]
        show(
            done,
            as_json,
            table("role", "", "for", "members", rows=rows),
            plain(f"Now, for instance: GRANT {app_role} TO mybot"),
        )
