"""SparseGPT (Frantar & Alistarh 2023): prune column by column, and let the columns to the right make up for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from owl_deploy.errors import UserError
from owl_deploy.pruning.plan import NM
from owl_deploy.pruning.selection import kth_smallest, smallest_of_each_group

_DAMPENING_TRIES = 8


@dataclass(frozen=True)
class SparseGPTResult:
    """The pruned weights [out, in], and the damping that was needed (larger than asked where Cholesky failed)."""

    weight: torch.Tensor
    dampening: float


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float,
    *,
    pattern: NM | None = None,
    block_size: int = 128,
    dampening: float = 0.01,
) -> SparseGPTResult:
    """Prune one linear and update its remaining weights.

    Args:
        weight: [out, in], fp32.
        hessian: `H = 2 X^T X / sequences`, [in, in], fp32.
        sparsity: fraction to zero within every `block_size` columns. Ignored with a `pattern`.
        dampening: added to the diagonal of H, as a fraction of its mean. Where H is still not positive definite,
            ten times as much is tried, and so on.

    Raises:
        UserError: H stays indefinite (it holds NaN or infinities).
    """
    W = weight.clone()
    H = hessian.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    U, used = _inverse_cholesky(H, dampening)

    for start in range(0, W.shape[1], block_size):
        end = min(start + block_size, W.shape[1])
        block, error = W[:, start:end].clone(), torch.zeros_like(W[:, start:end])
        inverse = U[start:end, start:end]
        saliency = block**2 / inverse.diagonal() ** 2
        mask = _block_mask(saliency, sparsity) if pattern is None else torch.zeros_like(block, dtype=torch.bool)
        for i in range(end - start):
            if pattern is not None and i % pattern.of == 0:
                group = slice(i, i + pattern.of)
                mask[:, group] = smallest_of_each_group(block[:, group] ** 2 / inverse.diagonal()[group] ** 2, pattern)
            kept = block[:, i].masked_fill(mask[:, i], 0)
            error[:, i] = (block[:, i] - kept) / inverse[i, i]
            block[:, i:] -= torch.outer(error[:, i], inverse[i, i:])
            block[:, i] = kept
        W[:, start:end] = block
        W[:, end:] -= error @ U[start:end, end:]
    return SparseGPTResult(W, used)


def _block_mask(saliency: torch.Tensor, sparsity: float) -> torch.Tensor:
    """One threshold for all rows of a column block: `saliency <= sorted(saliency)[int(numel * s)]`."""
    if sparsity == 0:
        return torch.zeros_like(saliency, dtype=torch.bool)
    return saliency <= kth_smallest(saliency.flatten()[None], int(saliency.numel() * sparsity))


def _inverse_cholesky(H: torch.Tensor, dampening: float) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the inverse of the damped H, and the damping used."""
    mean_diagonal = H.diagonal().mean()
    for _ in range(_DAMPENING_TRIES):
        damped = H.clone()
        damped.diagonal().add_(dampening * mean_diagonal)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper, dampening
        dampening *= 10
    raise UserError("the calibration activations give no usable Hessian (NaN or infinite); check the model's weights")
