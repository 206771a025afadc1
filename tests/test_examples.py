"""The examples run as their pages say, and the Python API does what the commands do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import owl_deploy as owl

from .conftest import TESTS, TinyModel

EXAMPLES = TESTS.parent / "examples"


def run(script: str, *arguments: object) -> str:
    """What the example prints; it has to end well."""
    variables = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    ran = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)], env=variables, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples") / "out"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"word{index % 95}" for index in range(4000)))
    return file


@pytest.fixture(scope="module")
def worded(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A small LLaMA with a tokenizer and heads of 16, as GroupQueryAttention wants them."""
    directory = tmp_path_factory.mktemp("worded") / "model"
    shutil.copytree(tiny_model("llama", head_dim=16), directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pruned(out: Path, text: Path, worded: Path) -> str:
    return run("prune_in_python.py", worded, text, out, 32)


def test_a_model_is_pruned_measured_and_heard_from_python(pruned: str) -> None:
    assert "sparse: 50.0% zeros" in pruned
    assert "sparse-int8 at 50%" in pruned
    assert pruned.splitlines()[-1].strip()


def test_results_are_listed_fastest_first(pruned: str, out: Path) -> None:
    assert pruned
    lines = run("read_results.py", out / "results" / "results.jsonl").splitlines()
    times_ms = [float(line.split(" ms/token")[0].split()[-1]) for line in lines]
    assert len(lines) == 2
    assert times_ms == sorted(times_ms)


def test_an_engine_is_one_class_and_one_registration(pruned: str, out: Path) -> None:
    assert pruned
    owl.export(out / "dense", out / "dense-bundle", ["torch"])
    printed = run("add_an_engine.py", out / "dense-bundle", out / "new")
    engine, milliseconds = printed.splitlines()[1].split(": ")
    assert engine == "cacheless"
    assert float(milliseconds.removesuffix(" ms a token")) > 0


def test_importing_the_package_is_light() -> None:
    code = "import sys, owl_deploy; assert 'torch' not in sys.modules; assert 'bench' in dir(owl_deploy)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(TESTS.parent)}, check=True)


def test_every_name_that_the_package_promises_is_there() -> None:
    assert all(getattr(owl, name) is not None for name in owl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        owl.nothing  # noqa: B018


def test_mistakes_are_the_commands_own(tmp_path: Path) -> None:
    with pytest.raises(owl.UserError, match="not an export bundle"):
        owl.load_bundle(tmp_path)


def test_the_manual_of_cmake_becomes_text_to_train_and_to_measure_on(tmp_path: Path) -> None:
    told = run("cmake_manual.py", tmp_path / "text")
    train, test = (
        [json.loads(line)["text"] for line in (tmp_path / "text" / name).read_text().splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    )
    assert f"{len(train) + len(test)} pages" in told
    assert 8 * len(test) < len(train) < 10 * len(test)
    assert sum(map(len, train)) > 2_000_000
