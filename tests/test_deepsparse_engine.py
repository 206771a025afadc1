"""The DeepSparse engine, in the interpreter that has DeepSparse: its logits are those of ONNX Runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from owl_deploy.engines.deepsparse_engine import DeepSparseEngine
from owl_deploy.engines.static_graphs import StaticGraphs
from owl_deploy.errors import UserError
from owl_deploy.exporting.graphs.standard import write_standard

from .conftest import run_in

VOCABULARY = 96
CONTEXT = 200
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
}
# More than half the context, whole blocks and a rest; one that is compiled late; a single token.
PROMPTS = (197, 128, 70, 1)
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from owl_deploy.engines.deepsparse_engine import DeepSparseEngine

folder, context, prompts = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
ids = np.load(folder / "ids.npy")
engine = DeepSparseEngine(folder / "model.onnx", threads=1, context=context, prompts=tuple(prompts[:2]))
for prompt in prompts:
    scored, prefilled = engine.score(ids[None, :prompt])[0], engine.prefill(ids[None, :prompt])
    decoded = [engine.decode(token[None]) for token in ids[prompt:context]]
    np.save(folder / f"logits_{prompt}.npy", np.concatenate([scored[:-1], prefilled, *decoded]))
try:
    engine.decode(np.zeros(1, np.int64))
except ValueError as error:
    print(error, file=sys.stderr)
(folder / "facts.json").write_text(json.dumps(engine.describe()))
"""


