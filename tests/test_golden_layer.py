"""One linear layer with outlier channels and a dead one: every number equals the official implementations'."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from owl_deploy.allocation.owl import outlier_percent
from owl_deploy.pruning.calibration.statistics import InputStatistics, Statistic
from owl_deploy.pruning.methods.registry import Task, prune_linear
from owl_deploy.pruning.methods.sparsegpt import sparsegpt
from owl_deploy.pruning.methods.wanda import wanda_scores
from owl_deploy.pruning.plan import NM, PruningPlan

Layer = dict[str, torch.Tensor]
SPARSEGPT = [
    *(f"sparsegpt_s{sparsity}_n0m0_b{size}" for sparsity in ("0.5", "0.7", "0.83") for size in (128, 64)),
    *(f"sparsegpt_s0.5_{pattern}_b{size}" for pattern in ("n2m4", "n5m8") for size in (128, 64)),
]


@pytest.fixture(scope="module")
def layer(reference: Path) -> Layer:
    return {name: torch.from_numpy(value) for name, value in np.load(reference / "layer.npz").items()}


ABLATIONS = [
    f"ablate_{metric}_{turn}_{pattern}"
    for metric in ("wanda", "mag")
    for turn in ("seq", "iter")
    for pattern in ("n0m0", "n2m4")
]


def collect(layer: Layer, *statistic: Statistic) -> InputStatistics:
    linear = nn.Linear(200, 48, bias=False)
    linear.weight.data = layer["W"]
    statistics = InputStatistics({"it": linear}, statistic)
    for sequence in layer["X"]:
        with statistics.collecting(), torch.no_grad():
            linear(sequence[None])
    return statistics


def test_squared_input_norms(layer: Layer) -> None:
    torch.testing.assert_close(collect(layer, "squares").mean_square("it"), layer["scaler_row"], rtol=1e-6, atol=0)


def test_hessian(layer: Layer) -> None:
    found = collect(layer, "gram").hessian("it")
    torch.testing.assert_close(found, layer["H"], rtol=1e-5, atol=1e-5 * layer["H"].abs().mean().item())


def test_stopping_the_forward_pass_early_changes_no_statistics(layer: Layer) -> None:
    linear = nn.Linear(200, 48)
    statistics = InputStatistics({"it": linear}, {"squares"})
    for sequence in layer["X"]:
        with statistics.collecting(stop_early=True), torch.no_grad():
            linear(sequence[None])
    assert torch.equal(statistics.mean_square("it"), collect(layer, "squares").mean_square("it"))


def test_wanda_metric(layer: Layer) -> None:
    scores = wanda_scores(layer["W"], layer["scaler_row"])
    torch.testing.assert_close(scores, layer["wanda_metric"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("m", [3, 5])
def test_layerwise_outlier_distribution(layer: Layer, m: int) -> None:
    found = outlier_percent([wanda_scores(layer["W"], layer["scaler_row"])], m)
    assert found == pytest.approx(layer[f"outlier_percent_M{m}"].item(), rel=1e-9)


@pytest.mark.parametrize("case", SPARSEGPT)
def test_sparsegpt(layer: Layer, case: str) -> None:
    sparsity, prune, of, size = re.fullmatch(r"sparsegpt_s([\d.]+)_n(\d)m(\d)_b(\d+)", case).groups()  # type: ignore[union-attr]
    pattern = NM(int(prune), int(of)) if int(of) else None
    result = sparsegpt(layer["W"], layer["H"], float(sparsity), pattern=pattern, block_size=int(size))
    expected = layer[case]
    agree = (result.weight == 0) == (expected == 0)
    assert agree.float().mean() > 0.999
    assert (result.weight - expected)[agree].norm() < 1e-4 * expected.norm()
    assert result.dampening == 0.01


def test_squared_input_norms_of_the_ablations(layer: Layer) -> None:
    found = collect(layer, "ablation").ablation_square("it")
    torch.testing.assert_close(found, layer["ablate_scaler_row"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablations(layer: Layer, case: str) -> None:
    _, metric, turn, pattern = case.split("_")
    plan = PruningPlan(
        0.5,
        "ablate-wanda" if metric == "wanda" else "ablate-magnitude",
        allocation="uniform",
        ablation="seq" if turn == "seq" else "iter",
        pattern=NM(2, 4) if pattern == "n2m4" else None,
    )
    inputs = collect(layer, "gram", "ablation")
    weight = prune_linear(Task("it", layer["W"], 0.5, plan.pattern, plan, inputs)).weight
    agree = (weight == 0) == (layer[case] == 0)
    assert agree.float().mean() > 0.999
    assert (weight - layer[case])[agree].norm() < 1e-4 * layer[case].norm()


def test_all_cases_of_the_reference_are_tested(layer: Layer) -> None:
    solved = {name for name in layer if name.startswith(("sparsegpt", "ablate")) and name != "ablate_scaler_row"}
    assert solved == {*SPARSEGPT, *ABLATIONS}
