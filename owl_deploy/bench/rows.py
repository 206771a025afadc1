"""The rows of `results.jsonl`: the only data model of a benchmark. Tables, plots and reports are made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from owl_deploy import __version__
from owl_deploy.bundle.manifest import DENSE_BELOW
from owl_deploy.bundle.records import ParityRecord
from owl_deploy.errors import UserError, first_line
from owl_deploy.machine.description import Machine
from owl_deploy.records import Record

SCHEMA_VERSION = 2  # 1 had no batches, confidence intervals, continuations, energy or end-to-end times
RESULTS = "results.jsonl"
WIDE = 0.2  # of a ratio's median: a wider confidence interval is marked


class Spread(Record):
    """A ratio: the median over rounds, with the smallest and largest round.

    Attributes:
        median: over rounds.
        low, high: the smallest and the largest round.
        confidence_low, confidence_high: where the median lies at 95%, by bootstrap over rounds; null for one round.
    """

    median: float
    low: float
    high: float
    confidence_low: float | None = None
    confidence_high: float | None = None

    @property
    def is_wide(self) -> bool:
        """Whether the interval is too wide to compare engines by."""
        low, high = self.confidence_low, self.confidence_high
        return low is not None and high is not None and high - low > WIDE * self.median


class Continuation(Record):
    """The greedy tokens after the prompt, beside those of another engine on the same weights.

    Attributes:
        reference: the engine it is compared with.
        matching: how many of the first tokens are the same, of `tokens`.
        tokens: how many were generated.
    """

    reference: str
    matching: int
    tokens: int


class Samples(Record):
    """Every sample of a row, in milliseconds, round by round.

    Attributes:
        ttft: one per round.
        decode: of each round, one per token after the first.
    """

    ttft: list[float] = Field(default_factory=list)
    decode: list[list[float]] = Field(default_factory=list)


class Row(Record):
    """One engine on one bundle under one workload.

    A row whose engine could not run has `status` "failed" and says why in `error`; its figures are null.

    Attributes:
        schema_version: of this schema.
        status, error: whether the engine ran, and why not.
        owl_deploy_version: of what measured.
        model: as it was named when it was pruned or exported: a hub id or a path.
        method, allocation: how the checkpoint was pruned; null for one that owl-deploy did not prune.
        bundle: the bundle's directory.
        engine: its name; see `owl-deploy engines list`.
        flavor, weights: the graph that was run, and its weight format.
        threads: CPU threads the engine had.
        batch: sequences decoded side by side.
        prompt_tokens, new_tokens: of each sequence.
        sparsity_asked: null for a checkpoint that owl-deploy did not prune.
        sparsity_achieved: zeros among the block linears' weights, as audited in the graph.
        perplexity: in this engine, on the file that was timed; null without a tokenizer or text.
        perplexity_text, perplexity_windows: the text it was computed on, and how many windows of it.
        ttft_ms_p50: from the prompt's ids to the first new token's id, median of rounds.
        prefill_tokens_per_s: prompt tokens over that, of all sequences.
        decode_ms_p50, decode_ms_p90, decode_ms_p99: per decoding step after the first token (TPOT), over all rounds.
        decode_tokens_per_s: new tokens of all sequences.
        speedup_same_engine: decode p50 of the same engine's dense row over this row's, within each round.
        speedup_fastest_dense: the same against the engine whose dense fp32 row is fastest.
        speedup_any_precision: the same against the fastest dense row in any precision, int4 too.
        end_to_end_ms_p50: from the prompt's text to the end of the new text, tokenised and sampled, median of rounds.
        end_to_end_tokens_per_s: new tokens over that.
        decode_joules_per_token: of the CPU's packages, whatever else they did; null where it cannot be read.
        speedup_same_engine_spread, speedup_fastest_dense_spread, speedup_any_precision_spread: of these over rounds.
        paper_speedup: the paper's Table 8 at this sparsity (TinyLlama-1.1B, DeepSparse, 36-core Xeon 8360Y).
        load_ms: to load the model, the engine's imports included, median of rounds.
        peak_rss_bytes: of the engine's own process, load included.
        rss_growth_bytes: resident memory of one process after its last round less that after its first.
        file_bytes: the graph and its weights.
        parity: of the engine's logits, ONNX Runtime's with torch's, any other's with ONNX Runtime's.
        repetitions: rounds it was timed in: a dense row, which each level is compared with, in those of every level.
        load_average: 1-minute load before the first and after the last round.
        other_load_cores: cores kept busy by other processes while the engines were idle, at worst of all rounds.
        unsteady: some round's median was over 1.5 times that of the fastest round.
        repeatable: every round generated the same tokens.
        continuation: its greedy tokens beside ONNX Runtime's on the same weights; null for rounded weights.
        engine_facts: what the engine says of itself: version, instruction set, supported operators …
        machine: where it was measured.
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
    batch: int = 1
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    sparsity_asked: float | None
    sparsity_achieved: float
    perplexity: float | None = None
    perplexity_text: str | None = None
    perplexity_windows: int | None = None
    ttft_ms_p50: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_ms_p50: float | None = None
    decode_ms_p90: float | None = None
    decode_ms_p99: float | None = None
    decode_tokens_per_s: float | None = None
    speedup_same_engine: float | None = None
    speedup_same_engine_spread: Spread | None = None
    speedup_fastest_dense: float | None = None
    speedup_fastest_dense_spread: Spread | None = None
    speedup_any_precision: float | None = None
    speedup_any_precision_spread: Spread | None = None
    paper_speedup: float | None = None
    end_to_end_ms_p50: float | None = None
    end_to_end_tokens_per_s: float | None = None
    decode_joules_per_token: float | None = None
    load_ms: float | None = None
    peak_rss_bytes: int | None = None
    rss_growth_bytes: int | None = None
    file_bytes: int
    load_average: tuple[float, float] | None = None
    other_load_cores: float | None = None
    unsteady: bool = False
    repeatable: bool = True
    parity: ParityRecord | None = None
    continuation: Continuation | None = None
    engine_facts: dict[str, object] = Field(default_factory=dict)
    machine: Machine
    samples_ms: Samples = Field(default_factory=Samples)

    @property
    def is_dense(self) -> bool:
        """No sparsity was asked of the model, and it has none to speak of."""
        return not self.sparsity_asked and self.sparsity_achieved < DENSE_BELOW

    @property
    def sparsity(self) -> float:
        """As asked; as achieved where owl-deploy was not asked."""
        return self.sparsity_achieved if self.sparsity_asked is None else self.sparsity_asked

    def spread_of(self, speedup: str) -> Spread | None:
        """The rounds behind `speedup_same_engine` or another of its kind."""
        spread: Spread | None = getattr(self, f"{speedup}_spread")
        return spread

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for rows of which the later one takes the earlier one's place: same measurement, same machine."""
        workload = (self.threads, self.batch, self.prompt_tokens, self.new_tokens)
        return (self.model, self.engine, self.bundle, self.flavor, *workload, self.machine.cpu, self.machine.cores)


def merged(results: Iterable[Iterable[Row]]) -> list[Row]:
    """The rows of several results in their order, each identity once: as in the last result that has it."""
    rows = {row.identity: row for result in results for row in result}
    return list(rows.values())


def read_rows(path: Path) -> list[Row]:
    """Read `results.jsonl`.

    Raises:
        UserError: it cannot be read, or a line is not a row of this schema or an older one; it is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{path}: cannot be read ({reason}); give a {RESULTS}, as `bench` writes it") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            version = fields.get("schema_version") if isinstance(fields, dict) else None
            if isinstance(version, int) and version > SCHEMA_VERSION:
                raise UserError(
                    f"{path}:{number}: written by a newer owl-deploy (schema {version}, this one reads up to "
                    f"{SCHEMA_VERSION}); update owl-deploy"
                )
            rows.append(Row.model_validate(fields))
        except (ValueError, ValidationError) as error:
            raise UserError(f"{path}:{number}: not a result row ({_reason(error)})") from error
    return rows


def _reason(error: ValueError) -> str:
    """What is wrong with a line, in words; of a record, its first wrong field."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
