"""`owl-deploy roofline`: bytes that the files bear out, floors that follow from them, and parts that make a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from owl_deploy.bundle.manifest import FlavorRecord, read_bundle
from owl_deploy.bundle.records import StoredRecord
from owl_deploy.cli import main
from owl_deploy.engines.registry import ENGINES
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.machine.description import last_level_cache_bytes, read_bandwidth_gb_s
from owl_deploy.records import read_record
from owl_deploy.report.roofline.tables import notes, terminal_tables
from owl_deploy.roofline import measure
from owl_deploy.roofline.engines import least_bytes
from owl_deploy.roofline.profile import by_operator, decoded
from owl_deploy.roofline.records import FlavorFigures, Roofline
from owl_deploy.roofline.traffic import KINDS, OTHER, kind_of, read_traffic
from owl_deploy.sparse import library

from .conftest import RunCli, TinyModel, describe_again

CACHE = 2**20
PAST, NEW, ROUNDS = 12, 6, 2
PRUNING = ("--sparsity", "0.7", "--method", "magnitude", "--allocation", "uniform")
BLOCKS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCABULARY = 3, 2, 16, 32, 48, 96


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    folder = tmp_path_factory.mktemp("roofline")
    checkpoint = tiny_model("llama", head_dim=HEAD_DIM)
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(checkpoint), "-o", str(folder / "sparse"), "--quiet", *PRUNING])
    assert not ended.value.code
    export_checkpoint(folder / "sparse", folder / "bundle", ("genai", "sparse-packed32", "sparse-int8", "sparse-int4"))
    return folder / "bundle"


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a small cache, so that little has to be read."""
    monkeypatch.setattr(measure, "MEMORY_SET_BYTES", CACHE)
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: CACHE)
    monkeypatch.setattr("owl_deploy.machine.description._READ_BYTES", 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written") / "out"


@pytest.fixture
def roofline(written: Path, bundle: Path, run_cli: RunCli) -> Roofline:
    """What the command measures by default; done once."""
    if not written.exists():
        asked = ("--past", PAST, "--new-tokens", NEW, "--rounds", ROUNDS, "--threads", 1, "--matrices")
        ran = run_cli("roofline", bundle, "-o", written, "--json", *asked)
        assert ran.code == 0, ran.stderr
        assert json.loads(ran.stdout) == json.loads((written / "roofline.json").read_text())
    return read_record(written / "roofline.json", Roofline, mend="")


@pytest.fixture(params=["genai", "sparse-packed32", "sparse-int8", "sparse-int4"])
def flavor(request: pytest.FixtureRequest, roofline: Roofline) -> FlavorFigures:
    return next(one for one in roofline.flavors if one.flavor == request.param)


# ---- What is read ----


def test_sparse_flavors_and_genai_are_measured_by_default(roofline: Roofline) -> None:
    assert {one.flavor: one.engine for one in roofline.flavors} == {
        "genai": "onnxruntime",
        "sparse-packed32": "sparse-packed32",
        "sparse-int8": "sparse-int8",
        "sparse-int4": "sparse-int4",
    }


def test_packed_bytes_are_those_of_the_manifest(roofline: Roofline, bundle: Path) -> None:
    manifest = read_bundle(bundle)
    for one in roofline.flavors:
        packed = manifest.flavors[one.flavor].packed  # type: ignore[index]  # a flavor's name
        if packed is not None:
            recorded = {
                record.name: (record.rows, record.columns, record.format, record.bytes) for record in packed.matrices
            }
            assert {m.name: (m.rows, m.columns, m.format, m.bytes) for m in one.each_matrix} == recorded


def test_dense_bytes_are_those_of_the_shapes(roofline: Roofline) -> None:
    genai = next(one for one in roofline.flavors if one.flavor == "genai")
    heads = HIDDEN // 8
    per_block = {
        "attention qkv": HIDDEN * (heads + 2 * KV_HEADS) * HEAD_DIM,
        "attention output": heads * HEAD_DIM * HIDDEN,
        "mlp gate+up": 2 * HIDDEN * MLP,
        "mlp down": MLP * HIDDEN,
    }
    expected = {kind: 4 * BLOCKS * weights for kind, weights in per_block.items()} | {"head": 4 * HIDDEN * VOCABULARY}
    assert {kind.kind: kind.bytes for kind in genai.kinds} == expected
    assert next(kind for kind in genai.kinds if kind.kind == "mlp gate+up").matrices == 2 * BLOCKS


def test_the_cache_holds_keys_and_values_of_the_past(flavor: FlavorFigures) -> None:
    assert flavor.attention.bytes == 2 * BLOCKS * KV_HEADS * HEAD_DIM * PAST * 4


def test_the_rest_is_norms_and_one_row_of_each_table(bundle: Path) -> None:
    manifest = read_bundle(bundle)
    norms, embedding, rotary = (2 * BLOCKS + 1) * HIDDEN, HIDDEN, 2 * HEAD_DIM // 2
    traffic = read_traffic(bundle, "genai", manifest.flavors["genai"], PAST)
    assert traffic.rest_bytes == 4 * (norms + embedding + rotary)


def test_all_bytes_are_counted_once(flavor: FlavorFigures) -> None:
    assert flavor.matrices.bytes == sum(kind.bytes for kind in flavor.kinds) == sum(m.bytes for m in flavor.each_matrix)
    assert flavor.matrices.matrices == sum(kind.matrices for kind in flavor.kinds) == len(flavor.each_matrix)
    assert flavor.token.bytes == flavor.matrices.bytes + flavor.attention.bytes + flavor.rest.bytes


def test_a_head_that_shares_the_embedding_is_read_as_it_lies(tmp_path: Path, tiny_model: TinyModel) -> None:
    checkpoint = tiny_model("llama", head_dim=HEAD_DIM, tie_word_embeddings=True)
    manifest = export_checkpoint(checkpoint, tmp_path / "tied", ("genai", "sparse-packed32"))
    for name, record in manifest.flavors.items():
        head = read_traffic(tmp_path / "tied", name, record, PAST).matrices[-1]
        assert (head.kind, head.rows, head.columns, head.bytes) == ("head", VOCABULARY, HIDDEN, 4 * HIDDEN * VOCABULARY)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.attn.qkv_proj.MatMul.weight.packed32", "attention qkv"),
        ("model.layers.10.attn.k_proj.MatMul.weight", "attention qkv"),
        ("model.layers.0.attn.o_proj.MatMul.weight", "attention output"),
        ("model.layers.3.mlp.up_proj.MatMul.weight", "mlp gate+up"),
        ("model.layers.3.mlp.gate_up_proj.MatMul.weight", "mlp gate+up"),
        ("model.layers.3.mlp.down_proj.MatMul.weight.int8", "mlp down"),
        ("lm_head.MatMul.weight.dense8", "head"),
        ("model.layers.3.moe.router.weight", OTHER),
    ],
)
def test_matrices_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


