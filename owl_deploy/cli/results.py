"""How `bench` and `report` show their rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

if TYPE_CHECKING:
    from owl_deploy.benchmarking.rows import Row

_TABLE_COLUMNS = 220  # if stdout is not a terminal


def show(rows: Sequence[Row], report: Path, *, json: bool, quiet: bool) -> None:
    """Print one JSON object per row; or a table, whether sparse pays, and the path of the report; or nothing."""
    from owl_deploy.report.series import by_workload
    from owl_deploy.report.tables import terminal_table
    from owl_deploy.report.verdict import verdict_on

    if json:
        for row in rows:
            typer.echo(row.model_dump_json())
    elif not quiet:
        Console(width=None if sys.stdout.isatty() else _TABLE_COLUMNS).print(terminal_table(rows))
        for name, here in by_workload(rows).items():
            typer.echo("\n".join([*([f"{name}:"] if name else []), *verdict_on(here), ""]))
        typer.echo(str(report))
