"""Reading chats as DiscordChatExporter writes them: JSON of any size, a message at a time."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from kotonoha_store.checks import BIGINT_MAX
from kotonoha_store.errors import ConfigurationError, InvalidInputError
from kotonoha_store.importers.report import name
from kotonoha_store.records import Message, Scope

SLICE_MESSAGES: Final = 500
"""So many messages are read at once."""

# What the exporter writes has a tenth of it.
_MAX_DEPTH: Final = 100
_BOM: Final = b"\xef\xbb\xbf"
_PART: Final = re.compile(r"(.*?)(?: \[part (\d{1,9})\])?\.json", re.IGNORECASE | re.DOTALL)

# Of a channel and not of a conversation: the exporter has words of its own for these.
_NOTICES: Final = frozenset(
    {
        "RecipientAdd",
        "RecipientRemove",
        "Call",
        "ChannelNameChange",
        "ChannelIconChange",
        "ChannelPinnedMessage",
        "GuildMemberJoin",
        "ThreadCreated",
        *map(str, range(1, 19)),
    }
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the messages of a file were written.

    Attributes:
        id: the channel that holds them: of a thread its own.
    """

    id: int
    session_type: str
    scope: Scope

    @property
    def session_key(self) -> str:
        return f"discord:{self.id}"


@dataclass(frozen=True, slots=True)
class ReadMessage:
    """A message of the file, or why it is none.

    Attributes:
        notice: why it was left out, where that is no fault.
    """

    number: int
    raw: Any = field(repr=False)
    id: int = 0
    message: Message | None = field(default=None, repr=False)
    notice: str | None = None
    problem: str | None = None


def export_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files, and all ``*.json`` in the folders, each once, the parts of an export in their order.

    Raises:
        InvalidInputError: a path does not exist, or there is no file.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            files = [each for each in path.rglob("*") if each.suffix.lower() == ".json" and each.is_file()]
        elif path.is_file():
            files = [path]
        else:
            raise InvalidInputError(f"{name(str(path))} is no file and no folder")
        found.update((each.resolve(), each) for each in sorted(files, key=_order))
    if not found:
        raise InvalidInputError("there is no .json file in these folders; export with `--format Json`")
    return list(found.values())


def _order(path: Path) -> tuple[Path, str, int]:
    match = _PART.fullmatch(path.name)
    return (path.parent, match[1], int(match[2] or 1)) if match else (path.parent, path.name, 1)


