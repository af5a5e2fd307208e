"""A web application around a store: messages in, searches out, and the probes of kotonoha_store.web.

    python examples/web_app.py --migrate          on http://127.0.0.1:8000, the database of the environment
    python examples/web_app.py --port 8080

    curl -X POST localhost:8000/messages -H 'Content-Type: application/json' \\
         -d '{"session_key": "web:1", "content": "Hokkaido and Ogasawara have no rainy season.", "user_id": 1}'
    kotonoha-store archive --idle-hours 0
    curl 'localhost:8000/search?query=rainy+season&user_id=1'
    curl localhost:8000/health

A message is found by its words once its session is archived, by meaning once it is embedded: `kotonoha-store worker`
beside this does both, an hour (KB_ARCHIVE_THRESHOLD_HOURS) after the last message.

Whoever reaches it may read and write everything: put your own
authentication in front.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Query, Request
    from fastapi.responses import JSONResponse
except ImportError:
    sys.exit('web_app: FastAPI or uvicorn is missing; pip install "kotonoha-store[web]"')
from pydantic import BaseModel

from kotonoha_store import (
    EmbeddingError,
    InvalidInputError,
    Message,
    SearchFilters,
    Settings,
    Store,
    StoreError,
    StoreUnavailableError,
)
from kotonoha_store.web import health_router


class NewMessage(BaseModel):
    session_key: str
    content: str
    user_id: int


class Hit(BaseModel):
    title: str
    content: str
    url: str | None


def store_of(request: Request) -> Store:
    store: Store | None = request.app.state.store
    if store is None:
        raise StoreUnavailableError("this process is shutting down; ask another one")
    return store


OpenStore = Annotated[Store, Depends(store_of)]


def create_app(settings: Settings | None = None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # No connection is made yet: where the database is away, /ready says so and the process lives on.
        async with Store.open(settings) as store:
            app.state.store = store
            yield
            app.state.store = None

    app = FastAPI(title="A store's web application", lifespan=lifespan)
    app.include_router(health_router())

    @app.exception_handler(StoreError)
    async def tell(_: Request, error: StoreError) -> JSONResponse:
        """The library's own sentence, under the status that says who is to act."""
        if isinstance(error, InvalidInputError):
            status = 422
        else:
            status = 503 if isinstance(error, StoreUnavailableError | EmbeddingError) else 500
        return JSONResponse({"error": type(error).__name__, "detail": str(error)}, status)

    @app.post("/messages", status_code=201)
    async def add_message(new: NewMessage, store: OpenStore) -> dict[str, int]:
        async with store.begin() as tx:
            session = await tx.sessions.append(
                new.session_key, Message.user(new.content), session_type="web", user_id=new.user_id
            )
        return {"message_count": session.message_count}

    @app.get("/search")
    async def search(
        query: str,
        user_id: int,
        store: OpenStore,
        mode: Literal["meaning", "words", "hybrid"] = "words",
        top_k: Annotated[int, Query(ge=1, le=100)] = 5,
    ) -> list[Hit]:
        result = await store.search(
            query, mode=mode, top_k=top_k, threshold=None, filters=SearchFilters(user_id=user_id)
        )
        return [Hit(title=hit.title, content=hit.content, url=hit.url) for hit in result.hits]

    return app


async def migrate() -> None:
    async with Store.open() as store:
        await store.migrate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--migrate", action="store_true", help="bring the database to this version's schema first")
    options = parser.parse_args()
    try:
        if options.migrate:
            asyncio.run(migrate())
        app = create_app(Settings())
    except StoreError as error:
        sys.exit(f"web_app: {error}")
    uvicorn.run(app, host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
