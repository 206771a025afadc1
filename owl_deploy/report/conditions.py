"""How the rows of a report were measured: what they share, and the range of what they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from owl_deploy.bench.rows import Row
from owl_deploy.report.series import model_name
from owl_deploy.report.text import escaped, number, percent, size


def conditions(rows: Sequence[Row]) -> list[str]:
    """One Markdown line per condition."""
    lines = [
        f"Workload: {_distinct(rows, _workload)}",
        *_rounds(rows),
        f"Machine: {_distinct(rows, _machine)}",
        f"Memory reads, with as many threads: {_range(row.machine.memory_bandwidth_gb_s for row in rows)} GB/s",
        *_load(rows),
        *_perplexity_text(rows),
        *_engines(rows),
        *_parity(rows),
    ]
    return [escaped(line) for line in lines]


def _workload(row: Row) -> str:
    return (
        f"{model_name(row)}, {row.prompt_tokens} prompt tokens and {row.new_tokens} new ones, batch 1, "
        f"threads: {row.threads}"
    )


def _rounds(rows: Sequence[Row]) -> list[str]:
    counts = [row.repetitions for row in rows if row.status == "ok"]
    return [f"Rounds a row was timed in (a dense row in those of every level): {_range(counts)}"] if counts else []


def _machine(row: Row) -> str:
    machine = row.machine
    return (
        f"{machine.cpu}, cores: {machine.cores}, {machine.instruction_set}, {size(machine.memory_bytes)}, "
        f"{machine.system}"
    )


def _load(rows: Sequence[Row]) -> list[str]:
    """The load around the rounds, where it was recorded."""
    loads = [row.load_average for row in rows if row.load_average is not None]
    others = [row.other_load_cores for row in rows if row.other_load_cores is not None]
    lines = []
    if loads:
        before, after = zip(*loads, strict=True)
        lines.append(f"1-minute load average: {_range(before)} before the first round, {_range(after)} after the last")
    if others:
        lines.append(f"Other processes kept at most {number(max(others))} cores busy while the engines were idle")
    return lines


def _perplexity_text(rows: Sequence[Row]) -> list[str]:
    measured = [row for row in rows if row.perplexity is not None]
    if not measured:
        return []
    return [
        f"Perplexity: {_distinct(measured, lambda row: f'{row.perplexity_text}, windows: {row.perplexity_windows}')}"
    ]


def _engines(rows: Sequence[Row]) -> list[str]:
    """What each engine said of itself, once for each different answer."""
    lines = (f"What {row.engine} says of itself: {_facts(row.engine_facts)}" for row in rows if row.engine_facts)
    return sorted(set(lines))


def _facts(facts: dict[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {_fact(name, value)}" for name, value in facts.items())


def _fact(name: str, value: object) -> str:
    """Fractions as percentages, by the number of tokens fed at once; anything else as it is."""
    if name.startswith("fraction_") and isinstance(value, dict):
        return " and ".join(f"{percent(share)} with {tokens} at once" for tokens, share in value.items())
    if name.startswith("fraction_") and isinstance(value, float):
        return percent(value)
    return str(value)


def _parity(rows: Sequence[Row]) -> list[str]:
    """The worst of each engine's comparisons with what it is compared with."""
    lines = []
    for engine in sorted({row.engine for row in rows}):
        records = [row.parity for row in rows if row.engine == engine and row.parity is not None]
        if records:
            worst = max(max(record.max_abs_difference, record.max_abs_difference_with_past) for record in records)
            agreement = min(record.argmax_agreement for record in records)
            lines.append(
                f"Parity of {engine} with {records[0].reference}: logits differ by {worst:.1e} at most, the most "
                f"likely token is the same at {percent(agreement)} of positions"
            )
    return lines


def _distinct(rows: Iterable[Row], describe: Callable[[Row], str]) -> str:
    """Every different description, in the order of first appearance."""
    return "; ".join(dict.fromkeys(map(describe, rows)))


def _range(values: Iterable[float]) -> str:
    """One number, or the smallest and the largest."""
    known = list(values)
    return "–".join(dict.fromkeys([number(min(known)), number(max(known))]))
