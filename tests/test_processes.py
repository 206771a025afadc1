"""Several processes train one model together, started by torch's launcher, which `accelerate launch` uses on GPUs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from owl_deploy.errors import UserError
from owl_deploy.models.source import ModelSource
from owl_deploy.recovery import run
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.recovery.processes import Processes
from owl_deploy.recovery.run import recover_checkpoint

from .conftest import TESTS, RunCli, TinyModel
from .test_recovery import OPTIONS, sparse, text, weights

__all__ = ["sparse", "text"]  # fixtures


def launch(*arguments: object, interrupt_at: int = 0) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TESTS / "launched.py"]
    variables = {**os.environ, "INTERRUPT_AT": str(interrupt_at), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command), *map(str, arguments)], env=variables, capture_output=True, text=True
    )


def losses(directory: Path) -> list[float]:
    with (directory / "recovery.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_processes_make_the_steps_of_one_also_after_a_kill(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["recover", sparse, "--dense", tiny_model("llama"), "--text", text, *OPTIONS]
    monkeypatch.setattr(run, "fast_dtype", lambda _: torch.float32)
    assert run_cli(*arguments, "-o", tmp_path / "one").code == 0
    assert launch(*arguments, "-o", tmp_path / "two", interrupt_at=5).returncode != 0
    assert (tmp_path / ".two.unfinished" / "state.safetensors").is_file()
    ran = launch(*arguments, "-o", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("zeros kept") == 1  # the main process alone tells
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    before, one, two = (weights(directory) for directory in (sparse, tmp_path / "one", tmp_path / "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
        assert not two[name][(before[name] == 0) & ("proj" in name)].any()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (RecoveryPlan(64, batch=6, micro_batch=2), "makes 3 of them, which 2 processes cannot share equally; make"),
        (RecoveryPlan(64, method="blocks"), "--method blocks trains in one process"),
    ],
)
def test_what_two_processes_cannot_share(plan: RecoveryPlan, told: str, sparse: Path, tmp_path: Path) -> None:
    source = ModelSource("it", sparse)
    with pytest.raises(UserError, match=told):
        recover_checkpoint(source, source, tmp_path / "out", plan, "self", processes=Processes(0, 2))
