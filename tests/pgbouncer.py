"""A real pgbouncer in transaction mode before a server, for whoever has Debian's package (or any other) installed."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from sqlalchemy import URL

from kotonoha_store import Settings
from kotonoha_store.database import connect_arguments

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")

# Its usual one; of a socket's name, since it listens on no TCP port.
PORT = 6432

# Nothing that makes it easier: no startup parameter is ignored, no state is reset between two clients, and few
# connections are shared by all.
OPTIONS = {
    "pool_mode": "transaction",
    "auth_type": "trust",
    "default_pool_size": "3",
    "max_client_conn": "500",
    "ignore_startup_parameters": "",
    "server_reset_query": "",
    "query_wait_timeout": "30",
    "server_login_retry": "1",
    "unix_socket_mode": "0777",
    "listen_addr": "",
    "listen_port": str(PORT),
}


@dataclass(frozen=True)
class PgBouncer:
    """One that runs, and where it keeps its files."""

    process: subprocess.Popen[bytes]
    directory: Path
    server: URL

    def url(self, database: str | None, **parameters: str) -> URL:
        """The address of a database through it."""
        where = {"host": str(self.directory), "port": str(PORT)}
        return URL.create(
            "postgresql",
            self.server.username,
            self.server.password,
            database=database,
            query=where | {"pgbouncer": "true"} | parameters,
        )

    def reload(self) -> None:
        self._signal(signal.SIGHUP, "got SIGHUP")

    def lose_server(self) -> None:
        """As if the server were gone: nothing listens where it is looked for."""
        self._point_to("host=127.0.0.1 port=1")

    def find_server(self) -> None:
        """Undo :meth:`lose_server`."""
        self._point_to(_where(self.server))

    def _point_to(self, where: str) -> None:
        file = self.directory / "pgbouncer.ini"
        file.write_text(re.sub(r"^\* = .*", f"* = {where}", file.read_text(), flags=re.MULTILINE))
        self.reload()

    def refusals(self) -> int:
        """How many times it has told a client no."""
        return (self.directory / "log").read_text().count("pooler error:")

    def pause(self) -> None:
        """Let no client's statement through, as while the server is started again."""
        self._signal(signal.SIGUSR1, "got SIGUSR1")

    def resume(self) -> None:
        self._signal(signal.SIGUSR2, "got SIGUSR2")

    def _signal(self, number: signal.Signals, said: str) -> None:
        """Send it, and wait until it is obeyed: what a client sends then comes after it."""
        log = self.directory / "log"
        before, deadline = log.read_text().count(said), time.monotonic() + 30
        self.process.send_signal(number)
        while log.read_text().count(said) == before:
            assert time.monotonic() < deadline, f"pgbouncer does not hear of {number.name}: {log.read_text()}"
            time.sleep(0.002)


def direct(pooled: URL, server: URL) -> URL:
    """The address of the same database without the pooler."""
    return server.set(database=pooled.database, username=pooled.username, password=pooled.password)


@contextmanager
def pgbouncer(server: URL, **options: str) -> Iterator[PgBouncer]:
    """Start one before ``server``; every database and role of it is there under its own name."""
    assert PROGRAM is not None
    # Short, since a socket's path is limited.
    directory = Path(tempfile.mkdtemp(prefix="kp"))
    directory.chmod(0o755)
    _write(directory, server, OPTIONS | options)
    # It refuses to be root; whoever owns the server's socket may use that.
    user = _owner(server) if os.geteuid() == 0 else None
    if user is not None:
        for path in (directory, *directory.iterdir()):
            os.chown(path, user, -1)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, str(directory / "pgbouncer.ini")], stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=user
        )
    found = PgBouncer(process, directory, server)
    try:
        asyncio.run(_answers(found))
        yield found
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(directory, ignore_errors=True)


def _write(directory: Path, server: URL, options: dict[str, str]) -> None:
    users = directory / "users"
    users.touch(mode=0o600)
    users.write_text(f'"{server.username}" "{server.password or ""}"\n')
    lines = [
        "[databases]",
        f"* = {_where(server)}",
        "[pgbouncer]",
        f"unix_socket_dir = {directory}",
        f"auth_file = {users}",
        # Other roles than the file's are looked up on the server.
        f"auth_user = {server.username}",
        *(f"{name} = {value}" for name, value in options.items()),
    ]
    (directory / "pgbouncer.ini").write_text("\n".join(lines) + "\n")


def _where(server: URL) -> str:
    host = server.host or str(server.query["host"])
    port = server.port or int(str(server.query.get("port", 5432)))
    return f"host={host} port={port}"


def _owner(server: URL) -> int:
    directory = server.query.get("host")
    uid = Path(str(directory)).stat().st_uid if directory else 0
    return uid or 65534


async def _answers(pooler: PgBouncer) -> None:
    deadline = time.monotonic() + 60
    settings = Settings(_env_file=None)
    while True:
        try:
            connection = await asyncpg.connect(**connect_arguments(pooler.url(pooler.server.database), settings))
        except (OSError, asyncpg.PostgresError):
            if pooler.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"pgbouncer does not run: {(pooler.directory / 'log').read_text()}") from None
            await asyncio.sleep(0.02)
        else:
            await connection.close()
            return
