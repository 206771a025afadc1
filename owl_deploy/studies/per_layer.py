"""OWL per block against OWL per layer: sparsities of the linears, and perplexity (paper, appendix F)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from owl_deploy.paper.tables import DENSE_7B, LLAMA_7B, TABLES_13_14
from owl_deploy.pruning.plan import Allocation, PruningPlan
from owl_deploy.studies.cells import Cell, CellRecord, Study, StudyResult, by_sparsity, dense_cell
from owl_deploy.studies.plot import Points, curves
from owl_deploy.studies.tables import Table, asked, fraction, label, perplexities

_GRANTED: dict[Allocation, str] = {"owl": "per block", "owl-per-layer": "per layer"}


def per_layer(sparsities: Sequence[float], method: str) -> Study:
    """One D per block, or one per linear (paper, Tables 13 and 14).

    Raises:
        UserError: the method is unknown.
    """
    cells = [
        Cell({"owl": name}, PruningPlan(sparsity, method, allocation))  # type: ignore[arg-type]  # checked by it
        for sparsity in sparsities
        for allocation, name in _GRANTED.items()
    ]

    def tables(result: StudyResult) -> list[Table]:
        return [_perplexities(result, method), _sparsities(result)]

    return Study("per-layer", f"OWL per block and per layer, {method}", (dense_cell("owl"), *cells), tables, _draw)


def _perplexities(result: StudyResult, method: str) -> Table:
    columns = (
        asked(),
        label("OWL", "owl"),
        fraction("achieved", "sparsity_achieved"),
        perplexities(),
        perplexities(f"paper's appendix F, {LLAMA_7B}", "paper_llama_7b"),
    )

    def paper(cell: CellRecord) -> float | None:
        if cell.sparsity_asked == 0:
            return DENSE_7B
        known = method == "wanda" and cell.sparsity_asked == 0.7
        return TABLES_13_14[str(cell.plan["allocation"])] if known else None

    sections = [
        [
            [cell.sparsity_asked, cell.labels["owl"], cell.sparsity_achieved, cell.perplexity, paper(cell)]
            for cell in group
        ]
        for group in by_sparsity(result.cells)
    ]
    note = "The captions of the paper's Tables 13 and 14 are swapped: the text's perplexities are shown."
    return Table("", "OWL per block and per layer", columns, sections, (note,))


def _sparsities(result: StudyResult) -> Table:
    """A row per block, a column per linear."""
    linears = list(dict.fromkeys(name for cell in result.cells for _, name in _places(result, cell)))
    columns = (
        asked(),
        label("OWL", "owl"),
        label("block"),
        *(fraction(name.rpartition(".")[2], name) for name in linears),
    )
    sections = []
    for cell in result.cells[1:]:
        found = {place: cell.linear_sparsities[".".join(place)] for place in _places(result, cell)}
        sections.append(
            [
                [cell.sparsity_asked, cell.labels["owl"], block, *(found.get((block, name)) for name in linears)]
                for block in result.study.block_names
            ]
        )
    return Table("linears", "Sparsity of each linear", columns, sections)


def _places(result: StudyResult, cell: CellRecord) -> list[tuple[str, str]]:
    """The block of every linear, and its path in the block."""
    return [
        (block, name.removeprefix(f"{block}."))
        for block in result.study.block_names
        for name in cell.linear_sparsities
        if name.startswith(f"{block}.")
    ]


def _draw(result: StudyResult, figure: Figure) -> None:
    """Sparsity over depth: of each kind of linear per layer, and of the block."""
    depth = {block: index for index, block in enumerate(result.study.block_names)}
    groups = by_sparsity(result.cells)[1:]
    figure.set_size_inches(8, 4.5 * len(groups))
    every_axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, (of_block, of_layers) in zip(every_axes, groups, strict=True):
        series: dict[str, Points] = {}
        for block, name in _places(result, of_layers):
            point = (float(depth[block]), 100 * of_layers.linear_sparsities[f"{block}.{name}"])
            series[name] = [*series.get(name, ()), point]
        curves(axes, series)
        means: dict[int, list[float]] = {}
        for block, name in _places(result, of_block):
            means.setdefault(depth[block], []).append(100 * of_block.linear_sparsities[f"{block}.{name}"])
        heights = [sum(values) / len(values) for values in means.values()]
        axes.plot(list(means), heights, color="black", linewidth=2, label="per block")
        axes.set_xlabel("block")
        axes.set_ylabel("sparsity (%)")
    figure.legend(*every_axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
