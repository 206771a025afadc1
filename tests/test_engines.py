"""Engines in their processes: what they answer, and what becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from owl_deploy.engines import environments
from owl_deploy.engines.client import EngineFailed, EngineProcess
from owl_deploy.engines.environments import Environment, engines_directory, find_python
from owl_deploy.engines.probe import Sampling
from owl_deploy.engines.registry import ENGINES, installed_engines
from owl_deploy.errors import UserError
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.machine.energy import cpu_energy_uj
from owl_deploy.sparse import library

from .conftest import RunCli, TinyModel

ONNXRUNTIME = ENGINES["onnxruntime"]
IDS = list(range(1, 25))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    """A small bundle."""
    out = tmp_path_factory.mktemp("graphs") / "bundle"
    export_checkpoint(tiny_model("llama", head_dim=16), out, ("standard", "genai"))
    return out


def loaded(graph: Path, engine: str = "onnxruntime") -> EngineProcess:
    process = EngineProcess(ENGINES[engine], 1)
    process.load(graph, threads=1, context=64, prompts=[len(IDS)])
    return process


def test_onnxruntime_computes_the_same_from_both_flavors(graphs: Path, tmp_path: Path) -> None:
    logits = []
    for flavor in ("standard", "genai"):
        with loaded(graphs / flavor / "model.onnx") as process:
            process.ask(do="logits", ids=IDS, out=str(tmp_path / f"{flavor}.npz"))
        logits.append(np.load(tmp_path / f"{flavor}.npz"))
    np.testing.assert_allclose(logits[0]["at_once"], logits[1]["at_once"], atol=1e-5)
    np.testing.assert_allclose(logits[0]["decoded"], logits[1]["decoded"], atol=1e-5)
    assert len(logits[0]["at_once"]) == len(IDS) - 16
    assert len(logits[0]["decoded"]) == 16


def test_a_generation_is_timed_token_by_token_and_is_greedy(graphs: Path) -> None:
    with loaded(graphs / "genai" / "model.onnx") as process:
        first = process.ask(do="generate", prompts=[IDS], new_tokens=8)
        longer = process.ask(do="generate", prompts=[[*IDS, *first["tokens"][0][:4]]], new_tokens=4)
    assert len(first["tokens"][0]) == 8
    assert len(first["decode_ms"]) == 7
    assert first["tokens"][0][4:] == longer["tokens"][0]
    assert first["peak_rss_bytes"] > 2**20


def test_a_batch_computes_what_its_sequences_compute_alone(graphs: Path) -> None:
    alone = []
    for flavor in ("standard", "genai"):
        with loaded(graphs / flavor / "model.onnx") as process:
            alone += [process.ask(do="generate", prompts=[ids], new_tokens=8)["tokens"][0] for ids in (IDS, IDS[::-1])]
        with EngineProcess(ONNXRUNTIME, 1) as process:
            process.load(graphs / flavor / "model.onnx", threads=1, context=64, prompts=[], batch=2)
            together = process.ask(do="generate", prompts=[IDS, IDS[::-1]], new_tokens=8)["tokens"]
        assert together == alone[-2:]


def test_sampling_follows_the_softmax_of_the_likeliest_and_its_seed() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)).repeat(20_000, axis=0)
    drawn = Sampling(temperature=1.0, top_k=3, seed=0).draw(logits, np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.015)
    cold = Sampling(temperature=0.01, top_k=3, seed=0).draw(logits, np.random.default_rng(0))
    assert (cold == 0).all()


def test_energy_is_the_sum_of_the_packages_and_none_where_it_cannot_be_read(tmp_path: Path) -> None:
    assert cpu_energy_uj(tmp_path) is None
    for name, value in {"intel-rapl:0": 5, "intel-rapl:1": 7, "intel-rapl:0:0": 100}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    assert cpu_energy_uj(tmp_path) == [5, 7]
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert cpu_energy_uj(tmp_path) is None


def test_peak_memory_is_the_engine_s_own_not_its_parent_s(graphs: Path) -> None:
    ballast = np.ones(2**27)  # 1 GiB, more than a small graph and ONNX Runtime take
    with loaded(graphs / "genai" / "model.onnx") as process:
        samples = process.ask(do="generate", prompts=[IDS], new_tokens=2)
    assert samples["peak_rss_bytes"] < ballast.nbytes


def test_the_loss_of_a_window_is_its_mean_cross_entropy(graphs: Path, tmp_path: Path) -> None:
    with loaded(graphs / "genai" / "model.onnx") as process:
        loss = process.ask(do="loss", ids=IDS)
        process.ask(do="logits", ids=IDS, out=str(tmp_path / "logits.npz"))
    parts = np.load(tmp_path / "logits.npz")
    logits = np.concatenate([parts["at_once"], parts["decoded"]]).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(probabilities[np.arange(len(IDS) - 1), IDS[1:]]).mean()
    assert loss == pytest.approx(expected, rel=1e-6)


def test_a_graph_that_cannot_be_loaded_is_an_answer_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with EngineProcess(ONNXRUNTIME, 1) as process, pytest.raises(EngineFailed, match=r"model\.onnx"):
        process.load(tmp_path / "model.onnx", threads=1, context=8, prompts=[])


def test_an_engine_that_is_killed_is_reported_with_the_signal(graphs: Path) -> None:
    with loaded(graphs / "genai" / "model.onnx") as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineFailed, match=r"SIGKILL.*generate"):
            process.ask(do="generate", prompts=[IDS], new_tokens=4)


def test_an_engine_that_hangs_is_ended(graphs: Path) -> None:
    with loaded(graphs / "genai" / "model.onnx") as process:
        process.pause()
        with pytest.raises(EngineFailed, match="no answer to 'generate' in 1 s"):
            process.ask(timeout_s=1, do="generate", prompts=[IDS], new_tokens=4)
        assert not psutil.pid_exists(process.pid)


def test_a_paused_engine_goes_on_when_resumed(graphs: Path) -> None:
    with loaded(graphs / "genai" / "model.onnx") as process:
        process.pause()
        time.sleep(0.05)
        assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
        process.resume()
        assert len(process.ask(do="generate", prompts=[IDS], new_tokens=4)["tokens"][0]) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="parents are watched through prctl")
def test_no_engine_outlives_its_parent() -> None:
    code = """
        import os, time
        from owl_deploy.engines.client import EngineProcess
        from owl_deploy.engines.registry import ENGINES
        process = EngineProcess(ENGINES["onnxruntime"], 1)
        time.sleep(1)  # for the worker to ask for its parent's end
        process.pause()
        print(process.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -------------------- environments


def test_the_doctor_runs_what_is_here_and_names_what_is_missing(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_DEPLOY_ENGINES", str(tmp_path))  # where nothing is installed
    broken = type(ONNXRUNTIME)(**{**vars(ONNXRUNTIME), "name": "broken", "module": "owl_deploy.engines.none"})
    monkeypatch.setitem(ENGINES, "broken", broken)
    ran = run_cli("engines", "doctor", "deepsparse", "onnxruntime", "broken", "--json")
    assert ran.code == 1
    found = {diagnosis["engine"]: diagnosis for diagnosis in json.loads(ran.stdout)}
    assert {name: diagnosis["status"] for name, diagnosis in found.items()} == {
        "deepsparse": "missing",
        "onnxruntime": "ok",
        "broken": "broken",
    }
    assert "owl_deploy.engines.none" in found["broken"]["detail"]
    assert run_cli("engines", "doctor", "onnxruntime").code == 0


def test_engines_list_names_every_engine_with_its_licence(run_cli: RunCli) -> None:
    ran = run_cli("engines", "list", "--json")
    assert ran.code == 0
    rows = {row["engine"]: row for row in json.loads(ran.stdout)}
    assert rows["onnxruntime"]["status"] == "ready"
    assert "not production" in rows["deepsparse"]["licence"]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_engines_list_never_cuts_a_name(columns: int, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = run_cli("engines", "list")
    assert set(ENGINES) <= set(ran.stdout.split())
    assert "…" not in ran.stdout
    assert all(len(line) <= columns for line in ran.stdout.splitlines())


def test_engines_list_tells_the_kernels_that_will_run_and_no_more(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> dict[str, str | None]:
        rows = json.loads(run_cli("engines", "list", "--json").stdout)
        return {row["engine"]: row["instruction_set"] for row in rows}

    assert told()["sparse-int8"] == library.instruction_sets()[0]
    assert told()["onnxruntime"] is None
    monkeypatch.setenv("OWL_DEPLOY_KERNELS", "scalar")
    assert told()["sparse-int8"] == "scalar"


def test_engines_list_says_so_where_our_library_was_not_built(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_PATH", tmp_path / "libowl_sparse.so")
    rows = {row["engine"]: row for row in json.loads(run_cli("engines", "list", "--json").stdout)}
    assert "Install g++" in rows["sparse-int8"]["status"]
    assert rows["onnxruntime"]["status"] == "ready"


def test_environments_are_where_make_has_them_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OWL_DEPLOY_ENGINES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkout = Path(environments.__file__).parents[2]
    assert engines_directory() == checkout / ".venvs"
    said = subprocess.run(
        ["make", "--no-print-directory", "--eval", "said: ; @echo [$(OWL_DEPLOY_ENGINES)]", "said"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "[]"  # what make runs looks in the same place
    assert engines_directory(tmp_path) == tmp_path / "cache" / "owl-deploy" / "engines"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "something-else"\n')
    assert engines_directory(tmp_path) == tmp_path / "cache" / "owl-deploy" / "engines"
    monkeypatch.setenv("OWL_DEPLOY_ENGINES", str(tmp_path / "mine"))
    assert engines_directory() == tmp_path / "mine"


def test_an_engine_that_was_not_installed_is_refused_with_the_command(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_DEPLOY_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setattr(environments, "find_python", lambda _: sys.executable)
    ran = run_cli("bench", tmp_path / "bundle", "--engines", "deepsparse", "-o", tmp_path / "out")
    assert ran.code == 2
    assert "owl-deploy engines install deepsparse" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_an_engine_that_cannot_be_installed_here_stays_for_its_rows_to_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_DEPLOY_ENGINES", str(tmp_path))
    monkeypatch.setattr(environments, "find_python", lambda _: None)
    (spec,) = installed_engines("deepsparse")
    with pytest.raises(UserError, match=r"needs Python 3\.11"):
        EngineProcess(spec, 1)


def test_an_unknown_engine_is_refused(run_cli: RunCli) -> None:
    ran = run_cli("engines", "install", "fastest")
    assert ran.code == 2
    assert "onnxruntime, sparse-packed32" in ran.stderr
    assert "deepsparse" in ran.stderr


def test_an_installation_that_failed_does_not_count_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_DEPLOY_ENGINES", str(tmp_path))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    broken = Environment("broken", (version,), ("pip",), check="raise SystemExit('no such engine')")
    with pytest.raises(UserError, match="no such engine"):
        broken.install()
    assert not broken.is_ready()
    working = Environment("broken", (version,), ("pip",), check="import json")
    working.install()
    assert working.is_ready()


def test_python_is_looked_for_in_order_of_preference() -> None:
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert find_python(("2.99", own)) == sys.executable
    assert find_python(("2.99",)) is None
