"""The sparse flavors: every zero in place, every matrix no worse than dense, and the logits of what is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from owl_deploy.bundle.manifest import FlavorRecord, read_bundle
from owl_deploy.bundle.names import Flavor, sparse_flavor
from owl_deploy.bundle.tensors import external_array
from owl_deploy.engines.onnxruntime_engine import OnnxRuntimeEngine
from owl_deploy.engines.probe import engine_logits
from owl_deploy.engines.sparse_engine import SparseEngine
from owl_deploy.errors import CheckFailed
from owl_deploy.exporting.graphs import dense as dense_graphs
from owl_deploy.exporting.graphs.selection import choose
from owl_deploy.exporting.graphs.sparse import write_sparse
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.exporting.verify.packed import check_stored
from owl_deploy.models.source import ModelSource
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.run import Calibration, prune_checkpoint
from owl_deploy.sparse import library
from owl_deploy.sparse.formats import WEIGHTS

from .conftest import RunCli, TinyModel

ALL: list[Flavor] = ["genai", *(sparse_flavor(weights) for weights in WEIGHTS)]


def pruned(model: Path, out: Path, sparsity: float, reference: Path) -> Path:
    plan, calibration = PruningPlan(sparsity), Calibration(str(reference / "tiny_calib.npy"))
    prune_checkpoint(ModelSource("tiny", model), out, plan, calibration)
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, reference: Path) -> Path:
    """The tiny LLaMA, 70% sparse."""
    return pruned(tiny_llama, tmp_path_factory.mktemp("pruned") / "checkpoint", 0.7, reference)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """Its dense graph, and its weights packed in each format."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    export_checkpoint(checkpoint, out, ALL)
    return out


def record_of(bundle: Path, flavor: str) -> FlavorRecord:
    return read_bundle(bundle).flavors[flavor]  # type: ignore[index]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_packed_graph_computes_what_torch_computes_from_the_stored_weights(bundle: Path, weights: str) -> None:
    record = record_of(bundle, f"sparse-{weights}")
    most = 5e-3 if weights == "int4" else 1e-4  # its inputs have 16 bits
    assert record.parity.max_abs_difference < most
    assert record.parity.max_abs_difference_with_past < most
    assert record.parity.reference == "torch"


def test_each_format_is_smaller_and_less_exact_than_the_one_before(bundle: Path) -> None:
    sizes = [record_of(bundle, flavor).bytes for flavor in ALL]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[1]
    errors = [packed.error for flavor in ALL[1:] if (packed := record_of(bundle, flavor).packed)]
    assert 0 < errors[0] < 1e-6 < errors[1] < 2e-3 < errors[2] < 2e-2 < errors[3] < 0.2


def test_gate_and_up_are_one_product_and_q_k_and_v_are_too(bundle: Path) -> None:
    graph = onnx.load(bundle / "sparse-packed32" / "model.onnx", load_external_data=False).graph
    counts = {kind: sum(node.op_type == kind for node in graph.node) for kind in ("SparseMatMul", "MatMul", "Sigmoid")}
    blocks = 6
    assert counts == {"SparseMatMul": 4 * blocks, "MatMul": 1, "Sigmoid": 0}  # the head stays dense
    packed = record_of(bundle, "sparse-packed32").packed
    assert packed is not None
    assert sorted(len(matrix.parts) for matrix in packed.matrices) == [1] * (3 * blocks + 1) + [2] * blocks


