"""What an engine is: three methods. A new engine is one module that holds such a class.

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
    """One causal LM, loaded once, decoding one sequence (batch 1) at a time.

    Args of the constructor:
        graph: the ONNX file of the flavor this engine runs.
        threads: compute threads, at least 1.
        context: tokens of the longest sequence (prompt plus new tokens) that will be run.
        prompts: prompt lengths that will be prefilled; an engine with static shapes compiles for them at
            load, so that no compilation is timed. Any other length up to `context` must still work.
    """

    def __init__(self, graph: Path, *, threads: int, context: int, prompts: tuple[int, ...]) -> None: ...

    def describe(self) -> dict[str, Any]:
        """Facts for the row, as JSON: at least `version` and `instruction_set`."""

    def prefill(self, ids: TokenIds) -> Logits:
        """Start a new sequence with `ids` [length]; return the logits of every position, [length, vocab]."""

    def decode(self, token: int) -> Logits:
        """Append one token to the sequence; return the logits that follow it, [vocab]."""
