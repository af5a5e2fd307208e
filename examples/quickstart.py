"""From a message to an answer: append, archive, embed, search.

    python examples/quickstart.py                      a short conversation in Japanese and English
    python examples/quickstart.py conversation.json    your own (the shape is described by --help)

Without DATABASE_URL or POSTGRES_HOST it starts the embedded server and uses a database of its own there.
Without OPENAI_API_KEY it needs no network: hashed n-grams find wording, not meaning.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kotonoha_store import (
    Embedder,
    HashingEmbedder,
    Message,
    SearchFilters,
    Settings,
    Store,
    StoreError,
)
from kotonoha_store.embedders import embedder_from_settings

console = Console()


@dataclass
class Conversation:
    """Sessions of messages, and questions about them."""

    name: str
    sessions: dict[str, list[Message]]
    questions: list[str]
    guild_id: int = field(init=False)

    def __post_init__(self) -> None:
        # The same conversation has the same scope in every run, so that a run replaces the one before.
        self.guild_id = int.from_bytes(sha256(self.name.encode()).digest()[:7])


def built_in() -> Conversation:
    lines = {
        "weekend": [
            ("user", "週末に鎌倉へ行ってきました。紫陽花がとてもきれいでしたよ。"),
            ("assistant", "いいですね！どのお寺に行かれましたか？"),
            ("user", "明月院です。青い紫陽花で有名なところです。"),
            ("assistant", "明月院は六月がいちばん混みますね。雨は大丈夫でしたか？"),
            ("user", "梅雨なのに晴れました。来年は北海道に行きたいです。梅雨がないそうなので。"),
            ("assistant", "北海道にははっきりした梅雨がありません。六月の富良野もおすすめです。"),
        ],
        "puppy": [
            ("user", "We adopted a puppy last week! His name is Biscuit."),
            ("assistant", "Congratulations! What kind of dog is Biscuit?"),
            ("user", "A corgi, eleven weeks old. He already chewed my running shoes."),
            ("assistant", "Puppies that age are teething; a frozen carrot helps."),
            ("user", "Good idea. The vet wants to see him on Friday for his vaccination."),
            ("assistant", "Shall I remind you on Thursday evening about Friday's appointment at the vet?"),
        ],
    }
    start = datetime(2026, 6, 14, 10, 0, tzinfo=UTC)
    sessions: dict[str, list[Message]] = {}
    for number, (key, turns) in enumerate(lines.items()):
        sessions[key] = [
            Message(
                role=role,
                content=content,
                timestamp=start + timedelta(days=number, minutes=index),
                message_id=1_250_000_000_000_000_000 + 1000 * number + index,
            )
            for index, (role, content) in enumerate(turns)
        ]
    questions = [
        "鎌倉ではどのお寺に行った？",
        "梅雨がないのはどこ？",
        "What is the puppy's name?",
        "When is the vaccination at the vet?",
    ]
    return Conversation("quickstart", sessions, questions)


def from_file(path: Path) -> Conversation:
    """Read a conversation in the shape that ``--help`` tells."""
    data = json.loads(path.read_text(encoding="utf-8"))
    bot = data["speakers"][1]
    sessions: dict[str, list[Message]] = {}
    for session in data["sessions"]:
        start = datetime.fromisoformat(session["started_at"])
        start = start if start.tzinfo else start.replace(tzinfo=UTC)
        sessions[f"{data['conversation']}:{session['session']}"] = [
            Message(
                role="assistant" if message["speaker"] == bot else "user",
                author=message["speaker"],
                content=message["text"],
                timestamp=start + timedelta(seconds=30 * index),
                message_id=message["id"],
            )
            for index, message in enumerate(session["messages"])
        ]
    return Conversation(str(data["conversation"]), sessions, [entry["question"] for entry in data.get("questions", [])])


async def forget(store: Store, conversation: Conversation) -> None:
    """Delete what an earlier run left."""
    async with store.begin() as tx:
        async for source in tx.knowledge.iterate_sources(guild_id=conversation.guild_id):
            await tx.knowledge.delete_source(source.id)
        async for session in tx.sessions.iterate(guild_id=conversation.guild_id):
            await tx.sessions.delete(session.session_key)


async def remember(store: Store, conversation: Conversation, progress: Progress) -> None:
    """Append message by message, as a bot would; then archive and embed."""
    total = sum(len(messages) for messages in conversation.sessions.values())
    appending = progress.add_task("append", total=total)
    for channel, (key, messages) in enumerate(conversation.sessions.items(), start=1):
        for message in messages:
            async with store.begin() as tx:
                await tx.sessions.append(
                    f"{conversation.name}:{key}", message, guild_id=conversation.guild_id, channel_id=channel
                )
            progress.advance(appending)

    archiving = progress.add_task("archive", total=None)
    # A bot's archiver waits until a session has been quiet for an hour; this one does not.
    report = await store.archiver.run_once(idle_for=timedelta(0))
    progress.update(archiving, total=1, completed=1)

    embedding = progress.add_task("embed", total=report.chunks)
    while (batch := await store.embedding_worker.run_once()).claimed:
        progress.advance(embedding, batch.embedded)
        if batch.deferred:
            raise StoreError("the embedding provider asks for a pause; run this again later")
    depth = await store.queue.depth()
    if depth.waiting or depth.dead:
        raise StoreError(f"{depth.waiting} chunks wait for another attempt, {depth.dead} are dead letters; see the log")


async def ask(store: Store, conversation: Conversation, question: str, top_k: int) -> None:
    result = await store.search(
        question, top_k=top_k, threshold=None, filters=SearchFilters(guild_id=conversation.guild_id)
    )
    console.print(f"\n[bold]{question}[/bold]", highlight=False)
    for hit in result.hits:
        lines = [f"  {hit.similarity:.2f}  {hit.title}  ({hit.location['label']})", f"        {hit.url}"]
        lines += [f"        | {line}" for line in hit.content.splitlines()]
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def choose_embedder(settings: Settings) -> Embedder:
    """What the settings say; without any, the one that needs neither a key nor the network."""
    return embedder_from_settings(settings) or HashingEmbedder()


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='A file: {"conversation": name, "speakers": [person, bot], "sessions": [{"session": n, '
        '"started_at": ISO time, "messages": [{"id": .., "speaker": .., "text": ..}]}], '
        '"questions": [{"question": ..}]}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", type=Path, help="a conversation as JSON")
    parser.add_argument("--embedder", choices=["hashing", "local", "openai"], help="default: KB_EMBEDDER, or hashing")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="ask this instead (may be repeated)")
    parser.add_argument("--questions", type=int, default=5, metavar="N", help="of the file's questions, the first N")
    parser.add_argument("--top-k", type=int, default=3, help="hits per question")
    return parser.parse_args(arguments)


async def run(options: argparse.Namespace) -> None:
    conversation = from_file(options.file) if options.file else built_in()
    values: dict[str, Any] = {"kb_embedder": options.embedder} if options.embedder else {}
    settings = Settings(**values)
    if settings.uses_embedded_server:
        settings = Settings(**values, postgres_db="kotonoha_quickstart")
    embedder = choose_embedder(settings)
    try:
        async with Store.open(settings, embedder=embedder) as store:
            with console.status("starting the database"):
                await store.migrate()
                await forget(store, conversation)
            depth = await store.queue.depth()
            if depth.ready or depth.waiting:
                raise StoreError(
                    f"{depth.ready + depth.waiting} chunks of somebody else wait in this database, and would be "
                    f"embedded with {embedder.model}; run the quickstart on a database of its own"
                )
            console.print(f"embedding model: {embedder.model}", highlight=False)
            with Progress(console=console) as progress:
                await remember(store, conversation, progress)
            for question in options.ask or conversation.questions[: options.questions]:
                await ask(store, conversation, question, options.top_k)
    finally:
        await embedder.aclose()


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_arguments(arguments)
    try:
        asyncio.run(run(options))
    except (OSError, ValueError, KeyError, TypeError, StoreError) as error:
        problem = f"{type(error).__name__} {error}" if isinstance(error, KeyError | TypeError) else str(error)
        print(f"quickstart: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
