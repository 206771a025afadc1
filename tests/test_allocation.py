"""Allocations: on target, in range, and in the order of what they go by, whatever the blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from owl_deploy.allocation.baselines import (
    dlp_sparsities,
    erdos_renyi_sparsities,
    linear_sparsities,
    owl_inverse_sparsities,
)
from owl_deploy.allocation.mixed import mixed_counts
from owl_deploy.allocation.owl import outlier_percent, owl_sparsities
from owl_deploy.allocation.threshold import global_threshold

Blocks = list[tuple[float, int]]  # LOD in percent, weights

percents = st.floats(0, 100) | st.sampled_from([0.0, 1.0, 1.0000000001, 50.0])  # with ties, and near ties
blocks = st.lists(st.tuples(percents, st.integers(1, 10**9)), min_size=1, max_size=40)
targets = st.floats(0, 1, exclude_max=True) | st.sampled_from([1e-12, 0.001, 0.01, 0.985, 0.99, 0.995, 1 - 1e-9])
lambdas = st.floats(0, 1, exclude_max=True)


def allocated(given_blocks: Blocks, target: float, owl_lambda: float) -> list[float]:
    lod, weights = zip(*given_blocks, strict=True)
    return owl_sparsities(lod, target, owl_lambda, weights)


@given(blocks, targets, lambdas)
def test_the_mean_over_weights_is_the_target(given_blocks: Blocks, target: float, owl_lambda: float) -> None:
    weights = np.array([weight for _, weight in given_blocks], dtype=np.float64)
    found = np.array(allocated(given_blocks, target, owl_lambda))
    assert found @ (weights / weights.sum()) == pytest.approx(target, abs=1e-9)


@given(blocks, targets, lambdas)
def test_every_block_keeps_some_weights_and_none_is_below_dense(
    given_blocks: Blocks, target: float, owl_lambda: float
) -> None:
    assert all(0 <= value < 1 for value in allocated(given_blocks, target, owl_lambda))


@given(blocks, targets, lambdas)
def test_a_block_with_more_outliers_is_never_sparser(given_blocks: Blocks, target: float, owl_lambda: float) -> None:
    found = allocated(given_blocks, target, owl_lambda)
    by_lod = sorted(zip((lod for lod, _ in given_blocks), found, strict=True))
    for (lod, sparsity), (other_lod, other) in itertools.pairwise(by_lod):
        assert other <= sparsity if other_lod > lod else other == sparsity


@given(percents, st.lists(st.integers(1, 10**9), min_size=1, max_size=40), targets, lambdas)
def test_equal_outliers_give_the_uniform_allocation(
    lod: float, weights: list[int], target: float, owl_lambda: float
) -> None:
    assert allocated([(lod, weight) for weight in weights], target, owl_lambda) == pytest.approx(
        [target] * len(weights), abs=1e-12
    )


@given(st.lists(percents, min_size=2, max_size=40), st.floats(0.2, 0.79), st.floats(0, 0.1))
def test_equal_blocks_in_range_follow_the_published_formula(lod: list[float], target: float, owl_lambda: float) -> None:
    D = np.array(lod)
    spread = np.ptp(D) or 1.0
    d = (D - D.min()) / spread * 2 * owl_lambda
    published = 1 - (d - d.mean() + (1 - target))
    found = allocated([(value, 1000) for value in lod], target, owl_lambda)
    assert found == pytest.approx(published.tolist(), abs=1e-12)


def test_lambda_is_half_the_range() -> None:
    found = owl_sparsities([1.0, 2.0, 5.0], 0.7, 0.08, [10, 10, 10])
    assert max(found) - min(found) == pytest.approx(0.16)


@pytest.mark.parametrize("target", [0.001, 0.05, 0.95, 0.985, 0.999])
def test_near_0_and_1_the_excess_is_spread_over_the_other_blocks(target: float) -> None:
    found = owl_sparsities([1.0, 2.0, 5.0, 30.0], target, 0.2, [10, 10, 10, 10])
    assert np.mean(found) == pytest.approx(target, abs=1e-9)
    assert 0 <= min(found) <= max(found) < 1


def test_a_block_twice_as_large_counts_twice() -> None:
    one_large = owl_sparsities([1.0, 4.0], 0.7, 0.1, [20, 10])
    two_small = owl_sparsities([1.0, 1.0, 4.0], 0.7, 0.1, [10, 10, 10])
    assert one_large == pytest.approx(two_small[1:])


def test_outliers_are_counted_strictly_above_m_times_the_mean_of_the_whole_block() -> None:
    # The mean over both linears is 2; with M 2, the 4 is no outlier.
    scores = [torch.tensor([[0.0, 1.0, 1.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0, 9.0]])]
    assert outlier_percent(scores, 2) == pytest.approx(100 / 8)


# -------------------- the other allocations


@given(blocks, targets, lambdas)
def test_every_allocation_by_importance_has_the_target_as_its_mean(
    given_blocks: Blocks, target: float, half_range: float
) -> None:
    measured, weights = zip(*given_blocks, strict=True)
    share = np.array(weights, dtype=np.float64) / sum(weights)
    for found in (
        owl_inverse_sparsities(measured, target, half_range, weights),
        dlp_sparsities(measured, target, half_range, weights),
        linear_sparsities(target, half_range, weights),
    ):
        assert np.array(found) @ share == pytest.approx(target, abs=1e-9)
        assert all(0 <= value < 1 for value in found)


def test_the_order_of_each_allocation() -> None:
    measured, weights = [1.0, 5.0, 2.0], [10, 10, 10]
    owl = owl_sparsities(measured, 0.5, 0.1, weights)
    inverse = owl_inverse_sparsities(measured, 0.5, 0.1, weights)
    assert np.argsort(owl).tolist() == [1, 2, 0]
    assert np.argsort(inverse).tolist() == [0, 2, 1]
    assert dlp_sparsities(measured, 0.5, 0.1, weights) == pytest.approx(inverse)  # the same formula of another measure
    assert linear_sparsities(0.5, 0.1, weights) == pytest.approx([0.4, 0.5, 0.6])


shapes = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20)


@given(shapes, st.floats(0, 0.999))
def test_erdos_renyi_delivers_the_target_with_densities_in_proportion(
    given_shapes: list[tuple[int, int]], target: float
) -> None:
    size = np.array([rows * columns for rows, columns in given_shapes], dtype=np.float64)
    density = 1 - np.array(erdos_renyi_sparsities(given_shapes, target))
    assert density @ size == pytest.approx((1 - target) * size.sum(), rel=1e-6)
    assert ((density > 0) & (density <= 1)).all()
    ratio = density / np.array([(rows + columns) / (rows * columns) for rows, columns in given_shapes])
    below = density < 1
    assert np.ptp(ratio[below]) <= 1e-6 * ratio.max() if below.any() else True


def test_er_plus_keeps_the_last_layer_dense_and_the_total() -> None:
    given_shapes = [(100, 100), (100, 400), (400, 100), (100, 100)]
    found = erdos_renyi_sparsities(given_shapes, 0.6, dense=(3,))
    size = np.array([rows * columns for rows, columns in given_shapes])
    assert found[3] == 0
    assert np.array(found) @ size == pytest.approx(0.6 * size.sum())


def test_er_plus_is_uniform_where_the_dense_layer_alone_is_too_much() -> None:
    assert erdos_renyi_sparsities([(10, 10), (100, 100)], 0.9, dense=(1,)) == [0.9, 0.9]


@given(st.lists(st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=30), min_size=1, max_size=5), st.data())
def test_the_global_threshold_is_an_order_statistic_of_all_scores(
    values: list[list[float]], data: st.DataObject
) -> None:
    tensors = [torch.tensor(part, dtype=torch.float32) for part in values]
    everything = np.sort(torch.cat(tensors).numpy())
    count = data.draw(st.integers(1, len(everything)))
    assert global_threshold(lambda: tensors, count) == everything[count - 1]


@given(st.lists(st.tuples(percents, st.integers(1, 10)), min_size=1, max_size=40), st.integers(1, 7), st.floats(0, 6))
def test_mixed_counts_are_whole_in_range_and_on_average_what_was_asked(
    given_blocks: Blocks, prune: int, strength: float
) -> None:
    lod, weights = zip(*given_blocks, strict=True)
    counts = mixed_counts(lod, prune, 8, strength, weights)
    assert all(1 <= count <= 7 for count in counts)
    share = np.array(weights) / sum(weights)
    assert abs(counts @ share - prune) <= share.max() / 2 + 1e-9


def test_mixed_counts_follow_the_outliers() -> None:
    assert mixed_counts([1.0, 2.0, 3.0, 4.0, 5.0], 4, 8, 2, [1] * 5) == [5, 4, 4, 4, 3]
