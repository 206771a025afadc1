"""`benchmarks/table8.py` on a model of a few kilobytes: levels gather, and are not made twice."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest

from owl_deploy.benchmarking.rows import Row, read_rows
from owl_deploy.errors import UserError
from owl_deploy.sparse.library import library_path

from .conftest import TESTS

KILLED = """
import os, time
from table8 import _maker

if __name__ == "__main__":
    with _maker() as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""
GEOMETRY = [
    "--blocks",
    "2",
    "--hidden-size",
    "64",
    "--feed-forward",
    "128",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--words",
    "96",
]
WORKLOAD = ["--prompt", "8", "--new-tokens", "2", "--repetitions", "1", "--threads", "1", "--max-load", "99"]


class Ended(NamedTuple):
    code: int
    stderr: str


Table8 = Callable[..., Ended]


@pytest.fixture
def table8(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Table8:
    """Run the script in this process; its levels are made in processes of their own."""
    monkeypatch.syspath_prepend(TESTS.parent / "benchmarks")
    script = importlib.import_module("table8")

    def run(out: Path, sparsities: str, *options: str) -> Ended:
        asked = [*GEOMETRY, *WORKLOAD, "--engines", "onnxruntime,sparse-packed32", "--sparsities", sparsities, *options]
        monkeypatch.setattr(sys, "argv", ["table8.py", str(out), *asked])
        capfd.readouterr()
        try:
            script.main()
        except SystemExit as end:
            return Ended(int(end.code or 0), capfd.readouterr().err)
        return Ended(0, capfd.readouterr().err)

    return run


def of(rows: list[Row]) -> list[tuple[str, float | None]]:
    return sorted((row.engine, row.sparsity_asked) for row in rows if not row.is_dense)


def test_levels_join_those_that_are_there(table8: Table8, tmp_path: Path) -> None:
    try:
        library_path()
    except UserError as error:
        pytest.skip(str(error))
    out = tmp_path / "out"
    first = table8(out, "0.5", "--keep")
    assert first.code == 0, first.stderr
    assert sorted(path.name for path in (out / "work").iterdir() if path.is_dir()) == ["0"]
    before = read_rows(out / "results.jsonl")
    assert of(before) == [("onnxruntime", 0.5), ("sparse-packed32", 0.5)]
    assert {row.model for row in before} == {"random weights"}
    assert {(row.method, row.allocation) for row in before if not row.is_dense} == {("magnitude", "linear")}
    assert all(row.status == "ok" and row.speedup_fastest_dense for row in before)

    second = table8(out, "0.5,0.6,0.7")
    assert second.code == 0, second.stderr
    assert "1 of 3 levels are there" in second.stderr
    assert "0.6/checkpoint: already made" not in second.stderr
    assert "0.7/checkpoint: already made" in second.stderr  # while 60% was measured
    after = read_rows(out / "results.jsonl")
    levels = (0.5, 0.6, 0.7)
    assert of(after) == [(engine, level) for engine in ("onnxruntime", "sparse-packed32") for level in levels]
    kept = {row.identity: row for row in after}
    for row in before:
        if not row.is_dense:
            assert kept[row.identity] == row
    assert not (out / "work").exists()
    steps = [line.split(",")[:2] for line in (out / "steps.csv").read_text().splitlines()[1:]]
    of_levels = [[f"{level}", step] for level in levels for step in ("prune and export", "measure")]
    assert [step for step in steps if step[0] != "dense"] == of_levels

    measured = (out / "measurements.jsonl").read_bytes()
    third = table8(out, "0.5,0.6,0.7")
    assert third.code == 0, third.stderr
    assert (out / "measurements.jsonl").read_bytes() == measured
    assert not (out / "work").exists()

    other = table8(out, "0.5", "--blocks", "1")
    assert other.code == 2
    assert "holds Table 8 of another model" in other.stderr
    inputs = json.loads((out / "inputs.json").read_text())
    assert inputs["model"]["num_hidden_layers"] == 2


def test_a_real_checkpoint_is_pruned_by_owl_and_has_a_perplexity(
    table8: Table8, tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.npy"
    np.save(text, np.load(reference / "tiny_eval.npy")[:2, :64])
    texts = ["--calibration", reference / "tiny_calib.npy", "--text", text]
    asked = ["--model", tiny_llama, "--engines", "onnxruntime", *texts]
    ended = table8(tmp_path / "out", "0.6", *map(str, asked))
    assert ended.code == 0, ended.stderr
    dense, sparse = read_rows(tmp_path / "out" / "results.jsonl")
    assert dense.is_dense
    assert (sparse.method, sparse.allocation, sparse.sparsity_asked) == ("wanda", "owl", 0.6)
    assert dense.perplexity is not None
    assert sparse.perplexity is not None
    assert dense.perplexity != sparse.perplexity


def test_a_run_that_was_killed_while_measuring_continues_there(
    table8: Table8, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out, asked = tmp_path / "out", ("0.5", "--engines", "onnxruntime")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("table8"), "bench_bundles", interrupt)
        assert table8(out, *asked).code == 130
    ended = table8(out, *asked)
    assert ended.code == 0, ended.stderr
    assert of(read_rows(out / "results.jsonl")) == [("onnxruntime", 0.5)]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda ending: ending.name)
def test_what_makes_a_level_ends_with_a_run_that_is_killed(ending: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    variables = {**os.environ, "PYTHONPATH": str(TESTS.parent / "benchmarks")}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=variables) as run:
        assert run.stdout is not None
        maker = psutil.Process(int(run.stdout.readline()))
        run.send_signal(ending)
        assert psutil.wait_procs([maker], timeout=30)[1] == []
        run.wait(timeout=30)
