"""Measure a new engine beside ours: here transformers in bf16, in one class and one registration.

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


class Bf16Engine:
    """`owl_deploy.engines.protocol.Engine` on transformers' forward pass, with weights and sums in bf16."""

    def __init__(
        self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...], batch: int = 1
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        del context, prompts, batch  # this engine takes any shape
        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.bfloat16, local_files_only=True)

    def describe(self) -> dict[str, Any]:
        version = self._torch.__version__
        return {"version": version, "instruction_set": "bf16", "prefill_logits": "last"}

    def prefill(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(ids, None, logits_to_keep=1)[:, -1]

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(ids, None)

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._run(tokens[:, None], self._cache)[:, -1]

    def _run(self, ids: NDArray[np.int64], cache: Any, **options: Any) -> NDArray[np.float32]:
        with self._torch.no_grad():
            output = self._model(self._torch.tensor(ids), past_key_values=cache, use_cache=True, **options)
        self._cache = output.past_key_values
        logits: NDArray[np.float32] = output.logits.float().numpy()
        return logits


def main(bundle: Path, out: Path) -> None:
    import owl_deploy as owl
    from owl_deploy.engines.registry import ENGINES, EngineSpec

    ENGINES["torch-bf16"] = EngineSpec(
        name="torch-bf16",
        module=Path(__file__).stem,  # the worker imports it, as it would a module of owl_deploy.engines
        class_name="Bf16Engine",
        flavors=("torch",),
        environment=None,
        package="torch",
        licence="BSD-3-Clause",
        precision="f16",  # it may differ from unrounded weights by what rounding to 16 bits explains
    )
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)
    request = owl.Request(prompts=(32,), new_tokens=16, repetitions=2, max_load=99)
    for row in owl.bench([bundle], out, engines="onnxruntime,torch-bf16", request=request):
        print(f"{row.engine}: {row.error or f'{row.decode_ms_p50:.2f} ms a token'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
