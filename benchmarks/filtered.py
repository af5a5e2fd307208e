"""Search within a filter: recall, rows returned and time, beside the best hand-written strategy.

    python benchmarks/filtered.py [--rows N] [--queries Q] [--repeats R] [--json]

``Store.search(vector, filters=SearchFilters(channel_id=...))``, ten hits, for channels that hold a half, a tenth, a
hundredth and a thousandth of the rows, spread at random over the 500 clusters of the vectors (ten neighbouring
rows, one source, share a channel). The hand-written strategies, each on an asyncpg connection of its own, return
the same columns:

* exact: the distance to every row of the channel, the filter in a materialized CTE;
* index: an iterative scan (relaxed order) of the HNSW index at several ``ef_search`` and ``max_scan_tuples``, other
  plans disabled.

All of them are tried on every query first; ``best`` is the one with the least median time of those that reach a
recall of 0.98, the exact one always does. Ours and it then answer each query in turn: ``p50_ratio_best`` is our
median by its. Recall at 10 is against the true nearest rows of the channel, found by numpy; ``rows_min`` is the
least number of hits of any query of ours, ``plan`` what most of them say they did.
"""

import argparse
import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from common import (
    SEED,
    connect,
    console,
    embedded_server,
    print_json,
    progress_bar,
    server_versions,
    store_settings,
)
from numpy.typing import NDArray
from rich.table import Table
from sqlalchemy import URL
from vectors import (
    CHUNKS_A_SOURCE,
    MODEL,
    SERVER_OPTIONS,
    TOP_K,
    Search,
    Vectors,
    load,
    nearest_rows,
    our_numbers,
    our_search,
    raw_numbers,
    raw_pool,
    recall,
    split_vectors,
    take_turns,
)

from kotonoha_store import SearchFilters, Store

FRACTIONS: Final = (0.5, 0.1, 0.01, 0.001)
ENOUGH: Final = 0.98
EF_SEARCH: Final = (40, 100, 200, 400, 700, 1000)
MAX_SCAN_TUPLES: Final = (20_000, 100_000)
# A strategy that takes so many times as long as the exact one in its first queries will not be the best.
HOPELESS: Final = 3
PILOT: Final = 5

_CANDIDATES: Final = """
SELECT id, embedding <=> $1::halfvec AS distance FROM knowledge_chunks
WHERE channel_id = $2::bigint AND embedding IS NOT NULL AND embedding_model = $3::text"""
_DETAILS: Final = """
SELECT c.id, c.source_id, c.content, c.location, c.occurred_from, c.occurred_to,
    s.type, s.title, s.uri, s.metadata, 1 - nearest.distance AS similarity
FROM nearest JOIN knowledge_chunks c ON c.id = nearest.id JOIN knowledge_sources s ON s.id = c.source_id
ORDER BY nearest.distance + 0, nearest.id"""
EXACT: Final = f"""
WITH candidates AS MATERIALIZED ({_CANDIDATES}),
nearest AS (SELECT id, distance FROM candidates ORDER BY distance, id LIMIT $4::integer){_DETAILS}"""
INDEX: Final = f"""
WITH nearest AS MATERIALIZED ({_CANDIDATES} ORDER BY embedding <=> $1::halfvec LIMIT $4::integer){_DETAILS}"""


@dataclass(frozen=True, slots=True)
class Strategy:
    """A hand-written way to search within a channel."""

    name: str
    sql: str
    settings: dict[str, str]


def strategies() -> list[Strategy]:
    """The exact one first."""
    ways = [Strategy("exact", EXACT, {})]
    for scan in MAX_SCAN_TUPLES:
        for ef_search in EF_SEARCH:
            settings = {
                "hnsw.iterative_scan": "relaxed_order",
                "hnsw.ef_search": str(ef_search),
                "hnsw.max_scan_tuples": str(scan),
                # The index gives its rows in order: what remains is the plan through it.
                "enable_sort": "off",
            }
            ways.append(Strategy(f"index, ef {ef_search}, scan {scan}", INDEX, settings))
    return ways


def channel_search(pool: Any, sql: str, channel: int) -> Search:
    """One strategy in one channel."""

    async def search(query: Vectors) -> Any:
        return await pool.fetch(sql, query, channel, MODEL, TOP_K)

    return search


@dataclass(frozen=True, slots=True)
class Trial:
    """How one strategy did on every query."""

    name: str
    search: Search
    p50: float
    recall: float


