"""The charts of a report as PNG: what sparsity gains in speed, and what it costs in perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import IdentityTransform

from owl_deploy.benchmarking.rows import Row
from owl_deploy.plotting import COLOURS, DPI, MARKERS, save_figure
from owl_deploy.report.charts import Chart, Mark, Style, pareto_chart, perplexity_chart, speedup_chart, styles
from owl_deploy.report.pareto import Box, boxes_along, place_labels
from owl_deploy.report.series import by_series, by_workload, model_names

_NESTED = 4  # curves: with more, the widest would cover all else
_LINES: dict[str, dict[str, Any]] = {
    "one": {"color": "#888888", "linewidth": 1},
    "paper": {"color": "#444444", "linestyle": "--"},
    "front": {"color": "#444444", "linestyle": "--", "linewidth": 1, "zorder": 1},
}


def plot_speedup(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with speed-up, and with perplexity if it was measured, by sparsity achieved.

    Speed-up is over the same engine's dense model; where an engine has none, all are drawn over the fastest dense fp32
    engine instead. Each workload has its own axes. Failed rows and missing figures are left out. Equal rows give equal
    bytes.

    Raises:
        UserError: `path` cannot be written.
    """
    workloads, drawn_as = by_workload(rows), styles(rows)
    has_perplexity = any(row.perplexity is not None for row in rows)
    figure = Figure(figsize=(11, 0.9 + 4.1 * len(workloads)), layout="constrained")
    parts = figure.subfigures(len(workloads), 1, squeeze=False)[:, 0]
    for (name, here), part in zip(workloads.items(), parts, strict=True):
        part.suptitle(name or None, fontsize="medium", fontweight="bold")
        speed, *quality = part.subplots(1, 1 + has_perplexity, squeeze=False)[0]
        has_own = all(row.speedup_same_engine is not None for one in by_series(here) for row in one.sparse)
        _draw(speed, speedup_chart(here, "speedup_same_engine" if has_own else "speedup_fastest_dense"), drawn_as)
        for axes in quality:
            _draw(axes, perplexity_chart(here), drawn_as, are_nested=True)
    figure.suptitle(model_names(rows))
    _legend(figure)
    save_figure(figure, path)


def plot_pareto(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with every row's perplexity against its decode time, and the front of those that none beats in both.

    Each workload has its own axes. Equal rows give equal bytes.

    Raises:
        UserError: `path` cannot be written.
    """
    workloads, drawn_as = by_workload(rows), styles(rows)
    figure = Figure(figsize=(11, 0.9 + 5.6 * len(workloads)), dpi=DPI, layout="constrained")
    every_axes = figure.subplots(len(workloads), 1, squeeze=False)[:, 0]
    charts = [pareto_chart(here) for here in workloads.values()]
    for axes, chart, name in zip(every_axes, charts, workloads, strict=True):
        _draw(axes, chart, drawn_as)
        axes.set_title("\n".join(filter(None, [name, axes.get_title(), "lower and further left is better"])))
    figure.suptitle(model_names(rows))
    _legend(figure)
    figure.draw_without_rendering()  # only now it is known where axes and texts are
    for axes, chart in zip(every_axes, charts, strict=True):
        if chart is not None:
            _label_marks(axes, chart)
    save_figure(figure, path)


def _draw(axes: Axes, chart: Chart | None, drawn_as: Mapping[str, Style], *, are_nested: bool = False) -> None:
    """A chart on its axes.

    Args:
        are_nested: engines agree on these figures, so each of a few curves is narrower than the one it covers.
    """
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if chart is None:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#666666")
        return
    axes.set_title(chart.name, fontsize="medium")
    for scale, axis, limits, which in (
        (axes.set_xscale, chart.x, axes.set_xlim, axes.xaxis),
        (axes.set_yscale, chart.y, axes.set_ylim, axes.yaxis),
    ):
        scale("log" if axis.logarithmic else "linear")
        limits(axis.low, axis.high)
        values, labels = zip(*axis.ticks(11 if which is axes.xaxis else 6), strict=True)
        which.set_ticks(values, labels)
        which.set_minor_locator(NullLocator())
        which.set_label_text(axis.title)
    for line in chart.lines:
        if line.series is None:
            axes.plot(*zip(*line.spots, strict=True), **_LINES[line.kind], label=line.label or None)
    joined = {line.series for line in chart.lines}
    names = [name for name in drawn_as if any(mark.series == name for mark in chart.marks)]
    for index, name in enumerate(names):
        rest = len(names) - 1 - index if are_nested and len(names) <= _NESTED else 0
        marks = [mark for mark in chart.marks if mark.series == name]
        _draw_series(axes, marks, drawn_as[name], is_joined=name in joined, wider=rest)


def _draw_series(axes: Axes, marks: Sequence[Mark], style: Style, *, is_joined: bool, wider: int) -> None:
    """Marks of one series with their error bars, those that stand out larger and on top."""
    colour, marker = COLOURS[style.colour], MARKERS[style.marker]
    axes.errorbar(
        [mark.x for mark in marks],
        [mark.y for mark in marks],
        yerr=(
            [mark.y - (mark.y if mark.low is None else mark.low) for mark in marks],
            [(mark.y if mark.high is None else mark.high) - mark.y for mark in marks],
        ),
        color=colour,
        marker=marker,
        markersize=6 + 5 * wider,
        markeredgecolor="#222222",
        markeredgewidth=0.4,
        linestyle="-" if is_joined else "none",
        linewidth=1.5 + 3 * wider,
        capsize=4 if any(mark.low != mark.high for mark in marks) else 0,
        label=marks[0].series,
    )
    strong = [mark for mark in marks if mark.is_strong]
    axes.scatter(
        [mark.x for mark in strong],
        [mark.y for mark in strong],
        s=70,
        color=colour,
        edgecolors="#222222",
        linewidths=1.4,
        marker=marker,
        zorder=3,
    )


def _legend(figure: Figure) -> None:
    """One for all axes, each name once."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)


def _label_marks(axes: Axes, chart: Chart) -> None:
    """Name the marks that there is room for, the most important first."""
    texts = [axes.text(0, 0, mark.label, fontsize=8, alpha=1 if mark.is_strong else 0.75) for mark in chart.marks]
    sizes = [(extent.width, extent.height) for extent in (text.get_window_extent() for text in texts)]
    window = axes.get_window_extent()

    def pixels(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """From the top, as labels are placed; matplotlib counts them from the bottom."""
        return [(float(x), -float(y)) for x, y in axes.transData.transform(spots)]

    anchors = pixels([(mark.x, mark.y) for mark in chart.marks])
    frame = Box(window.x0, -window.y1, window.width, window.height)
    taken = [box for line in chart.lines for box in boxes_along(pixels(line.spots))]
    for text, box in zip(texts, place_labels(anchors, sizes, frame, marker=11, taken=taken), strict=True):
        if box is None:
            text.remove()
            continue
        text.set_transform(IdentityTransform())
        text.set_position((box.left, -(box.top + box.height)))
        text.set_verticalalignment("bottom")
        text.set_in_layout(False)  # or the axes would move from under it
