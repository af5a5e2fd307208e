"""docs/operations.md, executed: each command and each statement in it, in its order, on a server of its own."""

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import VERSION

from kotonoha_store import embedded

TEXT = (Path(__file__).parent.parent / "docs" / "operations.md").read_text(encoding="utf-8")
KINDS = {"sh", "sql", "ini"}


@dataclass(frozen=True)
class Block:
    heading: str
    kind: str
    code: str
    until_stopped: bool


def blocks() -> list[Block]:
    found = []
    fence = re.compile(
        r"^(?P<mark> *<!-- until stopped -->\n)?(?P<in> *)```(?P<kind>\w*)\n(?P<code>.*?)^(?P=in)```$",
        re.MULTILINE | re.DOTALL,
    )
    for match in fence.finditer(TEXT):
        heading = re.findall(r"^#+ (.*)$", TEXT[: match.start()], re.MULTILINE)[-1]
        code = re.sub(rf"^{match['in']}", "", match["code"], flags=re.MULTILINE)
        found.append(Block(heading, match["kind"], code, match["mark"] is not None))
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[embedded.EmbeddedServer]:
    # Not below pytest's own folder: another run takes the server's right to pass through it.
    directory = Path(tempfile.mkdtemp(prefix="kt"))
    directory.chmod(0o755)
    server = embedded.start(directory / "pg", version=VERSION)
    yield server
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def environment(server: embedded.EmbeddedServer) -> dict[str, str]:
    # psql beside the command itself.
    path = [sysconfig.get_path("scripts"), str(server.bin_dir), os.environ["PATH"]]
    return {**os.environ, "DATABASE_URL": server.url(), "KB_EMBEDDER": "hashing", "PATH": os.pathsep.join(path)}


def run(block: Block, environment: dict[str, str], folder: Path) -> "subprocess.CompletedProcess[str]":
    shell = {
        "sh": ["bash", "-euo", "pipefail", "-s"],
        "sql": ["psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", environment["DATABASE_URL"]],
    }
    return subprocess.run(
        shell[block.kind],
        input=block.code,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_until_stopped(block: Block, environment: dict[str, str], folder: Path) -> "subprocess.CompletedProcess[str]":
    command = ["bash", "-euo", "pipefail", "-c", f"exec {block.code}"]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # Its first record, after which it hears signals.
        output = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        output += process.stderr.read()
        return subprocess.CompletedProcess(command, process.wait(180), "", output)


def test_every_block_runs_in_its_order(environment: dict[str, str], tmp_path: Path) -> None:
    for block in blocks():
        assert block.kind in KINDS, f"a block of {block.kind or 'no language'} under {block.heading!r} is not run"
        if block.kind == "ini":
            continue
        done = (run_until_stopped if block.until_stopped else run)(block, environment, tmp_path)
        assert done.returncode == 0, f"under {block.heading!r}:\n{block.code}\n{done.stdout}\n{done.stderr}"


def test_every_command_that_is_named_is_run() -> None:
    executed = " ; ".join(" ".join(block.code.split()) for block in blocks() if block.kind == "sh")
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    named = {" ".join(each.split()[:2]) for each in re.findall(r"`kotonoha-store ([a-z][^`]*)`", prose)}
    assert len(named) > 8
    for command in named:
        # What stands for a value, and an option, say nothing about the command.
        words = [word for word in command.split() if re.fullmatch("[a-z-]+", word) and not word.startswith("--")]
        assert f"kotonoha-store {' '.join(words)}" in executed, f"`kotonoha-store {command}` is named but not run"
