"""What the benchmarks share: a server of their own, data from a fixed seed, contests, tables.

Absolute times drift from machine to machine and from minute to minute. So rivals take turns in one run, each
round alternating who comes first, and a ratio is the median over the rounds of the ratio within a round.
"""

import asyncio
import gc
import importlib.metadata
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import URL, make_url

from kotonoha_store import EMBEDDING_DIMENSION, Settings, embedded
from kotonoha_store.database import connect_arguments

SEED: Final = 20261121

# Tables for people; wide enough not to be cut where the output goes to a file.
console: Final = Console(width=None if Console().is_terminal else 120)
# Bars and remarks: on stderr, so that the last line of stdout is the JSON object.
notes: Final = Console(stderr=True)


@contextmanager
def embedded_server(*, version: int = 18, options: Mapping[str, str] | None = None) -> Iterator[URL]:
    """Start a new embedded server in a temporary directory; both are gone at the end.

    Args:
        options: settings of the server (``ALTER SYSTEM``) that need no restart.
    """
    # Short, since a socket's path is limited; open to the server's own user when root runs this.
    directory = Path(tempfile.mkdtemp(prefix="ktb", dir="/tmp" if Path("/tmp").is_dir() else None))  # noqa: S108  a unique name in it
    directory.chmod(0o755)
    server = embedded.start(directory / "pg", version=version, databases=("postgres", "bench"))
    url = make_url(server.url("bench"))
    try:
        settings = [f"ALTER SYSTEM SET {name} = '{value}'" for name, value in (options or {}).items()]
        asyncio.run(run_sql(url, *settings, "SELECT pg_reload_conf()"))
        yield url
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def store_settings(url: URL, **values: Any) -> Settings:
    """Settings for this database; what the environment says of another one does not count."""
    given = {"db_pool_min_size": 1, "db_pool_max_size": 10, **values}
    return Settings(_env_file=None, database_url=url.render_as_string(hide_password=False), postgres_host=None, **given)


async def connect(url: URL) -> Any:
    """A connection of the bare driver."""
    return await asyncpg.connect(**driver_arguments(url))


def driver_arguments(url: URL) -> dict[str, Any]:
    """What the bare driver connects with."""
    return connect_arguments(url, store_settings(url))


async def run_sql(url: URL, *statements: str) -> None:
    """Execute statements on a connection of their own, each committed by itself."""
    connection = await connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def server_versions(url: URL) -> dict[str, str]:
    """Versions of PostgreSQL, of pgvector where it is installed, and of what talks to them."""
    connection = await connect(url)
    try:
        postgres = await connection.fetchval("SHOW server_version")
        pgvector = await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
    finally:
        await connection.close()
    versions = {"PostgreSQL": postgres.split()[0], "pgvector": pgvector or "-", "Python": platform.python_version()}
    packages = package_versions("sqlalchemy", "asyncpg", "numpy", "pgvector")
    return versions | {f"{name} (PyPI)" if name == "pgvector" else name: found for name, found in packages.items()}


def package_versions(*names: str) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def clustered_vectors(count: int, *, centres: int = 500, spread: float = 0.6, seed: int = SEED) -> NDArray[np.float32]:
    """Return ``count`` unit vectors, shape (count, 1536), around random centres.

    Not uniform noise: in 1,536 dimensions all of its points are equally far from each other.

    Args:
        spread: length of the noise relative to the centre's.
    """
    random = np.random.default_rng(seed)
    middle = random.standard_normal((centres, EMBEDDING_DIMENSION), dtype=np.float32)
    vectors = random.standard_normal((count, EMBEDDING_DIMENSION), dtype=np.float32) * np.float32(spread)
    vectors += middle[random.integers(centres, size=count)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


@dataclass(frozen=True, slots=True)
class Contestant:
    """One of those that are measured against each other.

    Attributes:
        prepare: brings the tables into the state that every contestant starts from; not measured.
        run: what is measured.
    """

    name: str
    prepare: Callable[[], Awaitable[None]]
    run: Callable[[], Awaitable[None]]


async def contest(
    contestants: Sequence[Contestant], *, repeats: int, label: str, warmups: int = 1
) -> dict[str, list[float]]:
    """Let the contestants take turns; return the seconds of each, one per round.

    Every second round goes the other way round, so that nobody always runs after the same neighbour.
    """
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    with progress_bar() as bar:
        task = bar.add_task(label, total=(warmups + repeats) * len(contestants))
        for round_number in range(-warmups, repeats):
            for contestant in contestants if round_number % 2 == 0 else reversed(contestants):
                await contestant.prepare()
                gc.collect()
                started = time.perf_counter()
                await contestant.run()
                elapsed = time.perf_counter() - started
                if round_number >= 0:
                    seconds[contestant.name].append(elapsed)
                bar.advance(task)
    return seconds


def median_rate(rows: int, seconds: Sequence[float]) -> float:
    """Rows per second in the median round."""
    return rows / statistics.median(seconds)


def rate_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Our rate by theirs, the median over the rounds: above 1 we are faster."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def progress_bar() -> Progress:
    """A bar on stderr, gone when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=notes,
        transient=True,
    )


def print_json(figures: Mapping[str, Any]) -> None:
    """Print the figures as one line of JSON, floats to four significant digits."""
    print(json.dumps(_rounded(figures), separators=(", ", ": ")), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
