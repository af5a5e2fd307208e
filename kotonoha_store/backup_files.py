"""The two files of a backup: made for their owner alone, published when they are whole, cleared away when abandoned."""

import contextlib
import os
import re
import sys
import tempfile
from pathlib import Path

from kotonoha_store.backup_contents import Manifest, manifest_path, write_manifest
from kotonoha_store.errors import InvalidInputError


def absolute(file: Path) -> Path:
    """Never an option to a program, whatever its name."""
    return Path(file).absolute()


def place(file: Path, force: bool) -> Path:
    file = absolute(file)
    _refuse_existing(file, force)
    if not file.parent.is_dir():
        raise InvalidInputError(f"there is no directory {file.parent}; create it first")
    return file


def _refuse_existing(file: Path, force: bool) -> None:
    for path in (file, manifest_path(file)):
        if path.is_dir():
            raise InvalidInputError(f"{path} is a directory; name a file")
        if path.exists() and not path.is_file():
            raise InvalidInputError(f"{path} is no regular file (a device or pipe); choose another name")
        if not force and (path.exists() or path.is_symlink()):
            raise InvalidInputError(f"{path} is there already; choose another name, or replace it with --force")


def new_file(file: Path) -> tuple[Path, int]:
    """A file beside it that only its owner may read, and what holds a lock on it until it is closed."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".partial")
        # Before it was locked, another backup may have taken it for abandoned.
        if not _lock(descriptor) or os.fstat(descriptor).st_nlink:
            return Path(name), descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed, or this process ends. False where somebody else has, or nobody can."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_abandoned(file: Path) -> None:
    """Remove what backups to the same file left that were killed: no process has it locked."""
    pattern = re.compile(rf"\.{re.escape(file.name)}\.[a-z0-9_]{{8}}\.partial")
    for path in file.parent.iterdir():
        if pattern.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError), path.open("rb") as stream:
            if _lock(stream.fileno()):
                discard(path)


def publish(partial: Path, manifest: Manifest, file: Path, force: bool) -> None:
    write_manifest(manifest_path(partial), manifest)
    _refuse_existing(file, force)
    # The dump last: without it there is no backup, and beside an older one the manifest is seen not to fit.
    manifest_path(partial).replace(manifest_path(file))
    partial.replace(file)
    _sync_directory(file.parent)


def discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    manifest_path(partial).unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
