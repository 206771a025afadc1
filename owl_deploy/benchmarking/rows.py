"""The rows of `results.jsonl`: the only data model of a benchmark. Tables, plots and reports are made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from owl_deploy import __version__
from owl_deploy.bundle.manifest import is_dense, sparsity_of
from owl_deploy.bundle.records import ParityRecord
from owl_deploy.errors import UserError, first_line
from owl_deploy.files import write_text
from owl_deploy.machine.description import Machine
from owl_deploy.records import Record

SCHEMA_VERSION = 4  # 3 had no KV caches and bits; 2 no hashes, architecture or names of rounds; 1 no batches or energy
RESULTS = "results.jsonl"
WIDE = 0.2  # of a ratio's median: a wider confidence interval is marked


class Spread(Record):
    """A ratio: the median over rounds, with the smallest and largest round."""

    median: float
    """The median over rounds."""
    low: float
    """The smallest round."""
    high: float
    """The largest round."""
    confidence_low: float | None = None
    """Lower end of the median's 95% interval, by bootstrap over rounds; null for one round."""
    confidence_high: float | None = None
    """Upper end of the median's 95% interval, by bootstrap over rounds; null for one round."""

    @property
    def is_wide(self) -> bool:
        """Whether the interval is too wide to compare engines by."""
        low, high = self.confidence_low, self.confidence_high
        return low is not None and high is not None and high - low > WIDE * self.median


class Continuation(Record):
    """The greedy tokens after the prompt, beside those of another engine on the same weights."""

    reference: str
    """The engine it is compared with."""
    matching: int
    """How many of the first tokens are the same, of `tokens`."""
    tokens: int
    """How many were generated."""


class Samples(Record):
    """Every sample of a row, in milliseconds, round by round."""

    ttft: list[float] = Field(default_factory=list)
    """Time to first token: one sample per round."""
    decode: list[list[float]] = Field(default_factory=list)
    """Of each round, one sample per token after the first."""
    rounds: list[str] = Field(default_factory=list)
    """The round's name: rows of one run that share it were timed side by side."""


