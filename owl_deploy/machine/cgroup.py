"""What this process's control groups allow it: the limits of a container, or of a systemd service. Versions 2 and 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_NO_LIMIT_BYTES = 2**60  # version 1 has a number near 2**63 where there is no limit


def container_cores(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> float | None:
    """Cores' worth of time that this process may use; None where it is not limited."""
    return min(_limits("cpu", _cores, mount, membership), default=None)


def container_memory_bytes(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> int | None:
    """Memory that this process may use; None where it is not limited."""
    smallest = min(_limits("memory", _memory_bytes, mount, membership), default=None)
    return None if smallest is None else int(smallest)


def _limits(controller: str, limit: Callable[[Path], float | None], mount: Path, membership: Path) -> Iterator[float]:
    """The limits of this process's group and of every group around it: the tightest holds."""
    for line in (_text(membership) or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mount / controller if controllers else mount
        # In a container, the path may be the host's and lead nowhere: the container's own group is then at the top.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (found := limit(folder)) is not None:
                yield found


def _cores(group: Path) -> float | None:
    if (both := _text(group / "cpu.max")) is not None:
        quota, _, period = both.partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    if quota_us is None or period_us is None or int(quota_us) < 0:
        return None
    return int(quota_us) / int(period_us)


def _memory_bytes(group: Path) -> float | None:
    limit = _text(group / "memory.max") or _text(group / "memory.limit_in_bytes") or "max"
    return None if limit == "max" or int(limit) >= _NO_LIMIT_BYTES else int(limit)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
