"""`prune --offload` holds one block at a time, and makes what pruning in memory makes, bit for bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from owl_deploy.models.shards import write_shard
from owl_deploy.models.source import ModelSource
from owl_deploy.pruning import driver, offload
from owl_deploy.pruning.calibration.spill import SpilledTensors
from owl_deploy.pruning.calibration.stream import CalibrationStream
from owl_deploy.pruning.offload import OffloadedModel

from .conftest import FAMILIES, VOCABULARY, RunCli, TinyModel
from .test_resume import PLANS, Counter, blocks, files

WANDA_OWL = ["--sparsity", "0.5"]
ADMM = ["--sparsity", "0.5", "--method", "admm"]
IDS: NDArray[np.int64] = np.random.default_rng(0).integers(3, VOCABULARY, (4, 16))


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, IDS)
    return path


def prune(run_cli: RunCli, model: Path, calibration: Path, name: str, *options: object) -> Path:
    out = calibration.parent / name
    ran = run_cli("prune", model, "-o", out, "--calibration", calibration, *options, "--quiet")
    assert ran.code == 0, ran.stderr
    assert ran.stderr == ""
    return out


def same_model(found: Path, expected: Path) -> None:
    """As transformers loads them."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (found, expected)]
    tensors = [model.state_dict() for model in models]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert tensor.dtype == tensors[1][name].dtype, name
        assert torch.equal(tensor, tensors[1][name]), name
    for file in ("config.json", "generation_config.json"):
        assert json.loads((found / file).read_text()) == json.loads((expected / file).read_text())


PRUNED = [(family, WANDA_OWL) for family in FAMILIES]
PRUNED += [(family, ADMM) for family in ("llama", "gemma2", "gpt2", "mixtral", "falcon")]


