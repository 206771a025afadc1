"""Cells that are trained after pruning: made as checkpoints, which stay in the directory of the study."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from owl_deploy.models.source import ModelSource
from owl_deploy.pruning.bits import bits_per_weight
from owl_deploy.pruning.manifest import BlockRecord
from owl_deploy.pruning.run import Calibration, Evaluation, prune_checkpoint
from owl_deploy.records import fingerprint
from owl_deploy.recovery.run import SELF, recover_checkpoint
from owl_deploy.recovery.text import training_text
from owl_deploy.reporting import SILENT, Reporter
from owl_deploy.studies.cells import Cell, CellRecord, Recovery, Study, TrainingRecord

CHECKPOINTS = "checkpoints"


class TrainedCells:
    """What `prune` and `recover` make of a model; cells of one pruning plan share its checkpoint."""

    def __init__(
        self,
        source: ModelSource,
        out: Path,
        calibration: Calibration,
        evaluation: Evaluation | None,
        reporter: Reporter = SILENT,
    ) -> None:
        """Make them in `out`, which is there."""
        if evaluation is None:
            raise ValueError("what a recovery is worth is measured on a text")
        self._source, self._out = source, out
        self._calibration, self._evaluation = calibration, evaluation
        self._reporter = reporter

    def measure(self, cell: Cell, key: str) -> CellRecord:
        """Prune, train and measure; what an earlier run was interrupted in goes on from there."""
        assert cell.recovery is not None
        start = time.perf_counter()
        directory = self._out / CHECKPOINTS
        pruned = directory / f"pruned-{cell.plan.sparsity:g}-{fingerprint(cell.plan.fields)[:8]}"
        made = prune_checkpoint(
            self._source,
            pruned,
            cell.plan,
            self._calibration,
            statistics_file=directory / "statistics.safetensors",
            reporter=self._reporter,
        )
        plan = cell.recovery.plan
        recovered = directory / f"{plan.method}-{cell.plan.sparsity:g}-{key[:8]}"
        trained = recover_checkpoint(
            ModelSource(pruned.name, pruned),
            self._source,
            recovered,
            plan,
            cell.recovery.text,
            evaluation=self._evaluation,
            reporter=self._reporter,
        )
        return CellRecord(
            key=key,
            labels=cell.labels,
            plan=cell.plan.fields,
            sparsity_asked=cell.plan.sparsity,
            sparsity_achieved=made.sparsity_achieved,
            linear_sparsities=linear_sparsities(made.blocks),
            perplexity=trained.perplexity.after,
            lod_percent={},
            bits_per_weight=bits_per_weight(dataclasses.replace(cell.plan, weights=plan.weights), made.blocks),
            training=TrainingRecord(
                plan=dataclasses.asdict(plan),
                text=trained.text,
                tokens=trained.tokens,
                seconds=trained.seconds["train"],
                before=trained.perplexity.before,
                checkpoint=str(recovered.relative_to(self._out)),
            ),
            metric_seconds=None,
            metric_cpu_seconds=None,
            seconds=time.perf_counter() - start,
        )


def texts_of(study: Study, tokenizer: PreTrainedTokenizerBase | None) -> list[str | None]:
    """What tells the training texts of a study's cells apart: SHA-256 of the windows; None where none is trained on.

    Raises:
        UserError: a text cannot be read, or is too short.
    """
    known: dict[tuple[object, ...], str] = {}

    def sha256(recovery: Recovery) -> str:
        plan = recovery.plan
        if recovery.text == SELF:
            return SELF
        windows = (recovery.text, plan.seqlen, plan.tokens, plan.batch, plan.passes, plan.seed)
        if windows not in known:
            text = training_text(recovery.text, tokenizer, plan)
            known[windows] = fingerprint([text.windows.sha256, text.held_out.sha256])
        return known[windows]

    return [None if cell.recovery is None else sha256(cell.recovery) for cell in study.cells]


def linear_sparsities(records: Sequence[BlockRecord]) -> dict[str, float]:
    """As achieved, by the linear's full name."""
    return {f"{block.name}.{one.name}": one.sparsity_achieved for block in records for one in block.linears}
