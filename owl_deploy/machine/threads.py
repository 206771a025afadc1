"""How many cores there are, and work on all of them that numpy and ctypes do without Python's lock."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from owl_deploy.machine.cgroup import container_cores

Item = TypeVar("Item")
Made = TypeVar("Made")


def available_cores() -> int:
    """Cores this process may keep busy: those it may run on, or as many as its control group gives it time for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = container_cores()
    return cores if quota is None else min(cores, max(1, math.ceil(quota)))


def in_order(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`make` of every item, in order, on all cores; few results wait to be taken."""
    workers = available_cores()
    rest = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[Made]] = [pool.submit(make, item) for item in islice(rest, workers + 1)]
        while waiting:
            yield waiting.pop(0).result()
            waiting.extend(pool.submit(make, item) for item in islice(rest, 1))
