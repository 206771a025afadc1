"""What the CPU's packages have taken, by the counters of Linux's powercap (Intel's and AMD's RAPL)."""

from __future__ import annotations

from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


def cpu_energy_uj(powercap: Path = _POWERCAP) -> list[int] | None:
    """Microjoules counted so far, package by package; None where there are no counters or they may not be read."""
    try:
        # Packages are intel-rapl:0, :1 …; their parts, such as intel-rapl:0:0, are counted in them.
        packages = [path for path in sorted(powercap.glob("intel-rapl:*")) if path.name.count(":") == 1]
        return [int((path / "energy_uj").read_text()) for path in packages] or None
    except OSError:
        return None
