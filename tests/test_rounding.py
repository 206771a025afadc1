"""Grids hold what is on them already, and the nearest point of all else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.pruning.methods.sparsegpt import sparsegpt
from owl_deploy.rounding import GRIDS, ROUNDED, Grid, Rounded
from owl_deploy.sparse.library import pack, unpack

from .conftest import RunCli, TinyModel, linears_in


def matrix(seed: int, rows: int, columns: int, scale: float, sparsity: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * scale
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < sparsity, 0)


matrices = st.builds(
    matrix,
    st.integers(0, 2**31),
    st.integers(1, 8),
    st.integers(1, 200),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)


@pytest.mark.parametrize("name", ROUNDED)
@settings(max_examples=60, deadline=None)
@given(weight=matrices)
def test_rounding_twice_is_rounding_once_and_zeros_stay(name: Rounded, weight: torch.Tensor) -> None:
    grid = GRIDS[name]
    once = grid.rounded(weight)
    assert torch.equal(grid.rounded(once), once)
    assert not once[weight == 0].any()
    assert once.shape == weight.shape


@pytest.mark.parametrize("name", ROUNDED)
@settings(max_examples=60, deadline=None)
@given(weight=matrices)
def test_no_weight_moves_by_more_than_half_a_step_unless_it_is_beyond_the_grid(
    name: Rounded, weight: torch.Tensor
) -> None:
    grid = GRIDS[name]
    width = grid.group or weight.shape[1]
    steps = grid.scales(weight).abs().repeat_interleave(width, dim=1)[:, : weight.shape[1]]
    inside = weight.abs() <= grid.highest * steps
    moved = (grid.rounded(weight) - weight).abs()
    assert bool((moved[inside] <= 0.5001 * steps[inside]).all())


@settings(max_examples=60, deadline=None)
@given(weight=matrices)
def test_the_best_scales_are_no_worse_than_the_widest(weight: torch.Tensor) -> None:
    for grid in GRIDS.values():
        if grid.group is None:
            continue
        columns = weight.shape[1]
        scales = grid.best_scales(weight).repeat_interleave(grid.group, dim=1)[:, :columns]
        points = grid.nearest(weight, scales)
        widest = (grid.rounded(weight) - weight).square().sum(1)
        assert bool(((points - weight).square().sum(1) <= widest * 1.0001 + 1e-12).all())
        assert torch.equal(grid.rounded(points), points)


def test_int4_uses_all_sixteen_values_and_keeps_the_largest_weight() -> None:
    weight = torch.linspace(-1, 2, 64)[None]
    grid = GRIDS["int4"]
    points = grid.rounded(weight) / grid.scales(weight)
    assert points.min() == -8 and points.max() <= 7
    assert grid.rounded(weight)[0, -1] == 2.0
    assert grid.rounded(torch.tensor([[1.0, -0.5, 0.0, 0.124]])).tolist() == [[1.0, -0.5, 0.0, 0.125]]


def test_bits_a_weight() -> None:
    assert GRIDS["int4"].bits_per_weight(0.5, 2048) == 3.25
    assert GRIDS["int4"].bits_per_weight(0.0, 2048) == 4.25
    assert GRIDS["int8"].bits_per_weight(0.5, 64) == 5.25


@settings(max_examples=60, deadline=None)
@given(weight=matrices)
def test_packing_int8_changes_nothing_of_what_is_on_its_grid(weight: torch.Tensor) -> None:
    rounded = GRIDS["int8"].rounded(weight).numpy()
    np.testing.assert_array_equal(unpack(pack(rounded, "int8")), rounded)


# -------------------- GPTQ


def correlated(columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4 * columns, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    inputs += 0.1 * torch.randn(4 * columns, columns, generator=generator)
    return inputs.T @ inputs / len(inputs)


def output_error(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = other - weight
    return float(((difference @ hessian) * difference).sum())


def are_levels(numbers: torch.Tensor, grid: Grid) -> bool:
    whole = bool((numbers == numbers.round()).all())
    return whole and grid.lowest <= float(numbers.min()) and float(numbers.max()) <= grid.highest


def is_on(grid: Grid, weight: torch.Tensor) -> bool:
    """Whether every group is whole numbers of the grid, times one scale."""
    for row in weight:
        for group in row.split(grid.group or len(row)):
            largest = group[group.abs().argmax()]
            steps = [largest / level for level in range(grid.lowest, grid.highest + 1) if level and largest]
            if largest != 0 and not any(are_levels(group / step, grid) for step in steps):
                return False
    return True


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_gptq_is_on_the_grid_and_better_than_the_nearest_points(name: Rounded, sparsity: float) -> None:
    grid, hessian = GRIDS[name], correlated(192)
    weight = matrix(0, 16, 192, 1.0, sparsity)
    solved = sparsegpt(weight, hessian, 0.0, fixed_mask=weight == 0, grid=grid).weight
    assert not solved[weight == 0].any()
    assert is_on(grid, solved)
    nearest = output_error(weight, grid.rounded(weight), hessian)
    assert output_error(weight, solved, hessian) < (0.5 if name != "int8" else 1.0) * nearest


def test_sparsegpt_rounds_as_it_prunes() -> None:
    grid, hessian, weight = GRIDS["int4"], correlated(192), matrix(0, 16, 192, 1.0, 0.0)
    together = sparsegpt(weight, hessian, 0.5, grid=grid).weight
    assert is_on(grid, together)
    assert int((together == 0).sum()) >= together.numel() // 2


# -------------------- by the command


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "ria", "admm", "ablate-wanda"])
def test_every_method_rounds_what_it_keeps(
    method: str, run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    options = ["--method", method, "--sparsity", "0.5", "--calibration", reference / "tiny_calib.npy", "--quiet"]
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "fp32", *options).code == 0
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "int4", *options, "--weights", "int4").code == 0
    unrounded, rounded = linears_in(tmp_path / "fp32"), linears_in(tmp_path / "int4")
    for name, weight in rounded.items():
        assert is_on(GRIDS["int4"], weight), name
        assert float((weight == 0).float().mean()) >= 0.4
    first = next(iter(rounded))
    if method != "sparsegpt":
        assert not rounded[first][unrounded[first] == 0].any()


def test_a_dense_model_is_rounded(run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    options = [
        "--sparsity",
        "0",
        "--calibration",
        reference / "tiny_calib.npy",
        "--weights",
        "int3",
        "--json",
        "--quiet",
    ]
    ran = run_cli("prune", tiny_llama, "-o", tmp_path / "int3", *options, "--evaluate", reference / "tiny_calib.npy")
    assert ran.code == 0, ran.stderr
    assert all(is_on(GRIDS["int3"], weight) for weight in linears_in(tmp_path / "int3").values())
    told = json.loads(ran.stdout)
    assert told["plan"]["weights"] == "int3"
    assert told["perplexity"]["after"] != told["perplexity"]["before"]


def test_rounded_checkpoints_are_fp32_also_from_files_block_by_block(
    run_cli: RunCli, tiny_model: TinyModel, tmp_path: Path
) -> None:
    calibration = tmp_path / "ids.npy"
    np.save(calibration, np.random.default_rng(0).integers(0, 96, (4, 32)))
    model = tiny_model("llama", dtype=torch.bfloat16)
    options = ["--sparsity", "0.5", "--method", "admm", "--calibration", calibration, "--weights", "int4", "--quiet"]
    assert run_cli("prune", model, "-o", tmp_path / "memory", *options).code == 0
    assert run_cli("prune", model, "-o", tmp_path / "disk", *options, "--offload").code == 0
    one, other = (load_model(ModelSource("it", tmp_path / name)) for name in ("memory", "disk"))
    assert one.dtype == other.dtype == torch.float32
    for (name, tensor), (_, same) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(tensor, same), name
    assert all(is_on(GRIDS["int4"], weight) for weight in linears_in(tmp_path / "memory").values())


def test_the_recipe_of_a_rounded_model_makes_it_again(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    calibration = ["--calibration", reference / "tiny_calib.npy", "--quiet"]
    options = ["--sparsity", "0.5", "--weights", "int8"]
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "first", *options, *calibration).code == 0
    recipe = ["--recipe", tmp_path / "first" / "recipe.yaml"]
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "second", *recipe, *calibration).code == 0
    first, second = linears_in(tmp_path / "first"), linears_in(tmp_path / "second")
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    for name, weight in first.items():
        np.testing.assert_array_equal(unpack(pack(weight.numpy(), "int8")), weight.numpy(), err_msg=name)


def test_no_such_grid(run_cli: RunCli, tiny_llama: Path, tmp_path: Path) -> None:
    ran = run_cli("prune", tiny_llama, "-o", tmp_path / "out", "--sparsity", "0.5", "--weights", "int5")
    assert ran.code == 2 and "choose one of int8, int4, int3" in ran.stderr
