"""What the code imports, what pyproject.toml declares, and the versions that constraints.txt sets."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from owl_deploy.engines.registry import ENGINES

ROOT = Path(__file__).parents[1]
NOT_IMPORTED = {"onnxscript"}  # torch.onnx and onnxruntime-genai's builder import it
OWN = {"owl_deploy", "random_checkpoint"}  # the latter is a script that another one imports
OF_OTHER_ENVIRONMENTS = {
    canonicalize_name(Requirement(text).name)
    for spec in ENGINES.values()
    if spec.environment is not None
    for text in spec.environment.requirements
}


@cache
def project() -> dict[str, object]:
    tomllib = pytest.importorskip("tomllib")
    loaded: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return loaded


def declared(*extras: str) -> dict[str, Requirement]:
    """The requirements by name: those of the package itself, or of these extras."""
    optional = project()["optional-dependencies"]
    lists = [optional[extra] for extra in extras] if extras else [project()["dependencies"]]  # type: ignore[index]
    requirements = [Requirement(text) for texts in lists for text in texts]
    return {canonicalize_name(one.name): one for one in requirements}


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def imported(folders: Iterable[str]) -> set[str]:
    """The top-level modules that the code of these folders imports from elsewhere."""
    modules = set()
    for path in (path for folder in folders for path in (ROOT / folder).glob("**/*.py")):
        if "environments" in path.parts:  # run by interpreters of their own
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module)
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - OWN


@cache
def installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def distributions(module: str) -> set[str]:
    """Those that a module comes from: a namespace may be of several. One that is not here is named like its module."""
    return {canonicalize_name(name) for name in installed().get(module, [module, f"{module}-python"])}


def test_every_package_that_is_imported_is_declared() -> None:
    allowed = declared().keys() | declared("ray", "serve", "tasks", "demo").keys() | OF_OTHER_ENVIRONMENTS
    undeclared = {module for module in imported(["owl_deploy"]) if not distributions(module) & allowed}
    assert not undeclared


def test_every_package_that_the_tests_and_benchmarks_import_is_declared() -> None:
    allowed = declared().keys() | declared("dev", "ray", "serve", "tasks").keys()
    undeclared = {module for module in imported(["tests", "benchmarks"]) if not distributions(module) & allowed}
    assert not undeclared


def test_every_requirement_is_used() -> None:
    used = {name for module in imported(["owl_deploy"]) for name in distributions(module)}
    assert declared().keys() - used == NOT_IMPORTED


def test_no_requirement_is_one_exact_version() -> None:
    every = [*declared().values(), *declared("ray", "serve", "tasks", "demo", "dev").values()]
    assert not [str(one) for one in every if any(part.operator in ("==", "===") for part in one.specifier)]


def test_the_versions_we_test_are_among_those_we_declare() -> None:
    ranges = declared() | declared("ray", "serve", "tasks", "demo", "dev")
    for pin in constraints():
        (version,) = pin.specifier
        assert version.operator == "=="
        assert version.version in ranges[canonicalize_name(pin.name)].specifier, pin
