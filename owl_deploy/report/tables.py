"""Rows as a table: on a terminal, in Markdown, and as CSV, all from one list of columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from owl_deploy.benchmarking.rows import WIDE, Row, Spread
from owl_deploy.files import write_text
from owl_deploy.formatting import MISSING, number, one_line, percent, perplexity_text, size
from owl_deploy.grid import Grid, Heading
from owl_deploy.machine.description import Machine
from owl_deploy.paper.speedups import PAPER_SETTING
from owl_deploy.report.series import Series, by_series, by_workload, dense_references
from owl_deploy.report.text import ratio

UNSTEADY_MARK, WIDE_MARK = "†", "‡"
SPARSE_WEIGHTS = "sparse_weights"  # what an engine that may or may not read them says of itself
_ERROR_CHARACTERS = 60


@dataclass(frozen=True)
class Column:
    """A column of every table.

    Attributes:
        text: the cell as people read it.
        fields: the row's fields behind the cell, which are the columns of the CSV; a dot leads into a record.
        sort_by: the field that rows are sorted by; by default the first.
        tells: whether the column says anything of these rows; by default, whether any cell is filled.
    """

    title: str
    text: Callable[[Series, Row], str]
    fields: tuple[str, ...]
    is_text: bool = False
    sort_by: str | None = None
    tells: Callable[[Sequence[Row]], bool] | None = None

    def is_shown(self, rows: Sequence[Row]) -> bool:
        """Whether tables for people have it; the CSV always does."""
        if self.tells is not None:
            return self.tells(rows)
        return any(value_at(row, self.fields[0]) is not None for row in rows)


def _engine(series: Series, row: Row) -> str:
    return f"{series.name} {UNSTEADY_MARK}" if row.unsteady else series.name


def _sparsity(series: Series, row: Row) -> str:
    return f"{series.label(row)} ({row.sparsity_achieved:.2%})"


def _perplexity_or_failure(_: Series, row: Row) -> str:
    """The first figure; a row without any says here why."""
    if row.status == "failed":
        return f"failed: {one_line(row.error or 'no reason given', _ERROR_CHARACTERS)}"
    return perplexity_text(row.perplexity)


def _decode(_: Series, row: Row) -> str:
    if row.decode_ms_p50 is None:
        return MISSING
    return f"{number(row.decode_ms_p50)} ({number(row.decode_ms_p90)}, {number(row.decode_ms_p99)})"


def _always(_: Sequence[Row]) -> bool:
    return True


def _speedup_column(title: str, field: str, tells: Callable[[Sequence[Row]], bool] | None = None) -> Column:
    """A ratio with the spread of its rounds, marked where its confidence interval is wide."""

    def text(_: Series, row: Row) -> str:
        spread = row.spread_of(field)
        shown = ratio(getattr(row, field), spread)
        return f"{shown} {WIDE_MARK}" if spread and spread.is_wide else shown

    parts = ("low", "high", "confidence_low", "confidence_high")
    return Column(title, text, (field, *(f"{field}_spread.{part}" for part in parts)), tells=tells)


def _end_to_end(_: Series, row: Row) -> str:
    if row.end_to_end_ms_p50 is None:
        return MISSING
    return f"{number(row.end_to_end_ms_p50)} ({number(row.end_to_end_tokens_per_s)})"


def _bits(_: Series, row: Row) -> str:
    if row.linear_bits is None or row.all_bits is None:
        return MISSING
    return f"{row.linear_bits:.2f} ({row.all_bits:.2f})"


def _any_precision_differs(rows: Sequence[Row]) -> bool:
    """Whether a rounded dense row is faster than every exact one."""
    return any(row.speedup_any_precision != row.speedup_fastest_dense for row in rows if row.speedup_any_precision)


COLUMNS = (
    Column("engine", _engine, ("engine", "flavor", "weights", "kv_cache"), is_text=True, tells=_always),
    Column("batch", lambda _, row: str(row.batch), ("batch",), tells=lambda rows: any(row.batch > 1 for row in rows)),
    Column(
        "sparsity asked (achieved)",
        _sparsity,
        ("sparsity_asked", "sparsity_achieved"),
        sort_by="sparsity_achieved",
        tells=_always,
    ),
    Column("perplexity in that engine", _perplexity_or_failure, ("perplexity",), tells=_always),
    Column("TTFT ms", lambda _, row: number(row.ttft_ms_p50), ("ttft_ms_p50",)),
    Column("prefill tokens/s", lambda _, row: number(row.prefill_tokens_per_s), ("prefill_tokens_per_s",)),
    Column("decode ms/token p50 (p90, p99)", _decode, ("decode_ms_p50", "decode_ms_p90", "decode_ms_p99")),
    Column("decode tokens/s", lambda _, row: number(row.decode_tokens_per_s), ("decode_tokens_per_s",)),
    Column("end to end ms (tokens/s)", _end_to_end, ("end_to_end_ms_p50", "end_to_end_tokens_per_s")),
    Column("joules per token", lambda _, row: number(row.decode_joules_per_token), ("decode_joules_per_token",)),
    _speedup_column("speed-up over same engine dense", "speedup_same_engine"),
    _speedup_column("speed-up over fastest dense fp32", "speedup_fastest_dense"),
    _speedup_column("speed-up over fastest dense of any precision", "speedup_any_precision", _any_precision_differs),
    Column("paper's Table 8", lambda _, row: ratio(row.paper_speedup), ("paper_speedup",)),
    Column("peak RSS", lambda _, row: size(row.peak_rss_bytes), ("peak_rss_bytes",)),
    Column("bits a weight in linears (in all)", _bits, ("linear_bits", "all_bits")),
    Column("file size", lambda _, row: size(row.file_bytes), ("file_bytes",)),
)

_CSV_ONLY = (
    *("status", "error", "unsteady", "repeatable", "model", "method", "allocation", "bundle"),
    *("checkpoint_sha256", "base_sha256", "architecture"),
    *("threads", "prompt_tokens", "new_tokens", "repetitions"),
    *("perplexity_text", "perplexity_windows", "load_ms", "rss_growth_bytes", "load_average", "other_load_cores"),
    *("parity.reference", "parity.positions", "parity.positions_with_past", "parity.max_abs_difference"),
    *("parity.max_abs_difference_with_past", "parity.argmax_agreement", "parity.relative_difference"),
    *("continuation.reference", "continuation.matching", "continuation.tokens"),
    *(f"machine.{name}" for name in Machine.model_fields),
    *("engine_facts", "owl_deploy_version", "schema_version"),
)
CSV_FIELDS = (*(field for column in COLUMNS for field in column.fields), *_CSV_ONLY)


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that say something of these rows."""
    return [column for column in COLUMNS if column.is_shown(rows)]


