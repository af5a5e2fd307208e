"""Alembic's environment for every database of the project: `alembic [-n SECTION] upgrade head`."""

import asyncio
import re
from dataclasses import dataclass
from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, MetaData

from kotonoha_store import migrations
from kotonoha_store.errors import ConfigurationError
from kotonoha_store.models import Base
from kotonoha_store.settings import Settings


@dataclass(frozen=True)
class Target:
    """What a section of alembic.ini migrates: the tables' metadata."""

    metadata: MetaData


TARGETS = {"alembic": Target(Base.metadata)}

config = context.config
target = TARGETS[config.config_ini_section]
if config.config_file_name is not None:  # the alembic command; a library configures no logging
    fileConfig(config.config_file_name, disable_existing_loggers=False)
# What revisions read: KB_HNSW_M, KB_HNSW_EF_CONSTRUCTION, KB_EMBEDDING_MODEL.
if "settings" not in config.attributes:
    try:
        config.attributes["settings"] = Settings()
    except ConfigurationError as error:
        # The command prints this one in a line.
        raise CommandError(str(error)) from error


def run(connection: Connection) -> None:
    schema = migrations.version_table_schema(connection)
    # Alembic given an open transaction would leave the commit to us.
    connection.rollback()
    context.configure(
        connection=connection,
        target_metadata=target.metadata,
        version_table_schema=schema,
        transaction_per_migration=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


# Alembic's own statements of a script, which would fail or add a second row when it is run again.
RERUNNABLE = (
    (re.compile(r"^CREATE TABLE alembic_version"), r"CREATE TABLE IF NOT EXISTS alembic_version"),
    (
        re.compile(r"^INSERT INTO alembic_version \(version_num\) VALUES \(('\w+')\)"),
        r"INSERT INTO alembic_version (version_num) SELECT \1 WHERE NOT EXISTS (SELECT FROM alembic_version)",
    ),
)


def run_offline() -> None:
    context.configure(
        dialect_name="postgresql",
        # The default would double every %.
        dialect_opts={"paramstyle": "named"},
        target_metadata=target.metadata,
        literal_binds=True,
        transaction_per_migration=True,
    )
    impl = context.get_context().impl
    write = impl.static_output

    def write_rerunnable(statement: str) -> None:
        for pattern, replacement in RERUNNABLE:
            statement = pattern.sub(replacement, statement)
        write(statement)

    # Of this run's context only.
    impl.static_output = write_rerunnable
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    run_offline()
elif (given := config.attributes.get("connection")) is not None:
    run(given)
else:
    # The alembic command. (The library hands over a connection, see kotonoha_store.migrations.)
    asyncio.run(migrations.with_connection(run))
