"""Mixed precision: which blocks get more bits (paper, Table 12)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def equal_shares(importance: Sequence[float], options: int) -> list[int]:
    """The option that each block takes: equal shares of blocks, those that matter most take the first.

    The paper does not say how large its shares are. Where they cannot be equal, the first options get a block more;
    of equally important blocks, the earlier one comes first.

    Args:
        importance: of each block: with OWL its LOD, in any unit.
        options: how many there are, at most as many as blocks.

    Raises:
        ValueError: there are more options than blocks.
    """
    if not 1 <= options <= len(importance):
        raise ValueError(f"{options} options for {len(importance)} blocks")
    ranked = np.argsort(-np.asarray(importance, dtype=np.float64), kind="stable")
    taken = np.empty(len(importance), dtype=np.int64)
    for option, share in enumerate(np.array_split(ranked, options)):
        taken[share] = option
    return taken.tolist()
