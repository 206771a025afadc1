"""`owl-deploy study`: the cells that were asked for, each measured once, with figures that can be computed anew."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from owl_deploy.models.load import load_model
from owl_deploy.models.source import resolve_model
from owl_deploy.models.structure import find_blocks
from owl_deploy.pruning import driver
from owl_deploy.pruning.calibration.dense import measure_dense
from owl_deploy.pruning.weights import InMemory
from owl_deploy.records import versions
from owl_deploy.studies import run

from .conftest import Ran, RunCli, TinyModel
from .test_resume import Counter

BLOCKS = 3
LINEARS = BLOCKS * 7
ADMM = [(target, statistics) for target in ("layer", "dense") for statistics in ("block", "linear")]


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    """Weights so large that every change of them is seen in the perplexity."""
    return tiny_model("llama", initializer_range=0.3)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six windows of tokens, without a text."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 96, (6, 32)))
    return path


@pytest.fixture
def texts(ids: Path) -> list[object]:
    return ["--calibration", ids, "--samples", 4, "--seqlen", 32, "--evaluate", ids, "--evaluate-windows", 2]


@pytest.fixture
def study(run_cli: RunCli, model: Path, texts: list[object]) -> Any:
    """Run a study on the tiny model, its last options as given; it must not fail."""

    def run(name: str, out: Path, *options: object, model: Path = model) -> Ran:
        used = texts[:6] if name == "efficiency" else texts
        ran = run_cli("study", name, model, "-o", out, *used, "--quiet", *options)
        assert ran.code == 0, ran.stderr
        return ran

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def labelled(found: list[dict[str, str]], *fields: str) -> list[tuple[str, ...]]:
    return [tuple(row[field] for field in fields) for row in found]


# -------------------- the cells


def test_granularity_compares_three_units_of_two_methods(study: Any, tmp_path: Path) -> None:
    study("granularity", tmp_path / "out", "--sparsities", "0.5,0.75")
    found = rows(tmp_path / "out" / "granularity.csv")
    units = [(method, unit) for method in ("magnitude", "wanda") for unit in ("row", "layer", "global")]
    assert labelled(found, "sparsity_asked", "method", "granularity") == [
        ("0.0", "dense", ""),
        *((level, *unit) for level in ("0.5", "0.75") for unit in units),
    ]
    for row in found:
        assert float(row["sparsity_achieved"]) == pytest.approx(float(row["sparsity_asked"]), abs=2e-3)
    assert len({row["perplexity"] for row in found}) == len(found)
    paper = {(row["sparsity_asked"], row["method"], row["granularity"]): row["paper_llama_7b"] for row in found}
    assert paper["0.5", "wanda", "row"] == "7.26"
    assert paper["0.5", "magnitude", "global"] == "48.627"
    assert paper["0.75", "wanda", "row"] == ""
    assert paper["0.0", "dense", ""] == "5.68"
    text = (tmp_path / "out" / "granularity.md").read_text()
    assert "paper's Table 3, LLaMA-7B" in text
    assert "4 x 32 tokens" in text and "2 x 32 tokens" in text
    assert (tmp_path / "out" / "granularity.png").read_bytes().startswith(b"\x89PNG")


def test_allocation_tries_all_of_them(study: Any, tmp_path: Path) -> None:
    study("allocation", tmp_path / "out", "--sparsities", "0.6", "--method", "magnitude")
    found = rows(tmp_path / "out" / "allocation.csv")
    names = ["uniform", "owl", "owl-inverse", "global", "erdos-renyi", "er-plus", "dlp", "linear", "owl-per-layer"]
    assert [row["allocation"] for row in found] == ["dense", *names]
    for row in found[1:]:
        assert float(row["sparsity_achieved"]) == pytest.approx(0.6, abs=2e-3)
    assert len({row["perplexity"] for row in found}) == len(found)
    assert {row["paper_llama_7b"] for row in found[1:]} == {""}  # the paper's are Wanda's


def test_allocation_searches_too_if_it_is_told_how_long(study: Any, tmp_path: Path) -> None:
    options = ["--sparsities", "0.6", "--method", "magnitude", "--generations", "8"]
    study("allocation", tmp_path / "out", *options)
    found = rows(tmp_path / "out" / "allocation.csv")
    assert found[-1]["allocation"] == "search"
    assert float(found[-1]["sparsity_achieved"]) == pytest.approx(0.6, abs=5e-3)
    assert not list((tmp_path / "out").glob(".search-*"))


def test_perplexity_by_sparsity_is_drawn_for_each_way_to_prune(study: Any, tmp_path: Path) -> None:
    options = ["--sparsities", "0.5,0.6", "--method", "wanda", "--seqlen", 16]
    study("sparsity", tmp_path / "out", *options)
    before = rows(tmp_path / "out" / "sparsity.csv")
    assert [row["pruned"] for row in before] == ["dense", "uniform", "owl", "uniform", "owl"]
    ran = study("sparsity", tmp_path / "out", *options, "--generations", 4, "--tokens", 128, "--json")
    found = rows(tmp_path / "out" / "sparsity.csv")
    ways = ["uniform", "owl", "search", "owl, recovered"]
    assert labelled(found, "sparsity_asked", "pruned") == [
        ("0.0", "dense"),
        *((level, way) for level in ("0.5", "0.6") for way in ways),
    ]
    assert [row for row in found if row["pruned"] in ("dense", "uniform", "owl")] == before
    assert [row["paper_llama_7b"] for row in found[5:]] == ["10.7", "9.35", "", ""]
    cells = json.loads(ran.stdout)["cells"]
    assert cells[4]["training"]["before"] == pytest.approx(cells[2]["perplexity"], rel=1e-6)
    assert cells[4]["perplexity"] != cells[2]["perplexity"]
    assert (tmp_path / "out" / "sparsity.png").read_bytes().startswith(b"\x89PNG")


def test_nm_tells_our_n_from_the_papers(study: Any, tmp_path: Path) -> None:
    study("nm", tmp_path / "out")
    found = rows(tmp_path / "out" / "nm.csv")[1:]
    assert labelled(found, "pattern", "papers_n:8", "allocation", "paper_llama_7b") == [
        ("4:8", "4:8", "uniform", "8.57"),
        ("mixed-4:8", "4:8", "owl", "8.55"),
        ("5:8", "3:8", "uniform", "42.56"),
        ("mixed-5:8", "3:8", "owl", "21.49"),
        ("6:8", "2:8", "uniform", "2962.0"),
        ("mixed-6:8", "2:8", "owl", "331.37"),
    ]
    assert [float(row["sparsity_achieved"]) for row in found] == pytest.approx([0.5, 0.5, 0.625, 0.625, 0.75, 0.75])
    assert "The paper's N counts the weights that are kept" in (tmp_path / "out" / "nm.md").read_text()


def test_per_layer_gives_linears_of_a_block_sparsities_of_their_own(study: Any, tmp_path: Path) -> None:
    study("per-layer", tmp_path / "out", "--method", "magnitude", "--sparsities", "0.6")
    found = rows(tmp_path / "out" / "per-layer.csv")
    assert labelled(found, "sparsity_asked", "owl") == [("0.0", "dense"), ("0.6", "per block"), ("0.6", "per layer")]
    assert found[1]["perplexity"] != found[2]["perplexity"]
    linears = rows(tmp_path / "out" / "per-layer-linears.csv")
    assert [row["owl"] for row in linears] == ["per block"] * BLOCKS + ["per layer"] * BLOCKS
    assert [row["block"] for row in linears] == [f"model.layers.{index}" for index in range(BLOCKS)] * 2
    for row in linears:
        values = [float(row[name]) for name in row if "_proj" in name]
        assert len(values) == 7
        width = max(values) - min(values)
        assert width < 2e-3 if row["owl"] == "per block" else width > 0.02


def test_efficiency_times_the_metric_and_nothing_else(study: Any, tmp_path: Path) -> None:
    ran = study("efficiency", tmp_path / "out", "--sparsities", "0.5", "--json")
    found = rows(tmp_path / "out" / "efficiency.csv")
    assert labelled(found, "method", "allocation") == [
        (method, allocation) for method in ("wanda", "sparsegpt", "admm") for allocation in ("uniform", "owl")
    ]
    assert [row["paper_llama_7b_seconds"] for row in found] == ["0.3", "0.3", "266", "268", "", ""]
    cells = json.loads(ran.stdout)["cells"]
    for row, cell in zip(found, cells, strict=True):
        assert 0 < float(row["metric_seconds"]) < cell["seconds"]
        assert float(row["metric_seconds"]) == cell["metric_seconds"]
        assert float(row["metric_cpu_seconds"]) > 0
        assert cell["perplexity"] is None


def test_the_stopwatch_runs_for_allocation_and_every_linear_only(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only these move: an hour for each linear, a day for the allocation."""
    from owl_deploy.studies import run

    clock = [0.0]
    monkeypatch.setattr(run.time, "process_time", lambda: clock[0])

    def later(seconds: float, work: Any) -> Any:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            clock[0] += seconds
            return work(*arguments, **keywords)

        return wrapped

    monkeypatch.setattr(driver, "prune_linear", later(3600, driver.prune_linear))
    monkeypatch.setattr(run, "allocate", later(86400, run.allocate))
    monkeypatch.setattr(run, "prune_blocks", later(1e9, run.prune_blocks))
    study("efficiency", tmp_path / "out", "--sparsities", "0.5")
    for row in rows(tmp_path / "out" / "efficiency.csv"):
        assert float(row["metric_cpu_seconds"]) == 86400 + LINEARS * 3600


