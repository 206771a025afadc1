"""GGUF files hold the checkpoint, read back by transformers; llama.cpp computes from them what torch computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from owl_deploy.checkpoints.gguf import load_tokenizer, read_metadata
from owl_deploy.checkpoints.load import load_model
from owl_deploy.checkpoints.source import ModelSource
from owl_deploy.engines.llama_cpp_engine import LlamaCppEngine
from owl_deploy.engines.registry import installed_engines
from owl_deploy.errors import UnsupportedFamily, UserError
from owl_deploy.export.parity import ROUNDED_TOLERANCE
from owl_deploy.export.peer_gguf import GgufWeights, write_gguf

from .conftest import RunCli, TinyModel

# Rows of 64 and 96 weights: whole blocks of 32.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": None,
    "initializer_range": 0.1,
    "max_position_embeddings": 1200,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
STORED: dict[GgufWeights, GGMLQuantizationType] = {
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
CONTEXT = 40
LONG = 1100  # two such sequences do not fit llama.cpp's batch of 2048 tokens


def write(checkpoint: Path, out: Path, weights: GgufWeights = "f16", *, has_tokenizer: bool = False) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    write_gguf(checkpoint, out, has_tokenizer, weights=weights)
    return out / "model.gguf"


def loaded(checkpoint: Path) -> PreTrainedModel:
    return load_model(ModelSource(str(checkpoint), checkpoint), torch.float32)


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[batch, length] -> [batch, length, vocab]."""
    logits: NDArray[np.float32] = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    return logits


def random_ids(*shape: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, 96, shape)


# -------------------- the file


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", {"tie_word_embeddings": True}, id="llama, tied"),
        pytest.param("llama", {"num_key_value_heads": 4}, id="llama, as many key as query heads"),
        pytest.param("llama", {"rope_theta": 5e5, "rms_norm_eps": 1e-2}, id="llama, its own rotary base and epsilon"),
        pytest.param("mistral", {}, id="mistral"),
        pytest.param("qwen2", {"tie_word_embeddings": True}, id="qwen2, tied"),
    ],
)
def test_transformers_reads_the_model_back(
    family: str, changes: dict[str, Any], tmp_path: Path, tiny_model: TinyModel
) -> None:
    checkpoint = tiny_model(family, **SHAPE | changes)
    path = write(checkpoint, tmp_path)
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    original = loaded(checkpoint)
    for parameter in original.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.half().float()
    ids = random_ids(1, CONTEXT)
    assert np.abs(logits_of(read_back, ids) - logits_of(original, ids)).max() < 1e-5


@pytest.mark.parametrize(("weights", "steps"), [("q8_0", 127), ("q4_0", 8)])
def test_quantised_weights_are_within_a_step_of_the_checkpoints_and_zeros_stay(
    weights: GgufWeights, steps: int, tmp_path: Path, tiny_model: TinyModel
) -> None:
    model = loaded(tiny_model("llama", **SHAPE))
    matrix = model.model.layers[1].mlp.up_proj.weight
    matrix.data[matrix.abs() < 0.05] = 0
    model.save_pretrained(tmp_path / "sparse")
    tensors = {tensor.name: tensor for tensor in GGUFReader(write(tmp_path / "sparse", tmp_path, weights)).tensors}
    stored = tensors["blk.1.ffn_up.weight"]
    assert stored.tensor_type is STORED[weights]
    original, values = matrix.data.numpy(), dequantize(stored.data, stored.tensor_type)
    largest = np.abs(original.reshape(-1, 32)).max(axis=1)
    assert (np.abs(values - original).reshape(-1, 32).max(axis=1) < largest / steps * 1.01).all()
    assert np.abs(values - original).mean() < (largest / steps).mean() / 3, "not rounded to the nearest step"
    assert (original == 0).mean() > 0.3
    assert (values[original == 0] == 0).all()


def test_types_are_those_of_llama_cpps_own_tools(tmp_path: Path, tiny_model: TinyModel) -> None:
    checkpoint = tiny_model("llama", **SHAPE | {"intermediate_size": 80})
    _, note = write_gguf(checkpoint, tmp_path, False, weights="q4_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == types["blk.1.attn_q.weight"] == types["blk.1.ffn_up.weight"] == "Q4_0"
    assert types["output.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 80
    assert "vectors (F32), blk.ffn_down.weight (F16), output.weight (Q8_0)" in note
    assert "token ids only: no tokenizer" in note


def test_the_same_checkpoint_makes_the_same_bytes(tmp_path: Path, tiny_model: TinyModel) -> None:
    checkpoint = tiny_model("llama", **SHAPE)
    first, second = (write(checkpoint, tmp_path / name, "q4_0") for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_scaled_rotary_frequencies_are_factors_of_the_unscaled_ones(tmp_path: Path, tiny_model: TinyModel) -> None:
    checkpoint = tiny_model("llama", **SHAPE, rope_scaling=LLAMA3_ROPE)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(write(checkpoint, tmp_path)).tensors}
    factors = tensors["rope_freqs.weight"]
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)
    unscaled = 1e4 ** -(np.arange(0, 16, 2) / 16)
    assert unscaled / factors == pytest.approx(loaded(checkpoint).model.rotary_emb.inv_freq.numpy())


def test_a_model_that_looks_back_a_window_is_made_for_sequences_within_it(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    checkpoint = tiny_model("mistral", **SHAPE | {"sliding_window": 24})
    _, note = write_gguf(checkpoint, tmp_path, False, weights="f16")
    assert read_metadata(tmp_path / "model.gguf")["llama.context_length"] == 24
    assert "made for 24 tokens" in note


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("opt", {}, "model type opt is not written as GGUF; llama, mistral, qwen2 are"),
        ("llama", {"hidden_act": "gelu"}, "silu in this family, not gelu"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "of type yarn"),
        ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "of LLaMA only"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path, tiny_model: TinyModel
) -> None:
    with pytest.raises(UnsupportedFamily, match=reason):
        write(tiny_model(family, **changes), tmp_path)


# -------------------- the tokenizer


@pytest.fixture(scope="module")
def passage() -> str:
    return (resources.files("owl_deploy") / "text" / "passage.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel, passage: str) -> Path:
    """A LLaMA with a byte-level BPE tokenizer that splits digits, as SmolLM2's does, and prepends BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([passage], trainer)
    directory = tmp_path_factory.mktemp("byte_level")
    loaded(tiny_model("llama", **SHAPE | {"vocab_size": 512})).save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", chat_template="{{ messages }}"
    ).save_pretrained(directory)
    return directory


def test_the_tokenizer_comes_back_from_the_file(byte_level: Path, tmp_path: Path, passage: str) -> None:
    path = write(byte_level, tmp_path, has_tokenizer=True)
    original = PreTrainedTokenizerFast.from_pretrained(byte_level)
    read_back = load_tokenizer(path)
    assert read_back is not None
    text = f"{passage} 12345 <|end|>\n\n  été"
    assert read_back(text)["input_ids"] == original(text)["input_ids"]
    assert (read_back.bos_token, read_back.eos_token) == ("<|start|>", "<|end|>")
    metadata = read_metadata(path)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"


def test_a_tokenizer_that_llama_cpp_lacks_is_left_out(tiny_with_tokenizer: Path, tmp_path: Path) -> None:
    _, note = write_gguf(tiny_with_tokenizer, tmp_path, True, weights="f16")
    assert "token ids only: llama.cpp lacks its tokenizer" in note
    assert load_tokenizer(tmp_path / "model.gguf") is None
