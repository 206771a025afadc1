"""`owl-deploy prune` and `evaluate` as a user meets them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from .conftest import WORDS, RunCli

MADE = [
    "allocation.png",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "pruning.json",
    "recipe.explicit.yaml",
    "recipe.yaml",
]
DOCUMENTS = [" ".join(np.random.default_rng(index).choice(WORDS, 60)) for index in range(8)]


@pytest.fixture
def calibration(reference: Path) -> Path:
    return reference / "tiny_calib.npy"


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_json_on_stdout_is_the_manifest_on_disk(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    ran = run_cli(
        "prune", tiny_llama, "-o", tmp_path / "out", "--sparsity", 0.6, "--calibration", calibration, "--json"
    )
    assert ran.code == 0
    manifest = json.loads(ran.stdout)
    assert manifest == json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert sorted(contents(tmp_path / "out")) == MADE
    assert manifest["calibration"]["source"] == str(calibration)
    assert (manifest["calibration"]["windows"], manifest["calibration"]["seqlen"]) == (8, 64)
    assert manifest["block_class"] == "LlamaDecoderLayer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_without_json_stdout_says_what_was_made(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, reference: Path, tmp_path: Path
) -> None:
    windows = tmp_path / "eval.npy"
    np.save(windows, np.load(reference / "tiny_eval.npy").reshape(4, 64))
    texts = ["--calibration", calibration, "--evaluate", windows, "--evaluate-windows", 2]
    ran = run_cli("prune", tiny_llama, "-o", tmp_path / "out", "--sparsity", 0.5, *texts, "--quiet")
    made, perplexity = ran.stdout.splitlines()
    assert made.startswith(f"{tmp_path / 'out'}: sparsity 0.49")
    assert perplexity.startswith(f"perplexity on {windows}: ")
    assert ran.stderr == ""


def test_running_again_finds_it_made_and_keeps_every_byte(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    command = ["prune", tiny_llama, "-o", tmp_path / "out", "--sparsity", 0.6, "--calibration", calibration, "--json"]
    first = run_cli(*command)
    before = contents(tmp_path / "out")
    again = run_cli(*command)
    assert again.code == 0
    assert "already made" in again.stderr
    assert again.stdout == first.stdout
    assert contents(tmp_path / "out") == before


def test_the_output_of_other_inputs_is_not_overwritten(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    command = ["prune", tiny_llama, "-o", tmp_path / "out", "--calibration", calibration]
    assert run_cli(*command, "--sparsity", 0.6).code == 0
    before = contents(tmp_path / "out")
    for other in (["--sparsity", 0.5], ["--sparsity", 0.6, "--owl-m", 3], ["--sparsity", 0.6, "--samples", 4]):
        ran = run_cli(*command, *other)
        assert ran.code == 2
        assert "other inputs" in ran.stderr
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_two_runs_give_the_same_bytes_and_so_does_the_recipe_they_write(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, tmp_path: Path, method: str
) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    for out in (a, b):
        asked = ["--sparsity", 0.55, "--method", method, "--calibration", calibration]
        assert run_cli("prune", tiny_llama, "-o", out, *asked).code == 0
    first, second = contents(a), contents(b)
    for name in set(MADE) - {"pruning.json"}:  # which has the seconds it took
        assert first[name] == second[name], name

    ran = run_cli("prune", tiny_llama, "-o", c, "--recipe", a / "recipe.explicit.yaml", "--calibration", calibration)
    assert ran.code == 0
    assert (c / "model.safetensors").read_bytes() == first["model.safetensors"]


def test_the_explicit_recipe_of_owl_by_magnitude_needs_no_calibration(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    asked = ["--sparsity", 0.55, "--method", "magnitude"]
    assert run_cli("prune", tiny_llama, "-o", a, *asked, "--calibration", calibration).code == 0
    assert run_cli("prune", tiny_llama, "-o", b, "--recipe", a / "recipe.explicit.yaml").code == 0
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_an_allocation_file_says_the_sparsity_of_every_linear(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["--calibration", reference / "tiny_calib.npy", "--quiet"]
    ran = run_cli("prune", tiny_llama, "-o", first, "--sparsity", "0.6", "--allocation", "erdos-renyi", *options)
    assert ran.code == 0, ran.stderr
    found = {
        f"{block['name']}.{linear['name']}": linear["sparsity_asked"]
        for block in json.loads((first / "pruning.json").read_text())["blocks"]
        for linear in block["linears"]
    }
    path = tmp_path / "sparsities.json"
    path.write_text(json.dumps(found))
    assert run_cli("prune", tiny_llama, "-o", again, "--allocation", path, *options).code == 0
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    by_recipe = tmp_path / "by_recipe"
    ran = run_cli("prune", tiny_llama, "-o", by_recipe, "--recipe", first / "recipe.explicit.yaml", *options)
    assert ran.code == 0, ran.stderr
    assert (first / "model.safetensors").read_bytes() == (by_recipe / "model.safetensors").read_bytes()


def test_mixed_n_of_8_prunes_whole_groups_and_n_on_average(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    options = ["--pattern", "mixed-4:8", "--calibration", reference / "tiny_calib.npy", "--json", "--quiet"]
    ran = run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options)
    assert ran.code == 0, ran.stderr
    manifest = json.loads(ran.stdout)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    counts = []
    for block in manifest["blocks"]:
        zeros = {
            int(count)
            for linear in block["linears"]
            for count in (tensors[f"{block['name']}.{linear['name']}.weight"].reshape(-1, 8) == 0).sum(axis=1)
        }
        assert len(zeros) == 1
        counts += zeros
    assert np.mean(counts) == 4
    assert len(set(counts)) > 1
    lod = [block["lod_percent"] for block in manifest["blocks"]]
    assert counts[int(np.argmax(lod))] == min(counts)


def test_dense_statistics_are_those_of_the_dense_model(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    # OWL has measured them already, and uniform has not: both prune block 0 alike only with what is asked alike.
    options = ["--calibration", reference / "tiny_calib.npy", "--dense-statistics", "--quiet"]
    for out, allocation in (("known", "owl"), ("collected", "uniform")):
        chosen = ["--allocation", allocation, *(["--lambda", "0"] if allocation == "owl" else [])]
        ran = run_cli("prune", tiny_llama, "-o", tmp_path / out, "--sparsity", "0.5", *chosen, *options)
        assert ran.code == 0, ran.stderr
    known, collected = (tmp_path / out / "model.safetensors" for out in ("known", "collected"))
    assert known.read_bytes() == collected.read_bytes()


def test_pattern_2_of_4_zeroes_two_of_every_four_inputs(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    ran = run_cli("prune", tiny_llama, "-o", tmp_path / "out", "--pattern", "2:4", "--calibration", calibration)
    assert ran.code == 0
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        if "proj" in name:
            assert ((weight == 0).reshape(-1, 4).sum(axis=1) == 2).all(), name


def test_sparsity_0_is_the_same_model(run_cli: RunCli, tiny_llama: Path, tmp_path: Path) -> None:
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", "--sparsity", 0).code == 0
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """The same words as text, JSON lines and Parquet."""
    made = {kind: tmp_path / f"words.{kind}" for kind in ("txt", "jsonl", "parquet")}
    made["txt"].write_text("\n\n".join(DOCUMENTS))
    made["jsonl"].write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), made["parquet"])
    return made


def test_text_files_of_every_kind_calibrate_alike(
    run_cli: RunCli, tiny_with_tokenizer: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    records: list[dict[str, Any]] = []
    for kind, path in texts.items():
        asked = ["--sparsity", 0.5, "--calibration", path, "--samples", 4, "--seqlen", 32]
        ran = run_cli("prune", tiny_with_tokenizer, "-o", tmp_path / kind, *asked, "--json")
        assert ran.code == 0, ran.stderr
        records.append(json.loads(ran.stdout)["calibration"])
    assert [record["sha256"] for record in records] == [records[0]["sha256"]] * 3
    assert (records[0]["windows"], records[0]["seqlen"]) == (4, 32)


def test_the_seed_chooses_the_calibration_windows(
    run_cli: RunCli, tiny_with_tokenizer: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    hashes = set()
    for seed in (0, 1):
        asked = ["--sparsity", 0.5, "--calibration", texts["txt"], "--samples", 4, "--seqlen", 32, "--seed", seed]
        ran = run_cli("prune", tiny_with_tokenizer, "-o", tmp_path / f"{seed}", *asked, "--json")
        hashes.add(json.loads(ran.stdout)["calibration"]["sha256"])
    assert len(hashes) == 2


def test_token_ids_are_cut_into_windows_from_rows_or_from_one_line(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "line.npy", np.load(calibration).reshape(-1))
    rows = []
    for path in (calibration, tmp_path / "line.npy"):
        ran = run_cli("evaluate", tiny_llama, "--text", path, "--seqlen", 32, "--windows", 3, "--json")
        rows.append(json.loads(ran.stdout))
    assert (rows[0]["windows"], rows[0]["seqlen"]) == (3, 32)
    assert rows[0]["text_sha256"] == rows[1]["text_sha256"]


def test_the_tokenizer_comes_along(
    run_cli: RunCli, tiny_with_tokenizer: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    asked = ["--sparsity", 0.5, "--calibration", texts["txt"], "--samples", 2, "--seqlen", 16]
    run_cli("prune", tiny_with_tokenizer, "-o", tmp_path / "out", *asked)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (tiny_with_tokenizer, tmp_path / "out"))
    assert after(DOCUMENTS[0])["input_ids"] == before(DOCUMENTS[0])["input_ids"]


def test_evaluate_prints_the_perplexity_as_json(
    run_cli: RunCli, tiny_with_tokenizer: Path, texts: dict[str, Path]
) -> None:
    options = ["--text", texts["txt"], "--seqlen", 32, "--windows", 5]
    ran = run_cli("evaluate", tiny_with_tokenizer, *options, "--json", "--quiet")
    assert ran.code == 0, ran.stderr
    row = json.loads(ran.stdout)
    assert (row["windows"], row["seqlen"], row["text"]) == (5, 32, str(texts["txt"]))
    assert 1 < row["perplexity"] < math.inf
    assert f"perplexity {row['perplexity']:.4f} (5 windows" in run_cli("evaluate", tiny_with_tokenizer, *options).stdout


def test_evaluate_agrees_with_what_prune_measured(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    asked = ["--sparsity", 0.5, "--calibration", calibration, "--evaluate", calibration, "--json"]
    measured = json.loads(run_cli("prune", tiny_llama, "-o", tmp_path / "out", *asked).stdout)["perplexity"]
    for model, expected in ((tiny_llama, measured["before"]), (tmp_path / "out", measured["after"])):
        ran = run_cli("evaluate", model, "--text", calibration, "--json")
        assert json.loads(ran.stdout)["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_a_pruned_checkpoint_can_be_pruned_further(
    run_cli: RunCli, tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    options = ["--allocation", "uniform", "--calibration", calibration]
    run_cli("prune", tiny_llama, "-o", tmp_path / "half", "--sparsity", 0.5, *options)
    ran = run_cli("prune", tmp_path / "half", "-o", tmp_path / "more", "--sparsity", 0.75, *options, "--json")
    assert json.loads(ran.stdout)["sparsity_achieved"] == pytest.approx(0.75, abs=0.001)


def test_a_relative_output_in_a_new_directory(
    run_cli: RunCli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert run_cli("prune", "model", "-o", "new/out", "--sparsity", 0).code == 0
    assert sorted(contents(tmp_path / "new" / "out")) == MADE
