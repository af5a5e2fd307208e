"""Other stores on the same server, each used by its documented ways; imported only when they are asked for.

Those that keep float32 search with ``enable_seqscan`` off, as pgvector's documentation advises: their vectors lie
outside of the row, the planner takes the table for small and would read all of it past the HNSW index.
"""

import importlib
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from common import notes
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import create_async_engine

from kotonoha_store import EMBEDDING_DIMENSION, NewChunk

M: Final = 16
EF_CONSTRUCTION: Final = 64
"""What our own HNSW index is built with."""


class Peer(Protocol):
    """Another store on the same server, with a table of its own.

    Attributes:
        table, column, operators: where an HNSW index goes.
        packages: whose versions to report.
        note: where its design differs from ours.
    """

    table: str
    column: str
    operators: str
    packages: tuple[str, ...]
    note: str

    async def open(self, url: URL) -> None:
        """Connect and make the table, without an HNSW index."""

    def take(self, chunks: Sequence[NewChunk]) -> None:
        """Turn the rows into what this store is given; not measured."""

    async def insert(self) -> None: ...

    async def build_index(self, ef_search: int) -> None:
        """Build its HNSW index with our options over what was inserted; search through it from now on."""

    async def search(self, vector: list[float], top_k: int) -> list[Mapping[str, Any]]:
        """The metadata of the nearest rows."""

    async def close(self) -> None: ...


class LangChain:
    """langchain-postgres: ``PGVectorStore``."""

    table, column, operators = "peer_langchain", "embedding", "vector_cosine_ops"
    packages: tuple[str, ...] = ("langchain-postgres", "langchain-core")
    note = "float32; one INSERT and one commit a row"

    async def open(self, url: URL) -> None:
        from langchain_postgres import PGEngine

        engine = create_async_engine(
            url.set(drivername="postgresql+asyncpg"), connect_args={"server_settings": {"enable_seqscan": "off"}}
        )
        self._engine = PGEngine.from_engine(engine)
        await self._engine.ainit_vectorstore_table(self.table, EMBEDDING_DIMENSION)
        self._store = await self._create()

    async def _create(self, **options: Any) -> Any:
        from langchain_core.embeddings import DeterministicFakeEmbedding
        from langchain_postgres import PGVectorStore

        # Never asked: the vectors are given.
        embedder = DeterministicFakeEmbedding(size=EMBEDDING_DIMENSION)
        return await PGVectorStore.create(self._engine, embedder, self.table, **options)

    def take(self, chunks: Sequence[NewChunk]) -> None:
        self._texts = [chunk.content for chunk in chunks]
        self._vectors = [chunk.embedding.tolist() for chunk in chunks]
        self._metadata = [chunk.location for chunk in chunks]

    async def insert(self) -> None:
        await self._store.aadd_embeddings(self._texts, self._vectors, self._metadata)

    async def build_index(self, ef_search: int) -> None:
        from langchain_postgres.v2.indexes import HNSWIndex, HNSWQueryOptions

        await self._store.aapply_vector_index(HNSWIndex(m=M, ef_construction=EF_CONSTRUCTION))
        self._store = await self._create(index_query_options=HNSWQueryOptions(ef_search=ef_search))

    async def search(self, vector: list[float], top_k: int) -> list[Mapping[str, Any]]:
        found = await self._store.asimilarity_search_with_score_by_vector(vector, k=top_k)
        return [document.metadata for document, _ in found]

    async def close(self) -> None:
        await self._engine.close()


