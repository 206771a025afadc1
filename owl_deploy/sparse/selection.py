"""Which format a matrix is stored in: never a slower or a bigger one than dense."""

from __future__ import annotations

from typing import Literal

from owl_deploy.export.names import Weights

Stored = Literal["fp32", "packed32", "packed16", "int8", "dense8"]

# Above these densities the format would lose to the dense one of the same precision: the packed formats to fp32 while
# many tokens are prefilled (see README.md for what was measured), a mask of one bit a weight by its size.
_DENSEST: dict[Weights, float] = {"packed32": 0.7, "packed16": 0.7, "int8": 0.87}
_DENSE: dict[Weights, Stored] = {"packed32": "fp32", "packed16": "fp32", "int8": "dense8"}


def choose(weights: Weights, density: float) -> Stored:
    """How to store a matrix of which `density` is not zero, where `weights` were asked for."""
    return weights if density <= _DENSEST[weights] else _DENSE[weights]
