"""GGUF files hold the checkpoint, read back by transformers; llama.cpp computes from them what torch computes."""

from __future__ import annotations

import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from owl_deploy.engines.environments import Environment
from owl_deploy.engines.llama_cpp_engine import LlamaCppEngine
from owl_deploy.engines.registry import installed_engines
from owl_deploy.errors import UnsupportedFamily, UserError
from owl_deploy.exporting.peers.gguf import GgufWeights, write_gguf
from owl_deploy.exporting.peers.gguf_quantised import QuantisedWeights, write_gguf_quantised
from owl_deploy.exporting.peers.importance import mean_squares
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.exporting.verify.parity import ROUNDED_TOLERANCE
from owl_deploy.models.gguf import load_tokenizer, read_metadata
from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.run import Calibration, prune_checkpoint

from .conftest import RunCli, TinyModel, run_in

# Rows of 64 and 96 weights: whole blocks of 32.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 1200,
    "tie_word_embeddings": False,
}
NO_WINDOW = {"sliding_window": None}
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
        pytest.param("mistral", NO_WINDOW, id="mistral"),
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
    """A LLaMA with a byte-level BPE tokenizer that splits digits, as SmolLM2's does."""
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


@pytest.fixture(scope="module")
def with_spaces_marked(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel, passage: str) -> Path:
    """A LLaMA with a tokenizer of LLaMA's kind: BPE with `▁` for a space, and bytes for what it does not know."""
    marked = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(marked)
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator([passage], trainers.BpeTrainer(vocab_size=240, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    letters, words = [piece for piece in pieces if len(piece) == 1], [piece for piece in pieces if len(piece) > 1]
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in pieces and word[cut:] in pieces
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(marked)
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory = tmp_path_factory.mktemp("with_spaces_marked")
    loaded(tiny_model("llama", **SHAPE | {"vocab_size": 512})).save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


TOKENIZERS = pytest.mark.parametrize("model", ["byte_level", "with_spaces_marked"])


def checkpoint_and_text(model: str, request: pytest.FixtureRequest, passage: str) -> tuple[Path, str]:
    return request.getfixturevalue(model), f"{passage} 12345 — été, \n\n  naïve 🦉"


@TOKENIZERS
def test_the_tokenizer_comes_back_from_the_file(
    model: str, tmp_path: Path, passage: str, request: pytest.FixtureRequest
) -> None:
    checkpoint, text = checkpoint_and_text(model, request, passage)
    original = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    read_back = load_tokenizer(write(checkpoint, tmp_path, has_tokenizer=True))
    assert read_back is not None
    assert read_back(text)["input_ids"] == original(text)["input_ids"]
    assert (read_back.bos_token, read_back.eos_token) == (original.bos_token, original.eos_token)


def test_what_the_file_says_of_its_tokenizer(byte_level: Path, with_spaces_marked: Path, tmp_path: Path) -> None:
    bytes_, spaces = (
        read_metadata(write(checkpoint, tmp_path / checkpoint.name, has_tokenizer=True))
        for checkpoint in (byte_level, with_spaces_marked)
    )
    assert (bytes_["tokenizer.ggml.model"], bytes_["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert bytes_["tokenizer.chat_template"] == "{{ messages }}"
    assert bytes_["tokenizer.ggml.add_bos_token"] is False
    assert spaces["tokenizer.ggml.model"] == "llama"
    assert spaces["tokenizer.ggml.add_bos_token"] is True


def test_a_tokenizer_that_llama_cpp_lacks_is_left_out(tiny_with_tokenizer: Path, tmp_path: Path) -> None:
    _, note = write_gguf(tiny_with_tokenizer, tmp_path, True, weights="f16")
    assert "token ids only: llama.cpp lacks its tokenizer" in note
    assert load_tokenizer(tmp_path / "model.gguf") is None


# -------------------- the engine

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from owl_deploy.engines.llama_cpp_engine import LlamaCppEngine

def failure(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

folder, context, long = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
model, ids = folder / "model.gguf", np.load(folder / "ids.npy")
one = LlamaCppEngine(model, threads=1, context=context, prompts=())
first, second = ids[:1, :context], ids[1:, :context]
logits = {"at once": one.score(first)[0]}
scored, kept = one.score(second[:, :-9]), one.prefill(second[:, :-9])
decoded = [one.decode(second[:, column]) for column in range(context - 9, context)]
logits["second"] = np.concatenate([scored[0, :-1], kept, *decoded])
failures = {"full": failure(lambda: one.decode(second[:, 0])), "empty": failure(lambda: one.prefill(ids[:1, :0]))}
two = LlamaCppEngine(model, threads=1, context=long, prompts=(), batch=2)
scored, kept = two.score(ids[:, :-1]), two.prefill(ids[:, :-1])[:, None]
logits["batch"] = np.concatenate([scored[:, :-1], kept, two.decode(ids[:, -1])[:, None]], axis=1)
single = LlamaCppEngine(model, threads=1, context=long, prompts=())
logits["one by one"] = np.concatenate([single.score(row[None]) for row in ids])
failures["context"] = failure(lambda: LlamaCppEngine(model, threads=1, context=9999, prompts=()))
damaged = folder / "damaged.gguf"
damaged.write_bytes(model.read_bytes()[:2000])
failures["damaged"] = failure(lambda: LlamaCppEngine(damaged, threads=1, context=context, prompts=()))
np.savez(folder / "logits.npz", **logits)
(folder / "facts.json").write_text(json.dumps({"facts": one.describe(), "failures": failures}))
"""


VARIABLES = {**os.environ, "OMP_NUM_THREADS": "1"}


def difference(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The norm of the difference over that of what is expected."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("family", "changes", "weights"),
    [
        ("llama", {"tie_word_embeddings": True}, "f16"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "f16"),
        ("llama", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 100.0}, "f16"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "f16"),
        ("mistral", NO_WINDOW | {"head_dim": 32}, "f16"),
        ("qwen2", {}, "f16"),
        ("llama", {}, "q8_0"),
        ("llama", {"tie_word_embeddings": True, "intermediate_size": 80}, "q4_0"),
    ],
)
def test_llama_cpp_computes_what_torch_computes(
    family: str,
    changes: dict[str, Any],
    weights: GgufWeights,
    tmp_path: Path,
    tiny_model: TinyModel,
    llama_cpp_python: Path,
) -> None:
    model = loaded(tiny_model(family, **SHAPE | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # a new model's are all 0
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "checkpoint")
    write(tmp_path / "checkpoint", tmp_path, weights)
    ids = random_ids(2, LONG)
    np.save(tmp_path / "ids.npy", ids)
    finished = run_in(llama_cpp_python, SCRIPT, tmp_path, CONTEXT, LONG, variables=VARIABLES)
    assert finished.stderr == "", "llama.cpp's messages are not silent"
    logits, expected = np.load(tmp_path / "logits.npz"), logits_of(model, ids)
    tolerance = ROUNDED_TOLERANCE[weights]
    assert difference(logits["at once"], expected[0, :CONTEXT]) < tolerance
    assert difference(logits["second"], expected[1, :CONTEXT]) < tolerance, "remembers the first, or decodes elsewhere"
    assert difference(logits["batch"], expected) < tolerance
    assert difference(logits["batch"], logits["one by one"]) < tolerance / 5
    said = json.loads((tmp_path / "facts.json").read_text())
    assert said["facts"]["kv_cache"] == "f16"
    assert said["facts"]["batch_tokens"] == CONTEXT
    assert said["facts"]["instruction_set"] in ("amx", "avx512_vnni", "avx512", "avx2", "neon")
    assert said["failures"]["full"] == f"ValueError: 1 tokens after {CONTEXT} do not fit a context of {CONTEXT}"
    assert said["failures"]["empty"].startswith("ValueError: 0 tokens")
    assert "made for sequences of 1200 tokens, and 9999 are asked for" in said["failures"]["context"]
    assert "UserError" in said["failures"]["damaged"]
    assert "damaged.gguf: llama.cpp cannot load it" in said["failures"]["damaged"]


TOKENIZE = """
import sys
import llama_cpp

model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
print(model.tokenize(open(sys.argv[2], "rb").read(), add_bos=True, special=True))
"""


@pytest.mark.llama_cpp
@TOKENIZERS
def test_llama_cpp_splits_text_as_the_checkpoints_tokenizer_does(
    model: str, tmp_path: Path, passage: str, request: pytest.FixtureRequest, llama_cpp_python: Path
) -> None:
    checkpoint, text = checkpoint_and_text(model, request, passage)
    (tmp_path / "text").write_text(text, encoding="utf-8")
    path = write(checkpoint, tmp_path, has_tokenizer=True)
    ids = json.loads(run_in(llama_cpp_python, TOKENIZE, path, tmp_path / "text", variables=VARIABLES).stdout)
    assert ids == PreTrainedTokenizerFast.from_pretrained(checkpoint)(text)["input_ids"]


@pytest.mark.llama_cpp
def test_a_bench_compares_llama_cpp_with_onnx_runtime_first(
    tmp_path: Path, tiny_model: TinyModel, run_cli: RunCli, llama_cpp_python: Path
) -> None:
    assert llama_cpp_python.is_file()
    checkpoint = tiny_model("llama", **SHAPE)
    for flavor in ("standard", "gguf-f16", "gguf-q8_0", "gguf-q4_0"):
        assert run_cli("export", checkpoint, "-o", tmp_path / "bundle", "--flavor", flavor).code == 0
    ran = run_cli(
        *("bench", tmp_path / "bundle", "--engines", "onnxruntime,llama.cpp", "--batch", "1,2", "--prompt", 24),
        *("--new-tokens", 4, "--repetitions", 1, "--threads", 1, "--max-load", 99, "-o", tmp_path / "out", "--json"),
    )
    assert ran.code == 0
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["status"] for row in rows] == ["ok"] * 8
    names = ["llama.cpp-f16", "llama.cpp-q8_0", "llama.cpp-q4_0"]
    compared = {row["engine"]: row["parity"]["relative_difference"] for row in rows if row["engine"] in names}
    assert list(compared) == names
    assert 0 < compared["llama.cpp-f16"] < compared["llama.cpp-q8_0"] < compared["llama.cpp-q4_0"]


def test_all_engines_have_one_short_name_and_one_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_DEPLOY_ENGINES", str(tmp_path))
    with pytest.raises(UserError, match=r"llama.cpp-f16: not installed; run: owl-deploy engines install llama.cpp$"):
        installed_engines("llama.cpp")
    monkeypatch.setattr(Environment, "is_ready", lambda _: True)
    specs = installed_engines("onnxruntime,llama.cpp")
    precisions = ["f16", "q8_0", "q4_0", "q4_k_m", "q3_k_m", "q2_k", "iq4_xs", "original"]
    assert [spec.name for spec in specs] == ["onnxruntime", *(f"llama.cpp-{name}" for name in precisions)]
    assert [spec.precision for spec in specs] == ["fp32", *precisions]
    assert len({spec.environment for spec in specs}) == 2


# -------------------- llama.cpp's own quantiser


WIDE = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
TEXT = random_ids(4, CONTEXT)


@torch.inference_mode()
def test_importance_is_the_mean_square_of_each_input(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama", **SHAPE))
    found = mean_squares(model, TEXT)
    block = model.model.layers[0]
    inputs = block.input_layernorm(model.model.embed_tokens(torch.from_numpy(TEXT))).flatten(0, 1)
    expected = inputs.square().mean(dim=0).numpy()
    for name in ("q_proj", "k_proj", "v_proj"):
        assert found[f"model.layers.0.self_attn.{name}"] == pytest.approx(expected, rel=1e-4)
    assert found["model.layers.1.mlp.down_proj"].shape == (96,)
    assert len(found) == 2 * 7


def test_quantisers_are_those_of_an_installed_llama_cpp(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_DEPLOY_ENGINES", str(tmp_path))
    with pytest.raises(UserError, match=r"writes this flavor itself, and is not installed; run: owl-deploy engines"):
        write_gguf_quantised(tiny_model("llama", **SHAPE), tmp_path, False, TEXT, weights="q2_k")


def quantised(checkpoint: Path, out: Path, weights: QuantisedWeights, text: NDArray[np.int64] = TEXT) -> str:
    out.mkdir(parents=True)
    _, note = write_gguf_quantised(checkpoint, out, False, text, weights=weights)
    assert sorted(path.name for path in out.iterdir()) == ["model.gguf"]
    return note


def bits_of(path: Path) -> float:
    """Of a weight of the blocks' matrices."""
    matrices = [tensor for tensor in GGUFReader(path).tensors if "blk." in tensor.name and len(tensor.shape) > 1]
    return 8 * sum(tensor.n_bytes for tensor in matrices) / float(sum(tensor.n_elements for tensor in matrices))


@pytest.mark.llama_cpp
def test_llama_cpps_own_quantiser_writes_types_of_few_bits(
    tmp_path: Path, tiny_model: TinyModel, llama_cpp_python: Path
) -> None:
    del llama_cpp_python
    checkpoint = tiny_model("llama", **WIDE)
    notes = {weights: quantised(checkpoint, tmp_path / weights, weights) for weights in get_args(QuantisedWeights)}
    assert "Q4_K (" in notes["q4_k_m"]
    assert "Q2_K (" in notes["q2_k"]
    assert "IQ4_XS (" in notes["iq4_xs"]
    assert all(note.endswith("importance matrix from 4 windows of 40 tokens") for note in notes.values())
    bits = [bits_of(tmp_path / weights / "model.gguf") for weights in ("q4_k_m", "iq4_xs", "q3_k_m", "q2_k")]
    assert bits == sorted(bits, reverse=True)
    assert 2.5 < bits[-1] < bits[0] < 5.5


@pytest.mark.llama_cpp
def test_the_text_decides_what_is_rounded_how(tmp_path: Path, tiny_model: TinyModel, llama_cpp_python: Path) -> None:
    del llama_cpp_python
    checkpoint = tiny_model("llama", **WIDE)
    texts = {"one": TEXT, "again": TEXT, "other": np.zeros_like(TEXT)}
    for name, text in texts.items():
        quantised(checkpoint, tmp_path / name, "q2_k", text)
    one, again, other = ((tmp_path / name / "model.gguf").read_bytes() for name in texts)
    assert one == again
    assert one != other


@pytest.mark.llama_cpp
def test_rows_that_are_no_multiple_of_256_fall_back(
    tmp_path: Path, tiny_model: TinyModel, llama_cpp_python: Path
) -> None:
    del llama_cpp_python
    note = quantised(tiny_model("llama", **SHAPE), tmp_path / "out", "q2_k")
    assert "_K (" not in note
    assert bits_of(tmp_path / "out" / "model.gguf") >= 4.5


@pytest.mark.llama_cpp
def test_a_bench_runs_what_was_quantised(
    tmp_path: Path, tiny_model: TinyModel, run_cli: RunCli, llama_cpp_python: Path
) -> None:
    del llama_cpp_python
    checkpoint = tiny_model("llama", **WIDE)
    np.save(tmp_path / "text.npy", TEXT)
    for flavor in ("genai", "gguf-q4_k_m", "gguf-q2_k"):
        ran = run_cli(
            *("export", checkpoint, "-o", tmp_path / "bundle", "--flavor", flavor, "--quiet"),
            *("--calibration", tmp_path / "text.npy"),
        )
        assert ran.code == 0, ran.stderr
    ran = run_cli(
        *("bench", tmp_path / "bundle", "--engines", "onnxruntime,llama.cpp", "--prompt", 24, "--new-tokens", 4),
        *("--repetitions", 1, "--threads", 1, "--max-load", 99, "-o", tmp_path / "out", "--json", "--quiet"),
    )
    assert ran.code == 0, ran.stderr
    rows = {row["engine"]: row for row in map(json.loads, ran.stdout.splitlines())}
    assert [row["error"] for row in rows.values()] == [None] * 3
    four, two = rows["llama.cpp-q4_k_m"], rows["llama.cpp-q2_k"]
    assert 0 < four["parity"]["relative_difference"] < two["parity"]["relative_difference"]
    assert 5.5 > four["linear_bits"] > two["linear_bits"]


# -------------------- the file as it came


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> tuple[Path, Path]:
    """A GGUF file, and the dense checkpoint that `prune` makes of it."""
    folder = tmp_path_factory.mktemp("came")
    path = write(tiny_model("llama", **SHAPE), folder, "q4_0").rename(folder / "came.gguf")
    prune_checkpoint(ModelSource(str(path), path), folder / "dense", PruningPlan(0.0), Calibration())
    return path, folder / "dense"


def test_the_file_that_a_model_came_as_is_a_flavor(from_gguf: tuple[Path, Path], tmp_path: Path) -> None:
    path, dense = from_gguf
    manifest = export_checkpoint(dense, tmp_path / "bundle", ["gguf-original"])
    assert (tmp_path / "bundle" / "gguf-original" / "model.gguf").read_bytes() == path.read_bytes()
    record = manifest.flavors["gguf-original"]
    assert record.source == "came.gguf, as it came"
    assert record.note == "matrices in Q4_0 (15), Q8_0 (1)"
    assert record.stored is not None
    assert record.stored.linear_bits == pytest.approx(4.5)


def test_only_a_dense_checkpoint_of_a_file_that_is_still_there_has_that_flavor(
    from_gguf: tuple[Path, Path], tmp_path: Path, tiny_model: TinyModel
) -> None:
    path, dense = from_gguf
    plan = PruningPlan(0.5, method="magnitude", allocation="uniform")
    prune_checkpoint(ModelSource(str(path), path), tmp_path / "sparse", plan, Calibration())
    for checkpoint in (tmp_path / "sparse", tiny_model("llama", **SHAPE)):
        with pytest.raises(UnsupportedFamily, match="is not a GGUF file as it came; prune one with: --sparsity 0"):
            export_checkpoint(checkpoint, tmp_path / "bundle", ["gguf-original"])
    moved = path.rename(tmp_path / "moved.gguf")
    try:
        with pytest.raises(UnsupportedFamily, match=r"no GGUF file .*came\.gguf that it was made from; run this where"):
            export_checkpoint(dense, tmp_path / "bundle", ["gguf-original"])
        path.write_bytes(b"another model")
        with pytest.raises(UnsupportedFamily, match="no GGUF file"):
            export_checkpoint(dense, tmp_path / "bundle", ["gguf-original"])
    finally:
        moved.rename(path)


def test_importing_the_engine_imports_no_framework() -> None:
    code = (
        "import sys, owl_deploy.engines.llama_cpp_engine; print({'torch', 'transformers', 'gguf'} & set(sys.modules))"
    )
    assert run_in(sys.executable, code, variables=VARIABLES).stdout.strip() == "set()"


def test_without_llama_cpp_the_engine_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"owl-deploy engines install llama\.cpp"):
        LlamaCppEngine(tmp_path / "model.gguf", threads=1, context=8, prompts=())
