"""Of a prompt, engines compute the logits of the last position; of text that is scored, those of every position."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from owl_deploy.bundle.names import LOGITS_FROM, Flavor
from owl_deploy.engines.onnxruntime_engine import OnnxRuntimeEngine
from owl_deploy.engines.probe import engine_logits, timed_generation, window_loss
from owl_deploy.engines.protocol import Logits, TokenIds
from owl_deploy.engines.registry import ENGINES
from owl_deploy.engines.torch_engine import TorchEngine
from owl_deploy.exporting.graphs import decoder, genai, optimum
from owl_deploy.exporting.graphs.positions import select_positions
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.machine import cpu
from owl_deploy.sparse import library

from .conftest import VOCABULARY, TinyModel

FLAVORS: list[Flavor] = ["standard", "genai", "genai-int8", "genai-int4", "sparse-packed32", "sparse-int8"]
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
CONTEXT = 16
SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": VOCABULARY + 32}

flavors = pytest.mark.parametrize("flavor", FLAVORS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    out = tmp_path_factory.mktemp("logits") / "bundle"
    export_checkpoint(tiny_model("llama", **SIZES), out, FLAVORS)
    return out


def engine_on(bundle: Path, flavor: Flavor, **options: Any) -> OnnxRuntimeEngine:
    spec = next(spec for spec in ENGINES.values() if flavor in spec.flavors)
    kind: type[OnnxRuntimeEngine] = getattr(importlib.import_module(spec.module), spec.class_name)
    return kind(bundle / flavor / "model.onnx", threads=1, context=CONTEXT, batch=len(IDS), **options)


def head_rows(profile: Path) -> set[int]:
    """Positions of the tensors [batch, positions, vocab] that nodes computed, as ONNX Runtime notes them."""
    shapes = [
        typed["float"]
        for event in json.loads(profile.read_bytes())
        for typed in event.get("args", {}).get("output_type_shape", ())
        if "float" in typed
    ]
    return {shape[1] for shape in shapes if len(shape) == 3 and shape[2] == VOCABULARY}


@flavors
def test_a_prefill_computes_the_logits_of_the_last_position_and_nothing_more(
    bundle: Path, flavor: Flavor, tmp_path: Path
) -> None:
    engine = engine_on(bundle, flavor, profile=tmp_path / "profile")
    engine.prefill(IDS)
    prefilled = head_rows(engine.end_profile())
    engine = engine_on(bundle, flavor, profile=tmp_path / "profile")
    engine.score(IDS)
    assert prefilled == {1}
    assert head_rows(engine.end_profile()) == {IDS.shape[1]}
    assert engine.describe()["prefill_logits"] == "last"


@flavors
def test_a_prefill_is_the_last_row_of_a_score_and_leaves_the_same_cache(bundle: Path, flavor: Flavor) -> None:
    engine = engine_on(bundle, flavor)
    tokens = IDS[:, 0]
    scored = engine.score(IDS)
    decoded = [engine.decode(tokens) for _ in range(3)]
    prefilled = engine.prefill(IDS)
    assert scored.shape == (*IDS.shape, VOCABULARY)
    assert prefilled.shape == (len(IDS), VOCABULARY)
    np.testing.assert_allclose(prefilled, scored[:, -1], atol=1e-5)
    for expected in decoded:
        np.testing.assert_allclose(engine.decode(tokens), expected, atol=1e-5)


@flavors
def test_who_knows_nothing_of_it_gets_every_position(bundle: Path, flavor: Flavor) -> None:
    options = engine_on(bundle, flavor)._options(1)
    session = onnxruntime.InferenceSession(bundle / flavor / "model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    assert LOGITS_FROM not in inputs, "a caller would have to give it"
    feed: dict[str, Any] = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    feed["position_ids"] = np.tile(np.arange(IDS.shape[1]), (len(IDS), 1))
    feed = {name: values for name, values in feed.items() if name in inputs}
    for name, value in inputs.items():
        if name.startswith("past_key_values"):
            feed[name] = np.zeros((len(IDS), value.shape[1], 0, value.shape[3]), np.float32)
    (logits,) = session.run(["logits"], feed)
    np.testing.assert_allclose(logits, engine_on(bundle, flavor).score(IDS), atol=1e-5)


def test_bundles_from_before_run_on_and_say_that_they_compute_every_position(
    bundle: Path, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (decoder, genai, optimum):
        monkeypatch.setattr(module, "select_positions", lambda _: None)
    old: list[Flavor] = ["standard", "genai", "sparse-packed32"]
    export_checkpoint(tiny_model("llama", **SIZES), tmp_path / "old", old)
    for flavor in old:
        engine = engine_on(tmp_path / "old", flavor)
        assert engine.describe()["prefill_logits"] == "all"
        np.testing.assert_allclose(engine.prefill(IDS), engine_on(bundle, flavor).prefill(IDS), atol=1e-5)
        np.testing.assert_allclose(engine.score(IDS), engine_on(bundle, flavor).score(IDS), atol=1e-5)


# -------------------- the graph


def tail(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A model that ends in these nodes, from `hidden` [B, L, 4] to `logits`, with a matrix `weight` and a `bias`."""
    tensors = {"weight": np.ones((4, 8), np.float32), "bias": np.ones(8, np.float32)}
    graph = helper.make_graph(
        nodes,
        "tail",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "length", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 8])],
        [onnx.numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


def positions(model: onnx.ModelProto) -> list[int]:
    """Positions of logits for 5 tokens: by default, and where the last is asked for."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    hidden = np.ones((2, 5, 4), np.float32)
    feeds: list[dict[str, Any]] = [{"hidden": hidden}, {"hidden": hidden, LOGITS_FROM: np.array([-1])}]
    return [session.run(None, feed)[0].shape[1] for feed in feeds]


def test_biases_and_caps_may_follow_the_head() -> None:
    model = tail(
        helper.make_node("MatMul", ["hidden", "weight"], ["product"]),
        helper.make_node("Add", ["bias", "product"], ["biased"]),
        helper.make_node("Tanh", ["biased"], ["capped"]),
        helper.make_node("Mul", ["capped", "bias"], ["logits"]),
    )
    select_positions(model)
    onnx.checker.check_model(model, full_check=True)
    assert positions(model) == [5, 1]


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param([helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"])], id="no-sequence-axis"),
        pytest.param([helper.make_node("Add", ["hidden", "hidden"], ["logits"])], id="no-product"),
    ],
)
def test_a_graph_whose_head_is_another_stays_as_it_is(nodes: list[onnx.NodeProto]) -> None:
    model = tail(*nodes)
    before = model.SerializeToString()
    select_positions(model)
    assert model.SerializeToString() == before


# -------------------- torch, and what is asked of engines


@pytest.mark.parametrize(("family", "computed"), [("llama", "last"), ("opt", "all")])
def test_torch_computes_the_last_position_where_the_model_can(
    tiny_model: TinyModel, family: str, computed: str
) -> None:
    engine = TorchEngine(tiny_model(family) / "config.json", threads=1, context=CONTEXT)
    shapes: list[tuple[int, ...]] = []
    engine._model.get_output_embeddings().register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    scored, prefilled = engine.score(IDS), engine.prefill(IDS)
    assert engine.describe()["prefill_logits"] == computed
    assert shapes == [(2, 9, VOCABULARY), (2, 1 if computed == "last" else 9, VOCABULARY)]
    np.testing.assert_allclose(prefilled, scored[:, -1], atol=1e-5)


class Asked:
    """An engine that notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {}

    def prefill(self, ids: TokenIds) -> Logits:
        self.calls.append("prefill")
        return np.zeros((len(ids), VOCABULARY), np.float32)

    def score(self, ids: TokenIds) -> Logits:
        self.calls.append("score")
        return np.zeros((*ids.shape, VOCABULARY), np.float32)

    def decode(self, tokens: TokenIds) -> Logits:
        self.calls.append("decode")
        return np.zeros((len(tokens), VOCABULARY), np.float32)


def test_what_is_timed_is_a_prefill_and_what_is_compared_includes_it() -> None:
    timed, scored, compared = Asked(), Asked(), Asked()
    timed_generation(timed, IDS, 3)
    window_loss(scored, IDS[0])
    at_once, decoded = engine_logits(compared, np.arange(24))
    assert timed.calls == ["prefill", "decode", "decode"]
    assert scored.calls == ["score"]
    assert compared.calls == ["score", "prefill", *["decode"] * 16]
    assert (len(at_once), len(decoded)) == (8, 16)


# -------------------- what engines run


def test_no_engine_claims_instructions_that_its_products_cannot_use(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = frozenset({"avx2", "avx512f", "avx512_vnni", "amx_tile"})
    monkeypatch.setattr(cpu, "cpu_flags", lambda: every)
    assert [cpu.instruction_set(widest) for widest in ("amx", "avx512_vnni", "avx512")] == [
        "amx",
        "avx512_vnni",
        "avx512",
    ]
    assert engine_on(bundle, "genai").describe()["instruction_set"] == "avx512"
    assert engine_on(bundle, "genai-int8").describe()["instruction_set"] == "avx512_vnni"
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx2"}))
    assert engine_on(bundle, "genai-int8").describe()["instruction_set"] == "avx2"


def test_our_engine_says_which_kernels_it_runs(bundle: Path) -> None:
    assert engine_on(bundle, "sparse-packed32").describe()["instruction_set"] == library.instruction_sets()[0]
