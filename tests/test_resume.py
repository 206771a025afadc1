"""The next run continues an interrupted one: same bytes, and no block pruned twice."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from owl_deploy.models.source import ModelSource
from owl_deploy.pruning import driver, run
from owl_deploy.pruning.plan import PruningPlan

from .conftest import RunCli

PLANS = {
    "wanda": [],
    "sparsegpt": ["--method", "sparsegpt", "--allocation", "dlp"],
    "admm": ["--method", "admm"],
    "dense-statistics": ["--method", "sparsegpt", "--dense-statistics"],
    "by-known-statistics": ["--dense-statistics"],
    "magnitude": ["--method", "magnitude", "--allocation", "uniform"],
}


class Counter:
    """Counts the linears that are pruned, and interrupts before one of them."""

    def __init__(self, interrupt_at: int | None) -> None:
        self.count = 0
        self._interrupt_at = interrupt_at
        self._prune_linear = driver.prune_linear

    def __call__(self, task: driver.Task) -> object:
        if self.count == self._interrupt_at:
            raise KeyboardInterrupt
        self.count += 1
        return self._prune_linear(task)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".safetensors", ".yaml")}


def blocks(directory: Path) -> object:
    return json.loads((directory / "pruning.json").read_text())["blocks"]


@pytest.mark.parametrize("plan", PLANS)
def test_an_interrupted_run_is_gone_on_with_to_the_same_bytes(
    plan: str, run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--sparsity", "0.6", "--calibration", reference / "tiny_calib.npy", *PLANS[plan], "--quiet"]
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "whole", *options).code == 0

    with monkeypatch.context() as patch:
        patch.setattr(driver, "prune_linear", Counter(interrupt_at=3 * 7 + 4))
        ran = run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options)
    assert ran.code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.unfinished", "whole"]

    rest = Counter(interrupt_at=None)
    monkeypatch.setattr(driver, "prune_linear", rest)
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options).code == 0
    assert rest.count == 3 * 7
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert blocks(tmp_path / "out") == blocks(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_other_inputs_left_is_not_used(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--calibration", reference / "tiny_calib.npy", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(driver, "prune_linear", Counter(interrupt_at=20))
        assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", "--sparsity", "0.6", *options).code == 130
    counter = Counter(interrupt_at=None)
    monkeypatch.setattr(driver, "prune_linear", counter)
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", "--sparsity", "0.5", *options).code == 0
    assert counter.count == 6 * 7


@pytest.mark.parametrize("what", ["versions", "device"])
def test_blocks_of_another_version_or_device_are_not_used(
    what: str, run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--sparsity", "0.6", "--calibration", reference / "tiny_calib.npy", "--quiet"]
    out, other = tmp_path / "out", []
    with monkeypatch.context() as patch:
        patch.setattr(driver, "prune_linear", Counter(interrupt_at=20))
        if what == "versions":
            patch.setattr(run, "versions", lambda: {"torch": "1.0"})
        else:
            other = ["--device", "cpu:0"]
        assert run_cli("prune", tiny_llama, "-o", out, *options, *other).code == 130
    counter = Counter(interrupt_at=None)
    monkeypatch.setattr(driver, "prune_linear", counter)
    assert run_cli("prune", tiny_llama, "-o", out, *options).code == 0
    assert counter.count == 6 * 7


def test_statistics_of_another_version_are_measured_again(
    tiny_llama: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = ModelSource("tiny", tiny_llama), run.Calibration(str(reference / "tiny_calib.npy"))
    file = tmp_path / "statistics.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(run, "versions", lambda: {"torch": "1.0"})
        run.prune_checkpoint(source, tmp_path / "old", PruningPlan(0.6), text, statistics_file=file)
    old = file.read_bytes()
    run.prune_checkpoint(source, tmp_path / "new", PruningPlan(0.6), text, statistics_file=file)
    assert file.read_bytes() != old


def test_a_block_file_that_was_cut_short_is_made_again(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--sparsity", "0.6", "--calibration", reference / "tiny_calib.npy", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(driver, "prune_linear", Counter(interrupt_at=20))
        assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options).code == 130
    file = tmp_path / ".out.unfinished" / "model.layers.1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    counter = Counter(interrupt_at=None)
    monkeypatch.setattr(driver, "prune_linear", counter)
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options).code == 0
    assert counter.count == 5 * 7


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """A larger file fails with EFBIG, as ENOSPC does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_finished_blocks(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = ["--sparsity", "0.6", "--calibration", reference / "tiny_calib.npy", "--quiet"]
    request.getfixturevalue("small_files_only")
    ran = run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options)
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert "cannot be written" in line and "make room" in line
    kept = tmp_path / ".out.unfinished"
    assert sorted(path.name for path in kept.glob("model.layers.*")) == [
        f"model.layers.{index}.safetensors" for index in range(6)
    ]


# -------------------- --tune


@pytest.mark.parametrize("allocation", ["dlp", None])
def test_tune_takes_what_is_best_on_held_out_calibration_text(
    allocation: str | None, run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    chosen = ["--allocation", allocation] if allocation else []
    options = ["--sparsity", "0.6", "--method", "magnitude", "--calibration", reference / "tiny_calib.npy"]
    ran = run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options, *chosen, "--tune", "--json", "--quiet")
    assert ran.code == 0, ran.stderr
    manifest = json.loads(ran.stdout)
    trials = manifest["tuning"]
    best = min(trials, key=lambda trial: trial["perplexity"])
    assert {name: manifest["plan"][name] for name in ("allocation", "half_range")} == {
        name: best[name] for name in ("allocation", "half_range")
    }
    assert len({trial["perplexity"] for trial in trials}) > 3
    assert manifest["sparsity_achieved"] == pytest.approx(0.6, abs=0.01)
    if allocation:
        assert {trial["allocation"] for trial in trials} == {"dlp"}
    else:
        assert {trial["allocation"] for trial in trials} == {"uniform", "owl", "dlp", "linear"}
