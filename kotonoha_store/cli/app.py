"""The application that command modules add their commands to, and what all of them share.

A command is an ``async def`` (or ``def``) in a module of this package, named in ``commands.py``::

    @app.command(rich_help_panel=INSPECT)
    async def count(top: int = 10, as_json: AsJson = False) -> None:
        \"\"\"One line that says what it does.

        What else there is to know.

        Example: kotonoha-store count --top 5
        \"\"\"
        async with open_database() as database:             # schema checked
            with progress("Counting", as_json) as report:   # a records.Progress
                result = await counted(database, top, progress=report)
        show(result, as_json, table("name", "count", rows=result.rows))
        if result.failed:
            raise typer.Exit(FINDINGS)

Errors are raised, never caught to be printed: :class:`RootGroup` turns each into one sentence on stderr and
an exit code. Texts from outside (content, titles, names) reach the terminal through :func:`table` or :func:`plain`.
"""

import asyncio
import contextlib
import errno
import functools
import inspect
import json
import logging
import os
import re
import select
import signal
import sys
import traceback
import unicodedata
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from alembic.util import CommandError
from pydantic import ValidationError
from pydantic_core import to_jsonable_python
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from kotonoha_store import migrations
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translate_error
from kotonoha_store.errors import (
    ConfigurationError,
    InvalidInputError,
    ModelMismatchError,
    NotFoundError,
    RateLimitedError,
    SchemaOutdatedError,
    StoreError,
    StoreUnavailableError,
    TransientEmbeddingError,
)
from kotonoha_store.records import Progress
from kotonoha_store.replicas import Replica
from kotonoha_store.settings import Settings
from kotonoha_store.store import Store

DONE: Final = 0
FINDINGS: Final = 1
USAGE: Final = 2
INPUT: Final = 3
UNAVAILABLE: Final = 4
SCHEMA: Final = 5
UNEXPECTED: Final = 70
INTERRUPTED: Final = 130
UNREAD: Final = 141
TERMINATED: Final = 143

_EPILOG: Final = (
    "Exit codes: 0 done; 1 findings, unhealthy, some records failed, or not confirmed; 2 wrong usage; "
    "3 configuration or input; 4 the database (or the embedding provider) cannot be reached or timed out; "
    "5 the schema is empty, outdated or newer than this version; 70 a defect of this program; 130 interrupted; "
    "141 whoever read the output stopped reading; 143 terminated.\n\n"
    "The database is that of DATABASE_URL or POSTGRES_HOST (also from a .env file), else an embedded one."
)

_TRACEBACK: Final = "KOTONOHA_STORE_TRACEBACK"

# Panels of --help.
SET_UP: Final = "Set up"
USE: Final = "Use"
INSPECT: Final = "Inspect"
MAINTAIN: Final = "Maintain"
MOVE: Final = "Move data"

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts; errors too, on stderr.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]

R = TypeVar("R")


class _Stopped(Exception):
    """A signal ended the command."""


class _Unread(Exception):
    """Who read the output has enough of it."""


