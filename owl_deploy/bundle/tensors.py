"""Tensors between files: read one at a time from a checkpoint, appended one at a time to ONNX external data."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from owl_deploy.errors import UserError
from owl_deploy.files import read_json

_PAGE_BYTES = 4096
_STRIP = 128  # rows that are transposed together: their part of a column lies in the cache


class CheckpointTensors:
    """The tensors of a Hugging Face directory, by name; nothing is read before it is asked for.

    Raises:
        UserError: the directory holds no safetensors files.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._file_of: dict[str, Any] = {}
        for path in _safetensors_files(checkpoint):
            # Memory-mapped, and unmapped with the last reference to it.
            file = safe_open(path, framework="pt")
            self._file_of.update(dict.fromkeys(_names(file), file))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor in fp32, whatever it is stored as.

        Raises:
            UserError: the checkpoint has no such tensor.
        """
        if name not in self:
            raise UserError(f"{self._checkpoint}: tensor {name} is missing; the checkpoint does not match its config")
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return np.asarray(tensor.to(torch.float32).numpy(), np.float32)


def _names(file: Any) -> list[str]:
    return list(file.keys())


def _safetensors_files(checkpoint: Path) -> list[Path]:
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        return [checkpoint / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    single = checkpoint / "model.safetensors"
    if not single.exists():
        raise UserError(f"{checkpoint}: no model.safetensors; save the model with save_pretrained")
    return [single]


def transposed(*matrices: NDArray[np.float32]) -> NDArray[np.float32]:
    """Matrices [in, out] as one [sum of out, in], in a third of the time of numpy's own copy."""
    rows = len(matrices[0])
    result = np.empty((sum(matrix.shape[1] for matrix in matrices), rows), np.float32)
    first = 0
    for matrix in matrices:
        part = result[first : first + matrix.shape[1]]
        for row in range(0, rows, _STRIP):
            part[:, row : row + _STRIP] = matrix[row : row + _STRIP].T
        first += matrix.shape[1]
    return result


def external_array(graph: Path, tensor: onnx.TensorProto) -> NDArray[Any]:
    """The values of one of `graph`'s initializers; those that lie in a file beside it are mapped, not read.

    Raises:
        UserError: see `external_place`.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    path, offset = external_place(graph, tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(path, dtype, "r", offset, tuple(tensor.dims))


def external_place(graph: Path, tensor: onnx.TensorProto) -> tuple[Path, int]:
    """The file that holds one of `graph`'s initializers, and at which byte.

    Raises:
        UserError: it is not a file in the graph's own folder, or the values do not lie within it. A graph may come from
            anywhere, and must not have other files of the user read.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "")
    path = graph.parent / location
    folder = graph.parent.resolve()
    if not location or Path(location).is_absolute() or path.resolve().parent != folder:
        raise UserError(f"{graph}: {tensor.name} is said to lie in {location!r}, which is not a file beside the graph")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    needed = math.prod(tensor.dims) * dtype.itemsize
    numbers = [place.get("offset", "0"), place.get("length", str(needed))]
    offset, length = (int(number) if number.isascii() and number.isdecimal() else -1 for number in numbers)
    if offset < 0 or length != needed or not path.is_file() or offset + needed > path.stat().st_size:
        raise UserError(f"{graph}: {tensor.name} does not lie within {path.name}; export the model again")
    return path, offset


class ExternalData:
    """Appends tensors to one ONNX external-data file, each on a page of its own so that it can be mapped.

    Use it as a context manager. The file has to lie next to the model that refers to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> ExternalData:
        self._file: IO[bytes] = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, values: NDArray[Any]) -> onnx.TensorProto:
        """Write `values` and return the initializer that refers to them."""
        start = -(-self._file.tell() // _PAGE_BYTES) * _PAGE_BYTES
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(values).data)
        tensor = onnx.TensorProto(
            name=name,
            dims=values.shape,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", self._path.name), ("offset", start), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
