"""PostgreSQL's own programs: which to take, how to run them, and what they say when they fail."""

import asyncio
import contextlib
import math
import os
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import URL

from kotonoha_store import embedded
from kotonoha_store.errors import ConfigurationError, StoreError, StoreUnavailableError
from kotonoha_store.settings import Settings

_KEPT: Final = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TEMP", "SYSTEMROOT", "LD_LIBRARY_PATH")
# To libpq these outweigh PGHOST: a restore would go to another server than the one that was asked.
_ELSEWHERE: Final = ("PGHOSTADDR", "PGSERVICE", "PGSERVICEFILE", "PGSYSCONFDIR")
_STOP_SECONDS: Final = 10.0
_TICK_SECONDS: Final = 0.2

# What of a URL libpq takes from its environment, where nobody reads it as in a list of processes.
_VARIABLES: Final = {
    "application_name": "PGAPPNAME",
    "channel_binding": "PGCHANNELBINDING",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "gssencmode": "PGGSSENCMODE",
    "krbsrvname": "PGKRBSRVNAME",
    "options": "PGOPTIONS",
    "passfile": "PGPASSFILE",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "sslcert": "PGSSLCERT",
    "sslcrl": "PGSSLCRL",
    "sslkey": "PGSSLKEY",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
# Of the driver or of this library; to a server they would be settings that it does not know.
_DRIVERS_OWN: Final = frozenset(
    {
        "direct_tls",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "pgbouncer",
        "prepared_statement_cache_size",
        "statement_cache_size",
        "max_cached_statement_lifetime",
        "max_cacheable_statement_size",
        "sslpassword",
        "tcp_user_timeout",
    }
)
# Where the driver looks when no host is given; libpq looks only where it was told to when it was built.
_LOCAL: Final = "/run/postgresql,/var/run/postgresql,/var/pgsql_socket,/private/tmp,/tmp,localhost"


@dataclass(frozen=True, slots=True)
class Programs:
    """pg_dump and pg_restore of one version.

    Attributes:
        version: as they say it, ``18.1``.
        major: its first number.
        directory: where they are.
    """

    version: str
    major: int
    directory: Path


def found() -> list[Programs]:
    """Return every version on this machine: on the PATH, where Debian keeps them, and in the embedded package.

    Blocks for some milliseconds each.
    """
    result: dict[int, Programs] = {}
    for directory in _directories():
        for suffix in ("", ".exe"):
            if not all((directory / f"{name}{suffix}").is_file() for name in ("pg_dump", "pg_restore")):
                continue
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                run = subprocess.run(
                    [directory / f"pg_dump{suffix}", "--version"],
                    capture_output=True,
                    timeout=20,
                    check=False,
                    env=_environment(),
                )
                if match := re.search(rb"\(PostgreSQL\) (\d+)[.\w]*", run.stdout):
                    version = match.group().decode().split()[-1]
                    result.setdefault(int(match.group(1)), Programs(version, int(match.group(1)), directory))
    return sorted(result.values(), key=lambda each: each.major)


def to_dump(server: int) -> Programs:
    """Return the programs that can dump a server of this major version: its own or the next newer ones.

    Raises:
        ConfigurationError: there are none; the message says what to install.
    """
    there = found()
    for each in there:
        # An older pg_dump refuses a newer server.
        if each.major >= server:
            return each
    raise ConfigurationError(_what_to_install("pg_dump", server, there))


def to_restore(server: int, dumped_by: int) -> Programs:
    """Return the programs that can restore what pg_dump of ``dumped_by`` wrote into a server of this major version.

    Raises:
        ConfigurationError: there are none; the message says what to install, or where to restore it.
    """
    if dumped_by > server:
        raise ConfigurationError(
            f"pg_dump {dumped_by} wrote this file, and the server is PostgreSQL {server}; restore it into a server of "
            f"version {dumped_by} or newer"
        )
    there = found()
    for each in there:
        # From 17 on pg_restore sets what older servers do not know.
        if each.major == server or (each.major > server and server >= 17):
            return each
    raise ConfigurationError(_what_to_install("pg_restore", server, there))


def environment(url: URL, settings: Settings) -> dict[str, str]:
    """Return the variables with which libpq connects to where ``url`` points, for a child of this process.

    The password stands nowhere else. What the caller's PG... variables say and the URL does not stays.
    """
    query = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    result = _environment()
    hosts, ports = _addresses(url.host or query.pop("host", None), str(url.port or query.pop("port", "")))
    query.pop("host", None)
    query.pop("port", None)
    own = {
        "PGHOST": hosts or result.get("PGHOST") or _LOCAL,
        "PGPORT": ports,
        "PGUSER": url.username,
        "PGPASSWORD": url.password,
        "PGDATABASE": url.database,
        "PGCONNECT_TIMEOUT": str(math.ceil(settings.db_connect_timeout)),
    }
    options = [result["PGOPTIONS"]] if "PGOPTIONS" in result else []
    for name, value in query.items():
        if name == "options":
            options.append(value)
        elif name in _VARIABLES:
            own[_VARIABLES[name]] = value
        elif name == "user":
            own["PGUSER"] = value
        elif name not in _DRIVERS_OWN:
            # To the driver any other is a setting of the session.
            escaped = value.replace("\\", "\\\\").replace(" ", "\\ ")
            options.append(f"-c {name}={escaped}")
    own["PGOPTIONS"] = " ".join(options)
    return result | {name: str(value) for name, value in own.items() if value}


async def run(
    programs: Programs,
    name: str,
    *arguments: str,
    variables: dict[str, str],
    watch: Callable[[], None] | None = None,
    read: Callable[[str], None] | None = None,
) -> str:
    """Run one of the programs to its end; stop it when this is cancelled.

    Args:
        watch: called five times a second meanwhile.
        read: called with each line on its standard error.

    Returns:
        Its standard output.

    Raises:
        StoreUnavailableError: it lost the connection, or could not make it.
        ConfigurationError: its role lacks a privilege.
        StoreError: it failed for another reason; the message has its own, without values.
    """
    process = await asyncio.create_subprocess_exec(
        programs.directory / name,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=variables,
        limit=1 << 20,
    )
    last: deque[str] = deque(maxlen=50)
    try:
        async with asyncio.TaskGroup() as group:
            lines = group.create_task(_lines(process.stderr, last, read))
            output = group.create_task(_all(process.stdout))
            while not lines.done():
                await asyncio.wait({lines}, timeout=_TICK_SECONDS)
                if watch is not None:
                    watch()
            await process.wait()
    finally:
        if process.returncode is None:
            await _stop(process)
    if process.returncode:
        raise _failure(name, list(last), process.returncode)
    return output.result()


async def _stop(process: asyncio.subprocess.Process) -> None:
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except (TimeoutError, asyncio.CancelledError):
        process.kill()
        await process.wait()


async def _lines(stream: asyncio.StreamReader | None, last: deque[str], read: Callable[[str], None] | None) -> None:
    assert stream is not None  # noqa: S101  it is a pipe
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # longer than the limit: it quotes a row
            continue
        if not line:
            return
        text = line.decode(errors="replace").rstrip()
        last.append(text)
        if read is not None:
            read(text)


async def _all(stream: asyncio.StreamReader | None) -> str:
    assert stream is not None  # noqa: S101  it is a pipe
    return (await stream.read()).decode(errors="replace")


_UNREACHABLE: Final = re.compile(
    r"could not connect|connection to server|connection (?:was )?(?:closed|reset|lost|refused)|server closed the|"
    r"terminating connection|the database system is|no connection to the server|could not (?:send|receive) data|"
    r"lost synchronization|SSL SYSCALL"
)


def _failure(name: str, lines: list[str], code: int) -> StoreError:
    errors = [line for line in lines if re.match(rf"{name}: (?:error|fatal):", line)]
    said = re.sub(rf"^{name}: \w+: ", "", errors[0]) if errors else f"exit status {code}"
    # Without the values that a server's message quotes, and without its DETAIL and CONTEXT, which are other lines.
    reason = re.sub(r'(ERROR:[^"]*: )".*', r"\1...", said)
    message = f"{name} stopped: {reason}"
    everything = "\n".join(lines)
    if _UNREACHABLE.search(everything):
        return StoreUnavailableError(f"{message}; run it again")
    if any(each in everything for each in ("permission denied", "must be owner", "may lack SELECT privilege")):
        return ConfigurationError(f"{message}; connect as the owner, or as a member of kotonoha_backup to back up")
    if "lock timeout" in everything:
        return StoreUnavailableError(f"{message}: a table is locked, by a migration?; run it again")
    return StoreError(message)


def _what_to_install(program: str, server: int, there: list[Programs]) -> str:
    versions = f"found {', '.join(str(each.major) for each in there)}" if there else "found none"
    embedded_too = ', or pip install "kotonoha-store[embedded]", which has 16 and 18' if server <= 18 else ""
    return (
        f"the server is PostgreSQL {server}, and there is no {program} on this machine that fits ({versions}); install "
        f"the package postgresql-client-{server}{embedded_too}"
    )


def _directories() -> Iterator[Path]:
    for entry in os.environ.get("PATH", os.defpath).split(os.pathsep):
        if entry:
            yield Path(entry)
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    yield from embedded.program_directories().values()


def _environment() -> dict[str, str]:
    # No keys of other services; and messages in the language that they are looked for in.
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or (name.startswith("PG") and name not in _ELSEWHERE)
    }
    return kept | {"LC_ALL": "C"}


def _addresses(host: str | None, port: str) -> tuple[str | None, str]:
    """Hosts and ports as libpq wants them: each port beside its host may also stand after a colon."""
    if host is None or host.startswith("/") or ":" not in host:
        return host, port
    pairs = [each.rpartition(":") if each.count(":") == 1 else (each, "", "") for each in host.split(",")]
    return ",".join(each[0] for each in pairs), ",".join(each[2] or port.split(",")[0] for each in pairs)
