"""Where the database is: the settings' addresses, the pooler before it, and the driver's arguments for both."""

import math
import re
from typing import Any, Final
from urllib.parse import unquote

import asyncpg
from pydantic import SecretStr
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from kotonoha_store.errors import ConfigurationError
from kotonoha_store.settings import Settings

# libpq's parameters that asyncpg would send to the server as settings, and which it has no use for:
# it speaks SCRAM without channel binding and leaves keep-alive to the operating system.
_IGNORED_PARAMETERS: Final = frozenset(
    {
        "channel_binding",
        "gssencmode",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "pgbouncer",
        "prepared_statement_cache_size",
        "tcp_user_timeout",
    }
)

# Where poolers in transaction mode listen: pgbouncer's default (Azure's too), and Supabase's. pgbouncer there may
# also pool sessions; taken for the other mode, that costs speed and asks for a setting, while statements would fail
# now and then the other way round.
_POOLER_PORTS: Final = frozenset({6432, 6543})

# Services that offer the same server, or a pool of sessions, under another port of the same host.
_DIRECT_PORTS: Final = {".supabase.com": 5432, ".supabase.co": 5432, ".postgres.database.azure.com": 5432}

_NEON: Final = ".neon.tech"
_POOLER_SUFFIX: Final = "-pooler"

# A pooler refuses these, or ignores them as it was told to: tables would lie in another schema than the URL says.
_OF_A_SESSION: Final = frozenset({"options", "role", "search_path"})

_YES: Final = frozenset({"1", "on", "true", "yes"})
_NO: Final = frozenset({"0", "off", "false", "no"})


def database_url(settings: Settings) -> URL | None:
    """Return where the settings point, or None when the embedded server is to serve.

    Raises:
        ConfigurationError: DATABASE_URL cannot be read or is not PostgreSQL's. Its value is not shown.
    """
    if settings.postgres_host is not None:
        password = settings.postgres_password
        addresses = [_address(each, "POSTGRES_HOST") for each in settings.postgres_host.split(",")]
        if any(port for _, port in addresses):
            raise ConfigurationError("POSTGRES_HOST names a port too; give the host alone and set POSTGRES_PORT")
        url = URL.create(
            "postgresql",
            username=settings.postgres_user,
            password=password.get_secret_value() if password else None,
            database=settings.postgres_db,
        )
        return _at(url, [(host, str(settings.postgres_port)) for host, _ in addresses])
    if settings.database_url is None:
        return None
    otherwise = ", or set POSTGRES_HOST, POSTGRES_USER, POSTGRES_PASSWORD"
    return postgres_url(settings.database_url, "DATABASE_URL", otherwise=otherwise)


def postgres_url(value: SecretStr, variable: str, *, otherwise: str = "") -> URL:
    """Return the URL that an environment variable gives.

    Raises:
        ConfigurationError: it cannot be read or is not PostgreSQL's. Its value is not shown.
    """
    text = value.get_secret_value()
    # Several hosts with ports, which SQLAlchemy does not read there.
    several = _SEVERAL_HOSTS.fullmatch(text)
    try:
        url = parse_url(text if several is None else several["before"] + (several["after"] or ""))
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            f"{variable} cannot be read; write postgresql://user:password@host:port/database "
            f"with odd characters percent-encoded{otherwise}"
        ) from None
    if url.get_backend_name() not in {"postgresql", "postgres"}:
        raise ConfigurationError(
            f"{variable} names the database system {url.get_backend_name()!r}; this library needs postgresql://"
        )
    url = url.set(drivername="postgresql")
    if several is not None:
        return _at(url, [_address(each, variable) for each in several["hosts"].split(",")])
    ports = [_port(each, variable) for each in _items(url.query.get("port"))]
    if url.host is not None or "host" not in url.query:
        return url
    addresses = [_address(each, variable) for each in _items(url.query["host"])]
    if len(ports) not in (0, 1, len(addresses)):
        raise ConfigurationError(
            f"{variable} names {len(addresses)} hosts and {len(ports)} ports; give one port or each"
        )
    given = ports * len(addresses) if len(ports) == 1 else ports or [""] * len(addresses)
    pairs = zip(addresses, given, strict=True)
    return _at(url, [(host, port or other) for (host, port), other in pairs], in_query=True)


_SEVERAL_HOSTS: Final = re.compile(
    r"(?P<before>[^:/]+://(?:[^@]*@)?+)(?P<hosts>[^/?@,]*,[^/?@]*)(?P<after>[/?].*)?", re.DOTALL
)
_BRACKETED: Final = re.compile(r"\[([^\]]+)\](?::(.*))?")


