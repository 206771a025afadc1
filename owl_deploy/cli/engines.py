"""`owl-deploy engines`."""

from __future__ import annotations

import importlib.metadata
import json as jsonlib
import subprocess
from typing import Annotated, Any, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.reporting import Reporter

app = typer.Typer(no_args_is_help=True, help="Install, list and test the engines that `bench` measures.")


@app.command()
def install(
    name: Annotated[str, typer.Argument(help="Engine, for example deepsparse.")],
    quiet: options.Quiet = False,
) -> None:
    """Make the virtual environment of an engine that cannot share owl-deploy's.

    It goes under `$OWL_DEPLOY_ENGINES`, or `~/.cache/owl-deploy/engines`. DeepSparse needs Python 3.11 or older;
    llama.cpp is compiled, for which it needs a C++ compiler and many minutes. OpenVINO's three engines share one
    environment.

    Examples:

        owl-deploy engines install deepsparse

        owl-deploy engines install llama.cpp

        owl-deploy engines install openvino
    """
    from owl_deploy.engines.registry import environment_of

    environment, licence = environment_of(name)
    reporter = Reporter(quiet=quiet)
    if environment is None:
        reporter.step(f"{name}: comes with owl-deploy")
    elif environment.is_ready():
        reporter.step(f"{name}: already in {environment.directory}")
    else:
        reporter.step(f"{name}: installing into {environment.directory} (licence: {licence})")
        environment.install()
        reporter.step(f"{name}: ready")


@app.command("list")
def list_engines(json: options.Json = False) -> None:
    """Show every engine: whether it can run here, its version, instruction set and licence.

    Examples:

        owl-deploy engines list --json
    """
    from rich.console import Console
    from rich.table import Table

    from owl_deploy.engines.registry import ENGINES

    rows = [_row(name) for name in ENGINES]
    if json:
        typer.echo(jsonlib.dumps(rows))
        return
    columns = ("engine", "version", "status", "instruction_set", "licence")
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[column] or "") for column in columns))
    Console().print(table)


@app.command()
def doctor(
    names: Annotated[Optional[list[str]], typer.Argument(help="Engines. Default: all.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a tiny model in every engine that is installed, and say of each whether it computes what it should.

    Exit code 1 if one that is installed does not; what is missing is not a fault.

    Examples:

        owl-deploy engines doctor

        owl-deploy engines doctor sparse deepsparse --json
    """
    import dataclasses

    from owl_deploy.bench.doctor import examine
    from owl_deploy.engines.registry import ENGINES, named_engines

    specs = named_engines(",".join(names) if names else ",".join(ENGINES))
    found = []
    for diagnosis in examine(specs):
        found.append(diagnosis)
        if not json and not quiet:
            typer.echo(f"{diagnosis.engine}: {diagnosis.status} ({diagnosis.seconds:.1f} s): {diagnosis.detail}")
    if json:
        typer.echo(jsonlib.dumps([dataclasses.asdict(diagnosis) for diagnosis in found]))
    if any(diagnosis.status == "broken" for diagnosis in found):
        raise typer.Exit(1)


def _row(name: str) -> dict[str, Any]:
    from owl_deploy.engines.registry import ENGINES
    from owl_deploy.machine.cpu import instruction_set

    spec = ENGINES[name]
    problem = spec.environment.problem() if spec.environment else None
    return {
        "engine": name,
        "status": problem or "ready",
        "version": None if problem else _version(name),
        "instruction_set": None if problem else instruction_set(),
        "licence": spec.licence,
        "interpreter": str(spec.environment.interpreter) if spec.environment and not problem else None,
    }


def _version(name: str) -> str:
    from owl_deploy.engines.registry import ENGINES

    spec = ENGINES[name]
    if spec.environment is None:
        return importlib.metadata.version(spec.package)
    code = f"import importlib.metadata; print(importlib.metadata.version({spec.package!r}))"
    done = subprocess.run([str(spec.environment.interpreter), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
