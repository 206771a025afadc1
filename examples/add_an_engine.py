"""Measure a new engine beside ours, in one class and one registration: here transformers without a KV cache.

Run it: python examples/add_an_engine.py BUNDLE OUT
BUNDLE holds the flavors genai and torch (owl-deploy export CHECKPOINT -o BUNDLE --flavor torch).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class CachelessEngine:
    """`owl_deploy.engines.protocol.Engine` that computes the whole sequence again for every token."""

    def __init__(self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...], batch: int = 1) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        del context, prompts, batch  # this engine takes any shape
        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.float32, local_files_only=True)

    def describe(self) -> dict[str, Any]:
        version, capability = self._torch.__version__, self._torch.backends.cpu.get_cpu_capability()
        return {"version": version, "instruction_set": capability.lower(), "prefill_logits": "last"}

    def prefill(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(ids, logits_to_keep=1)[:, -1]

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(ids)

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(np.concatenate([self._ids, tokens[:, None]], axis=1), logits_to_keep=1)[:, -1]

    def _run(self, ids: NDArray[np.int64], **options: Any) -> NDArray[np.float32]:
        self._ids = ids
        with self._torch.no_grad():
            logits: NDArray[np.float32] = self._model(
                self._torch.tensor(ids), use_cache=False, **options
            ).logits.numpy()
        return logits


def main(bundle: Path, out: Path) -> None:
    import owl_deploy as owl
    from owl_deploy.engines.registry import ENGINES, EngineSpec

    ENGINES["cacheless"] = EngineSpec(
        name="cacheless",
        module=Path(__file__).stem,  # the worker process imports it, as it would a module of owl_deploy.engines
        class_name="CachelessEngine",
        flavors=("torch",),
        environment=None,
        package="torch",
        licence="BSD-3-Clause",
    )
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)
    request = owl.Request(prompts=(32,), new_tokens=16, repetitions=2, max_load=99)
    for row in owl.bench([bundle], out, engines="onnxruntime,cacheless", request=request):
        print(f"{row.engine}: {row.error or f'{row.decode_ms_p50:.2f} ms a token'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
