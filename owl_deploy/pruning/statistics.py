"""What the calibration text says about each linear's inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class LastLinearReached(Exception):
    """All inputs of a block have been seen: the rest of its forward pass can be skipped."""


class InputStatistics:
    """Sums over calibration tokens of each linear's inputs X, in fp32, per sequence.

    Linears fed by the same tensor (q, k and v; gate and up) share one set of sums. A linear that no token
    reached (an idle expert) has no statistics; it gets those of white inputs, so that magnitudes decide.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], *, gram: bool) -> None:
        """With `gram`, collect `X^T X` (SparseGPT); without, only its diagonal (Wanda, LOD)."""
        self._linears = linears
        self._gram = gram
        self._leader: dict[str, str] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._sequences = 0
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
        self._sequences += 1

    def mean_square(self, name: str) -> torch.Tensor:
        """`s_j`: the sum over tokens of `x_j ** 2`, over the number of sequences; [in]."""
        sums = self._of(name)
        if sums is None:
            return torch.ones(self._linears[name].in_features)
        return (sums.diagonal() if self._gram else sums) / self._sequences

    def hessian(self, name: str) -> torch.Tensor:
        """`H = 2 X^T X`, over the number of sequences; [in, in]. Needs `gram`."""
        sums = self._of(name)
        return torch.eye(self._linears[name].in_features) if sums is None else 2 * sums / self._sequences

    def _of(self, name: str) -> torch.Tensor | None:
        return self._sums[self._leader[name]] if name in self._leader else None

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
        update = inputs.T @ inputs if self._gram else inputs.square().sum(dim=0)
        if name in self._sums:
            self._sums[name] += update
        else:
            self._sums[name] = update
