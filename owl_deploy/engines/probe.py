"""What is asked of a loaded engine: its logits, its losses on windows of text, and one timed generation.

Runs in the worker, under any interpreter: standard library and numpy only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from owl_deploy.engines.protocol import Engine, Logits, TokenIds

DECODED_TOKENS = 16  # how many of a passage's last tokens are run one by one on a cache


@dataclass(frozen=True)
class TimedGeneration:
    """One greedy generation: milliseconds to its first token, and for each token after it."""

    ttft_ms: float
    decode_ms: list[float]
    tokens: list[int]


def engine_logits(engine: Engine, ids: TokenIds) -> tuple[Logits, Logits]:
    """Logits of all but the last 16 tokens of `ids` at once, and of these one by one, each [positions, vocab]."""
    at_once = engine.prefill(ids[:-DECODED_TOKENS])
    return at_once, np.stack([engine.decode(int(token)) for token in ids[-DECODED_TOKENS:]])


def window_loss(engine: Engine, window: TokenIds) -> float:
    """Mean cross-entropy, in nats, of one window's `length - 1` predictions."""
    logits = engine.prefill(window)[:-1]
    peak = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
    chosen: NDArray[np.float32] = np.take_along_axis(logits, window[1:, None], axis=1)[:, 0]
    return float((log_sum - chosen).mean())


def timed_generation(engine: Engine, prompt: TokenIds, new_tokens: int) -> TimedGeneration:
    """Generate `new_tokens` tokens greedily after `prompt`. A token's time ends when its id is known."""
    start = time.perf_counter()
    token = int(engine.prefill(prompt)[-1].argmax())
    ttft_ms = (time.perf_counter() - start) * 1e3
    tokens, decode_ms = [token], []
    for _ in range(new_tokens - 1):
        start = time.perf_counter()
        token = int(engine.decode(token).argmax())
        decode_ms.append((time.perf_counter() - start) * 1e3)
        tokens.append(token)
    return TimedGeneration(ttft_ms, decode_ms, tokens)
