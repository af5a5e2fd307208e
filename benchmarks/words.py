"""How fast Japanese is searched by word, how exactly, and what a hybrid search costs beside its two sides.

    python benchmarks/words.py [PATH] [--texts N] [--queries Q] [--repeats R] [--json]

PATH is a file of JSQuAD's shape (see retrieval.py): its sentences, put together anew, make texts of 400
characters, with clustered vectors; its questions are asked as they are. Without PATH both are invented.

* ``phrase``: in quotes, 2 to 10 characters cut out of the texts anywhere, so also within words and numbers;
  ``terms``: the same without quotes, all of their terms asked for; ``question``: whole questions, any of their
  terms. Ten hits, in the whole database.
* ``disagreements``: phrases for which the search and LIKE on the normalised texts (in Python) find different
  chunks, where at most 1000 have it (more than a search returns).
* ``hybrid_ratio``: a hybrid search of questions by the slower of its sides alone, that is by words and by
  meaning with as many hits as the hybrid search fuses; all three in turn.
* ``ingest``: chunks a second that ``add_chunks`` writes without vectors, terms included.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from common import (
    SEED,
    clustered_vectors,
    connect,
    console,
    embedded_server,
    notes,
    print_json,
    progress_bar,
    server_versions,
    store_settings,
)
from japanese import Corpus, read_corpus
from rich.table import Table
from sqlalchemy import URL
from vectors import MODEL, SERVER_OPTIONS, Search, Turns, take_turns

from kotonoha_store import Fusion, NewChunk, SearchRepository, SearchResult, SourceType, Store
from kotonoha_store.words import fold

LENGTH: Final = 400
BATCH: Final = 2000
TOP_K: Final = 10
MOST: Final = 1000

Figures = dict[str, Any]


async def load(store: Store, texts: Sequence[str]) -> float:
    """Add the texts as they come, without vectors; return how many a second."""
    notes.print(f"adding {len(texts)} texts")
    async with store.begin() as tx:
        source_id = await tx.knowledge.add_source(SourceType.DOCUMENT_FILE, "benchmark")
    seconds = 0.0
    for first in range(0, len(texts), BATCH):
        chunks = [NewChunk(content=text) for text in texts[first : first + BATCH]]
        started = time.perf_counter()
        async with store.begin() as tx:
            await tx.knowledge.add_chunks(source_id, chunks)
        seconds += time.perf_counter() - started
    return len(texts) / seconds


async def embed(url: URL, count: int) -> None:
    """Give every chunk a vector, by bare SQL: that is not measured here."""
    connection = await connect(url)
    try:
        definition = await connection.fetchval("SELECT pg_get_indexdef('idx_chunks_embedding'::regclass)")
        await connection.execute("DROP INDEX idx_chunks_embedding; TRUNCATE embedding_jobs")
        await connection.execute("CREATE TEMPORARY TABLE given (id bigint PRIMARY KEY, embedding halfvec(1536))")
        ids = [row[0] for row in await connection.fetch("SELECT id FROM knowledge_chunks ORDER BY id")]
        vectors = clustered_vectors(count)
        with progress_bar() as bar:
            for first in bar.track(range(0, count, BATCH), description="vectors"):
                await connection.executemany(
                    "INSERT INTO given VALUES ($1, $2::real[]::halfvec)",
                    [(ids[place], vectors[place].tolist()) for place in range(first, min(first + BATCH, count))],
                )
        await connection.execute(
            f"UPDATE knowledge_chunks AS c SET embedding = g.embedding, embedding_model = '{MODEL}'"
            " FROM given AS g WHERE g.id = c.id"
        )
        await connection.execute("SET maintenance_work_mem = '2GB'")
        await connection.execute(definition)
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


def cut_phrases(texts: Sequence[str], count: int) -> list[str]:
    """Substrings of the texts, 2 to 10 characters, none blank, without quotes."""
    chosen = random.Random(SEED + 1)
    phrases: list[str] = []
    while len(phrases) < count:
        text, length = chosen.choice(texts), chosen.randint(2, 10)
        start = chosen.randrange(len(text) - length)
        phrase = text[start : start + length]
        if phrase.strip() and not set(phrase) & set('"“”„＂'):
            phrases.append(phrase)
    return phrases


async def measure(store: Store, queries: Sequence[str], repeats: int, **options: Any) -> Turns:
    """The same query in every repetition, once untimed before."""

    async def search(query: str) -> SearchResult:
        return await store.search(query, mode="words", everywhere=True, top_k=TOP_K, **options)

    turns = await take_turns({"words": search}, queries, repeats=repeats, label="searching by word")
    return turns["words"]


async def disagreements(store: Store, texts: Sequence[str], phrases: Sequence[str]) -> tuple[int, int]:
    """How many phrases the search and LIKE answer differently, and how many were compared."""
    folded = [fold(text) for text in texts]
    different = compared = 0
    with progress_bar() as bar:
        for phrase in bar.track(phrases, description="comparing with LIKE"):
            wanted = fold(phrase)
            numbers = {number for number, text in enumerate(folded) if wanted in text}
            if len(numbers) > MOST:
                continue
            compared += 1
            result = await store.search(f'"{phrase}"', mode="words", everywhere=True, top_k=MOST)
            found = sorted(hit.content for hit in result.hits)
            different += found != sorted(texts[number] for number in numbers)
    return different, compared


async def measure_hybrid(store: Store, questions: Sequence[str], repeats: int) -> dict[str, float]:
    """A hybrid search beside its two sides; medians in milliseconds."""
    candidates = Fusion().candidates
    vectors = dict(zip(questions, clustered_vectors(len(questions), seed=SEED + 2), strict=True))

    async def words(question: str) -> SearchResult:
        return await store.search(question, mode="words", everywhere=True, top_k=candidates)

    async def meaning(question: str) -> SearchResult:
        return await store.search(vectors[question], model=MODEL, everywhere=True, top_k=candidates, threshold=None)

    async def hybrid(question: str) -> SearchResult:
        async with store.database.driver() as connection:
            search = SearchRepository(connection)
            return await search.hybrid(question, vectors[question], model=MODEL, everywhere=True, top_k=TOP_K)

    searches: dict[str, Search] = {"words": words, "meaning": meaning, "hybrid": hybrid}
    turns = await take_turns(searches, questions, repeats=repeats, label="hybrid beside its sides")
    return {name: 1000 * turn.p50 for name, turn in turns.items()}


async def measure_all(url: URL, corpus: Corpus, options: argparse.Namespace) -> Figures:
    """Everything on one database."""
    texts = corpus.texts(options.texts, LENGTH)
    phrases = cut_phrases(texts, options.queries)
    questions = list(dict.fromkeys(corpus.questions))[: options.queries]
    async with Store.open(store_settings(url)) as store:
        await store.migrate()
        ingest = await load(store, texts)
        await embed(url, len(texts))
        figures: Figures = {
            "phrase": _figures(await measure(store, [f'"{phrase}"' for phrase in phrases], options.repeats)),
            "terms": _figures(await measure(store, phrases, options.repeats, match="all")),
            "question": _figures(await measure(store, questions, options.repeats)),
        }
        different, compared = await disagreements(store, texts, phrases)
        sides = await measure_hybrid(store, questions, options.repeats)
    figures |= {
        "disagreements": different,
        "compared": compared,
        "hybrid_p50_ms": sides,
        "hybrid_ratio": sides["hybrid"] / max(sides["words"], sides["meaning"]),
        "ingest": ingest,
    }
    return figures


def _figures(turns: Turns) -> dict[str, float]:
    return {"p50_ms": 1000 * turns.p50, "p90_ms": 1000 * float(np.quantile(turns.seconds, 0.9))}


def print_figures(figures: Figures, texts: int) -> None:
    table = Table(title=f"{texts} texts of {LENGTH} characters", title_justify="left")
    table.add_column("what")
    table.add_column("p50, ms", justify="right")
    table.add_column("p90, ms", justify="right")
    for name in ("phrase", "terms", "question"):
        table.add_row(name, f"{figures[name]['p50_ms']:.2f}", f"{figures[name]['p90_ms']:.2f}")
    for name, p50 in figures["hybrid_p50_ms"].items():
        table.add_row(f"{name}, {Fusion().candidates} candidates", f"{p50:.2f}", "")
    console.print(table)
    console.print(
        f"{figures['disagreements']} of {figures['compared']} phrases differ from LIKE;"
        f" hybrid {figures['hybrid_ratio']:.2f} x its slower side; ingest {figures['ingest']:,.0f} chunks/s"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("path", type=Path, nargs="?", help="a file of JSQuAD's shape")
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args()


async def _run(url: URL, options: argparse.Namespace) -> Figures:
    figures = await measure_all(url, read_corpus(options.path), options)
    print_figures(figures, options.texts)
    console.print(", ".join(f"{name} {version}" for name, version in (await server_versions(url)).items()))
    return figures


def main() -> None:
    """Measure on a server of our own."""
    options = _options()
    with embedded_server(options=SERVER_OPTIONS) as url:
        figures = asyncio.run(_run(url, options))
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
