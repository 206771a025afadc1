"""What a recovery is trained on: windows of a text, some of them held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from owl_deploy.errors import UserError
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.text.windows import TokenWindows, calibration_windows, whole_windows

_HELD_OUT = 0.05
MOST_HELD_OUT = 16


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on, and others to measure on.

    Attributes:
        windows, held_out: ids [n, seqlen].
    """

    windows: TokenWindows
    held_out: TokenWindows

    def order(self, number: int, seed: int) -> NDArray[np.int64]:
        """In which order a pass, counted from 0, takes the windows."""
        return np.random.default_rng([seed, number]).permutation(len(self.windows.ids))

    def step(self, step: int, batch: int, seed: int) -> NDArray[np.int64]:
        """The sequences [batch, seqlen] of a step, counted from 0: the same whenever it is asked for."""
        return self.windows.ids[self.places(step, batch, seed)]

    def places(self, step: int, batch: int, seed: int) -> list[int]:
        """Which windows those are."""
        count = len(self.windows.ids)
        places = range(step * batch, (step + 1) * batch)
        orders = {number: self.order(number, seed) for number in {place // count for place in places}}
        return [int(orders[place // count][place % count]) for place in places]


def training_text(spec: str, tokenizer: PreTrainedTokenizerBase | None, plan: RecoveryPlan) -> TrainingText:
    """The windows of a text, some of them held out: see `split`.

    Raises:
        UserError: the text cannot be read, needs a tokenizer the model does not have, or is too short for the tokens.
    """
    if spec == "c4":  # a random window of as many documents as are needed
        windows = calibration_windows(spec, tokenizer, samples=windows_needed(plan), seqlen=plan.seqlen, seed=plan.seed)
    else:
        windows = whole_windows(spec, tokenizer, seqlen=plan.seqlen, split="calibration")
    return split(windows, plan)


def windows_needed(plan: RecoveryPlan) -> int:
    """How many windows are enough for the plan's tokens and passes, those held out included."""
    return -(-plan.steps * plan.batch // plan.passes) + MOST_HELD_OUT


def split(windows: TokenWindows, plan: RecoveryPlan) -> TrainingText:
    """Hold out a twentieth of the windows, at most 16 of them, drawn by seed; the others keep their order.

    Raises:
        UserError: the others are too few for the tokens.
    """
    count = len(windows.ids)
    held = min(MOST_HELD_OUT, max(1, round(_HELD_OUT * count)))
    most = (count - held) * plan.seqlen * plan.passes
    if most < plan.tokens:
        raise UserError(
            f"{windows.source}: {count * plan.seqlen} tokens, of which {held * plan.seqlen} are held out, make {most} "
            f"in {plan.passes} passes, not the {plan.tokens} asked for; give more text, fewer --tokens or more --passes"
        )
    chosen = np.zeros(count, np.bool_)
    chosen[np.random.default_rng(plan.seed).choice(count, held, replace=False)] = True
    kept, held_out = windows.ids[~chosen], windows.ids[chosen]
    return TrainingText(TokenWindows(kept, windows.source), TokenWindows(held_out, windows.source))
