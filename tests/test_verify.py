"""A bundle's files are hashed once, damage is named, and a graph reads no files but those of its own folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from owl_deploy.bundle import verify
from owl_deploy.bundle.manifest import FileRecord
from owl_deploy.bundle.tensors import external_array
from owl_deploy.bundle.verify import verify_files
from owl_deploy.errors import UserError
from owl_deploy.files import sha256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "owl-deploy" / "hashes.json"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were hashed, as they are."""
    paths: list[Path] = []

    def watched(path: Path) -> str:
        paths.append(path)
        return sha256(path)

    monkeypatch.setattr(verify, "sha256", watched)
    return paths


def described(bundle: Path, name: str, content: bytes) -> FileRecord:
    (bundle / name).write_bytes(content)
    return FileRecord(path=name, bytes=len(content), sha256=sha256(bundle / name))


def test_a_file_is_hashed_once_and_again_when_it_was_written_to(
    tmp_path: Path, hashed: list[Path], cache: Path
) -> None:
    record = described(tmp_path, "weights", b"weights")
    verify_files(tmp_path, [record])
    verify_files(tmp_path, [record])
    assert len(hashed) == 1
    assert list(json.loads(cache.read_text()).values()) == [record.sha256]
    os.utime(tmp_path / "weights", ns=(1, 1))
    verify_files(tmp_path, [record])
    assert len(hashed) == 2


def test_damage_that_keeps_the_size_is_refused(tmp_path: Path) -> None:
    record = described(tmp_path, "weights", b"weights")
    verify_files(tmp_path, [record])
    (tmp_path / "weights").write_bytes(b"height!")
    os.utime(tmp_path / "weights", ns=(1, 1))
    for _ in range(2):  # the damaged file's hash is remembered too
        with pytest.raises(UserError, match=r"weights: its contents are not those .* export the model again$"):
            verify_files(tmp_path, [record])


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_cache_that_cannot_be_read_or_written_costs_time_alone(
    tmp_path: Path, cache: Path, content: str, hashed: list[Path]
) -> None:
    record = described(tmp_path, "weights", b"weights")
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    verify_files(tmp_path, [record])
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("a file where the folder would be")
    verify_files(tmp_path, [record])
    assert len(hashed) == 2


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"location": "../secret"}, "not a file beside the graph"),
        ({"location": "/etc/hostname"}, "not a file beside the graph"),
        ({"location": "link"}, "not a file beside the graph"),
        ({"location": "folder/../../secret"}, "not a file beside the graph"),
        ({"location": ""}, "not a file beside the graph"),
        ({"location": "data", "offset": "-4"}, "does not lie within data"),
        ({"location": "data", "offset": "4"}, "does not lie within data"),
        ({"location": "data", "length": "4"}, "does not lie within data"),
        ({"location": "data", "offset": "1e3"}, "does not lie within data"),
        ({"location": "missing"}, "does not lie within missing"),
    ],
)
def test_a_graph_that_points_out_of_its_folder_or_file_is_refused(
    tmp_path: Path, place: dict[str, str], reason: str
) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(16))
    (bundle / "link").symlink_to(tmp_path / "secret")
    (bundle / "data").write_bytes(bytes(16))
    tensor = onnx.TensorProto(
        name="weight", dims=[4], data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    graph = onnx.helper.make_graph([], "graph", [], [], [tensor])
    onnx.save(onnx.helper.make_model(graph), str(bundle / "model.onnx"))
    record = FileRecord(
        path="model.onnx", bytes=(bundle / "model.onnx").stat().st_size, sha256=sha256(bundle / "model.onnx")
    )
    with pytest.raises(UserError, match=reason):
        external_array(bundle / "model.onnx", tensor)
    with pytest.raises(UserError, match=reason):
        verify_files(bundle, [record])


def test_what_lies_beside_the_graph_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(np.arange(5, dtype=np.float32).tobytes())
    tensor = onnx.TensorProto(
        name="weight", dims=[4], data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", "data"), ("offset", "4"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    assert external_array(tmp_path / "model.onnx", tensor).tolist() == [1, 2, 3, 4]
