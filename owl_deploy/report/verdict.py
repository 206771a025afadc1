"""Does sparse pay? One sentence for a workload, and the fastest row that is as good as each dense one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from owl_deploy.benchmarking.rows import Row, Spread
from owl_deploy.bundle.lineage import baseline_of
from owl_deploy.formatting import number, perplexity_text
from owl_deploy.report.series import by_series, dense_references
from owl_deploy.report.text import ratio, verdict

_AS_GOOD = 1.001  # of the rival's perplexity: the same weights differ by less between engines
_NEARLY_AS_GOOD = 1.05  # a dense model that is faster and loses no more is what a user would take


def verdict_on(rows: Sequence[Row]) -> list[str]:
    """What the rows of one workload say of sparsity: whether it pays, then a line for each dense row.

    Sparse pays where a sparse row decodes faster than a dense one, in every round, at no worse perplexity, and that
    dense row is a rival: no other dense row is faster at nearly the same perplexity (5%).
    """
    entrants = _entrants(rows)
    dense = [one for one in entrants if one.row.is_dense]
    sparse = [one for one in entrants if not one.row.is_dense]
    if not dense or not sparse:
        return [f"Whether sparse pays cannot be said: no {'sparse' if dense else 'dense'} model was measured here."]
    judged = [one for one in dense if one.row.perplexity is not None and math.isfinite(one.row.perplexity)]
    if not judged or all(one.row.perplexity is None for one in sparse):
        return [_by_speed_alone(dense, sparse, rows)]
    lines = [_fastest_as_good(rival, entrants, rows) for rival in sorted(judged, key=_quality)]
    return [_does_it_pay(judged, sparse, rows), *lines]


@dataclass(frozen=True)
class _Entrant:
    """A row that ran, and its name."""

    row: Row
    name: str
    decode_ms: float

    @property
    def quality(self) -> str:
        return f"perplexity {perplexity_text(self.row.perplexity)}"

    def __str__(self) -> str:
        return f"{self.name} ({self.quality}, {number(self.decode_ms)} ms a token)"


def _entrants(rows: Sequence[Row]) -> list[_Entrant]:
    return [
        _Entrant(row, series.name if row.is_dense else f"{series.name} at {series.label(row)}", row.decode_ms_p50)
        for series in by_series(rows)
        for row in series.rows
        if row.status == "ok" and row.decode_ms_p50 is not None
    ]


def _quality(one: _Entrant) -> tuple[float, float]:
    assert one.row.perplexity is not None
    return one.row.perplexity, one.decode_ms


def _does_it_pay(dense: Sequence[_Entrant], sparse: Sequence[_Entrant], rows: Sequence[Row]) -> str:
    rivals = [
        one
        for one in sorted(dense, key=_quality)
        if not any(other.decode_ms < one.decode_ms and _is_as_good(other, one, _NEARLY_AS_GOOD) for other in dense)
    ]
    for rival in rivals:
        for one in _as_good(rival, sparse):
            speedup, spread = _over(rival.row, one.row, rows)
            if verdict(speedup, spread) == "faster":
                return (
                    f"Sparse pays here: {one.name} decodes {ratio(speedup, spread)} as fast as dense {rival}, at "
                    f"{one.quality}."
                )
    rival = rivals[0]
    good = _as_good(rival, sparse)
    if not good:
        one = _fastest(sparse)
        speedup, spread = _over(rival.row, one.row, rows)
        return (
            f"Sparse does not pay here: no sparse model is as good as dense {rival}; the fastest sparse one, "
            f"{one.name}, is {_difference(speedup, spread)} at {one.quality}."
        )
    speedup, spread = _over(rival.row, good[0].row, rows)
    return (
        f"Sparse does not pay here: of the sparse models as good as dense {rival}, the fastest, {good[0].name}, is "
        f"{_difference(speedup, spread)}."
    )


def _by_speed_alone(dense: Sequence[_Entrant], sparse: Sequence[_Entrant], rows: Sequence[Row]) -> str:
    rival, one = _fastest(dense), _fastest(sparse)
    return (
        f"Whether sparse pays cannot be said without the perplexity of both: beside the fastest dense model, "
        f"{rival.name} ({number(rival.decode_ms)} ms a token), the fastest sparse one, {one.name}, is "
        f"{_difference(*_over(rival.row, one.row, rows))}."
    )


def _fastest_as_good(rival: _Entrant, entrants: Sequence[_Entrant], rows: Sequence[Row]) -> str:
    """The line of one dense row."""
    label = f"{rival.name} ({perplexity_text(rival.row.perplexity)})"
    best = _as_good(rival, entrants)[0]
    speedup, spread = _over(rival.row, best.row, rows)
    if best is rival or verdict(speedup, spread) != "faster":
        return f"Nothing is clearly faster at no worse perplexity than {label}, {number(rival.decode_ms)} ms a token."
    dense = "dense " if best.row.is_dense else ""
    return f"Fastest at no worse perplexity than {label}: {dense}{best.name}, {_difference(speedup, spread)}."


def _as_good(rival: _Entrant, entrants: Iterable[_Entrant]) -> list[_Entrant]:
    """Those of no worse perplexity than the rival's, the fastest first."""
    return sorted((one for one in entrants if _is_as_good(one, rival)), key=lambda one: (one.decode_ms, one.name))


