"""The dense stream as ADMM's target: who writes into the residual, and what a linear is to make up for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import Block, find_blocks, matrix_of, set_matrix
from owl_deploy.pruning.calibration.statistics import InputStatistics
from owl_deploy.pruning.calibration.stream import CalibrationStream
from owl_deploy.pruning.calibration.target import DenseTargets, observe

from .conftest import VOCABULARY, TinyModel

IDS: NDArray[np.int64] = np.random.default_rng(0).integers(3, VOCABULARY, (3, 16))

WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),  # both read the block's input, and are added at once
    "gemma2": (),  # a norm stands between the projections and the stream
}


def first_block(model: TinyModel, family: str) -> tuple[Block, CalibrationStream]:
    loaded = load_model(ModelSource(family, model(family)))
    blocks = find_blocks(loaded)
    return blocks[0], CalibrationStream(loaded, blocks, IDS)


@pytest.mark.parametrize("family", WRITERS)
@torch.no_grad()
def test_the_writers_into_the_residual_stream_are_found_by_what_they_add_up_to(
    tiny_model: TinyModel, family: str
) -> None:
    block, stream = first_block(tiny_model, family)
    assert sorted(observe(stream, block).writers) == sorted(WRITERS[family])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
@torch.no_grad()
def test_with_nothing_pruned_before_the_target_is_the_linears_own_output(tiny_model: TinyModel, family: str) -> None:
    block, stream = first_block(tiny_model, family)
    dense = observe(stream.twin(), block)
    statistics, targets = InputStatistics(block.linears, {"gram"}), DenseTargets(block, block.linears, dense)
    stream.collect(block, statistics, targets.watch)
    for name, linear in block.linears.items():
        own = matrix_of(linear) @ statistics.hessian(name)
        torch.testing.assert_close(targets.correlation(name), own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))


@torch.no_grad()
def test_a_writer_takes_over_the_error_of_the_stream_so_far(tiny_model: TinyModel) -> None:
    block, stream = first_block(tiny_model, "llama")
    name, linear = "mlp.down_proj", block.linears["mlp.down_proj"]
    dense = observe(stream.twin(), block)
    earlier = block.linears["self_attn.o_proj"]
    set_matrix(earlier, matrix_of(earlier) * (torch.rand_like(matrix_of(earlier)) > 0.5))

    targets = DenseTargets(block, {name: linear}, dense)
    stream.collect(block, InputStatistics({name: linear}, {"gram"}), targets.watch)

    expected = torch.zeros_like(matrix_of(linear))
    seen: dict[str, torch.Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, given: seen.update(x=given[0])),
        earlier.register_forward_hook(lambda _, __, out: seen.update(o=out)),
    ]
    before = list(stream._hidden)
    stream.advance(block)
    for index, hidden in enumerate(before):
        stream._run(block, hidden)
        wanted = dense.written[name][index] - (hidden + seen["o"])
        expected += 2 / len(IDS) * wanted[0].T @ seen["x"][0]
    for handle in handles:
        handle.remove()
    assert not torch.allclose(wanted, seen["x"] @ matrix_of(linear).T)
    torch.testing.assert_close(targets.correlation(name), expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_experts_keep_their_own_output_as_target(tiny_model: TinyModel) -> None:
    block, stream = first_block(tiny_model, "mixtral")
    targets = DenseTargets(block, block.linears, observe(stream.twin(), block))
    stream.collect(block, InputStatistics(block.linears, {"gram"}), targets.watch)
    assert targets.correlation("block_sparse_moe.experts.0.w1") is None
    assert targets.correlation("self_attn.o_proj") is not None
