"""The shared library of packed matrices, called through ctypes.

Imports nothing but numpy: engines' worker processes import it too, under interpreters of their own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from owl_deploy.errors import UserError
from owl_deploy.sparse.formats import FORMATS

_PATH = Path(__file__).with_name("libowl_sparse.so")
_ABI = 4  # kOwlAbi in library.h
_ALIGNMENT = 64
_PAIRED, _ROWS = 7, 8  # offsets in the header; the columns follow the rows


def library_path() -> Path:
    """Where the library is. UserError if owl-deploy was installed without it."""
    if not _PATH.is_file():
        raise UserError(
            f"{_PATH} is missing: there was no working C++20 compiler when owl-deploy was installed. Install g++ 11 "
            "or newer, then owl-deploy again; `pip install -v` shows what the compiler says"
        )
    return _PATH


def library_sha256() -> str | None:
    """SHA-256 of the library, which differs between builds of the kernels; None if it is missing."""
    return hashlib.sha256(_PATH.read_bytes()).hexdigest() if _PATH.is_file() else None


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets with kernels that this CPU can run, best first."""
    names: bytes = _library().owl_instruction_sets()
    return tuple(names.decode().split(","))


def pack(weights: NDArray[np.float32], format: str, paired: bool = False) -> NDArray[np.uint8]:
    """`weights` [rows, columns] in the format of this name. ValueError if it cannot hold them.

    Paired: the first half of the rows is a gate, the second what it lets through, and a product is silu(gate) * up.
    """
    if format not in FORMATS:
        raise ValueError(f"no weight format {format!r}; there are {', '.join(FORMATS)}")
    if weights.ndim != 2:
        raise ValueError(f"a matrix is needed, not an array of shape {weights.shape}")
    library = _library()
    dense = np.ascontiguousarray(weights, np.float32)
    arguments = (dense.ctypes.data, *dense.shape, FORMATS[format], paired)
    most = _checked(library.owl_pack(*arguments, None, 0))
    packed = _aligned_empty(most)  # what is not written to takes no memory
    written = _checked(library.owl_pack(*arguments, packed.ctypes.data, most))
    return packed[:written]


def check(data: NDArray[np.uint8]) -> None:
    """ValueError if the bytes are not a sound packed matrix."""
    _check(aligned(data))


def unpack(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The weights [rows, columns] as the kernels use them."""
    return _unpack(data, None)


def unpack_with_mask(data: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The weights [rows, columns] as the kernels use them, and which of them are stored."""
    data = aligned(data)
    mask = np.empty(_check(data)[:2], np.bool_)
    return _unpack(data, mask), mask


def _unpack(data: NDArray[np.uint8], mask: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    data = aligned(data)
    weights = np.empty(_check(data)[:2], np.float32)
    stored = None if mask is None else mask.ctypes.data
    _checked(_library().owl_unpack(data.ctypes.data, data.size, weights.ctypes.data, stored))
    return weights


def product(
    data: NDArray[np.uint8], x: NDArray[np.float32], kernels: str | None = None, threads: int = 1, repeats: int = 1
) -> tuple[NDArray[np.float32], int]:
    """`x` [tokens, columns] times the transposed matrix, and the nanoseconds that all `repeats` of it took.

    `kernels` is one of `instruction_sets()`, by default the best.
    """
    data = aligned(data)
    rows, columns, outputs = _check(data)
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x of shape {x.shape} does not go with a matrix of {rows} x {columns}")
    if threads < 1 or repeats < 1:
        raise ValueError("threads and repeats must be at least 1")
    x = np.ascontiguousarray(x, np.float32)
    y = np.empty((len(x), outputs), np.float32)
    name = None if kernels is None else kernels.encode()
    nanoseconds = _checked(
        _library().owl_product(
            data.ctypes.data, data.size, x.ctypes.data, y.ctypes.data, len(x), name, threads, repeats
        )
    )
    return y, nanoseconds


def aligned(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same bytes where the kernels can read them; copied only if they lie elsewhere."""
    if data.dtype != np.uint8:
        raise TypeError(f"packed matrices are bytes, not {data.dtype}")
    if data.ndim == 1 and data.flags.c_contiguous and data.ctypes.data % _ALIGNMENT == 0:
        return data
    copy = _aligned_empty(data.size)
    copy[:] = data.reshape(-1)
    return copy


def _aligned_empty(size: int) -> NDArray[np.uint8]:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]


def _check(data: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Rows, columns, and outputs, of a matrix that is sound."""
    _checked(_library().owl_check(data.ctypes.data, data.size))
    rows, columns = (int(value) for value in data[_ROWS : _ROWS + 8].view("<u4"))
    return rows, columns, rows // 2 if data[_PAIRED] else rows


def _checked(result: int) -> int:
    if result < 0:
        message: bytes = _library().owl_error()
        raise ValueError(message.decode())
    return result


def _library() -> ctypes.CDLL:
    return _load(library_path())


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        found = int(library.owl_abi())
    except (OSError, AttributeError) as error:
        raise UserError(f"the sparse engine's library does not load; install owl-deploy again ({error})") from error
    if found != _ABI:  # as after an update of a checkout
        raise UserError(f"{path} has interface {found} where {_ABI} is needed: install owl-deploy again")

    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.owl_instruction_sets.argtypes = []
    library.owl_instruction_sets.restype = ctypes.c_char_p
    library.owl_pack.argtypes = [pointer, size, size, ctypes.c_int, ctypes.c_int, pointer, size]
    library.owl_pack.restype = size
    library.owl_check.argtypes = [pointer, size]
    library.owl_check.restype = ctypes.c_int
    library.owl_unpack.argtypes = [pointer, size, pointer, pointer]
    library.owl_unpack.restype = ctypes.c_int
    library.owl_product.argtypes = [
        pointer, size, pointer, pointer, size, ctypes.c_char_p, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    library.owl_product.restype = size
    library.owl_error.argtypes = []
    library.owl_error.restype = ctypes.c_char_p
    return library
