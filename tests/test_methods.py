"""The methods beyond the paper's: RIA, Wanda's variant, and ADMM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_deploy.errors import UserError
from owl_deploy.pruning.methods.admm import admm
from owl_deploy.pruning.methods.ria import ria_scores
from owl_deploy.pruning.methods.selection import smallest_of_each_group, smallest_of_layer, smallest_per_row
from owl_deploy.pruning.methods.sparsegpt import sparsegpt
from owl_deploy.pruning.methods.wanda import wanda_mask, wanda_scores, wanda_variant_mask
from owl_deploy.pruning.plan import NM, PruningPlan


@pytest.fixture(scope="module")
def layer(reference: Path) -> dict[str, torch.Tensor]:
    """A linear with two outlier channels and a dead one."""
    return {name: torch.from_numpy(value) for name, value in np.load(reference / "layer.npz").items()}


def error(layer: dict[str, torch.Tensor], weight: torch.Tensor) -> float:
    """How far the outputs are from the dense linear's, relative to these."""
    X = layer["X"].reshape(-1, layer["X"].shape[-1])
    return float((X @ (weight - layer["W"]).T).norm() / (X @ layer["W"].T).norm())


# -------------------- RIA


def test_ria_is_the_share_of_row_and_column_times_the_root_of_the_norm() -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    scores = ria_scores(weight, torch.tensor([16.0, 81.0]))
    expected = torch.tensor([[(1 / 3 + 1 / 4) * 2, (3 / 3 + 3 / 4) * 3], [(2 / 3 + 2 / 2) * 2, 0.0]])
    torch.testing.assert_close(scores, expected)


def test_ria_of_an_empty_row_and_column_is_zero() -> None:
    weight = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert ria_scores(weight, torch.ones(2)).tolist() == [[0.0, 2.0], [0.0, 0.0]]


# -------------------- Wanda's variant


@given(st.floats(0.1, 0.85), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_the_variant_delivers_the_sparsity_in_rows_of_their_own(sparsity: float, seed: int) -> None:
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(seed))
    mask = wanda_variant_mask(weight, torch.ones(300), sparsity)
    assert mask.float().mean().item() == pytest.approx(sparsity, abs=0.006)  # bisected to 0.001 of alpha


def test_the_variant_prunes_more_of_a_row_with_few_large_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    even = 1 + 0.1 * torch.rand(1, 400, generator=generator)
    uneven = torch.rand(1, 400, generator=generator) ** 8
    mask = wanda_variant_mask(torch.cat([even, uneven]), torch.ones(400), 0.5)
    assert mask[1].sum() > mask[0].sum()


def test_the_variant_of_nothing_prunes_nothing() -> None:
    assert not wanda_variant_mask(torch.randn(4, 8), torch.ones(8), 0.0).any()


# -------------------- ADMM


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.83])
def test_admm_is_nearer_to_the_dense_outputs_than_sparsegpt_and_wanda(
    layer: dict[str, torch.Tensor], sparsity: float
) -> None:
    W, H = layer["W"], layer["H"]
    by_wanda = W.masked_fill(wanda_mask(W, layer["scaler_row"], sparsity), 0)
    by_sparsegpt = sparsegpt(W, H, sparsity).weight
    by_admm = admm(W, H, sparsity, smallest_of_layer, dampening=0.01).weight
    assert error(layer, by_admm) < error(layer, by_sparsegpt) < error(layer, by_wanda)


def test_admm_delivers_the_pattern_that_is_asked_for(layer: dict[str, torch.Tensor]) -> None:
    W, H = layer["W"], layer["H"]
    by_layer = admm(W, H, 0.7, smallest_of_layer).weight
    assert (by_layer == 0).float().mean().item() == pytest.approx(0.7, abs=2 / W.numel())
    by_row = admm(W, H, 0.7, lambda scores, s: smallest_per_row(scores, int(scores.shape[1] * s))).weight
    assert ((by_row == 0).sum(dim=1) == 140).all()
    by_group = admm(W, H, 0.5, lambda scores, _: smallest_of_each_group(scores, NM(2, 4))).weight
    assert ((by_group.reshape(48, -1, 4) == 0).sum(dim=2) == 2).all()


