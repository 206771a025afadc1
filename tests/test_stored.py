"""Bits a weight, read from each flavor's own file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from owl_deploy.bundle.manifest import BundleManifest, FlavorRecord, read_bundle
from owl_deploy.bundle.names import Flavor
from owl_deploy.exporting.run import export_checkpoint

from .conftest import VOCABULARY, RunCli, TinyModel

HIDDEN, INNER, BLOCKS = 64, 128, 2
LINEARS = BLOCKS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 32 + 3 * HIDDEN * INNER)
HEAD = VOCABULARY * HIDDEN
FLAVORS: list[Flavor] = [
    *("standard", "genai", "genai-int8", "genai-int4", "sparse-int8", "torch"),
    *("gguf-f16", "gguf-q8_0", "gguf-q4_0"),
]
# Values, and a scale: of fp32 for 32 weights in ONNX Runtime's blocks, of fp16 in llama.cpp's.
BITS = {
    **dict.fromkeys(("standard", "genai"), 32.0),
    "torch": 16.0,
    "genai-int8": 9.0,
    "genai-int4": 5.0,
    "gguf-f16": 16.0,
    "gguf-q8_0": 8.5,
    "gguf-q4_0": 4.5,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    sizes = {"hidden_size": HIDDEN, "head_dim": 16, "intermediate_size": INNER, "num_hidden_layers": BLOCKS}
    checkpoint = tiny_model("llama", **sizes, dtype=torch.bfloat16, tie_word_embeddings=True)
    out = tmp_path_factory.mktemp("stored") / "bundle"
    export_checkpoint(checkpoint, out, FLAVORS)
    return out


def record_of(bundle: Path, flavor: Flavor) -> FlavorRecord:
    return read_bundle(bundle).flavors[flavor]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_every_weight_of_the_linears_is_counted_once(bundle: Path, flavor: Flavor) -> None:
    stored = record_of(bundle, flavor).stored
    assert stored is not None
    assert stored.linear_weights == LINEARS
    assert stored.head_weights == HEAD
    assert stored.parameters == LINEARS + HEAD + HIDDEN * (2 * BLOCKS + 1)
    assert stored.cache_values == 2 * BLOCKS * 2 * 16


@pytest.mark.parametrize("flavor", BITS)
def test_bits_are_those_of_values_and_scales(bundle: Path, flavor: Flavor) -> None:
    stored = record_of(bundle, flavor).stored
    assert stored is not None
    assert stored.linear_bits == pytest.approx(BITS[flavor])


def test_packed_bits_are_those_of_the_packed_matrices(bundle: Path) -> None:
    record = record_of(bundle, "sparse-int8")
    assert record.stored is not None
    assert record.packed is not None
    *linears, head = record.packed.matrices
    assert record.stored.linear_bytes == sum(matrix.bytes for matrix in linears)
    assert record.stored.head_bytes == head.bytes


@pytest.mark.parametrize("flavor", FLAVORS)
def test_bits_in_all_are_those_of_the_whole_file(bundle: Path, flavor: Flavor) -> None:
    record = record_of(bundle, flavor)
    assert record.stored is not None
    assert record.all_bits == pytest.approx(8 * record.bytes / record.stored.parameters)


def test_an_older_bundle_has_no_bits(bundle: Path) -> None:
    described = json.loads((bundle / "bundle.json").read_text())
    for record in described["flavors"].values():
        del record["stored"]
    assert all(record.all_bits is None for record in BundleManifest.model_validate(described).flavors.values())


def test_each_row_of_a_bench_says_its_bits(bundle: Path, run_cli: RunCli, tmp_path: Path) -> None:
    ran = run_cli(
        *("bench", bundle, "--engines", "onnxruntime,onnxruntime-int8", "--prompt", 16, "--new-tokens", 4),
        *("--repetitions", 1, "--threads", 1, "--max-load", 99, "-o", tmp_path, "--json", "--quiet"),
    )
    assert ran.code == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["linear_bits"] for row in rows] == [32, 9]
    assert all(row["all_bits"] > row["linear_bits"] / 4 for row in rows)
    report = (tmp_path / "report.md").read_text()
    assert "bits a weight in linears (in all)" in report
    assert "| 9.00 (" in report
