"""What is asked of a loaded engine: its logits, its losses on windows of text, and one timed generation.

Runs in the worker, under any interpreter: standard library and numpy only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from owl_deploy.engines.protocol import Engine, Logits, TokenIds
from owl_deploy.machine.energy import cpu_energy_uj

DECODED_TOKENS = 16  # how many of a passage's last tokens are run one by one on a cache


@dataclass(frozen=True)
class TimedGeneration:
    """One generation of a batch: milliseconds to its first tokens, and for each step after them.

    Attributes:
        tokens: what was generated, [batch, new].
        decode_joules: what the CPU's packages took while decoding; None where it cannot be read.
    """

    ttft_ms: float
    decode_ms: list[float]
    tokens: list[list[int]]
    decode_joules: float | None


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: among the `top_k` most likely ones, at this temperature."""

    temperature: float
    top_k: int
    seed: int

    def draw(self, logits: Logits, rng: np.random.Generator) -> TokenIds:
        """One token for each sequence: logits [batch, vocab] -> [batch]."""
        count = min(self.top_k, logits.shape[1])
        likely = np.argpartition(logits, -count, axis=1)[:, -count:]
        scaled = np.take_along_axis(logits, likely, axis=1).astype(np.float64) / self.temperature
        # The largest of logits with Gumbel noise is a draw from their softmax.
        drawn = (scaled + rng.gumbel(size=scaled.shape)).argmax(axis=1)
        return np.take_along_axis(likely, drawn[:, None], axis=1)[:, 0]


def engine_logits(engine: Engine, ids: TokenIds) -> tuple[Logits, Logits]:
    """Logits of all but the last 16 tokens of `ids` [length] at once, and of these one by one, each [positions, vocab].

    The last row of those at once is `prefill`'s, and its cache is decoded on: what is compared is also what is timed.
    """
    scored = engine.score(ids[None, :-DECODED_TOKENS])[0]
    prefilled = engine.prefill(ids[None, :-DECODED_TOKENS])
    return np.concatenate([scored[:-1], prefilled]), np.stack(
        [engine.decode(ids[None, index])[0] for index in range(len(ids) - DECODED_TOKENS, len(ids))]
    )


def window_loss(engine: Engine, window: TokenIds) -> float:
    """Mean cross-entropy, in nats, of one window's `length - 1` predictions."""
    logits = engine.score(window[None])[0, :-1]
    peak = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
    chosen: NDArray[np.float32] = np.take_along_axis(logits, window[1:, None], axis=1)[:, 0]
    return float((log_sum - chosen).mean())


def timed_generation(
    engine: Engine, prompts: TokenIds, new_tokens: int, sampling: Sampling | None = None
) -> TimedGeneration:
    """Generate `new_tokens` tokens after each of `prompts` [batch, length], greedily unless `sampling`.

    A step's time ends when the ids of its tokens are known.
    """
    rng = np.random.default_rng(sampling.seed if sampling else None)

    def choose(logits: Logits) -> TokenIds:
        chosen: TokenIds = logits.argmax(axis=1) if sampling is None else sampling.draw(logits, rng)
        return chosen.astype(np.int64)

    start = time.perf_counter()
    tokens = choose(engine.prefill(prompts))
    ttft_ms = (time.perf_counter() - start) * 1e3
    generated, decode_ms = [tokens], []
    energy_before = cpu_energy_uj()
    for _ in range(new_tokens - 1):
        start = time.perf_counter()
        tokens = choose(engine.decode(tokens))
        decode_ms.append((time.perf_counter() - start) * 1e3)
        generated.append(tokens)
    return TimedGeneration(ttft_ms, decode_ms, np.stack(generated, axis=1).tolist(), _joules(energy_before))


def _joules(before_uj: list[int] | None) -> float | None:
    after_uj = cpu_energy_uj()
    if before_uj is None or after_uj is None or any(a < b for a, b in zip(after_uj, before_uj, strict=True)):
        return None  # unreadable, or a counter began anew
    return (sum(after_uj) - sum(before_uj)) / 1e6
