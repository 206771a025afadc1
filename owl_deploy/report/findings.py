"""What a table shows, in sentences computed from its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from owl_deploy.benchmarking.rows import Row
from owl_deploy.formatting import enumeration, number, one_line, perplexity_text, size
from owl_deploy.report.series import Series, by_series, dense_references
from owl_deploy.report.tables import UNSTEADY_MARK
from owl_deploy.report.text import Verdict, ratio, verdict

_ERROR_CHARACTERS = 200
_LEAK = 0.05  # of the peak: resident memory that grew by more between the first round and the last


def findings(rows: Sequence[Row]) -> list[str]:
    """A sentence or two per finding on the rows of one workload: speed, perplexity, and what not to rely on.

    `**` is around what is to stand out; nothing else is markup, and names and errors are as they came.
    """
    series = by_series(rows)
    return [
        *(_speed(one, rows) for one in series if one.sparse),
        *_perplexities(series),
        *_failures(series),
        *_marked(f"**Unsteady** ({UNSTEADY_MARK}), not to be relied on", series, lambda row: row.unsteady),
        *_marked(
            "**Not repeatable**: rounds from the same prompt generated different tokens",
            series,
            lambda row: not row.repeatable,
        ),
        *_growing(series),
        *_continuations(series),
    ]


def _speed(series: Series, rows: Sequence[Row]) -> str:
    """How the engine's sparse rows compare with its own dense row, and with the fastest dense row of all."""
    sentences = [_against_own_dense(series), _against_fastest(series, rows, _EXACT)]
    if _EXACT.reference(series, rows) != _ANY.reference(series, rows):
        sentences.append(_against_fastest(series, rows, _ANY))
    return f"**{series.name}**: {' '.join(filter(None, sentences))}"


def _against_own_dense(series: Series) -> str:
    compared = [(row, speedup) for row in series.sparse if (speedup := row.speedup_same_engine) is not None]
    if not compared:
        return "it has no dense row of its own."
    dense = f"the dense {series.dense_model} in the same engine" if series.dense_model else "its own dense model"
    best, speedup = max(compared, key=lambda pair: (_verdict(*pair) == "faster", pair[1]))
    figure = f"{ratio(speedup, best.speedup_same_engine_spread)} at {series.label(best)} sparsity"
    if best.paper_speedup is not None:
        figure += f" (in the paper {ratio(best.paper_speedup)})"
    if _verdict(best, speedup) == "faster":
        headline = f"sparse decode reaches {figure} over {dense}"
    else:
        headline = f"sparsity gains nothing over {dense}: {figure} at best"
    return f"{headline}. {_verdicts(series, compared)}"


def _verdict(row: Row, speedup: float) -> Verdict:
    return verdict(speedup, row.speedup_same_engine_spread)


def _verdicts(series: Series, compared: Sequence[tuple[Row, float]]) -> str:
    """`Sparse is faster at 60% and 70%; **slower than dense** at 50%.`"""
    labels: dict[Verdict, list[str]] = {"faster": [], "slower": [], "no different": []}
    for row, speedup in compared:
        labels[_verdict(row, speedup)].append(series.label(row))
    wordings: dict[Verdict, str] = {
        "faster": "faster",
        "slower": "**slower than dense**",
        "no different": "no different within the spread of rounds",
    }
    clauses = [f"{wordings[found]} at {enumeration(at)}" for found, at in labels.items() if at]
    return f"Sparse is {'; '.join(clauses)}."


@dataclass(frozen=True)
class _Fastest:
    """A speed-up over the fastest of several dense rows.

    Attributes:
        words: what it is the fastest of.
    """

    field: str
    words: str

    def reference(self, series: Series, rows: Sequence[Row]) -> str | None:
        """The name of the series whose dense row it is over; None where it is this one's, or cannot be told.

        It cannot where rows of several runs stand together, each run with a dense row of its own.
        """
        found = dense_references(rows, self.field)
        if len(found) != 1 or found[0] in series.rows:
            return None
        return next(one.name for one in by_series(rows) if found[0] in one.rows)


_EXACT = _Fastest("speedup_fastest_dense", "the fastest dense engine")
_ANY = _Fastest("speedup_any_precision", "the fastest dense engine of any precision")


