"""A load of many vectors: the HNSW index kept up to date row by row, or dropped and built at the end.

Each round loads the same new documents into two copies of a database that holds rows with vectors already. Both
are our own ways; the ratio says from which share of new rows on ``--rebuild`` pays. The time with ``--rebuild``
includes dropping and building the index.
"""

import argparse
import asyncio
import platform
from collections.abc import Iterator
from typing import Any

from common import (
    SEED,
    Contestant,
    clustered_vectors,
    console,
    contest,
    embedded_server,
    median_rate,
    notes,
    print_json,
    rate_ratio,
    run_sql,
    server_versions,
    store_settings,
)
from rich.table import Table
from sqlalchemy import URL

from kotonoha_store import Database, NewChunk, NewDocument, migrations
from kotonoha_store.bulk_load import load_documents

MODEL = "benchmark"
CHUNKS_A_DOCUMENT = 10


def documents(first: int, count: int) -> Iterator[NewDocument]:
    """``count`` chunks with vectors, in documents of ten, from the chunk number ``first`` on."""
    vectors = clustered_vectors(count, seed=SEED + first)
    for start in range(0, count, CHUNKS_A_DOCUMENT):
        numbers = range(start, min(start + CHUNKS_A_DOCUMENT, count))
        chunks = [
            NewChunk(
                f"文書 {first + number} の本文。雨の多い季節について。",
                token_count=20,
                embedding=vectors[number],
                embedding_model=MODEL,
            )
            for number in numbers
        ]
        yield NewDocument(f"文書 {first + start}", chunks, uri=f"benchmark:{first + start}")


async def prepare(url: URL, rows: int) -> None:
    async with Database(url, store_settings(url)) as database:
        await migrations.upgrade(database)
        await load_documents(database, documents(0, rows), rebuild=True)
    await run_sql(url, "VACUUM ANALYZE")


async def measure(server: URL, rows: int, new: int, repeats: int) -> dict[str, list[float]]:
    name = str(server.database)
    copy = server.set(database="bulk_copy")
    maintenance = server.set(database="postgres")

    async def fresh() -> None:
        await run_sql(
            maintenance,
            "DROP DATABASE IF EXISTS bulk_copy WITH (FORCE)",
            f"CREATE DATABASE bulk_copy TEMPLATE {name}",
            "CHECKPOINT",
        )

    async def load(*, rebuild: bool) -> None:
        async with Database(copy, store_settings(copy)) as database:
            report = await load_documents(database, documents(rows, new), rebuild=rebuild)
            assert report.vectors == new  # noqa: S101  else something else was measured

    ways = [
        Contestant("index kept", fresh, lambda: load(rebuild=False)),
        Contestant("dropped and rebuilt", fresh, lambda: load(rebuild=True)),
    ]
    return await contest(ways, repeats=repeats, label="loading", warmups=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows with vectors that are there before")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.2], help="new rows, as a share of these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    figures: dict[str, Any] = {"rows": options.rows}
    table = Table("new rows", "index kept, rows/s", "rebuilt, rows/s", "rebuilt / kept", box=None)
    with embedded_server() as server:
        notes.print(f"filling {options.rows:,} rows, building the index")
        asyncio.run(prepare(server, options.rows))
        figures["versions"] = asyncio.run(server_versions(server)) | {"machine": platform.machine()}
        for share in options.shares:
            new = max(CHUNKS_A_DOCUMENT, round(options.rows * share))
            seconds = asyncio.run(measure(server, options.rows, new, options.repeats))
            kept, rebuilt = seconds["index kept"], seconds["dropped and rebuilt"]
            ratio = rate_ratio(rebuilt, kept)
            rates = median_rate(new, kept), median_rate(new, rebuilt)
            figures[f"{share:g}"] = {
                "new": new,
                "kept_rate": rates[0],
                "rebuild_rate": rates[1],
                "rebuild_ratio": ratio,
            }
            table.add_row(f"{new:,} ({share:.0%})", f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{ratio:.2f}")
    console.print(table)
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
