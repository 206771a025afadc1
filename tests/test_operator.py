"""owl::SparseMatMul in ONNX Runtime: its numbers, its errors, its memory, and many threads at once."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from owl_deploy.sparse import library

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")),
    reason="needs a C++ compiler, and owl-deploy installed again with it",
)

Floats = NDArray[np.float32]
Packed = NDArray[np.uint8]

NODE = "/model/layers.0/mlp/down_proj/MatMul"
ROWS, COLUMNS = 326, 330  # no multiples of what the kernels work in
TOKENS = [1, 3, 40, 60]  # each of the kernels' ways

formats = pytest.mark.parametrize("format", library.FORMATS)


def pack(format: str, rows: int = ROWS, columns: int = COLUMNS, paired: bool = False, seed: int = 0) -> Packed:
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((rows, columns), np.float32)
    weights[generator.random(weights.shape, np.float32) < 0.7] = 0
    return library.pack(weights, format, paired)


def inputs(*shape: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def expected(packed: Packed, x: Floats, paired: bool = False) -> Floats:
    weights = library.unpack(packed)
    product: Floats = x @ weights.T
    if paired:
        gate, up = np.split(product, 2, axis=-1)
        product = gate / (1 + np.exp(-gate)) * up
    return product


def assert_close(found: Floats, wanted: Floats) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(initial=1e-6))


def vector(data: Packed) -> TensorProto:
    return helper.make_tensor("W", TensorProto.UINT8, data.shape, data.tobytes(), raw=True)


def in_file(data: Packed, path: Path, offset: int) -> TensorProto:
    with path.open("wb") as file:
        file.seek(offset)
        file.write(data)
    tensor = TensorProto(name="W", data_type=TensorProto.UINT8, dims=data.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": path.name, "offset": offset, "length": data.size}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(weights: TensorProto, rank: int = 2, constant: bool = True) -> onnx.ModelProto:
    graph_inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, [f"d{i}" for i in range(rank)])]
    if not constant:
        graph_inputs.append(helper.make_tensor_value_info("W", TensorProto.UINT8, weights.dims))
    graph = helper.make_graph(
        [helper.make_node("SparseMatMul", ["X", "W"], ["Y"], domain="owl", name=NODE)],
        "product",
        graph_inputs,
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [weights] if constant else [],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("owl", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def options(threads: int = 2) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = 4  # errors reach us as exceptions
    made.register_custom_ops_library(str(library.library_path()))
    return made


def session(made: onnx.ModelProto | Path, threads: int = 2) -> onnxruntime.InferenceSession:
    source = str(made) if isinstance(made, Path) else made.SerializeToString()
    return onnxruntime.InferenceSession(source, options(threads), providers=["CPUExecutionProvider"])


def run(made: onnxruntime.InferenceSession, x: Floats) -> Floats:
    [y] = made.run(None, {"X": x})
    found: Floats = y
    return found


# ---- The oldest and the newest ONNX Runtime ----


def test_the_oldest_onnxruntime_gives_the_same_numbers(tmp_path: Path) -> None:
    python = Path(__file__).parents[1] / ".venvs" / "onnxruntime" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}; make .venvs/onnxruntime/.ready")
    products: list[Path] = []
    for format in library.FORMATS:
        files = [tmp_path / f"{format}.{suffix}" for suffix in ("onnx", "x.npy", "y.npy")]
        weights = in_file(pack(format), tmp_path / f"{format}.data", 4096)
        onnx.save(model(weights), files[0])
        np.save(files[1], inputs(3, COLUMNS))
        products += files
    script = Path(__file__).parent / "environments" / "run_operator.py"
    ran = subprocess.run([python, script, library.library_path(), *products], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "1.17.0"
    for format in library.FORMATS:
        assert_close(np.load(tmp_path / f"{format}.y.npy"), expected(pack(format), inputs(3, COLUMNS)))


# ---- Numbers ----


@formats
@pytest.mark.parametrize("paired", [False, True], ids=["plain", "paired"])
@pytest.mark.parametrize("threads", [1, 2], ids=["1 thread", "2 threads"])
def test_multiplies_by_the_unpacked_weights(format: str, paired: bool, threads: int) -> None:
    packed = pack(format, paired=paired)
    made = session(model(vector(packed)), threads)
    for tokens in TOKENS:
        x = inputs(tokens, COLUMNS)
        assert_close(run(made, x), expected(packed, x, paired))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (2, 5), (2, 0), (1, 2, 1, 1, 3), (1,) * 15], ids=str)
def test_takes_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    packed = pack("packed16")
    x = inputs(*shape, COLUMNS)
    assert_close(run(session(model(vector(packed), x.ndim)), x), expected(packed, x))


@formats
def test_outputs_do_not_depend_on_threads(format: str) -> None:
    made = model(vector(pack(format)))
    by_threads = [session(made, threads) for threads in (1, 2, 5)]
    for tokens in TOKENS:
        first, *others = (run(each, inputs(tokens, COLUMNS)) for each in by_threads)
        assert all(np.array_equal(first, other) for other in others)


@formats
def test_agrees_with_the_library(format: str) -> None:
    packed = pack(format)
    made = session(model(vector(packed)))
    for tokens in TOKENS:
        x = inputs(tokens, COLUMNS)
        assert np.array_equal(run(made, x), library.product(packed, x)[0])


def test_many_threads_run_sessions_at_once() -> None:
    """Each product of a thread needs more, or less, of its scratch memory than the one before."""
    packed = [pack("packed32", 512, 330, seed=2), pack("int8", 96, 1290, seed=3)]
    sessions = [session(model(vector(each))) for each in packed]
    weights = [library.unpack(each) for each in packed]

    def runs(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(8):
            which = int(generator.integers(2))
            x = inputs(int(generator.integers(1, 33)), weights[which].shape[1], seed=seed)
            assert_close(run(sessions[which], x), x @ weights[which].T)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(runs, range(6)))


@pytest.mark.parametrize("kernels", [None, "", "scalar"])
def test_kernels_are_chosen_by_the_environment(kernels: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels is None:
        monkeypatch.delenv("OWL_DEPLOY_KERNELS", raising=False)
    else:
        monkeypatch.setenv("OWL_DEPLOY_KERNELS", kernels)
    packed, x = pack("packed32"), inputs(1, COLUMNS)
    assert np.array_equal(run(session(model(vector(packed))), x), library.product(packed, x, kernels or None)[0])


# ---- Errors: each says which operator, what is wrong, and which node ----


def assert_refused(made: onnx.ModelProto, reason: str) -> None:
    with pytest.raises(Exception, match=rf"owl::SparseMatMul: {reason}.*{NODE}"):
        session(made)


def test_refuses_inputs_of_another_width() -> None:
    made = session(model(vector(pack("packed16"))))
    with pytest.raises(Exception, match=rf"{NODE}.*owl::SparseMatMul: .*{COLUMNS - 1}.*{COLUMNS} columns"):
        run(made, inputs(2, COLUMNS - 1))
    assert run(made, inputs(2, COLUMNS)).shape == (2, ROWS)  # and goes on


@pytest.mark.parametrize(("rank", "reason"), [(0, "at least one dimension"), (17, "17 dimensions")])
def test_refuses_inputs_of_impossible_rank(rank: int, reason: str) -> None:
    made = session(model(vector(pack("packed16", 16, 1)), rank))
    with pytest.raises(Exception, match=f"owl::SparseMatMul: .*{reason}"):
        run(made, np.ones((1,) * rank, np.float32))


def test_refuses_weights_that_are_not_constant() -> None:
    assert_refused(model(vector(pack("packed16")), constant=False), "W is not a constant initializer")


def test_refuses_weights_that_are_not_a_vector() -> None:
    assert_refused(model(vector(pack("packed16").reshape(1, -1))), "W is not a vector")


@formats
def test_refuses_damaged_weights(format: str) -> None:
    packed = pack(format)
    wrong_magic, no_rows = packed.copy(), packed.copy()
    wrong_magic[0] ^= 1
    no_rows[8:12] = 0
    assert_refused(model(vector(wrong_magic)), "W: not a packed matrix")
    assert_refused(model(vector(no_rows)), "W: impossible shape")
    assert_refused(model(vector(packed[:-1])), "W: truncated")
    assert_refused(model(vector(packed[:0])), "W: truncated")


def test_refuses_kernels_that_do_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_DEPLOY_KERNELS", "altivec")
    with pytest.raises(Exception, match=r"owl::SparseMatMul: OWL_DEPLOY_KERNELS.*altivec.*scalar"):
        session(model(vector(pack("packed16"))))


@pytest.mark.parametrize("has_statuses", [True, False])
def test_says_that_onnxruntime_is_too_old(has_statuses: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """A runtime of our own making, older than 1.17, of which a status is all that is used."""
    said: list[str] = []
    status = 0x5EED

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(_code: int, message: bytes) -> int:
        said.append(message.decode())
        return status

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version: int) -> int | None:
        return ctypes.addressof(table) if has_statuses and version < 17 else None

    @ctypes.CFUNCTYPE(ctypes.c_void_p)
    def get_version() -> int | None:
        return ctypes.cast(b"1.16.3", ctypes.c_void_p).value

    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    register = ctypes.CDLL(str(library.library_path())).RegisterCustomOps
    register.argtypes, register.restype = [ctypes.c_void_p] * 2, ctypes.c_void_p
    wanted = "owl::SparseMatMul: onnxruntime 1.16.3 is running, and 1.17 or newer is needed"
    if has_statuses:
        assert register(None, base) == status
        assert said == [wanted]
    else:
        assert register(None, base) is None
        assert capfd.readouterr().err.strip() == wanted


# ---- Memory and lifetimes ----


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


@pytest.fixture(scope="module")
def large() -> Packed:
    return library.pack(inputs(8192, 4096), "dense8")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("offset", [0, 64, 4096])
def test_external_weights_stay_in_their_file(large: Packed, offset: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(in_file(large, tmp_path / "model.bin", offset)), path)
    x = inputs(1, 4096)
    wanted = library.product(large, x)[0]
    before = anonymous_bytes()
    made = session(path)
    found = run(made, x)
    assert anonymous_bytes() - before < large.size / 4
    assert np.array_equal(found, wanted)


@formats
def test_a_file_that_is_rewritten_under_a_session_harms_no_more_than_its_numbers(format: str, tmp_path: Path) -> None:
    data = tmp_path / "model.bin"
    onnx.save(model(in_file(pack(format), data, 4096)), tmp_path / "model.onnx")
    script = f"""
