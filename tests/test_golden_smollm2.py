"""The real SmolLM2-135M, through the real command, gives the official implementations' numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .conftest import RunCli

PERPLEXITY_ON_AMD = 595.91
pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def official(reference: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((reference / "smollm2_official.json").read_text())
    return found


def prune(run_cli: RunCli, dense: Path, reference: Path, out: Path, *options: Any) -> dict[str, Any]:
    calibration = ["--calibration", reference / "smollm2_calib_ids.npy"]
    ran = run_cli("prune", dense, "-o", out, *options, *calibration, "--json", "--quiet")
    assert ran.code == 0, ran.stderr
    manifest: dict[str, Any] = json.loads(ran.stdout)
    return manifest


def check_sparsities(manifest: dict[str, Any], expected: dict[str, Any]) -> None:
    # Not the hash of the masks: another CPU rounds otherwise, and near ties fall the other way.
    achieved = {
        f"{index}.{linear['name']}": linear["sparsity_achieved"]
        for index, block in enumerate(manifest["blocks"])
        for linear in block["linears"]
    }
    assert achieved == pytest.approx(expected["per_module_sparsity"], abs=1e-5)
    assert manifest["sparsity_achieved"] == pytest.approx(expected["global_sparsity"], abs=1e-5)


def test_dense_and_wanda_at_50_percent(
    run_cli: RunCli, smollm2_dense: Path, reference: Path, official: dict[str, Any], tmp_path: Path
) -> None:
    options = ["--sparsity", "0.5", "--allocation", "uniform", "--evaluate", reference / "smollm2_eval_ids.npy"]
    manifest = prune(run_cli, smollm2_dense, reference, tmp_path / "out", *options)
    expected = official["results"]["wanda_uniform_0.5"]
    check_sparsities(manifest, expected)
    assert manifest["perplexity"]["before"] == pytest.approx(official["results"]["dense"]["ppl"], rel=0.005)
    assert manifest["perplexity"]["after"] == pytest.approx(expected["ppl"], rel=0.005)


def test_owl_with_wanda_at_70_percent(
    run_cli: RunCli, smollm2_dense: Path, reference: Path, official: dict[str, Any], tmp_path: Path
) -> None:
    manifest = prune(run_cli, smollm2_dense, reference, tmp_path / "out", "--sparsity", "0.7")
    asked = [block["sparsity_asked"] for block in manifest["blocks"]]
    published = [0.7 - keep for keep in official["owl"]["keep_minus_target"]]
    assert asked == pytest.approx(published, abs=1e-3)
    lod = [block["lod_percent"] for block in manifest["blocks"]]
    assert lod == pytest.approx(official["owl"]["outlier_ratio_percent"], rel=1e-3)
    expected = official["results"]["wanda_owl_0.7"]
    check_sparsities(manifest, expected)
    ran = run_cli("evaluate", tmp_path / "out", "--text", reference / "smollm2_eval_ids.npy", "--json", "--quiet")
    assert ran.code == 0, ran.stderr
    # The official run's, or what MKL comes to on AMD (docs/reproducibility.md), where near ties fall otherwise.
    measured = json.loads(ran.stdout)["perplexity"]
    assert any(measured == pytest.approx(value, rel=0.005) for value in (expected["ppl"], PERPLEXITY_ON_AMD))


# -------------------- the tokenizer that comes out of the GGUF


@pytest.fixture(scope="module")
def tokenizer(smollm2_dense: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_dense)


def test_no_bos_is_added(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("Hello there")["input_ids"]
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids) == "Hello there"


def test_a_turn_ends_with_im_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token == "<|im_end|>"


def test_digits_are_split_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = [tokenizer.decode([token]) for token in tokenizer("in 2024")["input_ids"]]
    assert tokens[-4:] == ["2", "0", "2", "4"]


def test_the_chat_template_is_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat


def test_the_gguf_is_not_saved_as_a_tokenizer(smollm2_dense: Path) -> None:
    assert not (smollm2_dense / "tokenizer.model").exists()
    assert max(file.stat().st_size for file in smollm2_dense.glob("token*")) < 10 * 2**20
