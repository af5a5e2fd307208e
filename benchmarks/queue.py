"""How fast the queue drains: beside pgqueuer, procrastinate, and hand-written asyncpg.

    python benchmarks/queue.py [--chunks N] [--repeats R] [--rivals NAME ...] [--json]

All of it is in queue_rates.py. This file has the name of a module of the standard library, and scripts of this
folder find it when something they use asks for that one: they are given the real one.
"""

if __name__ == "__main__":
    from queue_rates import main

    main()
else:
    import importlib.util
    import sys
    import sysconfig
    from pathlib import Path

    _spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_path("stdlib")) / f"{__name__}.py")
    if _spec is None or _spec.loader is None:
        raise ImportError(f"no {__name__} in the standard library")
    # The import returns what stands there when it is done.
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
