"""Bundles: every weight in its place, the logits torch computes, or nothing at all."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from owl_deploy import files
from owl_deploy.bundle.expected import EXPECTED as EXPECTED_FILE
from owl_deploy.bundle.expected import read_expected
from owl_deploy.bundle.manifest import read_bundle
from owl_deploy.bundle.names import FLAVORS, sparse_flavor
from owl_deploy.errors import CheckFailed
from owl_deploy.exporting import run as export_run
from owl_deploy.exporting.flavors import EXPORTERS, Dense, Packed
from owl_deploy.exporting.graphs.standard import write_standard_flavor
from owl_deploy.exporting.verify.audit import audit_graph
from owl_deploy.exporting.verify.parity import compare
from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import find_blocks
from owl_deploy.pruning.manifest import read_manifest
from owl_deploy.sparse import library
from owl_deploy.sparse.formats import WEIGHTS

from .conftest import RunCli, TinyModel


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, reference: Path) -> Path:
    """The tiny LLaMA with half its weights pruned."""
    from owl_deploy.pruning.plan import PruningPlan
    from owl_deploy.pruning.run import Calibration, prune_checkpoint

    out = tmp_path_factory.mktemp("sparse") / "checkpoint"
    calibration = Calibration(str(reference / "tiny_calib.npy"))
    prune_checkpoint(ModelSource("tiny", tiny_llama), out, PruningPlan(0.5), calibration)
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, sparse: Path) -> Path:
    """Both dense flavors of it, and a packed one."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    export_run.export_checkpoint(sparse, out, ("standard", "genai", "sparse-packed32"))
    return out


def linears_of(checkpoint: Path) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    model = load_model(ModelSource("tiny", checkpoint), torch.float32)
    return {
        f"{block.name}.{name}": linear.weight.numpy()
        for block in find_blocks(model)
        for name, linear in block.linears.items()
    }


def test_all_flavors_hold_every_zero_and_compute_what_torch_computes(bundle: Path, sparse: Path) -> None:
    manifest, pruned = read_bundle(bundle), read_manifest(sparse)
    assert pruned is not None
    assert set(manifest.flavors) == {"standard", "genai", "sparse-packed32"}
    assert manifest.sparsity_achieved == pytest.approx(pruned.sparsity_achieved, abs=1e-12)
    for record in manifest.flavors.values():
        assert set(record.audit.linears) == set(linears_of(sparse))
        assert record.parity.max_abs_difference < 1e-4
        assert record.parity.max_abs_difference_with_past < 1e-4
        assert record.parity.positions_with_past == 16
        for file in record.files:
            assert (bundle / file.path).stat().st_size == file.bytes


def test_some_of_torchs_logits_stay_beside_each_graph_for_other_machines_to_check(bundle: Path) -> None:
    for flavor, record in read_bundle(bundle).flavors.items():
        kept = read_expected(bundle / flavor)
        assert kept is not None
        assert kept.positions.tolist() == [47, 48, 56, 63]  # of 64: after the prefill, and among 16 decoded tokens
        assert kept.logits.shape == (4, 256)
        assert f"{flavor}/{EXPECTED_FILE}" in [file.path for file in record.files]
        modes = {path.stat().st_mode for path in (bundle / flavor / EXPECTED_FILE, bundle / flavor / "model.onnx")}
        assert len(modes) == 1  # who may read the graph may check it


def test_the_audit_finds_q_k_and_v_inside_their_merged_matrix(bundle: Path) -> None:
    places = read_bundle(bundle).flavors["genai"].audit.linears
    merged = {places[f"model.layers.0.self_attn.{name}_proj"].split("[")[0] for name in "qkv"}
    assert len(merged) == 1
    assert places["model.layers.0.self_attn.q_proj"].endswith("[0]")
    assert places["model.layers.0.self_attn.k_proj"].endswith("[64]")


def test_the_audit_names_a_weight_that_was_densified(bundle: Path, sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "genai", tmp_path / "genai")
    linears = linears_of(sparse)
    name = "model.layers.3.mlp.down_proj"
    linears[name] = np.where(linears[name] == 0, np.float32(1e-6), linears[name])
    with pytest.raises(CheckFailed, match=r"model\.layers\.3\.mlp\.down_proj$"):
        audit_graph(tmp_path / "genai" / "model.onnx", linears)


