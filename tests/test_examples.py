"""The documentation, executed: README and examples."""

import asyncio
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import settings_for
from sqlalchemy import URL, func, select

from kotonoha_store import (
    Database,
    HashingEmbedder,
    KnowledgeChunk,
    KnowledgeSource,
    Message,
    Session,
    SessionStatus,
    Store,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

CONVERSATION = {
    "conversation": "garden",
    "speakers": ["Aoi", "Ben"],
    "sessions": [
        {
            "session": 1,
            "started_at": "2026-03-01T09:00:00+00:00",
            "messages": [
                {"id": "D1:1", "speaker": "Aoi", "text": "I planted twelve tomatoes behind the greenhouse today."},
                {"id": "D1:2", "speaker": "Ben", "text": "Lovely! Mind the late frost in April."},
            ],
        },
        {
            "session": 2,
            "started_at": "2026-03-09T18:30:00",
            "messages": [{"id": "D2:1", "speaker": "Aoi", "text": "The hedgehog is back, it sleeps under the shed."}],
        },
    ],
    "questions": [{"question": "Where did Aoi plant the tomatoes?"}, {"question": "Where does the hedgehog sleep?"}],
}


def run(url: URL | None, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    if url is not None:
        environment["DATABASE_URL"] = url.render_as_string(hide_password=False)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "160", "PYTHONWARNINGS": "error", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def hits(output: str, question: str) -> str:
    """What was printed for a question, up to the second hit."""
    after = output.split(question, 1)[1].split("\n\n", 1)[0]
    return re.split(r"\n  \S+\d\.\d\d|\n  \d\.\d\d", after, maxsplit=2)[1]


def test_quickstart_finds_what_was_said(empty_url: URL) -> None:
    done = run(empty_url, "examples/quickstart.py")
    assert done.returncode == 0, done.stderr
    assert "北海道" in hits(done.stdout, "梅雨がないのはどこ？")
    first = hits(done.stdout, "What is the puppy's name?")
    assert "Biscuit" in first
    assert "https://discord.com/channels/" in first


def test_quickstart_takes_a_file_and_replaces_what_it_left(empty_url: URL, tmp_path: Path) -> None:
    path = tmp_path / "garden.json"
    path.write_text(json.dumps(CONVERSATION), encoding="utf-8")
    for _ in range(2):
        done = run(empty_url, "examples/quickstart.py", str(path))
        assert done.returncode == 0, done.stderr
        assert "greenhouse" in hits(done.stdout, "Where did Aoi plant the tomatoes?")
        assert "shed" in hits(done.stdout, "Where does the hedgehog sleep?")

    async def count() -> list[int]:
        async with Database(empty_url, settings_for(empty_url)) as database, database.begin() as session:
            return [
                (await session.execute(select(func.count()).select_from(table))).scalar_one()
                for table in (Session, KnowledgeSource, KnowledgeChunk)
            ]

    assert asyncio.run(count()) == [2, 2, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Invalid JSON"),
        ("{}", "conversation: Field required"),
        ("[]", "should be an object"),
        ("\\xff", "Invalid JSON"),
    ],
    ids=["cut off", "empty", "no object", "no JSON"],
)
def test_quickstart_says_in_a_line_what_is_wrong_with_a_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    done = run(None, "examples/quickstart.py", str(path))
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_quickstart_leaves_other_peoples_chunks_alone(migrated_url: URL) -> None:
    async def add() -> None:
        async with Database(migrated_url, settings_for(migrated_url)) as database, database.begin() as session:
            from kotonoha_store import KnowledgeRepository, NewChunk, SourceType

            knowledge = KnowledgeRepository(session)
            source = await knowledge.add_source(SourceType.WEB_PAGE, "somebody's")
            await knowledge.add_chunks(source, [NewChunk("waits for another model")])

    asyncio.run(add())
    done = run(migrated_url, "examples/quickstart.py")
    assert done.returncode == 1
    assert "chunks of somebody else" in done.stderr


def test_quickstart_leaves_other_peoples_sessions_alone(migrated_url: URL) -> None:
    async def messages(*new: Message) -> int:
        async with Store.open(settings_for(migrated_url), embedder=HashingEmbedder()) as store, store.begin() as tx:
            if new:
                await tx.sessions.append("live:1", new, guild_id=1)
            record = await tx.sessions.load("live:1")
            assert record.status is SessionStatus.ACTIVE
            return len(record.messages)

    asyncio.run(messages(*[Message.user(f"This is message {number} of a live session.") for number in range(12)]))
    assert run(migrated_url, "examples/quickstart.py").returncode == 0
    assert asyncio.run(messages()) == 12


def test_quickstart_on_an_unreachable_database_says_so_without_the_password() -> None:
    done = run(
        None,
        "examples/quickstart.py",
        DATABASE_URL="postgresql://kotonoha:se%25cret@127.0.0.1:9/kotonoha",
        DB_CONNECT_ATTEMPTS="1",
    )
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert "cret" not in done.stdout + done.stderr


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_code_runs(empty_url: URL, tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text(readme_blocks()[0], encoding="utf-8")
    done = run(empty_url, str(script))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "梅雨" in lines[0]
    assert any("Biscuit" in line for line in lines)


def test_a_worker_process_runs_until_it_is_told_to_end(migrated_url: URL, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(f"import logging\nlogging.basicConfig(level='INFO')\n{readme_blocks()[1]}", encoding="utf-8")
    environment = {**os.environ, "DATABASE_URL": migrated_url.render_as_string(hide_password=False)}
    environment |= {"KB_EMBEDDER": "hashing", "PYTHONWARNINGS": "error"}
    with subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        while "service_started" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.terminate()
        said += process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "service_ended" in said
    assert "Traceback" not in said


def test_readme_goes_from_an_old_bots_file_to_an_answer(empty_url: URL, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as old:
        old.execute(
            "CREATE TABLE sessions (session_key TEXT PRIMARY KEY, session_type TEXT, messages TEXT, created_at TEXT,"
            " last_active_at TEXT, channel_id INTEGER, thread_id INTEGER, user_id INTEGER)"
        )
        said = [
            {"role": "user", "content": "梅雨はどんな季節？", "timestamp": "2025-06-01T09:00:00"},
            {
                "role": "assistant",
                "content": "雨の多い季節です。五月から七月にかけて降ります。",
                "timestamp": "2025-06-01T09:00:05",
            },
        ]
        old.execute(
            "INSERT INTO sessions VALUES ('channel:2', 'channel', ?, ?, ?, 2, NULL, NULL)",
            (json.dumps(said, ensure_ascii=False), "2025-06-01T09:00:00", "2025-06-01T09:00:05"),
        )
        old.commit()
    (block,) = re.findall(r"<!-- commands -->\n```sh\n(.*?)```", README, re.DOTALL)
    commands = block.splitlines()
    assert len(commands) < 10
    outputs = []
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "kotonoha-store"
        done = run(empty_url, "-m", "kotonoha_store.cli", *arguments, cwd=tmp_path, KB_EMBEDDER="hashing")
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "雨の多い季節です。" in outputs[-2]


async def test_readme_searches_run(store: Store) -> None:
    _, _, searches = readme_blocks()
    names: dict[str, Any] = {}
    exec(searches, names)  # noqa: S102  the README's own code
    scope = {"guild_id": 1, "channel_id": 2}
    said = datetime(2026, 6, 14, tzinfo=UTC)
    await store.add_document("梅雨", "北海道には梅雨がない。 Biscuit, a puppy.", occurred_at=said, **scope)
    await store.add_document("雨", "雨の多い季節のはなし。", occurred_at=said, user_id=7, **scope)
    await store.embedding_worker.run_until_empty()
    results = await names["searches"](store, await store.embedder.embed_query("雨"))
    found = [[hit.title for hit in result.hits] for result in results]
    assert [sorted(titles) for titles in found] == [
        ["梅雨", "雨"],
        ["梅雨"],
        ["梅雨"],
        ["梅雨"],
        ["梅雨", "雨"],
        ["梅雨", "雨"],
    ]


def test_readme_commands_are_what_is_run() -> None:
    quickstart, tests = re.findall(r"<!-- \w+ command -->\n```sh\n(.*)\n```", README)
    assert quickstart.endswith("examples/quickstart.py")
    assert "-m pytest" in tests
    # CI takes the line from here.
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_setting_is_in_the_example_file() -> None:
    from kotonoha_store import Settings

    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    missing = [name for name in Settings.model_fields if f"{name.upper()}=" not in example]
    assert missing == []
