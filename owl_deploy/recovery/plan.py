"""What a recovery is asked to do."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from owl_deploy.errors import UserError
from owl_deploy.rounding import ROUNDED, Rounded

Method = Literal["full", "lora", "blocks"]
Hidden = Literal["last", "all"]
_LEARNING_RATE: dict[Method, float] = {"full": 2.5e-4, "lora": 1e-4, "blocks": 2e-4}

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def parse_tokens(text: str) -> int:
    """A number of tokens: `150k`, `2M`, `1.5M`, or plain digits.

    Raises:
        UserError: it is none of these, or less than 1.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text.strip())
    tokens = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if tokens < 1:
        raise UserError(f"--tokens {text}: give a number of tokens, for example 150k or 2M")
    return tokens


@dataclass(frozen=True)
class RecoveryPlan:
    """Training of the weights that pruning has kept: how long, towards what, and how fast.

    The defaults of the losses and the optimizer are those of a prototype that took SmolLM2-135M at 50% from perplexity
    33.8 to 27.1 in 389k tokens; they were not tuned.

    Attributes:
        tokens: how many to train on; the last step is whole, and may exceed it.
        method: `full` trains all kept weights of the blocks and the norms; `lora` low-rank changes of some linears;
            `blocks` the kept weights of one block after the other, each on so many tokens, towards the dense block's
            output: the losses and all that belongs to them are then of no account.
        lora_rank, lora_alpha, lora_dropout, lora_targets: of LoRA, as in the paper's Table 6: the last names of the
            linears that it changes.
        merge: LoRA's changes are masked and become weights; else they are an adapter in PEFT's format, unmasked.
        kl: weight of the loss `KL(dense || sparse)` of the next token's distribution, in nats.
        hidden: weight of SquareHead (Kurtic et al. 2023): the squared error of hidden states over their mean square.
        cross_entropy: weight of the loss of the text's own next token, in nats.
        states: whose hidden states are compared: those the head sees (`last`), or of all blocks.
        positions: the share of positions, drawn anew for each micro-batch, at which the losses over the vocabulary
            (`kl` and `cross_entropy`) are computed.
        weights: the grid that weights are rounded to in every forward pass (straight-through), and at the end.
        learning_rate: the peak of AdamW's, after `warmup` steps; a cosine takes it to a twentieth. None: 2.5e-4, with
            LoRA 1e-4, with blocks 2e-4.
        decay: AdamW's weight decay.
        clip: gradients are scaled down to this norm.
        seqlen, batch, micro_batch: tokens of a sequence, sequences of a step, and how many of them run at once.
        passes: how often a text may be repeated; each pass has an order of its own.
        evaluations: how often perplexity on held-out windows of the text is measured.
        patience: stop after as many evaluations without a better perplexity, and take the best weights; None: never.
        seed: of the order of the text and of what is drawn.
    """

    tokens: int
    method: Method = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    merge: bool = True
    kl: float = 1.0
    hidden: float = 1.0
    cross_entropy: float = 0.0
    states: Hidden = "last"
    positions: float = 0.25
    weights: Rounded | None = None
    learning_rate: float | None = None
    warmup: int = 15
    decay: float = 0.0
    clip: float = 1.0
    seqlen: int = 512
    batch: int = 4
    micro_batch: int = 2
    passes: int = 4
    evaluations: int = 10
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.method in get_args(Method), "method", self.method, f"one of {', '.join(get_args(Method))}")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", _LEARNING_RATE[self.method])
        if self.method != "lora" and not self.merge:
            raise UserError(f"--method {self.method} has no adapter to leave unmerged; leave out --no-merge")
        if self.method != "full" and self.weights is not None:
            raise UserError(
                f"--weights {self.weights} rounds what --method full trains; leave out --method {self.method}"
            )
        if self.method == "blocks" and self.patience is not None:
            raise UserError("--method blocks measures no perplexity on its way; leave out --patience")
        _check(bool(self.lora_targets), "lora_targets", "", "at least one name")
        _check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "from 0 up to, not including, 1")
        for name in ("tokens", "batch", "micro_batch", "passes", "evaluations", "lora_rank"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("kl", "hidden", "cross_entropy", "decay"):
            _check(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        for name in ("learning_rate", "clip", "lora_alpha"):
            _check(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        _check(self.kl + self.hidden + self.cross_entropy > 0, "losses", 0, "not all 0")
        _check(0 < self.positions <= 1, "positions", self.positions, "above 0 and at most 1")
        _check(self.seqlen >= 2, "seqlen", self.seqlen, "at least 2")
        _check(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        _check(self.batch % self.micro_batch == 0, "micro_batch", self.micro_batch, f"a divisor of {self.batch}")
        _check(self.states in get_args(Hidden), "states", self.states, "last or all")
        _check(self.weights is None or self.weights in ROUNDED, "weights", self.weights, f"one of {', '.join(ROUNDED)}")
        _check(self.patience is None or self.patience >= 1, "patience", self.patience, "at least 1")

    @property
    def peak(self) -> float:
        """Of the learning rate."""
        return self.learning_rate or _LEARNING_RATE[self.method]

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seqlen

    def learning_rate_at(self, step: int) -> float:
        """Of a step, counted from 0: a line up to the peak, then a cosine down to a twentieth of it."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def is_evaluated_after(self, step: int) -> bool:
        """Whether perplexity is measured after a step, counted from 1; after the last one it is."""
        return step * self.evaluations // self.steps > (step - 1) * self.evaluations // self.steps


def _check(holds: bool, name: str, value: object, must_be: str) -> None:
    if not holds:  # also for NaN
        raise UserError(f"{name} {value} must be {must_be}")
