"""`owl-deploy engines`."""

from __future__ import annotations

import importlib.metadata
import json as jsonlib
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter

if TYPE_CHECKING:
    from owl_deploy.engines.registry import EngineSpec

app = typer.Typer(no_args_is_help=True, help="Install, list and check the engines that `bench` measures.")


@app.command()
def install(
    name: Annotated[str, typer.Argument(help="Engine, or a group of engines: deepsparse, llama.cpp, openvino.")],
    quiet: options.Quiet = False,
) -> None:
    """Make the virtual environment of an engine that cannot share owl-deploy's.

    It goes into `$OWL_DEPLOY_ENGINES`; by default into `.venvs` of the checkout that owl-deploy was installed from with
    `pip install -e`, as `make` does, or else into `~/.cache/owl-deploy/engines`.

    DeepSparse needs Python 3.11 or older. llama.cpp is compiled, which takes a C++ compiler and many minutes. The three
    engines of OpenVINO share one environment.

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
    """Show every engine: whether it can run here, its version and licence, and the instruction set of our own kernels.

    Wherever engines are asked for, `sparse` and `llama.cpp` stand for all engines of that name.

    Examples:

        owl-deploy engines list --json
    """
    from owl_deploy.engines.registry import ENGINES

    rows = [_row(spec) for spec in ENGINES.values()]
    if json:
        typer.echo(jsonlib.dumps(rows))
    else:
        Console().print(_table(rows))


@app.command()
def doctor(
    names: Annotated[Optional[list[str]], typer.Argument(help="Engines. Default: all.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a tiny model in every installed engine, and check that it computes the right logits.

    The exit code is 1 if an installed engine does not. An engine that is not installed is no fault.

    Examples:

        owl-deploy engines doctor

        owl-deploy engines doctor sparse deepsparse --json
    """
    import dataclasses

    from owl_deploy.benchmarking.doctor import examine
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


def _row(spec: EngineSpec) -> dict[str, Any]:
    problem = _problem(spec)
    return {
        "engine": spec.name,
        "status": problem or "ready",
        "version": None if problem else _version(spec),
        "instruction_set": None if problem else _instruction_set(spec),
        "licence": spec.licence,
        "interpreter": str(spec.environment.interpreter) if spec.environment and not problem else None,
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row for all engines of which the same is said, their names below each other and never cut."""
    columns = ("version", "instruction_set", "status", "licence")
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] or "" for column in columns), []).append(row["engine"])
    table = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for title in ("engine", "version", "kernels"):
        table.add_column(title, no_wrap=True)
    for title in ("status", "licence"):
        table.add_column(title, overflow="fold")
    for about, names in groups.items():
        table.add_row("\n".join(names), *about)
    return table


def _problem(spec: EngineSpec) -> str | None:
    """Why the engine cannot run here, and what to do; None if it can."""
    from owl_deploy.sparse.library import library_path

    if spec.environment is not None:
        return spec.environment.problem()
    if _is_ours(spec):
        try:
            library_path()
        except UserError as error:
            return str(error)
    return None


def _instruction_set(spec: EngineSpec) -> str | None:
    """That of our kernels; what other engines choose, they only say once they have loaded a model."""
    from owl_deploy.engines.sparse_engine import chosen_kernels

    return chosen_kernels() if _is_ours(spec) else None


def _is_ours(spec: EngineSpec) -> bool:
    from owl_deploy.bundle.names import weights_of

    return weights_of(spec.flavors[0]) is not None


def _version(spec: EngineSpec) -> str:
    if spec.environment is None:
        return importlib.metadata.version(spec.package)
    code = f"import importlib.metadata; print(importlib.metadata.version({spec.package!r}))"
    done = subprocess.run([str(spec.environment.interpreter), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
