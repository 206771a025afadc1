"""The grids that weights are rounded to, shared by training, by pruning and by what packs them.

A grid is `q * scale`: `q` is an integer of a few bits, and each group of a row's columns has one scale. Rounding what
is on the grid already changes nothing, so that a model that was trained or solved on it is exported as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn import functional

Rounded = Literal["int8", "int4", "int3"]
_CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
ROUNDED: tuple[Rounded, ...] = get_args(Rounded)
"""Weights that `prune` and `recover` can round to."""


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits times a scale.

    Attributes:
        group: how many columns share a scale, from the first on; None for a whole row.
        scale_dtype: what scales are rounded to. It is so short that `q * scale` is exact in fp32, and that the scale is
            found again from the largest weight.
        both_signs: scales have a sign, by which the largest weight of a group is always `-2^(bits - 1)`: all integers
            are used. Otherwise the lowest integer is not.
    """

    bits: int
    group: int | None
    scale_dtype: torch.dtype
    both_signs: bool

    @property
    def highest(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    @property
    def lowest(self) -> int:
        return -self.highest - 1 if self.both_signs else -self.highest

    def bits_per_weight(self, sparsity: float, columns: int) -> float:
        """Of a matrix with rows of `columns`, scales included; a sparse one stores a bit for each weight too."""
        scales = torch.finfo(self.scale_dtype).bits / (self.group or columns)
        return scales + (self.bits if sparsity == 0 else 1 + (1 - sparsity) * self.bits)

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """Of a matrix [out, in], fp32: those by which the largest weight of each group is kept, [out, groups]."""
        grouped = self._grouped(weight)
        highest, lowest = grouped.amax(-1), grouped.amin(-1)
        if self.both_signs:
            largest = torch.where(highest > -lowest, highest, lowest)
            scale = largest / self.lowest
        else:
            scale = torch.maximum(highest, -lowest) / self.highest
        limits = torch.finfo(self.scale_dtype)
        return scale.clamp(limits.min, limits.max).to(self.scale_dtype).float()

    def best_scales(self, weight: torch.Tensor) -> torch.Tensor:
        """Of `scales`, and of those down to 0.7 of them, the ones with the least squared error, [out, groups].

        The largest weights of a group are cut off where the others gain more: 4 to 6% less error at 4 and 3 bits.
        """
        grouped = self._grouped(weight)
        widest = best = self.scales(weight)
        least = torch.full_like(widest, torch.inf)
        for factor in _CUTS:
            scales = (factor * widest).to(self.scale_dtype).float()
            error = (self.nearest(grouped, scales[..., None]) - grouped).square().sum(-1)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
        return best

    def nearest(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The points of the grid next to `weight`, fp32; 0 where the scale is. The shapes are those of one group."""
        steps = torch.where(scales == 0, 1.0, scales)
        return (weight / steps).round_().clamp_(self.lowest, self.highest).mul_(scales)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """A matrix [out, in], fp32, with every weight the nearest on the grid; what was 0 stays 0."""
        columns = weight.shape[1]
        points = self.nearest(self._grouped(weight), self.scales(weight)[..., None])
        return points.reshape(len(weight), -1)[:, :columns].contiguous()

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, groups, columns of a group], the last group filled up with zeros."""
        columns = weight.shape[1]
        width = self.group or columns
        padded = functional.pad(weight, (0, -columns % width)) if columns % width else weight
        return padded.reshape(len(weight), -1, width)


GRIDS: dict[Rounded, Grid] = {
    "int8": Grid(8, None, torch.bfloat16, both_signs=False),
    "int4": Grid(4, 64, torch.float16, both_signs=True),
    "int3": Grid(3, 64, torch.float16, both_signs=True),
}


def rounded_asymmetrically(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A matrix [out, in], fp32, with every weight the nearest of `2^bits` steps from its row's lowest to its highest.

    What the figures of OWL's Table 12 fit: no groups; `scale = (hi - lo) / (2^b - 1)`, `zero = round(-lo / scale)`, and
    `w' = scale (clamp(round(w / scale) + zero, 0, 2^b - 1) - zero)`, where `lo` and `hi` take in 0. Zeros stay zeros.
    """
    lo = weight.amin(1, keepdim=True).clamp(max=0)
    hi = weight.amax(1, keepdim=True).clamp(min=0)
    is_empty = (lo == 0) & (hi == 0)
    lo, hi = lo.masked_fill(is_empty, -1), hi.masked_fill(is_empty, 1)
    highest = 2**bits - 1
    scale: torch.Tensor = (hi - lo) / highest
    zero = torch.round(-lo / scale)
    return scale * (torch.clamp(torch.round(weight / scale) + zero, 0, highest) - zero)
