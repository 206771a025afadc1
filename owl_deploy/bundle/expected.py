"""Logits that a graph has to compute, kept beside it, so that whoever runs it elsewhere can check it there.

They are torch's, of the weights as the graph stores them, at a few positions of a passage: after the prefill, and at
the first, the middle and the last of the tokens that are decoded one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from owl_deploy.errors import UserError

EXPECTED = "expected_logits.safetensors"


@dataclass(frozen=True)
class ExpectedLogits:
    """A passage, and the logits after some of its tokens.

    Attributes:
        ids: int64 [length].
        positions: int64 [n], rising.
        logits: fp32 [n, vocab].
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    logits: NDArray[np.float32]


def write_expected(folder: Path, ids: NDArray[np.int64], logits: NDArray[np.float32], *, decoded: int) -> None:
    """Keep some of the logits [length, vocab] of `ids` [length], of which the last `decoded` are decoded one by one."""
    first = len(ids) - decoded
    positions = np.unique(np.array([first - 1, first, first + decoded // 2, len(ids) - 1]))
    kept = np.ascontiguousarray(logits[positions], np.float32)
    tensors = {"ids": np.asarray(ids, np.int64), "positions": positions, "logits": kept}
    (folder / EXPECTED).write_bytes(save(tensors))  # `save_file` would keep others from reading it


def read_expected(folder: Path) -> ExpectedLogits | None:
    """What `write_expected` kept; None in a bundle of an older owl-deploy.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / EXPECTED
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        return ExpectedLogits(tensors["ids"], tensors["positions"], tensors["logits"])
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path}: is damaged; export the model again") from error
