"""What migrations would do, without a database: their SQL, and what a downgrade throws away."""

import re
from dataclasses import dataclass
from io import StringIO
from typing import Any, Final

from alembic import command
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from kotonoha_store import migrations
from kotonoha_store.errors import ConfigurationError
from kotonoha_store.settings import Settings

_RELATIVE: Final = re.compile(r"[+-][0-9]{1,9}")
_DROPPED_TABLE: Final = re.compile(r"^DROP TABLE (?:IF EXISTS )?(\w+)", re.MULTILINE)
_DROPPED_COLUMN: Final = re.compile(r"^ALTER TABLE (\w+) DROP COLUMN (?:IF EXISTS )?(\w+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Losses:
    """What a downgrade drops with all that is in it; columns of those tables are not named again."""

    tables: tuple[str, ...]
    columns: tuple[str, ...]


def resolve(revision: str, current: str | None) -> str:
    """Return the revision that is meant: itself, or counted from the current one, such as ``+1`` or ``-1``.

    Raises:
        ConfigurationError: there is none.
    """
    scripts = ScriptDirectory.from_config(migrations.alembic_config())
    known = ["base", *reversed([each.revision for each in scripts.walk_revisions()])]
    at = current or "base"
    if _RELATIVE.fullmatch(revision) and at in known:
        position = known.index(at) + int(revision)
        if 0 <= position < len(known):
            return known[position]
    elif revision in (*known, "head"):
        return revision
    raise ConfigurationError(
        f"there is no revision {revision}{f' from {at}' if _RELATIVE.fullmatch(revision) else ''}; "
        f"known: {', '.join(known)}"
    )


def upgrade_sql(revisions: str = "head", *, settings: Settings | None = None) -> str:
    """Return the statements that bring a database to a revision, for whoever runs them by hand.

    Args:
        revisions: where to, or ``from:to``, such as ``0003:head``.
        settings: the index is built with KB_HNSW_M and KB_HNSW_EF_CONSTRUCTION of these.

    Raises:
        ConfigurationError: a revision is unknown, or the second lies before the first.
    """
    start, separator, end = revisions.partition(":")
    return _sql(command.upgrade, f"{start or 'base'}:{end or 'head'}" if separator else revisions, settings)


def downgrade_sql(start: str, end: str, *, settings: Settings | None = None) -> str:
    """Return the statements that bring a database back from one revision to another, such as ``base``.

    Raises:
        ConfigurationError: a revision is unknown, or the second lies after the first.
    """
    return _sql(command.downgrade, f"{start}:{end}", settings)


def losses(start: str, end: str, *, settings: Settings | None = None) -> Losses:
    """Return the tables and columns (``table.column``) that :func:`kotonoha_store.migrations.downgrade` drops.

    Raises: as :func:`downgrade_sql`.
    """
    sql = downgrade_sql(start, end, settings=settings)
    tables = tuple(dict.fromkeys(each for each in _DROPPED_TABLE.findall(sql) if each != "alembic_version"))
    columns = dict.fromkeys(f"{table}.{column}" for table, column in _DROPPED_COLUMN.findall(sql))
    return Losses(tables, tuple(each for each in columns if each.partition(".")[0] not in tables))


def _sql(run: Any, revisions: str, settings: Settings | None) -> str:
    config = migrations.alembic_config()
    config.attributes["settings"] = settings or Settings()
    config.output_buffer = output = StringIO()
    # alembic.context is global to the process.
    with migrations._in_process:
        try:
            run(config, revisions, sql=True)
        except CommandError as error:
            raise ConfigurationError(f"no SQL from {revisions.replace(':', ' to ')}: {error}") from error
    return output.getvalue()
