"""A table of figures: on a terminal, in Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from owl_deploy.formatting import MISSING, percent, perplexity_text
from owl_deploy.grid import Grid, Heading


@dataclass(frozen=True)
class Column:
    """A column: its heading for people and in the CSV, and how people read a value that is there."""

    title: str
    field: str
    text: Callable[[Any], str] = str
    is_text: bool = False

    def read(self, value: object) -> str:
        return MISSING if value is None else self.text(value)


@dataclass(frozen=True)
class Table:
    """Values in rows, one for each column and None where there is none; rules between the sections.

    Attributes:
        name: what tells its CSV from those of the study's other tables; empty for the first.
        findings: what it shows, for people who read no further.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    sections: Sequence[Sequence[Sequence[object]]]
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()


def label(title: str, field: str | None = None) -> Column:
    """A column of words."""
    return Column(title, field or title.replace(" ", "_"), is_text=True)


def asked() -> Column:
    """The column of sparsities asked for: 0.5 -> 50%."""
    return Column("sparsity asked", "sparsity_asked", percent)


def fraction(title: str, field: str) -> Column:
    """A column of sparsities: 0.5 -> 50.00%."""
    return Column(title, field, lambda value: f"{100 * value:.2f}%")


def perplexities(title: str = "perplexity", field: str = "perplexity") -> Column:
    """A column of perplexities."""
    return Column(title, field, perplexity_text)


def terminal_tables(tables: Sequence[Table]) -> RenderableType:
    """All tables with their findings and notes."""
    parts: list[RenderableType] = []
    for table in tables:
        shown = _grid(table).on_terminal(table.title)
        parts += [*(Text(finding) for finding in table.findings), shown, *(Text(note) for note in table.notes)]
    return Group(*parts)


def markdown_table(table: Table) -> str:
    """One table with its heading, findings and notes."""
    return "\n\n".join([f"## {table.title}", *table.findings, _grid(table).in_markdown(), *table.notes])


def csv_text(table: Table) -> str:
    """Every value unrounded; a missing one is an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.field for column in table.columns])
    writer.writerows(row for section in table.sections for row in section)
    return buffer.getvalue()


def _grid(table: Table) -> Grid:
    return Grid(
        [Heading(column.title, column.is_text) for column in table.columns],
        [[_cells(table, row) for row in section] for section in table.sections],
    )


def _cells(table: Table, row: Sequence[object]) -> list[str]:
    return [column.read(value) for column, value in zip(table.columns, row, strict=True)]
