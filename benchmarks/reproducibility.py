"""Prune one model with Wanda under several instruction sets and rounding errors, and record how far results differ.

    python benchmarks/reproducibility.py MODEL CALIBRATION.npy EVALUATION.npy -o DIRECTORY [--settings native,avx2,…]
        [--seeds N] [--noise X] [--allocations uniform,owl] [--sparsities 0.5,0.6,…]

Each setting runs in a process of its own, since torch and MKL choose their kernels when they are loaded. Seeds beyond 0
multiply what comes into every block by 1 + noise * N(0, 1) while calibrating: rounding errors of another kind. A row of
`results.csv` is added after each measurement, and rows that are there are not measured again. Masks are kept in
`DIRECTORY/masks`, to be compared with those of `native` without noise, which come first.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.models.load import load_model
from owl_deploy.models.source import resolve_model
from owl_deploy.models.structure import Block, find_blocks, matrix_of
from owl_deploy.pruning.allocate import allocate
from owl_deploy.pruning.calibration.dense import DenseStatistics, measure_dense
from owl_deploy.pruning.driver import prune_blocks
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.weights import InMemory, restored

NATIVE = "native"
EAGER = "eager"
ENVIRONMENTS = {
    NATIVE: {},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "amd": {"MKL_CBWR": "AVX2,STRICT"},  # to the bit what MKL computes when told that the CPU is a Zen
    "two-threads": {"OMP_NUM_THREADS": "2"},
    EAGER: {},  # attention in steps, not in torch's fused kernel
}


@dataclass(frozen=True)
class Case:
    """What is measured once; `seed` 0 is without noise."""

    setting: str
    noise: float
    seed: int
    allocation: str
    sparsity: float

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Row(Case):
    """A measurement; what is `changed` are weights pruned in one of two masks, this one and that of `native`."""

    perplexity: float
    mask_sha256: str
    changed: int
    first_changed_block: int | None


def main() -> None:
    arguments = _parse()
    if not arguments.child:
        for setting in arguments.settings.split(","):
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | ENVIRONMENTS[setting]
            child = [sys.executable, *sys.argv, "--settings", setting, "--child"]
            subprocess.run(child, env=environment, check=True)
        return
    setting = arguments.settings
    cases = [
        Case(setting, arguments.noise if seed else 0.0, seed, allocation, float(sparsity))
        for sparsity in arguments.sparsities.split(",")
        for allocation in arguments.allocations.split(",")
        for seed in range(arguments.seeds + 1)
    ]
    missing = [case for case in cases if case.name not in _measured(arguments.out)]
    if missing:
        Measurement(arguments).run(missing)


class Measurement:
    """One process's model and texts, and where its rows go."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._out: Path = arguments.out
        (self._out / "masks").mkdir(parents=True, exist_ok=True)
        self._calibration = np.load(arguments.calibration).astype(np.int64)
        self._evaluation = np.load(arguments.evaluation).astype(np.int64)
        self._model: PreTrainedModel = load_model(resolve_model(arguments.model), torch.float32)
        if arguments.settings == EAGER:
            self._model.set_attn_implementation("eager")
        self._blocks = find_blocks(self._model)
        self._dense: DenseStatistics | None = None

    def run(self, cases: list[Case]) -> None:
        for case in cases:
            with restored(self._blocks):
                self._prune(case)
                row = self._row(case)
            _append(self._out / "results.csv", row)
            print(row, flush=True)

    def _prune(self, case: Case) -> None:
        plan = PruningPlan(sparsity=case.sparsity, allocation=case.allocation)  # type: ignore[arg-type]
        if plan.needs_lod and self._dense is None:  # without noise: the allocation is not what is perturbed
            self._dense = measure_dense(self._model, self._blocks, self._calibration, InMemory())
        shares = allocate(plan, self._blocks, InMemory(), self._dense)
        with _noisy(self._blocks, case):
            prune_blocks(self._model, self._blocks, plan, shares, ids=self._calibration, dense=self._dense)

    def _row(self, case: Case) -> Row:
        masks = _masks(self._blocks)
        np.save(self._out / "masks" / f"{case.name}.npy", masks)
        plain = np.load(self._out / "masks" / f"{_reference(case).name}.npy")
        changed = np.bitwise_count(masks ^ plain).sum(axis=1, dtype=np.int64)
        return Row(
            **asdict(case),
            perplexity=perplexity(self._model, self._evaluation),
            mask_sha256=hashlib.sha256(masks.tobytes()).hexdigest(),
            changed=int(changed.sum()),
            first_changed_block=int(changed.nonzero()[0][0]) if changed.any() else None,
        )


@contextmanager
def _noisy(blocks: list[Block], case: Case) -> Iterator[None]:
    """Multiply what comes into each block by 1 + noise * N(0, 1)."""
    if not case.seed:
        yield
        return
    generator = torch.Generator().manual_seed(case.seed)

    def perturb(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        return (hidden * (1 + case.noise * torch.randn(hidden.shape, generator=generator)), *inputs[1:])

    handles = [block.module.register_forward_pre_hook(perturb) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masks(blocks: list[Block]) -> NDArray[np.uint8]:
    """One row a block, one bit a weight: whether it is zero; as the reference's hashes are taken."""
    linears = [[np.packbits((matrix_of(linear) == 0).numpy()) for linear in block.linears.values()] for block in blocks]
    return np.stack([np.concatenate(block) for block in linears])


def _reference(case: Case) -> Case:
    return Case(NATIVE, 0.0, 0, case.allocation, case.sparsity)


def _measured(out: Path) -> set[str]:
    """Names of the cases that have a row."""
    if not (out / "results.csv").is_file():
        return set()
    with (out / "results.csv").open(newline="") as file:
        return {"-".join(row[field.name] for field in fields(Case)) for row in csv.DictReader(file)}


def _append(path: Path, row: Row) -> None:
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--settings", default=f"{NATIVE},avx2,amd")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--noise", type=float, default=1e-7)
    parser.add_argument("--allocations", default="uniform,owl")
    parser.add_argument("--sparsities", default="0.5,0.6,0.7,0.8")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
