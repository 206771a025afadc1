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

from owl_deploy.engines.environments import process_variables
from owl_deploy.engines.registry import OPENVINO
from owl_deploy.errors import UnsupportedFamily, UserError

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
_UNKNOWN_FAMILY = ("custom or unsupported architecture", "not supported", "does not recognize this architecture")


def write_openvino(precision: Precision, checkpoint: Path, out: Path, _has_tokenizer: bool) -> tuple[str, str]:
    """See `flavors.Write`: `openvino_model.xml`, its weights and its config."""
    if (problem := OPENVINO.problem()) is not None:
        raise UserError(f"OpenVINO writes this flavor itself, and is {problem}")
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as temporary:
        command = [
            *(str(OPENVINO.interpreter), "-m", "optimum.commands.optimum_cli", "export", "openvino"),
            *("--model", str(checkpoint.absolute()), "--task", "text-generation-with-past"),
            *("--weight-format", precision, *_COMPRESSION[precision]),
            *("--disable-convert-tokenizer", temporary),
        ]
        variables = process_variables(OPENVINO) | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=variables)
        if done.returncode != 0:
            _refuse(checkpoint, done.stderr or done.stdout)
        for name in ("openvino_model.xml", "openvino_model.bin", "config.json", "generation_config.json"):
            if (Path(temporary) / name).is_file():
                shutil.move(os.fspath(Path(temporary) / name), out / name)
    versions = ", ".join(
        requirement.replace("==", " ")
        for requirement in OPENVINO.requirements
        if requirement.startswith(("optimum-intel", "nncf", "openvino"))
    )
    return versions, f"stateful KV cache, fused attention; weights in {_NOTES[precision]}"


def _refuse(checkpoint: Path, printed: str) -> None:
    """
    Raises:
        UnsupportedFamily: the last line that was printed says so.
        UserError: anything else; it ends with that line.
    """
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    reason = lines[-1] if lines else "it said nothing"
    if any(words in reason for words in _UNKNOWN_FAMILY):
        raise UnsupportedFamily(f"{checkpoint}: optimum-intel does not know this family ({reason})")
    raise UserError(f"{checkpoint}: optimum-intel failed ({reason})")
