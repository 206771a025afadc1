"""SparseGPT (Frantar & Alistarh 2023): prune column by column, and let the columns to the right make up for it.

With a grid, weights are rounded in the same pass, as GPTQ (Frantar et al. 2022) does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from owl_deploy.pruning.methods.damping import damped, inverse
from owl_deploy.pruning.methods.selection import smallest_of_each_group, smallest_of_layer
from owl_deploy.pruning.plan import NM
from owl_deploy.rounding import Grid

Scores = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""Of some columns' current weights [out, n], diag(U) there [n], and where they are: what to prune by, [out, n]."""


@dataclass(frozen=True)
class SparseGPTResult:
    """The pruned weights [out, in], and the damping that was needed (larger than asked where Cholesky failed)."""

    weight: torch.Tensor
    dampening: float


def saliency(weights: torch.Tensor, diagonal: torch.Tensor, _where: slice) -> torch.Tensor:
    """SparseGPT's own score: `w^2 / U_jj^2`, the error that pruning a weight leaves after the update."""
    return weights**2 / diagonal**2


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float,
    *,
    pattern: NM | None = None,
    block_size: int = 128,
    dampening: float = 0.01,
    scores: Scores = saliency,
    fixed_mask: torch.Tensor | None = None,
    grid: Grid | None = None,
) -> SparseGPTResult:
    """Prune one linear and update its remaining weights.

    Args:
        weight: [out, in], fp32.
        hessian: `H = 2 X^T X / sequences`, [in, in], fp32.
        sparsity: fraction to zero within every `block_size` columns. Ignored with a `pattern`.
        dampening: added to the diagonal of H, as a fraction of its mean. Where H is still not positive definite,
            ten times as much is tried, and so on.
        scores: what is pruned by, on weights as updated so far (the published ablations put another metric here).
        fixed_mask: bool [out, in], true where to prune: then only the update is SparseGPT's.
        grid: what the weights that stay are rounded to; those to the right make up for that as well. The scale of a
            group is set by its weights as updated when the first of them is rounded.

    Raises:
        UserError: H stays indefinite (it holds NaN or infinities).
    """
    W = weight.clone()
    H = hessian.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    U, used = damped(H, dampening, _inverse_cholesky, unit=H.diagonal().mean())

    for start in range(0, W.shape[1], block_size):
        end = min(start + block_size, W.shape[1])
        block, error = W[:, start:end].clone(), torch.zeros_like(W[:, start:end])
        factor = U[start:end, start:end]
        if fixed_mask is not None:
            mask = fixed_mask[:, start:end]
        elif pattern is None:
            mask = smallest_of_layer(scores(block, factor.diagonal(), slice(start, end)), sparsity)
        else:
            mask = torch.zeros_like(block, dtype=torch.bool)
        for i in range(end - start):
            if pattern is not None and fixed_mask is None and i % pattern.of == 0:
                group = slice(i, min(i + pattern.of, end - start))
                where = slice(start + group.start, start + group.stop)
                mask[:, group] = smallest_of_each_group(
                    scores(block[:, group], factor.diagonal()[group], where), pattern
                )
            kept = block[:, i].masked_fill(mask[:, i], 0)
            if grid is not None:
                if (start + i) % (grid.group or W.shape[1]) == 0:
                    scales = grid.best_scales(_group(W, block, mask, slice(start, end), i, grid))[:, 0]
                kept = grid.nearest(kept, scales)
            error[:, i] = (block[:, i] - kept) / factor[i, i]
            block[:, i:] -= torch.outer(error[:, i], factor[i, i:])
            block[:, i] = kept
        W[:, start:end] = block
        W[:, end:] -= error @ U[start:end, end:]
    if grid is not None and not grid.both_signs:
        # Packers take an int8 row's scale from its largest weight, which updates may have made smaller.
        W = grid.rounded(W)
    return SparseGPTResult(W, used)


def _group(W: torch.Tensor, block: torch.Tensor, mask: torch.Tensor, where: slice, i: int, grid: Grid) -> torch.Tensor:
    """The weights of the group that begins at column `i` of a block, pruned ones zeroed as far as is decided."""
    last = where.start + i + (grid.group or W.shape[1])
    inside = block[:, i : last - where.start].masked_fill(mask[:, i : last - where.start], 0)
    return torch.cat([inside, W[:, where.stop : last]], dim=1)


def _inverse_cholesky(H: torch.Tensor) -> torch.Tensor | None:
    """The upper Cholesky factor of the inverse of H; None where H is not positive definite."""
    inverted = inverse(H)
    if inverted is None:
        return None
    upper, failed = torch.linalg.cholesky_ex(inverted, upper=True)
    return None if failed else upper
