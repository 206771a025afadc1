"""Is a bundle's file the one that `bundle.json` describes? Hashed once, and remembered until the file changes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from owl_deploy.bundle.manifest import FileRecord
from owl_deploy.bundle.names import CACHE_BITS, CACHE_SCALES, CACHES
from owl_deploy.bundle.tensors import external_place
from owl_deploy.errors import UserError
from owl_deploy.files import cache_directory, sha256, write_text

_REMEMBERED = 4096  # files; the oldest are forgotten first


def verify_files(bundle: Path, files: Iterable[FileRecord]) -> None:
    """Refuse files of a bundle that were cut short, replaced or damaged, and graphs that point out of their folder.

    Raises:
        UserError: a file is missing or not what it was; it is named.
    """
    hashes = _read_hashes()
    known = dict(hashes)
    for file in files:
        path = bundle / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise UserError(f"{path}: not the file that bundle.json describes; export the model again")
        identity = _identity(path)
        if identity not in hashes:
            hashes[identity] = sha256(path)
        if hashes[identity] != file.sha256:
            raise UserError(f"{path}: its contents are not those that bundle.json describes; export the model again")
        if path.suffix == ".onnx":
            _check_graph(path)
    if hashes != known:
        _remember(hashes)


def _check_graph(graph: Path) -> None:
    """
    Raises:
        UserError: a weight of the graph lies elsewhere than in the graph's own folder, or an 8-bit cache has no scales.
    """
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except DecodeError:
        return  # the engine will say that it cannot load it
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            external_place(graph, tensor)
    check_cache_scales(graph, model)


def check_cache_scales(graph: Path, model: onnx.ModelProto) -> None:
    """See that each 8-bit cache of keys or values has its scales, one for each channel of each head.

    Raises:
        UserError: one has none, or of another shape than the cache's.
    """
    scales = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    caches = {value.name: value.type.tensor_type for value in model.graph.input}
    for node in model.graph.node:
        if all(attribute.name != CACHE_BITS for attribute in node.attribute):
            continue
        for past, scale in zip_longest(node.input[CACHES], node.input[CACHE_SCALES]):
            _, heads, _, channels = (dimension.dim_value for dimension in caches[past].shape.dim)
            found = scales.get(scale)
            if found != [1, heads, 1, channels]:
                wrong = f"has scales of shape {found}, not {[1, heads, 1, channels]}"
                what = "has no scales" if found is None else wrong
                raise UserError(f"{graph}: the 8-bit cache {past} {what}; export the model again")


def _identity(path: Path) -> str:
    """Another one for another file, and for the same file after it was written to."""
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _cache() -> Path:
    return cache_directory() / "hashes.json"


def _read_hashes() -> dict[str, str]:
    """What earlier calls have computed, by identity; nothing where that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        hashes = json.loads(_cache().read_text(encoding="utf-8"))
        if isinstance(hashes, dict):
            return hashes
    return {}


def _remember(hashes: dict[str, str]) -> None:
    """Keep them for later calls, if there is a place where that can be done."""
    with contextlib.suppress(OSError, UserError):
        _cache().parent.mkdir(parents=True, exist_ok=True)
        write_text(_cache(), json.dumps(dict(list(hashes.items())[-_REMEMBERED:])))
