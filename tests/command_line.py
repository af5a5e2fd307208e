"""The command line run in this process, and what it left."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer
from sqlalchemy import URL
from typer.testing import CliRunner

from kotonoha_store.cli.commands import app


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def kotonoha(*arguments: str, url: URL | None = None, stdin: str | None = None, **environment: str) -> Ran:
    """Run ``kotonoha-store`` with these arguments, on this database."""
    if url is not None:
        environment["DATABASE_URL"] = url.render_as_string(hide_password=False)
    # One try, with the time that a busy machine may need; who cannot be reached at all refuses at once.
    environment = {"KB_EMBEDDER": "hashing", "DB_CONNECT_ATTEMPTS": "1", "DB_CONNECT_TIMEOUT": "60", **environment}
    result = CliRunner().invoke(app, list(arguments), input=stdin, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its path, such as ``dlq list``."""
    yield from _walk(typer.main.get_command(app), ())


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from _walk(child, (*path, name))
        else:
            yield " ".join((*path, name)), child
