"""How fast a search by vector is: beside hand-written asyncpg, and beside other stores.

    python benchmarks/search.py [--rows N] [--queries Q] [--repeats R] [--peers NAME ...] [--json]

``Store.search(vector, everywhere=True)``, ten hits, over vectors of 500 clusters (queries from the same clusters),
HNSW with m 16 and ef_construction 64, built after loading:

* raw: an asyncpg pool's ``fetch`` of the SELECT that our own search sends (recorded), with our search's
  ``hnsw`` settings set once on its connections, and nothing else sent. Both answer each query in turn;
  ``p50_ratio_raw`` is our median by theirs. Its rows stay as the driver returns them, JSON as text.
* ``qps8_ratio_raw``: searches per second of eight tasks at once, each side by itself, in rounds.
* peers: other stores in tables of their own on the same server, with the same rows, an index of the same m and
  ef_construction and our search's ef_search, filled, indexed and searched by their documented ways; all answer each
  query in turn. ``--peer-rows`` of them, for they take a millisecond and more to add a row; ours holds as many then.

Recall at 10 is against the true nearest rows, found by numpy.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final

import numpy as np
from common import (
    Contestant,
    connect,
    console,
    contest,
    embedded_server,
    median_rate,
    notes,
    package_versions,
    print_json,
    rate_ratio,
    run_sql,
    server_versions,
    store_settings,
)
from peers import PEERS, Peer, installed, peer_packages
from rich.table import Table
from sqlalchemy import URL
from vectors import (
    CHUNKS_A_SOURCE,
    SERVER_OPTIONS,
    TOP_K,
    Search,
    Turns,
    Vectors,
    load,
    make_chunks,
    nearest_rows,
    our_numbers,
    our_search,
    raw_numbers,
    raw_pool,
    recall,
    record_search,
    search_settings,
    split_vectors,
    take_turns,
)

from kotonoha_store import Store

CLIENTS: Final = 8
PEER_BATCH: Final = 2000


async def measure_raw(url: URL, vectors: Vectors, queries: Vectors, repeats: int) -> dict[str, Any]:
    """Ours beside hand-written asyncpg: one query after the other, then many at once."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store.open(_settings(url)))
        await _fill(url, store, vectors)
        ours = our_search(store, everywhere=True)
        settings = await search_settings(store, queries[0])
        statement = await record_search(ours, queries)
        pool = await stack.enter_async_context(raw_pool(url, settings, size=CLIENTS))

        async def raw(query: Vectors) -> Any:
            return await pool.fetch(statement.sql, *statement.arguments(query))

        searches: dict[str, Search] = {"ours": ours, "raw": raw}
        turns = await take_turns(searches, queries, repeats=repeats, label="searching")
        truth = nearest_rows(vectors, queries)
        rates = await contest(
            [Contestant(name, _nothing, partial(_at_once, search, queries)) for name, search in searches.items()],
            repeats=max(repeats, 5),
            label=f"{CLIENTS} clients",
        )
    return {
        "p50_ratio_raw": turns["ours"].p50 / turns["raw"].p50,
        "qps8_ratio_raw": rate_ratio(rates["ours"], rates["raw"]),
        f"recall@{TOP_K}": recall([our_numbers(answer) for answer in turns["ours"].answers], truth),
        "raw": {f"recall@{TOP_K}": recall([raw_numbers(answer) for answer in turns["raw"].answers], truth)},
        "p50_ms": {name: 1000 * turn.p50 for name, turn in turns.items()},
        "qps8": {name: median_rate(len(queries), seconds) for name, seconds in rates.items()},
        "ef_search": int(settings["hnsw.ef_search"]),
    }


def _settings(url: URL) -> Any:
    # As many connections kept as the raw pool keeps.
    return store_settings(url, db_pool_min_size=CLIENTS, db_pool_max_size=CLIENTS)


async def _fill(url: URL, store: Store, vectors: Vectors) -> None:
    await store.migrate()
    connection = await connect(url)
    try:
        await load(store, connection, vectors)
    finally:
        await connection.close()


async def _nothing() -> None:
    """Nothing to prepare: a search changes nothing."""


async def _at_once(search: Search, queries: Vectors) -> None:
    """All queries, shared among the clients."""
    waiting = iter(queries)

    async def client() -> None:
        for query in waiting:
            await search(query)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())


