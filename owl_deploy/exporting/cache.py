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
    largest: Largest = {}
    before = [*_losses(out / GRAPH, engine_class, fitted, largest), *_losses(out / GRAPH, engine_class, held)]
    round_cache(out / GRAPH, largest)
    cache = CacheRecord(
        text=checkpoint.windows.record,
        perplexity=perplexity_of(_losses(out / GRAPH, engine_class, held)),
        perplexity_exact=perplexity_of(before[len(fitted) :]),
    )
    parity = record.parity
    if parity is not None:
        parity = check_parity(out / GRAPH, checkpoint.model, checkpoint.ids, engine_class, rounded_cache=True)
    note = f"{record.note}; keys and values in 8 bits"
    return record.model_copy(update={"parity": parity, "kv_cache": cache, "note": note})


def _losses(
    graph: Path, engine_class: type[OnnxRuntimeEngine], windows: NDArray[np.int64], largest: Largest | None = None
) -> list[float]:
    """The loss of each window [n, length]; with `largest`, the magnitudes of what the caches then hold go there."""
    engine = engine_class(graph, threads=torch.get_num_threads(), context=windows.shape[1], rearrange=False)
    losses = []
    for window in windows:
        losses.append(window_loss(engine, window))
        for name, cached in engine.cached().items() if largest is not None else ():
            found = np.abs(cached[0]).max(axis=1)
            largest[name] = np.maximum(largest.get(name, 0), found)
    return losses