class ExportFile:
    """An exported chat, open for reading. Nothing but a slice of it is held in memory.

    Attributes:
        place: where its messages were written.
        read: how many bytes of it were read.
        damage: why nothing more can be read, at its end.

    Raises:
        InvalidInputError: it cannot be opened, or is no exported chat.
        ConfigurationError: ijson is not installed.
    """

    def __init__(self, path: Path, bot_ids: frozenset[int] | None) -> None:
        try:
            import ijson
        except ImportError:
            raise ConfigurationError(
                'reading exported chats needs the extra imports: pip install "kotonoha-store[imports]"'
            ) from None
        self._broken: tuple[type[Exception], ...] = (ijson.JSONError, UnicodeDecodeError, _TooDeepError)
        self._bot_ids = bot_ids
        self._number = 0
        self.damage: str | None = None
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise InvalidInputError(f"it cannot be opened ({error.strerror})") from None
        try:
            if self._file.read(len(_BOM)) != _BOM:
                self._file.seek(0)
            self._values = _values(ijson.basic_parse(self._file, use_float=True))
            self.place = self._find_place()
        except BaseException:
            self._file.close()
            raise

    @property
    def read(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def _find_place(self) -> Place:
        found: dict[str, Any] = {}
        try:
            for key, value in self._values:
                if key == "messages":
                    break
                found[key] = value
        except self._broken:
            raise InvalidInputError("it is no valid JSON, or cut off") from None
        guild, channel = found.get("guild"), found.get("channel")
        if not isinstance(guild, dict) or not isinstance(channel, dict):
            raise InvalidInputError("it is no chat exported by DiscordChatExporter: it names no guild and channel")
        return _place(guild, channel)

    def messages(self) -> list[ReadMessage]:
        """Read the next slice; empty at the end, or where the file is damaged."""
        result: list[ReadMessage] = []
        try:
            for key, value in self._values:
                if key == "messages" and value is not _BEGIN:
                    self._number += 1
                    result.append(_read(value, self._number, self._bot_ids))
                    if len(result) == SLICE_MESSAGES:
                        break
        except self._broken:
            self.damage = f"it is damaged or cut off after message {self._number}; those before were read"
        except OSError as error:
            self.damage = f"it cannot be read after message {self._number} ({error.strerror})"
        return result


class _TooDeepError(Exception):
    pass


_BEGIN: Final = object()


def _values(events: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The members of the root object: the messages first as :data:`_BEGIN`, then one by one."""
    events = iter(events)
    # Not by paths, as ijson.items() does: it holds one for every level, which deep nesting makes endless.
    if next(events, ("", None))[0] != "start_map":
        return
    key = ""
    for event, value in events:
        if event == "map_key":
            key = value
        elif event == "start_array" and key == "messages":
            yield key, _BEGIN
            for inner, scalar in events:
                if inner == "end_array":
                    break
                yield key, _build(inner, scalar, events)
        elif event != "end_map":
            yield key, _build(event, value, events)


def _build(event: str, value: Any, events: Iterator[tuple[str, Any]]) -> Any:
    if event not in ("start_map", "start_array"):
        return value
    root: Any = {} if event == "start_map" else []
    stack: list[tuple[Any, str]] = [(root, "")]
    for event, value in events:
        container, key = stack[-1]
        if event == "map_key":
            stack[-1] = (container, value)
            continue
        if event in ("end_map", "end_array"):
            stack.pop()
            if not stack:
                break
            continue
        is_container = event in ("start_map", "start_array")
        new: Any = ({} if event == "start_map" else []) if is_container else value
        if isinstance(container, dict):
            container[key] = new
        else:
            container.append(new)
        if is_container:
            stack.append((new, ""))
            if len(stack) > _MAX_DEPTH:
                raise _TooDeepError
    return root


def _place(guild: dict[str, Any], channel: dict[str, Any]) -> Place:
    guild_id, channel_id = _snowflake(guild.get("id")), _snowflake(channel.get("id"))
    if guild_id is None or not channel_id:
        raise InvalidInputError("its guild or channel has no id of 64 bits")
    kind = channel.get("type")
    if isinstance(kind, str) and kind.startswith("Direct"):
        return Place(channel_id, "dm", Scope(channel_id=channel_id))
    # The exporter says 0 where there is none: direct messages.
    scope_guild = guild_id or None
    if isinstance(kind, str) and kind.endswith("Thread"):
        # What it calls the category of a thread is the channel that it belongs to.
        parent = _snowflake(channel.get("categoryId"))
        if parent:
            return Place(channel_id, "thread", Scope(guild_id=scope_guild, channel_id=parent, thread_id=channel_id))
    return Place(channel_id, "channel", Scope(guild_id=scope_guild, channel_id=channel_id))


def _snowflake(value: Any) -> int | None:
    if isinstance(value, str) and len(value) <= 20 and value.isascii() and value.isdecimal():
        value = int(value)
    return value if type(value) is int and 0 <= value <= BIGINT_MAX else None


def _read(raw: Any, number: int, bot_ids: frozenset[int] | None) -> ReadMessage:
    if not isinstance(raw, dict):
        return ReadMessage(number, raw, problem="it is no JSON object")
    message_id, author = _snowflake(raw.get("id")), raw.get("author")
    if not message_id:
        return ReadMessage(number, raw, problem="its id is no number of 64 bits")
    if raw.get("type") in _NOTICES:
        return ReadMessage(number, raw, message_id, notice="notices of joins, pins, calls and the like")
    if not isinstance(author, dict) or (author_id := _snowflake(author.get("id"))) is None:
        return ReadMessage(number, raw, message_id, problem="its author has no id of 64 bits")
    if not isinstance(raw.get("content"), str | None):
        return ReadMessage(number, raw, message_id, problem="its content is no text")
    if not (text := _text(raw)):
        return ReadMessage(number, raw, message_id, notice="messages without any text")
    is_bot = author.get("isBot") is True if bot_ids is None else author_id in bot_ids
    try:
        message = Message(
            role="assistant" if is_bot else "user",
            content=text,
            timestamp=raw.get("timestamp") if isinstance(raw.get("timestamp"), str) else "",
            author=author.get("nickname") or author.get("name"),
            message_id=message_id,
            metadata=_metadata(raw, author_id),
        )
    except InvalidInputError as error:
        return ReadMessage(number, raw, message_id, problem=str(error))
    return ReadMessage(number, raw, message_id, message)


def _text(raw: dict[str, Any]) -> str:
    """The content, and the names of what is attached; what is embedded only where that is the message."""
    parts = [raw.get("content") or ""]
    if not parts[0].strip():
        parts = [*_embedded(_objects(raw, "embeds"))]
        if isinstance(forwarded := raw.get("forwardedMessage"), dict):
            parts += [part for part in (forwarded.get("content"),) if isinstance(part, str)]
    parts += [f"[{each['fileName']}]" for each in _objects(raw, "attachments") if isinstance(each.get("fileName"), str)]
    parts += [f"[{each['name']}]" for each in _objects(raw, "stickers") if isinstance(each.get("name"), str)]
    return "\n".join(part for part in parts if part.strip())


def _embedded(embeds: Iterable[dict[str, Any]]) -> Iterator[str]:
    for embed in embeds:
        yield from (embed[key] for key in ("title", "description") if isinstance(embed.get(key), str))
        for each in _objects(embed, "fields"):
            yield f"{each.get('name')}: {each.get('value')}"


def _objects(raw: dict[str, Any], key: str) -> list[dict[str, Any]]:
    values = raw.get(key)
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []


def _metadata(raw: dict[str, Any], author_id: int) -> dict[str, Any]:
    result: dict[str, Any] = {"author_id": author_id}
    if isinstance(edited := raw.get("timestampEdited"), str):
        result["edited_at"] = edited
    reference = raw.get("reference")
    if isinstance(reference, dict) and (reply_to := _snowflake(reference.get("messageId"))):
        result["reply_to"] = reply_to
    if urls := [each["url"] for each in _objects(raw, "attachments") if isinstance(each.get("url"), str)]:
        result["attachments"] = urls
    return result
