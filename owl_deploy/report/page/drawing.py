"""Charts as SVG: what the page's template draws, in pixels from the top left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from owl_deploy.benchmarking.rows import Row
from owl_deploy.formatting import number
from owl_deploy.report.charts import Axis, Chart, Mark, Spots, Style
from owl_deploy.report.pareto import Box, boxes_along, place_labels

_LABEL_HEIGHT, _CHARACTER_WIDTH = 14.0, 6.3  # of the page's small sans-serif
_MARKER = 13.0
_STRIP_WIDTH, _STRIP_ROW, _STRIP_AXIS = 640, 12, 34
_STRIP_LEFT, _STRIP_RIGHT = 64, 14


class Canvas(NamedTuple):
    """The size of a chart, and where in it the axes are."""

    width: int
    height: int
    frame: Box


HALF = Canvas(560, 380, Box(54, 14, 490, 314))
WIDE = Canvas(1120, 520, Box(64, 14, 1040, 454))


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Path:
    """A line of the chart; `series` is None for what belongs to no engine."""

    path: str
    series: str | None
    kind: str


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    series: str
    is_strong: bool


@dataclass(frozen=True)
class Drawing:
    """A chart with everything in its place; the marks are the chart's, moved to their pixels."""

    width: int
    height: int
    frame: Box
    name: str
    x_title: str
    y_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Path]
    marks: list[Mark]
    labels: list[Label]


@dataclass(frozen=True)
class Strip:
    """Every sample of a row on one axis, a line of strokes per round; `medians` are the rounds'."""

    width: int
    height: int
    name: str
    ticks: list[Tick]
    rounds: list[tuple[float, str, float]]


@dataclass(frozen=True)
class _Scale:
    """An axis on pixels: its low end at `start`, its high end at `end`."""

    axis: Axis
    start: float
    end: float

    def at(self, value: float) -> float:
        unit = math.log if self.axis.logarithmic else float
        share = (unit(value) - unit(self.axis.low)) / (unit(self.axis.high) - unit(self.axis.low))
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, about: int = 6) -> list[Tick]:
        return [Tick(self.at(value), label) for value, label in self.axis.ticks(about)]


def drawing(chart: Chart, canvas: Canvas) -> Drawing:
    """The chart in the axes of a canvas."""
    frame = canvas.frame
    x = _Scale(chart.x, frame.left, frame.left + frame.width)
    y = _Scale(chart.y, frame.top + frame.height, frame.top)
    marks = [
        replace(
            mark,
            x=x.at(mark.x),
            y=y.at(mark.y),
            low=None if mark.low is None else y.at(mark.low),
            high=None if mark.high is None else y.at(mark.high),
        )
        for mark in chart.marks
    ]
    lines = [([(x.at(across), y.at(up)) for across, up in line.spots], line) for line in chart.lines]
    return Drawing(
        *canvas,
        name=chart.name,
        x_title=chart.x.title,
        y_title=chart.y.title,
        x_ticks=x.ticks(11),
        y_ticks=y.ticks(),
        lines=[Path(_path(spots), line.series, line.kind) for spots, line in lines],
        marks=marks,
        labels=_labels([mark for mark in marks if mark.label], [spots for spots, _ in lines], frame),
    )


def _labels(marks: Sequence[Mark], lines: Sequence[Spots], frame: Box) -> list[Label]:
    boxes = place_labels(
        [(mark.x, mark.y) for mark in marks],
        [(_CHARACTER_WIDTH * len(mark.label), _LABEL_HEIGHT) for mark in marks],
        frame,
        marker=_MARKER,
        taken=[box for spots in lines for box in boxes_along(spots)],
    )
    return [
        Label(round(box.left, 1), round(box.top + 0.75 * box.height, 1), mark.label, mark.series, mark.is_strong)
        for mark, box in zip(marks, boxes, strict=True)
        if box is not None
    ]


def strip(row: Row) -> Strip | None:
    """Every decode sample of a row; None where it has none."""
    rounds = [samples for samples in row.samples_ms.decode if samples]
    if not rounds:
        return None
    every = [sample for samples in rounds for sample in samples]
    room = (max(every) - min(every)) * 0.03 or 0.1
    axis = Axis("decode ms/token", min(every) - room, max(every) + room)
    x = _Scale(axis, _STRIP_LEFT, _STRIP_WIDTH - _STRIP_RIGHT)
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
    """The marker of a style around 0, 0: the shapes of `plotting.MARKERS`."""
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


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in spots)