def test_an_existing_bundle_of_the_same_checkpoint_is_not_made_again(
    bundle: Path, sparse: Path, run_cli: RunCli
) -> None:
    before = (bundle / "bundle.json").stat().st_mtime_ns
    ran = run_cli("export", sparse, "-o", bundle)
    assert ran.code == 0
    assert "already made" in ran.stderr
    assert (bundle / "bundle.json").stat().st_mtime_ns == before


def test_a_bundle_of_another_checkpoint_is_not_overwritten(bundle: Path, tiny_llama: Path, run_cli: RunCli) -> None:
    ran = run_cli("export", tiny_llama, "-o", bundle)
    assert ran.code == 2
    assert "other inputs" in ran.stderr


def test_a_graph_of_other_weights_fails_and_leaves_nothing(
    sparse: Path, tiny_llama: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        EXPORTERS, "standard", Dense(lambda _, out, words: write_standard_flavor(tiny_llama, out, words))
    )
    ran = run_cli("export", sparse, "-o", tmp_path / "bundle", "--flavor", "standard")
    assert ran.code == 1
    assert "weights changed or lost" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_fails_and_leaves_nothing(
    sparse: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are right; the norm's epsilon is not."""
    other = tmp_path / "other"
    shutil.copytree(sparse, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    monkeypatch.setitem(EXPORTERS, "standard", Dense(lambda _, out, words: write_standard_flavor(other, out, words)))
    ran = run_cli("export", sparse, "-o", tmp_path / "bundle", "--flavor", "standard")
    assert ran.code == 1
    assert "logits differ" in ran.stderr
    assert list(tmp_path.iterdir()) == [other]


def test_a_family_without_a_genai_graph_gets_the_standard_one(
    tiny_model: TinyModel, tmp_path: Path, run_cli: RunCli
) -> None:
    ran = run_cli("export", tiny_model("opt"), "-o", tmp_path / "bundle", "--json")
    assert ran.code == 0
    assert "does not know this family" in json.loads(ran.stdout)["unsupported"]["genai"]
    assert set(read_bundle(tmp_path / "bundle").flavors) == {"standard"}


def test_a_graph_that_onnx_runtime_cannot_run_is_left_out(
    tiny_model: TinyModel, tmp_path: Path, run_cli: RunCli
) -> None:
    """Its GroupQueryAttention wants heads of a multiple of 16 elements."""
    ran = run_cli("export", tiny_model("llama", head_dim=8), "-o", tmp_path / "bundle", "--json")
    assert ran.code == 0
    assert "head_size" in json.loads(ran.stdout)["unsupported"]["genai"]


def test_asking_for_the_genai_graph_of_such_a_family_is_an_error(
    tiny_model: TinyModel, tmp_path: Path, run_cli: RunCli
) -> None:
    ran = run_cli("export", tiny_model("opt"), "-o", tmp_path / "bundle", "--flavor", "genai", "--quiet")
    assert ran.code == 2
    assert "use --flavor standard" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_rotary_settings_of_transformers_5_reach_every_graph(
    tiny_model: TinyModel, tmp_path: Path, run_cli: RunCli
) -> None:
    """Parity would fail if torch or an exporter fell back to theta 10000."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_model("llama", head_dim=16, rope_theta=500.0), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    theta = config.pop("rope_theta")
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    ran = run_cli("export", checkpoint, "-o", tmp_path / "bundle", "--json")
    assert ran.code == 0
    assert json.loads((tmp_path / "bundle" / "standard" / "config.json").read_text())["rope_theta"] == theta


def test_a_gguf_file_is_told_how_to_become_a_checkpoint(tmp_path: Path, run_cli: RunCli) -> None:
    ran = run_cli("export", tmp_path / "model.gguf", "-o", tmp_path / "bundle")
    assert ran.code == 2
    assert "prune --sparsity 0" in ran.stderr


def test_what_could_not_be_made_is_named_and_tried_again_when_asked_for_again(
    sparse: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library of the kernels was not built yet."""
    bundle = tmp_path / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(library, "_PATH", tmp_path / "nothing.so")
        first, again = (run_cli("export", sparse, "-o", bundle) for _ in range(2))
    for ran in (first, again):
        assert ran.code == 0  # the other two flavors are there
        assert "already made" not in ran.stderr
        (line,) = [line for line in ran.stdout.splitlines() if "missing" in line]
        assert line.startswith(f"{bundle / 'sparse-packed32'}: missing; ")
        assert "C++20 compiler" in line
    before = (bundle / "genai" / "model.onnx").stat().st_mtime_ns
    ran = run_cli("export", sparse, "-o", bundle)
    assert ran.code == 0
    assert "missing" not in ran.stdout
    manifest = read_bundle(bundle)
    assert set(manifest.flavors) == {"standard", "genai", "sparse-packed32"}
    assert manifest.unsupported == {}
    assert (bundle / "genai" / "model.onnx").stat().st_mtime_ns == before


def test_a_bundle_that_would_have_nothing_of_what_was_asked_for_is_an_error_each_time(
    tiny_model: TinyModel, tmp_path: Path, run_cli: RunCli
) -> None:
    bundle, opt = tmp_path / "bundle", tiny_model("opt")
    asked = ("--flavor", "sparse", "--weights", "packed16,int8", "--quiet")
    for _ in range(2):
        ran = run_cli("export", opt, "-o", bundle, *asked)
        assert ran.code == 2
        assert "does not know this family" in ran.stderr
        assert len(ran.stderr.splitlines()) == 1
        assert not list(tmp_path.iterdir())
    assert run_cli("export", opt, "-o", bundle, "--flavor", "standard").code == 0
    before = (bundle / "bundle.json").read_bytes()
    for _ in range(2):
        assert run_cli("export", opt, "-o", bundle, *asked).code == 2
        assert (bundle / "bundle.json").read_bytes() == before


def test_flavors_that_another_process_adds_meanwhile_stay(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between this one's first look at the bundle and its lock."""
    out = tmp_path / "bundle"
    export_run.export_checkpoint(sparse, out, ("standard",))

    def staged_addition(target: Path) -> AbstractContextManager[Path]:
        monkeypatch.undo()
        export_run.export_checkpoint(sparse, target, ("genai", "torch"))
        return files.staged_addition(target)

    monkeypatch.setattr(export_run, "staged_addition", staged_addition)
    export_run.export_checkpoint(sparse, out, ("genai", "gguf-f16"))
    manifest = read_bundle(out)
    assert set(manifest.flavors) == {"standard", "genai", "torch", "gguf-f16"}
    for record in manifest.flavors.values():
        for file in record.files:
            assert files.sha256(out / file.path) == file.sha256


def test_every_flavor_has_an_exporter_and_every_exporter_a_flavor() -> None:
    assert set(EXPORTERS) == set(FLAVORS)
    packed = {flavor: exporter.weights for flavor, exporter in EXPORTERS.items() if isinstance(exporter, Packed)}
    assert packed == {sparse_flavor(weights): weights for weights in WEIGHTS}


def test_an_unknown_flavor_is_refused(sparse: Path, tmp_path: Path, run_cli: RunCli) -> None:
    assert run_cli("export", sparse, "-o", tmp_path / "bundle", "--flavor", "fast").code == 2


EXPECTED = np.array([[0.0, 1.0, 3.0], [2.0, 1.995, 0.0]], np.float32)


def test_logits_within_the_tolerance_agree_even_where_a_near_tie_flips() -> None:
    actual = EXPECTED + np.array([[0, 0, 0], [-0.004, 0.004, 0]], np.float32)
    record = compare(EXPECTED, actual[:1], actual[1:], what="graph", reference="torch")
    assert record.argmax_agreement < 1
    assert record.max_abs_difference_with_past == pytest.approx(0.004, rel=1e-3)


@pytest.mark.parametrize("change", [0.02, np.nan, np.inf])
def test_a_logit_that_is_off_is_refused(change: float) -> None:
    actual = EXPECTED.copy()
    actual[0, 0] += np.float32(change)
    with pytest.raises(CheckFailed, match="logits differ"):
        compare(EXPECTED, actual[:1], actual[1:], what="graph", reference="torch")
