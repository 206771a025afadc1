"""Charts as numbers: what the page's template draws as SVG, in pixels from the top left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from matplotlib.ticker import LogLocator, MaxNLocator

from owl_deploy.bench.rows import Row, Spread
from owl_deploy.formatting import number, percent, perplexity_text
from owl_deploy.paper.speedups import TABLE_8
from owl_deploy.report.pareto import Box, Point, boxes_along, padded, place_labels, points_of, steps_along
from owl_deploy.report.plots import Style, uncertainty
from owl_deploy.report.series import by_series

_WIDTH, _HEIGHT = 560, 380
_FRAME = Box(54, 14, 490, 314)
_PARETO_WIDTH, _PARETO_HEIGHT = 1120, 520
_PARETO_FRAME = Box(64, 14, 1040, 454)
_LABEL_HEIGHT, _CHARACTER_WIDTH = 14.0, 6.3  # of the page's small sans-serif
_MARKER = 13.0
_STRIP_WIDTH, _STRIP_ROW, _STRIP_AXIS = 640, 12, 34
_STRIP_LEFT, _STRIP_RIGHT = 64, 14
_SUBDIVISIONS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
_MOST_TICKS = 11


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Values on pixels: `low` at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, about: int = 6) -> list[Tick]:
        """Round values between the ends: about so many, or on a log scale as many as can be read."""
        if self.logarithmic:
            choices = [self._inside(LogLocator(subs=subs).tick_values(self.low, self.high)) for subs in _SUBDIVISIONS]
            values = next((choice for choice in choices if len(choice) <= _MOST_TICKS), choices[-1])
        else:
            values = self._inside(MaxNLocator(about, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high))
        return [Tick(self.at(value), _tick_label(value)) for value in values]

    def _inside(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class Mark:
    """One row on a chart.

    Attributes:
        tip: what it is and what it measures, in words.
        low, high: the ends of its error bar.
    """

    x: float
    y: float
    series: str
    tip: str
    low: float | None = None
    high: float | None = None
    is_strong: bool = False


@dataclass(frozen=True)
class Line:
    """A path of points; `series` is None for what belongs to no engine."""

    path: str
    series: str | None
    kind: Literal["series", "paper", "front", "one"] = "series"


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    series: str | None
    is_strong: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with axes."""

    width: int
    height: int
    frame: Box
    name: str
    x_title: str
    y_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


@dataclass(frozen=True)
class Strip:
    """Every sample of a row on one axis, a line of strokes per round; `medians` are the rounds'."""

    width: int
    height: int
    name: str
    ticks: list[Tick]
    rounds: list[tuple[float, str, float]]


def speedup_chart(
    rows: Sequence[Row], speedup: Literal["speedup_same_engine", "speedup_fastest_dense"]
) -> Chart | None:
    """Speed-up by sparsity of one workload's rows, with error bars; beside it the paper's. None without any."""
    series = [
        (one, [(row, value) for row in one.rows if (value := getattr(row, speedup)) is not None])
        for one in by_series(rows)
    ]
    values = [value for _, here in series for _, value in here]
    if not values:
        return None
    own = speedup == "speedup_same_engine"
    ends = [end for _, here in series for row, _ in here for end in uncertainty(row.spread_of(speedup)) or ()]
    highest = max([*values, *ends, *([TABLE_8[-1].speedup] if own else [])])
    x = Scale(0, 100, _FRAME.left + 12, _FRAME.left + _FRAME.width - 4)
    y = Scale(0, 1.06 * highest, _FRAME.top + _FRAME.height, _FRAME.top)
    lines = [Line(_path([(_FRAME.left, y.at(1)), (_FRAME.left + _FRAME.width, y.at(1))]), None, "one")]
    if own:
        paper = [(x.at(100 * figure.sparsity), y.at(figure.speedup)) for figure in TABLE_8]
        lines.append(Line(_path(paper), None, "paper"))
    marks = []
    for one, here in series:
        spots = [(x.at(100 * row.sparsity_achieved), y.at(value)) for row, value in here]
        if len(spots) > 1:
            lines.append(Line(_path(spots), one.name))
        for (row, value), (across, down) in zip(here, spots, strict=True):
            bar = uncertainty(row.spread_of(speedup)) or (value, value)
            tip = f"{one.name}, {one.label(row)}: {_interval(value, row.spread_of(speedup))}"
            marks.append(Mark(across, down, one.name, tip, low=y.at(bar[0]), high=y.at(bar[1])))
    over = "the same engine’s dense model" if own else "the fastest dense fp32 row"
    return Chart(
        width=_WIDTH,
        height=_HEIGHT,
        frame=_FRAME,
        name=f"Decode speed-up over {over}, by sparsity",
        x_title="sparsity of the block linears, %",
        y_title="times as fast",
        x_ticks=[Tick(x.at(value), str(value)) for value in range(0, 101, 10)],
        y_ticks=y.ticks(),
        lines=lines,
        marks=marks,
    )