def test_the_weights_in_the_file_are_aligned_and_sound_and_as_long_as_recorded(bundle: Path) -> None:
    for flavor in ALL[1:]:
        graph = bundle / flavor / "model.onnx"
        packed = record_of(bundle, flavor).packed
        assert packed is not None
        tensors = {tensor.name: tensor for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
        for matrix in packed.matrices:
            if matrix.format == "fp32":
                continue
            tensor = tensors[matrix.name]
            assert {entry.key: int(entry.value) for entry in tensor.external_data if entry.key == "offset"}[
                "offset"
            ] % 64 == 0
            stored = external_array(graph, tensor)
            assert stored.nbytes == matrix.bytes
            library.check(np.asarray(stored))


def test_int8_and_int4_have_an_8_bit_head_and_others_are_made_on_demand(
    bundle: Path, checkpoint: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    heads = {flavor: record.packed.head for flavor, record in read_bundle(bundle).flavors.items() if record.packed}
    fp32 = {"sparse-packed32": "fp32", "sparse-packed16": "fp32"}
    assert heads == fp32 | {"sparse-int8": "int8", "sparse-int4": "int8"}
    for weights, head, stored in (("packed16", "int8", "dense8"), ("int4", "int4", "dense4")):
        asked = ("--flavor", "sparse", "--weights", weights, "--head", head, "--json")
        ran = run_cli("export", checkpoint, "-o", tmp_path / weights, *asked)
        assert ran.code == 0
        packed = json.loads(ran.stdout)["flavors"][f"sparse-{weights}"]["packed"]
        assert packed["head"] == head
        assert packed["matrices"][-1]["format"] == stored


def test_another_head_than_the_one_that_is_there_is_an_error(bundle: Path, checkpoint: Path, run_cli: RunCli) -> None:
    ran = run_cli("export", checkpoint, "-o", bundle, "--flavor", "sparse", "--head", "int8")
    assert ran.code == 2
    assert "has a head of fp32" in ran.stderr


def test_a_bundle_gets_the_flavors_it_lacks_and_keeps_the_others(
    checkpoint: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    out = tmp_path / "bundle"
    assert run_cli("export", checkpoint, "-o", out, "--flavor", "genai").code == 0
    before = (out / "genai" / "model.onnx").stat().st_mtime_ns
    assert run_cli("export", checkpoint, "-o", out, "--flavor", "sparse", "--weights", "int8,packed16").code == 0
    manifest = read_bundle(out)
    assert set(manifest.flavors) == {"genai", "sparse-packed16", "sparse-int8"}
    for record in manifest.flavors.values():
        for file in record.files:
            assert (out / file.path).stat().st_size == file.bytes
    assert (out / "genai" / "model.onnx").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir() if path.name != ".bundle.lock"] == ["bundle"]


def test_a_dense_model_stays_dense_in_every_format(tiny_llama: Path, tmp_path: Path) -> None:
    export_checkpoint(tiny_llama, tmp_path / "bundle", ALL)
    stored = {"packed32": "fp32", "packed16": "fp32", "int8": "dense8", "int4": "dense4"}
    for weights in WEIGHTS:
        packed = record_of(tmp_path / "bundle", f"sparse-{weights}").packed
        assert packed is not None
        assert {matrix.format for matrix in packed.matrices[:-1]} == {stored[weights]}  # the last is the head


def test_no_matrix_is_bigger_than_dense_at_any_density() -> None:
    rng = np.random.default_rng(0)
    for density in np.linspace(0.02, 1, 13):
        weights = rng.standard_normal((256, 512), np.float32) * (rng.random((256, 512)) < density)
        for wanted in WEIGHTS:
            stored = choose(wanted, density)
            if stored != "fp32":
                dense = weights.size * {"int8": 1, "int4": 0.5}.get(wanted, 4)
                assert library.pack(weights, stored).nbytes < 1.1 * dense  # headers, of so small a matrix


def test_another_level_lends_its_dense_graph_and_every_byte_is_the_same(
    bundle: Path, tiny_llama: Path, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flavors = ["sparse-packed32", "sparse-int8"]  # at 20% packed32 keeps its matrices as they are
    level = pruned(tiny_llama, tmp_path / "level", 0.2, reference)
    alone = export_checkpoint(level, tmp_path / "alone", flavors)
    monkeypatch.setattr("owl_deploy.exporting.graphs.dense.write_genai", None)
    lent = export_checkpoint(level, tmp_path / "lent", flavors, like=bundle)
    assert lent == alone


def test_a_model_that_differs_in_more_than_its_linears_is_lent_nothing(
    bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_another(tensor: str) -> Path:
        other = tmp_path / tensor
        shutil.copytree(checkpoint, other)
        tensors = load_file(other / "model.safetensors")
        tensors[tensor] = tensors[tensor] * 1.5
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        return other

    made = []
    write = dense_graphs.write_genai
    monkeypatch.setattr(dense_graphs, "write_genai", lambda *a, **k: (made.append("graph"), write(*a, **k)))
    norm, linear = "model.layers.2.input_layernorm.weight", "model.layers.2.mlp.up_proj.weight"
    export_checkpoint(with_another(linear), tmp_path / "linear", ["sparse-packed32"], like=bundle)
    assert made == []
    export_checkpoint(with_another(norm), tmp_path / "norm", ["sparse-packed32"], like=bundle)
    assert made == ["graph"]
    export_checkpoint(checkpoint, tmp_path / "no-such-bundle", ["sparse-packed32"], like=tmp_path / "nothing")
    assert made == ["graph", "graph"]


def test_a_matrix_that_holds_more_than_its_linears_stays_as_it_is(bundle: Path, tmp_path: Path) -> None:
    dense, out = bundle / "genai" / "model.onnx", tmp_path / "model.onnx"
    name = "model.layers.0.mlp.down_proj.MatMul.weight"
    whole = next(
        tensor for tensor in onnx.load(dense, load_external_data=False).graph.initializer if tensor.name == name
    )
    part = np.ascontiguousarray(external_array(dense, whole).T[:-1])
    assert write_sparse(dense, out, weights="packed32", head="fp32", linears={name: {"part": part}}) == []
    kept = next(tensor for tensor in onnx.load(out, load_external_data=False).graph.initializer if tensor.name == name)
    assert np.array_equal(external_array(out, kept), external_array(dense, whole))


def test_tied_weights_are_stored_once_and_still_shared(tiny_model: TinyModel, reference: Path, tmp_path: Path) -> None:
    """A lookup reads rows of the head's own matrix; nothing is transposed when the model is loaded."""
    model = tiny_model("llama", head_dim=16, tie_word_embeddings=True, vocab_size=512)
    checkpoint = pruned(model, tmp_path / "checkpoint", 0.6, reference)
    export_checkpoint(checkpoint, tmp_path / "bundle", ["genai", "sparse-packed32", "sparse-int8"])
    graphs = {
        flavor: onnx.load(tmp_path / "bundle" / flavor / "model.onnx", load_external_data=False).graph
        for flavor in ("genai", "sparse-packed32", "sparse-int8")
    }
    kinds = {flavor: [node.op_type for node in graph.node] for flavor, graph in graphs.items()}
    assert "Transpose" in kinds["genai"]
    assert "Transpose" not in kinds["sparse-packed32"] + kinds["sparse-int8"]
    shared = [tensor for tensor in graphs["sparse-packed32"].initializer if list(tensor.dims) == [512, 32]]
    assert len(shared) == 1
    assert kinds["sparse-packed32"].count("FusedMatMul") == 1


def test_the_sparse_engine_decodes_as_the_dense_one(bundle: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 96, 40)
    dense = OnnxRuntimeEngine(bundle / "genai" / "model.onnx", threads=2, context=64)
    sparse = SparseEngine(bundle / "sparse-packed32" / "model.onnx", threads=2, context=64)
    for expected, actual in zip(engine_logits(dense, ids), engine_logits(sparse, ids), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_a_lost_zero_a_lost_weight_and_a_wrong_value_are_found() -> None:
    weight = np.array([[1.0, 0.0, -0.5, 0.001]], np.float32)
    check_stored("sound", "packed32", weight, weight)
    for stored, stored_as, reason in (
        ([[1.0, 0.01, -0.5, 0.001]], "int8", "not zero"),
        ([[1.0, 0.0, -0.5, 0.0]], "packed16", "lost"),
        ([[1.0, 0.0, -0.52, 0.001]], "int8", "off by"),
        ([[1.0, 0.0, -0.05, 0.001]], "int4", "off by"),
        ([[1.0, 0.0, -0.5001, 0.001]], "packed32", "off by"),
        ([[1.0, 0.0, -0.5000001, 0.001]], "fp32", "was changed"),
    ):
        with pytest.raises(CheckFailed, match=reason):
            check_stored("layer", stored_as, np.array(stored, np.float32), weight)  # type: ignore[arg-type]


def test_without_the_library_a_sparse_flavor_says_what_is_missing(
    checkpoint: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_PATH", tmp_path / "nothing.so")
    ran = run_cli("export", checkpoint, "-o", tmp_path / "bundle", "--flavor", "sparse")
    assert ran.code == 2
    assert "C++20 compiler" in ran.stderr
    assert run_cli("export", checkpoint, "-o", tmp_path / "bundle").code == 0
    assert set(read_bundle(tmp_path / "bundle").unsupported) == {"sparse-packed32"}


def test_weights_and_heads_that_there_are_not_are_named(checkpoint: Path, tmp_path: Path, run_cli: RunCli) -> None:
    for option, value in (("--weights", "int3"), ("--head", "int3"), ("--flavor", "coo")):
        ran = run_cli("export", checkpoint, "-o", tmp_path / "bundle", "--flavor", "sparse", option, value)
        assert ran.code == 2
        assert value in ran.stderr
