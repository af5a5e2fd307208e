"""What a backup holds: its manifest, the tables' sums in it, and their comparison with a database."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import InvalidInputError, StoreError
from kotonoha_store.migrations import UNFINISHED

REVISION: Final = "alembic_version"

_MANIFEST_MAX: Final = 10_000_000

NonNegative = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class TableSum:
    """What a table held.

    Attributes:
        rows: how many.
        checksum: the sum of a hash of each row, whatever their order, vectors included.
    """

    rows: NonNegative
    checksum: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds.

    Attributes:
        created_at: when its snapshot was taken.
        library: the version of this library.
        revision: the schema's.
        server: the server's version, ``18.1``.
        program: pg_dump's.
        schema: the schema that was dumped.
        vector: pgvector's version.
        vector_schema: the schema it lies in.
        size: bytes of the dump.
        sha256: of the dump, in hexadecimal.
        tables: by name.
        sequences: the last value each had given when the dump began.
    """

    format: Literal[1]
    created_at: datetime
    library: str
    revision: str
    server: str
    program: str
    schema: str
    vector: str | None
    vector_schema: str | None
    size: NonNegative
    sha256: str
    tables: dict[str, TableSum]
    sequences: dict[str, int]


def manifest_path(file: Path) -> Path:
    """Return where the manifest of a backup is."""
    return file.with_name(f"{file.name}.json")


def read_manifest(file: Path) -> Manifest:
    """Return the manifest beside a backup.

    Raises:
        InvalidInputError: it is missing or no manifest.
    """
    path = manifest_path(Path(file))
    try:
        if path.stat().st_size > _MANIFEST_MAX:
            raise InvalidInputError(f"{path} is no manifest of a backup")
        return TypeAdapter(Manifest).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InvalidInputError(
            f"{path} is missing, which `backup` writes beside the file and which tells whether all came back; put both "
            "side by side"
        ) from None
    except ValidationError:
        raise InvalidInputError(f"{path} is no manifest of a backup, or of a newer version of this library") from None


def checked(file: Path) -> Manifest:
    """The manifest, when the dump is the one it was written for."""
    if not file.is_file():
        raise InvalidInputError(f"there is no file {file}")
    manifest = read_manifest(file)
    size = file.stat().st_size
    if size != manifest.size:
        raise InvalidInputError(
            f"{file} has {size} bytes and not the {manifest.size} that were written: it is truncated, or of another "
            "backup than the manifest beside it; take another copy"
        )
    if digest_of(file)[1] != manifest.sha256:
        raise InvalidInputError(
            f"{file} is not what was written (its SHA-256 differs): it was changed or damaged; take another copy"
        )
    return manifest


def digest_of(file: Path) -> tuple[int, str]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


def write_manifest(path: Path, manifest: Manifest) -> None:
    # Exclusive, and for its owner alone from the first.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        values = asdict(manifest) | {"created_at": manifest.created_at.isoformat()}
        json.dump(values, stream, ensure_ascii=False, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(descriptor)


NO_TIMEOUTS: Final = text("""
    SELECT set_config(name, '0', true) FROM pg_settings
    WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout')
""")

# Text that is the same in every database and on every version.
_PLAIN_TEXT: Final = text("""
    SELECT set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, MDY', true),
        set_config('IntervalStyle', 'postgres', true), set_config('bytea_output', 'hex', true),
        set_config('extra_float_digits', '1', true), set_config('row_security', 'off', true)
""")

SEQUENCES: Final = text("""
    SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = :schema AND last_value IS NOT NULL ORDER BY 1
""")

# For each table the statement that counts and sums it. A vector's text is long and slow to make, its bytes are not.
_STATEMENTS: Final = text("""
    SELECT c.relname, format(
        'SELECT count(*) AS rows, coalesce(sum((''x'' || left(encode(sha256(convert_to('
        'CAST(ROW(%s) AS text), ''UTF8'')), ''hex''), 16))::bit(64)::bigint), 0)::text AS checksum FROM ONLY %I.%I',
        (SELECT string_agg(
            CASE WHEN t.typname IN ('halfvec', 'vector') THEN format('%s(%I)', t.typsend, a.attname)
                ELSE quote_ident(a.attname) END, ', ' ORDER BY a.attname COLLATE "C")
            FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
        n.nspname, c.relname)
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = :schema AND c.relkind = 'r' AND c.relname <> :unfinished
        AND NOT EXISTS (SELECT FROM pg_depend AS d
            WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
    ORDER BY c.relname
""")


async def sums(connection: AsyncConnection, schema: str, *, only: Sequence[str] | None = None) -> dict[str, TableSum]:
    with translated_errors():
        await connection.execute(NO_TIMEOUTS)
        await connection.execute(_PLAIN_TEXT)
        statements = (await connection.execute(_STATEMENTS, {"schema": schema, "unfinished": UNFINISHED})).all()
        result = {}
        for table, statement in statements:
            if only is None or table in only:
                counted = (await connection.exec_driver_sql(statement)).mappings().one()
                result[table] = TableSum(counted["rows"], counted["checksum"])
        return result


async def compare(database: Database, manifest: Manifest, *, only: Sequence[str] | None = None) -> None:
    """
    Raises:
        StoreError: the tables are not what the manifest says.
    """
    async with database.transaction() as connection:
        there = await sums(connection, manifest.schema, only=only)
        with translated_errors():
            rows = await connection.execute(SEQUENCES, {"schema": manifest.schema})
            sequences = {row.sequencename: row.last_value for row in rows}
    problems = []
    for table, expected in manifest.tables.items():
        if (only is None) == (table == REVISION):
            continue
        found = there.get(table)
        if found is None:
            problems.append(f"{table} is missing")
        elif found.rows != expected.rows:
            problems.append(f"{table} has {found.rows} rows and not {expected.rows}")
        elif found.checksum != expected.checksum:
            problems.append(f"{table} has rows of other content")
    if only is None:
        problems += [f"{table} is not in the manifest" for table in sorted(there.keys() - manifest.tables.keys())]
    # It may have gone on while the dump was made, but not back: ids would come twice.
    behind = (name for name, value in manifest.sequences.items() if sequences.get(name, value - 1) < value)
    problems += [f"{name} is behind" for name in behind]
    if problems:
        raise StoreError(
            f"what was restored is not what was backed up: {'; '.join(problems)}; do not use this database, take "
            "another backup"
        )
