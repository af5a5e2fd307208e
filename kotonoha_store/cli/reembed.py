"""reembed."""

from typing import Annotated

import typer
from rich.console import RenderableType

from kotonoha_store.cli.app import MAINTAIN, AsJson, app, open_store, pairs, plain, progress, show


@app.command(rich_help_panel=MAINTAIN)
async def reembed(
    everything: Annotated[
        bool, typer.Option("--all", help="Also what has a vector of this model; run again, that queues all once more.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: AsJson = False,
) -> None:
    """Queue again what another model has embedded; `embed` or a `worker` then embeds it with the model set now.

    Each chunk keeps its vector until it has the new one: programs that still use the old model find it until then,
    those with the new one from then on. Where the new model refuses a text, its old vector stays. New chunks queue
    up behind these. Stopped half-way, run it again.

    Example: kotonoha-store reembed --dry-run
    """
    async with open_store() as store:
        model = store.embedder.model
        with progress("Queueing", as_json) as report:
            result = await store.queue.requeue_embedded(model, everything=everything, dry_run=dry_run, progress=report)
    people: list[RenderableType] = [
        plain("Dry run: nothing was written." if dry_run else "Queued.", "bold"),
        pairs(
            [
                ("model", model),
                ("would be queued" if dry_run else "queued again", result.queued),
                ("in the queue already", result.waiting),
            ]
        ),
    ]
    if not dry_run and (result.queued or result.waiting):
        people.append(plain("Embed them by `kotonoha-store embed`, or leave it to a running `worker`."))
    value = {"model": model, "queued": result.queued, "waiting": result.waiting, "is_dry_run": dry_run}
    show(value, as_json, *people)
