"""`pruning.json`: what was asked of a sparse checkpoint, what was achieved, and how it was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from owl_deploy import __version__
from owl_deploy.errors import UserError
from owl_deploy.files import read_json
from owl_deploy.pruning.plan import PruningPlan

MANIFEST = "pruning.json"


class Record(BaseModel):
    """Base of everything written to disk as JSON: unknown fields are errors, and infinities are kept, as strings."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings")


RecordT = TypeVar("RecordT", bound=Record)


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


class TextRecord(Record):
    """Token windows that were used: where from, and the SHA-256 of their ids as int64."""

    source: str
    windows: int
    seqlen: int
    sha256: str


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
    tuning: list[TrialRecord] = []
    sparsity_asked: float
    sparsity_achieved: float
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


def read_record(path: Path, kind: type[RecordT], *, mend: str) -> RecordT:
    """Read a JSON file as a record.

    Raises:
        UserError: the file is corrupted, or of another schema: its first field that is wrong, and how to `mend` it.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}; {mend}") from error


def versions(*packages: str) -> dict[str, str]:
    """Versions of what decides a result: owl-deploy, Python, torch, transformers and numpy, and `packages`."""
    names = ("torch", "transformers", "numpy", *packages)
    found = {name: importlib.metadata.version(name) for name in names}
    return {"owl-deploy": __version__, "python": platform.python_version()} | found


def fingerprint(inputs: object) -> str:
    """SHA-256 of a JSON value: equal for equal inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
