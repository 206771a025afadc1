"""Recovery of one block at a time: each is fitted to what the dense model's puts out, given what comes to it now.

Two streams of hidden states go through the two models side by side. The sparse block sees what the recovered blocks
before it put out, and is trained to put out what the dense one does in the dense model, so that it also makes up for
errors from before (EBFT, Guo et al. 2024, arXiv 2402.12419, with the dense stream as its target). One block of each
model is in memory at a time, and the gradients of one alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from owl_deploy.errors import CheckFailed
from owl_deploy.models.structure import Block, zeros
from owl_deploy.pruning.calibration.spill import Tensors
from owl_deploy.pruning.calibration.stream import CalibrationStream
from owl_deploy.pruning.manifest import BlockRecord, LinearRecord
from owl_deploy.pruning.opened import Opened
from owl_deploy.recovery.losses import relative_error
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.recovery.save import Zeros
from owl_deploy.recovery.text import TrainingText
from owl_deploy.recovery.train import BETAS, Diverged, StepRecord
from owl_deploy.reporting import SILENT, Reporter


@torch.no_grad()
def recover_blocks(
    sparse: Opened, dense: Opened, text: TrainingText, plan: RecoveryPlan, reporter: Reporter = SILENT
) -> tuple[list[StepRecord], float, int]:
    """Fit every block of `sparse` in place; the error of each, after it, is the `hidden` of a record.

    Returns the records, the sparsity of the linears, and how many blocks an earlier run had not finished.

    Raises:
        CheckFailed: a weight that was 0 is no longer.
        Diverged: the error of a block became NaN; the record's number is the block's.
    """
    ids = text.windows.ids
    stream = sparse.weights.stream(sparse.model, sparse.blocks, ids)
    dense_stream = dense.weights.stream(dense.model, dense.blocks, ids)
    log, zeros, fitted = [], 0, 0
    for number, block in enumerate(reporter.track(sparse.blocks, "recovering blocks")):
        with dense.weights.held(dense.blocks[number]):
            dense_stream.advance(dense.blocks[number])
        with sparse.weights.held(block):
            record = sparse.finished.restore(block)
            is_new = record is None
            if is_new:
                held = Zeros([block])
                _fit(block, stream, dense_stream.hidden, text, plan, number)
                if lost := held.lost([block]):
                    raise CheckFailed(f"{lost[0]}: has lost zeros; nothing was written")
            zeros += block.zeros
            fitted += is_new
            stream.advance(block)
            error = _error(stream.hidden, dense_stream.hidden)
            record = record or _record(block)
        if is_new:
            sparse.finished.add(block, record)
        tokens = plan.steps * plan.tokens_per_step
        log.append(StepRecord(step=number + 1, tokens=tokens, loss=error, kl=0.0, hidden=error, cross_entropy=0.0))
    return log, zeros / sum(block.weights for block in sparse.blocks), fitted


def _fit(
    block: Block, stream: CalibrationStream, wanted: Tensors, text: TrainingText, plan: RecoveryPlan, number: int
) -> None:
    """Train the kept weights of a block's linears by AdamW; a step is a batch of sequences."""
    weights = [linear.weight for linear in block.linears.values()]
    optimizer = torch.optim.AdamW(weights, plan.peak, BETAS, weight_decay=plan.decay, fused=True)
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        for step in range(plan.steps):
            optimizer.param_groups[0]["lr"] = plan.learning_rate_at(step)
            for index in text.places(step, plan.batch, plan.seed):
                loss = relative_error(stream.run(block, index), wanted[index])
                (loss / plan.batch).backward()  # type: ignore[no-untyped-call]
            for weight in weights:
                if weight.grad is not None:  # an expert that no token reached
                    weight.grad.masked_fill_(weight.detach() == 0, 0)
            if not bool(torch.isfinite(nn.utils.clip_grad_norm_(weights, plan.clip))):
                raise Diverged(number + 1, "block")
            optimizer.step()
            optimizer.zero_grad()
        for weight in weights:
            weight.requires_grad_(False)


def _error(hidden: Tensors, wanted: Tensors) -> float:
    """The relative error, mean over sequences."""
    return float(np.mean([float(relative_error(*pair)) for pair in zip(hidden, wanted, strict=True)]))


def _record(block: Block) -> BlockRecord:
    """What the files of finished blocks say of one."""
    sparsity = block.zeros / block.weights
    linears = [
        LinearRecord(
            name=name,
            shape=(linear.weight.shape[0], linear.weight.shape[1]),
            sparsity_asked=zeros(linear) / linear.weight.numel(),
            sparsity_achieved=zeros(linear) / linear.weight.numel(),
        )
        for name, linear in block.linears.items()
    ]
    return BlockRecord(
        name=block.name,
        weights=block.weights,
        lod_percent=None,
        sparsity_asked=sparsity,
        sparsity_achieved=sparsity,
        linears=linears,
    )