def terminal_table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal, a rule between engines, footnotes below; what is in parentheses has its own line."""
    grid = _grid(rows, lambda cell: "\n(".join(split_cell(cell)))
    table = grid.on_terminal()
    table.caption, table.caption_justify = Text("\n".join(footnotes(rows))), "left"
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, footnotes below."""
    return f"{_grid(rows, str).in_markdown()}\n" + "".join(f"\n{note}\n" for note in footnotes(rows))


def _grid(rows: Sequence[Row], shown: Callable[[str], str]) -> Grid:
    columns = shown_columns(rows)
    return Grid(
        [Heading(column.title, column.is_text) for column in columns],
        [
            [[shown(column.text(series, row)) for column in columns] for row in series.rows]
            for series in by_series(rows)
        ],
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every field but the samples, unrounded; a missing figure is an empty cell.

    Raises:
        UserError: `path` cannot be written.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    writer.writerows([_cell(row, field) for field in CSV_FIELDS] for series in by_series(rows) for row in series.rows)
    write_text(path, buffer.getvalue())


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the table's cells do not say of themselves."""
    notes = []
    if any(row.speedup_same_engine_spread or row.speedup_fastest_dense_spread for row in rows):
        notes.append("Speed-ups: median of rounds (slowest–fastest round); below 1x the row is slower.")
    if len(dense_references(rows, "speedup_fastest_dense")) > len(by_workload(rows)):
        notes.append(
            "These rows are of several runs or models: a speed-up is over a dense row of its own run and model."
        )
    if any(row.paper_speedup is not None for row in rows):
        notes.append(f"Paper's Table 8: {PAPER_SETTING}.")
    for engine, found in {row.engine: row.engine_facts.get(SPARSE_WEIGHTS) for row in rows}.items():
        if found is not None:
            notes.append(f"{engine} reads sparse weights in {found}.")
    if any(spread.is_wide for row in rows for spread in _spreads(row)):
        notes.append(
            f"{WIDE_MARK} wide: the 95% confidence interval of this speed-up is wider than {percent(WIDE)} of it; "
            "more repetitions, or a quieter machine, would narrow it."
        )
    if any(row.unsteady for row in rows):
        notes.append(
            f"{UNSTEADY_MARK} unsteady: some round's median was over 1.5 times that of the fastest round; "
            "measure this row again on a quieter machine before relying on it."
        )
    return notes


def split_cell(text: str) -> list[str]:
    """What comes before a parenthesis, and the rest: `1.31x (1.28–1.35) ‡` is `1.31x` and `1.28–1.35) ‡`."""
    return text.split(" (", maxsplit=1)


def value_at(row: Row, field: str) -> object:
    """The value at a dotted path, None where a record on the way is missing."""
    value: object = row
    for name in field.split("."):
        value = getattr(value, name, None)
    return value


def _spreads(row: Row) -> list[Spread]:
    spreads = (row.speedup_same_engine_spread, row.speedup_fastest_dense_spread, row.speedup_any_precision_spread)
    return [spread for spread in spreads if spread is not None]


def _cell(row: Row, field: str) -> object:
    """Of the CSV: lists and mappings as JSON."""
    value = value_at(row, field)
    return json.dumps(value) if isinstance(value, dict | list | tuple) else value
