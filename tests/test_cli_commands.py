"""Commands that do their work: from an empty database to a hit, and what is looked after in between."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from command_line import kotonoha
from conftest import RUN, run_sql, settings_for
from sqlalchemy import URL

from kotonoha_store import Message, Settings, Store
from kotonoha_store.database import connect_arguments
from kotonoha_store.errors import ErrorCode


def fetch(url: URL, sql: str) -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(**connect_arguments(url, settings_for(url)))
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(run())


def converse(url: URL, *sessions: str) -> None:
    async def run() -> None:
        async with Store.open(settings_for(url)) as store, store.begin() as tx:
            for key in sessions:
                said = ["梅雨がないのはどこ？", "六月の北海道に梅雨はない。"] * 20
                messages = [
                    Message.user(each) if i % 2 == 0 else Message.assistant(each) for i, each in enumerate(said)
                ]
                await tx.sessions.append(key, messages, session_type="thread", guild_id=7, channel_id=8)

    asyncio.run(run())


def bury(url: URL, *codes: ErrorCode) -> None:
    """One document a code, each a dead letter."""

    async def run() -> None:
        async with Store.open(settings_for(url)) as store:
            for code in codes:
                await store.add_document(code, f"text of {code}", guild_id=7)
                lease = await store.queue.claim()
                await store.queue.bury(lease, lease.chunk_ids, code)

    asyncio.run(run())


def test_from_an_empty_database_to_a_hit(empty_url: URL) -> None:
    assert kotonoha("check", "--json", url=empty_url).json["schema"]["state"] == "empty"
    migrated = kotonoha("migrate", "--json", url=empty_url).json
    assert migrated["changed"]
    assert kotonoha("migrate", url=empty_url).stdout.startswith("nothing to do")
    assert kotonoha("current", "--json", url=empty_url).json["revision"] == migrated["to"]
    converse(empty_url, "thread:1", "thread:2")

    due = kotonoha("archive", "--dry-run", "--idle-hours", "0", "--json", url=empty_url).json["due"]
    assert [each["session_key"] for each in due] == ["thread:1", "thread:2"]
    archived = kotonoha("archive", "--idle-hours", "0", "--json", url=empty_url).json
    assert (archived["archived"], archived["failed"]) == (2, [])
    waiting = kotonoha("status", "--json", url=empty_url).json
    assert waiting["queue"]["ready"] == waiting["chunks"] == archived["chunks"] > 0
    assert None not in {each["rows"] for each in waiting["tables"]}  # though nobody has analysed them
    assert waiting["sources"]["pending"] == waiting["sessions"]["archived"] == 2
    assert {each["name"] for each in waiting["tables"]} >= {"sessions", "knowledge_chunks"}

    embedded = kotonoha("embed", "--json", url=empty_url)
    assert embedded.code == 0
    assert embedded.json["embedded"] == archived["chunks"]
    for mode in ("hybrid", "meaning", "words"):
        options = ("--mode", mode, "--guild", "7", "-k", "3", "--json")
        found = kotonoha("search", "北海道の梅雨", *options, url=empty_url).json
        assert len(found["hits"]) + found["hidden_by_threshold"] == 3
        assert found["plan"] != "words" or mode == "words"
    assert "梅雨" in kotonoha("search", "梅雨", "--session-key", "thread:1", url=empty_url).stdout
    meaning = ("search", "雪", "--everywhere", "--mode", "meaning")
    strict = kotonoha(*meaning, "--threshold", "1", url=empty_url).stdout
    assert "below the threshold: --no-threshold shows them" in strict
    assert "below" not in kotonoha(*meaning, "--no-threshold", url=empty_url).stdout
    prompt = kotonoha("recall", "thread:1", "梅雨", "--max-tokens", "500", "--json", url=empty_url).json
    assert prompt["hits"]
    assert "[1]" in prompt["context"]
    assert 0 < prompt["tokens"] <= 500
    assert kotonoha("recall-check", "--sample", "5", url=empty_url).code == 0


def test_a_search_must_say_where_and_finds_what_the_filters_keep(migrated_url: URL) -> None:
    converse(migrated_url, "thread:1")
    kotonoha("archive", "--idle-hours", "0", url=migrated_url)

    def hits(*options: str) -> Any:
        return kotonoha("search", "梅雨", "--mode", "words", "--json", *options, url=migrated_url).json["hits"]

    nowhere = kotonoha("search", "梅雨", url=migrated_url)
    assert nowhere.code == 3
    assert "--guild" in nowhere.stderr
    assert "--everywhere" in nowhere.stderr
    assert hits("--everywhere")
    assert hits("--guild", "7", "--channel", "8", "--since", "2020-01-01", "--source-type", "discord_session")
    assert not hits("--guild", "9")
    assert not hits("--everywhere", "--until", "2020-01-01T00:00+09:00")
    assert kotonoha("search", "梅雨", "--since", "gestern", "--everywhere", url=migrated_url).code == 3


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("recall thread:9 梅雨", 3, "--everywhere"),
        ("search 梅雨 --everywhere --since 2025-02-01 --until 2025-01-01", 3, "--since must lie before --until\n"),
        ("search 梅雨 --everywhere --mode fuzzy", 2, "'--mode': 'fuzzy' is not one of"),
        ("search 梅雨 --everywhere -k 0", 2, "'--top-k' / '-k'"),
        ("search 梅雨 --everywhere --threshold 7", 2, "'--threshold'"),
        ("recall-check --wanted 7", 2, "'--wanted'"),
        ("reindex --m 1", 2, "'--m'"),
    ],
)
def test_what_a_command_refuses_is_said_in_its_own_words(
    migrated_url: URL, arguments: str, code: int, said: str
) -> None:
    ran = kotonoha(*arguments.split(), url=migrated_url)
    assert ran.code == code
    assert said in ran.stderr
    assert "Value error" not in ran.stderr
    assert "filters" not in ran.stderr


def test_where_no_query_can_be_embedded_searches_by_words_are_named(migrated_url: URL) -> None:
    converse(migrated_url, "thread:1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: refused at once
        base = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        for question in (("search", "梅雨", "--everywhere"), ("recall", "thread:1", "梅雨")):
            none = kotonoha(*question, url=migrated_url, KB_EMBEDDER="auto")
            assert none.code == 3
            assert "set OPENAI_API_KEY" in none.stderr
            assert "Store.open" not in none.stderr
            away = kotonoha(*question, url=migrated_url, KB_EMBEDDER="openai", OPENAI_API_KEY="k", OPENAI_BASE_URL=base)
            assert away.code == 4
            assert "OPENAI_BASE_URL" in away.stderr
            assert "--mode words" in none.stderr
            assert "--mode words" in away.stderr
            assert kotonoha(*question, "--mode", "words", url=migrated_url, KB_EMBEDDER="auto").code == 0


def test_a_session_is_shown_with_its_last_messages(migrated_url: URL) -> None:
    converse(migrated_url, "thread:1")
    shown = kotonoha("sessions", "--key", "thread:1", "--limit", "3", url=migrated_url).stdout
    assert "3 of 40" in shown
    assert shown.count("六月の北海道に梅雨はない。") == 2
    assert "assistant" in shown
    session = kotonoha("sessions", "--key", "thread:1", "--json", url=migrated_url).json["session"]
    assert len(session["messages"]) == session["message_count"] == 40
    assert session["messages"][0]["role"] == "user"
    assert kotonoha("sessions", "--key", "thread:9", url=migrated_url).code == 3
    assert kotonoha("sessions", "--key", "thread:1", "--guild", "7", url=migrated_url).code == 2


def test_a_downgrade_says_what_is_lost_and_asks(migrated_url: URL) -> None:
    bury(migrated_url, ErrorCode.INVALID_INPUT)
    asyncio.run(run_sql(migrated_url, "INSERT INTO embedding_pauses (provider) VALUES ('a')"))
    for answer in ("n\n", ""):  # a no, and a script's end of file
        refused = kotonoha("downgrade", "0003", url=migrated_url, stdin=answer)
        assert refused.code == 1
        assert "the table embedding_pauses with 1 rows" in refused.stderr
        assert "the column knowledge_chunks_dlq.history" in refused.stderr
        assert "nothing was changed" in refused.stderr
    assert kotonoha("current", url=migrated_url).code == 0
    assert kotonoha("downgrade", "0003", url=migrated_url, stdin="y\n").code == 0
    assert kotonoha("current", "--json", url=migrated_url).json["revision"] == "0003"
    assert kotonoha("downgrade", "-1", "--yes", "--json", url=migrated_url).json["to"] == "0002"
    assert kotonoha("migrate", "+1", "--json", url=migrated_url).json["to"] == "0003"
    for wrong in (("downgrade", "banana", "--yes"), ("migrate", "banana"), ("downgrade", "-9"), ("migrate", "+9")):
        unknown = kotonoha(*wrong, url=migrated_url)
        assert unknown.code == 3
        assert f"there is no revision {wrong[1]}" in unknown.stderr
        assert "known: base, 0001, 0002" in unknown.stderr
    assert kotonoha("downgrade", "0002", "--yse", url=migrated_url).code == 2


def test_the_sql_of_migrations_needs_no_database() -> None:
    whole = kotonoha("sql").stdout
    assert "CREATE TABLE IF NOT EXISTS sessions" in whole
    assert "ef_construction = 99" in kotonoha("sql", KB_HNSW_EF_CONSTRUCTION="99").stdout
    part = kotonoha("sql", "0003:head", "--json").json["sql"]
    assert "embedding_pauses" in part
    assert "CREATE TABLE IF NOT EXISTS sessions" not in part
    assert "DROP TABLE IF EXISTS embedding_pauses" in kotonoha("sql", "head:0003", "--downgrade").stdout
    assert kotonoha("sql", "head", "--downgrade").code == 2
    assert kotonoha("sql", "banana").code == 3


def test_dead_letters_are_listed_shown_queued_again_and_discarded(migrated_url: URL) -> None:
    assert kotonoha("dlq", "list", url=migrated_url).stdout == "no dead letters\n"
    bury(migrated_url, ErrorCode.INVALID_INPUT, ErrorCode.INVALID_INPUT, ErrorCode.SERVER_ERROR)
    listed = kotonoha("dlq", "list", "--error-code", "invalid_input", "--json", url=migrated_url).json["dead_letters"]
    assert len(listed) == 2
    assert "content" not in listed[0]
    first = str(listed[0]["id"])
    assert "text of INVALID_INPUT" in kotonoha("dlq", "show", first, url=migrated_url).stdout
    assert kotonoha("dlq", "show", "99999999999999999999", url=migrated_url).code == 3

    unknown = kotonoha("dlq", "requeue", "--error-code", "BANANA", url=migrated_url)
    assert unknown.code == 3
    assert all(code in unknown.stderr for code in ErrorCode)
    assert kotonoha("dlq", "requeue", url=migrated_url).code == 2  # says not which
    assert kotonoha("dlq", "discard", first, "--all", url=migrated_url).code == 2

    assert kotonoha("dlq", "discard", first, url=migrated_url, stdin="n\n").code == 1
    assert kotonoha("dlq", "discard", first, "--yes", "--json", url=migrated_url).json == {"discarded": 1}
    assert kotonoha("dlq", "requeue", "--all", "--json", url=migrated_url).json == {"requeued": 2}
    assert not kotonoha("dlq", "list", "--json", url=migrated_url).json["dead_letters"]


def test_embed_says_what_it_could_not_embed(migrated_url: URL) -> None:
    converse(migrated_url, "thread:1")
    kotonoha("archive", "--idle-hours", "0", url=migrated_url)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        ran = kotonoha(
            "embed",
            "--json",
            url=migrated_url,
            KB_EMBEDDER="openai",
            OPENAI_BASE_URL=f"http://127.0.0.1:{taken.getsockname()[1]}/v1",
        )
    assert ran.code == 1
    assert ran.json["embedded"] == 0
    assert ran.json["ready"] + ran.json["waiting"] > 0
    assert kotonoha("status", "--json", url=migrated_url).json["pauses"]


def test_a_failed_session_is_named_and_ends_archive_with_1(migrated_url: URL) -> None:
    converse(migrated_url, "thread:1", "thread:2")
    asyncio.run(
        run_sql(
            migrated_url,
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF NEW.origin_session_key = 'thread:1' THEN RAISE 'geheim'; END IF; RETURN NEW; END $$",
            "CREATE TRIGGER refuse BEFORE INSERT ON knowledge_sources FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
    )
    ran = kotonoha("archive", "--idle-hours", "0", url=migrated_url)
    assert ran.code == 1
    assert f"session {fetch(migrated_url, 'SELECT min(id) FROM sessions')}: " in ran.stdout
    assert "geheim" not in ran.stdout + ran.stderr
    assert fetch(migrated_url, "SELECT count(*) FROM knowledge_sources") == 1


def test_a_worker_archives_embeds_serves_metrics_and_drains_at_sigterm(migrated_url: URL) -> None:
    converse(migrated_url, "thread:1")
    seen: list[str] = []

    def stop_when_done(port: int) -> None:
        try:
            deadline = time.monotonic() + 120
            done = "SELECT count(*) > 0 AND count(*) = count(embedding) FROM knowledge_chunks"
            while not fetch(migrated_url, done) and time.monotonic() < deadline:
                time.sleep(0.02)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                seen.append(answer.read().decode())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with socket.socket() as kept:
        # Bound and not listening, it keeps the port from all but a server, which sets this as well.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        port = kept.getsockname()[1]
        other = threading.Thread(target=stop_when_done, args=(port,))
        other.start()
        arguments = ("worker", "--metrics-port", str(port), "--log-json", "--json")
        ran = kotonoha(*arguments, url=migrated_url, KB_ARCHIVE_THRESHOLD_HOURS="0")
        other.join(60)
    assert ran.code == 0
    assert ran.json == {"stopped": True}
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    events = [line.get("event") for line in lines]
    assert {"service_started", "embedding_batch", "stop_requested", "service_ended"} <= set(events)
    assert "梅雨" not in ran.stderr
    assert "kotonoha" in seen[0] or "pending_chunks" in seen[0]
    assert fetch(migrated_url, "SELECT count(*) FROM embedding_jobs") == 0


def test_stats_fills_in_words_and_analyses(migrated_url: URL) -> None:
    converse(migrated_url, "thread:1")
    kotonoha("archive", "--idle-hours", "0", url=migrated_url)
    asyncio.run(run_sql(migrated_url, "DELETE FROM chunk_terms"))
    before = kotonoha("stats", "--json", url=migrated_url).json["statistics"]
    assert before["chunks_without_words"] == before["chunks"] > 0
    after = kotonoha("stats", "--refresh", "--json", url=migrated_url)
    assert after.code == 0
    now = after.json["statistics"]
    assert now["chunks_without_words"] == 0
    assert now["terms_counted"] == now["chunks"]
    assert all(each["analysed_at"] for each in now["tables"])


def test_stats_says_which_tables_the_role_may_not_analyse(migrated_url: URL) -> None:
    role = f"kt_{RUN}_reader"
    try:
        asyncio.run(
            run_sql(
                migrated_url,
                f"CREATE ROLE {role} LOGIN PASSWORD 'x'",
                f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}",
            )
        )
        ran = kotonoha("stats", "--refresh", "--json", url=migrated_url.set(username=role, password="x"))
        assert ran.code == 1
        assert "knowledge_chunks" in ran.json["not_analysed"]
    finally:
        asyncio.run(run_sql(migrated_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}"))


def test_config_shows_values_sources_and_slips_but_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(Settings.model_config, "env_file", ".env")
    (tmp_path / ".env").write_text("KB_DEFAULT_TOP_K=7\nkb_embeding_model=x\nOTHER=1\n")
    environment = {
        "DATABASE_URL": "postgresql://bot:geheim@localhost/x?sslpassword=geheim",
        "OPENAI_API_KEY": "sk-geheim",
        "DB_POOL_MAXSIZE": "3",
    }
    ran = kotonoha("config", "--json", **environment)
    assert ran.code == 1
    settings = ran.json["settings"]
    assert settings["KB_DEFAULT_TOP_K"] == {"value": 7, "source": ".env"}
    assert settings["DATABASE_URL"] == {"value": "set", "source": "environment"}
    assert settings["POSTGRES_PASSWORD"] == {"value": "not set", "source": "default"}
    assert ran.json["unknown"] == {"DB_POOL_MAXSIZE": "DB_POOL_MAX_SIZE", "KB_EMBEDING_MODEL": "KB_EMBEDDING_MODEL"}
    people = kotonoha("config", **environment)
    assert "do you mean DB_POOL_MAX_SIZE?" in people.stdout
    assert "geheim" not in ran.stdout + people.stdout
    wrong = kotonoha("config", KB_DEFAULT_TOP_K="many")
    assert wrong.code == 3
    assert "KB_DEFAULT_TOP_K" in wrong.stderr
