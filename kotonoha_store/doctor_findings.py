"""What the doctor's checks are given and what they return; see :mod:`kotonoha_store.doctor`."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kotonoha_store.database import Database
from kotonoha_store.migrations import SchemaState
from kotonoha_store.settings import Settings


class Severity(StrEnum):
    """``info`` is worth knowing; ``warning`` will cost speed, recall or safety; ``error`` does so now."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw.

    Attributes:
        code: which check, and what of it; stable, for scripts.
        seen: what was found, in a sentence; no stored text, host, user or password.
        mend: what to do, or why nothing needs to be done: a command, a setting, or whom to ask.
        sql: the statements that do it, to be run one by one, outside a transaction, by a role that may.
    """

    code: str
    severity: Severity
    seen: str
    mend: str | None = None
    sql: tuple[str, ...] = ()

    @property
    def is_bad(self) -> bool:
        """Whether it is a warning or an error."""
        return self.severity in (Severity.WARNING, Severity.ERROR)


@dataclass(frozen=True, slots=True)
class Case:
    """What a check may look at.

    Attributes:
        driver: a connection of asyncpg's in autocommit.
        model: the embedder's, None where there is none.
        at: where the schema stands.
    """

    database: Database
    driver: Any
    model: str | None
    at: SchemaState

    @property
    def settings(self) -> Settings:
        return self.database.settings


def ok(code: str, seen: str) -> Finding:
    return Finding(code, Severity.OK, seen)


def info(code: str, seen: str, mend: str | None = None, *sql: str) -> Finding:
    return Finding(code, Severity.INFO, seen, mend, sql)


def warning(code: str, seen: str, mend: str, *sql: str) -> Finding:
    return Finding(code, Severity.WARNING, seen, mend, sql)


def error(code: str, seen: str, mend: str, *sql: str) -> Finding:
    return Finding(code, Severity.ERROR, seen, mend, sql)


def worst(*severities: Severity) -> Severity:
    return max(severities, key=list(Severity).index, default=Severity.OK)
