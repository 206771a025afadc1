"""A checkpoint's tensors one at a time: read from its safetensors files, and written to new ones."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from owl_deploy.errors import UserError
from owl_deploy.files import read_json, write_json
from owl_deploy.models.load import check_weight_files
from owl_deploy.models.source import ModelSource

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Place(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """Where each tensor of a safetensors checkpoint lies."""

    def __init__(self, source: ModelSource) -> None:
        """Read the headers of all files.

        Raises:
            UserError: the model is in another format, or its files are incomplete.
        """
        files = safetensors_files(source)
        check_weight_files(source.path)
        self._places: dict[str, _Place] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    part = file.get_slice(name)
                    self._places[name] = _Place(path, tuple(part.get_shape()), part.get_dtype())

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point tensor: what transformers takes for a checkpoint whose config is silent."""
        floating = {name: dtype for dtype, name in _DTYPES.items() if dtype.is_floating_point}
        stored = (floating.get(place.dtype) for place in self._places.values())
        return next((dtype for dtype in stored if dtype is not None), torch.float32)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each of these tensors, in the order of the files; it is mapped from its file, and not for keeping."""
        inside: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            inside[self._places[name].file].append(name)
        for path, of_file in inside.items():
            with safe_open(path, framework="pt") as file:
                for name in of_file:
                    yield name, file.get_tensor(name)


def safetensors_files(source: ModelSource) -> list[Path]:
    """The files that transformers would load.

    Raises:
        UserError: they are in another format.
    """
    if not source.is_gguf and (source.path / _WHOLE).is_file():
        return [source.path / _WHOLE]
    index = source.path / INDEX
    if source.is_gguf or not index.is_file():
        kind = "a .gguf file" if source.is_gguf else "not in safetensors files"
        raise UserError(
            f"{source.name}: is {kind}, which --offload cannot read; convert it first: owl-deploy prune {source.name} "
            "--sparsity 0 -o DIR"
        )
    try:
        return [source.path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is not an index of weights; fetch the model again") from error


def write_shard(
    path: Path,
    layout: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file while holding one tensor; the same tensors always make the same bytes.

    safetensors' own writer holds all of them twice, and puts the metadata in any order.

    Args:
        layout: the tensors' names, shapes and dtypes (on any device, `meta` too).
        tensors: each of them, in any order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(layout, key=lambda name: (-layout[name].element_size(), name)):  # so that each is aligned
        start, end = end, end + layout[name].numel() * layout[name].element_size()
        dtype, shape = _DTYPES[layout[name].dtype], list(layout[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        data = file.tell()
        for name, tensor in tensors:
            file.seek(data + header[name]["data_offsets"][0])
            file.write(as_bytes(tensor.to("cpu", layout[name].dtype)))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory: the tensor itself's where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_index(directory: Path, file_of: Mapping[str, str], size_bytes: int) -> None:
    """Say which file of a sharded checkpoint holds which tensor."""
    index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(file_of.items()))}
    write_json(directory / INDEX, index)
