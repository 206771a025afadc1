"""A whole small LLaMA, pruned by the command, equals what the official implementations made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from .conftest import RunCli

CASES: dict[str, list[str]] = {
    "magnitude_0.5": ["--method", "magnitude", "--allocation", "uniform", "--sparsity", "0.5"],
    "magnitude_owl_0.5": ["--method", "magnitude", "--allocation", "owl", "--sparsity", "0.5"],
    "magnitude_4-8": ["--method", "magnitude", "--pattern", "4:8"],
    "wanda_0.5": ["--method", "wanda", "--allocation", "uniform", "--sparsity", "0.5"],
    "wanda_owl_0.5": ["--sparsity", "0.5"],  # the defaults are the paper's
    "wanda_2-4": ["--method", "wanda", "--pattern", "2:4"],
    "sparsegpt_0.5": ["--method", "sparsegpt", "--allocation", "uniform", "--sparsity", "0.5"],
    "sparsegpt_owl_0.5": ["--method", "sparsegpt", "--allocation", "owl", "--sparsity", "0.5"],
}
OWL = [case for case in CASES if "owl" in case]


@dataclass(frozen=True)
class Pruned:
    """What the command made, beside what the official code made: weights by `<block>.<module>`."""

    manifest: dict[str, Any]
    weights: dict[str, NDArray[np.float32]]
    expected: dict[str, NDArray[np.float32]]
    results: dict[str, Any]


_made: dict[str, Pruned] = {}


@pytest.fixture
def pruned(run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path) -> Callable[[str], Pruned]:
    """Each case is pruned once for all tests."""

    def prune(case: str) -> Pruned:
        if case not in _made:
            windows = tmp_path / "eval.npy"
            np.save(windows, np.load(reference / "tiny_eval.npy").reshape(4, 64))
            texts = ["--calibration", reference / "tiny_calib.npy", "--evaluate", windows]
            ran = run_cli("prune", tiny_llama, "-o", tmp_path / "out", *CASES[case], *texts, "--json")
            assert ran.code == 0, ran.stderr
            tensors = load_file(tmp_path / "out" / "model.safetensors")
            expected = dict(np.load(reference / f"tiny_{case}.npz"))
            weights = {name: tensors[f"model.layers.{name}.weight"] for name in expected}
            results = json.loads((reference / "tiny_results.json").read_text())[case]
            _made[case] = Pruned(json.loads(ran.stdout), weights, expected, results)
        return _made[case]

    return prune


@pytest.mark.parametrize("case", [case for case in CASES if "sparsegpt" not in case])
def test_magnitude_and_wanda_prune_the_published_weights_bit_for_bit(
    case: str, pruned: Callable[[str], Pruned]
) -> None:
    made = pruned(case)
    assert len(made.expected) == 6 * 7
    for name, expected in made.expected.items():
        np.testing.assert_array_equal(made.weights[name], expected, err_msg=name)


@pytest.mark.parametrize("case", [case for case in CASES if "sparsegpt" in case])
def test_sparsegpt_gives_the_published_weights(case: str, pruned: Callable[[str], Pruned]) -> None:
    made = pruned(case)
    same, weights = 0, 0
    for name, expected in made.expected.items():
        agree = (made.weights[name] == 0) == (expected == 0)
        same, weights = same + agree.sum(), weights + agree.size
        assert np.linalg.norm((made.weights[name] - expected)[agree]) < 1e-4 * np.linalg.norm(expected), name
    assert same > 0.999 * weights


@pytest.mark.parametrize("case", OWL)
def test_owl_finds_the_published_outliers_and_block_sparsities(case: str, pruned: Callable[[str], Pruned]) -> None:
    made = pruned(case)
    lod = [block["lod_percent"] for block in made.manifest["blocks"]]
    assert lod == pytest.approx(made.results["outlier_percent"], rel=1e-9)
    kept = [float(value) for value in made.results["after_adjustment_print"].strip("[]").split()]
    assert [1 - block["sparsity_asked"] for block in made.manifest["blocks"]] == pytest.approx(kept, abs=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_every_module_has_the_published_sparsity(case: str, pruned: Callable[[str], Pruned]) -> None:
    made = pruned(case)
    achieved = {
        f"{index}.{linear['name']}": linear["sparsity_achieved"]
        for index, block in enumerate(made.manifest["blocks"])
        for linear in block["linears"]
    }
    assert achieved == pytest.approx(made.results["module_sparsity"], abs=1e-3 if "sparsegpt" in case else 1e-7)
    assert made.manifest["sparsity_achieved"] == pytest.approx(made.results["global_sparsity"], abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_perplexity_is_the_published_one(case: str, pruned: Callable[[str], Pruned]) -> None:
    made = pruned(case)
    assert made.manifest["perplexity"]["after"] == pytest.approx(made.results["ppl"], rel=0.005)
