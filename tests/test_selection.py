"""Which weights go: the smallest, by a stable sort, and the same ones when asked twice."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from owl_deploy.pruning.methods.magnitude import magnitude_mask
from owl_deploy.pruning.methods.selection import kth_smallest, smallest_of_each_group, smallest_per_row
from owl_deploy.pruning.methods.wanda import wanda_mask
from owl_deploy.pruning.plan import NM

Matrix = NDArray[np.float32]

fractions = st.floats(0, 1, exclude_max=True)
patterns = st.integers(2, 9).flatmap(lambda of: st.builds(NM, st.integers(1, of - 1), st.just(of)))


@st.composite
def matrices(draw: st.DrawFn, columns: int | None = None) -> Matrix:
    """Matrices with many equal values, and zeros."""
    shape = (draw(st.integers(1, 6)), columns or draw(st.integers(1, 20)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    return (rng.integers(-levels, levels + 1, shape) / 8).astype(np.float32)


def first_of_a_stable_sort(scores: Matrix, count: int) -> NDArray[np.bool_]:
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(scores, axis=1, kind="stable")[:, :count], True, axis=1)
    return mask


@given(matrices(), st.data())
def test_smallest_per_row_is_the_start_of_a_stable_sort(weights: Matrix, data: st.DataObject) -> None:
    scores = np.abs(weights)
    count = data.draw(st.integers(0, scores.shape[1]))
    found = smallest_per_row(torch.from_numpy(scores), count)
    np.testing.assert_array_equal(found.numpy(), first_of_a_stable_sort(scores, count))


@given(matrices(), st.data())
def test_kth_smallest_is_an_element_of_the_sorted_row(weights: Matrix, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, weights.shape[1] - 1))
    found = kth_smallest(torch.from_numpy(weights), k)
    np.testing.assert_array_equal(found.numpy()[:, 0], np.sort(weights, axis=1)[:, k])


@given(matrices(), patterns)
def test_n_of_every_m_go_and_the_rounded_share_of_a_ragged_last_group(weights: Matrix, pattern: NM) -> None:
    scores = np.abs(weights)
    found = smallest_of_each_group(torch.from_numpy(scores), pattern).numpy()
    for start in range(0, scores.shape[1], pattern.of):
        group = scores[:, start : start + pattern.of]
        count = round(group.shape[1] * pattern.prune / pattern.of)
        np.testing.assert_array_equal(found[:, start : start + pattern.of], first_of_a_stable_sort(group, count))


@given(matrices(), fractions)
def test_wanda_prunes_the_floored_share_of_every_row(weights: Matrix, sparsity: float) -> None:
    columns = weights.shape[1]
    mask = wanda_mask(torch.from_numpy(weights), torch.ones(columns), sparsity)
    assert (mask.sum(dim=1) == int(columns * sparsity)).all()


@given(st.integers(1, 200), fractions)
def test_magnitude_prunes_up_to_and_with_the_published_threshold(size: int, sparsity: float) -> None:
    weight = torch.randperm(size).float()[None] + 1  # no ties
    expected = int(size * sparsity) + 1 if sparsity > 0 else 0
    assert magnitude_mask(weight, sparsity).sum() == expected


@given(matrices(), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_magnitude_keeps_only_what_is_larger_than_all_that_goes(weights: Matrix, sparsity: float) -> None:
    mask = magnitude_mask(torch.from_numpy(weights), sparsity).numpy()
    pruned, kept = np.abs(weights)[mask], np.abs(weights)[~mask]
    assert len(pruned) > 0
    assert len(kept) == 0 or kept.min() > pruned.max()


@given(matrices(columns=12), fractions, st.none() | patterns, st.integers(0, 2**32 - 1))
def test_pruning_by_wanda_twice_changes_nothing(
    weights: Matrix, sparsity: float, pattern: NM | None, seed: int
) -> None:
    norms = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, 12).astype(np.float32))  # with dead inputs
    weight = torch.from_numpy(weights)
    once = weight.masked_fill(wanda_mask(weight, norms, sparsity, pattern), 0)
    twice = once.masked_fill(wanda_mask(once, norms, sparsity, pattern), 0)
    assert torch.equal(once, twice)


@given(matrices(), fractions, st.none() | patterns)
def test_pruning_by_magnitude_twice_changes_nothing(weights: Matrix, sparsity: float, pattern: NM | None) -> None:
    weight = torch.from_numpy(weights)
    once = weight.masked_fill(magnitude_mask(weight, sparsity, pattern), 0)
    twice = once.masked_fill(magnitude_mask(once, sparsity, pattern), 0)
    assert torch.equal(once, twice)
