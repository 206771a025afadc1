"""A sweep's levels on a Ray cluster that is really started: the same files, and lost workers replaced."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from owl_deploy.benchmarking.executors import run_here, run_on_ray
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter

from .conftest import RunCli

ray = pytest.importorskip("ray")


class Listening(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def step(self, message: str) -> None:
        self.lines.append(message)


def once_killed(level: Path, reporter: Reporter) -> str:
    """Its process dies the first time."""
    reporter.step(f"try {len(list(level.iterdir()))}")
    if level.name == "lost" and not any(level.iterdir()):
        (level / "seen").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return level.name


def refused(_: Path, __: Reporter) -> None:
    raise UserError("nothing here to prune")


def test_a_lost_workers_level_is_made_again_and_all_report(tmp_path: Path) -> None:
    levels = [tmp_path / name for name in ("kept", "lost")]
    for level in levels:
        level.mkdir()
    reporter = Listening()
    assert run_on_ray(once_killed, levels, reporter) == ["kept", "lost"]
    assert f"{levels[0]}: try 0" in reporter.lines
    assert f"{levels[1]}: try 1" in reporter.lines


def test_a_mistake_in_a_level_is_the_same_error_as_here(tmp_path: Path) -> None:
    for run in (run_here, run_on_ray):
        with pytest.raises(UserError) as error:
            run(refused, [tmp_path], Reporter(quiet=True))
        assert str(error.value) == "nothing here to prune"


def files(directory: Path) -> dict[str, bytes]:
    kept = (".safetensors", ".yaml", ".onnx", ".data")
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.suffix in kept}


def test_a_sweep_on_ray_makes_the_files_that_it_makes_here(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    options = [
        *("--sparsities", "0,0.5,0.7", "--calibration", reference / "tiny_calib.npy", "--threads", 1),
        *("--prompt", 8, "--new-tokens", 2, "--repetitions", 1, "--max-load", 99, "--quiet"),
    ]
    for executor in ("here", "ray"):
        ran = run_cli("bench", "--sweep", tiny_llama, "-o", tmp_path / executor, "--executor", executor, *options)
        assert ran.code == 0, ran.stderr
    made = files(tmp_path / "ray")
    assert len([name for name in made if name.endswith(".onnx")]) == 3
    assert made == files(tmp_path / "here")


def test_no_cluster_at_that_address_is_one_line(run_cli: RunCli, tiny_llama: Path, tmp_path: Path) -> None:
    ran = run_cli(
        *("bench", "--sweep", tiny_llama, "-o", tmp_path / "out", "--sparsities", "0,0.5"),
        *("--executor", "ray", "--ray-address", "127.0.0.1:1", "--quiet"),
    )
    assert ran.code == 2
    assert "127.0.0.1:1" in ran.stderr.splitlines()[-1]
