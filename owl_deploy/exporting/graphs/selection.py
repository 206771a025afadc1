"""Which format a matrix is stored in: never a slower or a bigger one than dense."""

from __future__ import annotations

from owl_deploy.sparse.formats import Head, Stored, Weights

# What was asked for is stored as the first of these whose density reaches the matrix's; README.md has what was
# measured. Packed weights lose to dense fp32 above 0.7, while many tokens are prefilled. A mask takes a bit and as
# many instructions for a zero as for a weight: few weights are read faster with their index, and 11 bits of each.
_STORED: dict[Weights, tuple[tuple[float, Stored], ...]] = {
    "packed32": ((0.7, "packed32"), (1, "fp32")),
    "packed16": ((0.7, "packed16"), (1, "fp32")),
    "int8": ((0.15, "packed16"), (0.87, "int8"), (1, "dense8")),
    # Never packed16, whose grid is another: what was rounded in training is stored as it is. By bytes alone masks would
    # pay from 26% zeros on; but a dense tile takes half the instructions.
    "int4": ((0.6, "int4"), (1, "dense4")),
}
_HEADS: dict[Head, Stored] = {"fp32": "fp32", "int8": "dense8", "int4": "dense4"}


def choose(weights: Weights, density: float) -> Stored:
    """How to store a matrix of which `density` is not zero, where `weights` were asked for."""
    return next(stored for limit, stored in _STORED[weights] if density <= limit)


def choose_head(head: Head) -> Stored:
    """How to store the matrix of the vocabulary, which is never pruned."""
    return _HEADS[head]
