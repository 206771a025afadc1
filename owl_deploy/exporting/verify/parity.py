"""Does the graph compute what the checkpoint computes? Checked by the engine that will run it, on real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from owl_deploy.bundle.expected import write_expected
from owl_deploy.bundle.names import Flavor, weights_of
from owl_deploy.bundle.records import ParityRecord
from owl_deploy.engines.onnxruntime_engine import OnnxRuntimeEngine
from owl_deploy.engines.probe import engine_logits
from owl_deploy.engines.protocol import Logits, TokenIds
from owl_deploy.errors import CheckFailed, UnsupportedFamily, first_line

TOLERANCE = 1e-2  # of a logit
ROUNDED_TOLERANCE = {
    **dict.fromkeys(("f16", "packed16"), 0.05),
    **dict.fromkeys(("int8", "q8_0", "original"), 0.2),
    **dict.fromkeys(("int4", "q4_0", "q4_k_m", "iq4_xs", "int8-static"), 0.8),
    "q3_k_m": 1.0,
    "q2_k": 1.25,
}
"""How far logits may be from those of the unrounded weights, by how these are stored: the norm of the difference over
that of the logits. Past it the engine does not run this model: logits of another one are at 1.4."""

CACHE_TOLERANCE = 0.1
"""How much further, where keys and values are kept in 8 bits."""

REFERENCES = ("onnxruntime", "sparse-packed32")
"""Engines that others are compared with, the first choice first: they run unrounded weights, and were compared with
torch when the graph was made."""


def tolerance_of(flavor: Flavor) -> float:
    """How far a logit of the same weights may be off: products of int4 round their inputs to 16 bits."""
    return 5 * TOLERANCE if weights_of(flavor) == "int4" else TOLERANCE


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, ids: TokenIds) -> Logits:
    """Logits of the torch model for one sequence: [length] -> [length, vocab]."""
    logits: Logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float().numpy()
    return logits


def check_parity(
    graph: Path,
    model: PreTrainedModel,
    ids: TokenIds,
    engine_class: type[OnnxRuntimeEngine] = OnnxRuntimeEngine,
    *,
    rounded_cache: bool = False,
    tolerance: float = TOLERANCE,
) -> ParityRecord:
    """Compare an exported graph, run by ONNX Runtime, with the torch model (fp32) it came from.

    Some of torch's logits stay beside the graph, for a check wherever it runs later (see `bundle.expected`).

    Args:
        ids: one sequence of more than 16 tokens.
        engine_class: what runs the graph.
        rounded_cache: see `compare`.
        tolerance: see `compare`.

    Raises:
        CheckFailed: see `compare`.
        UnsupportedFamily: ONNX Runtime cannot run the graph (GroupQueryAttention wants heads of 16, 32, … elements).
    """
    try:
        engine = engine_class(graph, threads=torch.get_num_threads(), context=len(ids), rearrange=False)
        at_once, decoded = engine_logits(engine, ids)
    except Exception as error:  # its exceptions have no base of their own
        reason = first_line(error).partition("Status Message: ")
        raise UnsupportedFamily(
            f"{graph.parent.name}: ONNX Runtime cannot run this model's graph ({reason[2] or reason[0]})"
        ) from error
    name = f"{graph.parent.name}/{graph.name}"
    expected = reference_logits(model, ids)
    parity = compare(
        expected,
        at_once,
        decoded,
        what=name,
        reference="torch",
        rounded_cache=rounded_cache,
        tolerance=tolerance,
    )
    write_expected(graph.parent, ids, expected, decoded=len(decoded))
    return parity


def compare(
    expected: Logits,
    at_once: Logits,
    decoded: Logits,
    *,
    what: str,
    reference: str,
    precision: str = "fp32",
    rounded_cache: bool = False,
    tolerance: float = TOLERANCE,
) -> ParityRecord:
    """Compare logits [length, vocab] with those of the first positions, computed at once, and of the rest, decoded.

    Args:
        precision: how the weights behind the compared logits are stored.
        rounded_cache: whether keys and values are kept in 8 bits, behind either.
        tolerance: how far a logit of the same weights may be off.

    Raises:
        CheckFailed: a logit differs by more than `tolerance`, or the most likely token differs although the two most
            likely ones are further apart than that. Of rounded weights or caches: see `ROUNDED_TOLERANCE`.
    """
    if any(logits.ndim != 2 or logits.shape[1] != expected.shape[1] for logits in (at_once, decoded)):
        raise CheckFailed(f"{what}: logits differ from the checkpoint's in shape: {at_once.shape}, {decoded.shape}")
    difference = _difference(expected[: len(at_once)], at_once)
    difference_with_past = _difference(expected[len(at_once) :], decoded)
    agrees = expected.argmax(axis=1) == np.concatenate([at_once, decoded]).argmax(axis=1)
    top_two = np.partition(expected, -2, axis=1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > tolerance
    worst = max(difference, difference_with_past)
    relative = _relative_difference(expected, np.concatenate([at_once, decoded]))
    allowed = ROUNDED_TOLERANCE.get(precision, 0.0) + CACHE_TOLERANCE * rounded_cache
    if allowed:
        if not relative <= allowed:
            rounded = " and ".join(
                [f"its weights to {precision}"] * (precision in ROUNDED_TOLERANCE)
                + ["its keys and values to 8 bits"] * rounded_cache
            )
            raise CheckFailed(
                f"{what}: logits differ from the checkpoint's by {relative:.2g} of their norm; rounding {rounded} "
                f"explains {allowed:g}"
            )
    elif not worst <= tolerance:  # NaN fails too
        raise CheckFailed(f"{what}: logits differ from the checkpoint's by {worst:.3g}, more than {tolerance:g}")
    elif (clear & ~agrees).any():
        raise CheckFailed(f"{what}: its most likely token differs from the checkpoint's where that one is clear")
    return ParityRecord(
        reference=reference,
        positions=len(at_once),
        positions_with_past=len(decoded),
        max_abs_difference=difference,
        max_abs_difference_with_past=difference_with_past,
        argmax_agreement=float(agrees.mean()),
        relative_difference=relative,
    )


def _relative_difference(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    expected = expected - expected.mean(axis=1, keepdims=True)
    actual = actual - actual.mean(axis=1, keepdims=True)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _difference(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    return float(np.abs(expected - actual).max())
