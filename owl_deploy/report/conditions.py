"""How the rows of a report were measured: what they share, and the range of what they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from owl_deploy.benchmarking.rows import Row
from owl_deploy.formatting import enumeration, number, percent, size
from owl_deploy.machine.description import Machine
from owl_deploy.report.series import short_names

_ROUNDS = (
    "Rounds are interleaved: each times every engine at one sparsity and again on the dense model, so that a slow "
    "spell of the machine meets all that is compared. A speed-up is the ratio of two medians of decode time within a "
    "round, dense over sparse; the table shows the median of rounds, and in parentheses the slowest and the fastest. "
    "Only when these lie on the same side of 1 is a difference called one. Confidence intervals are of that median, at "
    "95%, by bootstrap over rounds."
)
_TIMES = (
    "Time to first token (TTFT) runs from the prompt's ids to the first new token's id; decode time is per new token "
    "after that."
)
_BATCHES = "With a batch, decode time is per step, which makes one token of each sequence; tokens/s count all of them."
_END_TO_END = "End to end runs from the prompt's text to the end of the new text, tokenised and sampled."
_JOULES = "Joules are what the CPU's packages took while decoding, whatever else they did."
_MEMORY_AND_QUALITY = (
    "Peak RSS is of the engine's own process, load included. Perplexity was computed by the engine that was timed, on "
    "the file that was timed."
)


def method(rows: Sequence[Row]) -> str:
    """A paragraph on how these rows' figures are made, without markup."""
    sentences = [_ROUNDS, _TIMES]
    if any(row.batch > 1 for row in rows):
        sentences.append(_BATCHES)
    if any(row.end_to_end_ms_p50 is not None for row in rows):
        sentences.append(_END_TO_END)
    if any(row.decode_joules_per_token is not None for row in rows):
        sentences.append(_JOULES)
    return " ".join([*sentences, _MEMORY_AND_QUALITY])


def conditions(rows: Sequence[Row]) -> list[str]:
    """One line per condition, without markup."""
    return [
        f"Workload: {_workloads(rows)}",
        *_rounds(rows),
        *_machines(rows),
        *_load(rows),
        *_perplexity_text(rows),
        *_engines(rows),
        *_parity(rows),
    ]


def _workloads(rows: Sequence[Row]) -> str:
    names = short_names(row.model for row in rows)
    return _distinct(
        rows,
        lambda row: (
            f"{names[row.model]}, {row.prompt_tokens} prompt tokens and {row.new_tokens} new ones, batch {row.batch}, "
            f"threads: {row.threads}"
        ),
    )


def _rounds(rows: Sequence[Row]) -> list[str]:
    counts = [row.repetitions for row in rows if row.status == "ok"]
    if not counts:
        return []
    shown = "–".join(dict.fromkeys([str(min(counts)), str(max(counts))]))
    return [f"Rounds a row was timed in (a dense row in those of every level): {shown}"]


def _machines(rows: Sequence[Row]) -> list[str]:
    """Two lines per machine; how fast it reads memory was measured anew for every run and number of threads."""
    machines: dict[str, list[Row]] = {}
    for row in rows:
        machines.setdefault(_machine(row.machine), []).append(row)
    lines = []
    for description, here in machines.items():
        lines.append(f"Machine: {description}")
        owner = f"{here[0].machine.cpu}: memory" if len(machines) > 1 else "Memory"
        one = [row.machine.memory_bandwidth_one_thread_gb_s for row in here]
        every = [row.machine.memory_bandwidth_all_threads_gb_s for row in here]
        speeds = [
            f"{_range(speed for speed in known if speed is not None)} GB/s {threads}"
            for known, threads in (
                ([row.machine.memory_bandwidth_gb_s for row in here], "with as many threads"),
                (one, "with one"),
                (every, "with one on every core"),
            )
            if any(speed is not None for speed in known)
        ]
        lines.append(f"{owner} reads: {', '.join(speeds)}")
    return lines


def _machine(machine: Machine) -> str:
    details = [
        machine.cpu,
        f"cores: {machine.cores}",
        " ".join(machine.instruction_sets) or machine.instruction_set,
        size(machine.memory_bytes),
        machine.system,
    ]
    if machine.numa_nodes is not None:
        details.append(f"NUMA nodes: {machine.numa_nodes}")
    if machine.frequency_governor is not None:
        details.append(f"frequency governor: {machine.frequency_governor}")
    if machine.container_cores is not None:
        details.append(f"limited to {machine.container_cores:g} cores' time")
    if machine.container_memory_bytes is not None:
        details.append(f"limited to {size(machine.container_memory_bytes)}")
    return ", ".join(details)


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
    """What the engines said of themselves, once for each different answer."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        if row.engine_facts:
            answers.setdefault(_facts(row.engine_facts), set()).add(row.engine)
    return sorted(
        f"What {enumeration(sorted(names))} {'says of itself' if len(names) == 1 else 'say of themselves'}: {facts}"
        for facts, names in answers.items()
    )


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
            references = enumeration(list(dict.fromkeys(record.reference for record in records)))
            lines.append(
                f"Parity of {engine} with {references}: logits differ by {worst:.1e} at most, the most "
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
