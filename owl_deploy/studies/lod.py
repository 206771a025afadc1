"""The Layerwise Outlier Distribution, of dense blocks (paper, Figure 1) and after pruning (Table 2)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from owl_deploy.paper.tables import DENSE_13B, LLAMA_13B, TABLE_2, TABLE_2_DENSE_LOD, TABLE_2_M
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.studies.cells import Cell, CellRecord, Study, StudyResult, by_sparsity, dense_cell
from owl_deploy.studies.plot import curves
from owl_deploy.studies.tables import Column, Table, asked, fraction, label, perplexities

_NOTE = (
    "LOD: percent of a block's weights, zeros among them, whose outlier score exceeds M times the dense block's mean; "
    "inputs are the dense model's. Summed over blocks, so that models of other depths differ."
)


def lod(m: Sequence[float], sparsities: Sequence[float], methods: Sequence[str]) -> Study:
    """LOD for each M; with `sparsities`, also after uniform pruning by each of `methods`.

    Raises:
        UserError: a method is unknown.
    """
    cells = [
        Cell({"method": method}, PruningPlan(sparsity, method, "uniform"))  # type: ignore[arg-type]  # checked by it
        for sparsity in sparsities
        for method in methods
    ]

    def tables(result: StudyResult) -> list[Table]:
        return [_by_block(result), *([_after_pruning(result)] if cells else [])]

    return Study("lod", "Layerwise Outlier Distribution", (dense_cell("method"), *cells), tables, _draw, tuple(m))


def _by_block(result: StudyResult) -> Table:
    dense = result.cells[0].lod_percent
    columns = [label("block"), *(_percent(f"M {m}", f"lod_m{m}") for m in dense)]
    rows = [list(row) for row in zip(result.study.block_names, *dense.values(), strict=True)]
    return Table("", "LOD of the dense model's blocks (%)", tuple(columns), [rows])


def _after_pruning(result: StudyResult) -> Table:
    """The paper's Table 2, for each M."""
    before = {m: sum(values) for m, values in result.cells[0].lod_percent.items()}
    columns = (
        asked(),
        label("M", "m"),
        label("method"),
        fraction("achieved", "sparsity_achieved"),
        _percent("LOD", "lod"),
        _percent("ΔLOD", "delta_lod", sign="+"),
        perplexities(),
        _percent(f"paper's LOD, {LLAMA_13B}", "paper_llama_13b_lod"),
        perplexities(f"paper's Table 2, {LLAMA_13B}", "paper_llama_13b"),
    )

    def row(cell: CellRecord, m: str) -> list[object]:
        total = sum(cell.lod_percent[m])
        change = total - before[m] if cell.sparsity_asked > 0 else None
        figures = [cell.sparsity_achieved, total, change, cell.perplexity]
        return [cell.sparsity_asked, m, cell.labels["method"], *figures, *_paper(cell, float(m))]

    dense, *pruned = by_sparsity(result.cells)
    sections = [[row(dense[0], m) for m in before]]
    sections += [[row(cell, m) for cell in group] for group in pruned for m in before]
    return Table("pruned", "LOD summed over blocks (%), after uniform pruning", columns, sections, (_NOTE,))


def _paper(cell: CellRecord, m: float) -> tuple[float | None, float | None]:
    """The LOD and perplexity in the paper, for the M it uses."""
    dense = (TABLE_2_DENSE_LOD, DENSE_13B)
    total, perplexity = (
        dense if cell.sparsity_asked == 0 else TABLE_2.get((cell.labels["method"], cell.sparsity_asked), (None, None))
    )
    return total if m == TABLE_2_M else None, perplexity


def _percent(title: str, field: str, sign: str = "") -> Column:
    return Column(title, field, lambda value: f"{value:{sign}.3f}")


def _draw(result: StudyResult, figure: Figure) -> None:
    """The LOD of the dense model over depth, as in Figure 1."""
    dense = result.cells[0].lod_percent
    axes = figure.subplots()
    curves(axes, {f"M {m}": list(enumerate(values)) for m, values in dense.items()})
    if all(value > 0 for values in dense.values() for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("block")
    axes.set_ylabel("LOD (% of weights that are outliers)")
    figure.legend(loc="outside right upper", frameon=False)
