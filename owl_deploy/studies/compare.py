"""Studies that compare perplexities: granularity, allocations, N:M patterns, methods, and OWL's M and lambda."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from owl_deploy.errors import UserError
from owl_deploy.formatting import percent
from owl_deploy.paper.tables import DENSE_7B, LLAMA_7B, TABLE_1, TABLE_3, TABLE_4, TABLE_10, at_tenth
from owl_deploy.pruning.plan import NM, Allocation, Granularity, Method, MixedNM, PruningPlan
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.studies.cells import Cell, CellRecord, Recovery, Study, StudyResult, by_sparsity, dense_cell
from owl_deploy.studies.plot import by_name, perplexity_curves, perplexity_grid
from owl_deploy.studies.tables import Column, Table, asked, fraction, label, perplexities

Paper = Callable[[CellRecord], float | None]

_GRANULARITIES: tuple[Granularity, ...] = ("row", "layer", "global")
_ALLOCATIONS: tuple[Allocation, ...] = (
    *("uniform", "owl", "owl-inverse", "global", "erdos-renyi", "er-plus"),  # the paper's
    *("dlp", "linear", "owl-per-layer"),
)
_ADMM: tuple[dict[str, Any], ...] = tuple(
    {"target": target, "statistics": statistics} for target in ("layer", "dense") for statistics in ("block", "linear")
)


def granularity(sparsities: Sequence[float]) -> Study:
    """Scores compared within a row, a linear, or the whole model (paper, Table 3)."""
    methods: tuple[Method, ...] = ("magnitude", "wanda")
    cells = [
        Cell(
            {"method": method, "granularity": unit},
            PruningPlan(sparsity, method, allocation="global" if unit == "global" else "uniform", granularity=unit),
        )
        for sparsity in sparsities
        for method in methods
        for unit in _GRANULARITIES
    ]

    def paper(cell: CellRecord) -> float | None:
        return at_tenth(TABLE_3, (cell.labels["method"], cell.labels["granularity"]), cell.sparsity_asked)

    note = (
        "With row and layer, every linear has the same sparsity; with global, one threshold holds for the whole model, "
        "on |W| for magnitude and on the outlier scores A for wanda."
    )
    return _study("granularity", "Pruning granularity", cells, paper, "paper's Table 3", note)


def allocation(sparsities: Sequence[float], method: str, generations: int | None = None) -> Study:
    """Allocations of sparsity to blocks (paper, Table 4).

    Args:
        generations: also search, for as many.

    Raises:
        UserError: the method is unknown.
    """
    cells = [
        Cell({"allocation": name}, PruningPlan(sparsity, method, name))  # type: ignore[arg-type]  # checked by the plan
        for sparsity in sparsities
        for name in _ALLOCATIONS
    ]
    if generations is not None:
        cells += [
            Cell({"allocation": "search"}, PruningPlan(sparsity, method, "search", generations=generations))  # type: ignore[arg-type]  # checked by the plan
            for sparsity in sparsities
        ]

    def paper(cell: CellRecord) -> float | None:
        return at_tenth(TABLE_4, cell.labels["allocation"], cell.sparsity_asked) if method == "wanda" else None

    return _study("allocation", f"Allocations with {method}", cells, paper, "paper's Table 4")


def by_level(
    sparsities: Sequence[float], method: str, generations: int | None, training: tuple[RecoveryPlan, str] | None
) -> Study:
    """Uniform and OWL from low to high sparsity, the best allocation of a search, and recovery (paper, Figure 2).

    The paper's figures beside them are those of its Table 4.

    Args:
        generations: also search, for as many.
        training: also train what OWL left: how, and on which text.

    Raises:
        UserError: the method is unknown.
    """
    cells = []
    for sparsity in sparsities:
        owl = PruningPlan(sparsity, method, "owl")  # type: ignore[arg-type]  # checked by the plan
        cells += [Cell({"pruned": "uniform"}, replace(owl, allocation="uniform", half_range=None))]
        cells += [Cell({"pruned": "owl"}, owl)]
        if generations is not None:
            searched = replace(owl, allocation="search", half_range=None, generations=generations)
            cells += [Cell({"pruned": "search"}, searched)]
        if training is not None:
            cells += [Cell({"pruned": "owl, recovered"}, owl, Recovery(*training))]

    def paper(cell: CellRecord) -> float | None:
        return at_tenth(TABLE_4, cell.labels["pruned"], cell.sparsity_asked) if method == "wanda" else None

    return _study("sparsity", f"Perplexity by sparsity, {method}", cells, paper, "paper's Table 4")


def n_of_m() -> Study:
    """Wanda in N:8, uniform and mixed by OWL (paper, Table 10)."""
    cells = []
    for pruned in (4, 5, 6):
        for pattern in (NM(pruned, 8), MixedNM(pruned, 8)):
            name = "owl" if isinstance(pattern, MixedNM) else "uniform"
            labels = {"pattern (pruned:8)": str(pattern), "paper's N:8 (kept)": f"{8 - pruned}:8", "allocation": name}
            cells.append(Cell(labels, PruningPlan(pattern.ratio, "wanda", pattern=pattern)))

    def paper(cell: CellRecord) -> float | None:
        if cell.sparsity_asked == 0:
            return None
        uniform, mixed = TABLE_10[8 - round(8 * cell.sparsity_asked)]
        return mixed if cell.labels["allocation"] == "owl" else uniform

    note = (
        "Here N:8 prunes N of every 8 weights. The paper's N counts the weights that are kept: its 4:8, 3:8 and 2:8 "
        "are 4:8, 5:8 and 6:8 here."
    )
    title = "N:8 with Wanda, uniform and mixed by OWL"
    return _study("nm", title, cells, paper, "paper's Table 10", note, curves=("allocation",))


def methods(sparsities: Sequence[float], only: Sequence[str] = ()) -> Study:
    """Every method with a uniform allocation and with OWL's, and the variants of ADMM (paper, Table 1).

    Args:
        only: these methods; by default all.

    Raises:
        UserError: one of them is not in this study.
    """
    plain: tuple[Method, ...] = ("magnitude", "wanda", "wanda-variant", "ria", "sparsegpt")
    for name in only:
        if name not in (*plain, "admm"):
            raise UserError(f"--methods: {name!r} is not in this study; choose from {', '.join((*plain, 'admm'))}")
    variants: list[tuple[Method, dict[str, Any], Sequence[Allocation]]] = [
        *((method, {}, ("uniform", "owl")) for method in plain),
        *(("admm", parts, ("uniform", "owl")) for parts in _ADMM[:-1]),
        ("admm", _ADMM[-1], ("uniform", "owl", "linear")),
    ]
    cells = [
        Cell(
            {
                "method": method,
                "target": parts.get("target", ""),
                "statistics": parts.get("statistics", ""),
                "allocation": name,
            },
            PruningPlan(sparsity, method, name, **parts),
        )
        for sparsity in sparsities
        for method, parts, names in variants
        if not only or method in only
        for name in names
    ]

    def paper(cell: CellRecord) -> float | None:
        if cell.sparsity_asked != 0.7:
            return None
        return TABLE_1.get((cell.labels["method"], cell.labels["allocation"]))

    of_admm = (
        "For admm, target dense fits the hidden states of the dense model, and target layer the output of each linear; "
        "statistics are of inputs after pruned blocks (block), or after pruned linears too (linear)."
    )
    notes = [of_admm] if any(cell.plan.method == "admm" for cell in cells) else []
    curves = ("method", "target", "statistics")
    return _study("methods", "Methods", cells, paper, "paper's Table 1", *notes, curves=curves, panels="allocation")


def sweep(sparsities: Sequence[float], method: str, m: Sequence[float], lambdas: Sequence[float]) -> Study:
    """OWL's M and lambda (paper, section 2.2 and Table 15).

    Raises:
        UserError: the method is unknown, or a value out of range.
    """
    cells = [
        Cell(
            {"M": f"{one_m:g}", "lambda": f"{one_lambda:g}"},
            PruningPlan(sparsity, method, "owl", owl_m=one_m, half_range=one_lambda),  # type: ignore[arg-type]
        )
        for sparsity in sparsities
        for one_m in m
        for one_lambda in lambdas
    ]

    def draw(result: StudyResult, figure: Figure) -> None:
        groups = by_sparsity(result.cells)[1:]
        figure.set_size_inches(6 * len(groups), 4.5)
        every_axes = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, group in zip(every_axes, groups, strict=True):
            values = {
                (float(cell.labels["M"]), float(cell.labels["lambda"])): cell.perplexity
                for cell in group
                if cell.perplexity is not None
            }
            perplexity_grid(axes, m, lambdas, values)
            axes.set_xlabel("lambda")
            axes.set_ylabel("M")
            axes.set_title(f"perplexity at {percent(group[0].sparsity_asked)}")

    return Study(
        "sweep",
        f"OWL's M and lambda with {method}",
        (dense_cell("M", "lambda"), *cells),
        lambda result: [_table(result, f"OWL's M and lambda with {method}", None, None)],
        draw,
    )


def _study(
    name: str,
    title: str,
    cells: Sequence[Cell],
    paper: Paper,
    source: str,
    *notes: str,
    curves: Sequence[str] | None = None,
    panels: str | None = None,
) -> Study:
    """A study with the dense model first, and the paper's figures beside ours.

    Args:
        curves: the labels that tell the curves of its plot apart; by default all.
        panels: the label that tells its panels apart, if it has several.
    """

    def draw(result: StudyResult, figure: Figure) -> None:
        titles = list(dict.fromkeys(cell.labels[panels] for cell in cells)) if panels else [""]
        shown = {
            title: by_name(
                [cell for cell in result.cells if not panels or cell.labels[panels] == title],
                curves or list(cells[0].labels),
            )
            for title in titles
        }
        figure.set_size_inches(4 + 4 * len(titles), 4.5)
        perplexity_curves(figure, shown, result.cells[0].perplexity)

    column = perplexities(f"{source}, {LLAMA_7B}", "paper_llama_7b")
    return Study(
        name,
        title,
        (dense_cell(*cells[0].labels), *cells),
        lambda result: [_table(result, title, paper, column, *notes)],
        draw,
    )


def _table(result: StudyResult, title: str, paper: Paper | None, paper_column: Column | None, *notes: str) -> Table:
    names = list(result.cells[0].labels)
    columns = [
        asked(),
        *(label(name, _field(name)) for name in names),
        fraction("achieved", "sparsity_achieved"),
        perplexities(),
        *([paper_column] if paper_column else []),
    ]

    def row(cell: CellRecord) -> list[object]:
        figures: list[object] = [cell.sparsity_asked, *cell.labels.values(), cell.sparsity_achieved, cell.perplexity]
        if paper is None:
            return figures
        return [*figures, DENSE_7B if cell.sparsity_asked == 0 else paper(cell)]

    sections = [[row(cell) for cell in group] for group in by_sparsity(result.cells)]
    return Table("", title, tuple(columns), sections, notes)


def _field(name: str) -> str:
    """A label's name in the CSV: the words before its explanation."""
    return name.partition(" (")[0].replace("'", "").replace(" ", "_").lower()
