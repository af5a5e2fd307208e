"""Log records that programs can read: one event, and its fields."""

import logging
from typing import Final, TypeAlias

Field: TypeAlias = str | int | float | bool | None

# What a formatter may ask of any record; the last since Python 3.12.
_RESERVED: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "event", "taskName"})


def log_event(logger: logging.Logger, level: int, event: str, /, **fields: Field) -> None:
    """Log ``event key=value ...``; the record has ``event`` and each field as attributes, for JSON formatters.

    Args:
        fields: ids, counts, durations in seconds, codes. Never the content of a message or a chunk.

    Raises:
        ValueError: a field has the name of a record's own attribute.
    """
    if clashing := _RESERVED.intersection(fields):
        raise ValueError(f"an event's field cannot be named {', '.join(sorted(clashing))}")
    if not logger.isEnabledFor(level):
        return
    message = " ".join([event, *(f"{name}={_shown(value)}" for name, value in fields.items())])
    # Not by `extra`, which fails where the application's own record factory sets an attribute of that name.
    # Level 2: the caller's line, not this one.
    path, line, function, _ = logger.findCaller(stacklevel=2)
    record = logger.makeRecord(logger.name, level, path, line, message, (), None, function)
    vars(record).update(fields, event=event)
    logger.handle(record)


def _shown(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    # Quoted, so that no value looks like another field or another line.
    return text if text.isprintable() and not set(text) & {" ", "=", '"', "'"} else repr(text)
