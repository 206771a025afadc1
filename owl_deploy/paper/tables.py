"""The OWL paper's figures that a study stands beside.

Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv:2310.05175; the table is named above
each. Perplexities are those of WikiText, 2048 tokens a window, calibrated on 128 x 2048 tokens of C4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

LLAMA_7B = "LLaMA-7B"
LLAMA_13B = "LLaMA-13B"
DENSE_7B = 5.68
DENSE_13B = 5.09

Key = TypeVar("Key")

# Table 1, at 70%: perplexity by method and allocation.
TABLE_1: dict[tuple[str, str], float] = {
    ("magnitude", "uniform"): 48419.12,
    ("wanda", "uniform"): 85.77,
    ("wanda", "owl"): 24.55,
    ("sparsegpt", "uniform"): 26.30,
    ("sparsegpt", "owl"): 19.49,
}

# Table 2, LLaMA-13B, M 7: LOD summed over blocks, and perplexity, by method and sparsity.
TABLE_2_M = 7.0
TABLE_2_DENSE_LOD = 5.432
TABLE_2: dict[tuple[str, float], tuple[float, float]] = {
    ("wanda", 0.7): (5.716, 55.900),
    ("sparsegpt", 0.7): (6.645, 19.235),
    ("magnitude", 0.7): (5.322, 84539.445),
    ("wanda", 0.6): (5.433, 8.761),
    ("sparsegpt", 0.6): (6.044, 8.458),
    ("magnitude", 0.6): (5.322, 229.451),
}

# Table 3, at 10% to 70%: perplexity by method and granularity. The paper's "output balanced" is by row.
TABLE_3: dict[tuple[str, str], tuple[float, ...]] = {
    ("wanda", "row"): (5.697, 5.817, 5.999, 6.388, 7.260, 10, 86),
    ("wanda", "layer"): (5.695, 5.819, 6.029, 6.572, 7.942, 20, 238),
    ("wanda", "global"): (14.117, 3134, 10293, 10762, 14848, 17765, 5147),
    ("magnitude", "row"): (5.803, 6.018, 6.622, 8.041, 13.349, 152, 25304),
    ("magnitude", "layer"): (5.806, 6.020, 6.669, 8.601, 17.287, 559, 48419),
    ("magnitude", "global"): (5.821, 6.111, 7.012, 9.825, 48.627, 38335, 29283),
}

# Table 4, at 10% to 80%, Wanda: perplexity by allocation.
TABLE_4: dict[str, tuple[float, ...]] = {
    "global": (14.11, 3134, 10293, 10762, 14848, 17765, 5147, 39918.56),
    "er-plus": (5.70, 5.82, 6.05, 6.62, 8.00, 14.04, 229.17, 6013.91),
    "erdos-renyi": (5.69, 5.80, 6.02, 6.55, 7.74, 12.16, 112.03, 11151.18),
    "uniform": (5.69, 5.81, 5.99, 6.38, 7.26, 10.70, 85.77, 3499.88),
    "owl-inverse": (5.72, 5.83, 6.04, 6.51, 8.03, 26.05, 822.23, 9616.08),
    "owl": (5.70, 5.80, 6.01, 6.39, 7.22, 9.35, 24.54, 1002.87),
}

# Table 5, at 70%, LLaMA-7B: accuracy (%) at seven zero-shot tasks, by method and allocation; and of the dense model.
TABLE_5_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TABLE_5_DENSE: tuple[float, ...] = (75.14, 66.43, 74.80, 70.01, 67.67, 41.38, 41.40)
TABLE_5: dict[tuple[str, str], tuple[float, ...]] = {
    ("magnitude", "uniform"): (38.29, 52.71, 24.68, 51.46, 26.98, 22.35, 25.80),
    ("wanda", "uniform"): (55.11, 57.40, 31.83, 51.38, 34.22, 19.80, 26.00),
    ("wanda", "owl"): (62.48, 58.48, 44.79, 58.72, 45.03, 26.19, 29.60),
    ("sparsegpt", "uniform"): (64.53, 53.79, 42.11, 58.64, 43.06, 24.57, 27.80),
    ("sparsegpt", "owl"): (67.13, 53.43, 48.56, 62.03, 45.41, 27.65, 32.00),
}

# Table 6, at 70%, SparseGPT with OWL: perplexity before and after LoRA on C4, whose adapter is not merged.
TABLE_6_SETTING = 0.7
TABLE_6: dict[str, tuple[float, float]] = {LLAMA_7B: (19.49, 11.15), LLAMA_13B: (14.55, 9.0)}

# Table 7: seconds for the pruning metric without forward passes, LLaMA-7B, NVIDIA A100.
TABLE_7: dict[tuple[str, str], float] = {
    ("sparsegpt", "uniform"): 266,
    ("sparsegpt", "owl"): 268,
    ("wanda", "uniform"): 0.3,
    ("wanda", "owl"): 0.3,
}

# Table 10, Wanda, by how many of 8 weights are kept: perplexity of uniform N:8, and of mixed N:8 by OWL.
TABLE_10: dict[int, tuple[float, float]] = {4: (8.57, 8.55), 3: (42.56, 21.49), 2: (2962.00, 331.37)}

# Table 12, LLaMA-7B, by widths in bits: perplexity of one width, and of mixes by how their blocks were chosen.
TABLE_12_SAME: dict[tuple[int, ...], float] = {(4,): 6.29, (3,): 25.82, (2,): 104151.84}
TABLE_12: dict[tuple[int, ...], dict[str, float]] = {
    (4, 3): {"random": 12.04, "l1": 14.61, "owl": 9.09},
    (4, 3, 2): {"random": 11455.54, "l1": 13959.422, "owl": 190.28},
    (4, 2): {"random": 14817.12, "l1": 33670.214, "owl": 7505.60},
}

# Tables 13 and 14, at 70%, OWL with Wanda. Their captions are swapped: in Table 13 the linears of a block share one
# sparsity, in Table 14 they do not. The perplexities are those of the text (appendix F).
TABLES_13_14: dict[str, float] = {"owl": 24.55, "owl-per-layer": 86.285}


def at_tenth(table: Mapping[Key, Sequence[float]], key: Key, sparsity: float) -> float | None:
    """A figure of a table whose columns are 10%, 20%, ...; None where the paper has none: nothing is interpolated."""
    tenths = round(10 * sparsity)
    row = table.get(key, ())
    return row[tenths - 1] if abs(10 * sparsity - tenths) < 1e-6 and 1 <= tenths <= len(row) else None
