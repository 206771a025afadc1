"""What an engine may do to a sweep, with real processes: the others go on, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from owl_deploy.benchmarking import processes
from owl_deploy.benchmarking.run import Request, bench_bundles
from owl_deploy.bundle.manifest import MANIFEST
from owl_deploy.engines.client import EngineFailed, EngineProcess
from owl_deploy.engines.environments import Environment
from owl_deploy.engines.registry import ENGINES, EngineSpec
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.files import locked
from owl_deploy.reporting import SILENT

from .conftest import TESTS, RunCli, TinyModel

WORKLOAD = ("--prompt", 8, "--new-tokens", 8, "--threads", 1, "--max-load", 99, "--repetitions", 3)
COMMAND = (sys.executable, "-c", "from owl_deploy.cli import main; main()")
HOSTILE = ("Hanging", "Dying", "Killed", "Raising", "Leaking", "Wavering", "NotANumber", "Mute")
Register = Callable[..., list[str]]


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Give classes of hostile/hostile_engines.py as engines, run by an interpreter that finds them."""
    monkeypatch.setenv("OWL_DEPLOY_ENGINES", str(tmp_path / "engines"))
    home = tmp_path / "engines" / "hostile"
    (home / "bin").mkdir(parents=True)
    interpreter = home / "bin" / "python"
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH="{TESTS / "hostile"}" exec "{sys.executable}" "$@"\n')
    interpreter.chmod(0o755)
    (home / "owl-deploy.json").write_text(json.dumps({"requirements": []}))
    environment = Environment("hostile", ("3.11",), (), check="")

    def register(*class_names: str, checked: bool = True) -> list[str]:
        for number, name in enumerate(class_names):
            spec = EngineSpec(
                name=f"{name.lower()}{number}",
                module="hostile_engines",
                class_name=name,
                flavors=("genai",),
                environment=environment,
                package="numpy",
                licence="ours",
                checked_at_export=checked,
            )
            monkeypatch.setitem(ENGINES, spec.name, spec)
        return [f"{name.lower()}{number}" for number, name in enumerate(class_names)]

    return register


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    out = tmp_path_factory.mktemp("stress") / "bundle"
    export_checkpoint(tiny_model("llama", head_dim=16, max_position_embeddings=128), out, ("genai",))
    return out


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; afterwards nothing is there, and no process of ours."""
    before = set(psutil.Process().children(recursive=True))
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield folder
    assert not list(folder.iterdir())
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def rows_of(stdout: str) -> dict[str, dict[str, Any]]:
    return {row["engine"]: row for row in map(json.loads, stdout.splitlines())}


def test_whatever_an_engine_does_its_row_says_so_and_the_others_go_on(
    bundle: Path, hostile: Register, scratch: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    assert scratch.is_dir()
    names = hostile(*HOSTILE)
    ran = run_cli(
        *("bench", bundle, "-o", tmp_path / "out", "--engines", ",".join(["onnxruntime", *names])),
        *(*WORKLOAD, "--timeout", 6, "--json"),
    )
    assert ran.code == 0
    rows = rows_of(ran.stdout)
    errors = {name.rstrip("0123456789"): rows[name]["error"] for name in names}
    assert rows["onnxruntime"]["status"] == "ok"
    assert rows["onnxruntime"]["repetitions"] == 3
    assert "no answer to 'generate' in 6 s" in errors["hanging"]
    assert "no answer to 'load' in 6 s" in errors["mute"]
    assert "exit code 3" in errors["dying"]
    assert "out of ideas" in errors["dying"]
    assert "SIGKILL" in errors["killed"]
    assert "RuntimeError: no more tokens today" in errors["raising"]
    leaking, wavering = (next(row for key, row in rows.items() if key.startswith(name)) for name in ("leak", "waver"))
    assert leaking["status"] == wavering["status"] == "ok"
    assert leaking["rss_growth_bytes"] > 2 * 2**22 * 8 * 0.9  # two rounds after the first
    assert not wavering["repeatable"]
    assert rows["onnxruntime"]["repeatable"]


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def becomes(pid: int, is_so: Callable[[int], bool]) -> bool:
    """Whether it is so within 10 seconds: signals reach the processes of a group one after the other."""
    deadline = time.monotonic() + 10
    while not is_so(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so(pid)


def test_what_an_engine_starts_is_paused_and_ended_with_it(bundle: Path, hostile: Register) -> None:
    (name,) = hostile("Forking")
    with EngineProcess(ENGINES[name], 1) as process:
        process.load(bundle / "genai" / "model.onnx", threads=1, context=16, prompts=[])
        child = process.facts["child"]
        process.pause()
        assert becomes(child, lambda pid: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        process.resume()
        assert becomes(child, lambda pid: psutil.Process(pid).status() == psutil.STATUS_RUNNING)
        assert process.ask(do="generate", prompts=[[1, 2]], new_tokens=2)["tokens"]
    assert becomes(child, lambda pid: not runs(pid))


def test_an_engine_that_dies_is_reported_at_once_and_leaves_no_child(bundle: Path, hostile: Register) -> None:
    (name,) = hostile("ForkingAndDying")
    with EngineProcess(ENGINES[name], 1) as process:
        process.load(bundle / "genai" / "model.onnx", threads=1, context=16, prompts=[])
        child = process.facts["child"]
        with pytest.raises(EngineFailed, match=r"exit code 3.*left a child behind"):
            process.ask(do="generate", prompts=[[1, 2]], new_tokens=2, timeout_s=60)
        assert becomes(child, lambda pid: not runs(pid))


def test_wrong_numbers_are_not_timed(
    bundle: Path, hostile: Register, scratch: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    assert scratch.is_dir()
    names = hostile("Honest", "NotANumber", "Narrow", checked=False)  # another model's logits, none, and too few
    ran = run_cli(
        *("bench", bundle, "-o", tmp_path / "out", "--engines", ",".join([*names, "onnxruntime"])),
        *(*WORKLOAD, "--json"),
    )
    assert ran.code == 0
    rows = rows_of(ran.stdout)
    for name in names:
        assert "logits differ" in rows[name]["error"]
        assert rows[name]["samples_ms"]["decode"] == []
    assert rows["onnxruntime"]["status"] == "ok"


def test_nothing_is_timed_before_the_caller_is_done_with_other_work(
    bundle: Path, hostile: Register, tmp_path: Path
) -> None:
    log = tmp_path / "out" / "measurements.jsonl"
    kinds: list[list[str]] = []

    def alone() -> None:
        kinds.append([json.loads(line)["kind"] for line in log.read_text().splitlines()])

    engines = [ENGINES[name] for name in hostile("Honest", "Compiling")]
    request = Request((8,), (1,), 4, 2, 1, text=None, seqlen=None, windows=1, max_load=99)
    bench_bundles([bundle], engines, request, tmp_path / "out", alone=alone, reporter=SILENT)
    assert kinds == [["setup", "setup"], ["setup", "setup", "round", "round"]]


def test_where_memory_is_short_what_takes_long_to_load_stays(
    bundle: Path, hostile: Register, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one and a half engines: of two, one is loaded again in every round."""
    available = psutil.virtual_memory().available
    monkeypatch.setattr(processes, "_MEMORY_SHARE", 1.5 * 2**30 / available)
    monkeypatch.setattr(EngineProcess, "measure_memory", lambda self: setattr(self, "memory_bytes", 2**30))
    quick, slow = hostile("Honest", "Compiling")
    out = tmp_path / "out"
    ran = run_cli("bench", bundle, "-o", out, "--engines", f"{quick},{slow}", *WORKLOAD)
    assert ran.code == 0
    entries = [json.loads(line) for line in (out / "measurements.jsonl").read_text().splitlines()]
    used = {
        name: [entry["process"] for entry in entries if entry["kind"] == "round" and entry["name"].startswith(name)]
        for name in (quick, slow)
    }
    assert len(used[slow]) == len(used[quick]) == 3
    assert len(set(used[slow])) == 1
    assert len(set(used[quick])) == 3


