"""dlq list, show, requeue, discard."""

import json
from typing import Annotated

import typer

from kotonoha_store.cli.app import AsJson, Yes, confirm, dlq_app, open_store, pairs, plain, show, table
from kotonoha_store.errors import ErrorCode, InvalidInputError

_Ids = Annotated[list[int] | None, typer.Argument(help="Dead letters, by id.")]
_Source = Annotated[int | None, typer.Option("--source", help="Only of this source.")]
_Code = Annotated[
    str | None, typer.Option("--error-code", help=f"Only with this one: {', '.join(ErrorCode)}.", show_default=False)
]


@dlq_app.command("list")
async def list_(
    source: _Source = None,
    error_code: _Code = None,
    after: Annotated[int, typer.Option(help="The last id of the page before.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List dead letters: chunks that could not be embedded, and why. Without their texts.

    Example: kotonoha-store dlq list --error-code INVALID_INPUT
    """
    code = _known(error_code)
    async with open_store(embedder=False) as store:
        letters = await store.queue.dead_letters(after_id=after, limit=limit, source_id=source, error_code=code)
    columns = ("id", "source", "error code", "attempts", "buried", "tokens", "requeued before")
    rows = [
        (
            each.id,
            each.source_id,
            each.error_code,
            each.retry_count,
            each.created_at,
            each.token_count,
            len(each.history),
        )
        for each in letters
    ]
    value = [
        {
            "id": each.id,
            "original_chunk_id": each.original_chunk_id,
            "source_id": each.source_id,
            "source_type": each.source_type,
            "error_code": each.error_code,
            "error_message": each.error_message,
            "retry_count": each.retry_count,
            "embedding_model": each.embedding_model,
            "token_count": each.token_count,
            "created_at": each.created_at,
            "last_retry_at": each.last_retry_at,
        }
        for each in letters
    ]
    show({"dead_letters": value}, as_json, table(*columns, rows=rows) if rows else plain("no dead letters"))


@dlq_app.command("show")
async def show_(
    dead_letter_id: Annotated[int, typer.Argument(metavar="ID", help="Of the dead letter.")], as_json: AsJson = False
) -> None:
    """Show one dead letter whole, with its text and its earlier deaths.

    Example: kotonoha-store dlq show 17
    """
    async with open_store(embedder=False) as store:
        letter = await store.queue.dead_letter(dead_letter_id)
    people = pairs(
        [
            ("id", letter.id),
            ("source", f"{letter.source_id} {letter.source_title or ''}"),
            ("type", letter.source_type),
            ("error code", letter.error_code),
            ("error", letter.error_message),
            ("attempts", letter.retry_count),
            ("model", letter.embedding_model),
            ("tokens", letter.token_count),
            ("buried", letter.created_at),
            ("location", json.dumps(letter.location, ensure_ascii=False)),
            (
                "earlier deaths",
                ", ".join(f"{each.get('error_code')} at {each.get('buried_at')}" for each in letter.history),
            ),
        ]
    )
    show(letter, as_json, people, plain(f"\n{letter.content}"))


@dlq_app.command("requeue")
async def requeue(
    ids: _Ids = None,
    source: _Source = None,
    error_code: _Code = None,
    everything: Annotated[bool, typer.Option("--all", help="Every dead letter.")] = False,
    as_json: AsJson = False,
) -> None:
    """Queue dead letters again, with their attempts reset. Mend what killed them first.

    Those that meet every condition given; a dead letter whose source is gone stays.

    Example: kotonoha-store dlq requeue --error-code AUTHENTICATION_ERROR
    """
    code = _known(error_code)
    _refuse_ambiguity(ids, source, code, everything)
    async with open_store(embedder=False) as store:
        count = await store.queue.requeue(ids or None, source_id=source, error_code=code)
    show({"requeued": count}, as_json, plain(f"{count} queued again; `kotonoha-store embed` or a worker embeds them"))


@dlq_app.command("discard")
async def discard(
    ids: _Ids = None,
    source: _Source = None,
    error_code: _Code = None,
    everything: Annotated[bool, typer.Option("--all", help="Every dead letter.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete dead letters for good, with the texts they hold. Asks first.

    Example: kotonoha-store dlq discard 17 18 --yes
    """
    code = _known(error_code)
    _refuse_ambiguity(ids, source, code, everything)
    async with open_store(embedder=False) as store:
        confirm("Delete these dead letters, with their texts, for good?", yes)
        count = await store.queue.discard(ids or None, source_id=source, error_code=code, everything=everything)
    show({"discarded": count}, as_json, plain(f"{count} discarded"))


def _known(error_code: str | None) -> ErrorCode | None:
    if error_code is None:
        return None
    try:
        return ErrorCode(error_code.upper())
    except ValueError:
        raise InvalidInputError(f"there is no error code {error_code!r}; known are {', '.join(ErrorCode)}") from None


def _refuse_ambiguity(ids: list[int] | None, source: int | None, code: ErrorCode | None, everything: bool) -> None:
    chosen = bool(ids) or source is not None or code is not None
    if chosen == everything:
        raise typer.BadParameter("say which: ids, --source, --error-code, or --all alone")
