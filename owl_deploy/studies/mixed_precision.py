"""Mixed precision: which blocks get more bits (paper, Table 12)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import cast

from matplotlib.figure import Figure

from owl_deploy.errors import UserError
from owl_deploy.formatting import perplexity_text
from owl_deploy.paper.tables import DENSE_7B, LLAMA_7B, TABLE_12, TABLE_12_SAME
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.rounding import ROUNDED, Rounded
from owl_deploy.studies.cells import Cell, CellRecord, ChosenBy, Precision, Study, StudyResult, dense_cell
from owl_deploy.studies.plot import bars
from owl_deploy.studies.tables import Column, Table, label, perplexities

_NEAREST = "to nearest"
_GPTQ = "GPTQ"
_BITS = range(2, 9)
_NOTES = (
    "Each precision is taken by an equal share of the blocks, the wider by those with most outliers (owl), with the "
    "largest mean |W| (l1), or by any (random: mean over seeds).",
    "To nearest is asymmetric and by row, as the paper's figures suggest; its bits leave out two scales a row. GPTQ is "
    "on our own grids, which can be exported; its bits include scales.",
)


def mixed_precision(mixes: Sequence[str], grids: Sequence[str], seeds: int, m: float) -> Study:
    """Blocks of one precision, and mixes by OWL, by mean |W| and at random.

    Args:
        mixes: of bits, such as `4+3`, to the nearest.
        grids: of grids, such as `int4+int3`, by GPTQ.
        seeds: of the random choices.
        m: OWL's.

    Raises:
        UserError: a mix is none.
    """
    plan = PruningPlan(0.0, owl_m=m)
    cells = [dense_cell("quantiser", "bits", "chosen by", "seed")]
    for quantiser, asked in ((_NEAREST, [_bits(mix) for mix in mixes]), (_GPTQ, [_grids(mix) for mix in grids])):
        widest_first = sorted({option for mix in asked for option in mix}, key=_rank)
        cells += [_cell(plan, quantiser, (option,), "owl", None) for option in widest_first]
        for mix in asked:
            cells += [_cell(plan, quantiser, mix, "random", seed) for seed in range(seeds)]
            cells += [_cell(plan, quantiser, mix, by, None) for by in ("l1", "owl")]
    return Study("mixed-precision", "Mixed precision", tuple(cells), lambda result: [_table(result)], _draw)


def _cell(
    plan: PruningPlan, quantiser: str, options: tuple[int | Rounded, ...], by: ChosenBy, seed: int | None
) -> Cell:
    labels = {
        "quantiser": quantiser,
        "bits": "+".join(map(str, options)),
        "chosen by": by if len(options) > 1 else "",
        "seed": "" if seed is None else str(seed),
    }
    return Cell(labels, plan, precision=Precision(options, by, seed or 0))  # type: ignore[arg-type]  # all of a kind


def _bits(mix: str) -> tuple[int, ...]:
    parts = mix.split("+")
    found = sorted({int(part) for part in parts if part.isdecimal()}, reverse=True)
    if len(found) != len(parts) or len(found) < 2 or not all(bits in _BITS for bits in found):
        raise UserError(f"--mixes {mix}: give two or more numbers of bits from 2 to 8, for example 4+3")
    return tuple(found)


def _grids(mix: str) -> tuple[Rounded, ...]:
    parts = mix.split("+")
    found = sorted({part for part in parts if part in ROUNDED}, key=_rank)
    if len(found) != len(parts) or len(found) < 2:
        raise UserError(f"--grids {mix}: give two or more of {', '.join(ROUNDED)}, for example int4+int3")
    return cast("tuple[Rounded, ...]", tuple(found))


def _rank(option: int | str) -> int:
    """Widest first."""
    return -option if isinstance(option, int) else [*ROUNDED].index(cast(Rounded, option))


class _Row:
    """Cells that differ in their seed alone."""

    def __init__(self, cells: Sequence[CellRecord]) -> None:
        first = cells[0]
        self.quantiser, self.bits, self.by, _ = first.labels.values()
        self.bits_per_weight = first.bits_per_weight
        self.perplexities = [cell.perplexity for cell in cells if cell.perplexity is not None]
        self.mean = statistics.fmean(self.perplexities) if self.perplexities else None

    @property
    def paper(self) -> float | None:
        if self.quantiser == "dense":
            return DENSE_7B
        if self.quantiser != _NEAREST:
            return None
        widths = tuple(map(int, self.bits.split("+")))
        return TABLE_12.get(widths, {}).get(self.by) if self.by else TABLE_12_SAME.get(widths)

    @property
    def values(self) -> list[object]:
        several = self.perplexities if len(self.perplexities) > 1 else []
        spread = [min(several, default=None), max(several, default=None)]
        return [self.quantiser, self.bits, self.by, self.bits_per_weight, self.mean, *spread, self.paper]


def _sections(result: StudyResult) -> list[list[_Row]]:
    """Rows by quantiser and mix; those of one precision stand together."""
    groups: dict[tuple[str, ...], list[CellRecord]] = {}
    for cell in result.cells:
        groups.setdefault(tuple(cell.labels.values())[:3], []).append(cell)
    sections: dict[tuple[str, str], list[_Row]] = {}
    for row in map(_Row, groups.values()):
        sections.setdefault((row.quantiser, row.bits if row.by else ""), []).append(row)
    return list(sections.values())


def _table(result: StudyResult) -> Table:
    columns = (
        label("quantiser"),
        label("bits"),
        label("chosen by"),
        Column("bits a weight", "bits_per_weight", lambda value: f"{value:.2f}"),
        perplexities(),
        perplexities("lowest", "lowest"),
        perplexities("highest", "highest"),
        perplexities(f"paper's Table 12, {LLAMA_7B}", "paper_llama_7b"),
    )
    sections = _sections(result)
    shown = [[row.values for row in rows] for rows in sections]
    return Table("", "Mixed precision by block", columns, shown, _NOTES, _findings(sections))


def _findings(sections: Sequence[Sequence[_Row]]) -> tuple[str, ...]:
    """OWL against random blocks: first where it loses."""
    lost: list[str] = []
    won: list[str] = []
    for rows in sections:
        by = {row.by: row.mean for row in rows}
        if (ours := by.get("owl")) is None or (other := by.get("random")) is None:
            continue
        named = f"{rows[0].bits} {rows[0].quantiser} ({perplexity_text(ours)} against {perplexity_text(other)})"
        (won if ours < other else lost).append(named)
    found = []
    if lost:
        found.append(f"OWL loses to random blocks: {'; '.join(lost)}.")
    if won:
        found.append(f"OWL beats random blocks: {'; '.join(won)}.")
    return tuple(found)


def _draw(result: StudyResult, figure: Figure) -> None:
    values = {
        ", ".join(filter(None, (row.quantiser, row.bits, row.by))): row.mean
        for rows in _sections(result)
        for row in rows
        if row.mean is not None
    }
    figure.set_size_inches(8, 1 + 0.35 * len(values))
    bars(figure, values, "perplexity (log scale)")
