"""The plots of a report: what sparsity gains in speed, and what it costs in perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import IdentityTransform

from owl_deploy.bench.rows import Row, Spread
from owl_deploy.paper.speedups import TABLE_8
from owl_deploy.plotting import COLOURS, DPI, MARKERS, save_figure, scale_logarithmically
from owl_deploy.report.pareto import Box, Point, boxes_along, front_of, padded, place_labels, points_of, steps_along
from owl_deploy.report.series import Series, by_series, by_workload, model_names

_NESTED = 4  # curves: with more, the widest would cover all else
_PAPER_LABEL = "the paper's Table 8 (TinyLlama-1.1B, DeepSparse over its own dense)"


@dataclass(frozen=True)
class Style:
    """How one series is drawn in every plot: a colour and, for who cannot tell colours, a marker.

    Attributes:
        colour, marker: indices into `COLOURS` and `MARKERS`.
    """

    colour: int
    marker: int


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A style for every series, by its name among the rows of its workload; no two alike up to 36 series."""
    names = dict.fromkeys(one.name for here in by_workload(rows).values() for one in by_series(here))
    return {
        name: Style(index % len(COLOURS), (index + index // len(COLOURS)) % len(MARKERS))
        for index, name in enumerate(names)
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
    draw = [_draw_speedups, *([_draw_perplexities] if any(row.perplexity is not None for row in rows) else [])]
    figure = Figure(figsize=(11, 0.9 + 4.1 * len(workloads)), layout="constrained")
    parts = figure.subfigures(len(workloads), 1, squeeze=False)[:, 0]
    for (name, here), part in zip(workloads.items(), parts, strict=True):
        every_axes = part.subplots(1, len(draw), squeeze=False)[0]
        part.suptitle(name or None, fontsize="medium", fontweight="bold")
        series = by_series(here)
        for draw_into, axes in zip(draw, every_axes, strict=True):
            draw_into(axes, series, drawn_as)
            axes.set_xlim(-3, 103)
            axes.set_xticks(range(0, 101, 10))
            axes.set_xlabel("sparsity of the block linears (%)")
            _tidy(axes)
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
    drawn = [(axes, points_of(here)) for axes, here in zip(every_axes, workloads.values(), strict=True)]
    for (axes, points), name in zip(drawn, workloads, strict=True):
        _draw_pareto(axes, points, drawn_as)
        axes.set_title(
            "\n".join(filter(None, [name, "perplexity against decode time: lower and further left is better"]))
        )
        _tidy(axes)
    figure.suptitle(model_names(rows))
    _legend(figure)
    figure.draw_without_rendering()  # only now it is known where axes and texts are
    for axes, points in drawn:
        _label_points(axes, points)
    save_figure(figure, path)


def _tidy(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    """One for all axes, each name once."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)


def _draw_pareto(axes: Axes, points: Sequence[Point], drawn_as: Mapping[str, Style]) -> None:
    axes.set_xlabel("decode ms/token, p50 (log scale)")
    axes.set_ylabel("perplexity (log scale)")
    if not points:
        axes.set_xticks([])
        _nothing(axes)
        return
    front = front_of(points)
    axes.plot(
        *zip(*steps_along([(point.decode_ms, point.perplexity) for point in front]), strict=True),
        color="#444444",
        linewidth=1,
        linestyle="--",
        label="Pareto front",
        zorder=1,
    )
    for name, style in drawn_as.items():
        here = [point for point in points if point.series == name]
        if here:
            axes.scatter(
                [point.decode_ms for point in here],
                [point.perplexity for point in here],
                s=[70 if point.in_front else 36 for point in here],
                color=COLOURS[style.colour],
                edgecolors="#222222",
                linewidths=[1.4 if point.in_front else 0.4 for point in here],
                marker=MARKERS[style.marker],
            )
            axes.plot([], [], MARKERS[style.marker], color=COLOURS[style.colour], markeredgecolor="#222222", label=name)
    times, perplexities = [point.decode_ms for point in points], [point.perplexity for point in points]
    scale_logarithmically(axes, perplexities)
    axes.set_ylim(*padded(perplexities))
    if max(perplexities) < 30 * min(perplexities):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.set_xscale("log")
    axes.set_xlim(*padded(times))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Name the points that there is room for, those of the front before others."""
    if not points:
        return
    ordered = sorted(points, key=lambda point: (not point.in_front, point.decode_ms))
    texts = [axes.text(0, 0, point.label, fontsize=8, alpha=1 if point.in_front else 0.75) for point in ordered]
    sizes = [(extent.width, extent.height) for extent in (text.get_window_extent() for text in texts)]
    window = axes.get_window_extent()
    # Pixels from the top, as labels are placed; matplotlib counts them from the bottom.
    pixels = axes.transData.transform([(point.decode_ms, point.perplexity) for point in ordered])
    anchors = [(float(x), -float(y)) for x, y in pixels]
    frame = Box(window.x0, -window.y1, window.width, window.height)
    steps = steps_along([spot for spot, point in zip(anchors, ordered, strict=True) if point.in_front])
    for text, box in zip(texts, place_labels(anchors, sizes, frame, marker=11, taken=boxes_along(steps)), strict=True):
        if box is None:
            text.remove()
            continue
        text.set_transform(IdentityTransform())
        text.set_position((box.left, -(box.top + box.height)))
        text.set_verticalalignment("bottom")
        text.set_in_layout(False)  # or the axes would move from under it


def _draw_speedups(axes: Axes, series: Sequence[Series], drawn_as: Mapping[str, Style]) -> None:
    axes.axhline(1, color="#888888", linewidth=1)
    axes.plot(
        [100 * figure.sparsity for figure in TABLE_8],
        [figure.speedup for figure in TABLE_8],
        linestyle="--",
        color="#444444",
        label=_PAPER_LABEL,
    )
    sparse = [one for one in series if one.sparse]
    own = all(one.dense for one in sparse)
    speedup = "speedup_same_engine" if own else "speedup_fastest_dense"
    for one in sparse:
        rows, speedups = _finite(one, lambda row: getattr(row, speedup))
        axes.errorbar(
            _percentages(rows),
            speedups,
            yerr=_error_bars([row.spread_of(speedup) for row in rows], speedups),
            color=COLOURS[drawn_as[one.name].colour],
            marker=MARKERS[drawn_as[one.name].marker],
            markersize=6,
            capsize=4,
            label=one.name,
        )
    axes.set_ylim(bottom=0)
    over = "same engine's dense model" if own else "fastest dense fp32 engine"
    axes.set_title(f"decode speed-up over the {over}")
    axes.set_ylabel("times as fast (bars: 95% confidence)")


def _draw_perplexities(axes: Axes, series: Sequence[Series], drawn_as: Mapping[str, Style]) -> None:
    """Engines agree on perplexity, so each of a few curves is narrower than the one it covers."""
    values: list[float] = []
    for index, one in enumerate(series):
        rows, perplexities = _finite(one, lambda row: row.perplexity)
        values += perplexities
        rest = len(series) - 1 - index
        axes.plot(
            _percentages(rows),
            perplexities,
            color=COLOURS[drawn_as[one.name].colour],
            marker=MARKERS[drawn_as[one.name].marker],
            markersize=5 + (5 * rest if len(series) <= _NESTED else 0),
            linewidth=1.5 + (3 * rest if len(series) <= _NESTED else 0),
            label=one.name,
        )
    axes.set_title("perplexity, computed by each engine")
    axes.set_ylabel("perplexity (log scale)")
    if values:
        scale_logarithmically(axes, values)
    else:
        _nothing(axes)


def _nothing(axes: Axes) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#666666")


def _finite(series: Series, figure: Callable[[Row], float | None]) -> tuple[list[Row], list[float]]:
    """The rows that have this figure, and a finite one; and the figures."""
    found = [(row, value) for row in series.rows if (value := figure(row)) is not None and math.isfinite(value)]
    return [row for row, _ in found], [value for _, value in found]


def _percentages(rows: Sequence[Row]) -> list[float]:
    return [100 * row.sparsity_achieved for row in rows]


def _error_bars(spreads: Sequence[Spread | None], speedups: Sequence[float]) -> tuple[list[float], list[float]]:
    """Lengths below and above each speed-up; none where a row has no spread."""
    bars = [uncertainty(spread) or (value, value) for spread, value in zip(spreads, speedups, strict=True)]
    below = [max(0.0, value - low) for value, (low, _) in zip(speedups, bars, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(speedups, bars, strict=True)]
    return below, above


def uncertainty(spread: Spread | None) -> tuple[float, float] | None:
    """The 95% confidence interval; the slowest and the fastest round where it is not known."""
    if spread is None:
        return None
    if spread.confidence_low is None or spread.confidence_high is None:
        return spread.low, spread.high
    return spread.confidence_low, spread.confidence_high
