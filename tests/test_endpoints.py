"""Where the database is: whether a pooler stands before it, and what lies behind."""

from typing import Any

import asyncpg
import pytest
from sqlalchemy import URL, make_url

from kotonoha_store import ConfigurationError, Database, Settings, StoreUnavailableError
from kotonoha_store.driver_errors import translate_error
from kotonoha_store.endpoints import connect_arguments, database_url, direct_url, is_pooled

NEON = "ep-cool-darkness-123456-pooler.us-east-2.aws.neon.tech"


def text_of(url: URL) -> str:
    return url.render_as_string(hide_password=False)


@pytest.mark.parametrize(
    ("url", "direct"),
    [
        (f"postgresql://u:p%40@{NEON}/d?sslmode=require", f"postgresql://u:p%40@{NEON.replace('-pooler', '')}/d"),
        (
            "postgresql://u@aws-0-eu-1.pooler.supabase.com:6543/d",
            "postgresql://u@aws-0-eu-1.pooler.supabase.com:5432/d",
        ),
        ("postgresql://u@db.ref.supabase.co:6543/d?pgbouncer=true", "postgresql://u@db.ref.supabase.co:5432/d"),
        ("postgresql://u@x.postgres.database.azure.com:6432/d", "postgresql://u@x.postgres.database.azure.com:5432/d"),
        ("postgresql://u@10.0.0.1:6432/d", None),
        ("postgresql://u@/d?host=/run/pgbouncer&port=6432", None),
        ("postgresql://u@h/d?pgbouncer=true", None),
        ("postgresql://u@acid-minimal-cluster-pooler/d", None),
    ],
)
def test_a_pooler_is_told_by_its_address_and_so_is_what_lies_behind_some(url: str, direct: str | None) -> None:
    settings = Settings(database_url=url)
    assert is_pooled(make_url(url), settings)
    if direct is None:
        with pytest.raises(ConfigurationError, match="DATABASE_DIRECT_URL"):
            direct_url(make_url(url), settings)
    else:
        found = direct_url(make_url(url), settings)
        assert text_of(found.set(query={})) == direct
        assert not is_pooled(found, settings)
    assert not is_pooled(make_url(url), Settings(db_pooler="none"))


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u@{NEON.replace('-pooler', '')}/d",
        "postgresql://u@aws-0-eu-1.pooler.supabase.com:5432/d",
        "postgresql://u@pooler-of-nothing:5432/d",
        "postgresql://u@h:6432/d?pgbouncer=false",
        "postgresql://u-pooler@h/d",
        "postgresql://u@h.example-pooler.com/d",
    ],
)
def test_other_addresses_are_the_servers_own(url: str) -> None:
    assert not is_pooled(make_url(url), Settings())
    assert direct_url(make_url(url), Settings()) == make_url(url)
    assert is_pooled(make_url(url), Settings(db_pooler="transaction"))


def test_the_direct_address_must_not_lead_to_a_pooler() -> None:
    settings = Settings(database_direct_url="postgresql://u:s3cret@h:6432/d")
    with pytest.raises(ConfigurationError, match="DATABASE_DIRECT_URL leads to a pooler") as caught:
        direct_url(make_url("postgresql://u@h:6432/d"), settings)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "host", "query"),
    [
        ({"database_url": "postgresql://u:p@h1:5432,h2:6432/d"}, None, {"host": "h1,h2", "port": "5432,6432"}),
        ({"database_url": "postgresql://u:p@h1,[::1]:6432/d"}, None, {"host": "h1,[::1]", "port": "5432,6432"}),
        (
            {"database_url": "postgresql://u:p@/d?host=h1:6432&host=h2:6432"},
            None,
            {"host": "h1,h2", "port": "6432,6432"},
        ),
        ({"database_url": "postgresql://u:p@/d?host=/a&port=6432"}, None, {"host": "/a", "port": "6432"}),
        ({"postgres_host": "h1,h2", "postgres_port": 6432}, None, {"host": "h1,h2", "port": "6432,6432"}),
        ({"postgres_host": "[::1]", "postgres_port": 6432}, "::1", {}),
    ],
)
def test_several_hosts_and_bracketed_ones_reach_the_driver_whole(
    given: dict[str, Any], host: str | None, query: dict[str, str]
) -> None:
    settings = Settings(**given)
    url = database_url(settings)
    assert url is not None
    assert (url.host, dict(url.query)) == (host, query)
    assert is_pooled(url, settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"postgres_host": "localhost:6432"}, "POSTGRES_PORT"),
        ({"postgres_host": "h1,"}, "POSTGRES_HOST has a host"),
        ({"database_url": "postgresql://u:s3cret@/d?host=/a&port=abc"}, "port in DATABASE_URL"),
        ({"database_url": "postgresql://u:s3cret@h1:1,h2:x/d"}, "port in DATABASE_URL"),
        ({"database_url": "postgresql://u:s3cret@/d?host=a,b,c&port=1,2"}, "3 hosts and 2 ports"),
    ],
)
def test_an_address_that_cannot_be_read_is_told(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        database_url(Settings(**given))
    assert "s3cret" not in str(caught.value)


async def test_a_host_that_cannot_be_encoded_is_told() -> None:
    settings = Settings(database_url=f"postgresql://u:p@{'x' * 64}.example/d")
    async with await Database.open(settings) as database:
        with pytest.raises(ConfigurationError, match="host or port"):
            await database.ping()


def test_what_stands_beside_neons_endpoint_is_refused() -> None:
    url = make_url(f"postgresql://u@{NEON}/d?options=endpoint%3Dep-x%20-c%20search_path%3Dkb")
    with pytest.raises(ConfigurationError, match="options"):
        connect_arguments(url, Settings())


@pytest.mark.parametrize("parameter", ["options=-csearch_path%3Dapp", "search_path=app", "statement_timeout=5s"])
def test_what_a_pooler_would_forget_is_refused_in_the_address(parameter: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{parameter.partition('=')[0]}.*ALTER ROLE"):
        connect_arguments(make_url(f"postgresql://u@{NEON}/d?{parameter}"), Settings())


def test_parameters_that_mean_the_pooler_do_not_reach_it() -> None:
    url = make_url(f"postgresql://u@{NEON}/d?pgbouncer=true&options=endpoint%3Dep-1&connect_timeout=5&sslmode=require")
    arguments = connect_arguments(url, Settings())
    assert arguments["dsn"] == f"postgresql://{NEON}?sslmode=require"
    assert (arguments["statement_cache_size"], arguments["timeout"]) == (0, 5)


def test_a_pgbouncer_parameter_that_is_neither_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="true or false"):
        is_pooled(make_url("postgresql://u@h/d?pgbouncer=maybe"), Settings())


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("server login has been failing, try again later (server_login_retry)", StoreUnavailableError),
        ("server login failed: FATAL the database system is starting up", StoreUnavailableError),
        ('server login failed: FATAL password authentication failed for user "u"', ConfigurationError),
        ("no such database: d", ConfigurationError),
    ],
)
def test_a_poolers_words_tell_what_may_pass(said: str, error: type[Exception]) -> None:
    """Everything is a protocol violation to it; other versions' words, too."""
    assert type(translate_error(asyncpg.ProtocolViolationError(said))) is error