def export(config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoint")
    write_standard(folder / "checkpoint", folder)
    return folder / "model.onnx"


def onnxruntime_logits(path: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    length = len(ids)
    feed |= {"input_ids": ids[None], "attention_mask": np.ones((1, length), np.int64)}
    outputs = session.run(["logits"], feed | {"position_ids": np.arange(length)[None]})
    logits: NDArray[np.float32] = outputs[0][0]
    return logits


@pytest.mark.deepsparse
@pytest.mark.parametrize(
    ("config", "internal_cache"),
    [
        pytest.param(LlamaConfig(**SIZES, num_key_value_heads=2), True, id="built"),
        pytest.param(GPTNeoXConfig(**SIZES), False, id="traced"),
    ],
)
def test_prefill_and_decode_agree_with_onnxruntime(
    config: PretrainedConfig, internal_cache: bool, tmp_path: Path, deepsparse_python: Path
) -> None:
    path = export(config, tmp_path)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, CONTEXT)
    np.save(tmp_path / "ids.npy", ids)
    finished = run_in(
        *(deepsparse_python, SCRIPT, tmp_path, CONTEXT, json.dumps(PROMPTS)),
        variables={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert "1 tokens after 200 do not fit a context of 200" in finished.stderr
    expected = onnxruntime_logits(path, ids)
    for prompt in PROMPTS:
        assert np.abs(np.load(tmp_path / f"logits_{prompt}.npy") - expected).max() < 1e-4, prompt
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["version"] == "1.8.0"
    assert facts["prefill_logits"] == "last"
    assert facts["internal_kv_cache"] is internal_cache
    assert set(facts["fraction_of_supported_ops"]) >= {"1", "64", "128"}
    assert all(share > 0.9 for share in facts["fraction_of_supported_ops"].values())
    assert not list(tmp_path.glob("owl-deploy-deepsparse-*")), "temporary files stay behind"


def test_numpy_2_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrong logits with numpy 2"):
        DeepSparseEngine(tmp_path / "model.onnx", threads=1, context=64, prompts=())


def test_importing_the_engine_imports_no_framework() -> None:
    code = "import sys, owl_deploy.engines.deepsparse_engine; print({'torch', 'transformers'} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


def test_a_static_graph_has_no_free_dimension_and_shares_the_data(tmp_path: Path) -> None:
    path = export(LlamaConfig(**SIZES, num_key_value_heads=2), tmp_path)
    folder = tmp_path / "static"
    folder.mkdir()
    variant = StaticGraphs(path, total=128).write(folder, 3)
    model = onnx.load(variant, load_external_data=False)
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes["input_ids"] == shapes["position_ids"] == [1, 3]
    assert shapes["attention_bias"] == [1, 1, 2 * 3, 128]
    assert shapes["past_key_values.1.value"] == [1, 2, 125, 16]
    assert shapes["present.1.value"] == [1, 2, 128, 16]
    assert shapes["logits"] == [1, 3, VOCABULARY]
    assert "attention_mask" not in shapes
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert (folder / "model.onnx.data").resolve() == tmp_path / "model.onnx.data"


def test_a_body_and_a_head_compute_what_the_whole_graph_does(tmp_path: Path) -> None:
    graphs = StaticGraphs(export(LlamaConfig(**SIZES, num_key_value_heads=2), tmp_path), total=8)
    assert graphs.has_parts
    sessions = {}
    for part, new in (("whole", 3), ("body", 3), ("head", 3), ("head", 1)):
        folder = tmp_path / f"{part}_{new}"
        folder.mkdir()
        variant = graphs.write(folder, new, part)
        data = folder / "model.onnx.data"
        data.unlink()  # ONNX Runtime follows no link
        shutil.copy(tmp_path / data.name, data)
        sessions[part, new] = onnxruntime.InferenceSession(variant, providers=["CPUExecutionProvider"])
    bias = np.where(np.arange(8) <= np.arange(5, 8)[:, None], 0, np.finfo(np.float32).min).astype(np.float32)
    feed: dict[str, Any] = dict.fromkeys(graphs.past, np.zeros(graphs.cache_shape(5), np.float32))
    feed |= {"input_ids": [[7, 8, 9]], "position_ids": [[0, 1, 2]], "attention_bias": np.tile(bias, (1, 1, 2, 1))}
    whole, *cache = sessions["whole", 3].run(None, feed)
    hidden, *same_cache = sessions["body", 3].run(None, feed)
    assert hidden.shape == (1, 3, SIZES["hidden_size"])
    for expected, actual in zip(cache, same_cache, strict=True):
        np.testing.assert_array_equal(actual, expected)
    (name,) = (value.name for value in sessions["head", 3].get_inputs())
    np.testing.assert_allclose(sessions["head", 3].run(None, {name: hidden})[0], whole, atol=1e-5)
    np.testing.assert_allclose(sessions["head", 1].run(None, {name: hidden[:, -1:]})[0], whole[:, -1:], atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LlamaConfig(**SIZES, num_key_value_heads=2), id="llama"),
        pytest.param(LlamaConfig(**SIZES, num_key_value_heads=4), id="one-query-to-a-head"),
        pytest.param(Qwen2Config(**SIZES, num_key_value_heads=2), id="biases"),
        pytest.param(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32), id="normalised-heads"),
        pytest.param(SmolLM3Config(**SIZES, num_key_value_heads=2, no_rope_layers=[1, 0]), id="a-block-without-rotary"),
    ],
)
def test_a_static_graph_computes_the_same(config: PretrainedConfig, tmp_path: Path) -> None:
    config.pad_token_id = None
    path = export(config, tmp_path)
    total = 64
    graphs = StaticGraphs(path, total)
    folder = tmp_path / "static"
    folder.mkdir()
    variant = graphs.write(folder, 1)
    data = folder / "model.onnx.data"
    data.unlink()  # ONNX Runtime follows no link
    shutil.copy(tmp_path / data.name, data)
    session = onnxruntime.InferenceSession(variant, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 12)
    states = dict.fromkeys(graphs.past, np.zeros(graphs.cache_shape(total), np.float32))
    found = []
    for position, token in enumerate(ids):
        bias = np.where(np.arange(total) >= total - position - 1, 0, np.finfo(np.float32).min).astype(np.float32)
        feed = {"input_ids": [[token]], "position_ids": [[position]]} | {
            name: state[:, :, 1:] for name, state in states.items()
        }
        feed["attention_bias"] = np.tile(bias, (1, 1, graphs.query_groups or 0, 1))
        outputs = dict(zip(graphs.outputs, session.run(graphs.outputs, feed), strict=True))
        states = dict(zip(graphs.past, (outputs[name] for name in graphs.present), strict=True))
        found.append(outputs["logits"][0, 0])
    assert np.abs(np.array(found) - onnxruntime_logits(path, ids)).max() < 1e-4
