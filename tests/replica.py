"""A primary and its streaming replicas, from the embedded server's programs."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
from conftest import VERSION
from sqlalchemy import URL, make_url

from kotonoha_store import Settings, embedded
from kotonoha_store.endpoints import connect_arguments


class Standby:
    """A server made by pg_basebackup, which follows its primary until it is promoted."""

    def __init__(self, primary: embedded.EmbeddedServer, directory: Path) -> None:
        # Runs programs as the user who owns the primary's directory, where this process is root's.
        self._cluster = embedded._Cluster(primary.data_dir, primary.bin_dir, embedded._owner(primary.data_dir))
        self._directory = directory
        directory.mkdir(mode=0o700)
        if owner := self._cluster.owner:
            os.chown(directory, owner["user"], owner["group"])
        address = ["-h", primary.host, "-p", str(primary.port), "-U", "postgres"]
        self._run("pg_basebackup", *address, "-D", str(directory), "-R", "-c", "fast", "--no-sync")
        self._runs = False
        self.start()

    def url(self, database: str) -> URL:
        return make_url(f"postgresql://postgres@/{database}?host={self._directory}&port=5433")

    def start(self) -> None:
        # Another port: the lock of the primary's socket lies in its directory, and so in the copy.
        options = "-c listen_addresses= -c unix_socket_directories=. -p 5433 -c wal_retrieve_retry_interval=50ms"
        log = str(self._directory / "log")
        if not self._runs:
            self._run("pg_ctl", "start", "-w", "-D", str(self._directory), "-l", log, "-o", options)
        self._runs = True

    def stop(self) -> None:
        if self._runs:
            self._run("pg_ctl", "stop", "-m", "immediate", "-w", "-D", str(self._directory))
        self._runs = False

    def _run(self, program: str, *arguments: str) -> None:
        status, output = self._cluster.run(program, *arguments)
        assert status == 0, f"{program}: {output}"


class Pair:
    """A primary, and the standby that most tests share."""

    def __init__(self, primary: embedded.EmbeddedServer, directory: Path) -> None:
        self._primary = primary
        self._directory = directory
        self.standby = self.another("standby")

    def another(self, name: str) -> Standby:
        return Standby(self._primary, self._directory / name)

    def url(self, database: str) -> URL:
        """The primary's."""
        return make_url(self._primary.url(database))


@contextmanager
def pair() -> Iterator[Pair]:
    # Short, since a socket's path is limited.
    directory = Path(tempfile.mkdtemp(prefix="kt"))
    directory.chmod(0o755)
    primary = embedded.start(directory / "pg", version=VERSION, databases=("postgres",))
    try:
        # Copied with the data. Nothing here has to survive the machine.
        for statement in (
            "ALTER SYSTEM SET fsync = off",
            # A checkpoint removes nothing that a standby needs which is stopped or cut off meanwhile.
            "ALTER SYSTEM SET wal_keep_size = '1GB'",
            # What is written, and when, is the tests' own.
            "ALTER SYSTEM SET autovacuum_naptime = '1d'",
            "SELECT pg_reload_conf()",
        ):
            asyncio.run(fetch(make_url(primary.url("postgres")), statement))
        servers = Pair(primary, directory)
        try:
            yield servers
        finally:
            servers.standby.stop()
    finally:
        primary.stop()
        shutil.rmtree(directory, ignore_errors=True)


async def fetch(url: URL, statement: str, *arguments: Any) -> Any:
    """The statement's value, on a connection of its own."""
    connection = await asyncpg.connect(**connect_arguments(url, Settings(_env_file=None)))
    try:
        return await connection.fetchval(statement, *arguments)
    finally:
        await connection.close()


class Relay:
    """A TCP port that passes everything on to a server, and back, until it falls silent."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self.is_silent = False
        self.swallowed = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> URL:
        port = self._server.sockets[0].getsockname()[1]
        return self._url.set(host="127.0.0.1", port=port, query={})

    async def __aenter__(self) -> "Relay":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        # Else a socket that is still open when the loop ends is a warning, in whichever test then runs.
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = f"{self._url.query['host']}/.s.PGSQL.{self._url.query['port']}"
        writers = [writer]
        try:
            there = await asyncio.open_unix_connection(path)
            writers.append(there[1])
            await asyncio.gather(self._pass_on(reader, there[1]), self._pass_on(there[0], writer))
        finally:
            for each in writers:
                each.close()
                with suppress(ConnectionError):
                    await each.wait_closed()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                if self.is_silent:
                    self.swallowed.set()
                else:
                    writer.write(data)
        writer.close()
