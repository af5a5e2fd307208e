"""Other queues on PostgreSQL, each in its best documented way, with jobs that do nothing.

Imported only where they are installed; whoever wants them asks :data:`RIVALS`.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Protocol

import asyncpg
from common import driver_arguments
from sqlalchemy import URL

ENQUEUED_AT_ONCE: Final = 1000
# Of those tried (1 to 100 jobs at once, four workers, finished jobs kept or deleted) the fastest over 100,000 jobs.
PROCRASTINATE_CONCURRENCY: Final = 25


class Rival(Protocol):
    """A queue of another library.

    Attributes:
        distribution: what it is called on PyPI.
        note: how it is run, for the table.
    """

    distribution: str
    note: str

    async def fill(self, url: URL, jobs: int) -> None:
        """Install its tables in this empty database and enqueue jobs."""

    async def open(self, url: URL, workers: int, batch: int) -> None:
        """Make the workers ready, connected."""

    async def drain(self) -> int:
        """Work until the queue is empty; return how many jobs were run."""

    async def left(self) -> int:
        """How many jobs are still to be done."""

    async def close(self) -> None: ...


class PgQueuer:
    """One QueueManager per worker on a connection of its own, as in its own benchmark; tables as logged as ours."""

    distribution = "pgqueuer"
    note = "QueueManager, asyncpg, batch_size as ours, mode drain; its autovacuum settings applied"

    def __init__(self) -> None:
        self._connections: list[Any] = []
        self._managers: list[Any] = []
        self._batch = 0
        self._done = 0

    async def fill(self, url: URL, jobs: int) -> None:
        from pgqueuer.db import AsyncpgDriver
        from pgqueuer.queries import Queries

        connection = await asyncpg.connect(**driver_arguments(url))
        try:
            queries = Queries(AsyncpgDriver(connection))
            await queries.install()
            await queries.optimize_autovacuum()
            for start in range(0, jobs, ENQUEUED_AT_ONCE):
                count = min(ENQUEUED_AT_ONCE, jobs - start)
                await queries.enqueue(["nothing"] * count, [None] * count, [0] * count)
        finally:
            await connection.close()

    async def open(self, url: URL, workers: int, batch: int) -> None:
        from pgqueuer.db import AsyncpgDriver
        from pgqueuer.qm import QueueManager
        from pgqueuer.queries import Queries

        self._batch = batch
        self._done = 0
        self._connections = [await asyncpg.connect(**driver_arguments(url)) for _ in range(workers)]
        self._managers = [QueueManager(Queries(AsyncpgDriver(connection))) for connection in self._connections]

        async def nothing(job: Any) -> None:
            self._done += 1

        for manager in self._managers:
            manager.entrypoint("nothing")(nothing)

    async def drain(self) -> int:
        from pgqueuer.types import QueueExecutionMode

        mode = QueueExecutionMode.drain
        await asyncio.gather(*(manager.run(batch_size=self._batch, mode=mode) for manager in self._managers))
        return self._done

    async def left(self) -> int:
        left: int = await self._connections[0].fetchval("SELECT count(*) FROM pgqueuer")
        return left

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()


class Procrastinate:
    """Workers with many jobs in flight, since it takes them one by one; finished jobs are deleted, as ours are."""

    distribution = "procrastinate"
    note = f"PsycopgConnector, concurrency {PROCRASTINATE_CONCURRENCY} a worker, delete_jobs always; no batches there"

    def __init__(self) -> None:
        self._app: Any = None
        self._workers = 0
        self._done = 0

    def _make_app(self, url: URL) -> Any:
        import procrastinate

        # A line a job and more, else.
        logging.getLogger("procrastinate").setLevel(logging.WARNING)
        arguments = {"host": url.query.get("host") or url.host, "port": url.query.get("port") or url.port}
        connector = procrastinate.PsycopgConnector(
            kwargs={**arguments, "user": url.username, "password": url.password, "dbname": url.database},
            min_size=4,
            max_size=20,
        )
        app = procrastinate.App(connector=connector)

        @app.task(name="nothing")
        async def nothing() -> None:
            self._done += 1

        return app

    async def fill(self, url: URL, jobs: int) -> None:
        app = self._make_app(url)
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            for start in range(0, jobs, ENQUEUED_AT_ONCE):
                count = min(ENQUEUED_AT_ONCE, jobs - start)
                await app.tasks["nothing"].batch_defer_async(*({} for _ in range(count)))

    async def open(self, url: URL, workers: int, batch: int) -> None:
        self._app = self._make_app(url)
        self._workers = workers
        self._done = 0
        await self._app.open_async()

    async def drain(self) -> int:
        worker = {
            "wait": False,
            "concurrency": PROCRASTINATE_CONCURRENCY,
            "delete_jobs": "always",
            "install_signal_handlers": False,
        }
        await asyncio.gather(*(self._app.run_worker_async(**worker) for _ in range(self._workers)))
        return self._done

    async def left(self) -> int:
        (row,) = await self._app.connector.execute_query_all_async(
            "SELECT count(*) AS left FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
        )
        left: int = row["left"]
        return left

    async def close(self) -> None:
        await self._app.close_async()


RIVALS: Final[dict[str, Callable[[], Rival]]] = {"pgqueuer": PgQueuer, "procrastinate": Procrastinate}
