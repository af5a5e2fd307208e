"""A FastAPI router for probes and scrapes: ``/health``, ``/live``, ``/ready``, ``/metrics`` (extra ``web``).

Which probe asks which::

    restart this process?             /live     answers as long as the event loop turns; touches no database, since
                                                restarting a process mends none
    send it requests?                 /ready    200, or 503 while database or schema are not there
    is it well, and what is not?      /health   200 or 503 and the whole report; for people, compose and monitoring
    figures                           /metrics  what Prometheus scrapes (extra ``metrics``)

None of them shows stored text, hosts, users or passwords, but counts and names of models: serve them where only
those who run the system get.
"""

import math
from collections.abc import Callable
from typing import Any, Final

from kotonoha_store import metrics
from kotonoha_store.health import LIMIT_SECONDS
from kotonoha_store.store import Store

try:
    from fastapi import APIRouter, Request, Response
    from fastapi.responses import JSONResponse, PlainTextResponse
except ImportError as error:
    raise ImportError('kotonoha_store.web needs FastAPI: pip install "kotonoha-store[web]"') from error

_NO_STORE: Final = {"Cache-Control": "no-store"}


def store_of_app(request: Request) -> Store | None:
    """The store that the application's lifespan put into ``app.state.store``, or None outside it."""
    store: Store | None = getattr(request.app.state, "store", None)
    return store


def health_router(
    get_store: Callable[[Request], Store | None] = store_of_app, *, limit_seconds: float = LIMIT_SECONDS
) -> APIRouter:
    """Return the router; include it with ``app.include_router(health_router())``.

    Args:
        get_store: how to find the store of a request.
        limit_seconds: how long an answer takes at most; let a probe's own time-out be longer.
    """
    router = APIRouter(tags=["health"])

    @router.get("/health", responses={503: {"description": "unhealthy"}})
    async def health(request: Request) -> Response:
        """The whole report; 503 where this process cannot do its work."""
        if (store := get_store(request)) is None:
            return _answer({"status": "unhealthy", "database": "disconnected", "error": _NOT_OPEN}, 503)
        report = await store.health(limit_seconds)
        return _answer(report.to_dict(), 200 if report.is_healthy else 503)

    @router.get("/live")
    async def live() -> Response:
        """Whether this process runs; nothing else is looked at."""
        return _answer({"status": "alive"}, 200)

    @router.get("/ready", responses={503: {"description": "not ready"}})
    async def ready(request: Request) -> Response:
        """Whether the database is reachable and its schema in place."""
        store = get_store(request)
        error = _NOT_OPEN if store is None else await store.health_checks.why_not_ready(limit_seconds)
        return (
            _answer({"status": "ready"}, 200)
            if error is None
            else _answer({"status": "not ready", "error": error}, 503)
        )

    @router.get("/metrics", responses={501: {"description": "the extra metrics is not installed"}})
    async def figures(request: Request) -> Response:
        """Prometheus' figures. Those of the queue are read for this answer, or NaN where it does not answer in time."""
        if not metrics.IS_MEASURING:
            return PlainTextResponse(
                'prometheus_client is not installed; pip install "kotonoha-store[metrics]"\n', 501, _NO_STORE
            )
        store = get_store(request)
        if store is None or not await store.health_checks.refresh_gauges(limit_seconds):
            for gauge in metrics.QUEUE_GAUGES:
                gauge.set(math.nan)
        from prometheus_client import REGISTRY
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(REGISTRY), headers={**_NO_STORE, "Content-Type": content_type})

    return router


_NOT_OPEN: Final = "the store is not open; open it in the application's lifespan and put it into app.state.store"


def _answer(content: dict[str, Any], status: int) -> Response:
    return JSONResponse(content, status, _NO_STORE)
