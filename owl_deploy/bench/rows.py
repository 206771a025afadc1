"""The rows of `results.jsonl`: the only data model of a benchmark. Tables, plots and reports are made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from owl_deploy import __version__
from owl_deploy.errors import UserError
from owl_deploy.export.bundle import DENSE_BELOW
from owl_deploy.export.parity import ParityRecord
from owl_deploy.pruning.manifest import Record

SCHEMA_VERSION = 1
RESULTS = "results.jsonl"


class Machine(Record):
    """Where a row was measured.

    Attributes:
        memory_bandwidth_gb_s: reading, with as many threads as the row, GB (1e9 bytes) a second.
    """

    cpu: str
    cores: int
    instruction_set: str
    memory_bytes: int
    memory_bandwidth_gb_s: float
    system: str


class Spread(Record):
    """A ratio: the median over rounds, with the smallest and largest round."""

    median: float
    low: float
    high: float


class Samples(Record):
    """Every sample of a row, in milliseconds, round by round."""

    ttft: list[float] = Field(default_factory=list)
    decode: list[list[float]] = Field(default_factory=list)


class Row(Record):
    """One engine on one bundle under one workload.

    A row whose engine could not run has `status` "failed" and says why in `error`; its figures are null.

    Attributes:
        method, allocation: how the checkpoint was pruned; null for one that owl-deploy did not prune.
        bundle: the bundle's directory.
        flavor, weights: the graph that was run, and its weight format.
        sparsity_asked: null for a checkpoint that owl-deploy did not prune.
        sparsity_achieved: zeros among the block linears' weights, as audited in the graph.
        perplexity: in this engine, on the file that was timed; null without a tokenizer or text.
        ttft_ms_p50: from the prompt's ids to the first new token's id, median of rounds.
        decode_ms_p50, decode_ms_p90, decode_ms_p99: per new token after the first, over all rounds.
        speedup_same_engine: decode p50 of the same engine's dense row over this row's, within each round.
        speedup_fastest_dense: the same against the engine whose dense fp32 row is fastest.
        paper_speedup: the paper's Table 8 at this sparsity (TinyLlama-1.1B, DeepSparse, 36-core Xeon 8360Y).
        peak_rss_bytes: of the engine's own process, load included.
        file_bytes: the graph and its weights.
        parity: of the engine's logits, ONNX Runtime's with torch's, any other's with ONNX Runtime's.
        repetitions: rounds it was timed in: a dense row, which each level is compared with, in those of every level.
        load_average: 1-minute load before the first and after the last round.
        other_load_cores: cores kept busy by other processes while the engines were idle, at worst of all rounds.
        unsteady: some round's median was over 1.5 times that of the fastest round.
        engine_facts: what the engine says of itself: version, instruction set, supported operators …
        samples_ms: every sample.
    """

    schema_version: int = SCHEMA_VERSION
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    owl_deploy_version: str = __version__
    model: str
    method: str | None = None
    allocation: str | None = None
    bundle: str
    engine: str
    flavor: str
    weights: str = "fp32"
    threads: int
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    sparsity_asked: float | None
    sparsity_achieved: float
    perplexity: float | None = None
    perplexity_text: str | None = None
    perplexity_windows: int | None = None
    ttft_ms_p50: float | None = None
    decode_ms_p50: float | None = None
    decode_ms_p90: float | None = None
    decode_ms_p99: float | None = None
    decode_tokens_per_s: float | None = None
    speedup_same_engine: float | None = None
    speedup_same_engine_spread: Spread | None = None
    speedup_fastest_dense: float | None = None
    speedup_fastest_dense_spread: Spread | None = None
    paper_speedup: float | None = None
    load_ms: float | None = None
    peak_rss_bytes: int | None = None
    file_bytes: int
    load_average: tuple[float, float] | None = None
    other_load_cores: float | None = None
    unsteady: bool = False
    parity: ParityRecord | None = None
    engine_facts: dict[str, object] = Field(default_factory=dict)
    machine: Machine
    samples_ms: Samples = Field(default_factory=Samples)

    @property
    def is_dense(self) -> bool:
        """No sparsity was asked of the model, and it has none to speak of."""
        return not self.sparsity_asked and self.sparsity_achieved < DENSE_BELOW


def read_rows(path: Path) -> list[Row]:
    """Read `results.jsonl`.

    Raises:
        UserError: a line is not a row of this schema; it is named.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(Row.model_validate(json.loads(line)))
        except (ValueError, ValidationError) as error:
            raise UserError(f"{path}:{number}: not a result row ({str(error).splitlines()[0]})") from error
    return rows
