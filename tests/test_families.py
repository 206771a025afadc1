"""Every family is pruned by structure alone, and what comes out is a plain checkpoint of that family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaModel, PreTrainedModel

from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import find_blocks, matrix_of
from owl_deploy.pruning.calibration.statistics import InputStatistics
from owl_deploy.pruning.calibration.stream import CalibrationStream, in_fp32

from .conftest import FAMILIES, VOCABULARY, RunCli, TinyModel

WANDA_OWL = ["--sparsity", "0.5"]
ADMM = ["--sparsity", "0.5", "--method", "admm"]
SPARSEGPT_UNIFORM = ["--sparsity", "0.6", "--method", "sparsegpt", "--allocation", "uniform"]
LINEARS = {"gpt_neox": 4, "opt": 6, "phi3": 4, "mixtral": 17, "falcon": 4, "bloom": 4, "gpt2": 4}
"""Of each block; 7 in the others."""
IDS: NDArray[np.int64] = np.random.default_rng(0).integers(3, VOCABULARY, (4, 16))


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, IDS)
    return path


def prune(run_cli: RunCli, model: Path, calibration: Path, *options: str) -> Path:
    out = calibration.parent / "out"
    ran = run_cli("prune", model, "-o", out, "--calibration", calibration, *options, "--quiet")
    assert ran.code == 0, ran.stderr
    assert ran.stderr == ""
    return out


def plain(directory: Path) -> PreTrainedModel:
    """The checkpoint as any user of transformers would load it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return model.eval()


def dtype_of(family: str, *, other: bool) -> torch.dtype:
    """Half of the families in bf16, and for the other method the other half."""
    return torch.bfloat16 if (list(FAMILIES).index(family) % 2 == 0) != other else torch.float32


