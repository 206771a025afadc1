"""What a study is made of: cells, each one a plan to prune by, and what was measured of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure
from pydantic import Field

from owl_deploy.errors import UserError
from owl_deploy.evaluation.tasks import TaskAccuracy
from owl_deploy.pruning.levels import parse_sparsities
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.records import Record, TextRecord, fingerprint
from owl_deploy.studies.tables import Table


@dataclass(frozen=True)
class Cell:
    """One plan, and what it is called in the study's tables: a value for each of their label columns."""

    labels: dict[str, str]
    plan: PruningPlan

    def __str__(self) -> str:
        labels = [f"{name} {value}" for name, value in self.labels.items() if value]
        return ", ".join([*labels, f"sparsity {self.plan.sparsity:g}"])


class CellRecord(Record):
    """What came of one cell: a line of `cells.jsonl`.

    Attributes:
        key: equal for equal plans of equal measurements.
        linear_sparsities: as achieved, by the linear's full name; their zeros over their weights.
        sparsity_achieved: of all linears.
        perplexity: in torch, fp32; None where no text was given.
        tasks: accuracy at zero-shot tasks, in torch, fp32; empty where none were asked.
        lod_percent: D of each block after pruning, by M (as text): its scores are compared with the dense block's mean.
        metric_seconds: wall-clock time of the allocation and of each linear's pruning, without any forward pass.
        metric_cpu_seconds: the same, summed over threads.
        seconds: wall-clock time of the whole cell.
    """

    key: str
    labels: dict[str, str]
    plan: dict[str, object]
    sparsity_asked: float
    sparsity_achieved: float
    linear_sparsities: dict[str, float]
    perplexity: float | None
    tasks: list[TaskAccuracy] = Field(default_factory=list)
    lod_percent: dict[str, list[float]]
    metric_seconds: float
    metric_cpu_seconds: float
    seconds: float


class TasksRecord(Record):
    """Which zero-shot tasks were asked.

    Attributes:
        examples: how many of each task.
        files: where they came from, by task; the others came from the hub.
        sha256: over all prompts, answers and solutions.
    """

    examples: dict[str, int]
    files: dict[str, str]
    sha256: str
    lm_eval_version: str


class StudyRecord(Record):
    """`study.json`: what a directory's cells were measured on. Nothing measured on other inputs joins them."""

    schema_version: int = 1
    study: str
    model: str
    model_sha256: str
    block_names: list[str]
    calibration: TextRecord
    evaluation: TextRecord | None
    tasks: TasksRecord | None = None
    threads: int
    cpu: str
    inputs_sha256: str
    versions: dict[str, str]


class StudyResult(Record):
    """A study that is done: `cells` in the order of its tables, the dense model first."""

    study: StudyRecord
    cells: list[CellRecord]


@dataclass(frozen=True)
class Study:
    """Which cells to measure, and how they are told.

    Attributes:
        lod_m: measure the LOD after pruning for each of these M.
        is_timed: its figures are times, so threads and CPU are inputs too.
        tables: the first is `NAME.csv`; others are `NAME-table.csv`.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    tables: Callable[[StudyResult], list[Table]]
    draw: Callable[[StudyResult, Figure], None]
    lod_m: tuple[float, ...] = ()
    is_timed: bool = False

    @cached_property
    def keys(self) -> list[str]:
        """Of each cell: what its record is found by."""
        return [fingerprint({"plan": dataclasses.asdict(cell.plan), "lod_m": self.lod_m}) for cell in self.cells]


def dense_cell(*labels: str) -> Cell:
    """The model as it is, called `dense` in the first label column."""
    return Cell({name: "" if index else "dense" for index, name in enumerate(labels)}, PruningPlan(0.0))


def levels(text: str) -> list[float]:
    """`parse_sparsities` without 0: the dense model is a cell of every study.

    Raises:
        UserError: not a list of sparsities, or none above 0.
    """
    found = [level for level in parse_sparsities(text) if level > 0]
    if not found:
        raise UserError(f"--sparsities {text}: give at least one above 0; the dense model is measured anyway")
    return found


def numbers(text: str, option: str) -> list[float]:
    """`3,5,7` -> ascending numbers.

    Raises:
        UserError: not such a list, or a number that is not above 0.
    """
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf for value in found):  # also false for NaN
        raise UserError(f"{option} {text}: give numbers above 0 with commas between them")
    return found


def by_sparsity(cells: Sequence[CellRecord]) -> list[list[CellRecord]]:
    """The cells in groups of equal sparsity, in order of the first of each."""
    groups: dict[float, list[CellRecord]] = {}
    for cell in cells:
        groups.setdefault(cell.sparsity_asked, []).append(cell)
    return list(groups.values())
