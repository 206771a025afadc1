"""Evolution of a choice: one option for each unit, all together within a budget (EvoPress, Sieberling et al. 2024).

It knows nothing of models: units are linears elsewhere, options their levels, and cost is weights, bytes or time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Choice = tuple[int, ...]
"""The number of the option that each unit takes."""
Fitness = Callable[[Choice, NDArray[np.int64]], float]
"""How bad a choice is, on some samples by number: lower is better."""


@dataclass(frozen=True)
class Problem:
    """What may be chosen.

    Attributes:
        costs: of each unit's options, falling: the first costs most.
        budget: no choice costs more.
    """

    costs: Sequence[Sequence[int]]
    budget: int

    def cost(self, choice: Choice) -> int:
        return sum(costs[option] for costs, option in zip(self.costs, choice, strict=True))

    @property
    def least(self) -> int:
        """What the cheapest choice costs."""
        return sum(costs[-1] for costs in self.costs)

    def least_harm(self, harms: NDArray[np.float64]) -> Choice:
        """The choice within the budget that hurts about least, if harms add up: each unit's best at one price of cost.

        Args:
            harms: of each unit's options, [units, options].

        Raises:
            ValueError: not even the cheapest options fit.
        """
        costs = np.array(self.costs, np.float64)
        if self.least > self.budget:
            raise ValueError(f"the cheapest choice costs {self.least}, more than the {self.budget} there are")

        def at(price: float) -> Choice:
            return tuple(int(option) for option in np.argmin(harms + price * costs, axis=1))

        low, high = 0.0, float(np.finfo(np.float32).tiny)
        while self.cost(at(high)) > self.budget:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(at(middle)) > self.budget else (low, middle)
        return at(high)

    def repaired(self, choice: Choice, rng: np.random.Generator) -> Choice:
        """The choice with units, in random order, made cheaper until it fits, and others dearer as far as it allows.

        Raises:
            ValueError: not even the cheapest options fit.
        """
        options, cost = list(choice), self.cost(choice)
        while cost > self.budget:
            open_to = [unit for unit, option in enumerate(options) if option + 1 < len(self.costs[unit])]
            if not open_to:
                raise ValueError(f"the cheapest choice costs {cost}, more than the {self.budget} there are")
            unit = int(rng.choice(open_to))
            cost -= self.costs[unit][options[unit]] - self.costs[unit][options[unit] + 1]
            options[unit] += 1
        for unit in rng.permutation(len(options)):
            if options[unit] > 0:
                more = self.costs[unit][options[unit] - 1] - self.costs[unit][options[unit]]
                if cost + more <= self.budget:
                    options[unit], cost = options[unit] - 1, cost + more
        return tuple(options)

    def mutated(self, choice: Choice, rng: np.random.Generator) -> Choice:
        """A choice that differs in one to three units, and in those that make up for them."""
        options = list(choice)
        for _ in range(min(int(rng.integers(1, 4)), int(rng.integers(1, 4)))):
            unit = int(rng.integers(len(options)))
            step = 1 if rng.random() < 0.5 else -1
            options[unit] = min(max(options[unit] + step, 0), len(self.costs[unit]) - 1)
        return self.repaired(tuple(options), rng)


@dataclass(frozen=True)
class Effort:
    """How long to search.

    Attributes:
        offspring: of each generation.
        survivors: how many of them go on to be compared on more samples, for each further stage; the parent joins
            the last.
        samples: how many samples each stage compares on.
    """

    generations: int = 400
    offspring: int = 16
    survivors: tuple[int, ...] = (4,)
    samples: tuple[int, ...] = (1, 4)


@dataclass(frozen=True)
class Generation:
    """The best choice after a generation, its fitness on the samples of the last stage, and whether it is new."""

    number: int
    choice: Choice
    fitness: float
    is_new: bool


def evolve(
    problem: Problem, start: Choice, fitness: Fitness, samples: int, effort: Effort, seed: int, *, first: int = 1
) -> Iterator[Generation]:
    """Each generation, from `start` on, which is repaired; what it does depends on its parent and number alone.

    Args:
        samples: how many there are in all; those of a stage are drawn anew in each generation.
        first: the number of the first generation, where an earlier run has made those before it.
    """
    parent = problem.repaired(start, np.random.default_rng([seed, 0]))
    for number in range(first, effort.generations + 1):
        rng = np.random.default_rng([seed, number])
        candidates = list(dict.fromkeys(problem.mutated(parent, rng) for _ in range(effort.offspring)))
        survivors = (*effort.survivors, 1)
        for stage, (keep, count) in enumerate(zip(survivors, effort.samples, strict=True)):
            if stage == len(effort.samples) - 1 and parent not in candidates:
                candidates.append(parent)
            drawn = np.sort(rng.choice(samples, min(count, samples), replace=False))
            scores = {candidate: fitness(candidate, drawn) for candidate in candidates}
            candidates = sorted(candidates, key=scores.__getitem__)[:keep]
        is_new = candidates[0] != parent
        parent = candidates[0]
        yield Generation(number, parent, scores[parent], is_new)
