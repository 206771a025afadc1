"""From text to text: what a user waits for, tokenising and sampling included, as the paper's latency means it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from owl_deploy.engines.probe import Sampling

SAMPLING = Sampling(temperature=0.8, top_k=50, seed=0)


@dataclass(frozen=True)
class EndToEnd:
    """One request: this text in, sampled text out.

    Attributes:
        tokens: of the text, the prompt's length.
    """

    text: str
    tokens: int
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling = SAMPLING

    def run(self, ask: Callable[..., Any], new_tokens: int) -> float:
        """Milliseconds from the text to the end of the new text; `ask` sends a request to an engine's process."""
        start = time.perf_counter()
        ids = self.tokenizer(self.text)["input_ids"][: self.tokens]
        answer = ask(do="generate", prompts=[ids], new_tokens=new_tokens, sampling=dataclasses.asdict(self.sampling))
        self.tokenizer.decode(answer["tokens"][0])
        return (time.perf_counter() - start) * 1e3