@pytest.mark.parametrize(
    ("family", "options"),
    PRUNED,
    ids=[f"{family}-{'admm' if options is ADMM else 'wanda'}" for family, options in PRUNED],
)
def test_offloaded_pruning_makes_the_same_model(
    family: str, options: list[str], tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    dense = tiny_model(family, dtype=dtypes[list(FAMILIES).index(family) % 3])
    whole = prune(run_cli, dense, calibration, "whole", *options)
    offloaded = prune(run_cli, dense, calibration, "offloaded", *options, "--offload")
    same_model(offloaded, whole)
    assert blocks(offloaded) == blocks(whole)
    assert sorted(path.name for path in calibration.parent.iterdir()) == ["ids.npy", "offloaded", "whole"]
    assert len(list(offloaded.glob("*.safetensors"))) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_stored_as_often_as_before(
    tied: bool, tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    dense = tiny_model("llama", tie_word_embeddings=tied)
    out = prune(run_cli, dense, calibration, "out", *WANDA_OWL, "--offload")
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(dense / "model.safetensors", framework="pt") as file:
        assert sorted(names) == sorted(file.keys())
    assert ("lm_head.weight" in names) != tied
    same_model(out, prune(run_cli, dense, calibration, "whole", *WANDA_OWL))


def test_parameters_that_transformers_keeps_in_fp32_stay_so(
    tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    shape = FAMILIES["llama"] | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "pad_token_id": 0}
    dense = tiny_model("ernie4_5_moe", dtype=torch.bfloat16, **shape)
    offloaded = prune(run_cli, dense, calibration, "offloaded", *WANDA_OWL, "--offload")
    same_model(offloaded, prune(run_cli, dense, calibration, "whole", *WANDA_OWL))


def test_a_sharded_checkpoint_is_read_from_all_its_files(
    tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    sharded = tiny_model("llama", shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    offloaded = prune(run_cli, sharded, calibration, "offloaded", *WANDA_OWL, "--offload")
    same_model(offloaded, prune(run_cli, sharded, calibration, "whole", *WANDA_OWL))


def test_what_was_offloaded_can_be_offloaded_again(tiny_model: TinyModel, run_cli: RunCli, calibration: Path) -> None:
    dense = tiny_model("llama")
    offloaded = prune(run_cli, dense, calibration, "offloaded", *WANDA_OWL, "--offload")
    again = prune(run_cli, offloaded, calibration, "again", "--sparsity", "0.7", "--offload")
    same_model(again, prune(run_cli, offloaded, calibration, "whole", "--sparsity", "0.7"))


def renamed(model: Path, copy: Path, prefix: str, to: str) -> Path:
    """The same checkpoint, whose tensors' names begin with something else."""
    copy.mkdir()
    (copy / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    save_file(
        {to + name.removeprefix(prefix) if name.startswith(prefix) else name: t for name, t in tensors.items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    return copy


def test_a_checkpoint_without_the_base_models_prefix_is_understood(
    tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    dense = tiny_model("gpt2")
    bare = renamed(dense, calibration.parent / "bare", "transformer.", "")
    offloaded = prune(run_cli, bare, calibration, "offloaded", *WANDA_OWL, "--offload")
    same_model(offloaded, prune(run_cli, bare, calibration, "whole", *WANDA_OWL))


def test_perplexity_is_measured_block_by_block(tiny_model: TinyModel, run_cli: RunCli, calibration: Path) -> None:
    dense = tiny_model("gemma2", dtype=torch.bfloat16)  # soft-caps its logits
    options = [*WANDA_OWL, "--evaluate", calibration]
    records = [
        json.loads((prune(run_cli, dense, calibration, name, *options, *more) / "pruning.json").read_text())
        for name, more in {"whole": [], "offloaded": ["--offload"]}.items()
    ]
    for key in ("before", "after"):
        assert records[1]["perplexity"][key] == pytest.approx(records[0]["perplexity"][key], rel=1e-6)


# -------------------- one block at a time


def loaded(model: torch.nn.Module) -> set[str]:
    """The blocks, and the modules outside them, that have parameters in memory."""
    there = [name for name, tensor in model.named_parameters() if tensor.device.type != "meta"]
    return {".".join(name.split(".")[:3]) if ".layers." in name else name.rpartition(".")[0] for name in there}


@pytest.mark.parametrize("options", [WANDA_OWL, ADMM], ids=["wanda-owl", "admm"])
def test_no_more_than_one_block_is_ever_in_memory(
    options: list[str], tiny_model: TinyModel, run_cli: RunCli, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[frozenset[str]] = set()

    class Watched(OffloadedModel):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            assert loaded(self.model) == set()
            for block in self.blocks:
                for linear in block.linears.values():
                    linear.register_forward_hook(lambda *_: seen.add(frozenset(loaded(self.model))))

        def save(self, *arguments: Any) -> None:
            super().save(*arguments)
            assert loaded(self.model) == set()

    monkeypatch.setattr("owl_deploy.pruning.run.OffloadedModel", Watched)
    prune(run_cli, tiny_model("llama"), calibration, "out", *options, "--offload")
    single = [{f"model.layers.{index}"} for index in range(3)]
    embedding = {"model.embed_tokens", "model.norm"}  # no head; only while the text is embedded
    assert seen == {frozenset(names) for names in (*single, single[0] | embedding)}


def test_a_finished_block_is_dense_again_when_it_is_held(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = ModelSource("llama", tiny_model("llama"))
    model = OffloadedModel(source, tmp_path, tmp_path, "cpu")
    block = model.blocks[1]
    query = block.linears["self_attn.q_proj"]
    with torch.no_grad():
        with model.weights.held(block):
            dense = query.weight.clone()
            query.weight.data = torch.zeros_like(dense)
        assert not query.weight.any()
        with model.weights.held(block):
            assert torch.equal(query.weight, dense)


def test_activations_lie_in_files_that_have_no_name(tmp_path: Path) -> None:
    tensors = SpilledTensors(tmp_path)
    values = [torch.randn(1, 5, 8), torch.randn(3, 8).to(torch.bfloat16), torch.randn(1, 5, 8)]
    for value in values:
        tensors.append(value)
    assert not list(tmp_path.iterdir())
    tensors[2] = values[2] = torch.randn(1, 5, 8)
    assert len(tensors) == 3
    assert all(torch.equal(found, value) for found, value in zip(tensors, values, strict=True))
    with pytest.raises(ValueError, match="place"):
        tensors[0] = values[1]


def test_an_offloaded_stream_keeps_its_activations_on_disk(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = OffloadedModel(ModelSource("llama", tiny_model("llama")), tmp_path, tmp_path, "cpu")
    with torch.no_grad():
        stream = model.weights.stream(model.model, model.blocks, IDS)
    assert isinstance(stream, CalibrationStream)
    assert isinstance(stream._hidden, SpilledTensors)
    assert isinstance(stream.twin()._hidden, SpilledTensors)


def test_a_written_shard_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5, dtype=torch.bfloat16),
        "a": torch.randn(7),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(3),
        "mask": torch.tensor([True, False, True]),
        "across": torch.randn(4, 6, dtype=torch.float16).T,
    }
    write_shard(tmp_path / "x.safetensors", tensors, tensors.items(), {"format": "pt", "record": "é"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "record": "é"}


# -------------------- interrupted


@pytest.mark.parametrize("plan", ["wanda", "admm", "magnitude"])
def test_an_interrupted_run_is_gone_on_with_to_the_same_bytes(
    plan: str, run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--sparsity", "0.6", "--calibration", reference / "tiny_calib.npy", *PLANS[plan], "--offload", "--quiet"]
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "whole", *options).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(driver, "prune_linear", Counter(interrupt_at=3 * 7 + 4))
        assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options).code == 130
    rest = Counter(interrupt_at=None)
    monkeypatch.setattr(driver, "prune_linear", rest)
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options).code == 0
    assert rest.count == 3 * 7
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert blocks(tmp_path / "out") == blocks(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.fixture(params=[True, False], ids=["links", "no-links"])
def _linking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with hard links, and one without."""
    if not request.param:

        def refuse(*_: object) -> None:
            raise PermissionError("no links here")

        monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("_linking")
def test_finished_blocks_outlive_an_interruption_after_they_were_saved(
    run_cli: RunCli, tiny_llama: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--sparsity", "0.6", "--calibration", reference / "tiny_calib.npy", "--offload", "--quiet"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(offload, "write_index", interrupt)
        assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options).code == 130
    counter = Counter(interrupt_at=None)
    monkeypatch.setattr(driver, "prune_linear", counter)
    assert run_cli("prune", tiny_llama, "-o", tmp_path / "out", *options).code == 0
    assert counter.count == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# -------------------- refused


def refused(run_cli: RunCli, model: Path | str, calibration: Path, *options: object) -> str:
    out = calibration.parent / "out"
    ran = run_cli("prune", model, "-o", out, "--calibration", calibration, *WANDA_OWL, "--offload", *options)
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert not out.exists()
    return line


def test_a_checkpoint_in_another_format_is_to_be_converted_first(
    tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    directory = calibration.parent / "bin"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(directory, safe_serialization=False)
    assert list(directory.glob("*.bin"))
    line = refused(run_cli, directory, calibration)
    assert f"owl-deploy prune {directory} --sparsity 0 -o DIR" in line


def test_a_gguf_file_is_to_be_converted_first(run_cli: RunCli, calibration: Path) -> None:
    gguf = calibration.parent / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert f"owl-deploy prune {gguf} --sparsity 0 -o DIR" in refused(run_cli, gguf, calibration)


def test_tune_needs_the_whole_model(tiny_model: TinyModel, run_cli: RunCli, calibration: Path) -> None:
    assert "--tune" in refused(run_cli, tiny_model("llama"), calibration, "--tune")


def test_a_tensor_that_is_not_there_is_named(tiny_model: TinyModel, run_cli: RunCli, calibration: Path) -> None:
    lacking = renamed(tiny_model("llama"), calibration.parent / "lacking", "model.layers.1.mlp.up_proj", "elsewhere")
    assert "lacks 1 of the model's weights, model.layers.1.mlp.up_proj.weight" in refused(run_cli, lacking, calibration)


def test_a_tensor_of_another_shape_is_named(tiny_model: TinyModel, run_cli: RunCli, calibration: Path) -> None:
    other = renamed(tiny_model("llama"), calibration.parent / "other", "", "")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "(48, 32) in its files, (64, 32) by config.json" in refused(run_cli, other, calibration)