class RootGroup(TyperGroup):
    """The place where every error of every command becomes one sentence and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        own = given.index("--") if "--" in given else len(given)
        as_json = "--json" in given[:own]
        # Wherever it stands: who reports a defect adds it to the end of the line.
        with_traceback = "--traceback" in given[:own] or os.environ.get(_TRACEBACK, "") not in ("", "0")
        given = [each for each in given[:own] if each != "--traceback"] + given[own:]
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                # Japanese on a terminal of another encoding is no reason to fail.
                stream.reconfigure(errors="backslashreplace")
        # Of libraries' warnings the message; asyncio logs tracebacks.
        logging.lastResort = _LastResort(with_traceback)
        try:
            code = super().main(given, "kotonoha-store", complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()
        except (_Unread, BrokenPipeError):
            # Python would flush, and complain, once more at its end.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = UNREAD
        except Exception as error:  # noqa: BLE001  the last one to see it
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(str(error), err=True)
                sys.exit(USAGE)
            if with_traceback:
                traceback.print_exc()
            code = _report(error, as_json)
        sys.exit(code if isinstance(code, int) else DONE)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if _is_unread(error):
                # Of a BrokenPipeError typer's main() would make exit code 1, which says something else here.
                raise _Unread from error
            raise


def _is_unread(error: BaseException | None) -> bool:
    """Whether it comes of an output that nobody reads any more, as in ``export - | head``."""
    while error is not None and not isinstance(error, BrokenPipeError):
        error = error.__cause__
    if error is None:
        return False
    # A connection to the database may be such a pipe as well.
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        return bool(output.poll(0))
    except (OSError, ValueError):
        return False


class _LastResort(logging.Handler):
    """Warnings of libraries, for commands that set up no logging: a line each, on the stderr of the moment."""

    def __init__(self, with_traceback: bool) -> None:
        super().__init__(logging.WARNING)
        self._with_traceback = with_traceback

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) if self._with_traceback else record.getMessage().partition("\n")[0]
        print(f"kotonoha-store: {line}", file=sys.stderr)


def _report(error: Exception, as_json: bool) -> int:
    name, message, code = describe(error)
    # A sentence stays one line, and no terminal obeys what a name or a path may hold.
    message = printable(" ".join(message.split()))
    if as_json:
        print(json.dumps({"error": name, "message": message, "exit_code": code}), file=sys.stderr)
    else:
        print(f"kotonoha-store: {message}", file=sys.stderr)
    return code


def describe(error: BaseException) -> tuple[str, str, int]:
    """Return an error's name, what to tell the user about it, and the exit code."""
    while isinstance(error, BaseExceptionGroup):
        error = next((each for each in error.exceptions if isinstance(each, StoreError)), error.exceptions[0])
    if not isinstance(error, StoreError) and not _is_of_a_file(error):
        error = translate_error(error) or error
    name = type(error).__name__
    if isinstance(error, SchemaOutdatedError):
        return name, str(error), SCHEMA
    if isinstance(error, ConfigurationError | InvalidInputError | NotFoundError | ModelMismatchError):
        return name, str(error), INPUT
    if isinstance(error, StoreUnavailableError | RateLimitedError | TransientEmbeddingError):
        return name, str(error), UNAVAILABLE
    if isinstance(error, StoreError):
        return name, str(error), FINDINGS
    if isinstance(error, _UsageError):
        path = error.ctx.command_path if error.ctx else "kotonoha-store"
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        return name, f"{message}; see `{path} --help`", USAGE
    if isinstance(error, _Stopped):
        terminated = error.args[0] == signal.SIGTERM
        return "Interrupted", "interrupted; what was written stays", TERMINATED if terminated else INTERRUPTED
    if isinstance(error, typer.Abort):
        # Ctrl-C at the question, its end of file (a script's), or a no.
        return "NotConfirmed", "not confirmed, so nothing was changed; --yes answers for you", FINDINGS
    if isinstance(error, CommandError):
        return name, str(error), INPUT
    if isinstance(error, ValidationError):
        # Without the input, which may be private.
        first = error.errors(include_input=False, include_url=False)[0]
        return (
            name,
            f"invalid {'.'.join(map(str, first['loc'])) or error.title}: {first['msg'].removeprefix('Value error, ')}",
            INPUT,
        )
    if isinstance(error, OSError):
        about = f"{error.filename}: " if error.filename else ""
        return name, f"{about}{error.strerror or name}", INPUT
    return name, f"{_unexpected(error)}", UNEXPECTED


# Its own name differs between versions of typer, which carry click or import it.
_UsageError: Final[Any] = typer.BadParameter.__mro__[1]


def _is_of_a_file(error: BaseException) -> bool:
    return isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT))


def _unexpected(error: BaseException) -> str:
    # Neither its message, which may quote what is stored, nor more than one line.
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {Path(last[0].filename).name}, line {last[0].lineno}" if last else ""
    return (
        f"an unexpected {type(error).__name__}{where}, which is a defect of this program; run it again with "
        f"--traceback (or {_TRACEBACK}=1) and report what it prints"
    )


class App(typer.Typer):
    """Typer, for commands that are coroutines as well."""

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        register = super().command(*args, **options)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            if not inspect.iscoroutinefunction(function):
                return register(function)

            @functools.wraps(function)
            def wrapper(*values: Any, **named: Any) -> None:
                run(function(*values, **named))

            register(wrapper)
            return function

        return decorate


def run(work: Coroutine[Any, Any, R]) -> R:
    """Run a command's coroutine; Ctrl-C and SIGTERM cancel it, so that it leaves its blocks in order."""
    received: list[int] = []

    async def main() -> R:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # noqa: S101  a coroutine that runs is a task's

        def handle(number: int, _: object) -> None:
            received.append(number)
            loop.call_soon_threadsafe(task.cancel)

        previous = {}
        # Not by the loop: stop_on_signals() replaces these for its block, and puts them back.
        with contextlib.suppress(ValueError):  # not in the main thread
            previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return await work
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)

    try:
        return asyncio.run(main())
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise _Stopped(received[0] if received else signal.SIGINT) from None


