"""The paper's Figure 1 for one pruned model: LOD as bars, block sparsity as a line."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from owl_deploy.pruning.manifest import PruningManifest


def plot_allocation(manifest: PruningManifest, path: Path) -> None:
    """Write a PNG with each block's achieved sparsity over the uniform one and, where measured, its LOD."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    sparsity_axis = figure.subplots()
    positions = range(len(manifest.blocks))
    lod = [block.lod_percent for block in manifest.blocks if block.lod_percent is not None]
    if lod:
        lod_axis = sparsity_axis.twinx()
        lod_axis.bar(positions, lod, color="#c9d6e8", label="LOD")
        lod_axis.set_ylabel("LOD (% of weights that are outliers)")
        sparsity_axis.set_zorder(lod_axis.get_zorder() + 1)
        sparsity_axis.patch.set_visible(False)
    achieved = [100 * block.sparsity_achieved for block in manifest.blocks]
    label = f"{manifest.plan['allocation']}, {manifest.plan['method']}"
    sparsity_axis.plot(positions, achieved, marker="o", markersize=4, color="#1f4e8c", label=label)
    sparsity_axis.axhline(100 * manifest.sparsity_asked, linestyle="--", color="#b3541e", label="uniform")
    sparsity_axis.set_xlabel("block")
    sparsity_axis.set_ylabel("sparsity (%)")
    sparsity_axis.set_title(f"{Path(manifest.model).name} at {manifest.sparsity_asked:.0%} sparsity")
    sparsity_axis.legend(loc="best")
    figure.savefig(path, dpi=120, metadata={"Software": None})