import numpy as np
import onnxruntime
from pathlib import Path
from owl_deploy.sparse import library
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(library.library_path()))
session = onnxruntime.InferenceSession({str(tmp_path / "model.onnx")!r}, options)
inputs = [np.ones((tokens, {COLUMNS}), np.float32) for tokens in {TOKENS}]
before = [session.run(None, dict(X=x))[0] for x in inputs]
with open({str(data)!r}, "r+b") as file:
    file.write(b"\\xff" * Path({str(data)!r}).stat().st_size)
after = [session.run(None, dict(X=x))[0] for x in inputs]
assert all(y.shape == z.shape for y, z in zip(before, after))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stderr}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_prefill_leaves_little_memory_behind() -> None:
    made = session(model(vector(pack("packed16", 32, 8192))))
    x = inputs(4096, 8192)
    before = anonymous_bytes()
    assert run(made, x).shape == (4096, 32)
    assert anonymous_bytes() - before < x.nbytes / 4


def test_external_weights_need_no_alignment(tmp_path: Path) -> None:
    packed, x = pack("packed16"), inputs(3, COLUMNS)
    onnx.save(model(in_file(packed, tmp_path / "model.bin", 10)), tmp_path / "model.onnx")
    assert np.array_equal(run(session(tmp_path / "model.onnx"), x), library.product(packed, x)[0])


def test_can_be_registered_twice() -> None:
    twice = options()
    twice.register_custom_ops_library(str(library.library_path()))
    made = onnxruntime.InferenceSession(model(vector(pack("packed16"))).SerializeToString(), twice)
    assert run(made, inputs(1, COLUMNS)).shape == (1, ROWS)


def test_sessions_outlive_options_and_each_other() -> None:
    shared = options()
    source = model(vector(pack("packed16"))).SerializeToString()
    one, other = (onnxruntime.InferenceSession(source, shared) for _ in range(2))
    del shared, one
    gc.collect()
    assert run(other, inputs(1, COLUMNS)).shape == (1, ROWS)


def test_nodes_share_weights() -> None:
    packed = pack("packed16", 330, 330)
    made = model(vector(packed))
    made.graph.node[0].output[0] = "H"
    made.graph.node.append(helper.make_node("SparseMatMul", ["H", "W"], ["Y"], domain="owl"))
    x = inputs(3, 330)
    assert_close(run(session(made), x), expected(packed, expected(packed, x)))
