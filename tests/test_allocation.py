"""OWL's block sparsities: on target, in range, and in the order of the outliers, whatever the blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from owl_deploy.allocation.owl import outlier_percent, owl_sparsities

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
