"""Mixed precision: bits by block, by OWL, on the paper's quantiser and on grids that can be exported."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_deploy.allocation.precision import equal_shares
from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import find_blocks
from owl_deploy.rounding import GRIDS, rounded_asymmetrically

from .conftest import Ran, RunCli, linears_in
from .test_rounding import is_on, matrices

BLOCKS = 6

# -------------------- the paper's quantiser


def test_the_golden_row() -> None:
    row = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    assert rounded_asymmetrically(row, 2).tolist() == [[-1.0, 0.0, 0.0, 2.0]]
    assert rounded_asymmetrically(torch.zeros(1, 3), 2).tolist() == [[0.0, 0.0, 0.0]]
    assert rounded_asymmetrically(torch.tensor([[0.25, 3.0]]), 2).tolist() == [[0.0, 3.0]]


@settings(max_examples=60, deadline=None)
@given(weight=matrices, bits=st.integers(2, 8))
def test_a_row_has_few_values_near_its_weights_and_its_zeros(weight: torch.Tensor, bits: int) -> None:
    rounded = rounded_asymmetrically(weight, bits)
    assert not rounded[weight == 0].any()
    assert all(len(row.unique()) <= 2**bits for row in rounded)
    step = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)) / (2**bits - 1)
    assert bool(((rounded - weight).abs() <= 1.001 * step[:, None]).all())  # half, and half more where zero is rounded


# -------------------- shares


@given(importance=st.lists(st.floats(0, 100), min_size=1, max_size=40), data=st.data())
def test_shares_are_equal_and_by_importance(importance: list[float], data: st.DataObject) -> None:
    options = data.draw(st.integers(1, len(importance)))
    taken = equal_shares(importance, options)
    counts = [taken.count(option) for option in range(options)]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
    for option in range(options - 1):
        least = min(value for value, one in zip(importance, taken, strict=True) if one == option)
        assert least >= max(value for value, one in zip(importance, taken, strict=True) if one == option + 1)


def test_more_options_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 options for 2 blocks"):
        equal_shares([1.0, 2.0], 3)


# -------------------- by the command


@pytest.fixture
def calibration(reference: Path) -> list[object]:
    return ["--calibration", reference / "tiny_calib.npy", "--quiet"]


def prune(run_cli: RunCli, model: Path, out: Path, *options: object) -> Ran:
    return run_cli("prune", model, "-o", out, *options)


@pytest.mark.parametrize("sparsity", ["0", "0.5"])
def test_owl_gives_the_finer_grid_to_blocks_with_more_outliers(
    sparsity: str, run_cli: RunCli, tiny_llama: Path, reference: Path, calibration: list[object], tmp_path: Path
) -> None:
    options = ["--sparsity", sparsity, "--weights", "mixed-int8+int4", *calibration]
    ran = prune(run_cli, tiny_llama, tmp_path / "out", *options, "--json")
    assert ran.code == 0, ran.stderr
    lod = json.loads((reference / "tiny_results.json").read_text())["wanda_owl_0.5"]["outlier_percent"]
    finer = set(sorted(range(BLOCKS), key=lambda block: -lod[block])[: BLOCKS // 2])
    grids = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert grids == {f"model.layers.{block}": "int8" if block in finer else "int4" for block in range(BLOCKS)}
    told = json.loads(ran.stdout)
    assert told["plan"]["mix"] == ["int8", "int4"]
    weights = linears_in(tmp_path / "out")
    for name, weight in weights.items():
        grid = grids[".".join(name.split(".")[:3])]
        assert is_on(GRIDS[grid], weight), name
        assert told["plan"]["linear_weights"][name] == grid
    zeros = sum(int((weight == 0).sum()) for weight in weights.values()) / sum(map(torch.numel, weights.values()))
    assert zeros >= (0.5 if sparsity == "0.5" else 0) - 1 / 32  # Wanda floors in rows
    columns = {name: weight.shape[1] for name, weight in weights.items()}
    asked = {f"{block['name']}.{one['name']}": one for block in told["blocks"] for one in block["linears"]}
    bits = sum(
        GRIDS[told["plan"]["linear_weights"][name]].bits_per_weight(
            asked[name]["sparsity_achieved"] if sparsity == "0.5" else 0.0, columns[name]
        )
        * weight.numel()
        for name, weight in weights.items()
    ) / sum(weight.numel() for weight in weights.values())
    assert told["bits_per_weight"] == pytest.approx(bits)

    if sparsity == "0":
        return
    # The same from the file that it wrote, from the recipe, and block by block.
    again = ["--sparsity", sparsity, "--weights", tmp_path / "out" / "weights.json", *calibration]
    recipe = ["--recipe", tmp_path / "out" / "recipe.yaml", *calibration]
    for how in (again, recipe, [*options, "--offload"]):
        made = tmp_path / f"again{len(list(tmp_path.iterdir()))}"
        assert prune(run_cli, tiny_llama, made, *how).code == 0
        assert all(torch.equal(weight, weights[name]) for name, weight in linears_in(made).items())


def test_a_linears_grid_comes_before_its_blocks(
    run_cli: RunCli, tiny_llama: Path, calibration: list[object], tmp_path: Path
) -> None:
    grids = {f"model.layers.{block}": "int3" for block in range(BLOCKS)}
    (tmp_path / "grids.json").write_text(json.dumps(grids | {"model.layers.2.mlp.up_proj": "int8"}))
    options = ["--sparsity", "0", "--weights", tmp_path / "grids.json", *calibration]
    assert prune(run_cli, tiny_llama, tmp_path / "out", *options).code == 0
    for name, weight in linears_in(tmp_path / "out").items():
        assert is_on(GRIDS["int8" if name == "model.layers.2.mlp.up_proj" else "int3"], weight), name


@pytest.mark.parametrize(
    ("grids", "told"),
    [
        (
            {"model.layers.0": "int4"},
            "none were given for model.layers.1.self_attn.q_proj (35 of 42 linears lack them)",
        ),
        ({"model.layers.9": "int4"}, "model.layers.9 is no block of this model, and no linear of one"),
        ({"model.layers.0": "int5"}, "weights of model.layers.0 'int5' is unknown"),
        ({"model.layers.0": 4}, "give an object with int8, int4 or int3 for each block or linear"),
        ([], "give an object with int8, int4 or int3 for each block or linear"),
    ],
)
def test_files_of_grids_that_do_not_fit(
    grids: object, told: str, run_cli: RunCli, tiny_llama: Path, calibration: list[object], tmp_path: Path
) -> None:
    (tmp_path / "grids.json").write_text(json.dumps(grids))
    options = ["--sparsity", "0", "--weights", tmp_path / "grids.json", *calibration]
    refused(prune(run_cli, tiny_llama, tmp_path / "out", *options), told)
    assert {path.name for path in tmp_path.iterdir()} == {"grids.json"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--weights", "mixed-int4"], "mixed-int4: give two or more, the finest first, for example mixed-int4+int3"),
        (["--weights", "mixed-int3+int4"], "the finest first"),
        (["--weights", "mixed-int4+int2"], "weights 'int2' is unknown"),
        (["--weights", "none.json"], "none.json: no such file"),
        (["--weights", "mixed-int4+int3", "--allocation", "search"], "the search chooses weights by itself"),
        (["--weights", "mixed-int4+int3", "--recover", "1k"], "trains all weights through one grid"),
    ],
)
def test_mixes_that_make_no_sense(
    options: list[object], told: str, run_cli: RunCli, tiny_llama: Path, calibration: list[object], tmp_path: Path
) -> None:
    refused(prune(run_cli, tiny_llama, tmp_path / "out", "--sparsity", "0.5", *options, *calibration), told)
    assert not list(tmp_path.iterdir())


def refused(ran: Ran, told: str) -> None:
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert told in line


# -------------------- the study


def perplexity_by_hand(model: Path, bits: list[int], ids: Path) -> float:
    loaded = load_model(ModelSource("it", model), torch.float32)
    for block, width in zip(find_blocks(loaded), bits, strict=True):
        for linear in block.linears.values():
            linear.weight.data = rounded_asymmetrically(linear.weight.detach(), width)
    return perplexity(loaded, np.load(ids)[:2])


def by_rank(importance: list[float]) -> list[int]:
    """4 bits for the upper half, 2 for the lower."""
    upper = sorted(range(BLOCKS), key=lambda block: -importance[block])[: BLOCKS // 2]
    return [4 if block in upper else 2 for block in range(BLOCKS)]


def test_the_study_compares_owl_with_mean_weights_and_chance(
    run_cli: RunCli, tiny_llama: Path, reference: Path, calibration: list[object], tmp_path: Path
) -> None:
    ids = reference / "tiny_calib.npy"
    texts = [*calibration, "--evaluate", ids, "--evaluate-windows", 2]
    options = ["--mixes", "4+2", "--grids", "int8+int3", "--seeds", 2]
    ran = run_cli("study", "mixed-precision", tiny_llama, "-o", tmp_path / "out", *texts, *options, "--json")
    assert ran.code == 0, ran.stderr
    with (tmp_path / "out" / "mixed-precision.csv").open(newline="") as file:
        found = {(row["quantiser"], row["bits"], row["chosen_by"]): row for row in csv.DictReader(file)}
    mixed = [("random",), ("l1",), ("owl",)]
    assert list(found) == [
        ("dense", "", ""),
        *(("to nearest", bits, "") for bits in ("4", "2")),
        *(("to nearest", "4+2", *by) for by in mixed),
        *(("GPTQ", grid, "") for grid in ("int8", "int3")),
        *(("GPTQ", "int8+int3", *by) for by in mixed),
    ]
    nearest = {by: found["to nearest", "4+2", by] for by in ("random", "l1", "owl")}
    assert {row["bits_per_weight"] for row in nearest.values()} == {"3.0"}
    assert [nearest[by]["paper_llama_7b"] for by in nearest] == ["14817.12", "33670.214", "7505.6"]
    assert found["to nearest", "2", ""]["paper_llama_7b"] == "104151.84"

    lod = json.loads((reference / "tiny_results.json").read_text())["wanda_owl_0.5"]["outlier_percent"]
    blocks = find_blocks(load_model(ModelSource("it", tiny_llama), torch.float32))
    means = [
        float(torch.cat([one.weight.abs().flatten() for one in block.linears.values()]).mean()) for block in blocks
    ]
    expected = {"owl": by_rank(lod), "l1": by_rank(means)}
    assert expected["owl"] != expected["l1"]
    for by, bits in expected.items():
        by_hand = perplexity_by_hand(tiny_llama, bits, ids)
        assert float(nearest[by]["perplexity"]) == pytest.approx(by_hand, rel=1e-6)
    four = perplexity_by_hand(tiny_llama, [4] * BLOCKS, ids)
    assert float(found["to nearest", "4", ""]["perplexity"]) == pytest.approx(four, rel=1e-6)
    seeds = [one["perplexity"] for one in json.loads(ran.stdout)["cells"] if one["labels"]["seed"]][:2]
    row = nearest["random"]
    assert float(row["perplexity"]) == pytest.approx(statistics.fmean(seeds))
    assert [float(row["lowest"]), float(row["highest"])] == sorted(seeds)

    made = prune(
        run_cli, tiny_llama, tmp_path / "made", "--sparsity", "0", "--weights", "mixed-int8+int3", *texts, "--json"
    )
    told = json.loads(made.stdout)
    owl = found["GPTQ", "int8+int3", "owl"]
    assert float(owl["perplexity"]) == pytest.approx(told["perplexity"]["after"], rel=1e-6)
    assert float(owl["bits_per_weight"]) == pytest.approx(told["bits_per_weight"])
    report = (tmp_path / "out" / "mixed-precision.md").read_text()
    assert "random blocks: 4+2 to nearest (" in report
    assert (tmp_path / "out" / "mixed-precision.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--mixes", "4"], "--mixes 4: give two or more numbers of bits from 2 to 8, for example 4+3"),
        (["--mixes", "4+4"], "--mixes 4+4: give two or more"),
        (["--mixes", "9+4"], "from 2 to 8"),
        (["--grids", "int4+int2"], "--grids int4+int2: give two or more of int8, int4, int3"),
        (["--mixes", "8+7+6+5+4+3+2"], "a mix of 7 precisions: this model has 6 blocks"),
    ],
)
def test_mixes_that_cannot_be_studied(
    options: list[str], told: str, run_cli: RunCli, tiny_llama: Path, calibration: list[object], tmp_path: Path
) -> None:
    evaluated = ["--evaluate", calibration[1]]
    grids = [] if "--grids" in options else ["--grids", "none"]
    refused(
        run_cli(
            "study", "mixed-precision", tiny_llama, "-o", tmp_path / "out", *calibration, *evaluated, *options, *grids
        ),
        told,
    )
