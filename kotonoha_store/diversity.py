"""Hits that differ from each other. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def spread_out(
    vectors: NDArray[np.floating[Any]], relevance: Sequence[float], *, count: int, diversity: float
) -> list[int]:
    """Choose by maximal marginal relevance (Carbonell, Goldstein 1998); return positions, first choice first.

    Each next choice has the highest (1 - diversity) * relevance - diversity * greatest similarity to what was
    chosen before.

    Args:
        vectors: shape (n, d), none of them zero; compared by cosine.
        relevance: n numbers on the scale of similarities.
        diversity: 0 (relevance alone) to 1.
    """
    if not len(relevance):
        return []
    units = np.asarray(vectors, dtype=np.float32)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    wanted = (1 - diversity) * np.asarray(relevance, dtype=np.float32)
    nearest = np.full(len(wanted), -np.inf, dtype=np.float32)
    chosen = [int(np.argmax(wanted))]
    while len(chosen) < min(count, len(wanted)):
        nearest = np.maximum(nearest, units @ units[chosen[-1]])
        value = wanted - diversity * nearest
        value[chosen] = -np.inf
        chosen.append(int(np.argmax(value)))
    return chosen
