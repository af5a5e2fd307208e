"""Which files an import takes, and what their documents are called."""

import fnmatch
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote_to_bytes, urlsplit

from kotonoha_store.errors import InvalidInputError, NotFoundError
from kotonoha_store.importers.readers import HTML_NAMES, MARKDOWN_NAMES, PDF_NAMES
from kotonoha_store.importers.report import name

DEFAULT_GLOBS: Final = tuple(
    f"*{suffix}" for suffix in (".txt", ".text", ".rst", *MARKDOWN_NAMES, *HTML_NAMES, *PDF_NAMES)
)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that was given.

    Attributes:
        prefix: what the addresses of its files begin with.
        within: the folder within its root, as in an address; blank where it is the root.
        root: what the files' paths are relative to.
    """

    prefix: str
    within: str
    root: str

    def has_lost(self, path: str) -> bool:
        """Whether ``path``, as in an address, names a file of this folder that is not there any more."""
        if self.within and not path.startswith(f"{self.within}/"):
            return False
        try:
            os.lstat(os.path.join(self.root, os.fsdecode(unquote_to_bytes(path))))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except (OSError, ValueError):
            return False  # who may not look cannot know
        return False


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file to import.

    Attributes:
        path: where it is; absolute.
        where: what it is called in the report.
        prefix: the folder's name or the base URL, up to and with its last slash.
        relative: its path below that, as in an address; with the prefix in front its URI.
        root: what ``relative`` is relative to.
    """

    path: str
    where: str
    prefix: str
    relative: str
    root: str

    @property
    def uri(self) -> str:
        return self.prefix + self.relative

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass(slots=True)
class FoundFiles:
    """What was found below the given paths.

    Attributes:
        passed_over: how many hidden files, links and others, by the reason.
        suffixes: those of files of other types.
        unreadable: folders and files that cannot be looked at, and why.
    """

    files: list[FoundFile] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def find_files(
    paths: Sequence[Path], *, globs: Sequence[str] = (), root: Path | None = None, base_url: str | None = None
) -> FoundFiles:
    """Look for files: those given, and those below the folders given, in the order of their names.

    Below folders hidden files and folders, symbolic links, and what ``globs`` does not name are passed over.

    Args:
        globs: of file names, or with a slash in them of paths below the folder; ``DEFAULT_GLOBS`` by default.
        root: what addresses are relative to; by default each folder given, and of a file given its own folder.
        base_url: what addresses begin with; by default the name of the root.

    Raises:
        NotFoundError: there is no such path.
        InvalidInputError: none was given, one lies outside of the root, or the base URL is none.
    """
    if not paths:
        raise InvalidInputError("no file or folder was given")
    base = None if base_url is None else _base(base_url)
    found = FoundFiles()
    seen: set[str] = set()
    for given in map(os.fspath, paths):
        absolute = os.path.abspath(given)  # and not resolved: a link keeps its name
        try:
            is_folder = stat.S_ISDIR(os.stat(absolute).st_mode)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no path"
            raise NotFoundError(f"{name(given)} cannot be read ({reason.lower()})") from None
        top = os.path.abspath(root) if root else absolute if is_folder else os.path.dirname(absolute)
        within = os.path.relpath(absolute, top)
        if within.split(os.sep)[0] == os.pardir:
            raise InvalidInputError(f"{name(given)} lies outside of the root, {name(top)}")
        prefix = base or (f"{_quoted(os.path.basename(top))}/" if os.path.basename(top) else "")
        if is_folder:
            found.folders.append(Folder(prefix, "" if within == os.curdir else _quoted(within), top))
        for path in _below(absolute, globs or DEFAULT_GLOBS, found) if is_folder else [absolute]:
            if path not in seen:
                seen.add(path)
                where = os.path.join(given, os.path.relpath(path, absolute)) if is_folder else given
                found.files.append(FoundFile(path, name(where), prefix, _quoted(os.path.relpath(path, top)), top))
    return found


def _below(folder: str, globs: Sequence[str], found: FoundFiles) -> Iterator[str]:
    # A stack: folders may be nested deeper than Python's.
    todo = [folder]
    while todo:
        current = todo.pop()
        try:
            with os.scandir(current) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable.append((name(current), (error.strerror or "unreadable").lower()))
            continue
        folders = []
        for entry in entries:
            try:
                kind = _kind(entry, os.path.relpath(entry.path, folder), globs)
            except OSError as error:
                found.unreadable.append((name(entry.path), (error.strerror or "unreadable").lower()))
                continue
            if kind == "folder":
                folders.append(entry.path)
            elif kind == "file":
                yield entry.path
            else:
                found.passed_over[kind] += 1
                if kind == "of other types":
                    found.suffixes[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1
        todo.extend(reversed(folders))


def _kind(entry: os.DirEntry[str], relative: str, globs: Sequence[str]) -> str:
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_symlink():
        return "symbolic links"
    if entry.is_dir():
        return "folder"
    if not entry.is_file():
        return "no regular files"
    for glob in globs:
        if fnmatch.fnmatch((relative if "/" in glob else entry.name).lower(), glob.lower()):
            return "file"
    return "of other types"


def _quoted(path: str) -> str:
    # The bytes: a name need not be valid Unicode.
    return quote(os.fsencode(path))


def _base(url: str) -> str:
    try:
        parsed = urlsplit(url)
        is_usable = parsed.scheme and "://" in url and not parsed.query and not parsed.fragment
        has_login = parsed.username is not None or parsed.password is not None
    except ValueError:
        is_usable = has_login = False
    if not is_usable or not url.isprintable() or " " in url:
        raise InvalidInputError("base_url must be an address such as https://example.org/docs/, without ? and #")
    if has_login:
        raise InvalidInputError("base_url must hold neither user nor password: everybody sees it in the hits")
    return url.rstrip("/") + "/"