async def measure_peers(url: URL, vectors: Vectors, queries: Vectors, options: argparse.Namespace) -> dict[str, Any]:
    """Ours beside other stores with the same rows."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store.open(_settings(url)))
        await _fill(url, store, vectors)
        ef_search = int((await search_settings(store, queries[0]))["hnsw.ef_search"])
        searches: dict[str, Search] = {"ours": our_search(store, everywhere=True)}
        for name in options.peers:
            searches[name] = partial(_ask_peer, await _open_peer(stack, url, name, vectors, ef_search))
        await run_sql(url, "VACUUM ANALYZE", "CHECKPOINT")
        turns = await take_turns(searches, queries, repeats=options.repeats, label="searching beside other stores")
        truth = nearest_rows(vectors, queries)
    ours = turns.pop("ours")
    return {
        "ours": {"p50_ms": 1000 * ours.p50, f"recall@{TOP_K}": recall([our_numbers(a) for a in ours.answers], truth)},
        **{name: _peer_figures(ours, turn, truth) for name, turn in turns.items()},
    }


def _peer_figures(ours: Turns, theirs: Turns, truth: list[set[int]]) -> dict[str, float]:
    found = [[metadata["number"] for metadata in answer] for answer in theirs.answers]
    return {
        "p50_ratio": ours.p50 / theirs.p50,
        f"recall@{TOP_K}": recall(found, truth),
        "p50_ms": 1000 * theirs.p50,
    }


async def _open_peer(stack: AsyncExitStack, url: URL, name: str, vectors: Vectors, ef_search: int) -> Peer:
    peer = PEERS[name][0]()
    await peer.open(url)
    stack.push_async_callback(peer.close)
    notes.print(f"loading {len(vectors)} rows into {name}")
    for first in range(0, len(vectors), PEER_BATCH):
        peer.take(make_chunks(vectors, first, min(PEER_BATCH, len(vectors) - first)))
        await peer.insert()
    await peer.build_index(ef_search)
    return peer


async def _ask_peer(peer: Peer, query: Vectors) -> list[Mapping[str, Any]]:
    return await peer.search(query.tolist(), TOP_K)


def print_figures(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """A table beside asyncpg and one beside the peers."""
    table = _table(f"{options.rows} rows, ef_search {figures['ef_search']}", f"searches/s, {CLIENTS} clients")
    recalls = {"ours": figures[f"recall@{TOP_K}"], "raw": figures["raw"][f"recall@{TOP_K}"]}
    for name, p50 in figures["p50_ms"].items():
        ratio = f"{figures['p50_ratio_raw']:.2f}" if name == "raw" else ""
        rate = f"{figures['qps8'][name]:,.0f}" + (f" ({figures['qps8_ratio_raw']:.2f})" if name == "raw" else "")
        table.add_row(name, f"{p50:.2f}", ratio, f"{recalls[name]:.3f}", rate)
    console.print(table)
    if "peers" in figures:
        beside = _table(f"{options.peer_rows} rows, ef_search {figures['ef_search']}")
        for name, figure in figures["peers"].items():
            ratio = f"{figure['p50_ratio']:.2f}" if "p50_ratio" in figure else ""
            beside.add_row(name, f"{figure['p50_ms']:.2f}", ratio, f"{figure[f'recall@{TOP_K}']:.3f}")
        console.print(beside)


def _table(title: str, *more: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for heading in ("p50, ms", "ours / theirs", f"recall@{TOP_K}", *more):
        table.add_column(heading, justify="right")
    return table


async def measure_all(url: URL, options: argparse.Namespace) -> dict[str, Any]:
    """Both measurements, the one with fewer rows first."""
    vectors, queries = split_vectors(options.rows, options.queries)
    peers = {}
    if options.peers:
        peers = {"peers": await measure_peers(url, vectors[: options.peer_rows], queries, options)}
        await run_sql(url, *(f"DROP TABLE {PEERS[name][0].table}" for name in options.peers))
    figures = await measure_raw(url, np.ascontiguousarray(vectors), queries, options.repeats) | peers
    print_figures(figures, options)
    versions = await server_versions(url) | package_versions(*peer_packages(options.peers))
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    return figures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="a multiple of 10")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-rows", type=int, default=20_000, help="rows beside other stores, a multiple of 10")
    parser.add_argument(
        "--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS), help="none after the option: skip them"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.rows % CHUNKS_A_SOURCE or options.peer_rows % CHUNKS_A_SOURCE:
        parser.error(f"--rows and --peer-rows must be multiples of {CHUNKS_A_SOURCE}")
    if options.queries < 2:
        parser.error("--queries must be 2 at least, to tell the query from the other parameters")
    if options.peers and not TOP_K <= options.peer_rows <= options.rows:
        parser.error(f"--peer-rows must be from {TOP_K} to --rows")
    return options


def main() -> None:
    """Measure on a server of our own."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch, embedded_server(options=SERVER_OPTIONS) as url:
        options.peers = installed(options.peers, scratch)
        figures = asyncio.run(measure_all(url, options))
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