def _is_as_good(one: _Entrant, other: _Entrant, at_most: float = _AS_GOOD) -> bool:
    """Whether its perplexity is at most so many times the other's, on the same text."""
    mine, theirs = one.row, other.row
    if mine.perplexity is None or theirs.perplexity is None:
        return False
    same_text = (mine.perplexity_text, mine.perplexity_windows) == (theirs.perplexity_text, theirs.perplexity_windows)
    return same_text and mine.perplexity <= at_most * theirs.perplexity


def _fastest(entrants: Sequence[_Entrant]) -> _Entrant:
    return min(entrants, key=lambda one: (one.decode_ms, one.name))


def _over(rival: Row, row: Row, rows: Sequence[Row]) -> tuple[float, Spread | None]:
    """How many times as fast as the rival a row decodes.

    Within the rounds of a run that had both; else as an older version recorded it; else by all rounds of both, with the
    spread from the one's slowest and the other's fastest to the reverse.
    """
    ours, theirs = _medians(row), _medians(rival)
    shared = ours.keys() & theirs.keys() if row.machine == rival.machine else ()
    ratios = [theirs[name] / ours[name] for name in shared]
    if ratios:
        spread = Spread(median=statistics.median(ratios), low=min(ratios), high=max(ratios))
        return spread.median, spread
    recorded = _recorded(rival, row, rows)
    if recorded is not None:
        return recorded.median, recorded
    assert row.decode_ms_p50 is not None and rival.decode_ms_p50 is not None
    speedup = rival.decode_ms_p50 / row.decode_ms_p50
    if not ours or not theirs:
        return speedup, None
    low, high = min(theirs.values()) / max(ours.values()), max(theirs.values()) / min(ours.values())
    return speedup, Spread(median=speedup, low=low, high=high)


def _recorded(rival: Row, row: Row, rows: Sequence[Row]) -> Spread | None:
    """The row's own speed-up over the rival, where one of those it holds is over that."""
    engines_dense = [one for one in rows if one.is_dense and one.status == "ok" and one.engine == row.engine]
    if row.speedup_same_engine_spread is not None and baseline_of(row, engines_dense) is rival:
        return row.speedup_same_engine_spread
    for field in ("speedup_fastest_dense", "speedup_any_precision"):
        references = dense_references(rows, field)
        if row.spread_of(field) is not None and len(references) == 1 and references[0] is rival:
            return row.spread_of(field)
    return None


def _medians(row: Row) -> dict[str, float]:
    """Of every round by its name; older results have none, and rounds that no other row shares."""
    samples = row.samples_ms
    names = samples.rounds or [f"{id(row)} {index}" for index in range(len(samples.decode))]
    return {name: statistics.median(there) for name, there in zip(names, samples.decode, strict=True) if there}


def _difference(speedup: float, spread: Spread | None) -> str:
    """`1.41x (1.35–1.48) faster`, `only 0.80x (0.75–0.86) as fast`, or that rounds do not agree."""
    found, figure = verdict(speedup, spread), ratio(speedup, spread)
    if found == "faster":
        return f"{figure} faster"
    return f"only {figure} as fast" if found == "slower" else f"as fast within the spread of rounds, {figure}"
