"""The machine a row was measured on: described once, measured where it can be."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from pydantic import Field

from owl_deploy.machine.cgroup import container_cores, container_memory_bytes
from owl_deploy.machine.cpu import instruction_set, instruction_sets
from owl_deploy.machine.threads import available_cores
from owl_deploy.records import Record

MEMORY_SET_BYTES = 512 * 2**20  # past most caches
_NUMA = Path("/sys/devices/system/node")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_READS, _READ_BYTES = 7, 4 * 2**30  # passes: so many, and more of a small set
_ROW = 4096  # fp32 numbers, times a vector that stays in the first cache
_SMALLEST_SET_BYTES = 8 * 2**20  # below, what a call costs would count


class Machine(Record):
    """Where a row was measured."""

    cpu: str
    """As the system names it."""
    cores: int
    """How many cores the process could keep busy."""
    instruction_set: str
    """The widest that the CPU has."""
    memory_bytes: int
    """Of the whole machine."""
    memory_bandwidth_gb_s: float
    """Reading, with as many threads as the row, in GB (1e9 bytes) a second."""
    system: str
    """The operating system and its version."""
    memory_bandwidth_one_thread_gb_s: float | None = None
    """The same with one thread."""
    memory_bandwidth_all_threads_gb_s: float | None = None
    """The same with one thread on every core."""
    instruction_sets: list[str] = Field(default_factory=list)
    """What the CPU has of the instruction sets that matter here, the widest first."""
    numa_nodes: int | None = None
    """Parts of the memory, each near some of the cores; null where the system does not tell."""
    frequency_governor: str | None = None
    """Of the first core; null where the system does not tell."""
    container_cores: float | None = None
    """Cores' time that its control group allows; null for no limit."""
    container_memory_bytes: int | None = None
    """Memory that its control group allows; null for no limit."""


def describe_machine(threads: int) -> Machine:
    """This machine, with the memory bandwidth that `threads` threads reach."""
    bandwidth_gb_s = {count: read_bandwidth_gb_s(count) for count in {threads, 1, available_cores()}}
    return Machine(
        cpu=cpu_model(),
        cores=available_cores(),
        instruction_set=instruction_set(),
        memory_bytes=psutil.virtual_memory().total,
        memory_bandwidth_gb_s=bandwidth_gb_s[threads],
        system=f"{platform.system()} {platform.release()}",
        memory_bandwidth_one_thread_gb_s=bandwidth_gb_s[1],
        memory_bandwidth_all_threads_gb_s=bandwidth_gb_s[available_cores()],
        instruction_sets=instruction_sets(),
        numa_nodes=len(list(_NUMA.glob("node[0-9]*"))) or None,
        frequency_governor=_GOVERNOR.read_text().strip() if _GOVERNOR.is_file() else None,
        container_cores=container_cores(),
        container_memory_bytes=container_memory_bytes(),
    )


def cpu_model() -> str:
    """The CPU's name, as the kernel tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache that the first core reads through; None where the system does not tell."""
    sizes = [_cache_bytes(path.read_text().strip()) for path in _CACHES.glob("index*/size")]
    return max((size for size in sizes if size is not None), default=None)


def _cache_bytes(text: str) -> int | None:
    """The kernel's `107520K` in bytes."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = text[:-1], text[-1:]
    return int(number) * units[unit] if number.isdecimal() and unit in units else None


def read_bandwidth_gb_s(threads: int, set_bytes: int = MEMORY_SET_BYTES) -> float:
    """The fastest that `threads` threads read a set of this size again and again, GB (1e9 bytes) a second.

    A set that fits a cache is read from there. Two readers compete, a sum and a product with a vector, for neither is
    the faster one on every CPU. Of several passes the fastest counts, as in STREAM: the others had less of the machine.
    """
    rows = math.ceil(max(set_bytes, _SMALLEST_SET_BYTES) / (4 * _ROW))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data, vector = torch.ones(rows, _ROW), torch.ones(_ROW)
        readers: tuple[Callable[[], object], ...] = (data.sum, lambda: data @ vector)
        passes = max(_READS, _READ_BYTES // data.nbytes)
        fastest_s = min(_seconds(read) for read in readers for _ in range(passes))
    finally:
        torch.set_num_threads(before)
    return data.nbytes / fastest_s / 1e9


def _seconds(read: Callable[[], object]) -> float:
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def busy_cores(seconds: float) -> float:
    """Cores that were kept busy during the next `seconds`, by whatever runs on this machine."""
    share: float = psutil.cpu_percent(interval=seconds) / 100
    return share * (psutil.cpu_count() or 1)


def load_average() -> float:
    """The 1-minute load average; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
