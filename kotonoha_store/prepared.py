"""Statements compiled once, for asyncpg itself or for ``exec_driver_sql``: no compiling, no cache key at each run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.sql.expression import BindParameter, ClauseElement


@dataclass(frozen=True, slots=True)
class Prepared:
    """A statement for the driver.

    Attributes:
        sql: with ``$1`` ... as parameters.
        names: whose values these are, in order.
        constants: of those that stand in the statement itself.
    """

    sql: str
    names: tuple[str, ...]
    constants: Mapping[str, Any]

    def arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """The values in the order of the statement's parameters, each as asyncpg takes it: vectors packed, JSON text.

        Raises:
            KeyError: a parameter has no value.
        """
        return [values[name] if name in values else self.constants[name] for name in self.names]


def prepare(statement: ClauseElement) -> Prepared:
    """Compile a statement for asyncpg. What varies is a ``bindparam`` without a value.

    Raises:
        ValueError: it has an ``IN`` of a list, whose SQL depends on the list's length.
    """
    dialect = asyncpg.dialect()  # type: ignore[no-untyped-call]  # untyped there
    compiled: Any = statement.compile(dialect=dialect)
    if compiled.post_compile_params:
        raise ValueError("an IN of a list cannot be prepared; compare with ANY of an array")
    names = tuple(compiled.positiontup or ())
    binds = {name: compiled.binds[name] for name in names}
    constants = {name: _for_driver(bind, dialect) for name, bind in binds.items() if not bind.required}
    return Prepared(str(compiled), names, constants)


def _for_driver(bind: BindParameter[Any], dialect: Any) -> Any:
    """The value as the driver takes it: an enum's member, say, as its text."""
    process = bind.type.dialect_impl(dialect).bind_processor(dialect)
    return process(bind.effective_value) if process else bind.effective_value
