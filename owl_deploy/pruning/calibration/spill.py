"""Sequences' activations, in memory or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from owl_deploy.models.shards import as_bytes


class Tensors(Protocol):
    """What a list of tensors can do, as far as it is needed here."""

    def append(self, tensor: torch.Tensor, /) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[torch.Tensor]: ...

    def __getitem__(self, index: int, /) -> torch.Tensor: ...

    def __setitem__(self, index: int, tensor: torch.Tensor, /) -> None: ...


class _Place(NamedTuple):
    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class SpilledTensors:
    """A list of tensors in a file without a name, which goes with the list, or with the process."""

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # open as long as the list is used
        self._places: list[_Place] = []
        self._end = 0

    def append(self, tensor: torch.Tensor, /) -> None:
        self._places.append(_Place(self._end, tensor.shape, tensor.dtype, tensor.device))
        self._end += self._write(self._end, tensor)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int, /) -> torch.Tensor:
        start, shape, dtype, device = self._places[index]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(as_bytes(tensor))
        return tensor.to(device)

    def __setitem__(self, index: int, tensor: torch.Tensor, /) -> None:
        """Put another tensor of the same shape and dtype in this one's place."""
        place = self._places[index]
        if (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"a tensor {tuple(tensor.shape)} cannot take the place of one {tuple(place.shape)}")
        self._write(place.start, tensor)

    def _write(self, start: int, tensor: torch.Tensor) -> int:
        self._file.seek(start)
        return self._file.write(as_bytes(tensor.cpu()))
