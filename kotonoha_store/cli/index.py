"""indexes, reindex."""

import re
from typing import Annotated, Final

import typer

from kotonoha_store import index_builds
from kotonoha_store.cli.app import FINDINGS, INSPECT, MAINTAIN, AsJson, Size, app, open_database, progress, show, table
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.index_builds import BuildProgress

_UNITS: Final = {"": 1, "kB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


def memory_size(value: str) -> int:
    """Read a size as PostgreSQL's settings are written.

    Raises:
        InvalidInputError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9]{1,18})\s*(kB|MB|GB|TB|)\s*", value)
    if found is None:
        raise InvalidInputError("an amount of memory is written as 512MB or 4GB (units: kB, MB, GB, TB)")
    return int(found[1]) * _UNITS[found[2]]


@app.command(rich_help_panel=INSPECT)
async def indexes(as_json: AsJson = False) -> None:
    """List the indexes with their sizes; ends with 1 if one is missing, invalid or left over from a build.

    Example: kotonoha-store indexes
    """
    async with open_database() as database:
        states = await index_builds.index_states(database)
    rows = [(each.table, each.name, each.method, each.state, _size(each.size)) for each in states]
    show({"indexes": states}, as_json, table("table", "index", "method", "state", "size", rows=rows))
    if any(each.state in ("missing", "invalid", "leftover") for each in states):
        raise typer.Exit(FINDINGS)


@app.command(rich_help_panel=MAINTAIN)
async def reindex(
    names: Annotated[list[str] | None, typer.Argument(help="Only these indexes.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every index of the library's tables.")] = False,
    broken: Annotated[bool, typer.Option("--broken", help="Only what is missing or invalid.")] = False,
    m: Annotated[int | None, typer.Option(min=2, max=100, help="Neighbours per element of the HNSW index.")] = None,
    ef_construction: Annotated[
        int | None, typer.Option(min=4, max=1000, help="Candidates looked at while it is built; at least twice m.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="maintenance_work_mem for the HNSW index, such as 4GB.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, max=1024, help="Processes that help to build the HNSW index.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build indexes again beside running searches and writes, and mend what is broken.

    Without names: the HNSW index, and every index that is missing or invalid. Worth it after many deletions (see
    `recall-check`), after other options, and where an import or a build was cut short. Its options are those of --m and
    --ef-construction, else KB_HNSW_M and KB_HNSW_EF_CONSTRUCTION where they are set, else the index's own. By
    default the memory follows the table's size, up to half of the server's effective_cache_size (1 GB where that was
    never set).

    Example: kotonoha-store reindex --m 24 --ef-construction 100 --memory 4GB
    """
    if sum((bool(names), everything, broken)) > 1:
        raise InvalidInputError("give either names of indexes, --all or --broken")
    size = None if memory is None else memory_size(memory)
    chosen = [] if broken else names or None
    async with open_database() as database:
        with progress("Building", as_json) as advance:

            def report(state: BuildProgress) -> None:
                advance(state.done, state.total)

            result = await index_builds.reindex(
                database,
                chosen,
                everything=everything,
                m=m,
                ef_construction=ef_construction,
                maintenance_work_mem=size,
                parallel_workers=workers,
                progress=report,
            )
    rows = [(each.name, each.action, each.seconds, _size(each.size_before), _size(each.size)) for each in result.built]
    notes = [f"dropped {name}, which a build that was cut short had left" for name in result.removed]
    if not result.built:
        notes.append("every index is there and valid")
    notes += [
        f"{each.name} outgrew its {Size(each.memory) // 2**20} MB of memory, which takes several times as long; "
        "give more by --memory"
        for each in result.built
        if not each.fitted
    ]
    tables = [table("index", "done", "seconds", "size before", "size", rows=rows)] if rows else []
    show(result, as_json, *tables, *notes)


def _size(value: int | None) -> Size | None:
    return None if value is None else Size(value)
