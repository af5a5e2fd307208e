"""From a message to an answer: append, archive, embed, search.

    python examples/quickstart.py                      a short conversation in Japanese and English
    python examples/quickstart.py conversation.json    your own (the shape is described by --help)

Without POSTGRES_HOST or DATABASE_URL it starts the embedded server and uses a database of its own there;
with one of them it migrates and writes to that database. Without OPENAI_API_KEY it needs no network: hashed
n-grams find wording, not meaning. With it, or with --embedder openai, the text goes to OpenAI.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

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

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress
except ImportError:
    sys.exit('quickstart: rich is missing; pip install -e ".[embedded,cli]"')

console = Console()

SHAPE = """
a file holds:
  {
    "conversation": "a name",
    "speakers": ["the person", "the bot"],
    "sessions": [
      {
        "session": 1,
        "started_at": "2026-06-14T10:00:00+09:00",       (UTC where it has no zone)
        "messages": [{"id": 1, "speaker": "the person", "text": "..."}]
      }
    ],
    "questions": [{"question": "..."}]                   (may be left out)
  }
"""


@dataclass
class Conversation:
    """Sessions of messages, and questions about them."""

    name: str
    sessions: dict[str, list[Message]]
    questions: list[str]
    file: Path | None = None
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


class FileMessage(BaseModel):
    id: int | str
    speaker: str
    text: str


class FileSession(BaseModel):
    session: int | str
    started_at: datetime
    messages: list[FileMessage] = Field(min_length=1)


class FileQuestion(BaseModel):
    question: str = Field(min_length=1)


class ConversationFile(BaseModel):
    """The shape that --help tells."""

    conversation: str = Field(min_length=1)
    speakers: tuple[str, str]
    sessions: list[FileSession] = Field(min_length=1)
    questions: list[FileQuestion] = []


def from_file(path: Path) -> Conversation:
    data = read_file(path)
    sessions: dict[str, list[Message]] = {}
    for session in data.sessions:
        start = session.started_at if session.started_at.tzinfo else session.started_at.replace(tzinfo=UTC)
        messages = sessions.setdefault(str(session.session), [])
        messages += [
            Message(
                role="assistant" if message.speaker == data.speakers[1] else "user",
                author=message.speaker,
                content=message.text,
                timestamp=start + timedelta(seconds=30 * index),
                message_id=message.id,
            )
            for index, message in enumerate(session.messages)
        ]
    questions = [entry.question for entry in data.questions]
    return Conversation(data.conversation, sessions, questions, file=path)


def read_file(path: Path) -> ConversationFile:
    try:
        return ConversationFile.model_validate_json(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path}: {place}: {first['msg']} (--help tells the shape)") from None


async def forget(store: Store, conversation: Conversation) -> None:
    """Delete what an earlier run left."""
    async with store.begin() as tx:
        async for source in tx.knowledge.iterate_sources(guild_id=conversation.guild_id):
            await tx.knowledge.delete_source(source.id)
        async for session in tx.sessions.iterate(guild_id=conversation.guild_id):
            await tx.sessions.delete(session.session_key)


async def forget_all(store: Store) -> None:
    """In the quickstart's own database: also what a run with another conversation could not finish."""
    async with store.begin() as tx:
        async for source in tx.knowledge.iterate_sources():
            await tx.knowledge.delete_source(source.id)


async def refuse_foreign_chunks(store: Store) -> None:
    """The worker takes what waits, whoever queued it: it must not be embedded with the quickstart's model."""
    depth = await store.queue.depth()
    if waiting := depth.ready + depth.waiting:
        raise StoreError(
            f"chunks of somebody else wait in this database ({waiting}) and would be embedded with "
            f"{store.embedder.model}; run the quickstart on a database of its own (unset DATABASE_URL)"
        )


async def remember(store: Store, conversation: Conversation, progress: Progress) -> None:
    """Append message by message, as a bot would; then archive and embed."""
    total = sum(len(messages) for messages in conversation.sessions.values())
    appending = progress.add_task("append", total=total)
    session_ids: list[int] = []
    for channel, (key, messages) in enumerate(conversation.sessions.items(), start=1):
        for message in messages:
            async with store.begin() as tx:
                appended = await tx.sessions.append(
                    f"{conversation.name}:{key}",
                    message,
                    guild_id=conversation.guild_id,
                    # Only what has a channel gets Discord links.
                    channel_id=channel if conversation.file is None else None,
                )
            progress.advance(appending)
        session_ids.append(appended.session_id)

    # A bot's archiver, archiver.run_once(), takes the sessions that have been quiet for an hour. These
    # are taken by their ids, now, and nobody else's with them.
    archiving = progress.add_task("archive", total=len(session_ids))
    chunks = 0
    for session_id in session_ids:
        archived = await store.archiver.archive(session_id)
        chunks += archived.chunks if archived else 0
        progress.advance(archiving)

    embedding = progress.add_task("embed", total=chunks)
    while (batch := await store.embedding_worker.run_once()).claimed:
        progress.advance(embedding, batch.embedded)
        if batch.embedded < batch.claimed:
            raise StoreError("the embedder failed on some chunks (see above); run the same again")


async def ask(store: Store, conversation: Conversation, question: str, top_k: int) -> None:
    # By words and by meaning.
    result = await store.search(
        question, mode="hybrid", top_k=top_k, filters=SearchFilters(guild_id=conversation.guild_id)
    )
    console.print(f"\n[bold]{escape(question)}[/bold]", highlight=False)
    if not result.hits:
        console.print("  nothing was remembered: sessions below KB_MIN_SESSION_LENGTH characters are not archived")
    for hit in result.hits:
        link = hit.url or f"{conversation.file}#{hit.location['first_message_id']}"
        similarity = "   -" if hit.similarity is None else f"{hit.similarity:.2f}"
        lines = [f"  {similarity}  {hit.title}  ({hit.location['label']})", f"        {link}"]
        lines += [f"        | {line}" for line in hit.content.splitlines()]
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def choose_embedder(settings: Settings) -> Embedder:
    """What the settings say; without any, the one that needs neither a key nor the network."""
    return embedder_from_settings(settings) or HashingEmbedder()


def count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError("must be from 1 to 100")
    return value


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=SHAPE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", type=Path, help="a conversation as JSON")
    parser.add_argument("--embedder", choices=["hashing", "local", "openai"], help="default: KB_EMBEDDER, or hashing")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="ask this instead (may be repeated)")
    parser.add_argument("--questions", type=count, default=5, metavar="N", help="of the file's questions, the first N")
    parser.add_argument("--top-k", type=count, default=3, metavar="K", help="hits per question, 1 to 100")
    return parser.parse_args(arguments)


async def run(options: argparse.Namespace) -> None:
    conversation = from_file(options.file) if options.file else built_in()
    questions = options.ask or conversation.questions[: options.questions]
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
                if settings.uses_embedded_server:
                    await forget_all(store)
            await refuse_foreign_chunks(store)
            console.print(f"embedding model: {embedder.model}", highlight=False)
            with Progress(console=console) as progress:
                await remember(store, conversation, progress)
            for question in questions:
                await ask(store, conversation, question, options.top_k)
            if not questions:
                console.print('the file holds no questions; ask your own with --ask "..."')
    finally:
        await embedder.aclose()


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_arguments(arguments)
    try:
        asyncio.run(run(options))
    except (OSError, ValueError, StoreError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
