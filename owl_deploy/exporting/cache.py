"""An 8-bit KV cache for a graph that was written with one of fp32: calibrated on text, and what it costs there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from owl_deploy.bundle.manifest import GRAPH, FlavorRecord
from owl_deploy.bundle.records import CacheRecord
from owl_deploy.engines.onnxruntime_engine import OnnxRuntimeEngine
from owl_deploy.engines.probe import window_loss
from owl_deploy.evaluation.perplexity import perplexity_of
from owl_deploy.exporting.checkpoint import OpenCheckpoint
from owl_deploy.exporting.graphs.cache import round_cache
from owl_deploy.exporting.verify.parity import check_parity
from owl_deploy.text.windows import held_out

Largest = dict[str, NDArray[np.float32]]


def with_rounded_cache(
    record: FlavorRecord,
    out: Path,
    checkpoint: OpenCheckpoint,
    engine_class: type[OnnxRuntimeEngine],
) -> FlavorRecord:
    """Give the flavor in `out` a cache of 8 bits; its new record.

    Its scales are fitted on all windows of the checkpoint's calibration text but the last quarter.

    Args:
        engine_class: what runs the flavor.

    Raises:
        UnsupportedFamily: ONNX Runtime cannot round the caches of this model's graph.
        CheckFailed: the logits are further from torch's than rounding the cache explains.
    """
    fitted, held = held_out(checkpoint.windows.ids)
    exact = _perplexity(out / GRAPH, engine_class, held)
    round_cache(out / GRAPH, _largest(out / GRAPH, engine_class, fitted))
    rounded = _perplexity(out / GRAPH, engine_class, held)
    cache = CacheRecord(text=checkpoint.windows.record, perplexity=rounded, perplexity_exact=exact)
    parity = record.parity
    if parity is not None:
        parity = check_parity(out / GRAPH, checkpoint.model, checkpoint.ids, engine_class, rounded_cache=True)
    note = f"{record.note}; keys and values in 8 bits"
    return record.model_copy(update={"parity": parity, "kv_cache": cache, "note": note})


def _perplexity(graph: Path, engine_class: type[OnnxRuntimeEngine], windows: NDArray[np.int64]) -> float:
    """Of windows [n, length], as `bench` computes it."""
    engine = _load(graph, engine_class, windows)
    return perplexity_of([window_loss(engine, window) for window in windows])


def _largest(graph: Path, engine_class: type[OnnxRuntimeEngine], windows: NDArray[np.int64]) -> Largest:
    """The magnitudes that keys and values of windows [n, length] reach, [heads, channels], by their cache."""
    engine = _load(graph, engine_class, windows)
    largest: Largest = {}
    for window in windows:
        engine.score(window[None])
        for name, (cached,) in engine.cached().items():
            found = np.abs(cached).max(axis=1)
            largest[name] = np.maximum(largest[name], found) if name in largest else found
    return largest


def _load(graph: Path, engine_class: type[OnnxRuntimeEngine], windows: NDArray[np.int64]) -> OnnxRuntimeEngine:
    return engine_class(graph, threads=torch.get_num_threads(), context=windows.shape[1], rearrange=False)
