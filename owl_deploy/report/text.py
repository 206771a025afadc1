"""Figures of a report as people read them."""

from __future__ import annotations

from typing import Literal

from owl_deploy.benchmarking.rows import Spread
from owl_deploy.formatting import MISSING

Verdict = Literal["faster", "slower", "no different"]


def ratio(value: float | None, spread: Spread | None = None) -> str:
    """A speed-up with the spread of its rounds: 1.31x (1.28–1.35)."""
    if value is None:
        return MISSING
    rounds = f" ({spread.low:.2f}–{spread.high:.2f})" if spread else ""
    return f"{value:.2f}x{rounds}"


def verdict(speedup: float, spread: Spread | None) -> Verdict:
    """A difference counts only if the whole spread lies on one side of 1."""
    low, high = (spread.low, spread.high) if spread else (speedup, speedup)
    if low > 1:
        return "faster"
    return "slower" if high < 1 else "no different"
