"""doctor."""

from collections.abc import Iterator

import typer
from rich.text import Text

from kotonoha_store import doctor as library
from kotonoha_store.cli.app import FINDINGS, INSPECT, AsJson, app, open_store, plain, progress, show, table
from kotonoha_store.cli.configuration import unknown_variables
from kotonoha_store.doctor import Finding, Severity
from kotonoha_store.doctor_findings import warning
from kotonoha_store.errors import ConfigurationError

_STYLES = {Severity.OK: "green", Severity.INFO: "", Severity.WARNING: "yellow", Severity.ERROR: "red"}


@app.command(rich_help_panel=INSPECT)
async def doctor(as_json: AsJson = False) -> None:
    """Look for what is wrong with server, schema, indexes, queue and role, and say what mends it.

    Nothing is changed. It ends with 1 if something is a warning or an error. Statements that it names are run one by
    one, with psql or whatever you use, by a role that may.

    Example: kotonoha-store doctor
    """
    async with open_store(check=False) as store:
        others = [_unknown(name, meant) for name, meant in unknown_variables().items()]
        model: str | None = None
        try:
            model = store.embedder.model
        except ConfigurationError as error:
            seen = "no embedder can be used, so that `embed`, `worker` and searches by meaning fail"
            others.append(warning("embedder", seen, str(error)))
        with progress("Examining", as_json) as report:
            result = await library.examine(store.database, model=model, progress=report, others=others)
    rows = [row for finding in result.findings for row in _rows(finding)]
    said = {"is_well": result.is_well, "worst": result.worst, "findings": result.findings, "seconds": result.seconds}
    show(said, as_json, table("severity", "check", "seen", rows=rows))
    if not result.is_well:
        raise typer.Exit(FINDINGS)


def _unknown(name: str, meant: str | None) -> Finding:
    mend = f"write {meant}" if meant else "remove it, or see `kotonoha-store config` for the names"
    return warning("unknown-setting", f"{name} is set, and is no setting: it has no effect", mend)


def _rows(finding: Finding) -> Iterator[tuple[Text, Text, Text]]:
    yield plain(finding.severity, _STYLES[finding.severity]), plain(finding.code), plain(finding.seen)
    if finding.mend is not None:
        yield plain(""), plain(""), plain(f"-> {finding.mend}", "bold")
    for statement in finding.sql:
        yield plain(""), plain(""), plain(f"   {statement};", "cyan")
