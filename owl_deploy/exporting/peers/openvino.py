"""The `openvino*` flavors: optimum-intel's stateful graph, its weights compressed by NNCF, as their users make it.

That is one command in OpenVINO's own environment, whose torch and transformers are not ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from owl_deploy.engines.environments import process_variables
from owl_deploy.engines.registry import OPENVINO
from owl_deploy.errors import UnsupportedFamily, UserError, last_lines

Precision = Literal["fp32", "int8", "int4"]

_COMPRESSION: dict[Precision, tuple[str, ...]] = {
    "fp32": (),
    "int8": (),
    # The defaults, spelled out; but where 128 does not divide a row, they are an error.
    "int4": ("--group-size", "128", "--ratio", "1.0", "--group-size-fallback", "adjust"),
}
_NOTES: dict[Precision, str] = {
    "fp32": "fp32",
    "int8": "8 bits, a scale and a zero point per row",
    "int4": "4 bits, a scale and a zero point per 128 weights, or the largest power of two below 128 that divides a "
    "row; embeddings and head in 8 bits",
}
_FILES = ("openvino_model.xml", "openvino_model.bin")
_QUANTISER = Path(__file__).with_name("openvino_quantiser.py")
_UNKNOWN_FAMILY = ("custom or unsupported architecture", "not supported", "does not recognize this architecture")


def write_openvino(precision: Precision, checkpoint: Path, out: Path, _has_tokenizer: bool) -> tuple[str, str]:
    """See `flavors.Write`: `openvino_model.xml`, its weights and its config."""
    _export(precision, checkpoint, out)
    return _versions(), f"stateful KV cache, fused attention; weights in {_NOTES[precision]}"


def write_openvino_static(checkpoint: Path, out: Path, _has_tokenizer: bool, ids: NDArray[np.int64]) -> tuple[str, str]:
    """See `flavors.Write`: the same with weights and inputs of products in 8 bits, by ranges found on a text.

    Its CPU plugin can read sparse weights in such a model alone: see `OpenVinoSparseEngine`.

    Args:
        ids: windows of token ids [n, length].
    """
    _export("fp32", checkpoint, out)
    with tempfile.TemporaryDirectory(dir=out, prefix=".quantise-") as temporary:
        folder = Path(temporary)
        np.save(folder / "ids.npy", ids)
        for name in _FILES:
            shutil.move(out / name, folder / name)
        paths = (folder / _FILES[0], folder / "ids.npy", out / _FILES[0])
        _run(checkpoint, [str(OPENVINO.interpreter), str(_QUANTISER), *map(str, paths)], "NNCF")
    count, length = ids.shape
    note = f"weights and inputs of products in 8 bits, by NNCF on {count} windows of {length} tokens"
    return _versions(), f"stateful KV cache, fused attention; {note}"


def _export(precision: Precision, checkpoint: Path, out: Path) -> None:
    """Write the model, and its configs, into `out`."""
    if (problem := OPENVINO.problem()) is not None:
        raise UserError(f"OpenVINO writes this flavor itself, and is {problem}")
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as temporary:
        command = [
            *(str(OPENVINO.interpreter), "-m", "optimum.commands.optimum_cli", "export", "openvino"),
            *("--model", str(checkpoint.absolute()), "--task", "text-generation-with-past"),
            *("--weight-format", precision, *_COMPRESSION[precision]),
            *("--disable-convert-tokenizer", temporary),
        ]
        _run(checkpoint, command, "optimum-intel")
        for name in (*_FILES, "config.json", "generation_config.json"):
            if (Path(temporary) / name).is_file():
                shutil.move(os.fspath(Path(temporary) / name), out / name)


def _run(checkpoint: Path, command: list[str], tool: str) -> None:
    """
    Raises:
        UnsupportedFamily, UserError: see `_refuse`.
    """
    variables = process_variables(OPENVINO) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=variables)
    if done.returncode != 0:
        _refuse(checkpoint, done.stderr or done.stdout, tool)


def _versions() -> str:
    return ", ".join(
        requirement.replace("==", " ")
        for requirement in OPENVINO.requirements
        if requirement.startswith(("optimum-intel", "nncf", "openvino"))
    )


def _refuse(checkpoint: Path, printed: str, tool: str) -> None:
    """
    Raises:
        UnsupportedFamily: the last line that was printed says so.
        UserError: anything else; it ends with that line.
    """
    reason = last_lines(printed) or "it said nothing"
    if any(words in reason for words in _UNKNOWN_FAMILY):
        raise UnsupportedFamily(f"{checkpoint}: optimum-intel does not know this family ({reason})")
    raise UserError(f"{checkpoint}: {tool} failed ({reason})")
