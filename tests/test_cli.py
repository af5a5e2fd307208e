"""What all commands share: help, JSON, errors, signals, texts from outside."""

import asyncio
import builtins
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import typer
from command_line import commands, kotonoha
from conftest import settings_for
from rich.console import Console
from sqlalchemy import URL

from kotonoha_store import HashingEmbedder, Message, Store, cli, statistics
from kotonoha_store.cli.app import app, progress, show, table
from kotonoha_store.database import connect_arguments


@pytest.fixture(scope="module")
def filled_url(server_url: URL, template: URL) -> Iterator[URL]:
    """A database that nobody changes, with a title that a terminal would obey."""
    from conftest import new_database

    async def fill(url: URL) -> None:
        async with Store.open(settings_for(url), embedder=HashingEmbedder()) as store:
            await store.add_document("梅雨\x1b[31m [red]\u202e", "六月の北海道に梅雨はない。", guild_id=7)
            async with store.begin() as tx:
                await tx.sessions.append("thread:1", Message.user("雨"), guild_id=2**62)

    with new_database(server_url, template=str(template.database)) as url:
        asyncio.run(fill(url))
        yield url


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_command_explains_itself_with_an_example_and_has_json(name: str, command: Any) -> None:
    assert f"Example: kotonoha-store {name}" in command.help or f"kotonoha-store {name}" in command.help
    assert len(command.help.split("\n\n")) >= 2
    assert "--json" in {option for parameter in command.params for option in parameter.opts}
    assert all(getattr(parameter, "help", "") for parameter in command.params)


def test_the_help_names_every_exit_code() -> None:
    said = kotonoha("--help").stdout
    assert all(f"{code} " in said for code in (0, 1, 2, 3, 4, 5, 70, 130, 143))


def test_the_shell_completes_commands() -> None:
    completed = kotonoha(_KOTONOHA_STORE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="kotonoha-store recall")
    assert '"recall"' in completed.stdout
    assert '"recall-check"' in completed.stdout
    assert "migrate" not in completed.stdout


def test_wrong_usage_is_one_sentence_that_names_the_help() -> None:
    ran = kotonoha("serch", "雨")
    assert ran.code == 2
    assert ran.stderr.count("\n") == 1
    assert "Did you mean 'search'" in ran.stderr
    error = json.loads(kotonoha("status", "--json", "--color").stderr)
    assert error["exit_code"] == 2
    assert "`kotonoha-store status --help`" in error["message"]


def test_without_typer_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "typer":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr("warnings.simplefilter", lambda *_: None)
    with pytest.raises(SystemExit, match=r"kotonoha-store\[cli\]"):
        cli.main()


def test_a_defect_is_one_sentence_without_what_is_stored(filled_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: object) -> None:
        raise KeyError("geheim")

    monkeypatch.setattr(statistics, "store_status", broken)
    ran = kotonoha("status", url=filled_url)
    assert ran.code == 70
    assert ran.stderr.count("\n") == 1
    assert "KeyError in test_cli.py" in ran.stderr
    assert "--traceback" in ran.stderr
    assert "geheim" not in ran.stderr
    assert "Traceback" in kotonoha("status", "--traceback", url=filled_url).stderr
    assert "Traceback" in kotonoha("status", url=filled_url, KOTONOHA_STORE_TRACEBACK="1").stderr


@contextmanager
def sent_while_it_waits_for_a_lock(url: URL, number: int) -> Iterator[None]:
    """Lock the chunks, and send the signal as soon as a statement waits for them."""

    async def hold(locked: threading.Event) -> None:
        connection = await asyncpg.connect(**connect_arguments(url, settings_for(url)))
        async with connection.transaction():
            await connection.execute("LOCK TABLE knowledge_chunks")
            locked.set()
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'knowledge_chunks'::regclass"
            while not await connection.fetchval(waiting):  # noqa: ASYNC110  what the server does is no Event
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), number)
            # Else it could go on before it hears of the signal.
            while await connection.fetchval(waiting):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await connection.close()

    locked = threading.Event()
    holder = threading.Thread(target=lambda: asyncio.run(hold(locked)))
    holder.start()
    assert locked.wait(30)
    try:
        yield
    finally:
        holder.join(30)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_one_sentence(filled_url: URL, number: int, code: int) -> None:
    before = signal.getsignal(number)
    with sent_while_it_waits_for_a_lock(filled_url, number):
        ran = kotonoha("stats", url=filled_url)
    assert ran.code == code
    assert ran.stderr == "kotonoha-store: interrupted; what was written stays\n"
    assert signal.getsignal(number) == before


def test_what_is_stored_gives_a_terminal_no_orders(filled_url: URL) -> None:
    ran = kotonoha("search", "梅雨", "--everywhere", "--mode", "words", url=filled_url)
    assert ran.code == 0
    assert "梅雨\N{REPLACEMENT CHARACTER}[31m [red]" in ran.stdout
    assert not {"\x1b", "\u202e"} & set(ran.stdout)


def test_json_keeps_ids_as_numbers_and_times_as_iso(filled_url: URL, capsys: pytest.CaptureFixture[str]) -> None:
    (session,) = kotonoha("sessions", "--json", url=filled_url).json["sessions"]
    assert session["scope"]["guild_id"] == 2**62
    assert datetime.fromisoformat(session["last_active_at"]).tzinfo is not None
    show({"nan": float("nan"), "wait": timedelta(minutes=1), "at": datetime(2025, 1, 2, tzinfo=UTC)}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"nan": None, "wait": 60.0, "at": "2025-01-02T00:00:00Z"}


def test_tables_align_japanese_and_lose_nothing_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(None, False, table("title", "n", rows=[("雨" * 200, 5), ("rain", 10)]))
    heading, first, second = capsys.readouterr().out.splitlines()
    assert "雨" * 200 in first
    # Each of these characters is two columns wide.
    assert len(second) == len(first) + 200
    assert heading.endswith(" n")
    show(None, False, table("n", "title", rows=[(1, "雨" * 200), (2, "rain")]))
    assert capsys.readouterr().out.endswith("2  rain\n")


def test_progress_is_drawn_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("Importing") as report:
        report(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("Importing", as_json=True) as report:
        report(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(Console, "is_terminal", True)
    with progress("Importing") as report:
        report(1, None)
        report(1, 2)
    out, err = capsys.readouterr()
    assert not out
    assert "Importing" in err
    assert "1/2" in err


def test_a_librarys_warning_is_a_line_without_its_traceback(filled_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = logging.getLogger("a library")
    quiet.propagate = False  # pytest's own handlers are above

    async def warning(_: object) -> None:
        try:
            raise KeyError("geheim")
        except KeyError:
            quiet.exception("went wrong")
        raise asyncio.CancelledError

    monkeypatch.setattr(statistics, "store_status", warning)
    assert kotonoha("status", url=filled_url).stderr.startswith("kotonoha-store: went wrong\nkotonoha-store: inter")


def test_an_output_that_nobody_reads_any_more_ends_a_command_quietly(
    filled_url: URL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", filled_url.render_as_string(hide_password=False))
    for arguments in (["export", "-"], ["status"], ["current", "--json"], ["server", "status"]):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", closed)
            with pytest.raises(SystemExit) as ended:
                typer.main.get_command(app).main(arguments)
        assert ended.value.code == 141
        assert capsys.readouterr().err == ""