def pareto_chart(rows: Sequence[Row]) -> tuple[Chart, list[Point]] | None:
    """Perplexity against decode time of one workload's rows, on log scales; and its points. None without any."""
    points = points_of(rows)
    if not points:
        return None
    frame = _PARETO_FRAME
    times, perplexities = [point.decode_ms for point in points], [point.perplexity for point in points]
    x = Scale(*padded(times), frame.left, frame.left + frame.width, logarithmic=True)
    y = Scale(*padded(perplexities), frame.top + frame.height, frame.top, logarithmic=True)
    ordered = sorted(points, key=lambda point: (not point.in_front, point.decode_ms))
    spots = [(x.at(point.decode_ms), y.at(point.perplexity)) for point in ordered]
    sizes = [(_CHARACTER_WIDTH * len(point.label), _LABEL_HEIGHT) for point in ordered]
    steps = steps_along([spot for spot, point in zip(spots, ordered, strict=True) if point.in_front])
    boxes = place_labels(spots, sizes, frame, marker=_MARKER, taken=boxes_along(steps))
    marks = [
        Mark(across, down, point.series, _pareto_tip(point), is_strong=point.in_front)
        for point, (across, down) in zip(ordered, spots, strict=True)
    ]
    labels = [
        Label(round(box.left, 1), round(box.top + 0.75 * box.height, 1), point.label, point.series, point.in_front)
        for point, box in zip(ordered, boxes, strict=True)
        if box is not None
    ]
    chart = Chart(
        width=_PARETO_WIDTH,
        height=_PARETO_HEIGHT,
        frame=frame,
        name="Perplexity against decode time",
        x_title="decode ms/token, p50 (log scale)",
        y_title="perplexity (log scale)",
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        lines=[Line(_path(steps), None, "front")],
        marks=marks,
        labels=labels,
    )
    return chart, points


def strip(row: Row) -> Strip | None:
    """Every decode sample of a row; None where it has none."""
    rounds = [samples for samples in row.samples_ms.decode if samples]
    if not rounds:
        return None
    every = [sample for samples in rounds for sample in samples]
    room = (max(every) - min(every)) * 0.03 or 0.1
    x = Scale(min(every) - room, max(every) + room, _STRIP_LEFT, _STRIP_WIDTH - _STRIP_RIGHT)
    lines = []
    for index, samples in enumerate(rounds):
        down = _STRIP_ROW * (index + 0.5)
        path = "".join(f"M{x.at(sample):.1f} {down - 3:g}v6" for sample in sorted(samples))
        lines.append((down, path, x.at(median(samples))))
    return Strip(
        width=_STRIP_WIDTH,
        height=_STRIP_ROW * len(rounds) + _STRIP_AXIS,
        name=(
            f"{len(every)} decode samples in {len(rounds)} rounds, from {number(min(every))} to "
            f"{number(max(every))} ms, median {number(median(every))} ms"
        ),
        ticks=x.ticks(8),
        rounds=lines,
    )


def marker_path(style: Style) -> str:
    """The marker of a style around 0, 0: the shapes of `plots.MARKERS`."""
    return (
        "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
        "M-4.6 -4.6h9.2v9.2h-9.2z",
        "M0 -5.8L5.6 4.4H-5.6z",
        "M0 -6.2L5.4 0L0 6.2L-5.4 0z",
        "M0 5.8L5.6 -4.4H-5.6z",
        "M-2 -5.6h4v3.6h3.6v4h-3.6v3.6h-4v-3.6h-3.6v-4h3.6z",
    )[style.marker]


def indices(styles: Mapping[str, Style]) -> dict[str, int]:
    """A number for each series, by which the page's script shows and hides it."""
    return {name: index for index, name in enumerate(styles)}


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


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in spots)


def _tick_label(value: float) -> str:
    if value >= 1e6:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
