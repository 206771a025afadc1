"""Virtual environments for engines that cannot live in ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl_deploy.errors import UserError
from owl_deploy.files import cache_directory, locked, read_json, write_json

_READY = "owl-deploy.json"
_HOME = Path(__file__).resolve().parents[2]  # of the package: a checkout, or site-packages
THREADS = "OMP_NUM_THREADS"
_DECIDING = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "GGML_", "OV_", "NM_", "ORT_"),
    *("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"),
)
_TIMEOUT_S = 3 * 3600  # llama.cpp is compiled, by one slow core at worst


@dataclass(frozen=True)
class Environment:
    """A virtual environment of an engine.

    Attributes:
        pythons: versions of Python it can be made with, best first.
        requirements: what pip installs.
        check: Python code that fails in an environment that would not work.
        variables: (name, value) of what its programs find in their own environment.
        cmake: what CMake reads first where pip compiles; None where it does not.
    """

    name: str
    pythons: tuple[str, ...]
    requirements: tuple[str, ...]
    check: str
    variables: tuple[tuple[str, str], ...] = ()
    cmake: Path | None = None

    @property
    def directory(self) -> Path:
        return engines_directory() / self.name

    @property
    def interpreter(self) -> Path:
        return self.directory / "bin" / "python"

    def is_installable(self) -> bool:
        """Whether there is a Python to make it with."""
        return find_python(self.pythons) is not None

    def problem(self) -> str | None:
        """Why the environment cannot be used, and what to do; None if it can."""
        if self.is_ready():
            return None
        if not self.is_installable():
            return f"needs Python {self.pythons[0]} (or {', '.join(self.pythons[1:])}), which is not on PATH"
        return f"not installed; run: owl-deploy engines install {self.name}"

    def is_ready(self) -> bool:
        """Whether it was installed to the end, from these very requirements."""
        marker = self.directory / _READY
        if not marker.is_file():
            return False
        made = read_json(marker)
        return all(made.get(key) == value for key, value in self.contents().items())

    def contents(self) -> dict[str, Any]:
        """What decides what is in the environment."""
        cmake = None if self.cmake is None else self.cmake.read_text(encoding="utf-8")
        return {"requirements": list(self.requirements), "cmake": cmake}

    def install(self) -> None:
        """Make the environment; what an interrupted installation left is replaced.

        Raises:
            UserError: no fitting Python, or pip failed; its last lines are in the message.
        """
        if self.is_ready():
            return
        python = find_python(self.pythons)
        if python is None:
            raise UserError(f"engine {self.name}: {self.problem()}; install it and run this again")
        with locked(self.directory):
            shutil.rmtree(self.directory, ignore_errors=True)
            self._run([python, "-m", "venv", str(self.directory)])
            pip = [
                str(self.interpreter),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-compile",
            ]
            if self.cmake is not None:
                # pip's cache may hold what was compiled in another way, or for another CPU.
                pip += ["--no-cache-dir", f"--config-settings=cmake.define.CMAKE_PROJECT_INCLUDE={self.cmake}"]
            self._run([*pip, *self.requirements])
            self._run([str(self.interpreter), "-c", self.check])
            write_json(self.directory / _READY, {**self.contents(), "python": python})

    def _run(self, command: list[str]) -> None:
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=_TIMEOUT_S,
                env=process_variables(self),
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"engine {self.name}: installation took over {_TIMEOUT_S} s and was stopped") from error
        if done.returncode != 0:
            last = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise UserError(f"engine {self.name}: {' '.join(command[:4])} … failed: {last}")


def engines_directory(home: Path = _HOME) -> Path:
    """Where the environments of engines are: for a command run in a checkout the same place as for its `make`.

    `$OWL_DEPLOY_ENGINES`; else `.venvs` of the checkout that owl-deploy is run from; else a folder of the user's cache.
    """
    if chosen := os.environ.get("OWL_DEPLOY_ENGINES"):
        return Path(chosen).absolute()
    project = home / "pyproject.toml"
    if project.is_file() and 'name = "owl-deploy"' in project.read_text(encoding="utf-8").splitlines():
        return home / ".venvs"
    return cache_directory() / "engines"


def process_variables(environment: Environment | None) -> dict[str, str]:
    """The variables that a program of this virtual environment is started with; None stands for our own."""
    variables = {**os.environ, **dict(environment.variables if environment else ())}
    if environment is not None:
        variables.pop("PYTHONPATH", None)  # our interpreter's packages
    return variables


def deciding_variables(environment: Environment | None) -> dict[str, str]:
    """Those of `process_variables` that decide how fast a program computes, and what.

    They are settings of the libraries that engines compute with. The number of threads is not among them: whoever
    starts an engine sets it.
    """
    variables = process_variables(environment)
    return {name: variables[name] for name in sorted(variables) if name.startswith(_DECIDING) and name != THREADS}


def find_python(versions: tuple[str, ...]) -> str | None:
    """An interpreter of one of these versions, the earlier ones preferred: our own, on PATH, or pyenv's."""
    for version in versions:
        if version == f"{sys.version_info.major}.{sys.version_info.minor}":
            return sys.executable
        if found := shutil.which(f"python{version}"):
            return found
        pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
        for candidate in sorted(pyenv.glob(f"{version}.*/bin/python{version}")):
            return str(candidate)
    return None
