"""What this CPU can do, for engines that do not say it themselves."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

Widest = Literal["amx", "avx512_vnni", "avx512"]
"""VNNI and AMX multiply integers, AMX also bf16: products of fp32 end with AVX-512."""

# The widest vector instruction sets first, by their flag in /proc/cpuinfo.
_INSTRUCTION_SETS = (
    ("amx_tile", "amx"),
    ("avx512_vnni", "avx512_vnni"),
    ("avx512f", "avx512"),
    ("avx2", "avx2"),
    ("asimd", "neon"),
)


def cpu_flags() -> frozenset[str]:
    """The feature flags of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    lines = path.read_text().splitlines()
    flags = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(flags, "").split())


def instruction_sets() -> list[str]:
    """Those vector instruction sets of this CPU that matter to engines, the widest first."""
    flags = cpu_flags()
    return [name for flag, name in _INSTRUCTION_SETS if flag in flags]


def instruction_set(widest: Widest = "amx") -> str:
    """The widest instruction set of this CPU that is no wider than `widest`, the widest a program has kernels for."""
    names = [name for _, name in _INSTRUCTION_SETS]
    usable = names[names.index(widest) :]
    return next((name for name in instruction_sets() if name in usable), platform.machine())
