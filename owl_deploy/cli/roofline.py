"""`owl-deploy roofline`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from owl_deploy.cli import options
from owl_deploy.reporting import Reporter

_TABLE_COLUMNS = 140  # if stdout is not a terminal


def roofline(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `export` wrote.")],
    flavor: Annotated[
        Optional[str],
        typer.Option(help="Comma-separated: genai, sparse-int8, gguf-q4_0, … Default: all whose engines are here."),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Directory for roofline.json, roofline.md and roofline.png."),
    ] = None,
    past: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt: so many are in the KV cache when decoding begins.")
    ] = 127,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds. The median over the tokens of all rounds counts.")] = 3,
    matrices: Annotated[bool, typer.Option("--matrices", help="Also list every matrix.")] = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare the time to decode a token with the least time in which memory can deliver the weights.

    Measures the memory bandwidth, then times the engine of each flavor: which share of the bandwidth it reaches, by the
    bytes of its file. Of genai and sparse flavors it times each operator too. The result shows how far decode is from
    the limit of the memory, which matrices are furthest from it, and how much time is spent on everything else.

    Examples:

        owl-deploy roofline bundle

        owl-deploy roofline bundle --flavor sparse-int8,genai,gguf-q4_0 --threads 1 --matrices

        owl-deploy roofline bundle --past 1023 -o roofline --json
    """
    from owl_deploy.machine.threads import available_cores
    from owl_deploy.report.roofline.tables import terminal_tables
    from owl_deploy.report.roofline.write import write_roofline
    from owl_deploy.roofline.measure import Request, measure_roofline

    wanted = None if flavor is None else [name.strip() for name in flavor.split(",")]
    request = Request(past, new_tokens, rounds, threads or available_cores())
    measured = measure_roofline(bundle, wanted, request, reporter=Reporter(quiet=quiet))
    report = None if output is None else write_roofline(measured, output, matrices=matrices)
    if json:
        typer.echo(measured.model_dump_json())
    elif not quiet:
        width = None if sys.stdout.isatty() else _TABLE_COLUMNS
        Console(width=width).print(terminal_tables(measured, matrices=matrices))
        if report is not None:
            typer.echo(str(report))
