"""A Hessian that is not positive definite is damped until it is."""

from __future__ import annotations

from collections.abc import Callable

import torch

from owl_deploy.errors import UserError

_TRIES = 8

Factor = Callable[[torch.Tensor], "torch.Tensor | None"]
"""Of a damped matrix: what is wanted of it, None where it is not positive definite."""


def damped(
    matrix: torch.Tensor, dampening: float, factor: Factor, *, unit: torch.Tensor | float
) -> tuple[torch.Tensor, float]:
    """`factor(matrix + d unit I)` and d: `dampening`, or the first of ten, a hundred, … times that which works.

    Raises:
        UserError: none works (the matrix holds NaN or infinities).
    """
    for _ in range(_TRIES):
        attempt = matrix.clone()
        attempt.diagonal().add_(dampening * unit)
        found = factor(attempt)
        if found is not None and bool(found.isfinite().all()):
            return found, dampening
        dampening *= 10
    raise UserError("the calibration activations give no usable Hessian (NaN or infinite); check the model's weights")


def inverse(matrix: torch.Tensor) -> torch.Tensor | None:
    """By Cholesky; None where `matrix` [n, n] is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    return None if failed else torch.cholesky_inverse(lower)
