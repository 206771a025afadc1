"""The `genai/` flavor: onnxruntime-genai's graph, with GroupQueryAttention and a shared KV buffer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from owl_deploy.errors import UnsupportedFamily, UserError

_SHOWN_LINES = 5


def write_genai(checkpoint: Path, out: Path, *, has_tokenizer: bool) -> None:
    """Write an fp32 CPU graph, `genai_config.json` and, if there is one, the tokenizer into the directory `out`.

    The builder runs as a process of its own: its output stays off the terminal, and its memory is given back. It
    saves the tokenizer last; without one it has then written the graph and the config, and fails.

    Raises:
        UnsupportedFamily: the builder has no graph for this architecture.
        UserError: the builder failed.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".cache-") as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(checkpoint), "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", cache]
        # hf_token=false: local files only, no account is looked for.
        command += ["--extra_options", "hf_token=false", "hf_remote=false"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    written = all((out / name).is_file() for name in ("model.onnx", "genai_config.json"))
    if written and (done.returncode == 0 or not has_tokenizer):
        return
    output = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if "is not currently supported" in done.stderr:
        raise UnsupportedFamily(
            f"{checkpoint}: onnxruntime-genai's builder does not know this family; use --flavor standard"
        )
    last_lines = " | ".join(output[-_SHOWN_LINES:])
    raise UserError(f"{checkpoint}: onnxruntime-genai's builder failed (exit code {done.returncode}): {last_lines}")
