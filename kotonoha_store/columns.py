"""Column types that every model uses.

:class:`HalfVector` carries embeddings in PostgreSQL's binary format. pgvector's own SQLAlchemy types
send text, which measures 12 to 16 times slower on writes (``benchmarks/writes.py``).
"""

import json
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Dialect, Float, Row, Select
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.types import UserDefinedType

from kotonoha_store.errors import InvalidVectorError

EMBEDDING_DIMENSION: Final = 1536
"""Length of every stored vector: the column is ``halfvec(1536)``, so this is schema and no setting."""

HALF_MAX: Final = 65504.0
"""The largest finite IEEE 754 half-precision number."""

VectorLike: TypeAlias = Sequence[float] | NDArray[np.floating[Any]]

# Rows and queries of any shape: SQLAlchemy 2.1 types them by variadic arguments, 2.0 by a tuple.
if TYPE_CHECKING:
    AnyRow: TypeAlias = Row[*tuple[Any, ...]]
    AnySelect: TypeAlias = Select[*tuple[Any, ...]]
else:
    AnyRow = Row
    AnySelect = Select


class PackedVector(bytes):
    """A vector already checked and in the wire format: what :func:`pack_vector` returns."""

    __slots__ = ()


def _floats(values: Any, dimension: int) -> NDArray[np.float32]:
    try:
        array = np.asarray(values)
        # Strings, dates, booleans and complex numbers would be converted without a word.
        if array.dtype.kind in "fiuO":
            # Becomes infinity, which is refused with the number of its row.
            with np.errstate(over="ignore"):
                return array.astype(np.float32, copy=False)
        problem = f"got {array.dtype}"
    except (TypeError, ValueError, OverflowError) as error:
        problem = str(error)
    raise InvalidVectorError(f"a vector must be {dimension} numbers: {problem}")


def check_vectors(vectors: Any, dimension: int = EMBEDDING_DIMENSION) -> NDArray[np.float32]:
    """Return ``vectors`` as a float32 array of shape (n, dimension), each row fit to be stored.

    Raises:
        InvalidVectorError: not numbers, another shape, NaN, infinity, beyond half precision
            (65504), or a row that is zero (cosine distance to it is undefined); the message names the row.
    """
    array = _floats(vectors, dimension)
    if array.ndim != 2 or array.shape[1] != dimension:
        found = f"{array.shape[-1]} numbers" if array.ndim else "a single number"
        raise InvalidVectorError(
            f"a vector must have {dimension} dimensions, got {found} (array of shape {array.shape})"
        )
    # Half precision decides: what is finite in float32 may overflow, and what is not zero may vanish.
    # Two reductions and no copy of the array, as its absolute values would be.
    magnitude = np.maximum(array.max(axis=1, initial=0.0), -array.min(axis=1, initial=0.0))
    bad = np.flatnonzero(~(magnitude <= HALF_MAX) | (magnitude < np.finfo(np.float16).smallest_subnormal))
    if bad.size:
        row = int(bad[0])
        if not np.isfinite(array[row]).all():
            problem = "holds NaN or infinity"
        elif magnitude[row] > HALF_MAX:
            problem = f"holds a number beyond half precision (|x| <= {HALF_MAX:g})"
        else:
            problem = "is all zeros in half precision; cosine similarity to it is undefined"
        raise InvalidVectorError(f"vector {row} {problem}")
    return array


def check_vector(vector: Any, dimension: int = EMBEDDING_DIMENSION) -> NDArray[np.float32]:
    """Return one vector as a float32 array of shape (dimension,); raises as :func:`check_vectors`."""
    array = _floats(vector, dimension)
    if array.ndim != 1:
        raise InvalidVectorError(f"a vector must be a flat sequence of {dimension} numbers, got shape {array.shape}")
    checked: NDArray[np.float32] = check_vectors(array[np.newaxis], dimension)[0]
    return checked


def pack_vectors(vectors: Any, dimension: int = EMBEDDING_DIMENSION) -> list[PackedVector]:
    """Check many vectors at once and return each in pgvector's binary format.

    The format (pgvector ``src/halfvec.c``, ``halfvec_send``): int16 dimension, int16 zero, then one
    big-endian IEEE half per dimension.
    """
    return _pack(check_vectors(vectors, dimension))


def pack_vector(vector: Any, dimension: int = EMBEDDING_DIMENSION) -> PackedVector:
    """Check one vector and return it in pgvector's binary format."""
    return _pack(check_vector(vector, dimension)[np.newaxis])[0]


def _pack(checked: NDArray[np.float32]) -> list[PackedVector]:
    header = struct.pack(">hh", checked.shape[1], 0)
    return [PackedVector(header + row.tobytes()) for row in checked.astype(">f2")]


def unpack_vector(data: bytes) -> NDArray[np.float16]:
    """Return the float16 array that pgvector's binary format holds."""
    return np.frombuffer(data, dtype=">f2", offset=4).astype(np.float16)


# Without a return type SQLAlchemy would read the number through the vector's own processor.
_COSINE_DISTANCE: custom_op[Any] = custom_op("<=>", return_type=Float())


class HalfVector(UserDefinedType[NDArray[np.float16]]):
    """``halfvec(dimension)``: binds lists and numpy arrays, returns numpy float16 arrays.

    Both ways in binary, through the codec that :class:`Database` registers on each connection.

    Raises:
        InvalidVectorError: on bind, see :func:`check_vectors`.
    """

    cache_ok = True
    # Else insertmanyvalues types the parameter as text.
    render_bind_cast = True

    def __init__(self, dimension: int | str = EMBEDDING_DIMENSION) -> None:
        # Reflection passes what stands in the parentheses.
        self.dimension = int(dimension)

    def get_col_spec(self, **_: Any) -> str:
        return f"halfvec({self.dimension})"

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], bytes | None]:
        dimension = self.dimension

        def process(value: Any) -> bytes | None:
            if value is None or isinstance(value, PackedVector):
                return value
            return pack_vector(value, dimension)

        return process

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        def process(value: Any) -> Any:
            # Text, where the engine is the caller's own and no repository has taught the connection yet.
            return np.array(json.loads(value), dtype=np.float16) if isinstance(value, str) else value

        return process

    class Comparator(UserDefinedType.Comparator[NDArray[np.float16]]):
        def cosine_distance(self, other: Any) -> ColumnElement[float]:
            """``<=>``: 1 - cosine similarity, in [0, 2]."""
            return cast("ColumnElement[float]", self.operate(_COSINE_DISTANCE, other))

    comparator_factory = Comparator


ischema_names["halfvec"] = HalfVector