def test_sweep_is_the_grid_of_m_and_lambda(study: Any, tiny_llama: Path, tmp_path: Path) -> None:
    magnitude = ("--method", "magnitude", "--sparsities", "0.7")
    study("sweep", tmp_path / "sweep", *magnitude, "--m", "5,3", "--lambdas", "0.2,0.08", model=tiny_llama)
    found = rows(tmp_path / "sweep" / "sweep.csv")
    assert labelled(found, "m", "lambda") == [("dense", ""), ("3", "0.08"), ("3", "0.2"), ("5", "0.08"), ("5", "0.2")]
    assert len({row["perplexity"] for row in found}) == 5
    study("allocation", tmp_path / "allocation", *magnitude, model=tiny_llama)
    owl = next(row for row in rows(tmp_path / "allocation" / "allocation.csv") if row["allocation"] == "owl")
    assert found[3]["perplexity"] == owl["perplexity"]  # M 5 and lambda 0.08 are the defaults


def test_methods_take_admm_apart(study: Any, tmp_path: Path) -> None:
    study("methods", tmp_path / "out", "--sparsities", "0.7", "--samples", 2)
    found = rows(tmp_path / "out" / "methods.csv")
    plain = [(method, "", "") for method in ("magnitude", "wanda", "wanda-variant", "ria", "sparsegpt")]
    of_admm = [("admm", *parts) for parts in ADMM]
    assert labelled(found, "method", "target", "statistics", "allocation") == [
        ("dense", "", "", ""),
        *((*variant, allocation) for variant in (*plain, *of_admm) for allocation in ("uniform", "owl")),
        ("admm", "dense", "linear", "linear"),
    ]
    for row in found[1:]:
        within = 1 / 32 if row["method"] == "wanda" else 2e-3  # it floors in rows of 32
        assert float(row["sparsity_achieved"]) == pytest.approx(0.7, abs=within)
    assert len({row["perplexity"] for row in found}) == len(found)
    paper = {(row["method"], row["allocation"]): row["paper_llama_7b"] for row in found}
    assert paper["sparsegpt", "owl"] == "19.49"