app = App(
    name="kotonoha-store",
    cls=RootGroup,
    help="The PostgreSQL memory of a conversational AI: set up, use, look after and move it.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
import_app = App(help="Bring in what other programs wrote.", no_args_is_help=True)
dlq_app = App(help="Look at dead letters, queue them again or throw them away.", no_args_is_help=True)
server_app = App(help="The embedded server: start, stop, address, psql.", no_args_is_help=True)

app.add_typer(dlq_app, name="dlq", rich_help_panel=MAINTAIN)
app.add_typer(import_app, name="import", rich_help_panel=MOVE)
app.add_typer(server_app, name="server", rich_help_panel=SET_UP)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("kotonoha-store"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    # Taken out of the arguments before they are parsed.
    with_traceback: Annotated[
        bool, typer.Option("--traceback", help=f"Show where an error came from; also {_TRACEBACK}=1.")
    ] = False,
) -> None:
    pass


@asynccontextmanager
async def open_database(*, check: bool = True, patient: bool = False) -> AsyncIterator[Database]:
    """Open the database of the environment, and refuse one whose schema is not this version's."""
    async with await Database.open(Settings(), patient=patient) as database:
        if check:
            (await migrations.state(database)).check()
        yield database


@asynccontextmanager
async def open_store(*, check: bool = True, embedder: bool = True) -> AsyncIterator[Store]:
    """As :func:`open_database`, for the whole store. ``embedder=False`` where none is used."""
    if not embedder:
        # Store.open() would make the one of the settings, and fail where it cannot be made.
        async with open_database(check=check) as database, AsyncExitStack() as stack:
            if (replica := Replica.from_settings(database.settings, database)) is not None:
                stack.push_async_callback(replica.close)
            yield Store(database, database.settings, None, replica)
        return
    async with Store.open(Settings()) as store:
        if check:
            (await migrations.state(store.database)).check()
        yield store


def require_embedder(store: Store, else_: str = "") -> None:
    """Refuse a store without an embedder, in the words of the command line.

    Args:
        else_: what can be done without one.
    """
    try:
        _ = store.embedder
    except ConfigurationError:
        raise ConfigurationError(
            "no embedder is configured: set OPENAI_API_KEY, or KB_EMBEDDER=local with KB_EMBEDDING_MODEL, or "
            f"KB_EMBEDDER=hashing (finds wording, not meaning){else_}"
        ) from None


def origin_of_address(settings: Settings) -> str:
    """Which setting says where the database is."""
    if settings.postgres_host is not None:
        return "POSTGRES_HOST" + (" (DATABASE_URL is not used)" if settings.database_url is not None else "")
    return "DATABASE_URL" if settings.database_url is not None else "no setting: the embedded server"


def confirm(question: str, yes: bool) -> None:
    """Ask on stderr unless ``--yes`` was given; end the command unless the answer is yes."""
    if not yes:
        typer.confirm(question, err=True, abort=True)


def show(result: object, as_json: bool, *people: RenderableType) -> None:
    """Print the result: as one JSON object, or what stands in ``people`` one after the other.

    Args:
        result: what becomes a JSON object: a dataclass or a mapping. Ids stay numbers, times become ISO 8601,
            durations seconds, NaN null.
    """
    if as_json:
        value = to_jsonable_python(result, timedelta_mode="float", inf_nan_mode="null", fallback=str)
        ascii_only = (sys.stdout.encoding or "ascii").replace("-", "").lower() != "utf8"
        print(json.dumps(value, ensure_ascii=ascii_only, indent=2 if sys.stdout.isatty() else None, allow_nan=False))
        return
    if sys.stdout.isatty():
        console = Console(highlight=False, markup=False)
        for each in people:
            console.print(each)
        return
    # Into a file or a pipe nothing is cut to a terminal's width, nor padded to the widest line.
    console = Console(width=10_000, highlight=False, markup=False, force_terminal=False)
    with console.capture() as capture:
        for each in people:
            console.print(each)
    sys.stdout.write(re.sub(r" +$", "", capture.get(), flags=re.MULTILINE))


def table(*columns: str, rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A table for people: numbers to the right, None as a dash, everything from outside made printable."""
    cells = [[*row] for row in rows]
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        values = [row[index] for row in cells if row[index] is not None]
        is_number = bool(values) and all(isinstance(value, int | float | Size) for value in values)
        result.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        result.add_row(*(cell(value) for value in row))
    return result


def pairs(values: Iterable[tuple[str, object]]) -> Table:
    """Names and values, one below the other."""
    result = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in values:
        result.add_row(Text(name, style="bold"), cell(value))
    return result


class Size(int):
    """A number of bytes, shown as people say it."""

    def __str__(self) -> str:
        amount = float(self)
        for unit in ("B", "KiB", "MiB", "GiB"):
            if amount < 1024:
                return f"{int(amount)} B" if unit == "B" else f"{amount:.1f} {unit}"
            amount /= 1024
        return f"{amount:.1f} TiB"


def cell(value: object) -> Text:
    """What stands in a table for a value."""
    if value is None:
        return Text("-")
    if isinstance(value, Text):
        return value
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, float):
        return Text(f"{value:.3f}".rstrip("0").rstrip("."))
    if isinstance(value, datetime):
        return Text(value.isoformat(" ", "seconds"))
    if isinstance(value, timedelta):
        return Text(str(timedelta(seconds=round(value.total_seconds()))))
    return plain(str(value.value if isinstance(value, Enum) else value))


def plain(value: str, style: str = "") -> Text:
    """Text as it is: neither rich's markup nor a terminal's commands in it take effect."""
    return Text(printable(value), style=style)


def printable(value: str) -> str:
    """The text without control characters, formats that reorder lines, and lone surrogates; line ends stay."""
    return "".join(
        # Zero-width joiners hold emoji together.
        each
        if unicodedata.category(each) not in ("Cc", "Cf", "Cs") or each in "\n\t\u200d"
        else "\N{REPLACEMENT CHARACTER}"
        for each in value.replace("\r\n", "\n")
    )


@contextmanager
def progress(label: str, as_json: bool = False) -> Iterator[Progress]:
    """A progress bar on stderr; silent where that is no terminal, and with ``--json``."""
    if as_json or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
