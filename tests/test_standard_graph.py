"""The standard graph says what the model says, in the form DeepSparse reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from owl_deploy.bundle.names import ATTENTION_BIAS
from owl_deploy.errors import UserError
from owl_deploy.exporting.graphs.standard import StandardGraph, write_standard

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that a mistake shows in the logits
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

BUILT: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "llama tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama with biases": lambda: LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama without groups": lambda: LlamaConfig(**SIZES),
    "llama 3 scaling": lambda: LlamaConfig(**GROUPED, rope_scaling=LLAMA3_SCALING),
    "llama linear scaling": lambda: LlamaConfig(**GROUPED, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "smollm3": lambda: SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]),
}
TRACED: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
}


def make_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, where a missing one would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def export(model: PreTrainedModel, folder: Path) -> tuple[StandardGraph, Path]:
    checkpoint, out = folder / "checkpoint", folder / "standard"
    model.save_pretrained(checkpoint)
    out.mkdir()
    return write_standard(checkpoint, out), out / "model.onnx"


class Runner:
    """Runs a graph of the text-generation-with-past interface, with as many calls as it is given pieces."""

    def __init__(self, path: Path) -> None:
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64], cuts: list[int]) -> NDArray[np.float32]:
        positions = positions_of(mask)
        inputs = self._session.get_inputs()
        past = {
            value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
            for value in inputs
            if value.name.startswith("past_key_values")
        }
        names = {value.name for value in inputs}
        pieces = []
        for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            feed = {
                "input_ids": ids[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, start:end],
                **past,
            }
            logits, *present = self._session.run(None, {name: feed[name] for name in names})
            past = dict(zip(past, present, strict=True))
            pieces.append(logits)
        return np.concatenate(pieces, axis=1)


def positions_of(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    positions: NDArray[np.int64] = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return positions


def torch_logits(model: PreTrainedModel, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            **({} if model.config.model_type == "opt" else {"position_ids": torch.from_numpy(positions_of(mask))}),
        )
    logits: NDArray[np.float32] = output.logits.numpy()
    return logits


def sample(batch: int, length: int, padding: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids, and a mask that hides `padding` tokens on the left of the last sequence."""
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (batch, length))
    mask = np.ones_like(ids)
    mask[-1, :padding] = 0
    return ids, mask


def assert_readable_by_deepsparse(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    assert model.ir_version == 8
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 14)]
    locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert locations == {"model.onnx.data"}
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("name", BUILT)
def test_a_built_graph_agrees_with_torch(name: str, tmp_path: Path) -> None:
    model = make_model(BUILT[name]())
    graph, path = export(model, tmp_path)
    assert graph.source == "built"
    assert_readable_by_deepsparse(path)
    runner = Runner(path)
    for ids, mask in (sample(1, 12), sample(2, 12, padding=3)):
        expected = torch_logits(model, ids, mask)
        for cuts in ([], [7], [5, 6, 7]):
            difference = np.abs(runner.logits(ids, mask, cuts) - expected)
            assert difference[mask == 1].max() < 1e-4, cuts


@pytest.mark.parametrize("name", TRACED)
def test_a_traced_graph_agrees_with_torch(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(TRACED[name]())
    capsys.readouterr()
    graph, path = export(model, tmp_path)
    assert capsys.readouterr().out == ""
    assert graph == StandardGraph("optimum", f"no hand-written graph for model type {name}")
    assert_readable_by_deepsparse(path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert not operators & {"Cos", "Sin"}
    ids, mask = sample(1, 12)
    expected = torch_logits(model, ids, mask)
    for cuts in ([], [7], [5, 6, 7]):
        assert np.abs(Runner(path).logits(ids, mask, cuts) - expected).max() < 1e-4


def test_every_linear_weight_is_a_matmul_initializer_with_its_zeros(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**GROUPED))
    linears = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    with torch.no_grad():
        for weight in linears.values():
            weight.mul_(torch.rand_like(weight) > 0.5)
    _, path = export(model, tmp_path)
    graph = onnx.load(path).graph
    initializers = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    multiplied = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for name, weight in linears.items():
        assert f"{name}.weight_t" in multiplied
        np.testing.assert_array_equal(initializers[f"{name}.weight_t"], weight.detach().numpy().T)


def test_weights_stored_in_bfloat16_and_in_shards_become_fp32(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**GROUPED)).to(torch.bfloat16)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "standard"
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    out.mkdir()
    write_standard(checkpoint, out)
    ids, mask = sample(1, 12)
    expected = torch_logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), ids, mask)
    assert np.abs(Runner(out / "model.onnx").logits(ids, mask, []) - expected).max() < 1e-4


def test_the_mask_is_read_by_the_attention_bias_alone(tmp_path: Path) -> None:
    _, path = export(make_model(LlamaConfig(**GROUPED)), tmp_path)
    graph = onnx.load(path, load_external_data=False).graph
    cut = next(index for index, node in enumerate(graph.node) if ATTENTION_BIAS in node.output)
    readers = [index for index, node in enumerate(graph.node) if "attention_mask" in node.input]
    assert readers
    assert max(readers) < cut


def test_a_sliding_window_is_left_to_optimum(tmp_path: Path) -> None:
    graph, _ = export(make_model(MistralConfig(**GROUPED, sliding_window=8)), tmp_path)
    assert graph == StandardGraph("optimum", "attention slides over 8 of 64 positions")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**GROUPED))
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path / "checkpoint", state_dict=state)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        write_standard(tmp_path / "checkpoint", tmp_path)


def test_an_architecture_nobody_knows_is_a_user_error(tmp_path: Path) -> None:
    from transformers import BioGptConfig

    model = make_model(BioGptConfig(**SIZES))
    with pytest.raises(UserError, match="optimum cannot export model type biogpt"):
        export(model, tmp_path)