async def measure_channel(
    store: Store, pools: dict[str, tuple[str, Any]], channel: int, queries: Vectors, truth: list[set[int]], repeats: int
) -> dict[str, Any]:
    """Find the best strategy and let it and ours take turns."""
    best = await find_best(pools, channel, queries, truth)
    ours = our_search(store, filters=SearchFilters(channel_id=channel))
    turns = await take_turns(
        {"ours": ours, "best": best.search}, queries, repeats=repeats, label=f"channel {channel}, ours and {best.name}"
    )
    answers = turns["ours"].answers
    return {
        "rows_min": min(len(answer.hits) for answer in answers),
        "recall": recall([our_numbers(answer) for answer in answers], truth),
        "p50_ratio_best": turns["ours"].p50 / turns["best"].p50,
        "plan": Counter(answer.plan for answer in answers).most_common(1)[0][0],
        "p50_ms": {name: 1000 * turn.p50 for name, turn in turns.items()},
        "best": best.name,
        "best_recall": recall([raw_numbers(answer) for answer in turns["best"].answers], truth),
    }


async def find_best(pools: dict[str, tuple[str, Any]], channel: int, queries: Vectors, truth: list[set[int]]) -> Trial:
    """Try every strategy; return the quickest with recall enough."""
    trials: list[Trial] = []
    with progress_bar() as bar:
        for name, (sql, pool) in bar.track(pools.items(), description=f"channel {channel}, strategies"):
            search = channel_search(pool, sql, channel)
            # The first queries warm up, and tell the hopeless.
            pilot = await _try(name, search, queries[:PILOT], truth[:PILOT])
            if not trials or pilot.p50 < HOPELESS * trials[0].p50:
                trials.append(await _try(name, search, queries, truth))
    return min((trial for trial in trials if trial.recall >= ENOUGH), key=lambda trial: trial.p50)


async def _try(name: str, search: Search, queries: Vectors, truth: Sequence[set[int]]) -> Trial:
    seconds, found = [], []
    for query in queries:
        started = time.perf_counter()
        rows = await search(query)
        seconds.append(time.perf_counter() - started)
        found.append(raw_numbers(rows))
    return Trial(name, search, statistics.median(seconds), recall(found, truth))


def assign_channels(rows: int) -> NDArray[np.int64]:
    """The channel of each source: 1, 2, ... in the order of the fractions, the rest in one of its own; shuffled."""
    sources = rows // CHUNKS_A_SOURCE
    channels = np.full(sources, len(FRACTIONS) + 1, dtype=np.int64)
    ends = np.cumsum([round(fraction * sources) for fraction in FRACTIONS])
    for channel, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
        channels[first:last] = channel
    return np.random.default_rng(SEED).permutation(channels)


async def measure_all(url: URL, options: argparse.Namespace) -> dict[str, Any]:
    """Load, then measure channel by channel."""
    vectors, queries = split_vectors(options.rows, options.queries)
    channels = assign_channels(options.rows)
    figures: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store.open(store_settings(url)))
        await store.migrate()
        connection = await connect(url)
        stack.push_async_callback(connection.close)
        await load(store, connection, vectors, channels)
        pools: dict[str, tuple[str, Any]] = {}
        for way in strategies():
            pools[way.name] = (way.sql, await stack.enter_async_context(raw_pool(url, way.settings)))
        for channel, fraction in enumerate(FRACTIONS, 1):
            members = np.flatnonzero(np.repeat(channels, CHUNKS_A_SOURCE) == channel)
            truth = nearest_rows(vectors, queries, members)
            figures[str(fraction)] = await measure_channel(store, pools, channel, queries, truth, options.repeats)
    print_figures(figures, options.rows)
    versions = await server_versions(url)
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    return figures


def print_figures(figures: dict[str, Any], rows: int) -> None:
    """A row for each fraction."""
    table = Table(title=f"{rows} rows, {TOP_K} hits", title_justify="left")
    for heading in ("fraction", "plan", "rows, least", "recall", "p50, ms"):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    table.add_column("best by hand")
    for heading in ("recall", "p50, ms", "ours / best"):
        table.add_column(heading, justify="right")
    for fraction, figure in figures.items():
        table.add_row(
            fraction,
            figure["plan"],
            str(figure["rows_min"]),
            f"{figure['recall']:.3f}",
            f"{figure['p50_ms']['ours']:.2f}",
            figure["best"],
            f"{figure['best_recall']:.3f}",
            f"{figure['p50_ms']['best']:.2f}",
            f"{figure['p50_ratio_best']:.2f}",
        )
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="a multiple of 1000, at least 10,000")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.rows < 10_000 or options.rows % 1000:
        parser.error("--rows must be a multiple of 1000, and the smallest channel hold ten of them")
    return options


def main() -> None:
    """Measure on a server of our own."""
    options = _options()
    with embedded_server(options=SERVER_OPTIONS) as url:
        figures = asyncio.run(measure_all(url, options))
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