@pytest.mark.parametrize("options", [WANDA_OWL, SPARSEGPT_UNIFORM, ADMM], ids=["wanda-owl", "sparsegpt", "admm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_a_plain_checkpoint_as_sparse_as_its_record_says(
    family: str, options: list[str], tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    dtype = dtype_of(family, other=options is SPARSEGPT_UNIFORM)
    dense = tiny_model(family, dtype=dtype)
    out = prune(run_cli, dense, calibration, *options)
    model, before = plain(out), plain(dense)

    assert model.dtype == dtype
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    blocks = find_blocks(model)
    assert [len(block.linears) for block in blocks] == [LINEARS.get(family, 7)] * 3
    record = json.loads((out / "pruning.json").read_text())
    for block, recorded in zip(blocks, record["blocks"], strict=True):
        assert block.name == recorded["name"]
        for linear in recorded["linears"]:
            weight = matrix_of(block.linears[linear["name"]])
            assert (weight == 0).float().mean().item() == pytest.approx(linear["sparsity_achieved"], abs=1e-7)
    assert record["sparsity_achieved"] == pytest.approx(float(options[1]), abs=0.04)  # floored in rows of 32
    with torch.no_grad():
        assert model(torch.from_numpy(IDS)).logits.isfinite().all()

    pruned = {f"{block.name}.{name}.weight" for block in blocks for name in block.linears}
    kept = dict(before.named_parameters())
    for name, tensor in model.named_parameters():
        assert name in pruned or torch.equal(tensor, kept[name]), f"{name} is not a linear of a block, but has changed"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_carries_the_hidden_states_of_the_model_itself(family: str, tiny_model: TinyModel) -> None:
    model = load_model(ModelSource(family, tiny_model(family)))
    blocks = find_blocks(model)
    expected: dict[str, list[torch.Tensor]] = {block.name: [] for block in blocks}
    for block in blocks:
        block.module.register_forward_hook(
            lambda _, __, output, name=block.name: expected[name].append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    with torch.no_grad():
        for row in torch.from_numpy(IDS):
            model(row[None], use_cache=False)
        for block in blocks:
            block.module._forward_hooks.clear()
        stream = CalibrationStream(model, blocks, IDS)
        for block in blocks:
            stream.advance(block)
            for found, wanted in zip(stream._hidden, expected[block.name], strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_sliding_windows_reach_only_the_blocks_that_have_them(tiny_model: TinyModel) -> None:
    model = load_model(ModelSource("gemma2", tiny_model("gemma2")))
    with torch.no_grad():
        stream = CalibrationStream(model, find_blocks(model), IDS)
    seen = [_tokens_seen_by_the_last(keywords["attention_mask"]) for _, keywords in stream._calls.values()]
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert seen == [4, 16, 4]


def _tokens_seen_by_the_last(mask: torch.Tensor | None) -> int:
    if mask is None:
        return len(IDS[0])  # the attention is causal by itself
    last = mask[0, 0, -1]
    seen = last if last.dtype == torch.bool else last == 0
    return int(seen.sum())


def test_statistics_of_a_bf16_model_are_those_of_its_weights_in_fp32(tiny_model: TinyModel) -> None:
    source = ModelSource("llama", tiny_model("llama", dtype=torch.bfloat16))
    found = []
    for dtype in (None, torch.float32):
        model = load_model(source, dtype)
        first = find_blocks(model)[0]
        stream = CalibrationStream(model, [first], IDS)
        with in_fp32(first.module), torch.no_grad():
            statistics = InputStatistics(first.linears, {"gram"})
            stream.collect(first, statistics)
        found.append(statistics.hessian("self_attn.q_proj"))
        assert {tensor.dtype for tensor in first.module.parameters()} == {dtype or torch.bfloat16}
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_tied_embeddings_stay_tied(tiny_model: TinyModel, run_cli: RunCli, calibration: Path) -> None:
    dense = tiny_model("llama", tie_word_embeddings=True)
    model = plain(prune(run_cli, dense, calibration, *WANDA_OWL))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, plain(dense).lm_head.weight)


def test_a_sharded_checkpoint_is_pruned_like_a_whole_one(
    tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    sharded = tiny_model("llama", shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    of_shards = prune(run_cli, sharded, calibration, *WANDA_OWL)
    kept = of_shards.rename(of_shards.with_name("of_shards"))
    of_whole = prune(run_cli, tiny_model("llama"), calibration, *WANDA_OWL)
    assert (kept / "model.safetensors").read_bytes() == (of_whole / "model.safetensors").read_bytes()


REFUSED = {
    "gpt_oss": FAMILIES["llama"]
    | {"head_dim": 8, "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0},
    "llama4_text": FAMILIES["llama"]
    | {"head_dim": 8, "num_hidden_layers": 2, "num_local_experts": 2, "intermediate_size_mlp": 48, "pad_token_id": 0},
    "granitemoe": FAMILIES["llama"] | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "vocab_size": VOCABULARY,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
    },
}


@pytest.mark.parametrize("family", REFUSED)
def test_weights_that_pruning_would_not_see_are_refused(
    family: str, tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    dense = tiny_model(family, **REFUSED[family])
    out = calibration.parent / "out"
    ran = run_cli("prune", dense, "-o", out, "--calibration", calibration, *WANDA_OWL)
    assert ran.code == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "fused experts" in ran.stderr
    assert not out.exists()


# -------------------- arguments that depend on the tokens


GEMMA3N = FAMILIES["gemma3_text"] | {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "activation_sparsity_pattern": [0.0] * 3,
    "pad_token_id": 0,
}


def test_gemma_3n_is_refused_for_its_per_layer_inputs(
    tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    out = calibration.parent / "out"
    asked = ["prune", tiny_model("gemma3n_text", **GEMMA3N), "-o", out, "--sparsity", 0.5, "--calibration", calibration]
    ran = run_cli(*asked, "--quiet")
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert "model.layers.0 is called with a per_layer_input that depends on the tokens" in line
    assert not out.exists()
    assert run_cli(*asked, "--method", "magnitude", "--allocation", "uniform", "--quiet").code == 0


@pytest.fixture(params=[True, False], ids=["of-tokens", "of-length"])
def of_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """LLaMA's blocks are called with a keyword argument that depends on the tokens, or on their number alone."""
    forward = LlamaModel.forward

    def with_hints(model: LlamaModel, input_ids: torch.Tensor, **keywords: Any) -> Any:
        hints = input_ids if request.param else torch.ones_like(input_ids)
        return forward(model, input_ids, hints={"of": [hints, None]}, **keywords)

    monkeypatch.setattr(LlamaModel, "forward", with_hints)
    return bool(request.param)


@pytest.mark.parametrize("where", [[], ["--offload"]], ids=["in-memory", "offloaded"])
def test_arguments_that_depend_on_the_tokens_are_refused(
    where: list[str], of_tokens: bool, tiny_model: TinyModel, run_cli: RunCli, calibration: Path
) -> None:
    out = calibration.parent / "out"
    asked = ["prune", tiny_model("llama"), "-o", out, *WANDA_OWL, "--calibration", calibration, *where, "--quiet"]
    ran = run_cli(*asked)
    assert ran.code == (2 if of_tokens else 0), ran.stderr
    if of_tokens:
        assert "model.layers.0 is called with a hints that depends on the tokens" in ran.stderr
        assert not out.exists()


@pytest.mark.usefixtures("of_tokens")
@torch.no_grad()
def test_with_one_calibration_sequence_there_are_no_other_tokens(tiny_model: TinyModel) -> None:
    model = load_model(ModelSource("llama", tiny_model("llama")))
    for ids in (IDS[:1], np.repeat(IDS[:1], 2, axis=0)):
        assert len(CalibrationStream(model, find_blocks(model), ids)) == len(ids)


# -------------------- configs of transformers 5


def as_transformers_5(model: Path, copy: Path, **parameters: object) -> Path:
    """The same checkpoint, with its rotary settings where transformers 5 writes them."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    theta = config.pop("rope_theta")
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"} | parameters
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_the_rope_theta_of_transformers_5_is_read(
    tiny_model: TinyModel, run_cli: RunCli, calibration: Path, tmp_path: Path
) -> None:
    old = tiny_model("llama", rope_theta=500.0)
    new = as_transformers_5(old, tmp_path / "five")
    out = prune(run_cli, new, calibration, *WANDA_OWL)
    assert plain(out).config.rope_theta == 500.0
    kept = out.rename(tmp_path / "from_five")
    of_old = prune(run_cli, old, calibration, *WANDA_OWL)
    assert (kept / "model.safetensors").read_bytes() == (of_old / "model.safetensors").read_bytes()
    with torch.no_grad():
        logits = [plain(directory)(torch.from_numpy(IDS)).logits for directory in (kept, of_old)]
    assert torch.equal(*logits)


def test_the_rope_scaling_of_transformers_5_is_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    new = as_transformers_5(tiny_model("llama", rope_theta=500.0), tmp_path / "five", rope_type="linear", factor=4.0)
    config = load_model(ModelSource("five", new)).config
    assert (config.rope_theta, config.rope_scaling["rope_type"], config.rope_scaling["factor"]) == (500, "linear", 4)
