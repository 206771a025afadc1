"""What an engine is: four methods. A new engine is one module that holds such a class.

Engines run in a worker process under their own interpreter (`worker.py`), so this module and every engine
import only the standard library, numpy and the engine itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class Engine(Protocol):
    """One causal LM, loaded once, decoding a batch of sequences of one length.

    Args of the constructor:
        model: the file of the flavor this engine runs (see `names.model_file`).
        threads: compute threads, at least 1.
        context: tokens of the longest sequence (prompt plus new tokens) that will be run.
        prompts: prompt lengths that will be prefilled; an engine with static shapes compiles for them at
            load, so that no compilation is timed. Any other length up to `context` must still work.
        batch: how many sequences are run side by side; 1 where its `EngineSpec` has not `runs_batches`.
    """

    def __init__(
        self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...], batch: int = 1
    ) -> None: ...

    def describe(self) -> dict[str, Any]:
        """Facts for the row, as JSON: at least `version`, `instruction_set` and `prefill_logits`.

        `instruction_set` is the widest that the engine's own products may use on this CPU. `prefill_logits` is "last"
        where `prefill` computes what it returns and no more, "all" where the head runs on the whole prompt.
        """

    def prefill(self, ids: TokenIds) -> Logits:
        """Start new sequences with `ids` [batch, length]; the logits of their last position, [batch, vocab].

        This is what a server waits for before the first token, and what is timed.
        """

    def score(self, ids: TokenIds) -> Logits:
        """Start new sequences with `ids` [batch, length]; the logits of every position, [batch, length, vocab]."""

    def decode(self, tokens: TokenIds) -> Logits:
        """Append one token to each sequence, `tokens` [batch]; the logits that follow them, [batch, vocab].

        The sequences are those that `prefill` or `score` started last.
        """
