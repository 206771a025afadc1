"""The kernels' own test program, under sanitizers: built for this CPU, and for 64-bit ARM in an emulator."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from owl_deploy.sparse import library

ROOT = Path(__file__).parents[1]
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SEED = 1


def tool(name: str) -> str | None:
    """Where this program is; those that pip installed beside Python come first."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


needs_cmake = pytest.mark.skipif(tool("cmake") is None, reason="needs cmake")
needs_compiler = pytest.mark.skipif(
    not any(tool(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")), reason="needs a C++ compiler"
)
needs_arm = pytest.mark.skipif(
    not (tool(ARM_COMPILER) and tool(ARM_EMULATOR)), reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR} (make cross)"
)


def built(directory: Path, sanitizers: str, *options: str) -> Path:
    """The test program, from a copy of the sources: a build of the checkout takes its library from the other tests."""
    source, build = directory / "source", directory / "build"
    shutil.copytree(ROOT / "owl_deploy/sparse/csrc", source / "owl_deploy/sparse/csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all"
    options = ("-DCMAKE_BUILD_TYPE=Debug", "-DOWL_WERROR=ON", f"-DCMAKE_CXX_FLAGS={flags}", *options)
    cmake = tool("cmake") or "cmake"
    succeed(cmake, "-S", str(source), "-B", str(build), *options)
    succeed(cmake, "--build", str(build), "--target", "owl_selftest", "--parallel", str(os.cpu_count() or 1))
    return build / "owl_selftest"


def succeed(*command: str) -> str:
    """What the command printed."""
    # Without the search for leaks, which some containers and the emulator do not let it do.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout[-4000:]}\n{ran.stderr[-8000:]}"
    return ran.stdout


@needs_cmake
@needs_compiler
def test_kernels_keep_their_claims_on_this_cpu(tmp_path: Path) -> None:
    said = succeed(str(built(tmp_path, "address,undefined,float-cast-overflow")), str(SEED), "16")
    [line] = [line for line in said.splitlines() if line.startswith("products of ")]
    assert set(library.instruction_sets()) == set(line.removeprefix("products of ").split(":")[0].split(", "))


@needs_cmake
@needs_arm
@pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="this CPU runs the NEON kernels itself")
def test_kernels_keep_their_claims_on_arm(tmp_path: Path) -> None:
    program = built(
        tmp_path,
        "address",  # the other one's findings are the same on all CPUs
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}",
    )
    libraries = Path(succeed(ARM_COMPILER, "-print-file-name=libc.so.6").strip()).resolve().parent
    said = succeed(ARM_EMULATOR, "-L", str(libraries.parent), str(program), str(SEED), "4")
    assert "products of scalar, neon: " in said
