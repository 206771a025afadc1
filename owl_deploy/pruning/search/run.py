"""`--allocation search`: how sparse each linear becomes, by evolution on how far the model's predictions move.

EvoPress's idea (Sieberling et al. 2024, arXiv 2410.14649), from OWL's allocation on: every linear is pruned to several
levels once; a candidate takes one level for each linear, so that the mean stays; candidates are compared by
KL(dense || candidate) on calibration windows that no linear was pruned by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedModel

from owl_deploy.errors import UserError
from owl_deploy.files import read_json, write_json
from owl_deploy.models.logits import forward_at
from owl_deploy.models.structure import Block
from owl_deploy.pruning.allocate import allocate
from owl_deploy.pruning.calibration.dense import measure_dense
from owl_deploy.pruning.manifest import SearchRecord
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.search.evolve import Choice, Effort, Problem, evolve
from owl_deploy.pruning.search.levels import Levels, level_sparsities, make_levels
from owl_deploy.pruning.weights import BlockWeights, restored
from owl_deploy.reporting import SILENT, Reporter

_HELD_OUT = 4
"""One window of this many is held out."""
_POSITIONS = 128
_STEP, _REACH = 0.05, 0.25


@dataclass(frozen=True)
class _Wanted:
    """What the dense model predicts on held-out windows: ids [n, length], positions [p], log p [n, p, vocabulary]."""

    ids: torch.Tensor
    positions: torch.Tensor
    log_p: torch.Tensor

    def kl(self, model: PreTrainedModel, drawn: NDArray[np.int64]) -> float:
        """KL(dense || model) on some windows, nats, mean over positions."""
        total = 0.0
        for index in drawn.tolist():
            logits = forward_at(model, self.ids[index : index + 1], self.positions).logits[0]
            ours = functional.log_softmax(logits.float(), dim=-1)
            total += float(functional.kl_div(ours, self.log_p[index].float(), reduction="batchmean", log_target=True))
        return total / len(drawn)


@torch.no_grad()
def search(
    model: PreTrainedModel,
    blocks: list[Block],
    plan: PruningPlan,
    ids: NDArray[np.int64],
    weights: BlockWeights,
    *,
    effort: Effort,
    seed: int,
    kept: Path,
    reporter: Reporter = SILENT,
) -> tuple[PruningPlan, list[SearchRecord]]:
    """The plan with the sparsities that the search chose for each linear, and how it went.

    Args:
        ids: calibration windows [n, length], at least 2; a quarter is held out to compare candidates on.
        kept: a directory for what is finished, from where a later run of the same inputs goes on.

    Raises:
        UserError: there are too few windows.
    """
    if len(ids) < 2:
        raise UserError("--allocation search needs at least 2 calibration windows: to prune by, and to compare on")
    held_out = max(1, len(ids) // _HELD_OUT)
    fitted, compared = ids[:-held_out], ids[-held_out:]
    wanted = _dense_predictions(model, compared, seed)
    sparsities = level_sparsities(plan.sparsity, _STEP, _REACH)
    make_levels(model, blocks, plan, sparsities, fitted, weights, kept, reporter)
    start = _owl_choice(model, blocks, plan, fitted, weights, sparsities, reporter)
    everything = np.arange(held_out)
    with restored(blocks):
        levels = Levels(blocks, sparsities, kept)
        sizes = [linear.weight.numel() for linear in levels.linears.values()]
        problem = Problem(levels.costs, sum(sizes) - round(plan.sparsity * sum(sizes)))

        def fitness(choice: Choice, drawn: NDArray[np.int64]) -> float:
            levels.show(choice)
            return wanted.kl(model, drawn)

        log = _evolved(problem, start, fitness, sparsities, everything, effort, seed, kept, reporter)
    found = dict(zip(levels.linears, log[-1].sparsities, strict=True))
    chosen = replace(plan, allocation="explicit", generations=None, linear_sparsities=found)
    return chosen, log


def _evolved(
    problem: Problem,
    start: Choice,
    fitness: Callable[[Choice, NDArray[np.int64]], float],
    sparsities: Sequence[float],
    everything: NDArray[np.int64],
    effort: Effort,
    seed: int,
    kept: Path,
    reporter: Reporter,
) -> list[SearchRecord]:
    """The best after each generation in which it changed, from what an earlier run has left on."""
    file = kept / "search.json"

    def record(generation: int, choice: Choice) -> SearchRecord:
        kl = fitness(choice, everything)
        return SearchRecord(generation=generation, kl=kl, sparsities=[sparsities[option] for option in choice])

    def keep(generation: int) -> None:
        write_json(file, {"generation": generation, "log": [entry.model_dump() for entry in log]})

    if file.is_file():
        made = read_json(file)
        first, log = made["generation"] + 1, [SearchRecord.model_validate(entry) for entry in made["log"]]
        start = tuple(sparsities.index(value) for value in log[-1].sparsities)
    else:
        start = problem.repaired(start, np.random.default_rng([seed, 0]))
        first, log = 1, [record(0, start)]
        keep(0)
    with reporter.progress(effort.generations, "searching", done=first - 1) as advance:
        for generation in evolve(problem, start, fitness, len(everything), effort, seed, first=first):
            if generation.is_new:
                log.append(record(generation.number, generation.choice))
            keep(generation.number)
            advance(f"KL {log[-1].kl:.4f}, at first {log[0].kl:.4f}")
    return log


def _dense_predictions(model: PreTrainedModel, ids: NDArray[np.int64], seed: int) -> _Wanted:
    length = ids.shape[1]
    rng = np.random.default_rng(seed)
    positions = torch.from_numpy(np.sort(rng.choice(length, min(_POSITIONS, length), replace=False)))
    windows = torch.from_numpy(ids)
    predicted = [forward_at(model, window[None], positions).logits[0].float() for window in windows]
    return _Wanted(windows, positions, torch.stack([functional.log_softmax(logits, dim=-1) for logits in predicted]))


def _owl_choice(
    model: PreTrainedModel,
    blocks: list[Block],
    plan: PruningPlan,
    ids: NDArray[np.int64],
    weights: BlockWeights,
    sparsities: Sequence[float],
    reporter: Reporter,
) -> Choice:
    """The levels next to OWL's sparsities."""
    by_owl = replace(plan, allocation="owl", generations=None)
    shares = allocate(by_owl, blocks, weights, measure_dense(model, blocks, ids, weights, reporter))
    wanted = [share.sparsities[name] for block, share in zip(blocks, shares, strict=True) for name in block.linears]
    return tuple(int(np.argmin([abs(level - value) for level in sparsities])) for value in wanted)
