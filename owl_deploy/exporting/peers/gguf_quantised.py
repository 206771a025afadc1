"""The `gguf-q4_k_m`, `-q3_k_m`, `-q2_k` and `-iq4_xs` flavors: what llama.cpp's own quantiser makes of the F16 file.

It is given an importance matrix, computed from the calibration text. Which matrix gets how many bits is its choice:
more for some of those that matter, and other types for rows that are no multiple of 256.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGUFReader, LlamaFileType
from numpy.typing import NDArray

from owl_deploy.bundle.names import model_file
from owl_deploy.engines.environments import process_variables
from owl_deploy.engines.registry import LLAMA_CPP
from owl_deploy.errors import UserError, last_lines
from owl_deploy.exporting.peers.gguf import tensor_name, write_gguf
from owl_deploy.exporting.peers.importance import mean_squares
from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource

QuantisedWeights = Literal["q4_k_m", "q3_k_m", "q2_k", "iq4_xs"]

_FILE_TYPES: dict[QuantisedWeights, LlamaFileType] = {
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q3_k_m": LlamaFileType.MOSTLY_Q3_K_M,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
}
_SCRIPT = Path(__file__).with_name("gguf_quantiser.py")
_MODEL = model_file("gguf-f16")


def write_gguf_quantised(
    checkpoint: Path, out: Path, has_tokenizer: bool, ids: NDArray[np.int64], *, weights: QuantisedWeights
) -> tuple[str, str]:
    """See `flavors.Write`, and `gguf.write_gguf`.

    Args:
        ids: windows of token ids [n, length], for the importance matrix.

    Raises:
        UserError: llama.cpp is not installed, or refuses.
        UnsupportedFamily: see `write_gguf`.
    """
    if (problem := LLAMA_CPP.problem()) is not None:
        raise UserError(f"llama.cpp writes this flavor itself, and is {problem}")
    with tempfile.TemporaryDirectory(dir=out, prefix=".quantise-") as temporary:
        folder = Path(temporary)
        made_by, _ = write_gguf(checkpoint, folder, has_tokenizer, weights="f16")
        importance: dict[str, Any] = _importance(checkpoint, ids.tobytes(), ids.shape[1])
        np.savez(folder / "importance.npz", **importance)
        command = [
            *(str(LLAMA_CPP.interpreter), str(_SCRIPT), str(folder / _MODEL), str(out / _MODEL)),
            *(str(int(_FILE_TYPES[weights])), str(folder / "importance.npz"), str(torch.get_num_threads())),
        ]
        variables = process_variables(LLAMA_CPP)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=variables)
        if done.returncode != 0:
            reason = last_lines(done.stderr) or done.returncode
            raise UserError(f"{checkpoint}: llama.cpp's quantiser failed ({reason})")
    count, length = ids.shape
    note = f"{types_in(out / _MODEL)}; importance matrix from {count} windows of {length} tokens"
    return f"{LLAMA_CPP.requirements[0].replace('==', ' ')}, {made_by}", note


def types_in(path: Path) -> str:
    """How many matrices of each type a GGUF file holds, in words."""
    matrices = Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1)
    return "matrices in " + ", ".join(f"{kind} ({count})" for kind, count in matrices.most_common())


@lru_cache(maxsize=1)  # for the flavors of one checkpoint
def _importance(checkpoint: Path, ids: bytes, length: int) -> dict[str, NDArray[np.float32]]:
    """The mean squares of each matrix's inputs, [in], by its name in the file."""
    model = load_model(ModelSource(os.fspath(checkpoint), checkpoint), torch.float32)
    found = mean_squares(model, np.frombuffer(ids, np.int64).reshape(-1, length).copy())
    return {tensor_name(model.config, f"{path}.weight"): squares for path, squares in found.items()}
