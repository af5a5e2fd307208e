"""What ``writes.py`` measured: as figures and as a table."""

from typing import Any

from common import console, median_rate, rate_ratio
from peers import PEERS
from rich.table import Table

Seconds = dict[str, list[float]]
"""Of each way to write, how long each round took."""


def embedding_figures(seconds: Seconds, rows: int) -> dict[str, Any]:
    return {
        "embed_write_ratio_raw": rate_ratio(seconds["fenced/ours"], seconds["fenced/raw"]),
        "embed_write_ratio_stock": rate_ratio(seconds["update/ours"], seconds["update/stock"]),
        "update_ratio_raw": rate_ratio(seconds["update/ours"], seconds["update/raw"]),
        "fenced_ratio_stock_update": rate_ratio(seconds["fenced/ours"], seconds["update/stock"]),
        "rates": {name: median_rate(rows, measured) for name, measured in seconds.items()},
    }


def ingest_figures(seconds: Seconds, rows: int) -> dict[str, Any]:
    ready = seconds.get("copy, records ready")
    figures: dict[str, Any] = {"ingest_ratio_copy": rate_ratio(seconds["ours"], seconds["copy"])}
    if ready:
        figures["ingest_ratio_copy_ready"] = rate_ratio(seconds["ours"], ready)
    return figures | {"ingest_rates": {name: median_rate(rows, measured) for name, measured in seconds.items()}}


def peer_figures(seconds: Seconds, rows: int) -> dict[str, dict[str, float]]:
    return {
        name: {"ingest_ratio": rate_ratio(seconds["ours"], measured), "rate": median_rate(rows, measured)}
        for name, measured in seconds.items()
        if name in PEERS
    }


def print_figures(title: str, figures: dict[str, Any]) -> None:
    """One table: who, how fast, and how much faster we are."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for heading in ("rows/s", "ours / theirs"):
        table.add_column(heading, justify="right")
    ratios = {
        "fenced/raw": figures["embed_write_ratio_raw"],
        "update/raw": figures["update_ratio_raw"],
        "update/stock": figures["embed_write_ratio_stock"],
        "copy": figures["ingest_ratio_copy"],
        "copy, records ready": figures.get("ingest_ratio_copy_ready"),
    }
    peers = figures.get("peers", {})
    rates = figures["rates"] | {name: rate for name, rate in figures["ingest_rates"].items() if name not in peers}
    for name, rate in rates.items():
        ratio = ratios.get(name)
        shown = f"ingest/{name}" if name in figures["ingest_rates"] else name
        table.add_row(shown, f"{rate:,.0f}", f"{ratio:.2f}" if ratio else "")
    for name, figure in peers.items():
        table.add_row(f"ingest/{name}", f"{figure['rate']:,.0f}", f"{figure['ingest_ratio']:.1f}")
    console.print(table)
