"""Several processes that train one model together, as `accelerate launch` or `torchrun` has started them.

Each holds the whole model and takes its share of every step's sequences; gradients are summed, so that all make the
same step. The first of them does all else: it reads the text, measures, saves and writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from owl_deploy.errors import CheckFailed, UserError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""How long the others wait while the first writes a text, or measures."""


@dataclass(frozen=True)
class Processes:
    """One of them, by default the only one."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def has(self, index: int) -> bool:
        """Whether this process takes a micro-batch, by its number in the step."""
        return index % self.count == self.rank

    def add_up(self, tensor: torch.Tensor) -> None:
        """Make it the sum of all processes'."""
        if self.count > 1:
            distributed.all_reduce(tensor)

    def take(self, tensor: torch.Tensor) -> None:
        """Make it the main process's."""
        if self.count > 1:
            distributed.broadcast(tensor, 0)

    def from_main(self, value: T | None) -> T | None:
        """What the main process gave to its own call; None tells the others that all is done."""
        if self.count == 1:
            return value
        told = [value]
        distributed.broadcast_object_list(told, 0, device=torch.device(self.device))
        return told[0]

    def end(self) -> None:
        """Tell the others that all is done; theirs is not heard."""
        if self.is_main:
            self.from_main(None)


ALONE = Processes()


@contextlib.contextmanager
def launched(device: str) -> Iterator[Processes]:
    """All processes of this launch, by the environment that the launcher has set; else this one alone.

    Args:
        device: where torch computes; of several processes on `cuda`, each has a GPU of its own.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device=device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=_PATIENCE)
    processes = Processes(distributed.get_rank(), count, device)
    try:
        yield processes
        processes.end()
    except (UserError, CheckFailed):  # between two steps, where the others wait to be told of the next
        processes.end()
        raise
    finally:
        distributed.destroy_process_group()
