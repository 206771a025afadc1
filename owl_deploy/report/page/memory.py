"""How near each row comes to what the machine's memory allows, and how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass

from owl_deploy.benchmarking.rows import Row

_BYTES_PER_MS = 1e6  # at 1 GB/s


@dataclass(frozen=True)
class MemoryFigures:
    """Reading the whole graph file for every token, against what the memory was measured to deliver.

    Attributes:
        gb_s: file bytes over the time of a token. A token reads less than the file where this holds tables of which
            it needs one row, so this is an upper estimate; the KV cache, which it reads as well, is left out.
        share: of the measured bandwidth; it may exceed 1 where the estimate is too high, or caches hold the weights.
    """

    gb_s: float
    share: float


def memory_figures(row: Row) -> MemoryFigures | None:
    """None where the row has no decode time."""
    if not row.decode_ms_p50:
        return None
    gb_s = row.file_bytes / row.decode_ms_p50 / _BYTES_PER_MS
    return MemoryFigures(gb_s, gb_s / row.machine.memory_bandwidth_gb_s)
