"""server start, stop, url, psql, status: the embedded server."""

import asyncio
import os
import signal
import subprocess
import sys
from typing import Annotated

import typer

from kotonoha_store import embedded
from kotonoha_store.cli.app import FINDINGS, AsJson, pairs, plain, server_app, show
from kotonoha_store.embedded import EmbeddedServer, EmbeddedStatus
from kotonoha_store.errors import ConfigurationError, StoreUnavailableError
from kotonoha_store.service_loop import stop_on_signals
from kotonoha_store.settings import Settings


@server_app.command("start")
async def start(
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave it running, also for later, until `server stop`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start the embedded server, print its address, and keep it until Ctrl-C.

    Other commands and programs start it by themselves and stop it with the last of them; this one keeps it in
    between, so that each starts faster. Needs the extra embedded. KB_EMBEDDED_DIR says where its data is.

    Example: kotonoha-store server start --detach
    """
    settings = Settings()
    with stop_on_signals() as stop:
        server = await asyncio.to_thread(_start, settings)
        try:
            if detach:
                server.keep()
            url = server.url(settings.postgres_db)
            hint = "runs until `kotonoha-store server stop`" if detach else "runs until Ctrl-C"
            value = {"url": url, "data_dir": server.data_dir, "version": server.version, "detached": detach}
            show(value, as_json, plain(url), plain(f"PostgreSQL {server.version} in {server.data_dir} {hint}"))
            _warn_of_another(settings)
            # Who started this waits for the address.
            sys.stdout.flush()
            if not detach:
                await stop.wait()
        finally:
            await asyncio.to_thread(server.stop)


@server_app.command("stop")
def stop(
    force: Annotated[bool, typer.Option("--force", help="Also while programs use it; their connections end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop the embedded server. One that is in use stops with its last user; then the exit code is 1.

    Example: kotonoha-store server stop
    """
    settings = Settings()
    outcome = embedded.stop(settings.kb_embedded_dir, version=settings.kb_embedded_version, force=force)
    line = "in use: it stops when the last program that uses it ends; --force stops it now"
    show({"result": outcome}, as_json, plain(line if outcome == "in use" else outcome))
    if outcome == "in use":
        raise typer.Exit(FINDINGS)


@server_app.command("status")
def status(as_json: AsJson = False) -> None:
    """Say whether the embedded server runs, and where its data is. Ends with 1 when it does not run.

    Example: kotonoha-store server status --json
    """
    settings = Settings()
    found = _status(settings)
    url = found.url(settings.postgres_db)
    people = pairs(
        [
            ("running", found.is_running),
            ("kept without users", found.is_kept),
            ("data directory", str(found.data_dir)),
            ("PostgreSQL", "no data yet" if found.version is None else str(found.version)),
            ("process", None if found.pid is None else str(found.pid)),
            ("address", url),
        ]
    )
    show({"status": found, "running": found.is_running, "url": url}, as_json, people)
    if not found.is_running:
        raise typer.Exit(FINDINGS)


@server_app.command("url")
def url(as_json: AsJson = False) -> None:
    """Print the address of the running embedded server, as DATABASE_URL takes it. It has no password.

    Example: psql "$(kotonoha-store server url)"
    """
    settings = Settings()
    found = _status(settings).url(settings.postgres_db)
    if found is None:
        raise StoreUnavailableError("the embedded server does not run; start it: kotonoha-store server start --detach")
    show({"url": found}, as_json, plain(found))


@server_app.command("psql", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context, as_json: AsJson = False) -> None:
    """Open psql on the embedded server, started for as long as it is used; what follows is psql's.

    The exit code is psql's. With --json its output is one string. Another database of this server: its name.

    Example: kotonoha-store server psql -c "SELECT count(*) FROM sessions"
    """
    settings = Settings()
    server = _start(settings)
    try:
        command = [str(server.bin_dir / "psql"), *context.args]
        # The caller's own may name another server, by a service file too.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        # Not as an argument: a database among those that follow would be a user's name, or lose server and port.
        environment |= {
            "PGHOST": server.host,
            "PGPORT": str(server.port),
            "PGUSER": "postgres",
            "PGDATABASE": settings.postgres_db,
        }
        # Ctrl-C is psql's: it ends a statement there.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            output = subprocess.PIPE if as_json else None
            result = subprocess.run(command, env=environment, check=False, stdout=output)
        except OSError as error:
            raise ConfigurationError(f"psql does not start: {error.strerror}") from None
        finally:
            signal.signal(signal.SIGINT, previous)
    finally:
        server.stop()
    if as_json:
        show({"output": result.stdout.decode(errors="replace"), "exit_code": result.returncode}, as_json)
    if result.returncode:
        raise typer.Exit(result.returncode)


def _start(settings: Settings) -> EmbeddedServer:
    return embedded.start(
        settings.kb_embedded_dir, version=settings.kb_embedded_version, databases=(settings.postgres_db,)
    )


def _status(settings: Settings) -> EmbeddedStatus:
    return embedded.status(settings.kb_embedded_dir, version=settings.kb_embedded_version)


def _warn_of_another(settings: Settings) -> None:
    if not settings.uses_embedded_server:
        print(
            "kotonoha-store: DATABASE_URL or POSTGRES_HOST is set, so other commands do not use this server",
            file=sys.stderr,
        )
