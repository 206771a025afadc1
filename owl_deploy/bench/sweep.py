"""A sweep: one model, pruned and exported at several sparsities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from owl_deploy.checkpoints.source import ModelSource
from owl_deploy.engines.registry import EngineSpec
from owl_deploy.errors import UnsupportedFamily
from owl_deploy.export.run import export_checkpoint
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.run import Calibration, prune_checkpoint
from owl_deploy.reporting import Reporter


def make_levels(
    source: ModelSource,
    out: Path,
    sparsities: list[float],
    plan: Mapping[str, Any],
    calibration: Calibration,
    engines: Sequence[EngineSpec],
    *,
    reporter: Reporter,
) -> list[Path]:
    """Prune and export `source` at every sparsity, for these engines, reusing what is there; the bundles' directories.

    All levels are pruned from the dense level's checkpoint, so a GGUF file is converted once, and share the dense
    model's input statistics.

    Args:
        plan: the fields of each level's `PruningPlan`, but for the sparsity.

    Raises:
        UserError: see `prune_checkpoint` and `export_checkpoint`.
    """
    plans = {sparsity: PruningPlan(sparsity, **plan) for sparsity in sparsities}  # mistakes are told before the work
    bundles = []
    dense = out / "0" / "checkpoint"
    prune_checkpoint(source, dense, PruningPlan(0.0), calibration, reporter=reporter)
    for sparsity in sparsities:
        reporter.step(f"sparsity {sparsity:g}")
        level = out / f"{sparsity:g}"
        if sparsity > 0:
            prune_checkpoint(
                ModelSource(source.name, dense),
                level / "checkpoint",
                plans[sparsity],
                calibration,
                statistics_file=out / "statistics.safetensors",
                reporter=reporter,
            )
        bundle = level / "bundle"
        _export(level / "checkpoint", bundle, engines, reporter)
        bundles.append(bundle)
    return bundles


def _export(checkpoint: Path, bundle: Path, engines: Sequence[EngineSpec], reporter: Reporter) -> None:
    """The flavor that each engine runs best; the next best ones where a family has no graph of that flavor."""
    best = list(dict.fromkeys(engine.flavors[0] for engine in engines))
    others = list(dict.fromkeys(flavor for engine in engines for flavor in engine.flavors[1:]))
    try:
        made = set(export_checkpoint(checkpoint, bundle, best, reporter=reporter).flavors)
    except UnsupportedFamily:
        if not others:
            raise
        made = set()
    if not all(made & set(engine.flavors) for engine in engines) and others:
        export_checkpoint(checkpoint, bundle, others, reporter=reporter)
