"""The search stays within its budget, never ends worse than it began, and continues to the same choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import find_blocks, set_matrix
from owl_deploy.pruning.search import run as search_run
from owl_deploy.pruning.search.evolve import Choice, Effort, Problem, evolve
from owl_deploy.pruning.search.levels import Levels, Option, bit_options, sparse_options
from owl_deploy.pruning.search.sensitivity import harms

from .conftest import RunCli, TinyModel, linears_in


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    units = draw(st.integers(1, 12))
    costs = [sorted(draw(st.lists(st.integers(0, 1000), min_size=1, max_size=6)), reverse=True) for _ in range(units)]
    cheapest, dearest = sum(options[-1] for options in costs), sum(options[0] for options in costs)
    return Problem(costs, draw(st.integers(cheapest, dearest)))


@settings(max_examples=100, deadline=None)
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_what_is_repaired_or_mutated_fits_the_budget(problem: Problem, seed: int) -> None:
    rng = np.random.default_rng(seed)
    choice: Choice = tuple(0 for _ in problem.costs)
    for _ in range(5):
        choice = problem.repaired(choice, rng)
        assert problem.cost(choice) <= problem.budget
        choice = problem.mutated(choice, rng)
        assert problem.cost(choice) <= problem.budget
        assert all(0 <= option < len(options) for option, options in zip(choice, problem.costs, strict=True))


def test_a_budget_that_nothing_fits() -> None:
    with pytest.raises(ValueError, match="costs 3, more than the 2 there are"):
        Problem([[5, 2], [5, 1]], 2).repaired((0, 0), np.random.default_rng(0))


@settings(max_examples=100, deadline=None)
@given(problem=problems(), data=st.data())
def test_no_cheaper_choice_harms_less(problem: Problem, data: st.DataObject) -> None:
    count = min(len(options) for options in problem.costs)
    problem = Problem([options[-count:] for options in problem.costs], problem.budget)
    harms = np.array([data.draw(st.lists(st.floats(0, 9), min_size=count, max_size=count)) for _ in problem.costs])
    chosen = problem.least_harm(harms)
    assert problem.cost(chosen) <= problem.budget

    def harm(choice: Choice) -> float:
        return float(sum(harms[unit, option] for unit, option in enumerate(choice)))

    for _ in range(20):
        other = tuple(data.draw(st.integers(0, count - 1)) for _ in problem.costs)
        if problem.cost(other) <= problem.cost(chosen):
            assert harm(other) >= harm(chosen) - 1e-6


def test_harms_are_the_kl_of_small_changes(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = load_model(ModelSource("tiny", tiny_model("llama")), torch.float64)
    blocks = find_blocks(model)
    options = [Option(0.0), Option(0.5), Option(0.9)]
    rng = torch.Generator().manual_seed(0)
    for block in blocks:
        changed = {
            f"{name} {option}": linear.weight
            + size * torch.randn(linear.weight.shape, generator=rng, dtype=torch.float64)
            for name, linear in block.linears.items()
            for option, size in zip(options, (0.0, 1e-3, 5e-3), strict=True)
        }
        save_file(changed, tmp_path / f"{block.name}.levels.safetensors")
    levels = Levels(blocks, options, tmp_path, torch.float64)
    ids = torch.randint(96, (256, 16), generator=rng)
    estimated = harms(model, levels, ids.numpy(), seed=0)
    wanted = model(ids).logits.log_softmax(-1)
    for index in (0, len(levels.linears) - 1):
        for option in range(3):
            levels.show_dense()
            set_matrix(list(levels.linears.values())[index], levels.weights[index][option])
            ours = model(ids).logits.log_softmax(-1)
            kl = torch.nn.functional.kl_div(ours, wanted, reduction="sum", log_target=True).item() / ids.numel()
            assert estimated[index, option] == pytest.approx(kl, rel=0.4, abs=1e-12)
    assert not any(linear.weight.requires_grad for linear in levels.linears.values())


def test_evolution_comes_to_the_best_choice_and_never_goes_back() -> None:
    # Each unit hurts by its weight times its level: the best choice gives the cheap levels to the light units.
    weights = np.arange(1, 9)
    problem = Problem([[3, 2, 1, 0]] * 8, 12)

    def fitness(choice: Choice, _: NDArray[np.int64]) -> float:
        return float(weights @ np.array(choice))

    log = list(evolve(problem, (2, 2, 2, 1, 1, 1, 1, 2), fitness, 1, Effort(60, 8, (4,), (1, 1)), seed=0))
    scores = [generation.fitness for generation in log]
    assert scores == sorted(scores, reverse=True)
    assert log[-1].choice == (3, 3, 3, 3, 0, 0, 0, 0)
    rest = list(evolve(problem, log[19].choice, fitness, 1, Effort(60, 8, (4,), (1, 1)), seed=0, first=21))
    assert [generation.choice for generation in rest] == [generation.choice for generation in log[20:]]


def test_options() -> None:
    assert [option.sparsity for option in sparse_options(0.5, 0.1, 0.2)] == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert sparse_options(0.9, 0.05, 0.25)[-1].sparsity == 0.95
    assert sparse_options(0.1, 0.05, 0.25)[0].sparsity == 0.0
    bits = [option.bits(1024) for option in bit_options()]
    assert bits == sorted(bits, reverse=True)
    assert {Option(0.0, "int3"), Option(0.0, "int4"), Option(0.5, "int4")} <= set(bit_options())


# -------------------- by the command


@pytest.fixture
def options(reference: Path) -> list[Any]:
    calibration = ["--calibration", reference / "tiny_calib.npy", "--quiet"]
    return ["--sparsity", "0.6", "--allocation", "search", "--generations", 12, *calibration]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "admm"])
def test_a_search_is_better_than_owl_on_what_it_compares(
    method: str, run_cli: RunCli, tiny_llama: Path, options: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run_cli("prune", tiny_llama, "-o", out, *options, "--method", method, "--json")
    assert ran.code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["plan"]["allocation"] == "search"
    assert told["search"]["kl_last"] < told["search"]["kl_first"]
    assert told["sparsity_achieved"] == pytest.approx(0.6, abs=0.005)
    assert {"search.json", "search.csv", "search.png"} <= {path.name for path in out.iterdir()}
    again = tmp_path / "again"
    rest = [option for option in options if option not in ("--sparsity", "0.6", "--generations", 12, "search")]
    rest[rest.index("--allocation") : rest.index("--allocation") + 1] = ["--allocation", out / "search.json"]
    assert run_cli("prune", tiny_llama, "-o", again, *rest, "--method", method).code == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_search_in_bits_is_no_worse_than_treating_all_linears_alike(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    ids, out = reference / "tiny_calib.npy", tmp_path / "out"
    calibration = ["--calibration", ids, "--quiet", "--json"]
    options = ["--allocation", "search", "--bits", "3.5", "--generations", 12, "--method", "wanda"]
    ran = run_cli("prune", tiny_llama, "-o", out, *options, *calibration)
    assert ran.code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["search"]["kl_last"] <= told["search"]["kl_first"]
    chosen = json.loads((out / "search.json").read_text())
    weights = linears_in(out)
    bits = [
        Option(value["sparsity"], value["weights"]).bits(weights[name].shape[1]) * weights[name].numel()
        for name, value in chosen.items()
    ]
    assert sum(bits) / sum(weight.numel() for weight in weights.values()) <= 3.5
    assert len({(value["sparsity"], value["weights"]) for value in chosen.values()}) > 1
    again = tmp_path / "again"
    assert run_cli("prune", tiny_llama, "-o", again, "--allocation", out / "search.json", *calibration).code == 0
    for name, weight in linears_in(again).items():
        assert torch.equal(weight, weights[name])


def test_an_interrupted_search_comes_to_the_same(
    run_cli: RunCli, tiny_llama: Path, options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "whole", *options).code == 0
    made: list[str] = []
    show = search_run.Levels.show

    def interrupted(self: Any, choice: Any) -> None:
        made.append("shown")
        if len(made) == 60:
            raise KeyboardInterrupt
        show(self, choice)

    with monkeypatch.context() as patch:
        patch.setattr(search_run.Levels, "show", interrupted)
        assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options).code == 130
    with monkeypatch.context() as patch:
        patch.setattr("owl_deploy.pruning.search.levels.prune_linear", None)  # every level is there
        assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options).code == 0
    for name in ("search.json", "search.csv", "search.png", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--offload"], "leave out --offload"),
        (["--allocation", "owl"], "has no generations"),
        (["--samples", "1"], "at least 2 calibration windows"),
        (["--pattern", "2:4"], "--pattern fixes the sparsity"),
        (["--generations", "0"], "generations"),
        (["--bits", "4"], "leave out --sparsity"),
    ],
)
def test_searches_that_make_no_sense(
    asked: list[str], told: str, run_cli: RunCli, tiny_llama: Path, options: list[Any], tmp_path: Path
) -> None:
    ran = run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options, *asked)
    assert ran.code == 2 and told in ran.stderr
    assert not (tmp_path / "out").exists()
