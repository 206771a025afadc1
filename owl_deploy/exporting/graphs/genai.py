"""The `genai*` flavors: onnxruntime-genai's graph, with GroupQueryAttention and a shared KV buffer."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import onnx

from owl_deploy.errors import UnsupportedFamily, UserError, first_line
from owl_deploy.exporting.graphs.positions import select_positions


def write_genai_fp32(checkpoint: Path, out: Path, has_tokenizer: bool) -> tuple[str, str]:
    """See `flavors.Write`."""
    write_genai(checkpoint, out, has_tokenizer=has_tokenizer)
    return (
        "onnxruntime-genai",
        "GroupQueryAttention on a shared KV buffer: the fastest dense graph of ONNX Runtime",
    )


def write_genai(
    checkpoint: Path,
    out: Path,
    *,
    has_tokenizer: bool,
    precision: Literal["fp32", "int4"] = "fp32",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a CPU graph, `genai_config.json` and, if there is one, the tokenizer into the directory `out`.

    Args:
        precision: of its weights; all else is fp32.
        options: the builder's own.

    The builder saves the tokenizer last; without one it has then written the graph and the config, and fails.

    Raises:
        UnsupportedFamily: the builder has no graph for this architecture.
        UserError: the builder failed.
    """
    from onnxruntime_genai.models.builder import create_model

    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".cache-") as cache, silence():
            # hf_token, hf_remote: local files only, no account is looked for.
            local = {"hf_token": "false", "hf_remote": False}
            create_model("", str(checkpoint), str(out), precision, "cpu", cache, **local, **options)
    except NotImplementedError as error:
        raise UnsupportedFamily(
            f"{checkpoint}: onnxruntime-genai's builder does not know this family; use --flavor standard"
        ) from error
    except Exception as error:  # whatever a builder of some family raises
        written = all((out / name).is_file() for name in ("model.onnx", "genai_config.json"))
        if has_tokenizer or not written:
            reason = first_line(error)
            raise UserError(f"{checkpoint}: onnxruntime-genai's builder failed ({reason})") from error
    path = out / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    select_positions(model)
    path.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep what the builder and ONNX Runtime's quantiser print, warn of and log from the terminal."""
    printed = io.StringIO()
    disabled = logging.root.manager.disable
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
