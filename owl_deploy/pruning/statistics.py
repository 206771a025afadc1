"""What the calibration text says about each linear's inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from owl_deploy.errors import UserError


class LastLinearReached(Exception):
    """All inputs of a block have been seen: the rest of its forward pass can be skipped."""


class InputStatistics:
    """Means over calibration sequences of what each linear's inputs X add up to, in fp32.

    They are running means, updated in the very operations of Wanda's and SparseGPT's code: masks then equal the
    published ones bit for bit. Rounding matters, since quantised checkpoints have many nearly equal scores: plain
    sums moved SmolLM2-135M's perplexity at 70% by 1%.

    Linears fed by the same tensor (q, k and v; gate and up) share their statistics. A linear that no token
    reached (an idle expert) has none; it gets those of white inputs, so that magnitudes decide.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], *, gram: bool) -> None:
        """With `gram`, collect SparseGPT's Hessian; without, the squared norms of Wanda and OWL."""
        self._linears = linears
        self._gram = gram
        self._leader: dict[str, str] = {}
        self._means: dict[str, torch.Tensor] = {}
        self._sequences: dict[str, int] = {}
        self._calls: list[str] = []
        self._last_linear: str | None = None

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

    def mean_square(self, name: str) -> torch.Tensor:
        """`s_j`: the sum over tokens of `x_j ** 2`, over the number of sequences; [in]. Needs `gram=False`.

        Raises:
            UserError: the inputs hold NaN or infinities.
        """
        mean = self._of(name)
        return torch.ones(self._linears[name].in_features) if mean is None else mean

    def hessian(self, name: str) -> torch.Tensor:
        """`H = 2 X^T X`, over the number of sequences; [in, in]. Needs `gram=True`.

        Raises:
            UserError: the inputs hold NaN or infinities.
        """
        mean = self._of(name)
        return torch.eye(self._linears[name].in_features) if mean is None else mean

    def _of(self, name: str) -> torch.Tensor | None:
        if name not in self._leader:
            return None
        mean = self._means[self._leader[name]]
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
        """Take one sequence's inputs [tokens, in] into the running mean."""
        seen = self._sequences.get(name, 0)
        self._sequences[name] = seen + 1
        if name not in self._means:
            size = inputs.shape[1]
            self._means[name] = torch.zeros(size, size) if self._gram else torch.zeros(size)
        mean = self._means[name]
        mean *= seen / (seen + 1)
        if self._gram:
            scaled = math.sqrt(2 / (seen + 1)) * inputs.T
            mean += scaled @ scaled.T
        else:
            mean += torch.norm(inputs.T, p=2, dim=1) ** 2 / (seen + 1)
