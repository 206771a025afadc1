"""From measurements to rows: percentiles over all samples, ratios within rounds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from owl_deploy.benchmarking.measure import Bench
from owl_deploy.benchmarking.rows import Continuation, Row, Samples, Spread
from owl_deploy.benchmarking.workload import Configuration, Workload
from owl_deploy.bundle.lineage import baseline_of
from owl_deploy.bundle.names import precision_of
from owl_deploy.bundle.records import ParityRecord
from owl_deploy.machine.description import Machine
from owl_deploy.paper.speedups import paper_speedup

_REFERENCE = "onnxruntime"  # whose greedy tokens others are compared with
_RESAMPLES = 2000
_UNSTEADY = 1.5  # a round's median over the fastest round's: past this, the cores were shared

Rounds = dict[str, dict[str, Any]]


def make_rows(bench: Bench, workload: Workload, machine: Machine) -> list[Row]:
    """One row per configuration, failed ones included, in the order of the configurations."""
    rounds = [bench.rounds(item) if bench.error(item) is None else {} for item in bench.configurations]
    rows = [
        _row(item, workload, machine, error=bench.error(item), setup=bench.setup(item) or {}, rounds=samples)
        for item, samples in zip(bench.configurations, rounds, strict=True)
    ]
    timed = [(row, samples) for row, samples in zip(rows, rounds, strict=True) if row.is_dense and samples]
    exact = {row.bundle: samples for row, samples in zip(rows, rounds, strict=True) if row.engine == _REFERENCE}
    for row, samples in zip(rows, rounds, strict=True):
        baseline = baseline_of(row, (other for other, _ in timed))
        dense = [pair for pair in timed if baseline is not None and pair[0].bundle == baseline.bundle]
        own = next((there for other, there in dense if other.engine == row.engine), {})
        # Rounding weights is a saving of its own, not what sparsity is measured against.
        fp32 = min((there for other, there in dense if other.weights == "fp32"), key=_decode_ms, default={})
        fastest = min((there for _, there in dense), key=_decode_ms, default={})
        row.speedup_same_engine_spread = same = _speedup(own, samples)
        row.speedup_fastest_dense_spread = over_fastest = _speedup(fp32, samples)
        row.speedup_any_precision_spread = over_any = _speedup(fastest, samples)
        row.speedup_same_engine = same.median if same else None
        row.speedup_fastest_dense = over_fastest.median if over_fastest else None
        row.speedup_any_precision = over_any.median if over_any else None
        if row.weights == "fp32":
            row.continuation = _continuation(exact.get(row.bundle, {}), samples)
    return rows


def _row(
    item: Configuration,
    workload: Workload,
    machine: Machine,
    *,
    error: str | None,
    setup: dict[str, Any],
    rounds: Rounds,
) -> Row:
    """A row without its speed-ups, which need the other rows."""
    asked = item.manifest.sparsity_asked
    row = Row(
        status="ok" if error is None and rounds else "failed",
        error=error,
        model=item.manifest.model,
        checkpoint_sha256=item.manifest.checkpoint_sha256,
        base_sha256=item.manifest.base_sha256,
        architecture=item.manifest.architecture,
        method=item.manifest.method,
        allocation=item.manifest.allocation,
        bundle=str(item.bundle),
        engine=item.spec.name,
        flavor=item.flavor,
        weights=precision_of(item.flavor),
        kv_cache="exact" if item.record.kv_cache is None else "int8",
        threads=workload.threads,
        batch=workload.batch,
        prompt_tokens=len(workload.prompt),
        new_tokens=workload.new_tokens,
        repetitions=len(rounds),
        sparsity_asked=asked,
        sparsity_achieved=item.manifest.sparsity_achieved,
        paper_speedup=paper_speedup(asked),
        file_bytes=item.record.bytes,
        linear_bits=item.record.stored.linear_bits if item.record.stored else None,
        all_bits=item.record.all_bits,
        engine_facts=setup.get("facts", {}),
        machine=machine,
    )
    if row.status == "failed":
        return row
    decode = np.concatenate([entry["decode_ms"] for entry in rounds.values()])
    p50, p90, p99 = (float(value) for value in np.percentile(decode, (50, 90, 99)))
    medians = [statistics.median(entry["decode_ms"]) for entry in rounds.values()]
    ttft_ms = statistics.median(entry["ttft_ms"] for entry in rounds.values())
    end_to_end = [entry["end_to_end_ms"] for entry in rounds.values() if entry["end_to_end_ms"] is not None]
    end_to_end_ms = statistics.median(end_to_end) if end_to_end else None
    joules = [entry["decode_joules"] for entry in rounds.values() if entry["decode_joules"] is not None]
    new_tokens = workload.batch * len(decode)
    return row.model_copy(
        update={
            "perplexity": setup.get("perplexity"),
            "perplexity_text": workload.text if workload.windows is not None else None,
            "perplexity_windows": None if workload.windows is None else len(workload.windows),
            "parity": ParityRecord.model_validate(setup["parity"]),
            "ttft_ms_p50": ttft_ms,
            "prefill_tokens_per_s": 1e3 * workload.batch * len(workload.prompt) / ttft_ms,
            "decode_ms_p50": p50,
            "decode_ms_p90": p90,
            "decode_ms_p99": p99,
            "decode_tokens_per_s": 1e3 * new_tokens / float(decode.sum()),
            "decode_joules_per_token": sum(joules) / new_tokens if len(joules) == len(rounds) else None,
            "end_to_end_ms_p50": end_to_end_ms,
            "end_to_end_tokens_per_s": 1e3 * workload.new_tokens / end_to_end_ms if end_to_end_ms else None,
            "load_ms": statistics.median(entry["load_ms"] for entry in rounds.values()),
            "peak_rss_bytes": max(entry["peak_rss_bytes"] for entry in rounds.values()),
            "rss_growth_bytes": _growth(list(rounds.values())),
            "repeatable": all(entry["tokens"] == next(iter(rounds.values()))["tokens"] for entry in rounds.values()),
            "load_average": _load_average(list(rounds.values())),
            "other_load_cores": max(entry["other_load_cores"] for entry in rounds.values()),
            "unsteady": max(medians) > _UNSTEADY * min(medians),
            "samples_ms": Samples(
                ttft=[entry["ttft_ms"] for entry in rounds.values()],
                decode=[entry["decode_ms"] for entry in rounds.values()],
                rounds=list(rounds),
            ),
        }
    )


def _decode_ms(rounds: Rounds) -> float:
    return float(statistics.median(statistics.median(entry["decode_ms"]) for entry in rounds.values()))


def _speedup(dense: Rounds, rounds: Rounds) -> Spread | None:
    """Median token time of `dense` over that of `rounds`, round by round; None where they share no round."""
    ratios = [
        statistics.median(dense[name]["decode_ms"]) / statistics.median(rounds[name]["decode_ms"])
        for name in sorted(dense.keys() & rounds.keys())
    ]
    if not ratios:
        return None
    confidence_low, confidence_high = _confidence(ratios)
    return Spread(
        median=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        confidence_low=confidence_low,
        confidence_high=confidence_high,
    )


def _confidence(ratios: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95% interval of the median by percentile bootstrap: the same rounds, the same interval."""
    if len(ratios) < 2:
        return None, None
    drawn = np.random.default_rng(0).choice(np.array(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def _continuation(reference: Rounds, rounds: Rounds) -> Continuation | None:
    """The first sequence of each one's first round; None where one has none."""
    if not reference or not rounds:
        return None
    expected, found = (next(iter(samples.values()))["tokens"][0] for samples in (reference, rounds))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected, found, strict=True))
    return Continuation(reference=_REFERENCE, matching=sum(1 for _ in same), tokens=len(expected))


def _growth(rounds: Sequence[dict[str, Any]]) -> int | None:
    """By which the resident memory of a process grew in its rounds, at worst; None where each met a new one."""
    by_process: dict[int, list[int]] = {}
    for entry in rounds:
        by_process.setdefault(entry["process"], []).append(entry["rss_bytes"])
    growths = [sizes[-1] - sizes[0] for sizes in by_process.values() if len(sizes) > 1]
    return max(growths, default=None)


def _load_average(rounds: Sequence[dict[str, Any]]) -> tuple[float, float]:
    return rounds[0]["load_average"][0], rounds[-1]["load_average"][1]
