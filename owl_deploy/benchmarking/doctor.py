"""Does each engine work on this machine? A tiny model, and the logits each computes for it beside ONNX Runtime's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from owl_deploy.bundle.names import Flavor, model_file
from owl_deploy.engines.client import EngineFailed, EngineProcess
from owl_deploy.engines.probe import DECODED_TOKENS
from owl_deploy.engines.protocol import Logits
from owl_deploy.engines.registry import EngineSpec, engine_spec
from owl_deploy.errors import CheckFailed, UserError
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.exporting.verify.parity import compare
from owl_deploy.pruning.methods.magnitude import magnitude_mask
from owl_deploy.pruning.run import Calibration

_IDS = list(range(1, 2 * DECODED_TOKENS + 1))
_TIMEOUT_S = 60.0
_INSTEAD: dict[Flavor, Flavor] = {"gguf-original": "gguf-f16"}  # a made-up model came as no file


@dataclass(frozen=True)
class Diagnosis:
    """One engine: `missing` where it is not installed, `broken` where it is and does not work.

    Attributes:
        seconds: what its test took, without making its model; 0 if there was none.
    """

    engine: str
    status: Literal["ok", "missing", "broken"]
    detail: str
    seconds: float = 0.0


def examine(specs: Sequence[EngineSpec]) -> Iterator[Diagnosis]:
    """A diagnosis of each engine, in order."""
    with tempfile.TemporaryDirectory(prefix="owl-deploy-doctor-") as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        _write_checkpoint(checkpoint)
        text = Path(folder) / "text.npy"
        np.save(text, [_IDS, _IDS[::-1]])
        reference = engine_spec("onnxruntime")
        expected = None
        for spec in [reference, *(spec for spec in specs if spec != reference)]:
            problem = spec.environment.problem() if spec.environment else None
            if problem is not None:
                yield Diagnosis(spec.name, "missing", problem)
                continue
            flavor = _INSTEAD.get(spec.flavors[0], spec.flavors[0])
            start = time.perf_counter()
            try:
                export_checkpoint(checkpoint, bundle, [flavor], calibration=Calibration(str(text)))
                start = time.perf_counter()
                logits = _logits(spec, bundle / flavor / model_file(flavor))
                if expected is None:
                    expected = np.concatenate(logits)
                found = compare(*(expected, *logits), what=spec.name, reference="onnxruntime", precision=spec.precision)
            except (EngineFailed, CheckFailed, UserError) as error:
                if spec in specs:
                    yield Diagnosis(spec.name, "broken", str(error), time.perf_counter() - start)
                if spec == reference:
                    return  # nothing to compare the others with
                continue
            if spec in specs:
                detail = f"logits within {found.relative_difference:.1e} of ONNX Runtime's"
                yield Diagnosis(spec.name, "ok", detail, time.perf_counter() - start)


def _write_checkpoint(directory: Path) -> None:
    """A LLaMA of two blocks with half of its weights pruned, of shapes that every format here can store."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # or its logits would be too near to each other to tell engines apart
    )
    model = LlamaForCausalLM(config)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[magnitude_mask(module.weight.data, 0.5)] = 0
    model.save_pretrained(directory)


def _logits(spec: EngineSpec, model: Path) -> tuple[Logits, Logits]:
    with EngineProcess(spec, 1) as process:
        prompts = [len(_IDS) - DECODED_TOKENS]
        process.load(model, threads=1, context=len(_IDS), prompts=prompts, timeout_s=_TIMEOUT_S)
        return process.logits(_IDS, timeout_s=_TIMEOUT_S)
