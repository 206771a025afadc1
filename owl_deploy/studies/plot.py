"""The plots of studies: curves over sparsity or depth, bars, and grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from owl_deploy.formatting import perplexity_text
from owl_deploy.plotting import COLOURS, MARKERS, scale_logarithmically
from owl_deploy.studies.cells import CellRecord

Points = Sequence[tuple[float, float]]
_STYLES = ("-", "--", ":", "-.")  # for curves after the last colour


def curves(axes: Axes, series: Mapping[str, Points]) -> None:
    """One curve per name, through its finite points (x, y)."""
    for index, (name, points) in enumerate(series.items()):
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        axes.plot(
            [x for x, _ in finite],
            [y for _, y in finite],
            color=COLOURS[index % len(COLOURS)],
            linestyle=_STYLES[index // len(COLOURS) % len(_STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            label=name,
        )
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def perplexity_curves(figure: Figure, panels: Mapping[str, Mapping[str, Points]], dense: float | None) -> None:
    """Perplexity (log axis) over sparsity (fractions), and the dense model's; a name has the same style everywhere."""
    names = list(dict.fromkeys(chain(*panels.values())))
    points = [(x, y) for series in panels.values() for line in series.values() for x, y in line]
    values = [y for _, y in points if math.isfinite(y)]
    every_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, series) in zip(every_axes, panels.items(), strict=True):
        curves(axes, {name: [(100 * x, y) for x, y in series.get(name, ())] for name in names})
        if dense is not None and math.isfinite(dense):
            axes.axhline(dense, color="#888888", linewidth=1, label="dense")
            values.append(dense)
        axes.set_title(title)
        axes.set_xlabel("sparsity achieved (%)")
    every_axes[0].set_ylabel("perplexity (log scale)")
    if values:
        scale_logarithmically(every_axes[0], values)
    figure.legend(*every_axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


def bars(figure: Figure, values: Mapping[str, float], x_label: str) -> None:
    """One horizontal bar per name, on a log axis, the first on top."""
    axes = figure.subplots()
    drawn = axes.barh(list(values), list(values.values()), color=COLOURS[0])
    axes.bar_label(drawn, [f"{value:.3g}" for value in values.values()], padding=4)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(values.values()) / 2, max(values.values()) * 3)
    axes.set_xlabel(x_label)
    axes.spines[["top", "right"]].set_visible(False)


def perplexity_grid(
    axes: Axes, rows: Sequence[float], columns: Sequence[float], perplexity: Mapping[tuple[float, float], float]
) -> None:
    """Perplexity by (row, column), as colours and figures, the lowest in bold."""
    values = [[perplexity[row, column] for column in columns] for row in rows]
    finite = [value for value in perplexity.values() if math.isfinite(value)]
    scale = LogNorm(min(finite), max(finite)) if finite and min(finite) < max(finite) else None
    axes.imshow(values, norm=scale, cmap="Blues", aspect="auto", alpha=0.6)
    best = min(finite, default=None)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            weight = "bold" if value == best else "normal"
            axes.text(x, y, perplexity_text(value), ha="center", va="center", fontweight=weight)
    axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
    axes.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])


def by_name(cells: Sequence[CellRecord], labels: Sequence[str]) -> dict[str, Points]:
    """(sparsity achieved, perplexity) of all pruned cells, in series of equal values of these labels."""
    series: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        if cell.sparsity_asked > 0 and cell.perplexity is not None:
            name = ", ".join(filter(None, (cell.labels[label] for label in labels)))
            series.setdefault(name, []).append((cell.sparsity_achieved, cell.perplexity))
    return dict(series)