def test_twenty_levels_of_eight_engines_leave_nothing_behind(
    bundle: Path, hostile: Register, scratch: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    assert scratch.is_dir()
    levels = []
    for number in range(20):
        level = tmp_path / f"level{number}"
        shutil.copytree(bundle, level)
        manifest = json.loads((level / MANIFEST).read_text())
        sparsity = number / 20
        changed = {"sparsity_asked": sparsity, "sparsity_achieved": sparsity, "checkpoint_sha256": f"{number:064d}"}
        (level / MANIFEST).write_text(json.dumps(manifest | changed))
        levels.append(level)
    names = hostile(*["Honest"] * 6, "Dying", "Leaking")
    ran = run_cli(
        *("bench", *levels, "-o", tmp_path / "out", "--engines", ",".join(names), "--repetitions", 1),
        *("--prompt", 4, "--new-tokens", 2, "--threads", 1, "--max-load", 99, "--json"),
    )
    assert ran.code == 0
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(rows) == 20 * 8
    assert {row["engine"] for row in rows if row["status"] == "failed"} == {names[6]}
    assert all(row["speedup_same_engine"] > 0 for row in rows if row["status"] == "ok")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in left if name.startswith(".") or name.endswith(".partial")]


def test_an_interrupted_run_ends_its_engines_keeps_its_rounds_and_goes_on(
    bundle: Path, scratch: Path, tmp_path: Path
) -> None:
    assert scratch.is_dir()
    out = tmp_path / "out"
    command = [*COMMAND, "bench", str(bundle), "-o", str(out), *map(str, WORKLOAD)]
    endless = [*command, "--repetitions", "2000"]
    run = subprocess.Popen(
        endless,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    log = out / "measurements.jsonl"
    _wait_for(lambda: log.is_file() and log.read_text().count('"kind": "round"') >= 3, run)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == 130
    assert run.stderr is not None
    assert "interrupted" in run.stderr.read()
    run.stderr.close()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert workers
    assert not alive
    kept = log.read_text()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    (row,) = map(json.loads, done.stdout.splitlines())
    assert log.read_text() == kept  # three rounds are there already
    assert row["repetitions"] == 3


def test_two_runs_on_one_directory_are_refused(bundle: Path, tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "out"
    with locked(out):
        ran = run_cli("bench", bundle, "-o", out, *WORKLOAD)
    assert ran.code == 2
    assert "in use by another owl-deploy" in ran.stderr
    assert not out.exists()


def test_a_full_disk_is_one_line_and_loses_no_round(bundle: Path, tmp_path: Path) -> None:
    """Files may grow to 60 KB: the log of measurements reaches that after some rounds, the logits of a check do not."""
    out = tmp_path / "out"
    code = (
        "import resource, sys; from owl_deploy.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY)); main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "bench", str(bundle), "-o", str(out), *map(str, WORKLOAD)]
    done = subprocess.run([*command, "--repetitions", "1000"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert "measurements.jsonl" in last
    assert "make room" in last
    more = [*COMMAND, "bench", str(bundle), "-o", str(out), *map(str, WORKLOAD), "--json"]
    again = subprocess.run(more, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["status"] == "ok"


def _wait_for(condition: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
