"""`pruning.json`: what was asked of a sparse checkpoint, what was achieved, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.records import Record, TextRecord, read_record
from owl_deploy.rounding import Rounded

MANIFEST = "pruning.json"


class LinearRecord(Record):
    """One pruned linear.

    `dampening` is SparseGPT's, as used: above the plan's where the Hessian was not positive definite.
    """

    name: str
    shape: tuple[int, int]
    sparsity_asked: float
    sparsity_achieved: float
    dampening: float | None = None


class BlockRecord(Record):
    """One block; `lod_percent` is OWL's D of the dense block, where it was measured."""

    name: str
    weights: int
    lod_percent: float | None
    sparsity_asked: float
    sparsity_achieved: float
    linears: list[LinearRecord]


class PerplexityRecord(Record):
    """Perplexity in torch, fp32, before and after pruning."""

    text: TextRecord
    before: float
    after: float


class TrialRecord(Record):
    """One allocation that `--tune` tried, and its perplexity on the held-out windows."""

    allocation: str
    owl_m: float
    half_range: float | None
    perplexity: float

    @classmethod
    def of(cls, plan: PruningPlan, perplexity: float) -> TrialRecord:
        return cls(allocation=str(plan.allocation), owl_m=plan.owl_m, half_range=plan.half_range, perplexity=perplexity)

    def is_of(self, plan: PruningPlan) -> bool:
        return (self.allocation, self.owl_m, self.half_range) == (plan.allocation, plan.owl_m, plan.half_range)

    def __str__(self) -> str:
        of_owl = f" M {self.owl_m:g}" if self.allocation.startswith("owl") else ""
        of_range = "" if self.half_range is None else f" {self.half_range:g}"
        return f"{self.allocation}{of_owl}{of_range}: perplexity {self.perplexity:.2f}"


class SearchRecord(Record):
    """The best of a search after a generation that changed it."""

    generation: int
    """0: where it began."""
    kl: float
    """KL(dense || best), nats a token, on all held-out windows."""
    sparsities: list[float]
    """Of the best, by linear."""
    weights: list[Rounded | None]
    """What the best is rounded to, by linear."""


class SearchSummary(Record):
    """What an evolutionary search began with, and what it came to; the rest is in `search.csv`."""

    generation: int
    """The last that changed the best."""
    kl_first: float
    kl_last: float

    @classmethod
    def of(cls, log: Sequence[SearchRecord]) -> SearchSummary | None:
        return cls(generation=log[-1].generation, kl_first=log[0].kl, kl_last=log[-1].kl) if log else None


class PruningManifest(Record):
    """The whole of `pruning.json`."""

    schema_version: int = 1
    model: str
    model_sha256: str
    family: str
    block_class: str
    plan: dict[str, object]
    seed: int
    calibration: TextRecord | None
    tuning: list[TrialRecord] = Field(default_factory=list)
    search: SearchSummary | None = None
    sparsity_asked: float
    sparsity_achieved: float
    bits_per_weight: float | None = None
    """Of the linears, masks and scales included; None where weights were not rounded."""
    blocks: list[BlockRecord]
    perplexity: PerplexityRecord | None = None
    inputs_sha256: str
    versions: dict[str, str]
    seconds: dict[str, float]


def read_manifest(directory: Path) -> PruningManifest | None:
    """The manifest of a sparse checkpoint; None for a directory that owl-deploy did not prune.

    Raises:
        UserError: the file is corrupted, or of another schema.
    """
    path = directory / MANIFEST
    return read_record(path, PruningManifest, mend="prune the model again") if path.is_file() else None
