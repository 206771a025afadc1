"""transformers' own model in PyTorch, fp32: run as it is, or its decoding step compiled by `torch.compile`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from owl_deploy.engines.protocol import Logits, TokenIds
from owl_deploy.errors import UserError


class TorchEngine:
    """`protocol.Engine` on transformers' eager forward pass; its cache grows with the sequence."""

    def __init__(
        self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...] = (), batch: int = 1
    ) -> None:
        del context, prompts, batch  # the eager pass takes any shape
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.float32, local_files_only=True)
        self._model.eval()
        self._selects_positions = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._length = 0

    def describe(self) -> dict[str, Any]:
        """Beside the protocol's facts: how attention is computed."""
        return {
            "version": torch.__version__,
            "instruction_set": torch.backends.cpu.get_cpu_capability().lower(),
            "prefill_logits": "last" if self._selects_positions else "all",
            "attention": self._model.config._attn_implementation,
        }

    def prefill(self, ids: TokenIds) -> Logits:
        self._begin()
        last = {"logits_to_keep": 1} if self._selects_positions else {}
        logits: Logits = self._run(self._model, ids, **last)[:, -1]
        return logits

    def score(self, ids: TokenIds) -> Logits:
        self._begin()
        return self._run(self._model, ids)

    def decode(self, tokens: TokenIds) -> Logits:
        logits: Logits = self._run(self._model, tokens[:, None])[:, 0]
        return logits

    def _begin(self) -> None:
        self._length = 0
        self._cache: Any = self._empty_cache()

    def _empty_cache(self) -> Any:
        return DynamicCache(config=self._model.config)

    @torch.no_grad()
    def _run(self, forward: Any, ids: TokenIds, **options: int) -> Logits:
        """Append `ids` [batch, new] to the sequences; logits [batch, new, vocab], or as `options` have it."""
        total = self._length + ids.shape[1]
        fixed = torch.empty(ids.shape, dtype=torch.int64)  # its strides are compiled in: those of `ids` vary
        output = forward(
            input_ids=fixed.copy_(torch.from_numpy(ids)),
            cache_position=torch.arange(self._length, total),
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
        self._length = total
        logits: Logits = output.logits.numpy()
        return logits


class CompiledTorchEngine(TorchEngine):
    """The same with a static cache of `context` tokens and a compiled step of one token.

    The step is compiled at load, and whatever would compile it again later is an error: no compilation is ever timed.

    Raises:
        UserError: there is no C++ compiler, which `torch.compile` needs.
    """

    def __init__(
        self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...] = (), batch: int = 1
    ) -> None:
        _check_compiler()
        super().__init__(model, threads=threads, context=context, prompts=prompts, batch=batch)
        self._static = StaticCache(config=self._model.config, max_cache_len=context)
        self._step = torch.compile(self._model.forward, fullgraph=True, dynamic=False)
        with torch.compiler.set_stance("default"):  # whatever an engine before this one has set
            self.prefill(np.zeros((batch, 1), np.int64))
            self.decode(np.zeros(batch, np.int64))
        torch.compiler.set_stance("fail_on_recompile")

    def decode(self, tokens: TokenIds) -> Logits:
        logits: Logits = self._run(self._step, tokens[:, None])[:, 0]
        return logits

    def _empty_cache(self) -> Any:
        self._static.reset()
        return self._static


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "torch.compile needs a C++ compiler: install g++, or name one in the environment variable CXX"
        ) from error
