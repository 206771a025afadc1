"""The cost of pruning without forward passes: seconds for scores, allocations and weight updates (paper, Table 7)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from owl_deploy.formatting import number, percent
from owl_deploy.paper.tables import LLAMA_7B, TABLE_7
from owl_deploy.pruning.plan import Allocation, Method, PruningPlan
from owl_deploy.studies.cells import Cell, CellRecord, Study, StudyResult, by_sparsity
from owl_deploy.studies.plot import bars
from owl_deploy.studies.tables import Column, Table, asked, fraction, label

_METHODS: tuple[Method, ...] = ("wanda", "sparsegpt", "admm")
_ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "owl")


def efficiency(sparsities: Sequence[float]) -> Study:
    """Wanda, SparseGPT and ADMM, uniform and with OWL."""
    cells = tuple(
        Cell({"method": method, "allocation": allocation}, PruningPlan(sparsity, method, allocation))
        for sparsity in sparsities
        for method in _METHODS
        for allocation in _ALLOCATIONS
    )
    return Study("efficiency", "Time for pruning metrics", cells, _tables, _draw, is_timed=True)


def _tables(result: StudyResult) -> list[Table]:
    columns = (
        asked(),
        label("method"),
        label("allocation"),
        fraction("achieved", "sparsity_achieved"),
        Column("seconds", "metric_seconds", number),
        Column("CPU-seconds", "metric_cpu_seconds", number),
        Column(f"paper's Table 7, seconds, {LLAMA_7B}, A100", "paper_llama_7b_seconds", lambda value: f"{value:g}"),
    )

    def row(cell: CellRecord) -> list[object]:
        return [
            cell.sparsity_asked,
            *cell.labels.values(),
            cell.sparsity_achieved,
            cell.metric_seconds,
            cell.metric_cpu_seconds,
            TABLE_7.get((cell.labels["method"], cell.labels["allocation"])),
        ]

    sections = [[row(cell) for cell in group] for group in by_sparsity(result.cells)]
    study = result.study
    note = (
        "Without forward passes: the allocation (for OWL, the LOD), and the scores, mask and new weights of each "
        f"linear. Measured once, on {study.threads} thread{'' if study.threads == 1 else 's'} of {study.cpu}."
    )
    return [Table("", "Time for the pruning metric alone", columns, sections, (note,))]


def _draw(result: StudyResult, figure: Figure) -> None:
    seconds = {
        f"{', '.join(cell.labels.values())}, {percent(cell.sparsity_asked)}": cell.metric_seconds
        for cell in result.cells
        if cell.metric_seconds is not None
    }
    figure.set_size_inches(8, 1 + 0.4 * len(seconds))
    bars(figure, seconds, "seconds without forward passes (log scale)")
