"""The parts of a study: cells, each a pruning plan, and the records of what was measured for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from matplotlib.figure import Figure
from pydantic import Field

from owl_deploy.errors import UserError
from owl_deploy.evaluation.tasks import TaskAccuracy
from owl_deploy.pruning.levels import parse_sparsities
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.records import Record, TextRecord, fingerprint
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.rounding import Rounded
from owl_deploy.studies.tables import Table


@dataclass(frozen=True)
class Recovery:
    """A training after the pruning, and the text to train on."""

    plan: RecoveryPlan
    text: str


ChosenBy = Literal["owl", "l1", "random"]


@dataclass(frozen=True)
class Precision:
    """How weights are rounded, block by block, and nothing is pruned.

    Attributes:
        options: of a block, the widest first: numbers of bits of the paper's quantiser, or grids to round to by GPTQ.
            Each is taken by an equal share of the blocks.
        by: which blocks take the wider ones: those with most outliers (`owl`), the largest mean |W| (`l1`), or any.
        seed: of a random choice.
    """

    options: tuple[int, ...] | tuple[Rounded, ...]
    by: ChosenBy = "owl"
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """One plan, and its labels in the tables of the study: a value for each label column.

    Attributes:
        recovery: what follows the pruning, if anything does.
        precision: mixed precision in place of pruning; the plan, of sparsity 0, has OWL's M.
    """

    labels: dict[str, str]
    plan: PruningPlan
    recovery: Recovery | None = None
    precision: Precision | None = None

    def __str__(self) -> str:
        labels = [f"{name} {value}" for name, value in self.labels.items() if value]
        return ", ".join([*labels, f"sparsity {self.plan.sparsity:g}"])


class TrainingRecord(Record):
    """How a recovered cell was trained.

    Attributes:
        before: perplexity as pruned; the cell's own is that after the training.
        seconds: of the training alone.
        checkpoint: where it is, from the study's directory.
    """

    plan: dict[str, object]
    text: TextRecord
    tokens: int
    seconds: float
    before: float
    checkpoint: str


class CellRecord(Record):
    """The result of one cell: a line of `cells.jsonl`.

    Attributes:
        key: equal for cells with the same plan and the same measurements.
        linear_sparsities: as achieved, by the linear's full name; their zeros over their weights.
        sparsity_achieved: of all linears.
        perplexity: in torch, fp32; None where no text was given.
        tasks: accuracy at zero-shot tasks, in torch, fp32; empty where none were asked.
        lod_percent: D of each block after pruning, by M (as text): its scores are compared with the dense block's mean.
        bits_per_weight: of the linears, masks and scales included, the scales of the paper's quantiser left out; None
            where it was not asked.
        training: of a cell that was recovered.
        metric_seconds: wall-clock time of the allocation and of each linear's pruning, without any forward pass; None
            for a cell that was recovered.
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
    bits_per_weight: float | None = None
    training: TrainingRecord | None = None
    metric_seconds: float | None
    metric_cpu_seconds: float | None
    seconds: float


class TasksRecord(Record):
    """The zero-shot tasks of a study.

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
    """`study.json`: the inputs from which all cells of a directory were measured."""

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
    """A finished study: `cells` in the order of its tables, the dense model first."""

    study: StudyRecord
    cells: list[CellRecord]


@dataclass(frozen=True)
class Study:
    """The cells to measure, and how to present them.

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

    def key(self, cell: Cell, trained_on: str | None) -> str:
        """The key of a cell's record; `trained_on` is the SHA-256 of the text of its recovery, if it has one."""
        inputs: dict[str, object] = {"plan": cell.plan.fields, "lod_m": self.lod_m}
        if cell.recovery is not None:
            inputs |= {"recovery": asdict(cell.recovery.plan), "trained_on": trained_on}
        if cell.precision is not None:
            inputs |= {"precision": asdict(cell.precision)}
        return fingerprint(inputs)


def dense_cell(*labels: str) -> Cell:
    """The dense model, labelled `dense` in the first label column."""
    return Cell({name: "" if index else "dense" for index, name in enumerate(labels)}, PruningPlan(0.0))


def levels(text: str) -> list[float]:
    """`parse_sparsities` without 0, as the dense model is a cell of every study.

    Raises:
        UserError: not a list of sparsities, or none above 0.
    """
    found = [level for level in parse_sparsities(text) if level > 0]
    if not found:
        raise UserError(f"--sparsities {text}: give at least one above 0; the dense model is always measured")
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
        raise UserError(f"{option} {text}: give numbers above 0, separated by commas")
    return found


def by_sparsity(cells: Sequence[CellRecord]) -> list[list[CellRecord]]:
    """The cells in groups of equal sparsity, in order of the first of each."""
    groups: dict[float, list[CellRecord]] = {}
    for cell in cells:
        groups.setdefault(cell.sparsity_asked, []).append(cell)
    return list(groups.values())
