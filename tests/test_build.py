"""The sparse engine's library: built where there is a compiler, and named in one line where it is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from owl_deploy.errors import UserError
from owl_deploy.sparse import library

ROOT = Path(__file__).parents[1]

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")),
    reason="needs a C++ compiler, and owl-deploy installed again with it",
)


@needs_compiler
def test_is_built_and_loads() -> None:
    assert library.library_path().is_file()
    assert library.instruction_sets()[-1] == "scalar"


@needs_compiler
def test_shows_nothing_but_its_interface() -> None:
    """Its own copy of the C++ runtime must not stand in for the one that torch or ONNX Runtime brings."""
    tool = shutil.which("nm")
    if tool is None or sys.platform != "linux":
        pytest.skip("needs nm")
    lines = subprocess.check_output([tool, "-D", "--defined-only", library.library_path()], text=True).splitlines()
    names = {line.split()[-1] for line in lines}
    assert {"owl_abi", "RegisterCustomOps"} <= names
    assert all(name.startswith("owl_") for name in names - {"RegisterCustomOps"})


@needs_compiler
def test_refuses_what_the_library_cannot_see() -> None:
    weights = np.eye(16, 32, dtype=np.float32)
    packed = library.pack(weights, "packed32")
    assert packed.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="no weight format 'int9'"):
        library.pack(weights, "int9")
    with pytest.raises(ValueError, match=r"\(16, 32, 1\)"):
        library.pack(weights[..., None], "packed32")
    with pytest.raises(ValueError, match="16 x 32"):
        library.product(packed, np.zeros((1, 16), np.float32))
    with pytest.raises(ValueError, match="at least 1"):
        library.product(packed, np.zeros((1, 32), np.float32), repeats=0)
    with pytest.raises(TypeError, match="float32"):
        library.check(weights)


@needs_compiler
def test_reads_bytes_wherever_they_lie() -> None:
    weights = np.eye(16, 32, dtype=np.float32)
    packed = library.pack(weights, "packed32")
    moved = np.concatenate([np.zeros(1, np.uint8), packed])[1:]
    library.check(moved)
    unpacked, mask = library.unpack_with_mask(moved)
    np.testing.assert_allclose(unpacked, weights, rtol=1e-5)
    assert np.array_equal(mask, weights != 0)
    x = np.arange(64, dtype=np.float32).reshape(2, 32)
    y, nanoseconds = library.product(moved, x, kernels="scalar")
    np.testing.assert_allclose(y, x @ weights.T, rtol=1e-5)
    assert nanoseconds > 0


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_more_threads_than_there_can_be_are_an_error() -> None:
    """In a process that has room for the stacks of some of them."""
    script = """
import resource
import numpy as np
from owl_deploy.sparse import library
packed = library.pack(np.ones((16, 256), np.float32), "int8")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
try:
    library.product(packed, np.ones((1, 256), np.float32), threads=4000)
except ValueError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "Resource temporarily unavailable"


def test_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_PATH", tmp_path / "libowl_sparse.so")
    with pytest.raises(UserError, match=r"^.*libowl_sparse\.so is missing.*Install g\+\+.*$"):
        library.instruction_sets()


def test_broken_library_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libowl_sparse.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(library, "_PATH", path)
    with pytest.raises(UserError, match=r"^.*install owl-deploy again \(.*libowl_sparse.*$"):
        library.instruction_sets()


@needs_compiler
def test_other_interface_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = shutil.copy(library.library_path(), tmp_path)  # the one that is loaded already has been checked
    monkeypatch.setattr(library, "_PATH", Path(copy))
    monkeypatch.setattr(library, "_ABI", 99)
    with pytest.raises(UserError, match=r"^.*interface \d+ where 99 is needed: install owl-deploy again$"):
        library.instruction_sets()


def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT],
        env=os.environ | {"CXX": "/nonexistent/c++"},
        capture_output=True,
        text=True,
    )
    if "No matching distribution found for scikit-build-core" in build.stderr:
        pytest.skip("no package index to install the build's requirements from")
    assert build.returncode == 0, build.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"owl_deploy/{name}" for name in ("cli/app.py", "report/report.md.j2", "text/passage.txt")} <= names
    assert not [name for name in names if name.endswith(".so") or "csrc" in name]
