"""Engines that misbehave, for the processes of test_stress.py: little is imported, so that they start at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

VOCABULARY = 96  # of the tiny models


class Honest:
    """A model of its own: logits that depend on the last token. On the passage that it is checked with they are right.

    What was kept of the passage is read from beside the graph; where nothing was, there is no such passage.
    """

    def __init__(self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...], batch: int = 1) -> None:
        del threads, context, prompts, batch
        self.table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
        self.home = model.parent
        self.generations = 0
        file = self.home / "expected_logits.safetensors"
        kept = load_file(file) if file.is_file() else {"ids": [], "positions": [], "logits": []}
        self.passage = np.array(kept["ids"])
        self.right = dict(zip(map(int, kept["positions"]), kept["logits"], strict=True))

    def describe(self) -> dict[str, Any]:
        return {"version": "1", "instruction_set": "none"}

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.length = ids.shape[1]
        self.is_checked = np.array_equal(ids[0], self.passage[: self.length])
        self.generations += not self.is_checked
        logits = self.table[ids[:, -1] % VOCABULARY]
        if self.is_checked:
            logits[0] = self.right[self.length - 1]
        return logits

    def score(self, ids: np.ndarray) -> np.ndarray:
        return self.table[ids % VOCABULARY]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        self.length += 1
        if self.is_checked and self.length - 1 in self.right:
            return self.right[self.length - 1][None]
        return self.table[tokens % VOCABULARY]

    @property
    def is_warm(self) -> bool:
        """The first generation warms up; trouble begins in the first round."""
        return self.generations > 1 and not self.is_checked


class Compiling(Honest):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        time.sleep(1)


class Hanging(Honest):
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        if self.is_warm:
            time.sleep(3600)
        return super().decode(tokens)


class Dying(Honest):
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        if self.is_warm:
            print("out of ideas", flush=True)
            os._exit(3)
        return super().decode(tokens)


class Killed(Honest):
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        if self.is_warm:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(tokens)


class Raising(Honest):
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        if self.is_warm:
            raise RuntimeError("no more tokens today")
        return super().decode(tokens)


class Leaking(Honest):
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.kept = [*getattr(self, "kept", []), np.ones(2**22)]
        return super().prefill(ids)


class Wavering(Honest):
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        logits = super().decode(tokens)
        return np.roll(logits, self.generations, axis=1) if self.is_warm else logits


class NotANumber(Honest):
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return np.full_like(super().prefill(ids), np.nan)

    def score(self, ids: np.ndarray) -> np.ndarray:
        return np.full_like(super().score(ids), np.nan)


class Mute(Honest):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        time.sleep(3600)


class Narrow(Honest):
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return super().prefill(ids)[..., 1:]

    def score(self, ids: np.ndarray) -> np.ndarray:
        return super().score(ids)[..., 1:]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return super().decode(tokens)[..., 1:]


class Forking(Honest):
    """Has a child that never rests, and never ends."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.child = os.fork()
        while self.child == 0:
            pass

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "child": self.child}


class ForkingAndDying(Forking):
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        del ids
        print("left a child behind", flush=True)
        os._exit(3)
