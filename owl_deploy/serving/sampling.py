"""From logits to a token, and to log-probabilities, in numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

_NUCLEUS = 1024  # likeliest tokens that are sorted first, in which the nucleus almost always is


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; in this order, each on what the one before has left.

    Attributes:
        repetition_penalty: logits of tokens of the prompt and the answer are divided by it, or multiplied below 0.
        frequency_penalty: is subtracted once for every time that a token is in the answer.
        presence_penalty: is subtracted from tokens that are in the answer.
        logit_bias: is added, by token.
        temperature: divides the logits; 0 takes the likeliest.
        top_k: leaves this many of the likeliest; 0 leaves all.
        top_p: leaves the likeliest that together have this probability.
        min_p: leaves those with at least this part of the likeliest's probability.
        seed: of the random numbers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability, and the likeliest that could have stood there.

    They are the model's own, before penalties, bias, constraint and temperature.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._answer: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._bias = _arrays(sampling.logit_bias)

    def choose(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token of the answer, which is then part of it.

        Args:
            logits: [vocab]; they stay as they are.
            allowed: [vocab], which tokens may come; None for all.

        Raises:
            ValueError: the logits are not numbers, or nothing is allowed.
        """
        adjusted = self._penalised(logits)
        if allowed is not None:
            adjusted = np.where(allowed, adjusted, -np.inf)
        likeliest = int(adjusted.argmax())
        if not np.isfinite(adjusted[likeliest]):
            raise ValueError("the model's logits leave no token to choose")
        token = likeliest if self._sampling.temperature == 0 else self._draw(adjusted)
        self._answer[token] += 1
        if self._sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        sampling = self._sampling
        adjusted = logits.copy()
        if self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values = adjusted[seen]
            penalty = np.float32(sampling.repetition_penalty)
            adjusted[seen] = np.where(values < 0, values * penalty, values / penalty)
        if self._answer and (sampling.frequency_penalty or sampling.presence_penalty):
            tokens, counts = _arrays(self._answer)
            adjusted[tokens] -= sampling.frequency_penalty * counts + np.float32(sampling.presence_penalty)
        tokens, bias = self._bias
        adjusted[tokens] += bias
        return adjusted

    def _draw(self, logits: NDArray[np.float32]) -> int:
        """A random token, of those that top_k, top_p and min_p leave."""
        sampling = self._sampling
        tokens = np.arange(logits.size)
        if 0 < sampling.top_k < logits.size:
            tokens = np.argpartition(logits, -sampling.top_k)[-sampling.top_k :]
        scaled = (logits[tokens].astype(np.float64) - float(logits.max())) / sampling.temperature
        weights = np.exp(scaled)
        if sampling.top_p < 1:
            chosen = _nucleus(weights, sampling.top_p)
            tokens, weights = tokens[chosen], weights[chosen]
        if sampling.min_p > 0:
            likely = weights >= sampling.min_p * weights.max()
            tokens, weights = tokens[likely], weights[likely]
        summed = weights.cumsum()
        place = int(np.searchsorted(summed, self._random.random() * summed[-1], side="right"))
        return int(tokens[min(place, tokens.size - 1)])


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """The places of the fewest weights that together are `top_p` of the sum, the largest first."""
    wanted = top_p * weights.sum()
    most = min(_NUCLEUS, weights.size)
    places = np.argpartition(weights, -most)[-most:]
    if weights[places].sum() < wanted:
        places = np.arange(weights.size)
    places = places[np.argsort(-weights[places], kind="stable")]
    return places[: int(np.searchsorted(weights[places].cumsum(), wanted)) + 1]


def logprobs(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """The log-probability of a token, and of the `top` likeliest, of logits [vocab]."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    places = np.argpartition(exact, -top)[-top:] if top else np.empty(0, np.int64)
    places = places[np.lexsort((places, -exact[places]))]
    return TokenLogprob(token, float(exact[token]), tuple((int(place), float(exact[place])) for place in places))


def _arrays(by_token: Mapping[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.array(list(by_token), np.int64), np.array(list(by_token.values()), np.float32)