class Row(Record):
    """One engine on one bundle under one workload.

    A row whose engine could not run has `status` "failed" and says why in `error`; its figures are null.
    """

    schema_version: int = SCHEMA_VERSION
    """The version of this schema."""
    status: Literal["ok", "failed"] = "ok"
    """Whether the engine ran."""
    error: str | None = None
    """Why it did not run."""
    owl_deploy_version: str = __version__
    """The version that measured."""
    model: str
    """As the user named it to `prune` or `export`: a hub id or a path."""
    checkpoint_sha256: str | None = None
    """Of the checkpoint that was exported: its config and weights."""
    base_sha256: str | None = None
    """Of the model that the checkpoint was pruned from; null where owl-deploy did not prune it."""
    architecture: str | None = None
    """The model's class and sizes: rows of equal architecture are compared."""
    method: str | None = None
    """How the checkpoint was pruned; null where owl-deploy did not prune it."""
    allocation: str | None = None
    """How its sparsity was allocated to blocks; null where owl-deploy did not prune it."""
    bundle: str
    """The bundle's directory."""
    engine: str
    """The engine's name; see `owl-deploy engines list`."""
    flavor: str
    """The graph that was run."""
    weights: str = "fp32"
    """Its weight format."""
    kv_cache: str = "exact"
    """`int8` where the graph keeps keys and values in 8 bits, else `exact`: as its engine keeps them by itself."""
    threads: int
    """CPU threads the engine had."""
    batch: int = 1
    """Sequences decoded side by side."""
    prompt_tokens: int
    """Tokens of each prompt."""
    new_tokens: int
    """Tokens generated of each sequence."""
    repetitions: int
    """Rounds it was timed in: a dense row, which each level is compared with, in those of every level."""
    sparsity_asked: float | None
    """As asked of `prune`; null where owl-deploy did not prune the checkpoint."""
    sparsity_achieved: float
    """Zeros among the block linears' weights, as audited in the graph."""
    perplexity: float | None = None
    """In this engine, on the file that was timed; null without a tokenizer or text."""
    perplexity_text: str | None = None
    """The text that perplexity was computed on."""
    perplexity_windows: int | None = None
    """How many windows of it."""
    ttft_ms_p50: float | None = None
    """From the prompt's ids to the first new token's id, median of rounds."""
    prefill_tokens_per_s: float | None = None
    """Prompt tokens of all sequences over `ttft_ms_p50`."""
    decode_ms_p50: float | None = None
    """Median time of a decoding step after the first token (TPOT), over all rounds."""
    decode_ms_p90: float | None = None
    """Its 90th percentile."""
    decode_ms_p99: float | None = None
    """Its 99th percentile."""
    decode_tokens_per_s: float | None = None
    """New tokens of all sequences, per second of decoding."""
    speedup_same_engine: float | None = None
    """Decode p50 of the same engine's dense row over this row's, within each round; median of rounds."""
    speedup_same_engine_spread: Spread | None = None
    """The rounds behind `speedup_same_engine`."""
    speedup_fastest_dense: float | None = None
    """The same, over the engine whose dense fp32 row is fastest."""
    speedup_fastest_dense_spread: Spread | None = None
    """The rounds behind `speedup_fastest_dense`."""
    speedup_any_precision: float | None = None
    """The same, over the fastest dense row in any precision, int4 too."""
    speedup_any_precision_spread: Spread | None = None
    """The rounds behind `speedup_any_precision`."""
    paper_speedup: float | None = None
    """The paper's Table 8 at this sparsity (TinyLlama-1.1B, DeepSparse, 36-core Xeon 8360Y)."""
    end_to_end_ms_p50: float | None = None
    """From the prompt's text to the end of the new text, tokenised and sampled, median of rounds."""
    end_to_end_tokens_per_s: float | None = None
    """New tokens over `end_to_end_ms_p50`."""
    decode_joules_per_token: float | None = None
    """What the CPU's packages took, whatever else they did; null where it cannot be read."""
    load_ms: float | None = None
    """Time to load the model, the engine's imports included, median of rounds."""
    peak_rss_bytes: int | None = None
    """Peak resident memory of the engine's own process, load included."""
    rss_growth_bytes: int | None = None
    """Resident memory of one process after its last round less that after its first."""
    file_bytes: int
    """Size of the graph and its weights."""
    linear_bits: float | None = None
    """Bits of a weight of the blocks' linears, scales and zero points with it, as the file has them."""
    all_bits: float | None = None
    """Bits of the whole file for each parameter of the model."""
    load_average: tuple[float, float] | None = None
    """1-minute load before the first and after the last round."""
    other_load_cores: float | None = None
    """Cores kept busy by other processes while the engines were idle, at worst of all rounds."""
    unsteady: bool = False
    """Some round's median was over 1.5 times that of the fastest round."""
    repeatable: bool = True
    """Every round generated the same tokens."""
    parity: ParityRecord | None = None
    """How its logits on this machine agree with those torch computed at export, or with those of another engine."""
    continuation: Continuation | None = None
    """Its greedy tokens beside ONNX Runtime's on the same weights; null for rounded weights."""
    engine_facts: dict[str, object] = Field(default_factory=dict)
    """What the engine says of itself: version, instruction set, supported operators …"""
    machine: Machine
    """Where it was measured."""
    samples_ms: Samples = Field(default_factory=Samples)
    """Every sample."""

    @property
    def is_dense(self) -> bool:
        """See `bundle.manifest.is_dense`."""
        return is_dense(self.sparsity_asked, self.sparsity_achieved)

    @property
    def sparsity(self) -> float:
        """See `bundle.manifest.sparsity_of`."""
        return sparsity_of(self.sparsity_asked, self.sparsity_achieved)

    def spread_of(self, speedup: str) -> Spread | None:
        """The rounds behind `speedup_same_engine` or another of its kind."""
        spread: Spread | None = getattr(self, f"{speedup}_spread")
        return spread

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two measurements of the same: one checkpoint in one graph, one workload, one machine.

        Older versions did not record the checkpoint: of their rows the bundle's path stands for it. The size tells
        graphs of one flavor apart whose vocabulary is stored in another format.
        """
        return (self.checkpoint_sha256 or self.bundle, self.file_bytes, *self._setting)

    @property
    def place(self) -> tuple[object, ...]:
        """The same by the bundle's path, whatever lies there: within one directory of results it names one row."""
        return (self.bundle, *self._setting)

    @property
    def _setting(self) -> tuple[object, ...]:
        workload = (self.threads, self.batch, self.prompt_tokens, self.new_tokens)
        return (self.model, self.engine, self.flavor, *workload, self.machine.cpu, self.machine.cores)


def merged(results: Iterable[Iterable[Row]]) -> list[Row]:
    """The rows of several results in their order, each identity once: as in the last result that has it."""
    rows = {row.identity: row for result in results for row in result}
    return list(rows.values())


def updated(kept: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows of one directory of results: those that were kept, but for what is in `rows` of the same place."""
    places = {row.place for row in rows}
    return merged([[row for row in kept if row.place not in places], rows])


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write `results.jsonl`, whole or not at all."""
    write_text(path, "".join(f"{row.model_dump_json()}\n" for row in rows))


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