def test_what_admm_keeps_is_the_least_squares_solution_on_its_support(layer: dict[str, torch.Tensor]) -> None:
    W = layer["W"].double()
    X = layer["X"].reshape(-1, 200).double() + 0.1 * torch.randn(240, 200, generator=torch.Generator().manual_seed(0))
    G = X.T @ X
    found = admm(W, G, 0.5, lambda scores, s: smallest_of_layer(scores.float(), s), polish=2000, dampening=0.1).weight
    norm = G.diagonal().sqrt()
    scaled = G / norm[:, None] / norm + 0.1 * torch.eye(200)
    gradient = ((found - W) * norm) @ scaled
    assert gradient[found != 0].abs().max() < 1e-6 * (W * norm @ scaled).abs().max()


def test_admm_can_reproduce_other_outputs_than_the_layers_own(layer: dict[str, torch.Tensor]) -> None:
    W, H = layer["W"].double(), layer["H"].double()  # in fp32, rounding decides between near ties
    own = admm(W, H, 0.5, smallest_of_layer).weight
    torch.testing.assert_close(admm(W, H, 0.5, smallest_of_layer, correlation=W @ H).weight, own, rtol=1e-3, atol=1e-4)
    other = W.roll(1, 0)
    nothing = lambda scores, _: torch.zeros_like(scores, dtype=torch.bool)  # noqa: E731
    moved = admm(W, H, 0.0, nothing, correlation=other @ H, dampening=0.1).weight
    X = layer["X"].reshape(-1, 200).double()
    assert (X @ (moved - other).T).norm() < 0.3 * (X @ (W - other).T).norm()


def test_a_dead_column_goes_first(layer: dict[str, torch.Tensor]) -> None:
    dead = layer["H"].diagonal() == 0
    assert dead.sum() == 1
    found = admm(layer["W"], layer["H"], 0.1, smallest_of_layer).weight
    assert (found[:, dead] == 0).all()
    assert found.isfinite().all()


def test_a_hessian_that_is_not_positive_definite_is_damped_more_and_reported() -> None:
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    indefinite = torch.eye(4) + 3 * (torch.ones(4, 4) - torch.eye(4))  # eigenvalues 10 and -2
    for result in (
        admm(W, indefinite, 0.5, smallest_of_layer, dampening=0.1),
        sparsegpt(W, indefinite, 0.5, dampening=0.1),
    ):
        assert result.dampening > 0.1
        assert result.weight.isfinite().all()


@pytest.mark.parametrize("solve", [lambda W, H: admm(W, H, 0.5, smallest_of_layer), lambda W, H: sparsegpt(W, H, 0.5)])
def test_a_hessian_of_nan_is_refused(solve: object) -> None:
    with pytest.raises(UserError, match="no usable Hessian"):
        solve(torch.randn(6, 4), torch.full((4, 4), torch.nan))  # type: ignore[operator]


# -------------------- all that only choose


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_pruning_by_ria_twice_changes_nothing(layer: dict[str, torch.Tensor], sparsity: float) -> None:
    once = layer["W"].masked_fill(smallest_of_layer(ria_scores(layer["W"], layer["scaler_row"]), sparsity), 0)
    twice = once.masked_fill(smallest_of_layer(ria_scores(once, layer["scaler_row"]), sparsity), 0)
    assert torch.equal(once, twice)


def test_granularity_row_and_layer_differ_in_where_not_in_how_much(layer: dict[str, torch.Tensor]) -> None:
    scores = wanda_scores(layer["W"], layer["scaler_row"])
    of_rows, of_layer = smallest_per_row(scores, 100), smallest_of_layer(scores, 0.5)
    assert (of_rows.sum(dim=1) == 100).all()
    assert of_layer.sum() == of_rows.sum() + 1  # the threshold's own weight goes too, as published
    assert of_layer.sum(dim=1).unique().numel() > 1


@pytest.mark.parametrize(
    ("sparsity", "slope"), [(0.3, 0), (0.5, 0), (0.6, 0.0725), (0.65, 0.08625), (0.7, 0.1), (0.8, 0.09), (0.9, 0.09)]
)
def test_the_usual_slope_of_the_linear_allocation(sparsity: float, slope: float) -> None:
    assert PruningPlan(sparsity, "admm", "linear").half_range == pytest.approx(slope)