def _against_fastest(series: Series, rows: Sequence[Row], fastest: _Fastest) -> str:
    """Empty where that is this very engine."""
    compared = [(row, speedup) for row in series.sparse if (speedup := getattr(row, fastest.field)) is not None]
    name = fastest.reference(series, rows)
    if not compared or name is None:
        return ""
    best, speedup = max(compared, key=lambda pair: pair[1])
    spread = best.spread_of(fastest.field)
    found = verdict(speedup, spread)
    wording = {"faster": "faster", "slower": "**still slower**", "no different": "no different"}[found]
    return f"Against {fastest.words}, {name}, its best is {ratio(speedup, spread)} at {series.label(best)}: {wording}."


def _perplexities(series: Sequence[Series]) -> list[str]:
    """How perplexity grows with sparsity; engines that agree to the digits shown share a sentence."""
    growths: dict[str, list[str]] = {}
    only_dense: dict[str, list[str]] = {}
    for one in series:
        if any(row.perplexity is not None for row in one.sparse):
            growths.setdefault(_growth(one), []).append(one.name)
        elif one.dense is not None and one.dense_model is None and one.dense.perplexity is not None:
            only_dense.setdefault(perplexity_text(one.dense.perplexity), []).append(one.name)
    if not growths and not only_dense:
        return ["Perplexity was not measured: the bundle has no tokenizer, or no text was given."]
    sentences = [f"Perplexity in {enumeration(names)}: {growth}." for growth, names in growths.items()]
    if only_dense:
        dense = "; ".join(f"{figure} in {enumeration(names)}" for figure, names in only_dense.items())
        sentences.append(f"Perplexity of the dense model alone: {dense}.")
    return sentences


def _growth(series: Series) -> str:
    """`12.3 dense, 14.2 at 50% (1.15x), 26.0k at 90% (2114x)`."""
    dense = series.dense.perplexity if series.dense else None
    steps = [f"{perplexity_text(dense)} dense"] if dense is not None else []
    for row in series.sparse:
        if row.perplexity is not None:
            growth = f" ({number(row.perplexity / dense)}x)" if dense and math.isfinite(row.perplexity) else ""
            steps.append(f"{perplexity_text(row.perplexity)} at {series.label(row)}{growth}")
    return ", ".join(steps)


def _failures(series: Sequence[Series]) -> list[str]:
    """One sentence per engine and reason."""
    places: dict[tuple[str, str], list[str]] = {}
    for one in series:
        for row in one.rows:
            if row.status == "failed":
                places.setdefault((one.name, row.error or "no reason given"), []).append(one.label(row))
    return [
        f"**Failed**: {name} at {enumeration(labels)}: {one_line(error, _ERROR_CHARACTERS)}"
        for (name, error), labels in places.items()
    ]


def _marked(claim: str, series: Sequence[Series], holds: Callable[[Row], bool]) -> list[str]:
    """The claim with all rows that it holds for, by engine; nothing where there is none."""
    labels = {one.name: [one.label(row) for row in one.rows if holds(row)] for one in series}
    places = [f"{name} at {enumeration(at)}" for name, at in labels.items() if at]
    return [f"{claim}: {'; '.join(places)}."] if places else []


def _growing(series: Sequence[Series]) -> list[str]:
    """Memory that a process keeps from round to round, the same work each time, is not given back: a leak."""
    grown = [
        f"{one.name} at {one.label(row)} by {size(row.rss_growth_bytes)} (peak {size(row.peak_rss_bytes)})"
        for one in series
        for row in one.rows
        if row.rss_growth_bytes and row.peak_rss_bytes and row.rss_growth_bytes > _LEAK * row.peak_rss_bytes
    ]
    return [f"**Memory grew** from the first round to the last: {'; '.join(grown)}."] if grown else []


def _continuations(series: Sequence[Series]) -> list[str]:
    """Greedy decoding of the same weights that took another way."""
    parted = [
        f"{one.name} at {one.label(row)} after {found.matching} of {found.tokens} tokens of {found.reference}'s"
        for one in series
        for row in one.rows
        if (found := row.continuation) is not None and found.matching < found.tokens
    ]
    if not parted:
        return []
    return [
        f"**Another continuation** of the same prompt, from the same weights: {'; '.join(parted)}. "
        "Where two tokens are almost equally likely, rounding decides; see the parity of logits."
    ]
