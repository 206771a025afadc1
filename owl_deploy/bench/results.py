"""From measurements to rows: percentiles over all samples, ratios within rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from owl_deploy.bench.measure import Bench, Configuration, Workload
from owl_deploy.bench.rows import Machine, Row, Samples, Spread
from owl_deploy.export.names import weights_of
from owl_deploy.export.parity import ParityRecord
from owl_deploy.report.paper import paper_speedup

_UNSTEADY = 1.5  # a round's median over the fastest round's: past this, the cores were shared

Rounds = dict[str, dict[str, Any]]


def make_rows(bench: Bench, workload: Workload, machine: Machine) -> list[Row]:
    """One row per configuration, failed ones included, in the order of the configurations."""
    rounds = [bench.rounds(item) if bench.error(item) is None else {} for item in bench.configurations]
    rows = [
        _row(item, workload, machine, error=bench.error(item), setup=bench.setup(item) or {}, rounds=samples)
        for item, samples in zip(bench.configurations, rounds, strict=True)
    ]
    dense: dict[str, Rounds] = {}
    fp32: list[Rounds] = []  # rounding weights is a saving of its own, not what sparsity is measured against
    for row, samples in zip(rows, rounds, strict=True):
        if row.is_dense and samples:
            dense.setdefault(row.engine, samples)
            fp32 += [samples] if row.weights == "fp32" else []
    fastest = min(fp32, key=_decode_ms, default={})
    for row, samples in zip(rows, rounds, strict=True):
        row.speedup_same_engine_spread = same = _speedup(dense.get(row.engine, {}), samples)
        row.speedup_fastest_dense_spread = over_fastest = _speedup(fastest, samples)
        row.speedup_same_engine = same.median if same else None
        row.speedup_fastest_dense = over_fastest.median if over_fastest else None
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
        method=item.manifest.method,
        allocation=item.manifest.allocation,
        bundle=str(item.bundle),
        engine=item.spec.name,
        flavor=item.flavor,
        weights=weights_of(item.flavor) or "fp32",
        threads=workload.threads,
        prompt_tokens=len(workload.prompt),
        new_tokens=workload.new_tokens,
        repetitions=len(rounds),
        sparsity_asked=asked,
        sparsity_achieved=item.manifest.sparsity_achieved,
        paper_speedup=paper_speedup(asked),
        file_bytes=item.record.bytes,
        engine_facts=setup.get("facts", {}),
        machine=machine,
    )
    if row.status == "failed":
        return row
    decode = np.concatenate([entry["decode_ms"] for entry in rounds.values()])
    p50, p90, p99 = (float(value) for value in np.percentile(decode, (50, 90, 99)))
    medians = [statistics.median(entry["decode_ms"]) for entry in rounds.values()]
    return row.model_copy(
        update={
            "perplexity": setup.get("perplexity"),
            "perplexity_text": workload.text if workload.windows is not None else None,
            "perplexity_windows": None if workload.windows is None else len(workload.windows),
            "parity": ParityRecord.model_validate(setup["parity"]),
            "ttft_ms_p50": statistics.median(entry["ttft_ms"] for entry in rounds.values()),
            "decode_ms_p50": p50,
            "decode_ms_p90": p90,
            "decode_ms_p99": p99,
            "decode_tokens_per_s": 1e3 * len(decode) / float(decode.sum()),
            "load_ms": statistics.median(entry["load_ms"] for entry in rounds.values()),
            "peak_rss_bytes": max(entry["peak_rss_bytes"] for entry in rounds.values()),
            "load_average": _load_average(list(rounds.values())),
            "other_load_cores": max(entry["other_load_cores"] for entry in rounds.values()),
            "unsteady": max(medians) > _UNSTEADY * min(medians),
            "samples_ms": Samples(
                ttft=[entry["ttft_ms"] for entry in rounds.values()],
                decode=[entry["decode_ms"] for entry in rounds.values()],
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
    return Spread(median=statistics.median(ratios), low=min(ratios), high=max(ratios))


def _load_average(rounds: Sequence[dict[str, Any]]) -> tuple[float, float]:
    return rounds[0]["load_average"][0], rounds[-1]["load_average"][1]