class LlamaIndex:
    """llama-index-vector-stores-postgres: ``PGVectorStore``."""

    table, column, operators = "data_peer_llama", "embedding", "halfvec_cosine_ops"
    packages: tuple[str, ...] = ("llama-index-vector-stores-postgres", "llama-index-core")
    note = "halves; ORM rows, one transaction"

    async def open(self, url: URL) -> None:
        self._url = url
        self._store = await self._create()

    async def _create(self, **options: Any) -> Any:
        from llama_index.vector_stores.postgres import PGVectorStore

        store = PGVectorStore.from_params(
            connection_string=self._url.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False),
            async_connection_string=self._url.set(drivername="postgresql+asyncpg").render_as_string(
                hide_password=False
            ),
            table_name=self.table.removeprefix("data_"),
            embed_dim=EMBEDDING_DIMENSION,
            use_halfvec=True,
            use_jsonb=True,
            **options,
        )
        # Table and index are made by the first call.
        await store.async_add([])
        return store

    def take(self, chunks: Sequence[NewChunk]) -> None:
        from llama_index.core.schema import TextNode

        self._nodes = [
            TextNode(text=chunk.content, embedding=chunk.embedding.tolist(), metadata=chunk.location)
            for chunk in chunks
        ]

    async def insert(self) -> None:
        await self._store.async_add(self._nodes)

    async def build_index(self, ef_search: int) -> None:
        await self._store.close()
        options = {
            "hnsw_m": M,
            "hnsw_ef_construction": EF_CONSTRUCTION,
            "hnsw_ef_search": ef_search,
            # By default its index over halves has L2's operators, which no query of its own by cosine can use.
            "hnsw_dist_method": self.operators,
        }
        self._store = await self._create(hnsw_kwargs=options)

    async def search(self, vector: list[float], top_k: int) -> list[Mapping[str, Any]]:
        from llama_index.core.vector_stores import VectorStoreQuery

        found = await self._store.aquery(VectorStoreQuery(query_embedding=vector, similarity_top_k=top_k))
        return [node.metadata for node in found.nodes or []]

    async def close(self) -> None:
        await self._store.close()


class Mem0:
    """mem0ai: ``PGVector``, the vector store by itself. Blocking: it has no async way, and nobody else is at work."""

    table, column, operators = "peer_mem0", "vector", "vector_cosine_ops"
    packages: tuple[str, ...] = ("mem0ai", "psycopg")
    note = "float32; executemany, one transaction; its GIN index on a text field stays"

    async def open(self, url: URL) -> None:
        self._url = url
        self._store = self._create(url)

    def _create(self, url: URL, *, hnsw: bool = False) -> Any:
        from mem0.vector_stores.pgvector import PGVector

        store = PGVector(
            connection_string=url.render_as_string(hide_password=False),
            collection_name=self.table,
            embedding_model_dims=EMBEDDING_DIMENSION,
            diskann=False,
            hnsw=hnsw,
            **dict.fromkeys(("dbname", "user", "password", "host", "port")),
        )
        store.create_col()
        return store

    def take(self, chunks: Sequence[NewChunk]) -> None:
        self._vectors = [chunk.embedding.tolist() for chunk in chunks]
        self._payloads = [{"data": chunk.content, **chunk.location} for chunk in chunks]

    async def insert(self) -> None:
        ids = [str(uuid.uuid4()) for _ in self._vectors]
        self._store.insert(self._vectors, payloads=self._payloads, ids=ids)

    async def build_index(self, ef_search: int) -> None:
        self._store.connection_pool.close()
        # It names neither m nor ef_construction, and pgvector's defaults are ours. For ef_search it has no
        # option; libpq passes settings of the server (a tab, for a space SQLAlchemy writes a plus,
        # which libpq keeps).
        url = self._url.update_query_dict({"options": f"-chnsw.ef_search={ef_search}\t-cenable_seqscan=off"})
        self._store = self._create(url, hnsw=True)

    async def search(self, vector: list[float], top_k: int) -> list[Mapping[str, Any]]:
        return [found.payload for found in self._store.search("", vector, top_k=top_k)]

    async def close(self) -> None:
        self._store.connection_pool.close()


PEERS: Final[dict[str, tuple[type[Peer], str]]] = {
    "langchain-postgres": (LangChain, "langchain_postgres"),
    "llama-index": (LlamaIndex, "llama_index.vector_stores.postgres"),
    "mem0": (Mem0, "mem0"),
}


def installed(names: Sequence[str], scratch: str) -> list[str]:
    """Those of the peers that can be imported; the others are named and left out."""
    # mem0 reports home and makes a directory in the user's home when it is imported.
    os.environ.setdefault("MEM0_TELEMETRY", "False")
    os.environ.setdefault("MEM0_DIR", scratch)
    found = []
    for name in names:
        try:
            importlib.import_module(PEERS[name][1])
            found.append(name)
        except ImportError as error:
            notes.print(f"[yellow]{name} is left out: {error}")
    return found


def peer_packages(names: Sequence[str]) -> list[str]:
    """Whose versions to report."""
    return [package for name in names for package in PEERS[name][0].packages]
