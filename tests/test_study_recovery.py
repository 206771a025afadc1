"""`owl-deploy study recovery`: training after pruning, beside dense models with the same training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owl_deploy.recovery import training
from owl_deploy.recovery.train import Trainer
from owl_deploy.rounding import GRIDS
from owl_deploy.studies.cells import CellRecord
from owl_deploy.studies.recovery import _findings

from .conftest import Ran, RunCli, TinyModel, linears_in
from .test_rounding import is_on

TOKENS = 192


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama", initializer_range=0.3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 96, (12, 32)))
    return path


@pytest.fixture
def study(run_cli: RunCli, model: Path, text: Path) -> Any:
    def run(out: Path, *options: object) -> Ran:
        texts = ["--calibration", text, "--samples", 4, "--seqlen", 16, "--evaluate", text, "--evaluate-windows", 4]
        return run_cli("study", "recovery", model, "-o", out, *texts, "--tokens", TOKENS, "--quiet", *options)

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_recovery_stands_beside_dense_models_with_the_same_training(study: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = study(out, "--weights", "int4", "--json")
    assert ran.code == 0, ran.stderr
    found = rows(out / "recovery.csv")
    assert [(row["sparsity_asked"], row["recovery"], row["weights"], row["model"]) for row in found] == [
        ("0.0", "dense", "", "this"),
        *(("0.0", name, "int4", "this") for name in ("none", "full")),
        ("0.7", "lora-adapter", "", "this"),
        ("0.7", "lora-adapter", "", "paper's Table 6, LLaMA-7B"),
        ("0.7", "lora-adapter", "", "paper's Table 6, LLaMA-13B"),
        *(("0.7", name, "", "this") for name in ("lora", "full", "blocks")),
        *(("0.7", name, "int4", "this") for name in ("none", "full")),
    ]
    assert (found[4]["perplexity_before"], found[4]["perplexity"]) == ("19.49", "11.15")
    ours = [row for row in found if row["model"] == "this" and row["recovery"] not in ("dense", "none")]
    assert {row["tokens"] for row in ours} == {str(TOKENS)}
    assert all(float(row["seconds"]) > 0 for row in ours)
    assert all(row["perplexity"] != row["perplexity_before"] for row in ours)
    unrounded = [row for row in ours if not row["weights"]]
    begun = {row["perplexity_before"] for row in ours if row["sparsity_asked"] == "0.7"}
    assert len(begun) == 1  # all with the same checkpoint
    assert len({row["perplexity"] for row in unrounded}) == len(unrounded)
    of_grid = {row["recovery"]: row for row in found if row["weights"] == "int4" and row["sparsity_asked"] == "0.0"}
    assert of_grid["full"]["perplexity_before"] == found[0]["perplexity_before"] != of_grid["none"]["perplexity_before"]
    assert float(found[0]["bits_per_weight"]) == 16
    assert float(of_grid["full"]["bits_per_weight"]) == GRIDS["int4"].bits_per_weight(0, 48)
    assert float(unrounded[0]["bits_per_weight"]) == pytest.approx(1 + 0.3 * 16, abs=0.05)
    report = (out / "recovery.md").read_text()
    assert report.index("with the same training and no more bits") < report.index("| sparsity asked |")
    cells = json.loads(ran.stdout)["cells"]
    trained = [cell["training"]["checkpoint"] for cell in cells if cell["training"]]
    assert all((out / checkpoint / "recovery.json").is_file() for checkpoint in trained)
    assert all(is_on(GRIDS["int4"], weight) for weight in linears_in(out / trained[-1]).values())
    assert (out / "recovery.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_killed_in_a_training_goes_on_from_there(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--recoveries", "lora,full", "--weights", "none")
    assert study(tmp_path / "whole", *options).code == 0
    steps: list[int] = []
    interrupt_at = [6]  # the last of three steps of the second training

    def counted(self: Trainer, ids: Any) -> Any:
        steps.append(1)
        if len(steps) in interrupt_at:
            raise KeyboardInterrupt
        return step(self, ids)

    step = Trainer.step
    monkeypatch.setattr(training, "_SAVED_EVERY_S", 0)
    monkeypatch.setattr(Trainer, "step", counted)
    assert study(tmp_path / "out", *options).code == 130
    assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) == 2
    assert study(tmp_path / "out", *options).code == 0
    assert len(steps) == 7
    one, other = (rows(tmp_path / name / "recovery.csv") for name in ("whole", "out"))
    for row in (*one, *other):
        row.pop("seconds")
    assert one == other
    assert study(tmp_path / "out", *options).code == 0
    assert len(steps) == 7  # and nothing is done again


def cell(sparsity: float, bits: float, perplexity: float, weights: str = "") -> CellRecord:
    training = {"plan": {}, "tokens": 1, "seconds": 1.0, "before": 99.0, "checkpoint": "it"}
    source = {"source": "text", "windows": 1, "seqlen": 2, "sha256": "it"}
    return CellRecord.model_validate(
        {
            "key": "it",
            "labels": {"recovery": "full", "weights": weights},
            "plan": {},
            "sparsity_asked": sparsity,
            "sparsity_achieved": sparsity,
            "linear_sparsities": {},
            "perplexity": perplexity,
            "lod_percent": {},
            "bits_per_weight": bits,
            "training": training | {"text": source},
            "metric_seconds": None,
            "metric_cpu_seconds": None,
            "seconds": 1.0,
        }
    )


def test_the_first_finding_is_where_dense_is_better() -> None:
    dense = [cell(0, 4.25, 25, "int4"), cell(0, 3.25, 30, "int3")]
    sparse = [cell(0.5, 9.0, 27), cell(0.5, 3.25, 29, "int4"), cell(0.7, 2.45, 50, "int4")]
    lost, won, alone = _findings([*dense, *sparse])
    assert lost == (
        "Dense with the same training and no more bits is better than 1 of 3 sparse models: dense int4 (4.25 bits, "
        "perplexity 25.00), against 50% full (9.00 bits, perplexity 27.00)."
    )
    assert won.startswith("Sparse is better than dense with the same training and no more bits: 50% int4 (3.25 bits")
    assert alone == "No dense model has as few bits as 70% int4 (2.45 bits, perplexity 50.00)."
    assert _findings(sparse) == ()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--recoveries", "qlora"], "--recoveries: 'qlora' is unknown; choose from lora-adapter, lora, full, blocks"),
        (["--weights", "int5"], "weights 'int5' is unknown"),
        (["--tokens", "many"], "--tokens many: give a number of tokens"),
        (["--tokens", "1M"], "make 1472 in 4 passes, not the 1000000 asked for"),
    ],
)
def test_what_cannot_be_recovered_is_told_before_anything_is_done(
    options: list[str], told: str, study: Any, tmp_path: Path
) -> None:
    ran = study(tmp_path / "out", *options)
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert told in line
    assert not (tmp_path / "out").exists()
