"""How many cores there are, and work on all of them that numpy and ctypes do without Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`make` of every item, in order, on all cores; few results wait to be taken."""
    workers = available_cores()
    rest = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[Made]] = [pool.submit(make, item) for item in islice(rest, workers + 1)]
        while waiting:
            yield waiting.pop(0).result()
            waiting.extend(pool.submit(make, item) for item in islice(rest, 1))
