"""`recovery.json`: how a sparse checkpoint was trained back, and what that was worth."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from owl_deploy.pruning.manifest import PerplexityRecord
from owl_deploy.records import Record, TextRecord, read_record

MANIFEST = "recovery.json"


class RecoveryManifest(Record):
    """The whole of `recovery.json`."""

    schema_version: int = 1
    model: str
    """What was trained."""
    model_sha256: str
    dense: str
    """What it was trained towards."""
    dense_sha256: str
    plan: dict[str, object]
    dtype: str
    """That forward passes were computed in; the weights that are trained are fp32."""
    text: TextRecord
    steps: int
    tokens: int
    trained_weights: int
    """Weights that are not pruned, embeddings and head left out."""
    loss: float
    """Mean over the last tenth of the steps."""
    held_out: PerplexityRecord
    """On windows of the text that were not trained on, in `dtype`."""
    perplexity: PerplexityRecord
    """On the text that was asked for, in fp32; if none was, the same as `held_out`."""
    zeros_kept: bool
    """Whether every weight that was 0 is 0; a checkpoint is not written without it."""
    sparsity: float
    """Of the linears of the blocks."""
    tokens_per_s: float
    """Of training alone."""
    seconds: dict[str, float]
    inputs_sha256: str
    versions: dict[str, str]
    earlier: list[RecoveryManifest] = Field(default_factory=list)
    """Of a checkpoint that was recovered before: how."""


def read_recovery(directory: Path) -> RecoveryManifest | None:
    """How a checkpoint was recovered; None if it was not.

    Raises:
        UserError: the file is corrupted, or of another schema.
    """
    path = directory / MANIFEST
    return read_record(path, RecoveryManifest, mend="recover the model again") if path.is_file() else None
