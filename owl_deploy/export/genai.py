"""The `genai/` flavor: onnxruntime-genai's graph, with GroupQueryAttention and a shared KV buffer."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

from owl_deploy.errors import UnsupportedFamily, UserError


def write_genai(checkpoint: Path, out: Path, *, has_tokenizer: bool) -> None:
    """Write an fp32 CPU graph, `genai_config.json` and, if there is one, the tokenizer into the directory `out`.

    The builder saves the tokenizer last; without one it has then written the graph and the config, and fails.

    Raises:
        UnsupportedFamily: the builder has no graph for this architecture.
        UserError: the builder failed.
    """
    from onnxruntime_genai.models.builder import create_model

    printed = io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory(dir=out, prefix=".cache-") as cache,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            # hf_token, hf_remote: local files only, no account is looked for.
            create_model("", str(checkpoint), str(out), "fp32", "cpu", cache, hf_token="false", hf_remote=False)
    except NotImplementedError as error:
        raise UnsupportedFamily(
            f"{checkpoint}: onnxruntime-genai's builder does not know this family; use --flavor standard"
        ) from error
    except Exception as error:  # whatever a builder of some family raises
        written = all((out / name).is_file() for name in ("model.onnx", "genai_config.json"))
        if has_tokenizer or not written:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{checkpoint}: onnxruntime-genai's builder failed ({reason})") from error
