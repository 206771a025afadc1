"""ADMM: choose weights and solve for the rest together (Boza 2024, arXiv 2401.02938; ALPS 2024).

Minimises `||X W^T - T||^2` over the W of one linear that are sparse, where T is what it should put out: `X W0^T` to
reproduce the layer's own output, or something else (`pruning.target`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from owl_deploy.pruning.methods.damping import damped, inverse

_RHO = 1.0
_RAMP = 0.75
"""The sparsity rises over this share of the steps, and then stays."""

Mask = Callable[[torch.Tensor, float], torch.Tensor]
"""Of scores [out, in] and a sparsity: bool [out, in], true where pruned."""


@dataclass(frozen=True)
class ADMMResult:
    """The pruned weights [out, in], and the damping that was needed (larger than asked where Cholesky failed)."""

    weight: torch.Tensor
    dampening: float


def admm(
    weight: torch.Tensor,
    gram: torch.Tensor,
    sparsity: float,
    mask: Mask,
    *,
    correlation: torch.Tensor | None = None,
    steps: int = 20,
    polish: int = 10,
    dampening: float = 0.3,
) -> ADMMResult:
    """Prune one linear and solve for the weights that are kept.

    Columns are scaled to `diag(G) = 1`; a dead column's weights go first, as they score 0. Iterates
    `Z = keep(W + U)`, `U = W + U - Z`, `W = (B + rho (Z - U)) (G + rho I)^-1` with the sparsity rising to its end as
    `s (1 - (1 - t)^3)`; then conjugate gradients on the weights that are kept.

    Args:
        weight: W0, [out, in], fp32.
        gram: `G = X^T X`, in any unit, [in, in], fp32.
        sparsity: fraction to zero. Passed to `mask`, which may ignore it.
        mask: which entries of the smallest scores go.
        correlation: `B = T^T X` in the unit of `gram`, [out, in]; None for `W0 G`, the linear's own output.
        steps: iterations.
        polish: steps of conjugate gradients.
        dampening: added to the scaled Gram matrix's diagonal, as a fraction of its mean; it draws W towards W0.
            Where the matrix is still not positive definite, ten times as much is tried, and so on.

    Raises:
        UserError: the Gram matrix is of no use (it holds NaN or infinities).
    """
    norm = gram.diagonal().sqrt()
    norm = torch.where(norm > 0, norm, 1.0)
    G = gram / norm[:, None] / norm
    W0 = weight * (gram.diagonal() > 0) * norm
    B = W0 @ G if correlation is None else correlation / norm
    live = (gram.diagonal() > 0).float().mean().item()  # the mean of G's diagonal
    G_rho = G + _RHO * torch.eye(len(G), dtype=G.dtype, device=G.device)
    solve, factor = damped(G_rho, dampening, inverse, unit=live)
    used = factor * live
    G.diagonal().add_(used)
    B = B + used * W0

    W, U = W0, torch.zeros_like(W0)
    ramp = max(1, round(_RAMP * steps))
    for step in range(1, steps + 1):
        V = W + U
        now = sparsity * (1 - (1 - min(step / ramp, 1.0)) ** 3)
        pruned = mask(V.abs(), now)
        Z = V.masked_fill(pruned, 0)
        U = V - Z
        W = (B + _RHO * (Z - U)) @ solve
    return ADMMResult(_polished(Z, pruned, G, B, polish) / norm, used)


def _polished(Z: torch.Tensor, pruned: torch.Tensor, G: torch.Tensor, B: torch.Tensor, steps: int) -> torch.Tensor:
    """Conjugate gradients for `Z G = B` on the entries of each row that are kept; all rows at once.

    A row that has converged stays: another step would divide rounding errors by rounding errors.
    """
    residual = (B - Z @ G).masked_fill(pruned, 0)
    direction = residual
    power = (residual**2).sum(dim=1, keepdim=True)
    enough = power * torch.finfo(Z.dtype).eps ** 2
    for _ in range(steps):
        image = (direction @ G).masked_fill(pruned, 0)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        length = torch.where((curvature > 0) & (power > enough), power / curvature, 0.0)
        Z = Z + length * direction
        residual = residual - length * image
        before, power = power, (residual**2).sum(dim=1, keepdim=True)
        direction = residual + torch.where(before > 0, power / before, 0.0) * direction
    return Z
