"""One threshold for the whole model (paper, Tables 3 and 4: `Global`), found without holding all scores at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_HALF = 1 << 16


def global_threshold(scores: Callable[[], Iterable[torch.Tensor]], count: int) -> float:
    """The `count`-th smallest (from 1) of all scores.

    The bits of floats that are not negative are in the order of their values: one pass counts the upper halves of
    the words, a second one the lower halves of those that share the threshold's upper half.

    Args:
        scores: gives the scores of every linear (fp32, not negative, on any device), each time it is called.
        count: at least 1, at most the number of scores.
    """
    upper, before = _find(_count(scores, lambda bits: bits >> 16), count)
    lower, _ = _find(_count(scores, lambda bits: bits[bits >> 16 == upper] & (_HALF - 1)), count - before)
    return float(np.array([upper << 16 | lower], dtype=np.uint32).view(np.float32)[0])


def _count(
    scores: Callable[[], Iterable[torch.Tensor]], half: Callable[[NDArray[np.uint32]], NDArray[Any]]
) -> NDArray[np.int64]:
    counts = np.zeros(_HALF, dtype=np.int64)
    for tensor in scores():
        bits = tensor.detach().cpu().contiguous().numpy().ravel().view(np.uint32)
        counts += np.bincount(half(bits), minlength=_HALF)
    return counts


def _find(counts: NDArray[np.int64], count: int) -> tuple[int, int]:
    """The value that holds the `count`-th smallest, and how many are below that value."""
    totals = np.cumsum(counts)
    found = int(np.searchsorted(totals, count))
    return found, int(totals[found] - counts[found])
