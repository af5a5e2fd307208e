"""search, recall, recall-check."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from kotonoha_store.cli.app import (
    FINDINGS,
    INSPECT,
    USE,
    AsJson,
    app,
    open_store,
    pairs,
    plain,
    require_embedder,
    show,
    table,
)
from kotonoha_store.cli.filters import (
    Channel,
    Everywhere,
    Guild,
    SessionKeys,
    Since,
    Sources,
    SourceTypes,
    Thread,
    Until,
    User,
    require_scope,
    search_filters,
)
from kotonoha_store.errors import (
    ConfigurationError,
    EmbedderConfigurationError,
    EmbeddingError,
    InvalidInputError,
    NotFoundError,
    RateLimitedError,
    StoreUnavailableError,
    TransientEmbeddingError,
)
from kotonoha_store.search_records import SearchHit, SearchResult
from kotonoha_store.store import FROM_SETTINGS, Store

_EXCERPT = 300


class Mode(StrEnum):
    """How to search."""

    HYBRID = "hybrid"
    MEANING = "meaning"
    WORDS = "words"


class RecallMode(StrEnum):
    """How to search for what belongs in a prompt."""

    HYBRID = "hybrid"
    WORDS = "words"


@app.command(rich_help_panel=USE)
async def search(
    query: Annotated[str, typer.Argument(help="What to look for; quote it.")],
    mode: Annotated[
        Mode, typer.Option(help="By meaning, by words (needs no embedder), or by both, which finds the most.")
    ] = Mode.HYBRID,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", "-k", min=1, max=1000, help="At most so many hits; KB_DEFAULT_TOP_K by default."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Least similarity; by meaning KB_SIMILARITY_THRESHOLD by default, else none."),
    ] = None,
    no_threshold: Annotated[bool, typer.Option("--no-threshold", help="By meaning: hide no hit.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Whole texts instead of their beginnings.")] = False,
    guild: Guild = None,
    channel: Channel = None,
    thread: Thread = None,
    user: User = None,
    source: Sources = None,
    source_type: SourceTypes = None,
    session_key: SessionKeys = None,
    since: Since = None,
    until: Until = None,
    everywhere: Everywhere = False,
    as_json: AsJson = False,
) -> None:
    """Find what was said or written. Say where to look, or --everywhere.

    Finding nothing is no failure; scripts look at "hits".

    Example: kotonoha-store search "梅雨がないのはどこ" --guild 123 --since 2025-01-01
    """
    filters = search_filters(
        guild=guild,
        channel=channel,
        thread=thread,
        user=user,
        sources=source,
        source_types=source_type,
        session_keys=session_key,
        since=since,
        until=until,
    )
    require_scope(filters, everywhere)
    if threshold is not None and no_threshold:
        raise typer.BadParameter("give --threshold or --no-threshold, not both")
    wanted: Any = None if no_threshold else FROM_SETTINGS if threshold is None else threshold
    async with open_store(embedder=mode is not Mode.WORDS) as store, _embedding(store, mode.value):
        result = await store.search(
            query, mode=mode.value, top_k=top_k, threshold=wanted, filters=filters, everywhere=everywhere
        )
    show(result, as_json, *_result(result, full))


@app.command(rich_help_panel=USE)
async def recall(
    session_key: Annotated[str, typer.Argument(help="The conversation; it need not exist where filters are given.")],
    question: Annotated[str, typer.Argument(help="Usually what the person just said; quote it.")],
    max_tokens: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Of messages and hits together (cl100k_base).")
    ] = 2000,
    mode: Annotated[RecallMode, typer.Option(help="words needs no embedder.")] = RecallMode.HYBRID,
    top_k: Annotated[
        int | None, typer.Option("--top-k", "-k", min=1, max=1000, help="How many hits to choose from.")
    ] = None,
    guild: Guild = None,
    channel: Channel = None,
    thread: Thread = None,
    user: User = None,
    source: Sources = None,
    source_type: SourceTypes = None,
    since: Since = None,
    until: Until = None,
    everywhere: Everywhere = False,
    as_json: AsJson = False,
) -> None:
    """Print what a bot would put in its prompt: the session's last messages, and what it remembers beside them.

    Looks in the session's own channel (without one: its user, else itself) unless filters say otherwise.

    Example: kotonoha-store recall thread:42 "いつ話した？" --max-tokens 1000
    """
    filters = search_filters(
        guild=guild,
        channel=channel,
        thread=thread,
        user=user,
        sources=source,
        source_types=source_type,
        since=since,
        until=until,
    )
    if not filters.is_empty:
        require_scope(filters, everywhere)
    async with open_store(embedder=mode is not RecallMode.WORDS) as store, _embedding(store, mode.value):
        try:
            result = await store.recall(
                session_key,
                question,
                max_tokens,
                filters=None if filters.is_empty else filters,
                everywhere=everywhere,
                mode=mode.value,
                top_k=top_k,
            )
        except NotFoundError:
            raise NotFoundError(
                f"no session has the key {session_key!r} (`kotonoha-store sessions` lists them); say where to look "
                "instead, such as --guild, --channel, or --everywhere for all that is stored"
            ) from None
    people: list[RenderableType] = [plain(f"{each.author or each.role}: {each.content}") for each in result.messages]
    if context := result.context():
        people += [plain(""), plain(context)]
    people.append(plain(f"\n{result.tokens} tokens", style="dim"))
    value = {
        "messages": [each.to_stored() for each in result.messages],
        "context": context,
        "hits": result.hits,
        "citations": result.citations,
        "tokens": result.tokens,
    }
    show(value, as_json, *people)


@app.command("recall-check", rich_help_panel=INSPECT)
async def recall_check(
    model: Annotated[str | None, typer.Option(help="Whose vectors; the configured embedder's by default.")] = None,
    sample: Annotated[int, typer.Option(min=1, max=10_000, help="How many stored vectors to search for.")] = 50,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, max=500, help="How many neighbours of each.")] = 10,
    wanted: Annotated[float, typer.Option(min=0, max=1, help="The share to reach.")] = 0.98,
    as_json: AsJson = False,
) -> None:
    """Measure how much of what is nearest the vector index finds. Ends with 1 below --wanted.

    Compares the index with an exact search for a sample; a low share after many deletions asks for `reindex`.

    Example: kotonoha-store recall-check --sample 100
    """
    async with open_store(embedder=model is None) as store:
        if model is None:
            require_embedder(store, ", or name the model whose vectors to look at: --model")
        report = await store.recall_check(model=model, sample=sample, top_k=top_k, wanted=wanted)
    enough = report.ef_search_for_wanted
    people = [
        pairs(
            [
                ("model", report.model),
                ("vectors sampled", report.sampled),
                ("found", f"{report.recall:.1%} of the {report.top_k} nearest, at ef_search {report.ef_search}"),
                ("wanted", f"{report.wanted:.1%}"),
                ("reached at", f"ef_search {enough}" if enough else "no ef_search; run `kotonoha-store reindex`"),
                ("took", f"{report.seconds:.1f} s"),
            ]
        ),
        table("ef_search", "found", rows=[(ef, f"{share:.1%}") for ef, share in report.by_ef_search.items()]),
    ]
    show({"report": report, "is_good": report.is_good}, as_json, *people)
    if not report.is_good:
        raise typer.Exit(FINDINGS)


@asynccontextmanager
async def _embedding(store: Store, mode: str) -> AsyncIterator[None]:
    """Of an embedder that is missing or fails, say what to do on the command line."""
    if mode == "words":
        yield
        return
    words = "--mode words needs no embedder"
    require_embedder(store, f"; {words}")
    try:
        yield
    except (RateLimitedError, TransientEmbeddingError) as error:
        where = "" if isinstance(error, RateLimitedError) else "see OPENAI_BASE_URL, or "
        raise StoreUnavailableError(f"{error}; try again, {where}search without it: {words}") from error
    except EmbedderConfigurationError as error:
        raise ConfigurationError(f"{error}; {words}") from error
    except EmbeddingError as error:
        raise InvalidInputError(f"the query cannot be embedded: {error}; {words}") from error


def _result(result: SearchResult, full: bool) -> list[RenderableType]:
    people: list[RenderableType] = []
    for number, hit in enumerate(result.hits, 1):
        people += _hit(number, hit, full)
    notes = [f"{len(result.hits)} {'hit' if len(result.hits) == 1 else 'hits'} ({result.plan})"]
    if result.hidden_by_threshold:
        notes.append(f"{result.hidden_by_threshold} more lie below the threshold: --no-threshold shows them")
    if not result.complete:
        notes.append("more may exist")
    people.append(plain("; ".join(notes), style="dim"))
    return people


def _hit(number: int, hit: SearchHit, full: bool) -> list[Text]:
    figures = f"similarity {hit.similarity:.3f}" if hit.similarity is not None else f"score {hit.score:.3f}"
    when = f", {hit.occurred_from.date().isoformat()}" if hit.occurred_from else ""
    text = hit.content if full or len(hit.content) <= _EXCERPT else f"{hit.content[:_EXCERPT]}…"
    head = Text(f"{number}. ", style="bold") + plain(hit.title, style="bold")
    place = f", {label}" if isinstance(label := hit.location.get("label"), str) else ""
    link = f", {hit.url}" if hit.url else ""
    about = plain(f"   {figures}, source {hit.source_id}{when}{place}{link}", style="dim")
    return [head, about, plain("".join(f"   {line}\n" for line in text.strip().splitlines()))]
