"""The Typer application, and what happens when a command fails."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import typer

from owl_deploy import __version__
from owl_deploy.cli import bench, engines, evaluate, export, generate, prune, recover, report, roofline, serve, study
from owl_deploy.errors import CheckFailed, UserError

_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"owl-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Prune an LLM with OWL, export it to ONNX, and measure what the sparsity buys on a CPU.

    Exit codes: 0 done, 1 failed, 2 mistake in the input, 130 interrupted.
    """


app.command()(prune.prune)
app.command()(recover.recover)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command()(generate.generate)
app.command()(bench.bench)
app.command()(report.report)
app.command()(serve.serve)
app.command()(roofline.roofline)
app.add_typer(study.app, name="study")
app.add_typer(engines.app, name="engines")


def main(arguments: list[str] | None = None) -> None:
    """Run the command (`sys.argv` by default); a mistake in the input is one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a worker process is started
    signal.signal(signal.SIGTERM, _interrupt)  # so that a killed run cleans up like an interrupted one
    try:
        app(arguments)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except CheckFailed as error:
        typer.echo(f"failed: {error}", err=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
            typer.echo("interrupted; what was finished is kept, nothing is half-written", err=True)
        raise


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