# ---- What it could take, and what it took ----


def test_floors_are_bytes_over_bandwidth(flavor: FlavorFigures) -> None:
    assert flavor.bandwidth_gb_s > 0
    for one in (*flavor.kinds, *flavor.each_matrix, flavor.attention, flavor.rest, flavor.token):
        assert one.floor_ms == pytest.approx(one.bytes / flavor.bandwidth_gb_s / 1e6)
    parts = [flavor.matrices.floor_ms, flavor.attention.floor_ms, flavor.rest.floor_ms]
    assert flavor.token.floor_ms == pytest.approx(sum(parts))


def test_a_larger_set_or_fewer_threads_are_never_faster(roofline: Roofline) -> None:
    for one in roofline.flavors:
        assert one.token.floor_ms <= one.memory_floor_ms
        allowed = [record.gb_s for record in roofline.bandwidth if record.threads == 1]
        assert one.bandwidth_gb_s in allowed


def test_every_matrix_and_token_has_a_time(flavor: FlavorFigures) -> None:
    assert [len(samples) for samples in flavor.decode_ms] == [NEW - 1] * ROUNDS
    assert all(sample > 0 for samples in flavor.decode_ms for sample in samples)
    assert flavor.token.measured_ms is not None
    assert flavor.token.measured_ms > 0
    assert all(one.measured_ms is not None and one.measured_ms >= 0 for one in flavor.each_matrix)


