"""Training after pruning, and dense models with the same training (paper, Table 6)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from matplotlib.figure import Figure

from owl_deploy.errors import UserError
from owl_deploy.formatting import MISSING, enumeration, number, percent, perplexity_text
from owl_deploy.paper.tables import TABLE_6, TABLE_6_SETTING
from owl_deploy.plotting import COLOURS, MARKERS, scale_logarithmically
from owl_deploy.pruning.bits import UNROUNDED_BITS
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.rounding import Rounded
from owl_deploy.studies.cells import Cell, CellRecord, Recovery, Study, StudyResult, by_sparsity, dense_cell
from owl_deploy.studies.tables import Column, Table, asked, fraction, label, perplexities

ADAPTER = "lora-adapter"
_RECOVERIES: dict[str, dict[str, Any]] = {
    ADAPTER: {"method": "lora", "merge": False, "kl": 0.0, "hidden": 0.0, "cross_entropy": 1.0},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "blocks": {"method": "blocks"},
}
RECOVERIES = tuple(_RECOVERIES)
_ONE_SHOT = "none"
_NOTES = (
    f"{ADAPTER} is the paper's: plain LoRA, trained on the text's next tokens, not merged. lora is masked and merged. "
    "All but the first are trained towards the dense model; rounded weights in full, through their grid.",
    f"{_ONE_SHOT} is rounded by GPTQ and not trained. A training through a grid begins with unrounded weights.",
    "Bits a weight: of the blocks' linears, masks and scales included, adapters not; unrounded weights count "
    f"{UNROUNDED_BITS}.",
)
_AS_FEW = 0.02
"""Bits: less makes no difference."""


def recovery(
    sparsities: Sequence[float],
    method: str,
    allocation: str,
    training: RecoveryPlan,
    text: str,
    recoveries: Sequence[str],
    grids: Sequence[str],
) -> Study:
    """Every way to recover at every sparsity; for each grid, sparse and dense models rounded to it and trained in it.

    Args:
        training: its tokens, windows and seed hold for all of them.
        recoveries: some of `RECOVERIES`.

    Raises:
        UserError: a method, an allocation, a recovery or a grid is unknown.
    """
    for name in recoveries:
        if name not in _RECOVERIES:
            raise UserError(f"--recoveries: {name!r} is unknown; choose from {', '.join(RECOVERIES)}")
    if not (recoveries or grids):
        raise UserError("nothing is to be trained; give --recoveries or --weights")

    def cell(sparsity: float, name: str, grid: str = "") -> Cell:
        weights = cast("Rounded | None", grid or None)
        plan = PruningPlan(sparsity, method, allocation if sparsity else "uniform")  # type: ignore[arg-type]  # checked by it
        labels = {"recovery": name, "weights": grid}
        if name == _ONE_SHOT:
            return Cell(labels, replace(plan, weights=weights))
        return Cell(labels, plan, Recovery(_trained(training, name, weights), text))

    cells = [dense_cell("recovery", "weights")]
    for sparsity in (0.0, *sparsities):
        cells += [cell(sparsity, name) for name in recoveries if sparsity]
        cells += [cell(sparsity, name, grid) for grid in grids for name in (_ONE_SHOT, "full")]
    is_papers = method == "sparsegpt" and allocation == "owl"
    title = f"Recovery after {method}, {allocation}"
    return Study("recovery", title, tuple(cells), lambda result: [_table(result, title, is_papers=is_papers)], _draw)


def _trained(training: RecoveryPlan, name: str, weights: Rounded | None) -> RecoveryPlan:
    return replace(training, learning_rate=None, weights=weights, **_RECOVERIES[name])


def _table(result: StudyResult, title: str, *, is_papers: bool) -> Table:
    columns = (
        asked(),
        label("recovery"),
        label("weights"),
        label("model"),
        fraction("achieved", "sparsity_achieved"),
        Column("bits a weight", "bits_per_weight", lambda value: f"{value:.2f}"),
        perplexities("perplexity before", "perplexity_before"),
        perplexities("after", "perplexity"),
        Column("tokens", "tokens"),
        Column("seconds", "seconds", number),
    )

    def rows(cell: CellRecord) -> Iterable[list[object]]:
        labels = [cell.sparsity_asked, *cell.labels.values()]
        trained = cell.training
        if trained is None:
            bits = cell.bits_per_weight or float(UNROUNDED_BITS)
            yield [*labels, "this", cell.sparsity_achieved, bits, cell.perplexity, None, None, None]
            return
        figures = [trained.before, cell.perplexity, trained.tokens, trained.seconds]
        yield [*labels, "this", cell.sparsity_achieved, cell.bits_per_weight, *figures]
        if is_papers and cell.labels["recovery"] == ADAPTER and cell.sparsity_asked == TABLE_6_SETTING:
            for model, (before, after) in TABLE_6.items():
                yield [*labels, f"paper's Table 6, {model}", None, None, before, after, None, None]

    sections = [[row for cell in group for row in rows(cell)] for group in by_sparsity(result.cells)]
    return Table("", title, columns, sections, _NOTES, _findings(result.cells))


def _findings(cells: Sequence[CellRecord]) -> tuple[str, ...]:
    """Sparse against dense with the same training, at no more bits: first where dense is better."""
    trained = [cell for cell in cells if cell.training is not None]
    sparse = sorted((cell for cell in trained if cell.sparsity_asked), key=_perplexity)
    rival = {id(cell): _rival(cell, trained) for cell in sparse}
    lost = [cell for cell in sparse if (best := rival[id(cell)]) and _perplexity(best) < _perplexity(cell)]
    won = [cell for cell in sparse if (best := rival[id(cell)]) and _perplexity(best) >= _perplexity(cell)]
    alone = [cell for cell in sparse if rival[id(cell)] is None]
    found = []
    if lost:
        count = f"{len(lost)} of {len(sparse)} sparse models"
        found.append(
            f"Dense with the same training and no more bits is better than {count}: "
            f"{_named(rival[id(lost[0])])}, against {_named(lost[0])}."
        )
    if won:
        found.append(
            f"Sparse is better than dense with the same training and no more bits: {_named(won[0])}, against "
            f"{_named(rival[id(won[0])])}."
        )
    if alone and any(not cell.sparsity_asked for cell in trained):
        found.append(f"No dense model has as few bits as {enumeration([_named(cell) for cell in alone])}.")
    return tuple(found)


def _rival(cell: CellRecord, trained: Sequence[CellRecord]) -> CellRecord | None:
    """The best dense model that was trained as long and has no more bits."""
    most = (cell.bits_per_weight or 0) + _AS_FEW
    dense = [other for other in trained if not other.sparsity_asked and (other.bits_per_weight or most + 1) <= most]
    return min(dense, key=_perplexity, default=None)


def _perplexity(cell: CellRecord) -> float:
    value = cell.perplexity
    return math.inf if value is None or math.isnan(value) else value


def _named(cell: CellRecord | None) -> str:
    if cell is None:
        return MISSING
    what = percent(cell.sparsity_asked) if cell.sparsity_asked else "dense"
    words = [what, *([cell.labels["weights"]] if cell.labels["weights"] else [cell.labels["recovery"]])]
    return f"{' '.join(words)} ({cell.bits_per_weight:.2f} bits, perplexity {perplexity_text(cell.perplexity)})"


def _draw(result: StudyResult, figure: Figure) -> None:
    """Perplexity over bits a weight: a line from before (hollow) to after."""
    axes = figure.subplots()
    trained = [cell for cell in result.cells if cell.training is not None and cell.perplexity is not None]
    names = list(dict.fromkeys(_series(cell) for cell in trained))
    values = [value for cell in result.cells if (value := cell.perplexity) is not None]
    for cell in trained:
        assert cell.training is not None and cell.perplexity is not None
        index = names.index(_series(cell))
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linewidth": 1,
        }
        bits = cell.bits_per_weight or 0.0
        axes.plot([bits] * 2, [cell.training.before, cell.perplexity], fillstyle="none", **style)
        axes.plot([bits], [cell.perplexity], **style, label=_series(cell))
        values.append(cell.training.before)
    dense = result.cells[0].perplexity
    if dense is not None:
        axes.axhline(dense, color="#888888", linewidth=1, label="dense, 16 bits")
    if finite := [value for value in values if math.isfinite(value)]:
        scale_logarithmically(axes, finite)
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("perplexity before and after (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    handles = {str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)


def _series(cell: CellRecord) -> str:
    name = ", ".join(filter(None, cell.labels.values()))
    return name if cell.sparsity_asked else f"dense {name}"
