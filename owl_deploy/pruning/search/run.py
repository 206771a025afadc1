"""`--allocation search`: how sparse each linear becomes, by evolution on how far the model's predictions move.

EvoPress's idea (Sieberling et al. 2024, arXiv 2410.14649), from OWL's allocation on: every linear is pruned to several
levels once; a candidate takes one level for each linear, so that the mean stays; candidates are compared by
KL(dense || candidate) on calibration windows that no linear was pruned by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from owl_deploy.models.precision import computing_in, fast_dtype
from owl_deploy.models.structure import Block
from owl_deploy.pruning.allocate import allocate
from owl_deploy.pruning.calibration.dense import measure_dense
from owl_deploy.pruning.manifest import SearchRecord
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.search.evolve import Choice, Effort, Problem, evolve
from owl_deploy.pruning.search.levels import Levels, Option, bit_options, make_levels, sparse_options
from owl_deploy.pruning.search.sensitivity import harms
from owl_deploy.pruning.weights import BlockWeights
from owl_deploy.reporting import SILENT, Reporter
from owl_deploy.text.windows import held_out

_POSITIONS = 128
_STEP, _REACH = 0.05, 0.25
_WINDOWS = 32
"""Of calibration, to measure by how much each option hurts."""


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
    fitted, compared = held_out(ids)
    in_bits = plan.bits is not None
    options = bit_options() if in_bits else sparse_options(plan.sparsity, _STEP, _REACH, plan.weights)
    make_levels(model, blocks, plan, options, fitted, weights, kept, reporter)
    by_owl = None if in_bits else _owl_choice(model, blocks, plan, fitted, weights, options, reporter)
    everything = np.arange(len(compared))
    effort = Effort(plan.generations or 0)
    dtype = fast_dtype(str(model.device))
    with computing_in(model, dtype):
        wanted = _dense_predictions(model, compared, seed)
        levels = Levels(blocks, options, kept, dtype)
        total = sum(linear.weight.numel() for linear in levels.linears.values())
        if plan.bits is not None:
            problem = Problem(levels.bits, round(plan.bits * total))
        else:
            problem = Problem(levels.kept, total - round(plan.sparsity * total))
        if problem.least > problem.budget:
            raise UserError(
                f"bits {plan.bits}: the fewest there can be are {problem.least / total:.2f} for each weight"
            )

        def fitness(choice: Choice, drawn: NDArray[np.int64]) -> float:
            levels.show(choice)
            return wanted.kl(model, drawn)

        def starts() -> Iterator[Choice]:
            alike = _alike(problem, len(options))
            yield by_owl or min(alike, key=lambda choice: fitness(choice, everything))
            levels.show_dense()
            yield problem.least_harm(harms(model, levels, fitted[:_WINDOWS], seed=seed, reporter=reporter))

        log = _evolved(problem, starts, fitness, options, everything, effort, seed, kept, reporter)
    grids = {name: grid for name, grid in zip(levels.linears, log[-1].weights, strict=True) if grid is not None}
    chosen = replace(
        plan,
        allocation="explicit",
        generations=None,
        bits=None,
        linear_sparsities=dict(zip(levels.linears, log[-1].sparsities, strict=True)),
        linear_weights=grids if in_bits else None,
    )
    return chosen, log


def _alike(problem: Problem, options: int) -> list[Choice]:
    """The choices that treat all linears alike and fit: pure rounding and pure pruning are among them."""
    alike: list[Choice] = [(option,) * len(problem.costs) for option in range(options)]
    return [choice for choice in alike if problem.cost(choice) <= problem.budget]


def _evolved(
    problem: Problem,
    starts: Callable[[], Iterator[Choice]],
    fitness: Callable[[Choice, NDArray[np.int64]], float],
    options: Sequence[Option],
    everything: NDArray[np.int64],
    effort: Effort,
    seed: int,
    kept: Path,
    reporter: Reporter,
) -> list[SearchRecord]:
    """The best after each generation in which it changed: from the best of `starts`, or where an earlier run ended."""
    file = kept / "search.json"

    def record(generation: int, choice: Choice) -> SearchRecord:
        kl = fitness(choice, everything)
        taken = [options[option] for option in choice]
        return SearchRecord(
            generation=generation,
            kl=kl,
            sparsities=[option.sparsity for option in taken],
            weights=[option.weights for option in taken],
        )

    def keep(generation: int) -> None:
        write_json(file, {"generation": generation, "log": [entry.model_dump() for entry in log]})

    if file.is_file():
        made = read_json(file)
        first, log = made["generation"] + 1, [SearchRecord.model_validate(entry) for entry in made["log"]]
    else:
        first, log = 1, []
        for start in starts():
            entry = record(0, problem.repaired(start, np.random.default_rng([seed, 0])))
            if not log or entry.kl < log[-1].kl:
                log.append(entry)
        keep(0)
    best = tuple(options.index(Option(*pair)) for pair in zip(log[-1].sparsities, log[-1].weights, strict=True))
    with reporter.progress(effort.generations, "searching", done=first - 1) as advance:
        for generation in evolve(problem, best, fitness, len(everything), effort, seed, first=first):
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
    options: Sequence[Option],
    reporter: Reporter,
) -> Choice:
    """The levels next to OWL's sparsities."""
    by_owl = replace(plan, allocation="owl", generations=None, weights=None)
    shares = allocate(by_owl, blocks, weights, measure_dense(model, blocks, ids, weights, reporter))
    wanted = [share.sparsities[name] for block, share in zip(blocks, shares, strict=True) for name in block.linears]
    return tuple(int(np.argmin([abs(option.sparsity - value) for option in options])) for value in wanted)
