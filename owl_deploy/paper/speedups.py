"""The OWL paper's Table 8: the speed-ups that this project sets out to meet.

Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv:2310.05175, appendix C, Table 8:
end-to-end decode latency of TinyLlama-1.1B-Chat, pruned with OWL, in DeepSparse on an Intel Xeon Platinum 8360Y
(36 cores). The paper tells neither prompt length, precision nor version. Figures that could not be read are None.
"""

from __future__ import annotations

from typing import NamedTuple

PAPER_SETTING = "TinyLlama-1.1B-Chat, DeepSparse, 36-core Xeon Platinum 8360Y"
_TOLERANCE = 1e-6


class PaperFigure(NamedTuple):
    """One column of Table 8."""

    sparsity: float
    speedup: float
    latency_ms: float | None = None
    tokens_per_s: float | None = None


TABLE_8 = (
    PaperFigure(0.0, 1.00, latency_ms=39.95),
    PaperFigure(0.1, 1.00),
    PaperFigure(0.2, 1.00),
    PaperFigure(0.3, 1.01, latency_ms=39.74),
    PaperFigure(0.4, 1.25),
    PaperFigure(0.5, 1.67),
    PaperFigure(0.6, 1.81),
    PaperFigure(0.7, 2.00, tokens_per_s=49.66),
    PaperFigure(0.8, 2.37),
    PaperFigure(0.9, 2.78, latency_ms=14.36, tokens_per_s=69.39),
)


def paper_speedup(sparsity_asked: float | None) -> float | None:
    """The paper's speed-up at exactly this sparsity; None at any other, as nothing is interpolated."""
    if sparsity_asked is None:
        return None
    return next((row.speedup for row in TABLE_8 if abs(row.sparsity - sparsity_asked) <= _TOLERANCE), None)
