"""A worker process: archives sessions and embeds chunks until SIGTERM or Ctrl-C. Start as many as you like.

    python examples/worker.py                          the database, embedder and pace of the environment
    python examples/worker.py --metrics-port 9100      with its figures for Prometheus on 127.0.0.1

Told to stop, it begins nothing more; what is running has KB_DRAIN_SECONDS to end, then its leases are given back.
"""

import argparse
import asyncio
import logging
import sys

from kotonoha_store import Store, StoreError, stop_on_signals


async def work() -> None:
    async with Store.open() as store:
        with stop_on_signals() as stop:
            await store.run(stop)


def serve_metrics(port: int) -> None:
    try:
        from prometheus_client import start_http_server
    except ImportError:
        sys.exit('worker: prometheus_client is missing; pip install "kotonoha-store[metrics]"')
    try:
        start_http_server(port, addr="127.0.0.1")
    except OSError as error:
        sys.exit(f"worker: no metrics on port {port}: {error.strerror}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus' metrics on this port")
    options = parser.parse_args()
    # One line an event, such as: embedding_batch lease=... chunks=100 embedded=100 seconds=0.412
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for client in ("httpx", "httpx2"):  # one line a request
        logging.getLogger(client).setLevel(logging.WARNING)
    if options.metrics_port is not None:
        serve_metrics(options.metrics_port)
    try:
        asyncio.run(work())
    except StoreError as error:
        sys.exit(f"worker: {error}")


if __name__ == "__main__":
    main()
