"""Levels of sparsity, as the command line lists them."""

from __future__ import annotations

from owl_deploy.errors import UserError

_MOST_LEVELS = 100


def parse_sparsities(text: str) -> list[float]:
    """`0:0.9:0.1` (first, last, step; both ends included) or `0,0.5,0.7` -> ascending fractions.

    Raises:
        UserError: not such a list, or a sparsity out of [0, 1).
    """
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            if not (step > 0 and last >= first and (last - first) / step < _MOST_LEVELS):
                raise ValueError
            count = int((last - first) / step + 1e-9) + 1
            levels = [round(first + index * step, 9) for index in range(count)]
        else:
            levels = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--sparsities {text}: give FIRST:LAST:STEP, for example 0:0.9:0.1, or a list 0,0.5,0.7"
        ) from None
    if not all(0 <= level < 1 for level in levels):
        raise UserError(f"--sparsities {text}: sparsities go from 0 up to, not including, 1")
    return sorted(set(levels))