def test_the_parts_make_a_whole(flavor: FlavorFigures) -> None:
    kinds = [kind.measured_ms or 0.0 for kind in flavor.kinds]
    assert sum(kinds) == pytest.approx(flavor.matrices.measured_ms)
    assert sum(m.measured_ms or 0.0 for m in flavor.each_matrix) == pytest.approx(flavor.matrices.measured_ms)
    outside = [flavor.attention.measured_ms, flavor.rest.measured_ms, flavor.between_ms]
    assert flavor.outside_ms == pytest.approx(sum(part or 0.0 for part in outside))
    assert sum(flavor.operators_ms.values()) == pytest.approx(
        (flavor.attention.measured_ms or 0.0) + (flavor.rest.measured_ms or 0.0)
    )
    assert not {"MatMul", "SparseMatMul"} & set(flavor.operators_ms)
    assert "GroupQueryAttention" in flavor.operators_ms


def event(category: str, name: str, start_us: int, took_us: int) -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": start_us, "dur": took_us, "args": {"op_name": name.split("_")[0]}}


def test_a_profile_is_read_from_the_runs_of_its_tokens_and_without_its_own_cost() -> None:
    events = [event("Session", "model_run", 0, 900), event("Node", "MatMul_1_kernel_time", 10, 800)]  # the prompt's
    for start, took in (1000, 60), (2000, 80), (3000, 70):
        events += [
            event("Node", "Shape_1_kernel_time", start + 1, 10),
            event("Node", "MatMul_1_kernel_time", start + 20, took),
            event("Session", "model_run", start, took + 15),
        ]
    profile = decoded(events, [0.1, 0.12, 0.11])
    assert profile.operators == {"Shape_1": "Shape", "MatMul_1": "MatMul"}
    assert profile.cost_ms == pytest.approx(0.01)
    assert profile.node_ms == pytest.approx({"Shape_1": 0, "MatMul_1": 0.06})
    assert profile.between_ms == pytest.approx(0.03)
    assert by_operator(profile, ["MatMul_1"]) == pytest.approx({"Shape": 0})
    assert profile.of(["MatMul_1", "Shape_1"]) == pytest.approx(0.06)
    assert profile.of(["MatMul_1", "MatMul_2"]) is None  # merged with another operator


def test_the_bandwidth_of_this_machine_is_measured() -> None:
    assert read_bandwidth_gb_s(1, 1) > 0
    cache = last_level_cache_bytes()
    assert cache is None or cache > 0


# ---- What is told ----


