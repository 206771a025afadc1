"""The plot of a report: what sparsity gains in speed, and what it costs in perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from owl_deploy.bench.rows import Row
from owl_deploy.files import disk_errors
from owl_deploy.report.paper import TABLE_8
from owl_deploy.report.series import Series, by_series, model_name
from owl_deploy.report.text import enumeration

# Okabe and Ito's colours, which the colour-blind can tell apart too; markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
_PAPER_LABEL = "the paper's Table 8 (TinyLlama-1.1B, DeepSparse)"


def plot_speedup(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with speed-up over the same engine's dense model, and perplexity, by sparsity achieved.

    Failed rows and missing figures are left out. Equal rows give equal bytes.

    Raises:
        UserError: `path` cannot be written.
    """
    series = by_series(rows)
    figure = Figure(figsize=(11, 5), layout="constrained")
    speed_axes, perplexity_axes = figure.subplots(1, 2)
    _draw_speedups(speed_axes, series)
    _draw_perplexities(perplexity_axes, series)
    for axes in (speed_axes, perplexity_axes):
        axes.set_xlim(-3, 103)
        axes.set_xticks(range(0, 101, 10))
        axes.set_xlabel("sparsity of the block linears (%)")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(enumeration(sorted({model_name(row) for row in rows})))
    figure.legend(*speed_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def _draw_speedups(axes: Axes, series: Sequence[Series]) -> None:
    axes.axhline(1, color="#888888", linewidth=1)
    axes.plot(
        [100 * figure.sparsity for figure in TABLE_8],
        [figure.speedup for figure in TABLE_8],
        linestyle="--",
        color="#444444",
        label=_PAPER_LABEL,
    )
    for index, one in enumerate(series):
        rows, speedups = _finite(one, lambda row: row.speedup_same_engine)
        axes.errorbar(
            _percentages(rows),
            speedups,
            yerr=_error_bars(rows, speedups),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=6,
            capsize=4,
            label=one.name,
        )
    axes.set_ylim(bottom=0)
    axes.set_title("decode speed-up over the same engine's dense model")
    axes.set_ylabel("times as fast (bars: slowest and fastest round)")


def _draw_perplexities(axes: Axes, series: Sequence[Series]) -> None:
    """Engines agree on perplexity, so each curve is narrower than the one it covers."""
    values: list[float] = []
    for index, one in enumerate(series):
        rows, perplexities = _finite(one, lambda row: row.perplexity)
        values += perplexities
        rest = len(series) - 1 - index
        axes.plot(
            _percentages(rows),
            perplexities,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5 + 5 * rest,
            linewidth=1.5 + 3 * rest,
        )
    axes.set_title("perplexity, computed by each engine")
    axes.set_ylabel("perplexity (log scale)")
    if values:
        scale_logarithmically(axes, values)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#666666")


def scale_logarithmically(axes: Axes, values: Sequence[float]) -> None:
    """A log axis with plain numbers, never so narrow that it has no tick."""
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 2, max(values) * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finite(series: Series, figure: Callable[[Row], float | None]) -> tuple[list[Row], list[float]]:
    """The rows that have this figure, and a finite one; and the figures."""
    found = [(row, value) for row in series.rows if (value := figure(row)) is not None and math.isfinite(value)]
    return [row for row, _ in found], [value for _, value in found]


def _percentages(rows: Sequence[Row]) -> list[float]:
    return [100 * row.sparsity_achieved for row in rows]


def _error_bars(rows: Sequence[Row], speedups: Sequence[float]) -> tuple[list[float], list[float]]:
    """Lengths below and above each speed-up; none where a row has no spread."""
    spreads = [row.speedup_same_engine_spread for row in rows]
    pairs = list(zip(speedups, spreads, strict=True))
    below = [max(0.0, speedup - spread.low) if spread else 0.0 for speedup, spread in pairs]
    above = [max(0.0, spread.high - speedup) if spread else 0.0 for speedup, spread in pairs]
    return below, above


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all; equal figures give equal bytes."""
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        try:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
