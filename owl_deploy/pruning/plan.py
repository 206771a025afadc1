"""What a pruning run is asked to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from owl_deploy.errors import UserError
from owl_deploy.rounding import ROUNDED, Rounded

Method = Literal["magnitude", "wanda", "wanda-variant", "sparsegpt", "ria", "admm", "ablate-magnitude", "ablate-wanda"]
Allocation = Literal[
    "uniform",
    "owl",
    "owl-per-layer",
    "owl-inverse",
    "global",
    "erdos-renyi",
    "er-plus",
    "dlp",
    "linear",
    "search",
    "explicit",
]
Granularity = Literal["row", "layer", "global"]
Statistics = Literal["dense", "block", "linear"]
Target = Literal["layer", "dense"]
Ablation = Literal["seq", "iter"]
METHODS: tuple[Method, ...] = get_args(Method)
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)

_GRANULARITY: dict[Method, Granularity] = {"magnitude": "layer", "wanda": "row", "ria": "layer", "admm": "layer"}
"""What each score is compared with, where it is a choice, and the published one."""
_LATER = ("generations", "weights", "linear_weights", "mix", "bits")
_BY_LOD = ("owl", "owl-per-layer", "owl-inverse")
_WITH_HALF_RANGE = (*_BY_LOD, "dlp", "linear")
_WITH_DAMPENING = ("sparsegpt", "admm", "ablate-magnitude", "ablate-wanda")


@dataclass(frozen=True)
class NM:
    """N:M sparsity: `prune` of every `of` consecutive inputs are zeroed."""

    prune: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.prune < self.of:
            raise UserError(f"pattern {self}: N must be between 1 and M - 1 (N of every M weights are pruned)")

    def __str__(self) -> str:
        return f"{self.prune}:{self.of}"

    @property
    def ratio(self) -> float:
        return self.prune / self.of


@dataclass(frozen=True)
class MixedNM(NM):
    """N:M sparsity on average: OWL says how many of every `of` each block gives up (paper, Table 10)."""

    def __str__(self) -> str:
        return f"mixed-{self.prune}:{self.of}"


def parse_pattern(text: str) -> NM | None:
    """`unstructured`, `N:M` or `mixed-N:M`.

    Raises:
        UserError: it is none of these.
    """
    if text == "unstructured":
        return None
    kind, numbers = (MixedNM, text.removeprefix("mixed-")) if text.startswith("mixed-") else (NM, text)
    parts = numbers.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UserError(f"--pattern {text}: give unstructured, N:M or mixed-N:M, for example 2:4 or mixed-4:8")
    return kind(int(parts[0]), int(parts[1]))


@dataclass(frozen=True)
class PruningPlan:
    """Which weights go (`method`), how many of each block (`allocation`), and in what shape (`pattern`).

    What is None is replaced by the default of the method or the allocation, so that a plan says all that was done.

    Attributes:
        sparsity: fraction of all block weights to zero, in [0, 1).
        owl_m: OWL's M (paper, section 2.2).
        half_range: half the range of sparsities: OWL's lambda (0.08), DLP's alpha (0.15), and that of `linear`, whose
            default is 0 up to 50%, 0.0725 at 60%, 0.1 at 70% and 0.09 from 80% on. In counts of a mixed N:M pattern: 2.
        block_sparsities: one sparsity per block, first to last, for the `explicit` allocation.
        linear_sparsities: or one per linear, by its full name.
        pattern: N:M in place of unstructured; its own ratio then sets every block's sparsity.
        granularity: what a weight's score is compared with: its output row, its linear, or the whole model.
        statistics: whose inputs are looked at: the dense model's, those of a block after pruned blocks (as published),
            or those of a linear after pruned linears (truly sequential).
        target: what ADMM reproduces: each linear's own output, or the dense model's stream.
        ablation: whether `ablate-*` choose their mask at once, or in turn with SparseGPT's updates.
        block_size: the column block of SparseGPT and the ablations.
        dampening: added to the Hessian's diagonal, as a fraction of its mean. ADMM's 0.3 is what measured best of 0.02,
            0.1 and 0.3 on SmolLM2-135M.
        admm_steps: iterations of ADMM.
        generations: of the evolution that the `search` allocation is (400 by default).
        weights: the grid that kept weights are rounded to, by GPTQ, after the mask is chosen (with SparseGPT: as it is
            chosen); None for no rounding. The checkpoint is then fp32, as 16 bits do not hold the grid.
        linear_weights: or one grid per linear, by its full name or that of its block.
        mix: or several, the finest first: OWL gives each to an equal share of the blocks, the finest to those with most
            outliers.
        bits: the mean bits of a weight that `search` keeps to in place of the sparsity, masks and scales included: it
            then chooses how sparse each linear is, and what it is rounded to.
    """

    sparsity: float
    method: Method = "wanda"
    allocation: Allocation | None = None
    owl_m: float = 5.0
    half_range: float | None = None
    block_sparsities: tuple[float, ...] | None = None
    linear_sparsities: dict[str, float] | None = None
    pattern: NM | None = None
    granularity: Granularity | None = None
    statistics: Statistics | None = None
    target: Target | None = None
    ablation: Ablation | None = None
    block_size: int = 128
    dampening: float | None = None
    admm_steps: int = 20
    generations: int | None = None
    weights: Rounded | None = None
    linear_weights: dict[str, Rounded] | None = None
    mix: tuple[Rounded, ...] | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        for index, value in enumerate(self.block_sparsities or ()):
            _check_sparsity(value, f"sparsity of block {index}")
        for name, value in (self.linear_sparsities or {}).items():
            _check_sparsity(value, f"sparsity of {name}")
        _check_sparsity(self.sparsity, "sparsity")
        _check_choice("method", self.method, METHODS)
        self._fill_in()
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        _check_choice("granularity", self.granularity, get_args(Granularity))
        _check_choice("statistics", self.statistics, get_args(Statistics))
        _check_choice("target", self.target, get_args(Target))
        _check_choice("ablation", self.ablation, get_args(Ablation))
        _check_choice("weights", self.weights, ROUNDED)
        for name, grid in (self.linear_weights or {}).items():
            _check_choice(f"weights of {name}", grid, ROUNDED)
        for grid in self.mix or ():
            _check_choice("weights", grid, ROUNDED)
        self._check_combinations()
        self._check_numbers()

    @property
    def fields(self) -> dict[str, Any]:
        """All that was decided. Fields that came later are there only where they are used: what an earlier version
        made of the same plan is found again.
        """
        return {name: value for name, value in asdict(self).items() if name not in _LATER or value is not None}

    @property
    def is_rounded(self) -> bool:
        return any(given is not None for given in (self.weights, self.linear_weights, self.mix, self.bits))

    def weights_of(self, linear: str) -> Rounded | None:
        """The grid of a linear, by its full name."""
        return (self.linear_weights or {}).get(linear, self.weights)

    @property
    def is_searched(self) -> bool:
        return self.allocation == "search" and (self.sparsity > 0 or self.bits is not None)

    @property
    def needs_lod(self) -> bool:
        """Whether the allocation, or the mix of grids, looks at outlier scores of the dense model."""
        if self.mix is not None:
            return True
        by_score = (*_BY_LOD, "dlp") if self.method == "magnitude" else (*_BY_LOD, "dlp", "global")
        return self.sparsity > 0 and (self.allocation in by_score or isinstance(self.pattern, MixedNM))

    @property
    def needs_inputs(self) -> bool:
        """Whether the method, the rounding or the allocation looks at the inputs of linears."""
        if self.is_rounded or self.is_searched:
            return True
        return self.sparsity > 0 and self.method != "magnitude"

    def _fill_in(self) -> None:
        """Set what is None to the default of the method or allocation it belongs to."""
        is_mixed = isinstance(self.pattern, MixedNM)
        defaults: dict[str, Any] = {"allocation": "owl" if self.pattern is None or is_mixed else "uniform"}
        allocation = self.allocation or defaults["allocation"]
        if is_mixed:
            defaults["half_range"] = 2.0
        elif allocation in _WITH_HALF_RANGE:
            usual = {"dlp": 0.15, "linear": _usual_slope(self.sparsity)}
            defaults["half_range"] = usual.get(allocation, 0.08)
        defaults["granularity"] = "global" if allocation == "global" else _GRANULARITY.get(self.method)
        if self.method != "magnitude":
            defaults["statistics"] = "linear" if self.method == "admm" else "block"
        if self.method == "admm":
            defaults["target"] = "layer" if self.statistics == "dense" else "dense"
        if self.method.startswith("ablate"):
            defaults["ablation"] = "seq"
        if allocation == "search":
            defaults["generations"] = 400
        if self.method in _WITH_DAMPENING:
            defaults["dampening"] = 0.3 if self.method == "admm" else 0.01
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _check_combinations(self) -> None:
        explicit = self.block_sparsities is not None or self.linear_sparsities is not None
        if (self.allocation == "explicit") != explicit:
            raise UserError("the explicit allocation takes a list of block sparsities, and only it does")
        if self.block_sparsities is not None and self.linear_sparsities is not None:
            raise UserError("give sparsities of blocks or of linears, not both")
        if isinstance(self.pattern, MixedNM):
            if self.allocation != "owl":
                raise UserError(f"pattern {self.pattern} is OWL's; leave out --allocation {self.allocation}")
        elif self.pattern is not None and self.allocation != "uniform":
            raise UserError(f"pattern {self.pattern} prunes every block alike; use --allocation uniform with it")
        if self.pattern is not None and self.method == "wanda-variant":
            raise UserError(f"wanda-variant chooses how many weights each row keeps; pattern {self.pattern} fixes that")
        if self.granularity is not None and self.method not in _GRANULARITY and self.allocation != "global":
            raise UserError(f"{self.method} has a granularity of its own; leave out --granularity")
        if self.granularity == "global" and self.allocation != "global":
            raise UserError(
                "one threshold for the whole model sets the sparsities too; use --allocation global with it"
            )
        if self.statistics is not None and self.method == "magnitude":
            raise UserError("magnitude pruning looks at no inputs; leave out --statistics")
        if self.target is not None and self.method != "admm":
            raise UserError(f"{self.method} has no target but each linear's own output; use --target with admm")
        if self.target == "dense" and self.statistics == "dense":
            raise UserError("--target dense makes up for what was pruned before; with dense statistics nothing was")
        if self.ablation is not None and not self.method.startswith("ablate"):
            raise UserError(f"{self.method} is no ablation; leave out --ablation")

    def _check_numbers(self) -> None:
        if not (math.isfinite(self.owl_m) and self.owl_m > 0):
            raise UserError(f"owl_m {self.owl_m} must be above 0")
        most = self.pattern.of if isinstance(self.pattern, MixedNM) else 1
        if self.half_range is not None and not 0 <= self.half_range < most:
            raise UserError(f"lambda {self.half_range} must be in [0, {most})")
        if self.half_range is not None and self.allocation not in _WITH_HALF_RANGE:
            raise UserError(f"the {self.allocation} allocation has no lambda; leave it out")
        if self.block_size < 1:
            raise UserError(f"block_size {self.block_size} must be at least 1")
        if self.dampening is not None and not 0 < self.dampening < math.inf:
            raise UserError(f"dampening {self.dampening} must be above 0")
        if self.dampening is not None and self.method not in _WITH_DAMPENING:
            raise UserError(f"{self.method} inverts no Hessian; leave out --percdamp")
        if self.generations is not None and self.allocation != "search":
            raise UserError(f"the {self.allocation} allocation has no generations; leave them out")
        self._check_weights()
        if self.bits is not None and (self.allocation != "search" or self.sparsity or self.weights is not None):
            raise UserError("bits are what the search allocation keeps to, in place of a sparsity and of --weights")
        if self.bits is not None and not 2 <= self.bits <= 16:
            raise UserError(f"bits {self.bits} must be from 2 to 16")
        if self.generations is not None and self.generations < 1:
            raise UserError(f"generations {self.generations} must be at least 1")
        if self.admm_steps < 1:
            raise UserError(f"admm_steps {self.admm_steps} must be at least 1")

    def _check_weights(self) -> None:
        given = [one for one in (self.weights, self.linear_weights, self.mix) if one is not None]
        if len(given) > 1:
            raise UserError("give one grid for all weights, or one for each linear, or a mix")
        if self.mix is not None and (len(self.mix) < 2 or sorted(set(self.mix), key=ROUNDED.index) != list(self.mix)):
            raise UserError(
                f"mixed-{'+'.join(self.mix)}: give two or more, the finest first, for example mixed-int4+int3"
            )
        if self.allocation == "search" and (self.mix or self.linear_weights):
            raise UserError("the search chooses weights by itself, with bits; leave out the mix, or the search")


@dataclass(frozen=True)
class BlockShare:
    """What one block is asked to give up.

    Attributes:
        sparsities: by linear.
        pattern: N:M in place of them.
        lod_percent: OWL's D of the dense block, where the allocation looked at it.
    """

    sparsities: dict[str, float]
    pattern: NM | None = None
    lod_percent: float | None = None

    @property
    def uniform(self) -> float | None:
        """The sparsity of all linears, if they share one."""
        values = set(self.sparsities.values())
        return values.pop() if len(values) == 1 else None

    def mean(self, sizes: Mapping[str, int]) -> float:
        """The sparsity of the whole block; `sizes` are the linears' numbers of weights."""
        if self.uniform is not None:
            return self.uniform
        return sum(value * sizes[name] for name, value in self.sparsities.items()) / sum(sizes.values())


def _check_sparsity(value: float, what: str) -> None:
    if not 0 <= value < 1:  # also false for NaN
        raise UserError(f"{what} {value} is out of range; give a fraction from 0 up to, not including, 1")


def _usual_slope(sparsity: float) -> float:
    """Of `linear`: what measured best of those tried with ADMM on SmolLM2-135M, and lines between."""
    return round(float(np.interp(sparsity, (0.5, 0.6, 0.7, 0.8), (0.0, 0.0725, 0.1, 0.09))), 6)


def _check_choice(what: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise UserError(f"{what} {value!r} is unknown; choose one of {', '.join(known)}")
