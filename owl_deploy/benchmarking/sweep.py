"""A sweep: one model, pruned and exported at several sparsities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from owl_deploy.benchmarking.executors import run_here, run_on_ray
from owl_deploy.bundle.manifest import BundleManifest
from owl_deploy.bundle.names import Flavor
from owl_deploy.engines.registry import EngineSpec, engine_spec
from owl_deploy.errors import UnsupportedFamily
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.models.source import ModelSource
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.run import Calibration, prune_checkpoint
from owl_deploy.reporting import SILENT, Reporter


@dataclass(frozen=True)
class Level:
    """One sparsity of a sweep in `out`, whose dense checkpoint is there."""

    source: ModelSource
    out: Path
    plan: PruningPlan
    calibration: Calibration
    engines: tuple[EngineSpec, ...]

    @property
    def directory(self) -> Path:
        return self.out / f"{self.plan.sparsity:g}"

    def __str__(self) -> str:
        return f"sparsity {self.plan.sparsity:g}"


@dataclass(frozen=True)
class Executor:
    """Where the levels are made; `address` and `threads` are Ray's (see `run_on_ray`)."""

    kind: Literal["here", "ray"] = "here"
    address: str | None = None
    threads: int = 1


def make_levels(
    source: ModelSource,
    out: Path,
    sparsities: list[float],
    plan: Mapping[str, Any],
    calibration: Calibration,
    engines: Sequence[EngineSpec],
    dense_engines: Sequence[EngineSpec] = (),
    *,
    executor: Executor = Executor(),  # frozen
    reporter: Reporter,
) -> list[Path]:
    """Prune and export `source` at every sparsity, for these engines, reusing what is there; the bundles' directories.

    The dense level is exported for `dense_engines` too.

    All levels are pruned from the dense level's checkpoint, so a GGUF file is converted once, and share the dense
    model's input statistics.

    Args:
        plan: the fields of each level's `PruningPlan`, but for the sparsity.

    Raises:
        UserError: see `prune_checkpoint` and `export_checkpoint`.
    """
    plans = [PruningPlan(sparsity, **plan) for sparsity in sparsities]  # mistakes are told before the work
    prune_checkpoint(source, out / "0" / "checkpoint", PruningPlan(0.0), calibration, reporter=reporter)
    levels = [
        Level(source, out.absolute(), plan, calibration, (*engines, *(() if plan.sparsity else dense_engines)))
        for plan in plans
    ]
    run = run_here
    if executor.kind == "ray":
        run = partial(run_on_ray, address=executor.address, threads=executor.threads)
    run(make_level, levels, reporter)
    return [out / f"{sparsity:g}" / "bundle" for sparsity in sparsities]


def make_level(level: Level, reporter: Reporter) -> None:
    """Prune and export one level."""
    reporter.step(str(level))
    if level.plan.sparsity > 0:
        prune_level(level, reporter)
    _export_level(level, reporter)


def prune_level(level: Level, reporter: Reporter = SILENT) -> None:
    """Prune one level, unless that is done."""
    prune_checkpoint(
        ModelSource(level.source.name, level.out / "0" / "checkpoint"),
        level.directory / "checkpoint",
        level.plan,
        level.calibration,
        statistics_file=level.out / "statistics.safetensors",
        reporter=reporter,
    )


def _export_level(level: Level, reporter: Reporter) -> None:
    """The flavor that each engine runs best; the next best ones where a family has no graph of that flavor."""
    engines, bundle = level.engines, level.directory / "bundle"
    best = list(dict.fromkeys(engine.flavors[0] for engine in engines))
    reference = engine_spec("onnxruntime").flavors  # what other engines' logits are compared with
    if not all(engine.checked_at_export for engine in engines) and not set(best) & set(reference):
        best.append(reference[0])
    others = list(dict.fromkeys(flavor for engine in engines for flavor in engine.flavors[1:]))

    def export(flavors: Sequence[Flavor]) -> BundleManifest:
        checkpoint, like = level.directory / "checkpoint", level.out / "0" / "bundle"
        return export_checkpoint(
            *(checkpoint, bundle, flavors),
            calibration=level.calibration,
            name=level.source.name,
            like=like,
            reporter=reporter,
        )

    try:
        made = set(export(best).flavors)
    except UnsupportedFamily:
        if not others:
            raise
        made = set()
    if not all(made & set(engine.flavors) for engine in engines) and others:
        export(others)