def test_the_report_names_every_kind_and_the_plot_is_there(roofline: Roofline, written: Path) -> None:
    text = (written / "roofline.md").read_text()
    assert all(kind in text for kind in KINDS if kind != OTHER)
    for part in ("all matrices", "between operators", "all outside the matrices", "whole token", "GB/s"):
        assert part in text
    assert all(matrix.name in text for one in roofline.flavors for matrix in one.each_matrix)
    assert (written / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_the_cache_can_hold_is_told_so(roofline: Roofline) -> None:
    assert all(one.fits_cache for one in roofline.flavors)
    count = len(roofline.flavors)
    for index, one in enumerate(roofline.flavors):
        one.memory_floor_ms = one.token.floor_ms * (2 if index == 1 else 1)
    said = " ".join(notes(roofline))
    assert said.count("last-level cache of 1.0 MB can hold") == count
    assert said.count("are not a floor") == 1
    assert said.count("no faster than memory") == count - 1
    for one in roofline.flavors:
        one.fits_cache = False
    assert "last-level cache" not in " ".join(notes(roofline))


def test_parts_that_miss_the_whole_are_told(roofline: Roofline) -> None:
    one = roofline.flavors[0]
    one.token.measured_ms = 2 * (one.parts_ms or 0.0)
    assert f"{one.flavor}: its parts, timed one by one" in " ".join(notes(roofline))


def test_times_that_are_not_known_leave_a_gap_and_no_crash(roofline: Roofline, tmp_path: Path) -> None:
    from owl_deploy.report.roofline.write import write_roofline

    one = roofline.flavors[0]
    one.matrices.measured_ms = one.between_ms = one.outside_ms = None
    write_roofline(roofline, tmp_path / "out", matrices=False)
    text = (tmp_path / "out" / "roofline.md").read_text()
    assert "ONNX Runtime merged" in text
    assert "–" in text
    assert terminal_tables(roofline, matrices=False)


def test_tables_go_to_the_terminal(bundle: Path, run_cli: RunCli) -> None:
    asked = ("--flavor", "sparse-int8", "--past", 3, "--new-tokens", 2, "--rounds", 1, "--threads", 1, "--matrices")
    ran = run_cli("roofline", bundle, *asked)
    assert ran.code == 0
    for part in ("read bandwidth", "sparse-int8, 1 thread:", "all outside the matrices", "lm_head.MatMul.weight"):
        assert part in ran.stdout
    assert "genai" not in ran.stdout


# ---- Every engine ----


def describe_stored(bundle: Path, stored: dict[str, int] | None) -> None:
    described = json.loads((bundle / "bundle.json").read_text())
    for record in described["flavors"].values():
        record["stored"] = stored
    (bundle / "bundle.json").write_text(json.dumps(described))


def test_every_flavor_has_a_line_as_an_engine(roofline: Roofline) -> None:
    assert [one.engine for one in roofline.engines] == [one.engine for one in roofline.flavors]
    for engine, flavor in zip(roofline.engines, roofline.flavors, strict=True):
        assert (engine.bytes, engine.measured_ms, engine.share) == (
            flavor.token.bytes,
            flavor.token.measured_ms,
            flavor.token.share,
        )


def test_an_engine_without_operators_is_measured_by_the_bytes_of_its_file(
    bundle: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    export_checkpoint(bundle.parent / "sparse", copied, ("genai-int8",))
    asked = ("--flavor", "genai,genai-int8", "--past", PAST, "--new-tokens", NEW, "--rounds", 1, "--threads", 1)
    ran = run_cli("roofline", copied, "-o", tmp_path / "out", *asked)
    assert ran.code == 0, ran.stderr
    found = read_record(tmp_path / "out" / "roofline.json", Roofline, mend="")
    assert [one.flavor for one in found.flavors] == ["genai"]
    dense, rounded = found.engines
    stored = read_bundle(copied).flavors["genai-int8"].stored
    assert stored is not None
    assert (rounded.engine, rounded.kv_cache) == ("onnxruntime-int8", "fp32")
    assert rounded.bytes == stored.linear_bytes + stored.head_bytes + stored.cache_values * PAST * 4
    assert rounded.linear_bits == pytest.approx(9, rel=0.4)  # rows of 48 weights are padded to blocks of 32
    assert dense.linear_bits == 32
    assert rounded.share == pytest.approx(rounded.floor_ms / rounded.measured_ms)  # type: ignore[operator]
    text = (tmp_path / "out" / "roofline.md").read_text()
    assert "| onnxruntime-int8 | fp32 |" in text
    assert "Of engines without a table of their own" in text


def test_torch_is_counted_in_fp32_and_caches_as_engines_keep_them() -> None:
    stored = StoredRecord(
        parameters=40, linear_weights=30, linear_bytes=60, head_weights=10, head_bytes=20, cache_values=8
    )
    record = FlavorRecord(source="", note="", parity=None, audit=None, files=[], stored=stored)
    assert least_bytes(record, ENGINES["torch"], 5, {}) == 4 * 40 + 8 * 5 * 4
    assert least_bytes(record, ENGINES["llama.cpp-q4_0"], 5, {"kv_cache": "f16"}) == 80 + 8 * 5 * 2
    assert least_bytes(record, ENGINES["openvino-int8"], 5, {"kv_cache_precision": "u8"}) == 80 + 8 * 5
    assert least_bytes(record, ENGINES["openvino-int8"], 5) == 80


# ---- What can be wrong ----


@pytest.fixture
def refused(run_cli: RunCli, bundle: Path) -> Iterator[Any]:
    """The one line that a run ends with which could not begin."""

    def run(*arguments: object, bundle: Path = bundle) -> str:
        ran = run_cli("roofline", bundle, "--past", PAST, "--new-tokens", NEW, "--quiet", *arguments)
        assert ran.code == 2
        assert ran.stdout == ""
        assert ran.stderr.count("\n") == 1
        return ran.stderr

    return run


def test_a_flavor_is_one_that_can_be_measured(refused: Any) -> None:
    assert "--flavor gguf: choose from standard, genai, sparse-packed32" in refused("--flavor", "gguf")
    assert "lacks sparse-packed16; add it with: owl-deploy export" in refused("--flavor", "genai,sparse-packed16")


def test_a_bundle_without_such_a_flavor_says_what_to_add(refused: Any, tmp_path: Path, tiny_llama: Path) -> None:
    export_checkpoint(tiny_llama, tmp_path / "bundle", ("standard",))
    describe_stored(tmp_path / "bundle", None)
    assert "holds standard and lacks a sparse or a genai flavor" in refused(bundle=tmp_path / "bundle")
    older = "an older owl-deploy made it, without the sizes of its matrices; export the model again"
    assert older in refused("--flavor", "standard", bundle=tmp_path / "bundle")


def test_what_is_no_bundle_is_named(refused: Any, tmp_path: Path) -> None:
    assert "not an export bundle" in refused(bundle=tmp_path)


def test_a_damaged_bundle_is_refused(refused: Any, bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    config = copied / "genai" / "genai_config.json"
    size = config.stat().st_size
    config.write_text("{}".ljust(size))
    assert "its contents are not those that bundle.json describes" in refused("--flavor", "genai", bundle=copied)
    describe_again(copied, config)
    assert "genai_config.json: does not describe a decoder" in refused("--flavor", "genai", bundle=copied)
    config.unlink()
    assert "not the file that bundle.json describes" in refused(bundle=copied)


def test_more_than_the_model_or_the_machine_has_is_refused(refused: Any) -> None:
    assert "exceed the model's context of 64" in refused("--past", 60)
    assert "--threads 4096: this process may use" in refused("--threads", 4096)


def test_without_the_library_it_says_how_to_get_it(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_PATH", Path("/nowhere/libowl_sparse.so"))
    assert "C++20 compiler" in refused("--flavor", "sparse-int8")


def test_an_engine_that_fails_is_named(bundle: Path, tmp_path: Path, run_cli: RunCli) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    graph = copied / "genai" / "model.onnx"
    model = onnx.load(str(graph), load_external_data=False)
    operator = model.graph.node[0].op_type
    model.graph.node[0].op_type = "X" * len(operator)
    graph.write_bytes(model.SerializeToString())
    describe_again(copied, graph)
    ran = run_cli("roofline", copied, "--flavor", "genai", "--past", PAST, "--quiet")
    assert ran.code == 1
    assert "genai: engine onnxruntime:" in ran.stderr
