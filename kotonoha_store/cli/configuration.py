"""config: every setting, where it came from, and names that look like a slip."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import typer
from dotenv import dotenv_values
from pydantic import SecretStr
from rich.console import RenderableType

from kotonoha_store.cli.app import FINDINGS, INSPECT, AsJson, app, origin_of_address, plain, show, table
from kotonoha_store.endpoints import database_url
from kotonoha_store.settings import Settings

_PREFIXES: Final = ("KB_", "DB_")


@app.command(rich_help_panel=INSPECT)
def config(as_json: AsJson = False) -> None:
    """List every setting, its value, and where it came from. Secrets are only said to be set or not.

    Asks no database. Ends with 1 where a KB_ or DB_ variable is set that no setting has the name of.

    Example: kotonoha-store config --json
    """
    settings = Settings()
    database_url(settings)  # refuses what cannot be read
    in_environment, in_file = _given(os.environ), _given(_of_env_file())
    rows: list[tuple[str, Any, str]] = []
    for field, about in Settings.model_fields.items():
        name, value = field.upper(), getattr(settings, field)
        source = "environment" if name in in_environment else ".env" if name in in_file else "default"
        is_secret = "SecretStr" in str(about.annotation)
        rows.append((name, _masked(value) if is_secret else value, source))
    unknown = _unknown(in_environment | in_file)
    slips = [f"{name} is no setting{f'; do you mean {meant}?' if meant else ''}" for name, meant in unknown.items()]
    result = {
        "settings": {name: {"value": value, "source": source} for name, value, source in rows},
        "address": origin_of_address(settings),
        "unknown": unknown,
    }
    people: list[RenderableType] = [
        table("setting", "value", "from", rows=[(name, _shown(value), source) for name, value, source in rows]),
        plain(f"\nthe database is named by {origin_of_address(settings)}"),
        *(plain(slip, style="yellow") for slip in slips),
    ]
    show(result, as_json, *people)
    if unknown:
        raise typer.Exit(FINDINGS)


def _masked(value: SecretStr | None) -> str:
    return "not set" if value is None else "set"


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _of_env_file() -> Mapping[str, str | None]:
    name = Settings.model_config.get("env_file")
    # Settings has read it by now: it is UTF-8.
    return dotenv_values(Path(name), encoding="utf-8") if isinstance(name, str | Path) else {}


def _given(variables: Mapping[str, str | None]) -> dict[str, str]:
    # As Settings reads them: in either case, and an empty one is none.
    return {name.upper(): value for name, value in variables.items() if value}


def unknown_variables() -> dict[str, str | None]:
    """Return what is set and no setting has the name of, and which setting is meant."""
    return _unknown(_given(os.environ) | _given(_of_env_file()))


def _unknown(names: Mapping[str, str]) -> dict[str, str | None]:
    known = [field.upper() for field in Settings.model_fields]
    result: dict[str, str | None] = {}
    for name in sorted(names):
        if name.startswith(_PREFIXES) and name not in known:
            result[name] = next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), None)
    return result
