"""Every command against databases that cannot serve it: one sentence, the right exit code, no password."""

import asyncio
import json
import logging
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from command_line import Ran, commands, kotonoha
from conftest import new_database, run_sql, settings_for
from sqlalchemy import URL

from kotonoha_store import Database, migrations

PASSWORD = "p%40@:/ #Geheim?&"  # the characters that URLs are made of


@dataclass(frozen=True)
class Case:
    """The least that a command can be called with, and how it ends where the schema is not this version's.

    ``{dir}`` is a directory with an empty file ``empty``. Commands that ask no database have the code it ends with
    as ``without_database``.
    """

    arguments: str = ""
    empty: int = 5
    outdated: int = 5
    newer: int = 5
    without_database: int | None = None
    stdin: str | None = None


COMMANDS = {
    "check": Case(empty=0, outdated=0, newer=0),
    "current": Case(),
    "migrate": Case("base", empty=0, outdated=0),
    "sql": Case("0003:0004", without_database=0),
    "downgrade": Case("0003 --yes", outdated=0),
    "search": Case("梅雨 --everywhere"),
    "recall": Case("thread:1 梅雨"),
    "recall-check": Case(),
    "archive": Case(),
    "embed": Case(),
    "reembed": Case(),
    "worker": Case(),
    "status": Case(),
    "stats": Case("--refresh"),
    "sessions": Case(),
    "config": Case(without_database=0),
    "indexes": Case(),
    "reindex": Case(),
    "doctor": Case(empty=1, outdated=1, newer=1),
    "grants": Case(),
    "import files": Case("{dir}"),
    "import sqlite": Case("{dir}/bot.sqlite"),
    "import discord": Case("{dir}/export.json"),
    "import jsonl": Case("{dir}/empty"),
    "export": Case("{dir}/store.jsonl"),
    "backup": Case("{dir}/store.backup --force", outdated=0, newer=0),
    "restore": Case("{dir}/empty", without_database=3),  # looks at the file first
    "dlq list": Case(),
    "dlq show": Case("1"),
    "dlq requeue": Case("--all"),
    "dlq discard": Case("--all --yes"),
    "server start": Case("--detach", without_database=3),
    "server stop": Case(without_database=0),
    "server status": Case(without_database=1),
    "server url": Case(without_database=4),
    "server psql": Case(without_database=3),
}


@dataclass(frozen=True)
class Databases:
    """One for each way in which a database cannot serve."""

    unreachable: dict[str, str]
    empty: dict[str, str]
    outdated: dict[str, str]
    newer: dict[str, str]


def by_url(url: URL) -> dict[str, str]:
    # Percent-encoded by hand, as a person would; the embedded server asks for no password.
    bare = url.set(password=None).render_as_string(hide_password=False)
    user, _, rest = bare.partition("@")
    return {"DATABASE_URL": f"{user}:{quote(PASSWORD, safe='')}@{rest}"}


@pytest.fixture(scope="module")
def databases(server_url: URL, template: URL) -> Iterator[Databases]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: refused at once, and given to nobody else
        unreachable = {
            "POSTGRES_HOST": "127.0.0.1",
            "POSTGRES_PORT": str(taken.getsockname()[1]),
            "POSTGRES_PASSWORD": PASSWORD,
        }
        with (
            new_database(server_url) as empty,
            new_database(server_url, template=str(template.database)) as outdated,
            new_database(server_url, template=str(template.database)) as newer,
        ):
            asyncio.run(_downgrade(outdated))
            asyncio.run(run_sql(newer, "UPDATE alembic_version SET version_num = 'ffff'"))
            yield Databases(unreachable, by_url(empty), by_url(outdated), by_url(newer))


async def _downgrade(url: URL) -> None:
    async with Database(url, settings_for(url)) as database:
        await migrations.downgrade(database, "0003")


@pytest.fixture(autouse=True)
def _quiet_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with closing(sqlite3.connect(tmp_path / "bot.sqlite")) as file:
        file.execute("CREATE TABLE sessions (session_key text, messages text)")
    (tmp_path / "export.json").write_text('{"guild": {"id": "1"}, "channel": {"id": "2"}, "messages": []}')
    # Where an embedded server can be neither found nor made.
    monkeypatch.setenv("KB_EMBEDDED_DIR", str(tmp_path / "empty" / "below a file"))
    monkeypatch.chdir(tmp_path)


def run(command: str, environment: dict[str, str], directory: Path, *options: str) -> Ran:
    case = COMMANDS[command]
    arguments = [each.format(dir=directory) for each in case.arguments.split()]
    return kotonoha(*command.split(), *arguments, *options, stdin=case.stdin, **environment)


def assert_ends(ran: Ran, code: int, way_out: str) -> None:
    """Findings stand on stdout with the result, all else is one sentence on stderr."""
    assert ran.code == code, ran
    if code <= 1:
        assert ran.stderr == ""
        return
    lines = ran.stderr.splitlines()
    assert len(lines) == 1, ran
    assert lines[0].startswith("kotonoha-store: "), ran
    assert way_out in lines[0], ran


def test_every_command_stands_in_this_table() -> None:
    assert {name for name, _ in commands()} == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_cannot_be_served_answers_with_one_sentence_and_no_password(
    command: str, databases: Databases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    case = COMMANDS[command]
    ran = [run(command, databases.unreachable, tmp_path)]
    if case.without_database is not None:
        assert_ends(ran[0], case.without_database, "")
    else:
        assert_ends(ran[0], 4, "check that it runs")
        for environment, code, way_out in (
            (databases.empty, case.empty, "kotonoha-store migrate"),
            (databases.outdated, case.outdated, "kotonoha-store migrate"),
            (databases.newer, case.newer, "install"),
        ):
            ran.append(run(command, environment, tmp_path))
            assert_ends(ran[-1], code, way_out)
    for each in ran:
        seen = each.stdout + each.stderr + caplog.text
        assert "Traceback" not in seen
        for secret in (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD), "Geheim"):
            assert secret not in seen


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_its_errors_in_json_where_asked_to(
    command: str, databases: Databases, tmp_path: Path
) -> None:
    ran = run(command, databases.unreachable, tmp_path, "--json")
    if ran.code <= 1:
        assert isinstance(ran.json, dict)
        return
    error = json.loads(ran.stderr)
    assert error.keys() == {"error", "message", "exit_code"}
    assert error["exit_code"] == ran.code
    assert ran.stdout == ""


def test_not_even_a_traceback_shows_the_password(databases: Databases) -> None:
    ran = kotonoha("status", "--traceback", **databases.unreachable)
    assert "Traceback" in ran.stderr
    assert "Geheim" not in ran.stderr
    assert ran.code == 4
