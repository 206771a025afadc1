"""Rows as a table: on a terminal, in Markdown, and as CSV, all from one list of columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from owl_deploy.bench.rows import Row
from owl_deploy.files import write_text
from owl_deploy.report.paper import PAPER_SETTING
from owl_deploy.report.series import Series, by_series
from owl_deploy.report.text import MISSING, escaped, number, one_line, perplexity_text, ratio, size

UNSTEADY_MARK = "†"
_ERROR_CHARACTERS = 60


@dataclass(frozen=True)
class Column:
    """A column of every table.

    Attributes:
        text: the cell as people read it.
        fields: the row's fields behind the cell, which are the columns of the CSV; a dot leads into a record.
    """

    title: str
    text: Callable[[Series, Row], str]
    fields: tuple[str, ...]
    is_text: bool = False


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


COLUMNS = (
    Column("engine", _engine, ("engine", "flavor", "weights"), is_text=True),
    Column("sparsity asked (achieved)", _sparsity, ("sparsity_asked", "sparsity_achieved")),
    Column("perplexity in that engine", _perplexity_or_failure, ("perplexity",)),
    Column("TTFT ms", lambda _, row: number(row.ttft_ms_p50), ("ttft_ms_p50",)),
    Column("decode ms/token p50 (p90, p99)", _decode, ("decode_ms_p50", "decode_ms_p90", "decode_ms_p99")),
    Column("decode tokens/s", lambda _, row: number(row.decode_tokens_per_s), ("decode_tokens_per_s",)),
    Column(
        "speed-up over same engine dense",
        lambda _, row: ratio(row.speedup_same_engine, row.speedup_same_engine_spread),
        ("speedup_same_engine", "speedup_same_engine_spread.low", "speedup_same_engine_spread.high"),
    ),
    Column(
        "speed-up over fastest dense engine",
        lambda _, row: ratio(row.speedup_fastest_dense, row.speedup_fastest_dense_spread),
        ("speedup_fastest_dense", "speedup_fastest_dense_spread.low", "speedup_fastest_dense_spread.high"),
    ),
    Column("paper's Table 8", lambda _, row: ratio(row.paper_speedup), ("paper_speedup",)),
    Column("peak RSS", lambda _, row: size(row.peak_rss_bytes), ("peak_rss_bytes",)),
    Column("file size", lambda _, row: size(row.file_bytes), ("file_bytes",)),
)

_CSV_ONLY = (
    *("status", "error", "unsteady", "model", "method", "allocation", "bundle"),
    *("threads", "prompt_tokens", "new_tokens", "repetitions"),
    *("perplexity_text", "perplexity_windows", "load_ms", "load_average", "other_load_cores"),
    *("parity.reference", "parity.positions", "parity.positions_with_past", "parity.max_abs_difference"),
    *("parity.max_abs_difference_with_past", "parity.argmax_agreement"),
    *("machine.cpu", "machine.cores", "machine.instruction_set", "machine.memory_bytes"),
    *("machine.memory_bandwidth_gb_s", "machine.system"),
    *("engine_facts", "owl_deploy_version", "schema_version"),
)


def terminal_table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal, a rule between engines, footnotes below."""
    table = Table(box=box.SIMPLE_HEAD, caption=Text("\n".join(footnotes(rows))), caption_justify="left")
    for column in COLUMNS:
        justify: JustifyMethod = "left" if column.is_text else "right"
        table.add_column(column.title, justify=justify, no_wrap=column.is_text, overflow="fold")
    for series in by_series(rows):
        for row in series.rows:
            table.add_row(*(Text(column.text(series, row)) for column in COLUMNS))
        table.add_section()
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, footnotes below."""
    lines = [[column.title for column in COLUMNS], [":--" if column.is_text else "--:" for column in COLUMNS]]
    for series in by_series(rows):
        lines += [[escaped(column.text(series, row)) for column in COLUMNS] for row in series.rows]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return table + "".join(f"\n{note}\n" for note in footnotes(rows))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every field but the samples, unrounded; a missing figure is an empty cell.

    Raises:
        UserError: `path` cannot be written.
    """
    fields = (*(field for column in COLUMNS for field in column.fields), *_CSV_ONLY)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows([_value(row, field) for field in fields] for series in by_series(rows) for row in series.rows)
    write_text(path, buffer.getvalue())


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the table's cells do not say of themselves."""
    notes = []
    if any(row.speedup_same_engine_spread or row.speedup_fastest_dense_spread for row in rows):
        notes.append("Speed-ups: median of rounds (slowest–fastest round); below 1x the row is slower.")
    if any(row.paper_speedup is not None for row in rows):
        notes.append(f"Paper's Table 8: {PAPER_SETTING}.")
    if any(row.unsteady for row in rows):
        notes.append(
            f"{UNSTEADY_MARK} unsteady: some round's median was over 1.5 times that of the fastest round; "
            "measure this row again on a quieter machine before relying on it."
        )
    return notes


def _value(row: Row, field: str) -> object:
    """The value at a dotted path, None where a record on the way is missing; lists and mappings as JSON."""
    value: object = row
    for name in field.split("."):
        value = getattr(value, name, None)
    return json.dumps(value) if isinstance(value, dict | tuple) else value
