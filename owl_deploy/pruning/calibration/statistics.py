"""What the calibration text says about each linear's inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from owl_deploy.errors import UserError
from owl_deploy.models.structure import Linear, matrix_of

Statistic = Literal["squares", "gram", "ablation"]


class LastLinearReached(Exception):
    """All inputs that were asked for have been seen: the rest of the block's forward pass can be skipped."""


class InputStatistics:
    """Means over calibration sequences of what each linear's inputs X add up to, in fp32.

    They are running means, updated in the very operations of Wanda's and SparseGPT's code: masks then equal the
    published ones bit for bit. Rounding matters, since quantised checkpoints have many nearly equal scores: plain
    sums moved SmolLM2-135M's perplexity at 70% by 1%.

    Linears fed by the same tensor (q, k and v; gate and up) share their statistics. A linear that no token
    reached (an idle expert) has none; it gets those of white inputs, so that magnitudes decide.
    """

    def __init__(self, linears: Mapping[str, Linear], statistics: Collection[Statistic]) -> None:
        """Collect `squares` (Wanda's and OWL's), `gram` (SparseGPT's Hessian), or `ablation` (ablate-wanda's)."""
        self._linears = linears
        self._kinds = tuple(sorted(statistics))
        self._leader: dict[str, str] = {}
        self._means: dict[tuple[Statistic, str], torch.Tensor] = {}
        self._sequences: dict[str, int] = {}
        self._calls: list[str] = []
        self._last_linear: str | None = None

    @classmethod
    def known(cls, linears: Mapping[str, Linear], squares: Mapping[str, torch.Tensor]) -> InputStatistics:
        """Statistics that were collected before: `s_j` [in] by linear."""
        statistics = cls(linears, {"squares"})
        statistics._leader = {name: name for name in linears}
        statistics._means = {("squares", name): squares[name].to(linears[name].weight.device) for name in linears}
        return statistics

    @contextlib.contextmanager
    def collecting(self, *, stop_early: bool = False) -> Iterator[None]:
        """Collect from one sequence's forward pass of the block.

        With `stop_early`, the pass ends once the last linear's inputs are in; from the second sequence on, and
        only if the first ran every linear once, so that it is known which comes last.
        """
        self._stop_at = self._last_linear if stop_early else None
        self._calls = []
        self._previous: torch.Tensor | None = None
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in self._linears.items()]
        try:
            yield
        except LastLinearReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
            self._previous = None
        if sorted(self._calls) == sorted(self._linears):
            self._last_linear = self._calls[-1]

    @property
    def leaders(self) -> dict[str, str]:
        """Of each linear that was called, in order of the first call: the first one fed by the same tensor."""
        return dict(self._leader)

    def mean_square(self, name: str) -> torch.Tensor:
        """`s_j`: the sum over tokens of `x_j ** 2`, over the number of sequences; [in]. Needs `squares`.

        Raises:
            UserError: the inputs hold NaN or infinities.
        """
        return self._of("squares", name, torch.ones)

    def hessian(self, name: str) -> torch.Tensor:
        """`H = 2 X^T X`, over the number of sequences; [in, in]. Needs `gram`.

        Raises:
            UserError: the inputs hold NaN or infinities.
        """
        return self._of("gram", name, torch.eye)

    def ablation_square(self, name: str) -> torch.Tensor:
        """`s_j` as the published ablations sum it: sequence k counts 2 / k. [in]; needs `ablation`.

        Raises:
            UserError: the inputs hold NaN or infinities.
        """
        return self._of("ablation", name, torch.ones)

    def _of(self, kind: Statistic, name: str, white: Any) -> torch.Tensor:
        if name not in self._leader:
            weight = matrix_of(self._linears[name])
            idle: torch.Tensor = white(weight.shape[1], device=weight.device)
            return idle
        mean = self._means[kind, self._leader[name]]
        if not mean.isfinite().all():
            raise UserError(f"{name}: the calibration text makes its inputs NaN or infinite; check the model's weights")
        return mean

    def _hook(self, name: str) -> Any:
        def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs = arguments[0]
            if name not in self._leader:
                shared = inputs is self._previous
                self._leader[name] = self._leader[self._calls[-1]] if shared else name
            self._calls.append(name)
            self._previous = inputs
            if self._leader[name] == name:
                self._add(name, inputs.reshape(-1, inputs.shape[-1]).float())
            if name == self._stop_at:
                raise LastLinearReached

        return before

    def _add(self, name: str, inputs: torch.Tensor) -> None:
        """Take one sequence's inputs [tokens, in] into the running means."""
        seen = self._sequences.get(name, 0)
        self._sequences[name] = seen + 1
        for kind in self._kinds:
            if (kind, name) not in self._means:
                size = inputs.shape[1]
                shape = (size, size) if kind == "gram" else (size,)
                self._means[kind, name] = torch.zeros(shape, device=inputs.device)
            mean = self._means[kind, name]
            mean *= seen / (seen + 1)
            if kind == "squares":
                mean += torch.norm(inputs.T, p=2, dim=1) ** 2 / (seen + 1)
                continue
            scaled = math.sqrt(2 / (seen + 1)) * inputs.T
            if kind == "gram":
                mean += scaled @ scaled.T
            else:
                mean += torch.norm(scaled, p=2, dim=1) ** 2 / (seen + 1)
