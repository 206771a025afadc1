"""Speed against quality: the rows that no other row beats in both, and where a plot's labels find room."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from owl_deploy.benchmarking.rows import Row
from owl_deploy.formatting import number, perplexity_text
from owl_deploy.report.series import by_series

_DIRECTIONS = 12  # in which a label is tried around its point
_DISTANCES = (1.0, 1.8, 3.0, 4.5)  # in heights of a label


@dataclass(frozen=True)
class Point:
    """A row whose decode time and perplexity are known.

    Attributes:
        series: the name of its engine, among the rows it is compared with.
        sparsity: as in the tables.
        in_front: no other row is faster and of lower perplexity, or one of these and equal in the other.
    """

    row: Row
    series: str
    sparsity: str
    decode_ms: float
    perplexity: float
    in_front: bool = False

    @property
    def label(self) -> str:
        return f"{self.series} {self.sparsity}"


@dataclass(frozen=True)
class Box:
    """A rectangle on a plot, in its units."""

    left: float
    top: float
    width: float
    height: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.left + other.width
            and other.left < self.left + self.width
            and self.top < other.top + other.height
            and other.top < self.top + self.height
        )

    def distance(self, x: float, y: float) -> float:
        """From a point to the nearest edge; 0 inside."""
        across = max(self.left - x, x - self.left - self.width, 0)
        down = max(self.top - y, y - self.top - self.height, 0)
        return math.hypot(across, down)

    def lies_in(self, other: Box) -> bool:
        return (
            other.left <= self.left
            and other.top <= self.top
            and self.left + self.width <= other.left + other.width
            and self.top + self.height <= other.top + other.height
        )


def points_of(rows: Sequence[Row]) -> list[Point]:
    """The rows of one workload that have both figures, by series; infinite perplexities are left out."""
    found = [
        Point(row, series.name, series.label(row), row.decode_ms_p50, row.perplexity)
        for series in by_series(rows)
        for row in series.rows
        if row.decode_ms_p50 is not None and row.perplexity is not None and math.isfinite(row.perplexity)
    ]
    front = {id(point) for point in _front(found)}
    return [
        Point(point.row, point.series, point.sparsity, point.decode_ms, point.perplexity, id(point) in front)
        for point in found
    ]


def front_of(points: Iterable[Point]) -> list[Point]:
    """The points of the front, the fastest first."""
    return sorted((point for point in points if point.in_front), key=lambda point: (point.decode_ms, point.perplexity))


def front_text(points: Iterable[Point]) -> str:
    """The front in words, the fastest first."""
    return ", ".join(
        f"{point.label} ({number(point.decode_ms)} ms, {perplexity_text(point.perplexity)})"
        for point in front_of(points)
    )


def _front(points: Sequence[Point]) -> list[Point]:
    best = math.inf
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.decode_ms, point.perplexity)):
        twin = bool(found) and (point.decode_ms, point.perplexity) == (found[-1].decode_ms, found[-1].perplexity)
        if point.perplexity < best or twin:
            found.append(point)
            best = point.perplexity
    return found


def steps_along(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the front's line: on from each of its points at the same height, then straight to the next."""
    corners = [(right, height) for (_, height), (right, _) in pairwise(front)]
    return [spot for pair in zip_longest(front, corners) for spot in pair if spot is not None]


def boxes_along(steps: Sequence[tuple[float, float]]) -> list[Box]:
    """Where the line is, for labels to keep off it."""
    return [
        Box(min(left, right) - 1, min(upper, lower) - 1, abs(right - left) + 2, abs(lower - upper) + 2)
        for (left, upper), (right, lower) in pairwise(steps)
    ]


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The ends of a log axis with room beside the smallest and the largest value."""
    room = max((max(values) / min(values)) ** share, 1.1)
    return min(values) / room, max(values) * room


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    *,
    marker: float,
    taken: Sequence[Box] = (),
) -> list[Box | None]:
    """Where each label goes: inside `frame`, over no marker and no other label, and nearest to its own anchor.

    None where there is no such place.

    Args:
        anchors: the points, the most important first: they are served in this order.
        sizes: width and height of each label.
        marker: the width of a point's marker.
        taken: where else no label may be.
    """
    markers = [Box(x - marker / 2, y - marker / 2, marker, marker) for x, y in anchors]
    placed: list[Box | None] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        others = [*markers, *taken, *(box for box in placed if box is not None)]
        candidates = (_beside(x, y, width, height, marker, turn, far) for far in _DISTANCES for turn in _TURNS)
        free = (box for box in candidates if box.lies_in(frame) and not any(map(box.overlaps, others)))
        placed.append(next((box for box in free if _is_nearest(box, (x, y), anchors)), None))
    return placed


def _is_nearest(box: Box, own: tuple[float, float], anchors: Sequence[tuple[float, float]]) -> bool:
    """Whether a reader takes the label for its own point's."""
    return all(box.distance(*own) <= box.distance(*other) for other in anchors)


# To the right first, then above and below it, to the left at last.
_TURNS = tuple(
    sign * 2 * math.pi * step / _DIRECTIONS
    for step in range(_DIRECTIONS // 2 + 1)
    for sign in (1, -1)
    if step or sign > 0
)


def _beside(x: float, y: float, width: float, height: float, marker: float, turn: float, far: float) -> Box:
    """The label's box at an angle from its point: its nearest edge is `far` heights away."""
    reach = marker / 2 + (far - 0.7) * height
    centre_x = x + math.cos(turn) * (reach + width / 2)
    centre_y = y - math.sin(turn) * (reach + height / 2)
    return Box(centre_x - width / 2, centre_y - height / 2, width, height)