def _items(value: str | tuple[str, ...] | None) -> list[str]:
    return [] if value is None else (value if isinstance(value, str) else ",".join(value)).split(",")


def _address(value: str, variable: str) -> tuple[str, str]:
    # A host and its port, or "": also a socket's folder, and IPv6 with and without brackets.
    if value.startswith("/"):
        return value, ""
    if (bracketed := _BRACKETED.fullmatch(value)) is not None:
        host, port = bracketed[1], bracketed[2] or ""
    elif value.count(":") > 1:
        host, port = value, ""
    else:
        host, _, port = value.partition(":")
    if not host or not set(host).isdisjoint("[]@/?#"):
        raise ConfigurationError(f"{variable} has a host that cannot be read; several are written h1:5432,h2:5432")
    return host, _port(port, variable) if port else ""


def _port(value: str, variable: str) -> str:
    if not (value.isascii() and value.isdecimal() and 1 <= int(value[:6]) <= 65535):
        raise ConfigurationError(f"the port in {variable} must be 1 to 65535")
    return value


def _at(url: URL, addresses: list[tuple[str, str]], *, in_query: bool = False) -> URL:
    # Several, and sockets, where the driver reads lists of them.
    (first, port), *others = addresses
    if not others and not in_query and not first.startswith("/"):
        return url.set(host=first, port=int(port) if port else None)
    hosts = [f"[{host}]" if ":" in host and not host.startswith("/") else host for host, _ in addresses]
    query = {"host": ",".join(hosts)}
    if any(port for _, port in addresses):
        query["port"] = ",".join(port or "5432" for _, port in addresses)
    return url.update_query_dict(query)


def parse_url(value: str) -> URL:
    url = make_url(value)
    # SQLAlchemy 2.0 leaves the database's name percent-encoded, 2.1 decodes it.
    if url.database is not None and make_url("postgresql:///%41").database == "%41":
        return url.set(database=unquote(url.database))
    return url


def is_pooled(url: URL, settings: Settings) -> bool:
    """Whether a pooler in transaction mode answers at ``url``: what DB_POOLER says, else what the URL looks like.

    In it each transaction has another connection to the server: nothing of a session lasts.

    Raises:
        ConfigurationError: the URL's ``pgbouncer`` is neither true nor false.
    """
    return _looks_pooled(url) if settings.db_pooler == "auto" else settings.db_pooler == "transaction"


def _looks_pooled(url: URL) -> bool:
    if (said := url.query.get("pgbouncer")) is not None:
        value = str(said).lower()
        if value not in _YES | _NO:
            raise ConfigurationError("pgbouncer in DATABASE_URL must be true or false")
        return value in _YES
    if url.host is None and (hosts := _items(url.query.get("host"))):
        ports = _items(url.query.get("port"))
        return any(_is_poolers(host.lower()) for host in hosts) or any(
            port.isdecimal() and int(port) in _POOLER_PORTS for port in ports
        )
    host, port = _host_and_port(url)
    return _is_poolers(host) or port in _POOLER_PORTS


def _is_poolers(host: str) -> bool:
    return host.partition(".")[0].endswith(_POOLER_SUFFIX)


def _host_and_port(url: URL) -> tuple[str, int | None]:
    # For sockets, and where there are several, they stand behind the question mark: the first one tells.
    host = url.host or _first(url.query.get("host"))
    port = url.port or _first(url.query.get("port"))
    return host.lower(), int(port) if str(port).isdecimal() else None


def _first(value: str | tuple[str, ...] | None) -> str:
    return (value if isinstance(value, str) else value[0] if value else "").partition(",")[0]


def direct_url(url: URL, settings: Settings) -> URL:
    """Return where the server itself answers: for migrations, CREATE INDEX CONCURRENTLY, backups and LISTEN.

    DATABASE_DIRECT_URL, or ``url`` where no pooler stands between, or what a known service calls it.

    Raises:
        ConfigurationError: it is not known, or DATABASE_DIRECT_URL leads to a pooler too.
    """
    if settings.database_direct_url is not None:
        direct = postgres_url(settings.database_direct_url, "DATABASE_DIRECT_URL")
        if _looks_pooled(direct):
            raise ConfigurationError(
                "DATABASE_DIRECT_URL leads to a pooler in transaction mode too (by its host, port or pgbouncer=true); "
                "give the server's own address, or add pgbouncer=false where that pooler keeps whole sessions"
            )
        return direct
    if not is_pooled(url, settings):
        return url
    host, port = _host_and_port(url)
    label, dot, domain = host.partition(".")
    if url.host is not None:
        bare = url.difference_update_query(["pgbouncer"])
        if label.endswith(_POOLER_SUFFIX) and domain.endswith(_NEON.removeprefix(".")):
            return bare.set(host=label.removesuffix(_POOLER_SUFFIX) + dot + domain)
        for ending, direct_port in _DIRECT_PORTS.items():
            if host.endswith(ending) and port in _POOLER_PORTS:
                return bare.set(port=direct_port)
    raise ConfigurationError(
        "migrations, index builds and backups do not pass through a pooler in transaction mode; set "
        "DATABASE_DIRECT_URL to the server's own address (or DB_POOLER=none, if there is no such pooler)"
    )


