"""Every command: a module of this package registers its own when it is imported."""

from importlib import import_module
from typing import Final

from kotonoha_store.cli.app import app

__all__ = ["app"]

# In the order in which --help lists them. A new module is one line here.
_MODULES: Final[tuple[str, ...]] = (
    "schema",
    "searching",
    "working",
    "reembed",
    "status",
    "configuration",
    "dead_letters",
    "server",
    "index",
    "doctor",
    "roles",
    "backup",
    "import_files",
    "imports",
    "transfer",
)

for _name in _MODULES:
    import_module(f"kotonoha_store.cli.{_name}")
