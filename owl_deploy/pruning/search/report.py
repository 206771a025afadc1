"""What a search leaves beside the checkpoint: its allocation, its log, and a picture of both."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from owl_deploy.files import write_json, write_text
from owl_deploy.models.structure import without_indices
from owl_deploy.plotting import COLOURS, MARKERS, save_figure
from owl_deploy.pruning.manifest import SearchRecord
from owl_deploy.pruning.plan import PruningPlan


def write_search(log: Sequence[SearchRecord], plan: PruningPlan, directory: Path) -> None:
    """Write `search.json`, which `--allocation` reads, `search.csv`, the best so far, and `search.png`."""
    found = dict(plan.linear_sparsities or {})
    grids = plan.linear_weights
    write_json(
        directory / "search.json",
        {name: {"sparsity": value, "weights": grids[name]} for name, value in found.items()} if grids else found,
    )
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["generation", "kl"])
    rows.writerows([entry.generation, entry.kl] for entry in log)
    write_text(directory / "search.csv", text.getvalue())
    _plot(log, found, directory / "search.png")


def _plot(log: Sequence[SearchRecord], found: Mapping[str, float], path: Path) -> None:
    """KL by generation, and the sparsity of every linear by block, beside where the search began (OWL)."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    progress, chosen = figure.subplots(1, 2, width_ratios=[1, 2])
    progress.plot(
        [entry.generation for entry in log], [entry.kl for entry in log], color=COLOURS[0], drawstyle="steps-post"
    )
    progress.set_xlabel("generation")
    progress.set_ylabel("KL to the dense model, nats a token")
    kinds: dict[str, list[int]] = {}
    for index, name in enumerate(found):
        kinds.setdefault(without_indices(name).rpartition(".")[2], []).append(index)
    for number, (kind, indices) in enumerate(kinds.items()):
        values = [100 * log[-1].sparsities[index] for index in indices]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        chosen.plot(range(len(values)), values, label=kind, linestyle="none", alpha=0.8, **style)
    first = next(iter(kinds.values()))
    chosen.plot(range(len(first)), [100 * log[0].sparsities[index] for index in first], color="#444444", label="OWL")
    chosen.set_xlabel("block")
    chosen.set_ylabel("sparsity (%)")
    chosen.legend(loc="best", ncols=2)
    save_figure(figure, path)
