"""The machine a row was measured on: described once, measured where it can be."""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path

import psutil
import torch

from owl_deploy.bench.rows import Machine
from owl_deploy.engines.cpu import instruction_set

_READ_BYTES = 512 * 2**20  # well past any cache
_READS = 7


def describe_machine(threads: int) -> Machine:
    """This machine, with the memory bandwidth that `threads` threads reach."""
    return Machine(
        cpu=cpu_model(),
        cores=available_cores(),
        instruction_set=instruction_set(),
        memory_bytes=psutil.virtual_memory().total,
        memory_bandwidth_gb_s=read_bandwidth_gb_s(threads),
        system=f"{platform.system()} {platform.release()}",
    )


def cpu_model() -> str:
    """The CPU's name, as the kernel tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth_gb_s(threads: int) -> float:
    """Median rate of summing a 512 MiB array, GB (1e9 bytes) a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(_READ_BYTES // 4)
        rates = []
        for _ in range(_READS):
            start = time.perf_counter()
            data.sum()
            rates.append(_READ_BYTES / (time.perf_counter() - start) / 1e9)
    finally:
        torch.set_num_threads(before)
    return statistics.median(rates)


def busy_cores(seconds: float) -> float:
    """Cores that were kept busy during the next `seconds`, by whatever runs on this machine."""
    share: float = psutil.cpu_percent(interval=seconds) / 100
    return share * (psutil.cpu_count() or 1)


def load_average() -> float:
    """The 1-minute load average; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