def connect_arguments(
    url: URL, settings: Settings, *, command_timeout: float | None = None, pooled: bool | None = None
) -> dict[str, Any]:
    """Translate a libpq-style URL into arguments for :func:`asyncpg.connect`.

    asyncpg under SQLAlchemy refuses sslmode, channel_binding, connect_timeout, application_name and
    options; asyncpg itself reads most of them from a DSN, so it is given one.

    Args:
        pooled: whether a pooler in transaction mode answers there; see :func:`is_pooled`.

    Raises:
        ConfigurationError: connect_timeout is not a number, the port is not one, or the URL sets for its session
            what a pooler does not keep.
    """
    if url.port is not None and not 1 <= url.port <= 65535:
        raise ConfigurationError("the port in DATABASE_URL must be 1 to 65535")
    query = dict(url.query)
    timeout: float | None = settings.db_connect_timeout
    if (wanted := query.pop("connect_timeout", None)) is not None:
        try:
            seconds = float(wanted)  # type: ignore[arg-type]  # a repeated parameter is a tuple: refused below
        except (TypeError, ValueError):
            seconds = math.nan
        if not math.isfinite(seconds):
            raise ConfigurationError("connect_timeout in DATABASE_URL is not a number of seconds")
        # As libpq reads it: 0 waits for ever.
        timeout = seconds if seconds > 0 else None
    for name in _IGNORED_PARAMETERS:
        query.pop(name, None)
    arguments: dict[str, Any] = {"timeout": timeout, "command_timeout": command_timeout}
    if is_pooled(url, settings) if pooled is None else pooled:
        # The driver names the host in TLS already, so what Neon reads in `options` it need not.
        if (options := query.pop("options", None)) is not None:
            words = (options if isinstance(options, str) else " ".join(options)).split()
            if kept := [word for word in words if not word.startswith("endpoint=")]:
                query["options"] = " ".join(kept)
        if lost := sorted(name for name in query if name in _OF_A_SESSION or name.endswith("_timeout")):
            raise ConfigurationError(
                f"a pooler in transaction mode keeps no {', '.join(lost)} from DATABASE_URL; remove it there and set "
                "it for the role or the database instead (ALTER ROLE ... SET, ALTER DATABASE ... SET)"
            )
        # No prepared statement may have a name: the next statement runs elsewhere.
        arguments |= {"statement_cache_size": 0, "connection_class": _PooledConnection}
    bare = url.set(drivername="postgresql", query=query)._replace(username=None, password=None, database=None)
    arguments["dsn"] = bare.render_as_string(hide_password=True)
    # Apart, so that nothing in them needs quoting.
    given = {"user": url.username, "password": url.password, "database": url.database}
    arguments.update({name: str(value) for name, value in given.items() if value is not None})
    if "application_name" not in query:
        # pgbouncer follows this one.
        arguments["server_settings"] = {"application_name": "kotonoha_store"}
    return arguments


async def same_database(first: Any, second: Any) -> bool:
    """Whether two of the driver's connections lead to the same database of the same running server."""
    # A copy of a server has its system identifier and its oids; no two started in the same microsecond.
    query = "SELECT pg_postmaster_start_time(), oid, datname FROM pg_database WHERE datname = current_database()"
    return bool(await first.fetchrow(query) == await second.fetchrow(query))


class _PooledConnection(asyncpg.Connection):  # type: ignore[misc]  # untyped there
    """Looks types up in a transaction that is rolled back: asyncpg turns ``jit`` off for its session meanwhile.

    Statement by statement it was turned on again on another connection of the pooler's, and clients were left without.
    """

    async def _introspect_types(self, *args: Any) -> Any:
        transaction = self.transaction()
        await transaction.start()
        try:
            return await super()._introspect_types(*args)
        finally:
            await transaction.rollback()
