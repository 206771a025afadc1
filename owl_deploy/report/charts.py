"""Each chart once, in the units of its figures: `plots.py` draws it as PNG, `page/drawing.py` as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from matplotlib.ticker import LogLocator, MaxNLocator

from owl_deploy.benchmarking.rows import Row, Spread
from owl_deploy.formatting import number, percent, perplexity_text
from owl_deploy.paper.speedups import TABLE_8
from owl_deploy.plotting import COLOURS, MARKERS
from owl_deploy.report.pareto import Point, padded, points_of, steps_along
from owl_deploy.report.series import Series, by_series, by_workload

Spots = list[tuple[float, float]]

_PAPER = "the paper's Table 8 (TinyLlama-1.1B, DeepSparse over its own dense)"
_SUBDIVISIONS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
_MOST_TICKS = 11


@dataclass(frozen=True)
class Style:
    """How one series is drawn in every chart: a colour and, for who cannot tell colours, a marker.

    Attributes:
        colour, marker: indices into `COLOURS` and `MARKERS`.
    """

    colour: int
    marker: int


@dataclass(frozen=True)
class Axis:
    """What an axis spans, in its own units."""

    title: str
    low: float
    high: float
    logarithmic: bool = False

    def ticks(self, about: int = 6) -> list[tuple[float, str]]:
        """Round values between the ends, and how they are written: about so many; on a log scale as can be read."""
        if self.logarithmic:
            choices = [self._inside(LogLocator(subs=subs).tick_values(self.low, self.high)) for subs in _SUBDIVISIONS]
            values = next((choice for choice in choices if len(choice) <= _MOST_TICKS), choices[-1])
        else:
            values = self._inside(MaxNLocator(about, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high))
        return [(value, _tick_label(value)) for value in values]

    def _inside(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class Mark:
    """One row on a chart.

    Attributes:
        tip: what it is and what it measures, in words.
        low, high: the ends of its error bar.
        label: what stands beside it where there is room.
    """

    x: float
    y: float
    series: str
    tip: str
    low: float | None = None
    high: float | None = None
    is_strong: bool = False
    label: str = ""


@dataclass(frozen=True)
class Line:
    """Points joined; `series` is None for what belongs to no engine, which `label` then names."""

    spots: Spots
    series: str | None
    kind: Literal["series", "paper", "front", "one"] = "series"
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart with axes; marks come with the most important first."""

    name: str
    x: Axis
    y: Axis
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A style for every series, by its name among the rows of its workload; no two alike up to 36 series."""
    names = dict.fromkeys(one.name for here in by_workload(rows).values() for one in by_series(here))
    return {
        name: Style(index % len(COLOURS), (index + index // len(COLOURS)) % len(MARKERS))
        for index, name in enumerate(names)
    }


def speedup_chart(
    rows: Sequence[Row], speedup: Literal["speedup_same_engine", "speedup_fastest_dense"]
) -> Chart | None:
    """Speed-up by sparsity of one workload's rows, with error bars; beside it the paper's. None without any."""
    curves = _curves(rows, lambda row: getattr(row, speedup))
    if not curves:
        return None
    own = speedup == "speedup_same_engine"
    marks = [_speedup_mark(one, row, value, row.spread_of(speedup)) for one, here in curves for row, value in here]
    highest = max(max(mark.high or mark.y for mark in marks), TABLE_8[-1].speedup if own else 0)
    x = _sparsity_axis()
    paper = [(100 * figure.sparsity, figure.speedup) for figure in TABLE_8]
    over = "the same engine’s dense model" if own else "the fastest dense fp32 row"
    return Chart(
        name=f"Decode speed-up over {over}, by sparsity",
        x=x,
        y=Axis("times as fast (bars: 95% confidence)", 0, 1.06 * highest),
        lines=[
            Line([(x.low, 1), (x.high, 1)], None, "one"),
            *([Line(paper, None, "paper", _PAPER)] if own else []),
            *_lines(curves),
        ],
        marks=marks,
    )


def perplexity_chart(rows: Sequence[Row]) -> Chart | None:
    """Perplexity by sparsity of one workload's rows, on a log scale; None without any."""
    curves = _curves(rows, lambda row: row.perplexity)
    if not curves:
        return None
    values = [value for _, here in curves for _, value in here]
    return Chart(
        name="Perplexity, computed by each engine",
        x=_sparsity_axis(),
        y=Axis("perplexity (log scale)", min(values) / 2, 2 * max(values), logarithmic=True),
        lines=_lines(curves),
        marks=[
            Mark(_percent(row), value, one.name, f"{one.name}, {one.label(row)}: perplexity {perplexity_text(value)}")
            for one, here in curves
            for row, value in here
        ],
    )


