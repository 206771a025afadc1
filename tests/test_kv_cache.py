"""Keys and values in 8 bits: scales for each channel, the engine's logits and cache, what it costs, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from owl_deploy.bundle.manifest import BundleManifest, read_bundle
from owl_deploy.bundle.names import Flavor
from owl_deploy.bundle.verify import check_cache_scales
from owl_deploy.engines import onnxruntime_engine
from owl_deploy.engines.onnxruntime_engine import OnnxRuntimeEngine
from owl_deploy.engines.probe import engine_logits, timed_generation
from owl_deploy.engines.sparse_engine import SparseEngine
from owl_deploy.errors import CheckFailed, UserError
from owl_deploy.exporting.graphs.cache import exact_cache, round_cache, scales_of
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.exporting.verify.parity import CACHE_TOLERANCE, compare
from owl_deploy.pruning.run import Calibration
from owl_deploy.roofline.traffic import read_traffic
from owl_deploy.serving.runner import SlotRunner

from .conftest import VOCABULARY, RunCli, TinyModel, describe_again

FLAVORS: list[Flavor] = ["genai", "sparse-int8"]
LENGTH = 60
ENGINES = {"genai": OnnxRuntimeEngine, "sparse-int8": SparseEngine}


def graph_of(bundle: Path, flavor: str = "genai") -> Path:
    return bundle / flavor / "model.onnx"


def random_ids(*shape: int) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, VOCABULARY, shape, dtype=np.int64)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: TinyModel) -> Path:
    return tiny_model("llama", head_dim=16, initializer_range=0.15)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY, (8, LENGTH)))
    return Calibration(str(path))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("exact") / "bundle"
    export_checkpoint(checkpoint, out, FLAVORS)
    return out


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, text: Calibration) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "bundle"
    export_checkpoint(checkpoint, out, FLAVORS, kv_cache="int8", calibration=text)
    return out


def logits_of(bundle: Path, flavor: str, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    engine = ENGINES[flavor](graph_of(bundle, flavor), threads=1, context=len(ids))
    return np.concatenate(engine_logits(engine, ids))


def error_of(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_logits_are_those_of_an_exact_cache_but_for_rounding(rounded: Path, exact: Path, flavor: str) -> None:
    ids = random_ids(LENGTH)
    error = error_of(logits_of(rounded, flavor, ids), logits_of(exact, flavor, ids))
    assert 0 < error < 0.02


def test_the_cache_holds_the_exact_ones_values_to_half_a_step(rounded: Path, exact: Path) -> None:
    ids = random_ids(1, LENGTH)
    caches = []
    for bundle in (rounded, exact):
        engine = OnnxRuntimeEngine(graph_of(bundle), threads=1, context=LENGTH)
        engine.score(ids)
        caches.append(engine.cached())
    scales = {tensor.name: tensor for tensor in onnx.load(graph_of(rounded)).graph.initializer}
    name = "past_key_values.0.key"  # of the first block, whose inputs are exact
    scale = onnx.numpy_helper.to_array(scales[f"{name}.scale"])
    integers, values = caches[0][name], caches[1][name]
    assert integers.dtype == np.int8
    assert values.shape == integers.shape == (1, 2, LENGTH, 16)
    within = np.abs(values) <= 127 * scale
    assert within.mean() > 0.99
    assert (np.abs(integers * scale - values) <= 0.501 * scale)[within].all()


def test_each_channel_has_a_scale_by_its_largest_magnitude(rounded: Path) -> None:
    model = onnx.load(graph_of(rounded))
    scales = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".scale")]
    assert len(scales) == 2 * 3
    for tensor in scales:
        values = onnx.numpy_helper.to_array(tensor)
        assert values.shape == (1, 2, 1, 16)
        assert len(np.unique(values)) == values.size
        assert (values > 0).all()


def test_a_channel_of_nothing_but_zeros_divides_by_no_zero() -> None:
    scales = scales_of(np.zeros((2, 4), np.float32))
    assert (scales > 0).all()
    assert (np.zeros(4, np.float32) / scales == 0).all()


def test_undone_the_graph_is_what_it_was(rounded: Path, exact: Path) -> None:
    model = onnx.load(graph_of(rounded), load_external_data=False)
    exact_cache(model)
    assert model.SerializeToString() == graph_of(exact).read_bytes()


def test_a_sparse_flavor_is_the_same_from_a_dense_graph_with_a_rounded_cache(
    rounded: Path, exact: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(rounded, tmp_path / "bundle"))
    export_checkpoint(checkpoint, out, ["sparse-packed32"])
    export_checkpoint(checkpoint, exact, ["sparse-packed32"])
    for name in ("model.onnx", "model.onnx.data"):
        assert (out / "sparse-packed32" / name).read_bytes() == (exact / "sparse-packed32" / name).read_bytes()


def test_a_prompt_in_pieces_is_a_prompt(rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(LENGTH)
    whole = logits_of(rounded, "genai", ids)
    monkeypatch.setattr(onnxruntime_engine, "_PIECE", 7)
    assert np.abs(logits_of(rounded, "genai", ids) - whole).max() < 1e-4


def test_sequences_side_by_side_are_as_they_are_alone(rounded: Path) -> None:
    prompts = random_ids(3, 20)
    together = OnnxRuntimeEngine(graph_of(rounded), threads=1, context=32, batch=3)
    alone = OnnxRuntimeEngine(graph_of(rounded), threads=1, context=32)
    found = timed_generation(together, prompts, 8).tokens
    assert found == [timed_generation(alone, prompt[None], 8).tokens[0] for prompt in prompts]


def test_the_manifest_says_what_it_was_calibrated_on_and_what_it_costs(rounded: Path, exact: Path) -> None:
    for flavor in FLAVORS:
        record = read_bundle(rounded).flavors[flavor]
        cache, parity = record.kv_cache, record.parity
        assert cache is not None
        assert parity is not None
        assert (cache.text.windows, cache.text.seqlen) == (8, LENGTH)
        assert cache.perplexity == pytest.approx(cache.perplexity_exact, rel=0.02)
        assert cache.perplexity != cache.perplexity_exact
        assert 0 < parity.relative_difference < CACHE_TOLERANCE  # type: ignore[operator]
        assert read_bundle(exact).flavors[flavor].kv_cache is None


def test_a_token_reads_a_quarter_of_the_cache(rounded: Path, exact: Path) -> None:
    reads = [read_traffic(bundle, "genai", read_bundle(bundle).flavors["genai"], 40) for bundle in (exact, rounded)]
    assert reads[0].cache_bytes == 4 * reads[1].cache_bytes
    assert [read.cache_format for read in reads] == ["fp32", "int8"]


def test_rounding_explains_so_much_and_no_more(rounded: Path, exact: Path) -> None:
    expected = logits_of(exact, "genai", random_ids(LENGTH))
    found = logits_of(rounded, "genai", random_ids(LENGTH))
    with pytest.raises(CheckFailed, match=r"more than 0\.01"):
        compare(expected, found[:-16], found[-16:], what="it", reference="exact")
    compare(expected, found[:-16], found[-16:], what="it", reference="exact", rounded_cache=True)
    with pytest.raises(CheckFailed, match=r"its keys and values to 8 bits explains 0\.1"):
        compare(expected[::-1], found[:-16], found[-16:], what="it", reference="exact", rounded_cache=True)


def test_bench_measures_both_caches_and_tells_them_apart(
    rounded: Path, exact: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    ran = run_cli(
        *("bench", exact, rounded, "--engines", "onnxruntime,sparse-int8", "--prompt", 16, "--new-tokens", 4),
        *("--repetitions", 1, "--threads", 1, "--max-load", 99, "-o", tmp_path, "--json", "--quiet"),
    )
    assert ran.code == 0, ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["engine"], row["kv_cache"], row["status"]) for row in rows] == [
        ("onnxruntime", "exact", "ok"),
        ("onnxruntime", "int8", "ok"),
        ("sparse-int8", "exact", "ok"),
        ("sparse-int8", "int8", "ok"),
    ]
    assert [row["engine_facts"]["kv_cache"] for row in rows] == ["fp32", "int8"] * 2
    report = (tmp_path / "report.md").read_text()
    assert "sparse-int8 (int8 KV cache)" in report
    assert "sparse-int8 (exact KV cache)" in report


# -------------------- bad input


def test_another_cache_than_the_one_that_is_there_is_an_error(
    rounded: Path, exact: Path, checkpoint: Path, text: Calibration
) -> None:
    with pytest.raises(UserError, match="has a KV cache of int8; choose another"):
        export_checkpoint(checkpoint, rounded, ["genai"], kv_cache="fp32")
    with pytest.raises(UserError, match="has a KV cache of fp32; choose another"):
        export_checkpoint(checkpoint, exact, ["genai"], kv_cache="int8", calibration=text)
    with pytest.raises(UserError, match=r"was calibrated on 8 windows of 60 tokens of .*ids\.npy; choose another"):
        export_checkpoint(checkpoint, rounded, ["genai"], kv_cache="int8", calibration=Calibration("other.npy"))
    assert export_checkpoint(checkpoint, rounded, ["genai"], kv_cache="int8", calibration=text) == read_bundle(rounded)


def test_the_command_names_what_cannot_be(checkpoint: Path, tmp_path: Path, run_cli: RunCli) -> None:
    np.save(tmp_path / "one.npy", random_ids(1, 30))
    export = ("export", checkpoint, "-o", tmp_path / "bundle", "--flavor", "genai", "--quiet", "--kv-cache")
    assert "--kv-cache int4: choose one of fp32, int8" in run_cli(*export, "int4").stderr
    ran = run_cli(*export, "int8", "--calibration", tmp_path / "one.npy")
    assert (ran.code, ran.stderr.count("\n")) == (2, 1)
    assert "one window is too few" in ran.stderr
    assert not (tmp_path / "bundle").exists()


def damaged(bundle: Path, change: Any) -> Path:
    graph = graph_of(bundle)
    model = onnx.load(graph, load_external_data=False)
    change(model.graph)
    graph.write_bytes(model.SerializeToString())
    describe_again(bundle, graph)
    return bundle


def without_scale(graph: onnx.GraphProto) -> None:
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name.endswith("1.value.scale")))


def without_inputs(graph: onnx.GraphProto) -> None:
    del next(node for node in graph.node if node.op_type == "GroupQueryAttention").input[12:]


def of_another_shape(graph: onnx.GraphProto) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith("0.key.scale"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones((1, 2, 1, 8), np.float32), tensor.name))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without_scale, "the 8-bit cache past_key_values.1.value has no scales; export the model again"),
        (without_inputs, "the 8-bit cache past_key_values.0.key has no scales; export the model again"),
        (of_another_shape, "past_key_values.0.key has scales of shape [1, 2, 1, 8], not [1, 2, 1, 16]; export"),
    ],
)
def test_scales_that_are_missing_or_of_a_wrong_shape_are_one_line(
    rounded: Path, change: Any, complaint: str, tmp_path: Path, run_cli: RunCli
) -> None:
    bundle = damaged(Path(shutil.copytree(rounded, tmp_path / "bundle")), change)
    ran = run_cli("bench", bundle, "--engines", "onnxruntime", "--max-load", 99, "-o", tmp_path / "out", "--quiet")
    assert (ran.code, ran.stderr.count("\n")) == (2, 1)
    assert complaint in ran.stderr


def test_an_exact_graph_needs_no_scales(exact: Path) -> None:
    check_cache_scales(graph_of(exact), onnx.load(graph_of(exact), load_external_data=False))


def test_a_graph_that_attends_in_another_way_is_left_out(exact: Path, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    model = onnx.load(graph_of(exact), load_external_data=False)
    for node in model.graph.node:
        node.op_type = node.op_type.replace("GroupQueryAttention", "MultiHeadAttention")
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="has caches that ONNX Runtime cannot round"):
        round_cache(graph, {"past_key_values.0.key": np.ones((2, 16), np.float32)})


def test_an_older_manifest_has_exact_caches(exact: Path) -> None:
    described = json.loads((exact / "bundle.json").read_text())
    for record in described["flavors"].values():
        del record["kv_cache"]
    assert all(record.kv_cache is None for record in BundleManifest.model_validate(described).flavors.values())


@pytest.mark.parametrize("flavor", FLAVORS)
def test_slots_of_a_server_keep_8_bits_too(rounded: Path, exact: Path, flavor: str) -> None:
    prompts = [random_ids(length).tolist() for length in (3, 25, 1)]
    runners = [
        SlotRunner(bundle / flavor / "model.onnx", packed=flavor == "sparse-int8", slots=3, context=64, threads=1)
        for bundle in (rounded, exact)
    ]
    runner = runners[0]
    assert 4 * runner.token_bytes == runners[1].token_bytes
    runner.allocate()
    first = [runner.prefill(slot, 0, prompt, want_logits=True) for slot, prompt in enumerate(prompts)]
    found = runner.decode(0, [7, 7, 7], [len(prompt) for prompt in prompts])
    engine_class = SparseEngine if flavor == "sparse-int8" else OnnxRuntimeEngine
    engine = engine_class(rounded / flavor / "model.onnx", threads=1, context=64)
    for prompt, before, after in zip(prompts, first, found, strict=True):
        np.testing.assert_allclose(engine.prefill(np.array([prompt]))[0], before, atol=1e-4)
        np.testing.assert_allclose(engine.decode(np.array([7]))[0], after, atol=1e-4)
