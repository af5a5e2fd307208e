"""Settings: what the environment may say, and that secrets stay secret."""

import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

import kotonoha_store
from kotonoha_store import ConfigurationError, Settings

# (variable, default, a value as the environment gives it, what it means, values out of range)
VARIABLES: list[tuple[str, Any, str, Any, tuple[str, ...]]] = [
    ("POSTGRES_HOST", None, "db.example", "db.example", ()),
    ("POSTGRES_PORT", 5433, "5432", 5432, ("0", "65536", "port")),
    ("POSTGRES_DB", "kotonoha", "other", "other", ()),
    ("POSTGRES_USER", "kotonoha", "someone", "someone", ()),
    ("KB_EMBEDDED_DIR", None, "/srv/pg", Path("/srv/pg"), ()),
    ("KB_EMBEDDED_VERSION", 18, "16", 16, ("15", "17", "x", "１６.０")),
    ("DB_POOL_MIN_SIZE", 5, "0", 0, ("-1", "x", "21")),
    ("DB_POOL_MAX_SIZE", 20, "5", 5, ("0", "4", "1.5", str(2**31))),
    ("DB_COMMAND_TIMEOUT", 60.0, "1.5", 1.5, ("0", "-1", "nan", "inf", "x")),
    ("DB_CONNECT_TIMEOUT", 10.0, "3", 3.0, ("0", "inf")),
    ("DB_CONNECT_ATTEMPTS", 5, "1", 1, ("0",)),
    ("DB_POOLER", "auto", "transaction", "transaction", ("session",)),
    ("KB_REPLICA_WAIT_SECONDS", 1.0, "0", 0.0, ("-1", "61", "nan")),
    ("KB_REPLICA_MAX_LAG_SECONDS", 30.0, "5", 5.0, ("0", "inf", "nan")),
    ("KB_HNSW_M", 16, "32", 32, ("1", "101", "33")),
    ("KB_HNSW_EF_CONSTRUCTION", 64, "200", 200, ("31", "1001")),
    ("KB_SIMILARITY_THRESHOLD", 0.7, "0", 0.0, ("-0.1", "1.1", "nan")),
    ("KB_DEFAULT_TOP_K", 10, "1000", 1000, ("0", "1001")),
    ("KB_EXACT_SEARCH_LIMIT", None, "0", 0, ("-1", "1.5", "x", str(2**31))),
    ("KB_EMBEDDER", "auto", "hashing", "hashing", ("magic",)),
    ("KB_EMBEDDING_MODEL", None, "m", "m", ()),
    ("OPENAI_BASE_URL", None, "http://localhost:1", "http://localhost:1", ()),
    ("KB_EMBEDDING_MAX_RETRY", 3, "1", 1, ("0",)),
    ("KB_EMBEDDING_BATCH_SIZE", 100, "2048", 2048, ("0", "2049")),
    ("KB_EMBEDDING_MAX_CONCURRENT", 5, "1", 1, ("0",)),
    ("KB_EMBEDDING_INTERVAL_MINUTES", 1.0, "0.5", 0.5, ("0", "inf", "nan")),
    ("KB_EMBEDDING_LEASE_SECONDS", 300.0, "60", 60.0, ("0", "0.5", "inf")),
    ("KB_EMBEDDING_REQUEST_TOKENS", 300_000, "8000", 8000, ("0", "-1", "2147483648")),
    ("KB_EMBEDDING_REUSE", True, "false", False, ("maybe",)),
    ("KB_LISTEN", True, "0", False, ("maybe",)),
    ("KB_DRAIN_SECONDS", 30.0, "0", 0.0, ("-1", "inf", "nan")),
    ("KB_CHUNK_MAX_TOKENS", 4000, "8191", 8191, ("15", "8192")),
    ("KB_CHUNK_OVERLAP_RATIO", 0.2, "0", 0.0, ("-0.1", "1", "nan")),
    ("KB_CHUNK_INSERT_BATCH_SIZE", 100, "1", 1, ("0",)),
    ("KB_CHUNK_UPDATE_BATCH_SIZE", 100, "1", 1, ("0",)),
    ("KB_ARCHIVE_THRESHOLD_HOURS", 1.0, "0", 0.0, ("-1", "inf", "1e300")),
    ("KB_ARCHIVE_BATCH_SIZE", 10, "1", 1, ("0", str(2**63))),
    ("KB_ARCHIVE_INTERVAL_HOURS", 1.0, "0.25", 0.25, ("0", "inf")),
    ("KB_ARCHIVE_OVERLAP_MESSAGES", 5, "0", 0, ("-1",)),
    ("KB_ARCHIVE_MAX_MESSAGES", 50, "20", 20, ("1", "5", "-1")),
    ("KB_MIN_SESSION_LENGTH", 30, "0", 0, ("-1",)),
    ("KB_CHAT_CHUNK_STRATEGY", "message_based", "token_based", "token_based", ("MESSAGE_BASED", "other")),
    ("KB_CHAT_CHUNK_SIZE_MESSAGES", 5, "3", 3, ("0", "2")),
    ("KB_CHAT_CHUNK_OVERLAP_MESSAGES", 2, "4", 4, ("-1", "5")),
]
SECRETS = ("DATABASE_URL", "DATABASE_DIRECT_URL", "DATABASE_REPLICA_URL", "POSTGRES_PASSWORD", "OPENAI_API_KEY")
NAMES = [variable[0] for variable in VARIABLES]


