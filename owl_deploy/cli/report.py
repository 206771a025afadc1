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
        Optional[list[Path]], typer.Argument(help="Directories that `bench` wrote, or their results.jsonl.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the report.")] = Path("owl-report"),
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a line of results.jsonl, and do nothing else.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write one report of the results of several runs, of one machine or of many.

    Makes what `bench` makes beside its measurements: report.html (one page that needs no network), report.md,
    results.csv, results.jsonl, speedup.png and pareto.png. Of the same measurement on the same machine the result
    named last counts. Speed-ups stay those of the run that measured them: rows of two runs are never divided by each
    other. With --json, one JSON object a row.

    Examples:

        owl-deploy report results -o report

        owl-deploy report xeon/results zen5/results.jsonl -o both

        owl-deploy report --schema
    """
    import json as json_text

    from owl_deploy.bench.rows import RESULTS, merged, read_rows
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
        reporter.warn(f"{replaced} rows are of the same measurement as later ones, which take their place")
    command = shlex.join(["owl-deploy", "report", *map(str, results), "-o", str(output)])
    with locked(output):
        written = write_report(rows, output, command=command)
    show(rows, written, json=json, quiet=quiet)
