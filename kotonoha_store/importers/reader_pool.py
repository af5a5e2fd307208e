"""Programs that read files one at a time, each within its limits: :class:`ReaderPool`."""

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from kotonoha_store.errors import ConfigurationError, InvalidInputError
from kotonoha_store.importers.document import Document, PassedOver, Unreadable

_NEEDED: Final = ("pypdfium2", "markdown_it", "bs4", "yaml", "charset_normalizer")

# Empty packages stand in for the library's own, whose imports take a second and the parsers need nothing of.
_PROGRAM: Final = """
import sys, types
for name, folder in zip(sys.argv[2::2], sys.argv[3::2]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from kotonoha_store.importers.readers import serve
serve(int(sys.argv[1]))
"""

# What a parser is not told: addresses, passwords and keys.
_ENVIRONMENT: Final = frozenset(
    (
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONUTF8",
    )
)

_REPLY_MAX: Final = 2**31
_GRACE_SECONDS: Final = 5


class ReaderPool:
    """Reads files in processes of its own, so that none of them can hang, crash or fill the importing one.

    Use as an async context manager; at its end, however it comes, the processes are ended.
    """

    def __init__(
        self,
        size: int = 2,
        *,
        seconds: float = 60,
        memory_bytes: int = 2**31,
        max_bytes: int = 100 * 2**20,
        encoding: str | None = None,
    ) -> None:
        """
        Args:
            size: how many files are read at once.
            seconds: how long one file may take.
            memory_bytes: how much one process may take, its code included.
            max_bytes: longer files are refused.
            encoding: of files of text, where it is known; else it is found.

        Raises:
            ConfigurationError: a parser is not installed.
            InvalidInputError: a value is out of range.
        """
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise ConfigurationError(f'reading files needs {", ".join(missing)}: pip install "kotonoha-store[files]"')
        if size < 1 or not 0 < seconds < 86_400 or not 0 < max_bytes <= 2**30:
            raise InvalidInputError("read at least 1 file at once, within a day, of up to 1024 MiB")
        self._seconds = seconds
        self._memory = memory_bytes
        self._request = {"encoding": encoding, "max_bytes": max_bytes, "seconds": seconds + _GRACE_SECONDS}
        self._idle: asyncio.Queue[asyncio.subprocess.Process | None] = asyncio.Queue()
        self._all: set[asyncio.subprocess.Process] = set()
        for _ in range(size):
            self._idle.put_nowait(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in list(self._all):
            await self._end(process)

    async def read(self, path: str) -> Document:
        """Read one file.

        Raises:
            PassedOver: it is empty or no text.
            Unreadable: it cannot be read; the message says why.
        """
        process = await self._idle.get()
        try:
            if process is None:
                process = await self._start()
            reply = await self._ask(process, {**self._request, "path": path})
        except BaseException:
            if process is not None:
                # What it would still answer is no answer to the next question.
                await asyncio.shield(self._end(process))
                process = None
            raise
        finally:
            self._idle.put_nowait(process)
        if "passed_over" in reply:
            raise PassedOver(reply["passed_over"])
        if "unreadable" in reply:
            raise Unreadable(reply["unreadable"])
        return Document.from_json(reply["document"])

    async def _start(self) -> asyncio.subprocess.Process:
        here = Path(__file__).parent
        packages = ("kotonoha_store", str(here.parent), "kotonoha_store.importers", str(here))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-c",
            _PROGRAM,
            str(self._memory),
            *packages,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_REPLY_MAX,
            env={name: value for name, value in os.environ.items() if name in _ENVIRONMENT},
            # Ctrl-C is the importing process's to answer.
            start_new_session=True,
        )
        self._all.add(process)
        return process

    async def _ask(self, process: asyncio.subprocess.Process, request: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None  # noqa: S101  both are pipes
        assert process.stdout is not None  # noqa: S101  both are pipes
        try:
            async with asyncio.timeout(self._seconds):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            raise Unreadable(f"reading it takes longer than {self._seconds:g} seconds") from None
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            raise Unreadable("its parser crashed, or took more memory than there is")
        reply: dict[str, Any] = await asyncio.to_thread(json.loads, line)
        return reply

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        self._all.discard(process)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # communicate() also closes the pipes.
        await process.communicate()
