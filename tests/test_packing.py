"""Packed weights: what comes back, what products come to, and a reader of our own that knows nothing but FORMAT.md."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from owl_deploy.rounding import GRIDS
from owl_deploy.sparse import library

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")),
    reason="needs a C++ compiler, and owl-deploy installed again with it",
)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]
Packed = NDArray[np.uint8]

DENSE = ("dense8", "dense4")  # what stores zeros, too
NIBBLES = ("int4", "dense4")
LEVELS = {"packed16": 1023, "int8": 127, "dense8": 127}  # the largest integer that stands for a weight
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 255, 256, 257, 300)
FEW_TOKENS = 7  # that all kernels take as few, whatever number they draw the line at


class Case(NamedTuple):
    """A matrix, and how to pack it."""

    weights: Floats
    format: str
    paired: bool

    @property
    def packed(self) -> Packed:
        return library.pack(self.weights, self.format, self.paired)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shape and density, with empty and full rows and columns; magnitudes as weights have them."""
    sides = st.one_of(st.sampled_from(EDGES), st.integers(1, 300))
    rows, columns = draw(sides), draw(st.one_of(sides, st.integers(301, 2200)))
    rows = max(1, min(rows, 100_000 // columns))
    paired = draw(st.booleans())
    rows += rows % 2 if paired else 0
    density = draw(st.sampled_from([0.0, 0.03, 0.1, 0.3, 0.5, 0.9, 1.0]))
    spread = draw(st.sampled_from([0, 2, 8]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = generator.standard_normal((rows, columns)) * 2.0 ** generator.uniform(-spread, 0, (rows, columns))
    share = np.full((rows, columns), density)
    if draw(st.booleans()):
        share[generator.random(rows) < 0.3] = draw(st.sampled_from([0.0, 1.0]))
        share[:, generator.random(columns) < 0.3] = draw(st.sampled_from([0.0, 1.0]))
    weights[generator.random((rows, columns)) >= share] = 0
    scale = 2.0 ** draw(st.integers(-12, 4))
    return Case((weights * scale).astype(np.float32), draw(st.sampled_from(list(library.FORMATS))), paired)


formats = pytest.mark.parametrize("format", library.FORMATS)
quickly = settings(deadline=None, max_examples=40)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
any_weights = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=finite)


# ---- A reader, written from FORMAT.md ----


def read_as_specified(data: bytes) -> tuple[Floats, Mask]:
    """Weights and mask of a packed matrix, as FORMAT.md says."""
    (
        magic, version, format, paired, rows, columns, slice_rows, slices, panel_columns, panels,
        nonzeros, size, scales_at, sums_at,
    ) = struct.unpack_from("<IHBB6I4Q", data)  # fmt: skip
    assert (magic, version, size) == (int.from_bytes(b"OWLK", "little"), 1, len(data))
    table = np.frombuffer(data, "<u8", slices * panels + 1, 64)
    assert not any(table % 64)
    assert not any(data[int(table[-1]) :])
    assert size >= int(table[-1]) + 64
    row_scales = format in (2, 3, 4)
    scales = np.frombuffer(data, "<f4", rows, scales_at) if row_scales else np.ones(rows, np.float32)
    halves = rows // 2 if paired else rows
    step = slice_rows // 2 if paired else slice_rows
    weights = np.zeros((rows, columns), np.float32)
    mask = np.zeros((rows, columns), np.bool_)
    integer_sums = np.zeros(rows, np.int64)

    for s in range(slices):
        matrix_rows = list(range(s * step, min((s + 1) * step, halves)))
        if paired:
            matrix_rows += [halves + row for row in matrix_rows]
        stored = s * slice_rows + np.arange(len(matrix_rows))
        for panel in range(panels):
            start, end = (int(offset) for offset in table[s * panels + panel :][:2])
            unit, first = data[start:end], panel * panel_columns
            width = min(panel_columns, columns - first)
            if format <= 2:
                found = read_packed_unit(unit, len(matrix_rows), width, format)
            elif format >= 5:
                found = read_4_bit_unit(unit, len(matrix_rows), width, format)
            else:
                found = read_8_bit_unit(unit, len(matrix_rows), width, format)
                integer_sums[stored] = found[0].sum(axis=1)
            mask[matrix_rows, first : first + width] = found[1]
            weights[matrix_rows, first : first + width] = found[0] * scales[stored, None]

    if format in (3, 4):
        assert np.array_equal(integer_sums, np.frombuffer(data, "<i4", rows, sums_at))
    assert nonzeros == (mask.sum() if format not in (4, 6) else nonzeros)
    return weights, mask


def read_packed_unit(unit: bytes, rows: int, columns: int, format: int) -> tuple[Floats, Mask]:
    groups, blocks = -(-rows // 16), -(-columns // 32)
    records = np.frombuffer(unit, np.uint8, 17 * groups * blocks).reshape(blocks, 17 * groups)
    restore = np.frombuffer(unit, np.uint8, 16 * groups, records.size)
    at = -(-(records.size + restore.size) // 64) * 64
    words = np.frombuffer(unit, "<u4" if format == 1 else "<u2", offset=at)
    weights = np.zeros((16 * groups, 32 * blocks), np.float32)
    mask = np.zeros(weights.shape, np.bool_)
    row_at = np.arange(16 * groups)
    for block, record in enumerate(records):
        row_at = row_at[record[groups:]]
        for group in range(groups):
            for _ in range(record[group]):
                step, words = words[:16], words[16:]
                lanes = np.flatnonzero(step)
                to = row_at[16 * group + lanes], 32 * block + step[lanes] % 32
                assert not mask[to].any()
                mask[to] = True
                weights[to] = step[lanes].view("<f4") if format == 1 else step[lanes].view("<i2") >> 5
    assert np.array_equal(row_at[restore], np.arange(16 * groups))
    assert not words.any()
    assert words.nbytes < 64
    assert not mask[rows:].any()
    assert not mask[:, columns:].any()
    return weights[:rows, :columns], mask[:rows, :columns]


def read_8_bit_unit(unit: bytes, rows: int, columns: int, format: int) -> tuple[Floats, Mask]:
    blocks, pairs = -(-columns // 64), -(-rows // 2)
    mask = np.ones((pairs, blocks, 2, 64), np.bool_)
    at = 0
    if format == 3:
        at = 8 * 2 * pairs * blocks
        bits = np.unpackbits(np.frombuffer(unit, np.uint8, at), bitorder="little")
        mask = bits.astype(np.bool_).reshape(mask.shape)
    weights = np.zeros(mask.shape, np.float32)
    count = int(mask.sum())
    weights[mask] = np.frombuffer(unit, np.int8, count, at)
    assert not any(unit[at + count :])
    assert len(unit) - at - count < 64
    shape = 2 * pairs, 64 * blocks
    by_row, mask_by_row = weights.swapaxes(1, 2).reshape(shape), mask.swapaxes(1, 2).reshape(shape)
    stored = mask_by_row if format == 3 else by_row
    assert not stored[rows:].any()
    assert not stored[:, columns:].any()
    return by_row[:rows, :columns], mask_by_row[:rows, :columns]


def read_4_bit_unit(unit: bytes, rows: int, columns: int, format: int) -> tuple[Floats, Mask]:
    blocks, pairs = -(-columns // 64), -(-rows // 32)
    weights = np.zeros((pairs, 2, 16, blocks, 16, 4), np.float32)  # pair, band, row, block, tile, column
    mask = np.zeros(weights.shape, np.bool_)
    at = 0
    for pair in range(pairs):
        for block in range(blocks):
            start = at
            scales = np.frombuffer(unit, "<f2", 32, at).astype(np.float32).reshape(2, 16)
            at += 64
            stored = np.ones((16, 2, 16, 4), np.bool_)  # tile, band, row, column
            if format == 5:
                bits = np.unpackbits(np.frombuffer(unit, np.uint8, 256, at), bitorder="little")
                stored = bits.astype(np.bool_).reshape(stored.shape)
                at += 256
            by_band = stored.swapaxes(0, 1)
            counts = by_band.sum(axis=(1, 2, 3))
            together = np.frombuffer(unit, np.uint8, counts.max(), at)
            at += counts.max()
            if format == 5:
                padding = -(at - start) % 8
                assert not any(unit[at : at + padding])
                at += padding
            for band, nibbles in enumerate((together & 15, together >> 4)):
                assert not nibbles[counts[band] :].any()
                signed = ((nibbles.astype(np.int8) ^ 8) - 8)[: counts[band]]
                found = np.zeros((16, 16, 4), np.float32)  # tile, row, column
                found[by_band[band]] = signed
                scaled = found * scales[band][:, None]
                scaled[~by_band[band]] = 0
                weights[pair, band, :, block] = scaled.swapaxes(0, 1)
                mask[pair, band, :, block] = by_band[band].swapaxes(0, 1)
    assert not any(unit[at:])
    assert len(unit) - at < 64
    shape = 32 * pairs, 64 * blocks
    by_row, mask_by_row = weights.reshape(shape), mask.reshape(shape)
    beyond = mask_by_row if format == 5 else by_row
    assert not beyond[rows:].any()
    assert not beyond[:, columns:].any()
    return by_row[:rows, :columns], mask_by_row[:rows, :columns]


def rounded_as_specified(weights: Floats, format: str) -> Floats:
    """What FORMAT.md says that packing makes of weights."""
    if format == "packed32":
        bits = weights.view(np.uint32).astype(np.int64)
        sign, m = bits & 0x80000000, bits & 0x7FFFFFFF
        c = (m & ~31) | np.arange(weights.shape[1]) % 32
        c = np.where(c - m > 16, c - 32, np.where(c - m < -16, c + 32, c))
        c = np.where(c <= 0, c + 32, c)
        c = np.where(c >= 0x7F800000, c - 32, c)
        return np.where(m != 0, (sign | c).astype(np.uint32).view(np.float32), np.float32(0))
    if format in NIBBLES:
        return rounded_to_4_bits(weights)
    scale = scales_as_specified(weights, format)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.clip(np.rint(weights / scale), -LEVELS[format], LEVELS[format])
    if format == "packed16":
        q = np.where(q == 0, np.copysign(np.float32(1), weights), q)
    product: Floats = np.where(weights != 0, q, np.float32(0)).astype(np.float32) * scale
    return product


def scales_as_specified(weights: Floats, format: str) -> Floats:
    largest = np.abs(weights).max(axis=1, keepdims=True)
    scale = np.minimum(largest, np.float32(2.0**128 - 2.0**107)) / np.float32(LEVELS[format])
    return np.where(largest == 0, np.float32(0), np.maximum(scale, np.float32(2.0**-126)))


def in_groups(weights: Floats) -> Floats:
    """[rows, groups, 64]"""
    return np.pad(weights, ((0, 0), (0, -weights.shape[1] % 64))).reshape(len(weights), -1, 64)


def as_half(values: Floats) -> Floats:
    return np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)


def points_of_grid(weights: Floats, scale: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        q = np.clip(np.rint(weights / scale[..., None]), -8, 7)
    return np.where(scale[..., None] == 0, np.float32(0), q).astype(np.float32) * scale[..., None]


def rounded_to_4_bits(weights: Floats) -> Floats:
    groups = in_groups(weights)
    highest, lowest = groups.max(-1), groups.min(-1)
    largest = np.where(highest > -lowest, highest, lowest)
    chosen, is_chosen = np.zeros_like(largest), largest == 0
    for k in range(-8, 0):
        scale = as_half(largest / np.float32(k))
        is_on_grid = ~is_chosen & (points_of_grid(groups, scale) == groups).all(-1)
        chosen[is_on_grid] = scale[is_on_grid]
        is_chosen |= is_on_grid
    widest, least = as_half(largest / np.float32(-8)), np.full(largest.shape, np.inf)
    for cut in (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        scale = as_half(np.float32(cut) * widest)
        squares = np.square(points_of_grid(groups, scale).astype(np.float64) - groups)
        sums = sum_in_order(np.moveaxis(squares.reshape(*largest.shape, 8, 8), -2, 0))
        error = sum_in_order(np.moveaxis(sums, -1, 0))
        is_better = ~is_chosen & (scale != 0) & (error < least)
        chosen[is_better] = scale[is_better]
        least = np.where(is_better, error, least)
    points: Floats = points_of_grid(groups, chosen).reshape(len(weights), -1)[:, : weights.shape[1]]
    return points


def sum_in_order(values: Doubles) -> Doubles:
    total = np.zeros_like(values[0])
    for value in values:
        total += value
    return total


def assert_same_floats(found: Floats, wanted: Floats) -> None:
    assert found.dtype == wanted.dtype == np.float32
    assert np.array_equal(found, wanted)


# ---- What comes back ----


def check_unpacked(case: Case) -> None:
    weights, mask = library.unpack_with_mask(case.packed)
    stored = np.ones_like(mask) if case.format in DENSE else case.weights != 0
    assert np.array_equal(mask, stored)
    assert not weights[case.weights == 0].any()
    exact = case.weights.astype(np.float64)
    error = np.abs(weights - exact)
    if case.format == "packed32":
        assert (error <= np.maximum(2.0**-19 * np.abs(exact), 31 * 2.0**-149)).all()
    elif case.format in NIBBLES:  # the largest may be cut to 0.7, and has 7 steps on one side; scales are fp16's
        largest = np.abs(in_groups(case.weights)).max(-1, keepdims=True).astype(np.float64)
        groups = np.abs(in_groups(case.weights))
        bound = np.maximum(0.4 * largest + 2.0**-21, np.where(largest > 8 * 65504, groups, 0))
        assert (error <= bound.reshape(len(error), -1)[:, : error.shape[1]]).all()
    else:
        scale = scales_as_specified(case.weights, case.format).astype(np.float64)
        bound = np.broadcast_to(0.5002 * scale, error.shape)  # the division and the product are rounded, too
        if case.format == "packed16":
            bound = np.maximum(bound, 1.0002 * scale - np.abs(exact))
        assert (error[mask] <= bound[mask]).all()
    if case.format in ("packed32", "packed16"):
        assert (np.sign(weights) == np.sign(exact)).all()
    assert_same_floats(weights, rounded_as_specified(case.weights, case.format))


@quickly
@given(cases())
def test_unpacks_to_the_same_mask_and_weights_within_bounds(case: Case) -> None:
    check_unpacked(case)


@quickly
@given(any_weights, st.sampled_from(list(library.FORMATS)))
def test_any_finite_weight_can_be_packed(weights: Floats, format: str) -> None:
    """Denormals, the largest numbers, and -0, which is not stored."""
    check_unpacked(Case(weights, format, paired=False))


@formats
def test_smallest_and_largest_weights(format: str) -> None:
    smallest, largest = np.float32(2.0**-149), np.finfo(np.float32).max
    for column in range(32):
        weights = np.zeros((4, 33), np.float32)
        weights[:, column] = smallest, -smallest, largest, -largest
        check_unpacked(Case(weights, format, paired=True))


@quickly
@given(cases())
def test_reader_written_from_the_specification_agrees(case: Case) -> None:
    packed = case.packed
    weights, mask = read_as_specified(packed.tobytes())
    found, found_mask = library.unpack_with_mask(packed)
    assert found.tobytes() == weights.tobytes()
    assert np.array_equal(found_mask, mask)


@quickly
@given(cases())
def test_same_weights_same_bytes(case: Case) -> None:
    packed = case.packed
    library.check(packed)
    assert np.array_equal(packed, case.packed)
    elsewhere = np.asfortranarray(case.weights)
    assert np.array_equal(packed, library.pack(elsewhere, case.format, case.paired))
    with_negative_zeros = np.where(case.weights == 0, np.float32(-0.0), case.weights)
    assert np.array_equal(packed, library.pack(with_negative_zeros, case.format, case.paired))


@quickly
@given(st.sampled_from(NIBBLES), st.floats(0, 1), st.integers(0, 2**32), st.booleans())
def test_weights_on_the_4_bit_grid_come_back_as_they_are(format: str, sparsity: float, seed: int, cut: bool) -> None:
    """As training and GPTQ round them: that cuts the largest of a group, and its lowest integer may be missing."""
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((40, 200)).astype(np.float32) * np.float32(2.0 ** generator.integers(-8, 4))
    weights[generator.random(weights.shape) < sparsity] = 0
    grid, matrix = GRIDS["int4"], torch.from_numpy(weights)
    on_grid = grid.rounded(matrix).numpy()
    if cut:
        groups = torch.from_numpy(in_groups(weights))
        rounded = grid.nearest(groups, grid.best_scales(matrix)[..., None]).numpy()
        lowest = rounded.min(-1, keepdims=True)
        on_grid = np.where(rounded == lowest, np.float32(0), rounded).reshape(40, -1)[:, :200]
    assert_same_floats(library.unpack(library.pack(on_grid, format)), on_grid)


@pytest.mark.parametrize(
    ("format", "density", "most"),
    [
        ("packed32", 0.3, 1.34),
        ("packed32", 0.5, 2.2),
        ("packed16", 0.3, 0.7),
        ("int8", 0.3, 0.44),
        ("dense8", 0.3, 1.01),
        ("int4", 0.3, 0.32),
        ("int4", 0.5, 0.42),
        ("dense4", 0.3, 0.54),
    ],
)
def test_takes_the_bytes_per_weight_that_were_promised(format: str, density: float, most: float) -> None:
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((1024, 1024), np.float32) * (generator.random((1024, 1024)) < density)
    assert library.pack(weights, format).size / weights.size < most


# ---- What is refused ----


@quickly
@given(cases(), st.sampled_from([np.inf, -np.inf, np.nan]), st.randoms(use_true_random=False))
def test_refuses_weights_that_are_not_finite(case: Case, value: float, random: Any) -> None:
    case.weights.flat[random.randrange(case.weights.size)] = value
    with pytest.raises(ValueError, match="infinite or not a number"):
        _ = case.packed


@formats
@pytest.mark.parametrize(
    ("shape", "paired", "reason"),
    [((0, 5), False, "a side is 0"), ((5, 0), False, "a side is 0"), ((5, 8), True, "odd number of rows")],
)
def test_refuses_shapes_that_cannot_be(format: str, shape: tuple[int, int], paired: bool, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        library.pack(np.ones(shape, np.float32), format, paired)


def put(at: int, layout: str, value: float | bytes) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<" + layout, data, at, value)


def in_first_unit(at: int, layout: str, value: float | bytes) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<" + layout, data, struct.unpack_from("<Q", data, 64)[0] + at, value)


def cut(data: bytearray) -> None:
    del data[-64:]
    struct.pack_into("<Q", data, 40, len(data))


def lengthen(data: bytearray) -> None:
    """Room in the only unit that nothing is in."""
    data.extend(bytes(64))
    struct.pack_into("<Q", data, 40, len(data))
    struct.pack_into("<Q", data, 72, struct.unpack_from("<Q", data, 72)[0] + 64)


# Of a matrix of 19 x 40 ones: 1 slice of 2 groups, or 10 pairs; 1 panel; in the packed formats a block of 8 columns.
@pytest.mark.parametrize(
    ("format", "damage", "reason"),
    [
        ("packed32", put(0, "I", 0x4B4C5750), "magic"),
        ("packed32", put(4, "H", 2), "another version"),
        ("packed32", put(6, "B", 0), "unknown weight format"),
        ("packed32", put(6, "B", 7), "unknown weight format"),
        ("packed32", put(7, "B", 2), "pairing"),
        ("packed32", put(8, "I", 0), "shape"),
        ("packed32", put(12, "I", 2**24 + 1), "shape"),
        ("packed32", put(16, "I", 24), "slices"),
        ("packed32", put(16, "I", 272), "slices"),
        ("packed32", put(20, "I", 2), "slices"),
        ("packed32", put(24, "I", 48), "panels"),
        ("packed32", put(24, "I", 96), "panels"),
        ("packed32", put(28, "I", 2), "panels"),
        ("packed32", put(40, "Q", 128), "truncated"),
        ("packed32", cut, "truncated"),
        ("packed32", put(64, "Q", 0), "out of range"),
        ("packed32", put(64, "Q", 129), "out of range"),
        ("packed32", put(72, "Q", 2**63), "out of range"),
        ("packed32", lengthen, "wrong length"),
        ("packed32", in_first_unit(0, "B", 33), "more steps than columns"),
        ("packed32", in_first_unit(0, "B", 31), "wrong length"),
        ("packed32", in_first_unit(2, "B", 1), "positions"),
        ("packed32", in_first_unit(2, "B", 200), "positions"),
        ("packed32", in_first_unit(68, "B", 1), "positions"),
        ("packed32", in_first_unit(128 + 4 * 16 * 64, "I", 0x3F800008), "column index"),
        ("packed16", in_first_unit(128 + 2 * 16 * 64, "H", 0x0108), "column index"),
        ("packed16", put(48, "Q", 2**40), "scales"),
        ("packed16", put(48, "Q", 0), "scales"),
        ("packed16", put(128, "f", np.nan), "scale is not finite"),
        ("int8", put(56, "Q", 72), "sums"),
        ("int8", in_first_unit(0, "Q", 2**41 - 1), "column index"),
        ("int8", in_first_unit(152, "Q", 1), "row is out of range"),
        ("int8", in_first_unit(0, "16s", bytes(16)), "wrong length"),
        ("dense8", lengthen, "wrong length"),
        ("int4", in_first_unit(0, "H", 0x7C00), "scale is not finite"),
        ("int4", in_first_unit(64 + 10 * 16, "Q", 1), "out of range"),
        ("int4", in_first_unit(64 + 8, "Q", 1 << 12), "out of range"),
        ("int4", in_first_unit(64, "256s", bytes(256)), "wrong length"),
        ("int4", put(72, "Q", 320), "out of range|too short"),
        ("int4", lengthen, "wrong length"),
        ("dense4", lengthen, "wrong length"),
    ],
)
def test_refuses_damage(format: str, damage: Callable[[bytearray], None], reason: str) -> None:
    data = bytearray(library.pack(np.ones((19, 40), np.float32), format).tobytes())
    damage(data)
    with pytest.raises(ValueError, match=reason):
        library.check(np.frombuffer(bytes(data), np.uint8))


# ---- Products ----


def product_bounds(case: Case, x: Floats) -> tuple[Doubles, Doubles]:
    """The product of the unpacked weights in double precision, and how far fp32 sums may be from it."""
    weights = library.unpack(case.packed).astype(np.float64)
    exact = x.astype(np.float64)
    y = exact @ weights.T
    size = np.abs(exact) @ np.abs(weights).T
    error = (x.shape[1] + 8) * 2.0**-23 * size
    if case.format in ("int8", "dense8"):  # few tokens' inputs are rounded to 24 bits
        level = np.abs(exact).max(axis=1, keepdims=True) / 8388607
        error = np.maximum(error, 1.5 * level * np.abs(weights).sum(axis=1) + 2.0**-22 * size)
    if case.format in NIBBLES:  # any inputs are rounded to 16 bits of their group's largest
        level = np.repeat(np.abs(in_groups(x)).max(-1), 64, axis=1)[:, : x.shape[1]].astype(np.float64) / 32639
        error += 0.501 * level @ np.abs(weights).T
    error += 1e-37
    if case.paired:
        gate, up = np.split(y, 2, axis=1)
        gate_error, up_error = np.split(error, 2, axis=1)
        with np.errstate(over="ignore"):
            silu = gate / (1 + np.exp(-gate))
        most = np.abs(up) + up_error
        y, error = silu * up, 1.1 * gate_error * most + np.abs(silu) * (up_error + 2.0**-20 * most) + 1e-35
    return y, error


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 130]), st.integers(0, 2**32))
def test_products_are_those_of_the_unpacked_weights(case: Case, tokens: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((tokens, case.weights.shape[1])).astype(np.float32)
    x *= generator.choice([1, 1, 1, 0, 100], x.shape).astype(np.float32)
    wanted, error = product_bounds(case, x)
    packed = case.packed
    found = {kernels: library.product(packed, x, kernels)[0] for kernels in library.instruction_sets()}
    for kernels, y in found.items():
        assert y.shape == wanted.shape
        wrong = np.abs(y - wanted) > error
        assert not wrong.any(), f"{kernels}: {y[wrong][:3]} is not {wanted[wrong][:3]} +- {error[wrong][:3]}"
        # sums of integers, and those are exact
        if case.format in NIBBLES or (case.format in ("int8", "dense8") and tokens <= FEW_TOKENS):
            assert np.array_equal(y, found["scalar"])
    assert np.array_equal(library.product(packed, x)[0], found[library.instruction_sets()[0]])
    assert np.array_equal(library.product(packed, x, threads=2)[0], found[library.instruction_sets()[0]])
    if case.format in NIBBLES:
        assert np.array_equal(library.product(packed, x[-1:])[0], found["scalar"][-1:])


def test_an_outlier_among_inputs_costs_the_others_nothing() -> None:
    """8-bit products of few tokens: next to an input of 1000, one of 1 still has 13 bits of its own."""
    weights = np.eye(64, dtype=np.float32)
    x = np.full((1, 64), 1 / 3, np.float32)
    x[0, 0] = 1000
    y, _ = library.product(library.pack(weights, "int8"), x)
    np.testing.assert_allclose(y, x, rtol=0, atol=1000 / 2**23)


@formats
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_tiny_inputs_give_tiny_outputs(format: str, tokens: int) -> None:
    """Inputs whose reciprocal is infinite."""
    packed = library.pack(np.ones((16, 64), np.float32), format)
    x = np.zeros((tokens, 64), np.float32)
    x[:, ::2] = 2.0**-140
    for kernels in library.instruction_sets():
        y, _ = library.product(packed, x, kernels)
        assert (np.abs(y) < 2.0**-120).all()


@pytest.mark.parametrize("format", ["packed16", "int8", "int4"])
def test_inputs_of_many_tokens_are_taken_in_turns(format: str) -> None:
    """Of 300 tokens and so many columns, the scratch has no room for all of them at once."""
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((3, 33_000), np.float32)
    weights[generator.random(weights.shape, np.float32) < 0.9] = 0
    packed = library.pack(weights, format)
    x = generator.standard_normal((300, 33_000), np.float32)
    for kernels in library.instruction_sets():
        at_once, _ = library.product(packed, x, kernels, threads=2)
        apart = [library.product(packed, part, kernels)[0] for part in np.split(x, 3)]
        assert np.array_equal(at_once, np.concatenate(apart))


def whole_numbers(count: int, seed: int) -> NDArray[np.uint64]:
    """The same on every machine and with every numpy: splitmix64."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def as_floats(shape: tuple[int, int], seed: int) -> Floats:
    numbers = whole_numbers(shape[0] * shape[1], seed).reshape(shape)
    floats: Floats = ((numbers >> np.uint64(40)).astype(np.int64) - 2**23).astype(np.float32) / np.float32(2**23)
    return floats


def digest(data: NDArray[Any]) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]


class Kept(NamedTuple):
    """Digests of a matrix, and of its products with 3 tokens and with 60."""

    packed: str
    fused: tuple[str, str]  # where a multiplication and an addition are one instruction
    scalar: tuple[str, str]


KEPT = {
    "packed32": Kept(
        "23678a0253ff3592", ("ac1979b20f5a83b5", "9e40d7172bcbe808"), ("c42dda1b284d3a20", "6657d85b191ca3d0")
    ),
    "packed16": Kept(
        "671b1329a98944c9", ("ebb72c3db54eb092", "e0ce52e3fc7bdf6b"), ("50559ebc05831fd5", "cb5ca15b0df37be7")
    ),
    "int8": Kept(
        "959987d6a6f13593", ("57cca7fc3c6bfd49", "cde5730cdffa3f7c"), ("57cca7fc3c6bfd49", "0e29bb6f6fc098bd")
    ),
    "dense8": Kept(
        "ab5132573d1b5f99", ("57cca7fc3c6bfd49", "cde5730cdffa3f7c"), ("57cca7fc3c6bfd49", "0e29bb6f6fc098bd")
    ),
    "int4": Kept(
        "cd4cf8fedc900b97", ("006ffd8c01a9dd2b", "481c9174ffaaecd1"), ("006ffd8c01a9dd2b", "481c9174ffaaecd1")
    ),
    "dense4": Kept(
        "88fea50bddd7ee3b", ("006ffd8c01a9dd2b", "481c9174ffaaecd1"), ("006ffd8c01a9dd2b", "481c9174ffaaecd1")
    ),
}


@formats
def test_files_and_products_keep_their_bits(format: str) -> None:
    """A change of these digests is a change of the format, or of the numbers of every model that was exported."""
    weights = as_floats((326, 330), seed=1)
    weights[whole_numbers(weights.size, seed=2).reshape(weights.shape) % np.uint64(10) < 7] = 0
    packed = library.pack(weights, format, paired=True)
    assert digest(packed) == KEPT[format].packed
    for kernels in library.instruction_sets():
        products = [library.product(packed, as_floats((tokens, 330), seed=3), kernels)[0] for tokens in (3, 60)]
        assert tuple(map(digest, products)) == (KEPT[format].scalar if kernels == "scalar" else KEPT[format].fused)
