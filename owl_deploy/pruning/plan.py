"""What a pruning run is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from owl_deploy.errors import UserError

Method = Literal["magnitude", "wanda", "sparsegpt"]
Allocation = Literal["uniform", "owl", "explicit"]
METHODS: tuple[Method, ...] = get_args(Method)
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


@dataclass(frozen=True)
class NM:
    """N:M sparsity: `prune` of every `of` consecutive inputs are zeroed."""

    prune: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.prune < self.of:
            raise UserError(f"pattern {self}: N must be between 1 and M - 1 (N of every M weights are pruned)")

    def __str__(self) -> str:
        return f"{self.prune}:{self.of}"


@dataclass(frozen=True)
class PruningPlan:
    """Which weights go (`method`), and how many of each block (`allocation`).

    Attributes:
        sparsity: fraction of all block weights to zero, in [0, 1).
        owl_m, owl_lambda: OWL's M and lambda (paper, section 2.2).
        block_sparsities: one sparsity per block, first to last, for the `explicit` allocation.
        pattern: N:M in place of unstructured; its own ratio then sets every block's sparsity.
        block_size: SparseGPT's column block.
        dampening: SparseGPT's damping, as a fraction of the Hessian's mean diagonal.
    """

    sparsity: float
    method: Method = "wanda"
    allocation: Allocation = "owl"
    owl_m: float = 5.0
    owl_lambda: float = 0.08
    block_sparsities: tuple[float, ...] | None = None
    pattern: NM | None = None
    block_size: int = 128
    dampening: float = 0.01

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity, "sparsity")
        for index, value in enumerate(self.block_sparsities or ()):
            _check_sparsity(value, f"sparsity of block {index}")
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.allocation not in ALLOCATIONS:
            raise UserError(f"allocation {self.allocation!r} is unknown; choose one of {', '.join(ALLOCATIONS)}")
        if (self.allocation == "explicit") != (self.block_sparsities is not None):
            raise UserError("the explicit allocation takes a list of block sparsities, and only it does")
        if self.pattern is not None and self.allocation != "uniform":
            raise UserError(f"pattern {self.pattern} prunes every block alike; use --allocation uniform with it")
        if not (math.isfinite(self.owl_m) and self.owl_m > 0):
            raise UserError(f"owl_m {self.owl_m} must be above 0")
        if not 0 <= self.owl_lambda < 1:
            raise UserError(f"owl_lambda {self.owl_lambda} must be in [0, 1)")
        if self.block_size < 1:
            raise UserError(f"block_size {self.block_size} must be at least 1")
        if not 0 < self.dampening < math.inf:
            raise UserError(f"dampening {self.dampening} must be above 0")


def _check_sparsity(value: float, what: str) -> None:
    if not 0 <= value < 1:  # also false for NaN
        raise UserError(f"{what} {value} is out of range; give a fraction from 0 up to, not including, 1")