# -------------------- LOD


def test_lod_of_the_dense_model_is_the_published_codes(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    ran = run_cli(
        *("study", "lod", tiny_llama, "-o", tmp_path / "out", "--calibration", reference / "tiny_calib.npy"),
        *("--m", "5,10"),
    )
    assert ran.code == 0, ran.stderr
    found = rows(tmp_path / "out" / "lod.csv")
    golden = json.loads((reference / "tiny_results.json").read_text())["wanda_owl_0.5"]["outlier_percent"]
    assert [float(row["lod_m5"]) for row in found] == pytest.approx(golden, abs=1e-12)
    assert all(float(row["lod_m10"]) < float(row["lod_m5"]) for row in found)
    assert "model.layers.5" in ran.stdout
    assert not (tmp_path / "out" / "lod-pruned.csv").exists()


@torch.no_grad()
def lod_by_hand(sparse: Path, dense: Path, ids: np.ndarray[Any, Any], m: float) -> float:
    """Table 2, written out: percent of all weights whose |W| sqrt(s) exceeds M times the dense block's mean."""
    loaded = load_model(resolve_model(str(dense)))
    blocks = find_blocks(loaded)
    statistics = measure_dense(loaded, blocks, ids, InMemory())
    pruned = load_file(sparse / "model.safetensors")
    total = 0.0
    for block in blocks:
        before, after = [], []
        for name, linear in block.linears.items():
            scale = statistics.squares[block.full_name(name)].sqrt()
            before.append((linear.weight.abs() * scale).flatten())
            after.append((pruned[f"{block.full_name(name)}.weight"].abs() * scale).flatten())
        outliers = torch.cat(after) > m * torch.cat(before).mean()
        total += 100 * outliers.double().mean().item()
    return total


def test_lod_after_pruning_is_by_the_dense_mean_and_over_all_weights(
    study: Any, run_cli: RunCli, model: Path, texts: list[object], ids: Path, tmp_path: Path
) -> None:
    study("lod", tmp_path / "out", "--m", "2,3", "--sparsities", "0.7", "--methods", "magnitude,sparsegpt")
    found = {(row["method"], row["m"]): row for row in rows(tmp_path / "out" / "lod-pruned.csv")}
    assert list(found) == [
        *(("dense", "2"), ("dense", "3"), ("magnitude", "2"), ("sparsegpt", "2")),
        *(("magnitude", "3"), ("sparsegpt", "3")),
    ]
    changes = set()
    for method in ("magnitude", "sparsegpt"):
        asked = ("--sparsity", 0.7, "--method", method, "--allocation", "uniform", "--quiet")
        ran = run_cli("prune", model, "-o", tmp_path / method, *asked, *texts, "--json")
        assert ran.code == 0, ran.stderr
        for m in (2, 3):
            row = found[method, str(m)]
            assert float(row["lod"]) == pytest.approx(
                lod_by_hand(tmp_path / method, model, np.load(ids)[:4], m), abs=2e-3
            )
            assert float(row["delta_lod"]) == pytest.approx(float(row["lod"]) - float(found["dense", str(m)]["lod"]))
            assert float(row["perplexity"]) == pytest.approx(json.loads(ran.stdout)["perplexity"]["after"], rel=1e-6)
            changes.add(row["delta_lod"])
    assert len(changes) == 4
    assert {row["paper_llama_13b_lod"] for row in found.values()} == {""}  # the paper's M is 7
    assert found["sparsegpt", "3"]["paper_llama_13b"] == "19.235"


def test_a_half_precision_model_is_measured_as_prune_measures_it(
    run_cli: RunCli, tiny_model: TinyModel, ids: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    texts = ("--calibration", ids, "--evaluate", ids, "--quiet", "--json")
    ran = run_cli("study", "lod", model, "-o", tmp_path / "out", "--sparsities", 0.6, "--methods", "sparsegpt", *texts)
    assert ran.code == 0, ran.stderr
    asked = ("--sparsity", 0.6, "--method", "sparsegpt", "--allocation", "uniform")
    pruned = run_cli("prune", model, "-o", tmp_path / "sparse", *asked, *texts)
    dense, sparse = (cell["perplexity"] for cell in json.loads(ran.stdout)["cells"])
    expected = json.loads(pruned.stdout)["perplexity"]
    assert (dense, sparse) == pytest.approx((expected["before"], expected["after"]), rel=1e-6)
    assert dense != sparse


# -------------------- again


def test_a_killed_study_goes_on_with_the_cells_that_are_missing(
    study: Any, run_cli: RunCli, model: Path, texts: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--sparsities", "0.5,0.7")
    study("granularity", tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "prune_linear", Counter(interrupt_at=6 * LINEARS + 3))
        ran = run_cli("study", "granularity", model, "-o", tmp_path / "out", *texts, *options, "--quiet")
    assert ran.code == 130
    assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "out" / "granularity.csv").exists()

    rest = Counter(interrupt_at=None)
    monkeypatch.setattr(driver, "prune_linear", rest)
    study("granularity", tmp_path / "out", *options)
    assert rest.count == 7 * LINEARS
    for name in ("granularity.csv", "granularity.md", "granularity.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_more_sparsities_join_those_that_are_there(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study("granularity", tmp_path / "out", "--sparsities", "0.7")
    before = {row["granularity"]: row for row in rows(tmp_path / "out" / "granularity.csv")}
    rest = Counter(interrupt_at=None)
    monkeypatch.setattr(driver, "prune_linear", rest)
    study("granularity", tmp_path / "out", "--sparsities", "0.5,0.7")
    assert rest.count == 6 * LINEARS
    after = rows(tmp_path / "out" / "granularity.csv")
    assert [row["sparsity_asked"] for row in after] == ["0.0", *["0.5"] * 6, *["0.7"] * 6]
    assert {row["granularity"]: row for row in after} == before


@pytest.fixture
def finished(study: Any, tmp_path: Path) -> Path:
    study("lod", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lod", ["--samples", "3"]),
        ("lod", ["--evaluate-windows", "1"]),
        ("granularity", []),
    ],
)
def test_other_inputs_in_the_same_directory_are_refused(
    name: str, options: list[str], finished: Path, run_cli: RunCli, model: Path, texts: list[object]
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    ran = run_cli("study", name, model, "-o", finished, *texts, *options)
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert "holds a study of another kind, model, text or machine" in line
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_damaged_cells_are_named(finished: Path, run_cli: RunCli, model: Path, texts: list[object]) -> None:
    (finished / "cells.jsonl").write_text('{"key": 1}\n')
    ran = run_cli("study", "lod", model, "-o", finished, *texts)
    assert ran.code == 2
    assert "cells.jsonl: is damaged" in ran.stderr


def test_a_directory_of_something_else_is_left_alone(
    run_cli: RunCli, model: Path, texts: list[object], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ran = run_cli("study", "lod", model, "-o", tmp_path, *texts)
    assert ran.code == 2
    assert "holds no study" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_same_threads")
def test_times_on_other_threads_are_another_study(
    study: Any, run_cli: RunCli, model: Path, texts: list[object], tmp_path: Path
) -> None:
    study("efficiency", tmp_path / "out", "--sparsities", "0.5", "--threads", 1)
    asked = ("study", "efficiency", model, "-o", tmp_path / "out", *texts[:6], "--sparsities", "0.5")
    assert run_cli(*asked, "--threads", 2).code == 2
    assert run_cli(*asked, "--threads", 1).code == 0


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("versions", versions() | {"torch": "1.0"}, "torch 1.0, and here it is"),
        ("cpu_model", "Abacus", "CPU Abacus, and here it is"),
    ],
)
def test_cells_of_other_versions_or_machines_do_not_join_those_that_are_there(
    name: str,
    before: object,
    now: str,
    run_cli: RunCli,
    model: Path,
    texts: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ("study", "granularity", model, "-o", tmp_path / "out", *texts, "--quiet", "--sparsities")
    with monkeypatch.context() as patch:
        patch.setattr(run, name, lambda: before)
        assert run_cli(*asked, "0.7").code == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    ran = run_cli(*asked, "0.5,0.7")
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert f"its cells were measured with {now}" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == made
    assert run_cli(*asked, "0.7").code == 0  # nothing is added


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["granularity", "--sparsities", "0"], "give at least one above 0"),
        (["granularity", "--sparsities", "0.5,1"], "not including, 1"),
        (["allocation", "--method", "wandas"], "method 'wandas' is unknown"),
        (["lod", "--m", "5,none"], "--m 5,none: give numbers above 0"),
        (["lod", "--m", "0,5"], "--m 0,5: give numbers above 0"),
        (["lod", "--sparsities", "0.5", "--methods", "wanda,"], "method '' is unknown"),
        (["sparsity", "--recover-text", "text.txt"], "say on how many --tokens"),
        (["sweep", "--lambdas", "1.5"], "lambda 1.5 must be in"),
    ],
)
def test_what_cannot_be_studied_is_told_in_one_line(
    arguments: list[str], told: str, run_cli: RunCli, model: Path, tmp_path: Path
) -> None:
    name, *options = arguments
    ran = run_cli("study", name, model, "-o", tmp_path / "out", *options)
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert told in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("lod", "granularity", "allocation", "nm", "per-layer", "efficiency", "sweep", "methods", "zero-shot"),
        *("recovery", "mixed-precision", "sparsity"),
    ],
)
def test_help_has_an_example(name: str, run_cli: RunCli) -> None:
    ran = run_cli("study", name, "--help")
    assert ran.code == 0
    assert f"owl-deploy study {name} demo" in " ".join(ran.stdout.split())


# -------------------- global magnitude pruning


def test_global_magnitude_pruning_has_one_threshold_on_weights(
    run_cli: RunCli, tiny_llama: Path, tmp_path: Path
) -> None:
    """And calibrates on nothing: the default text could not be had here."""
    asked = ("--sparsity", 0.6, "--method", "magnitude", "--allocation", "global", "--quiet")
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *asked).code == 0
    dense, sparse = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    names = [name for name in dense if "_proj" in name]
    assert len(names) == 6 * 7
    before = torch.cat([dense[name].float().abs().flatten() for name in names])
    gone = torch.cat([(sparse[name] == 0).flatten() for name in names])
    threshold = before.sort().values[math.ceil(0.6 * before.numel()) - 1]
    wrong = (gone != (before <= threshold)).sum().item()
    assert wrong <= 2 * len(names)  # a layer's own threshold takes one weight more
    assert gone.float().mean().item() == pytest.approx(0.6, abs=2e-3)
