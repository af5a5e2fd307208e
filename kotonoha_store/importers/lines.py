"""The lines of a file, packed or not."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kotonoha_store.errors import InvalidInputError

LONGEST_LINE: Final = 2**28
"""Bytes; PostgreSQL's jsonb takes no longer ones either."""


@contextmanager
def unpacked(path: Path) -> Iterator[Any]:
    """The file, open for reading, and unpacked by gzip where it is packed."""
    with path.open("rb") as raw:
        is_packed = raw.peek(2)[:2] == b"\x1f\x8b"
        yield gzip.GzipFile(fileobj=raw) if is_packed else raw


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines and their numbers.

    Raises:
        InvalidInputError: a line is longer than can be held: a few megabytes may unpack to anything.
    """
    with unpacked(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise InvalidInputError(f"line {number} of {path.name} has more than {LONGEST_LINE} bytes; split it up")
            yield number, line
