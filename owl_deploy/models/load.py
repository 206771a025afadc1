"""Load models and tokenizers from any source, with errors that say what is wrong with the file."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from owl_deploy.errors import UserError, first_line
from owl_deploy.files import read_json
from owl_deploy.models import gguf
from owl_deploy.models.source import ModelSource

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
    "spiece.model",
)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and no advice from transformers: our own progress is on the terminal.

    Its GGUF reader's bar knows no switch, so what is written to stderr meanwhile is dropped.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def load_model(source: ModelSource, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal LM on the CPU, in evaluation mode.

    Args:
        dtype: the dtype to load in; None keeps the checkpoint's own.

    Raises:
        UserError: the files are missing, corrupted, or of a model that transformers cannot load.
    """
    if not source.is_gguf:
        check_weight_files(source.path)
    try:
        with _quiet_transformers():
            if source.is_gguf:
                model, report = AutoModelForCausalLM.from_pretrained(
                    source.path.parent,
                    gguf_file=source.path.name,
                    dtype=dtype or torch.float32,
                    output_loading_info=True,
                )
            else:
                model, report = AutoModelForCausalLM.from_pretrained(
                    source.path, config=load_config(source.path), dtype=dtype or "auto", output_loading_info=True
                )
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"{source.name}: cannot be loaded as a causal LM ({reason})") from error
    if report["missing_keys"]:  # transformers fills them with random numbers
        first, count = min(report["missing_keys"]), len(report["missing_keys"])
        raise UserError(f"{source.name}: lacks {count} of the model's weights, {first} among them; fetch it again")
    model.config._name_or_path = source.name  # transformers puts the path of a temporary directory there
    model.requires_grad_(False)
    return model.eval()


def load_skeleton(source: ModelSource, dtype: torch.dtype | None, *, stored: torch.dtype) -> PreTrainedModel:
    """A causal LM without its parameters, which are on the meta device; its buffers are as they were computed.

    Args:
        dtype: of the parameters; None for the config's, or `stored` where it names none.

    Raises:
        UserError: transformers knows no such model.
    """
    config = load_config(source.path)
    try:
        with _quiet_transformers():
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or stored)
            if (source.path / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(source.path)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{source.name}: cannot be loaded as a causal LM ({reason})") from error
    model.tie_weights()  # each was put on the meta device by itself
    _keep_in_fp32(model)
    model.config._name_or_path = source.name
    model.requires_grad_(False)
    return model.eval()


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """What `from_pretrained` does to the parameters of models that name some which half precision would hurt."""
    half = model.dtype in (torch.float16, torch.bfloat16)
    kept = [
        *((model._keep_in_fp32_modules or ()) if model.dtype == torch.float16 else ()),
        *((model._keep_in_fp32_modules_strict or ()) if half else ()),
    ]
    for name, parameter in model.named_parameters():
        if any(re.search(rf"(^|\.){module}($|\.)", name) for module in kept):
            parameter.data = parameter.data.float()


def load_config(directory: Path) -> Any:
    """Read config.json, with the rotary settings of transformers 5 translated for 4.57.

    transformers 5 writes `rope_parameters`, which 4.57 ignores: it would run with `rope_theta` 10000 in silence.

    Raises:
        UserError: the rotary settings differ by layer type, which 4.57's config cannot say.
    """
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{directory / 'config.json'}: is not the config of a model; fetch the model again")
    parameters = config.get("rope_parameters")
    overrides: dict[str, Any] = {}
    if parameters is not None and "rope_theta" not in config:
        if any(isinstance(value, dict) for value in parameters.values()):
            raise UserError(
                f"{directory / 'config.json'}: rotary settings per layer type, written by transformers 5, cannot be "
                "read by 4.57; save the model with transformers 4.57"
            )
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        overrides["rope_theta"] = parameters.get("rope_theta", 10000.0)
        overrides["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    try:
        with _quiet_transformers():
            return AutoConfig.from_pretrained(directory, **overrides)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory / 'config.json'}: {first_line(error)}") from error


def check_weight_files(directory: Path) -> None:
    """Refuse a directory whose weights are missing or cut short, naming the file.

    Raises:
        UserError: a shard of the index is absent, or a safetensors header or its data is incomplete.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: is not an index of weights; fetch the model again") from error
    else:
        shards = sorted(directory.glob("*.safetensors"))
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard}: missing, though {index.name} names it; fetch the model again")
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard}: corrupted safetensors file ({error}); fetch or make it again") from error
    if not shards and not any(directory.glob("*.bin")):
        raise UserError(f"{directory}: holds no *.safetensors weights")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None when it comes without one.

    Raises:
        UserError: the tokenizer's files are there but cannot be read.
    """
    if source.is_gguf:
        with _quiet_transformers():
            return gguf.load_tokenizer(source.path)
    if not any((source.path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = first_line(error)
        raise UserError(f"{source.name}: its tokenizer cannot be loaded ({reason})") from error


def require_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, source: ModelSource, purpose: str
) -> PreTrainedTokenizerBase:
    """The tokenizer, which is there.

    Raises:
        UserError: it is not.
    """
    if tokenizer is None:
        raise UserError(f"{source.name}: has no tokenizer, which {purpose} needs; copy its files into the directory")
    return tokenizer


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was made for, in tokens; None when its config names no limit."""
    return context_of(model.config)


def context_of(config: Any) -> int | None:
    """See `context_length`."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def architecture(model: PreTrainedModel) -> str:
    """The model's class and sizes, in words: equal for a model and what was pruned or trained further from it."""
    config = model.config.get_text_config()
    return (
        f"{type(model).__name__}, blocks: {config.num_hidden_layers}, hidden size: {config.hidden_size}, "
        f"heads: {config.num_attention_heads}, vocabulary: {config.vocab_size}"
    )
