"""`owl-deploy report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.cli.results import show
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter


def report(
    results: Annotated[
        Optional[list[Path]], typer.Argument(help="Directories that `bench` wrote, or results.jsonl files.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the report.")] = Path("owl-report"),
    schema: Annotated[
        bool, typer.Option("--schema", help="Only print the JSON schema of a line of results.jsonl.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write one report from the results of several runs, on one machine or on many.

    Writes the files that `bench` writes: report.html (one page that needs no network), report.md, results.csv,
    results.jsonl, speedup.png and pareto.png. If several results have the same measurement on the same machine, the one
    given last counts. Speed-ups are always ratios within one run, never between two. With --json, each row is
    printed as one JSON object.

    Examples:

        owl-deploy report results -o report

        owl-deploy report xeon/results zen5/results.jsonl -o both

        owl-deploy report --schema
    """
    import json as json_text

    from owl_deploy.benchmarking.rows import RESULTS, merged, read_rows
    from owl_deploy.files import locked
    from owl_deploy.report.schema import row_schema
    from owl_deploy.report.write import write_report

    if schema:
        typer.echo(json_text.dumps(row_schema(), indent=2))
        return
    if not results:
        raise UserError("report: give at least one directory that `bench` wrote, or its results.jsonl")
    reporter = Reporter(quiet=quiet)
    read = []
    for given in results:
        path = given / RESULTS if given.is_dir() else given
        rows = read_rows(path)
        if not rows:
            raise UserError(f"{path}: holds no rows; measure something with `owl-deploy bench` first")
        read.append(rows)
    rows = merged(read)
    replaced = sum(map(len, read)) - len(rows)
    if replaced:
        reporter.warn(f"rows replaced by later ones of the same measurement: {replaced}")
    command = shlex.join(["owl-deploy", "report", *map(str, results), "-o", str(output)])
    with locked(output):
        written = write_report(rows, output, command=command)
    show(rows, written, json=json, quiet=quiet)
