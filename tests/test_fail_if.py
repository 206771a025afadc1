"""Conditions that fail a run: what they read, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.benchmarking.fail_if import parse_condition
from owl_deploy.benchmarking.rows import Row
from owl_deploy.errors import UserError
from owl_deploy.machine.description import Machine

from .conftest import RunCli

MACHINE = Machine(cpu="x", cores=2, instruction_set="avx2", memory_bytes=1, memory_bandwidth_gb_s=1.0, system="Linux")


def row(engine: str, sparsity: float, **figures: Any) -> Row:
    return Row(
        model="m",
        bundle=f"b{sparsity}",
        engine=engine,
        flavor="genai",
        threads=1,
        prompt_tokens=8,
        new_tokens=8,
        repetitions=1,
        sparsity_asked=sparsity,
        sparsity_achieved=sparsity,
        file_bytes=1,
        machine=MACHINE,
        **figures,
    )


ROWS = [
    row("onnxruntime", 0.0, speedup_fastest_dense=1.0, decode_ms_p50=30.0, perplexity=20.0),
    row("onnxruntime-int8", 0.0, speedup_fastest_dense=2.0, decode_ms_p50=15.0, perplexity=20.1),
    row("sparse-packed32", 0.7, speedup_fastest_dense=1.8, decode_ms_p50=16.0, perplexity=25.0),
    row("sparse-int8", 0.7, speedup_fastest_dense=3.0, decode_ms_p50=10.0, perplexity=26.0),
    row("broken", 0.7, status="failed"),
    row("ruined", 0.9, perplexity=math.nan),
]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ('speedup["sparse-int8"]@0.7 < 2.0', False),
        ('speedup["sparse-packed32"]@0.7 < 2.0', True),
        ('speedup["sparse"]@0.7 < 2.0', True),  # one of its formats is
        ('speedup["sparse"]@0.7 < 1.8', False),
        ('decode_ms["onnxruntime"]@0 < 20', False),  # nor is its int8 meant
        ('1.5 < speedup["sparse-int8"]@0.7 <= 3', True),
        ('not speedup["sparse-int8"]@0.7 >= 3', False),
        ('perplexity["sparse"]@0.7 > 1.28 * perplexity["onnxruntime"]@0', True),
        ('perplexity["sparse-packed32"]@0.7 / perplexity["onnxruntime"]@0.0 - 1 > 0.3', False),
        ('decode_ms["sparse-int8"]@0.7 > 5 and decode_ms_p50["onnxruntime"]@0 > -1', True),
        ('decode_ms["sparse-int8"]@0.7 > 50 or decode_ms["onnxruntime"]@0 + 1 < 30', False),
        ('speedup["broken"]@0.7 < 1', True),  # a row without the figure
        ('perplexity["ruined"]@0.9 > 100', True),  # not a number: nothing is sure
        ('not perplexity["ruined"]@0.9 > 100', True),
        ('perplexity["ruined"]@0.9 > 1e9 and speedup["sparse-int8"]@0.7 > 99', True),
        ('decode_ms["sparse-int8"]@0.7 / 0 > 1', True),
        ('decode_ms["sparse-int8"]@0.7 / (perplexity["onnxruntime"]@0 - 20) < 1', True),
    ],
)
def test_a_condition_is_read_as_it_is_written(text: str, holds: bool) -> None:
    assert (parse_condition(text).failure(ROWS) is not None) is holds


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("speedup[", "never closed"),
        ('speedup["a"]@0.7', "compares nothing"),
        ('engine["a"]@0.7 < 1', "engine is not a figure"),
        ('__class__["a"]@0.7 < 1', "not a figure"),
        ('open("x") < 1', "cannot read"),
        ('speedup["a"] < 1', "cannot read"),
        ('speedup["a"]@0.7 == 1', "cannot read"),
        ('speedup["a"]@0.7 < 2 ** 9', "cannot read"),
        ('speedup["a"]@0.7 < True', "cannot read"),
    ],
)
def test_anything_else_is_refused_before_anything_is_measured(
    text: str, reason: str, tmp_path: Path, run_cli: RunCli
) -> None:
    with pytest.raises(UserError, match="--fail-if"):
        parse_condition(text)
    ran = run_cli("bench", tmp_path, "-o", tmp_path / "out", "--fail-if", text)
    assert ran.code == 2
    assert reason in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_a_condition_on_a_row_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"no row of 'sparse' at 0\.5; there are broken@0\.7"):
        parse_condition('speedup["sparse"]@0.5 < 2').failure(ROWS)


def test_an_engine_that_is_not_measured_is_named_before_anything_is(tmp_path: Path, run_cli: RunCli) -> None:
    condition = parse_condition('speedup["sparse"]@0.7 < 2.0')
    condition.check_names(["onnxruntime", "sparse-int8"], [0.0, 0.7])
    with pytest.raises(UserError, match=r"sparse is not measured here; name one of onnxruntime$"):
        condition.check_names(["onnxruntime"], [0.0, 0.7])
    with pytest.raises(UserError, match=r"nothing is measured at 0\.7; name one of 0, 0\.5$"):
        condition.check_names(["sparse-int8"], [0.5, 0.0, 0.5])
    out = tmp_path / "out"
    ran = run_cli("bench", "--sweep", tmp_path, "-o", out, "--fail-if", 'speedup["spares-int8"]@0.7 < 2.0')
    assert ran.code == 2
    assert "spares-int8 is not measured here" in ran.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('speedup["sparse-packed32"]@0.7 < 2.0', "it holds"),
        ('speedup["broken"]@0.7 < 1', 'it cannot be told: speedup_fastest_dense["broken"]@0.7 was not measured'),
        ('perplexity["ruined"]@0.9 > 100', 'it cannot be told: perplexity["ruined"]@0.9 is not a number'),
        (
            'decode_ms["sparse-int8"]@0.7 / (1 - 1) > 1',
            'it cannot be told: decode_ms["sparse-int8"]@0.7 / (1 - 1): float division by zero',
        ),
        ("1e999 - 1e999 < 0", "it cannot be told: 1e309 - 1e309 is not a number"),
        (f"{10**400} * 2 < 0", f"it cannot be told: {10**400} * 2: int too large to convert to float"),
    ],
)
def test_a_condition_says_why_it_fails_the_run(text: str, reason: str) -> None:
    assert parse_condition(text).failure(ROWS) == reason