def pareto_chart(rows: Sequence[Row]) -> Chart | None:
    """Perplexity against decode time of one workload's rows, on log scales; None without any."""
    points = sorted(points_of(rows), key=lambda point: (not point.in_front, point.decode_ms))
    if not points:
        return None
    front = [(point.decode_ms, point.perplexity) for point in points if point.in_front]
    return Chart(
        name="Perplexity against decode time",
        x=Axis("decode ms/token, p50 (log scale)", *padded([point.decode_ms for point in points]), logarithmic=True),
        y=Axis("perplexity (log scale)", *padded([point.perplexity for point in points]), logarithmic=True),
        lines=[Line(steps_along(front), None, "front", "Pareto front")],
        marks=[
            Mark(
                *(point.decode_ms, point.perplexity, point.series, _pareto_tip(point)),
                is_strong=point.in_front,
                label=point.label,
            )
            for point in points
        ],
    )


Curve = tuple[Series, list[tuple[Row, float]]]


def _curves(rows: Sequence[Row], figure: Callable[[Row], float | None]) -> list[Curve]:
    """Of each series the rows that have this figure, and a finite one."""
    found = [
        (one, [(row, value) for row in one.rows if (value := figure(row)) is not None and math.isfinite(value)])
        for one in by_series(rows)
    ]
    return [(one, here) for one, here in found if here]


def _lines(curves: Sequence[Curve]) -> list[Line]:
    return [Line([(_percent(row), value) for row, value in here], one.name) for one, here in curves if len(here) > 1]


def _sparsity_axis() -> Axis:
    return Axis("sparsity of the block linears, %", -3, 103)


def _percent(row: Row) -> float:
    return 100 * row.sparsity_achieved


def _speedup_mark(series: Series, row: Row, value: float, spread: Spread | None) -> Mark:
    low, high = _uncertainty(spread) or (value, value)
    tip = f"{series.name}, {series.label(row)}: {_interval(value, spread)}"
    return Mark(_percent(row), value, series.name, tip, low=min(low, value), high=max(high, value))


def _uncertainty(spread: Spread | None) -> tuple[float, float] | None:
    """The 95% confidence interval; the slowest and the fastest round where it is not known."""
    if spread is None:
        return None
    if spread.confidence_low is None or spread.confidence_high is None:
        return spread.low, spread.high
    return spread.confidence_low, spread.confidence_high


def _interval(value: float, spread: Spread | None) -> str:
    if spread is None:
        return f"{value:.2f}x"
    if spread.confidence_low is None or spread.confidence_high is None:
        return f"{value:.2f}x, rounds from {spread.low:.2f} to {spread.high:.2f}"
    return f"{value:.2f}x, 95% confidence {spread.confidence_low:.2f} to {spread.confidence_high:.2f}"


def _pareto_tip(point: Point) -> str:
    row = point.row
    achieved = "" if row.is_dense else f" ({percent(round(row.sparsity_achieved, 4))} achieved)"
    front = "; on the Pareto front" if point.in_front else ""
    return (
        f"{point.label}{achieved}: {number(point.decode_ms)} ms/token, perplexity "
        f"{perplexity_text(point.perplexity)}{front}"
    )


def _tick_label(value: float) -> str:
    if value >= 1e6:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
