"""Figures as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "–"


def perplexity_text(perplexity: float | None) -> str:
    """12.34, 123.4, 26.0k, 1.2e6, inf."""
    if perplexity is None:
        return MISSING
    if not math.isfinite(perplexity):
        return str(perplexity)
    if perplexity < 99.995:
        return f"{perplexity:.2f}"
    if perplexity < 999.95:
        return f"{perplexity:.1f}"
    if perplexity < 999_950:
        return f"{perplexity / 1000:.1f}k"
    mantissa, exponent = f"{perplexity:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def number(value: float | None) -> str:
    """Three significant digits, all digits before the point: 0.12, 3.21, 45.6, 1234."""
    if value is None:
        return MISSING
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def percent(fraction: float) -> str:
    """0.5 -> 50%, 0.625 -> 62.5%."""
    return f"{100 * fraction:.4g}%"


def size(count: int | None) -> str:
    """Bytes in MiB, or in GiB from there on."""
    if count is None:
        return MISSING
    return f"{number(count / 2**20)} MiB" if count < 2**30 else f"{number(count / 2**30)} GiB"


def one_line(text: str, limit: int) -> str:
    """`text` with its line breaks as spaces, cut to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1].rstrip()}…"


def enumeration(items: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def escaped(text: str) -> str:
    """Text that Markdown would otherwise take for HTML or for the end of a table's cell."""
    return text.replace("<", "&lt;").replace("|", "\\|")
