"""Accuracy on zero-shot tasks after pruning (paper, Table 5)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from owl_deploy.evaluation.tasks import TaskAccuracy
from owl_deploy.formatting import percent
from owl_deploy.paper.tables import LLAMA_7B, TABLE_5, TABLE_5_DENSE, TABLE_5_TASKS
from owl_deploy.plotting import COLOURS
from owl_deploy.pruning.plan import Allocation, PruningPlan
from owl_deploy.studies.cells import Cell, CellRecord, Study, StudyResult, by_sparsity, dense_cell
from owl_deploy.studies.tables import Column, Table, asked, fraction, label, perplexities

_ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "owl")
_NOTE = (
    "Percent of examples answered correctly: acc_norm (log-likelihood per character) for tasks that have it, else acc. "
    "The second table has both, with standard errors. The paper does not say which of them it reports."
)


def zero_shot(sparsities: Sequence[float], methods: Sequence[str]) -> Study:
    """Each method with a uniform allocation and with OWL's; magnitude only with the uniform one, as in the paper.

    Raises:
        UserError: a method is unknown.
    """
    cells = [
        Cell({"method": method, "allocation": allocation}, PruningPlan(sparsity, method, allocation))  # type: ignore[arg-type]  # checked by it
        for sparsity in sparsities
        for method in methods
        for allocation in (_ALLOCATIONS[:1] if method == "magnitude" else _ALLOCATIONS)
    ]

    def tables(result: StudyResult) -> list[Table]:
        return [_side_by_side(result), _by_task(result)]

    return Study("zero-shot", "Zero-shot tasks", (dense_cell("method", "allocation"), *cells), tables, _draw)


def _side_by_side(result: StudyResult) -> Table:
    """The layout of the paper's Table 5: a column per task, and below each row of ours the same row of the paper."""
    tasks = [one.task for one in result.cells[0].tasks]
    columns = (
        asked(),
        label("method"),
        label("allocation"),
        label("model"),
        *(_percent(name, name) for name in tasks),
        _percent("mean", "mean"),
        *([perplexities()] if result.study.evaluation else []),
    )

    def rows(cell: CellRecord) -> list[list[object]]:
        ours = [100 * one.headline for one in cell.tasks]
        paper = [_paper(cell, name) for name in tasks]
        names = [cell.sparsity_asked, *cell.labels.values()]
        known = [value for value in paper if value is not None]
        lines = [
            [*names, "this", *ours, statistics.fmean(ours), *([cell.perplexity] if result.study.evaluation else [])]
        ]
        if known:
            mean = (
                statistics.fmean(known) if len(known) == len(tasks) else None
            )  # only a mean of the same tasks compares
            empty = [None] if result.study.evaluation else []
            lines.append([*names, f"paper's Table 5, {LLAMA_7B}", *paper, mean, *empty])
        return lines

    sections = [[row for cell in group for row in rows(cell)] for group in by_sparsity(result.cells)]
    return Table("", "Accuracy on zero-shot tasks (%)", columns, sections, (_NOTE,))


def _by_task(result: StudyResult) -> Table:
    columns = (
        asked(),
        label("method"),
        label("allocation"),
        fraction("achieved", "sparsity_achieved"),
        label("task"),
        Column("examples", "examples"),
        _percent("acc", "acc_percent"),
        _percent("± (standard error)", "acc_stderr_percent"),
        _percent("acc_norm", "acc_norm_percent"),
        _percent("± (standard error)", "acc_norm_stderr_percent"),
        _percent(f"paper's Table 5, {LLAMA_7B}", "paper_llama_7b_percent"),
    )

    def row(cell: CellRecord, one: TaskAccuracy) -> list[object]:
        figures = [_of_hundred(value) for value in (one.acc, one.acc_stderr, one.acc_norm, one.acc_norm_stderr)]
        names = [cell.sparsity_asked, *cell.labels.values(), cell.sparsity_achieved, one.task, one.examples]
        return [*names, *figures, _paper(cell, one.task)]

    sections = [[row(cell, one) for one in cell.tasks] for cell in result.cells]
    return Table("tasks", "Each task (%)", columns, sections)


def _paper(cell: CellRecord, task: str) -> float | None:
    """The paper's accuracy (%) of LLaMA-7B, dense or at 70%."""
    if task not in TABLE_5_TASKS:
        return None
    found = TABLE_5_DENSE if cell.sparsity_asked == 0 else None
    if cell.sparsity_asked == 0.7:
        found = TABLE_5.get((cell.labels["method"], cell.labels["allocation"]))
    return found[TABLE_5_TASKS.index(task)] if found else None


def _of_hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _percent(title: str, field: str) -> Column:
    return Column(title, field, lambda value: f"{value:.2f}")


def _draw(result: StudyResult, figure: Figure) -> None:
    """A group of bars per task, with one bar per cell and standard errors."""
    tasks = [one.task for one in result.cells[0].tasks]
    figure.set_size_inches(3 + 1.4 * len(tasks), 4.5)
    axes = figure.subplots()
    width = 0.8 / len(result.cells)
    for index, cell in enumerate(result.cells):
        name = ", ".join(filter(None, cell.labels.values()))
        axes.bar(
            np.arange(len(tasks)) + (index + 0.5) * width - 0.4,
            [100 * one.headline for one in cell.tasks],
            width,
            yerr=[100 * (one.headline_stderr or 0) for one in cell.tasks],
            error_kw={"elinewidth": 0.8},
            color=COLOURS[index % len(COLOURS)],
            label=f"{name}, {percent(cell.sparsity_asked)}" if cell.sparsity_asked else name,
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