def test_every_setting_is_tested_here() -> None:
    assert sorted([*NAMES, *SECRETS]) == sorted(name.upper() for name in Settings.model_fields)


@pytest.mark.parametrize(("name", "default", "given", "expected", "refused"), VARIABLES, ids=NAMES)
def test_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, default: Any, given: str, expected: Any, refused: tuple[str, ...]
) -> None:
    assert getattr(Settings(), name.lower()) == default
    assert given != str(default), "the test would not notice that the variable is not read"
    monkeypatch.setenv(name, given)
    value = getattr(Settings(), name.lower())
    assert (value, type(value)) == (expected, type(expected))
    # An empty variable is one that is not set.
    monkeypatch.setenv(name, "")
    assert getattr(Settings(), name.lower()) == default
    monkeypatch.delenv(name)
    assert getattr(Settings(**{name.lower(): expected}), name.lower()) == expected
    for bad in refused:
        monkeypatch.setenv(name, bad)
        with pytest.raises(ConfigurationError, match=name):
            Settings()


def test_names_in_the_environment_may_be_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("kb_default_top_k", "7")
    assert Settings().kb_default_top_k == 7


def test_bounds_between_settings_are_inclusive() -> None:
    Settings(db_pool_min_size=20, db_pool_max_size=20)
    Settings(kb_hnsw_m=16, kb_hnsw_ef_construction=32)
    Settings(kb_chat_chunk_size_messages=3, kb_chat_chunk_overlap_messages=2)


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="kb_default_topk"):
        Settings(kb_default_topk=5)


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.kb_default_top_k = 1


# Secrets


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_read_and_not_shown(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert getattr(Settings(), name.lower()) is None
    monkeypatch.setenv(name, "postgresql://u:geheim@h/d")
    settings = Settings()
    assert getattr(settings, name.lower()).get_secret_value() == "postgresql://u:geheim@h/d"
    shown = [repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump()), f"{settings!r}"]
    assert not any("geheim" in text for text in shown)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kb_hnsw_m": 1},
        {"db_pool_min_size": 30},
        {"postgres_password": 17},
        {"unheard_of": "geheim"},
        {"postgres_host": ["geheim"]},
        {"kb_embedder": "geheim"},
    ],
)
def test_errors_hold_no_value(wrong: dict[str, Any]) -> None:
    values = {"database_url": "postgresql://u:geheim@h/d", "openai_api_key": "geheim", **wrong}
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    text = "".join(traceback.format_exception(caught.value))
    assert next(iter(wrong)) in text.lower() or "DB_POOL_MIN_SIZE" in text
    # The line of this test itself is part of the traceback, its values are not.
    assert "geheim" not in text
    assert "geheim" not in repr(caught.value)


# .env


def test_the_env_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(Settings.model_config, "env_file", ".env")
    monkeypatch.chdir(tmp_path)
    assert Settings().kb_default_top_k == 10
    (tmp_path / ".env").write_text(
        "KB_DEFAULT_TOP_K=7\nKB_HNSW_M=\nSOMEBODY_ELSES=1\nexport POSTGRES_DB='梅雨'\nPOSTGRES_PASSWORD=\"p#w\"\n",
        encoding="utf-8",
    )
    settings = Settings()
    assert (settings.kb_default_top_k, settings.kb_hnsw_m, settings.postgres_db) == (7, 16, "梅雨")
    assert settings.postgres_password is not None
    assert settings.postgres_password.get_secret_value() == "p#w"
    monkeypatch.setenv("KB_DEFAULT_TOP_K", "8")
    assert Settings().kb_default_top_k == 8
    assert Settings(kb_default_top_k=9).kb_default_top_k == 9
    assert Settings(_env_file=None).postgres_db == "kotonoha"


def test_the_env_file_is_on_by_default(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("KB_DEFAULT_TOP_K=7\n", encoding="utf-8")
    # In a process of its own: conftest switches it off in this one.
    code = "from kotonoha_store import Settings; print(Settings().kb_default_top_k)"
    environment = {**os.environ, "PYTHONPATH": str(Path(kotonoha_store.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "7"


def test_an_env_file_that_is_no_text_is_told_without_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_bytes(b"POSTGRES_PASSWORD=geheim\xff\n")
    with pytest.raises(ConfigurationError, match="UTF-8") as caught:
        Settings(_env_file=path)
    assert "geheim" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("values", "embedded"),
    [
        ({}, True),
        ({"database_url": "postgresql://h/d"}, False),
        ({"postgres_host": "h"}, False),
        ({"postgres_db": "other"}, True),
    ],
)
def test_without_a_server_the_embedded_one_serves(values: dict[str, str], embedded: bool) -> None:
    assert Settings(**values).uses_embedded_server is embedded


def test_a_base_url_holds_no_credentials() -> None:
    secret = "".join(["S3", "cr3t"])
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY") as caught:
        Settings(openai_base_url=f"http://user:{secret}@127.0.0.1:1/v1")
    assert secret not in "".join(traceback.format_exception(caught.value))
