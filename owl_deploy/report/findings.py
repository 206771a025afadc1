"""What a table shows, in sentences computed from its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from owl_deploy.bench.rows import Row, Spread
from owl_deploy.report.series import Series, by_series, same_workload
from owl_deploy.report.tables import UNSTEADY_MARK
from owl_deploy.report.text import enumeration, escaped, number, one_line, perplexity_text, ratio

_ERROR_CHARACTERS = 200

Verdict = Literal["faster", "slower", "no different"]


def findings(rows: Sequence[Row]) -> list[str]:
    """One Markdown sentence or two per finding: speed by engine, perplexity, and what not to rely on."""
    series = by_series(rows)
    return [
        *(_speed(one, rows) for one in series if one.sparse),
        *_perplexities(series),
        *_failures(series),
        *_unsteady(series),
    ]


def verdict(speedup: float, spread: Spread | None) -> Verdict:
    """A difference counts only if the whole spread lies on one side of 1."""
    low, high = (spread.low, spread.high) if spread else (speedup, speedup)
    if low > 1:
        return "faster"
    return "slower" if high < 1 else "no different"


def _speed(series: Series, rows: Sequence[Row]) -> str:
    """How the engine's sparse rows compare with its own dense row, and with the fastest dense row of all."""
    sentences = [_against_own_dense(series), _against_fastest_dense(series, rows)]
    return f"**{series.name}**: {' '.join(filter(None, sentences))}"


def _against_own_dense(series: Series) -> str:
    compared = [(row, speedup) for row in series.sparse if (speedup := row.speedup_same_engine) is not None]
    if not compared:
        return "without its dense row, its speed-up cannot be told."
    best, speedup = max(compared, key=lambda pair: (_verdict(*pair) == "faster", pair[1]))
    figure = f"{ratio(speedup, best.speedup_same_engine_spread)} at {series.label(best)} sparsity"
    if best.paper_speedup is not None:
        figure += f" (in the paper {ratio(best.paper_speedup)})"
    if _verdict(best, speedup) == "faster":
        headline = f"sparse decode reaches {figure} over its own dense model"
    else:
        headline = f"sparsity gains nothing over its own dense model: {figure} at best"
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


def _against_fastest_dense(series: Series, rows: Sequence[Row]) -> str:
    """Empty where that is this very engine."""
    compared = [(row, speedup) for row in series.sparse if (speedup := row.speedup_fastest_dense) is not None]
    if not compared:
        return ""
    best, speedup = max(compared, key=lambda pair: pair[1])
    fastest = _fastest_dense(best, rows)
    if fastest is None or fastest.name == series.name:
        return ""
    found = verdict(speedup, best.speedup_fastest_dense_spread)
    wording = {"faster": "faster", "slower": "**still slower**", "no different": "no different"}[found]
    figure = ratio(speedup, best.speedup_fastest_dense_spread)
    return f"Against the fastest dense engine, {fastest.name}, its best is {figure} at {series.label(best)}: {wording}."


def _fastest_dense(row: Row, rows: Sequence[Row]) -> Series | None:
    """The series whose dense row decodes fastest under the workload of `row`."""
    timed = [
        (dense.decode_ms_p50, one)
        for one in by_series(rows)
        if (dense := one.dense) and dense.decode_ms_p50 is not None and same_workload(dense, row)
    ]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def _perplexities(series: Sequence[Series]) -> list[str]:
    """How perplexity grows with sparsity; engines that agree to the digits shown share a sentence."""
    engines: dict[str, list[str]] = {}
    for one in series:
        if any(row.perplexity is not None for row in one.rows):
            engines.setdefault(_growth(one), []).append(one.name)
    if not engines:
        return ["Perplexity was not measured: the bundle has no tokenizer, or no text was given."]
    return [f"Perplexity in {enumeration(names)}: {growth}." for growth, names in engines.items()]


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
        f"**Failed**: {name} at {enumeration(labels)}: {escaped(one_line(error, _ERROR_CHARACTERS))}"
        for (name, error), labels in places.items()
    ]


def _unsteady(series: Sequence[Series]) -> list[str]:
    labels = {one.name: [one.label(row) for row in one.rows if row.unsteady] for one in series}
    places = [f"{name} at {enumeration(at)}" for name, at in labels.items() if at]
    return [f"**Unsteady** ({UNSTEADY_MARK}), not to be relied on: {'; '.join(places)}."] if places else []
