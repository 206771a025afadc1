"""The `gguf-…` flavors: the checkpoint as one file for llama.cpp, its matrices in f16, Q8_0 or Q4_0.

Types are those that llama.cpp's own converter and `llama-quantize` choose: vectors stay f32, every matrix takes the
flavor's type, and one whose rows are no whole blocks of 32 weights stays f16. Q4_0 alone treats the matrix that makes
the logits better (the token embedding too, where they are one): here it is Q8_0, as there for rows that are not
multiples of 256. For others llama.cpp takes Q6_K, which the gguf package cannot write.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedModel

from owl_deploy.bundle.names import model_file
from owl_deploy.errors import UnsupportedFamily
from owl_deploy.exporting.peers.gguf_tokenizer import add_tokenizer
from owl_deploy.models.load import load_config, load_model, load_tokenizer
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import without_indices

GgufWeights = Literal["f16", "q8_0", "q4_0"]

_ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}
_TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_EMBEDDING, _HEAD, _FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"


@dataclass(frozen=True)
class _Tensor:
    """One tensor under its name in the file, [out, in] or [out].

    Attributes:
        head_dim: of the heads whose rows are put in llama.cpp's order; None where it keeps the checkpoint's.
    """

    name: str
    values: torch.Tensor
    stored_as: GGMLQuantizationType
    head_dim: int | None = None

    @property
    def stored_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.stored_as]
        return int(self.values.numel() // block * size)

    def encoded(self) -> NDArray[Any]:
        values = self.values.float().numpy()
        if self.head_dim is not None:
            values = _halves_to_pairs(values, self.head_dim)
        encoded: NDArray[Any] = quantize(np.ascontiguousarray(values), self.stored_as)
        return encoded


def write_gguf(checkpoint: Path, out: Path, has_tokenizer: bool, *, weights: GgufWeights) -> tuple[str, str]:
    """Write `model.gguf` into `out`, the same bytes for the same checkpoint; what it was made by, and a note.

    Raises:
        UnsupportedFamily: it is neither LLaMA, Mistral nor Qwen 2, or its activation or rotary embedding is not
            among what llama.cpp computes for these.
    """
    source = ModelSource(str(checkpoint), checkpoint)
    config = load_config(checkpoint)
    architecture = _architecture(checkpoint, config)
    name = MODEL_ARCH_NAMES[architecture]
    tensors = _tensors(checkpoint, load_model(source), architecture, weights)
    writer = GGUFWriter(out / model_file("gguf-f16"), name)
    _add_settings(writer, config, weights)
    notes = [
        f"llama.cpp's {name}, {_TYPES[weights][0].name} but for {_exceptions(tensors, weights)}",
        add_tokenizer(writer, load_tokenizer(source) if has_tokenizer else None, config.vocab_size),
    ]
    if (window := _window(config)) is not None:
        notes.append(f"made for {window} tokens: its attention looks no further, which llama.cpp's {name} cannot do")
    for tensor in tensors:
        # float32 stands for "of this shape": of uint8 the gguf package would take it to be in bytes.
        writer.add_tensor_info(
            tensor.name, tensor.values.shape, np.dtype(np.float32), tensor.stored_bytes, raw_dtype=tensor.stored_as
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:  # one at a time in its new form
        writer.write_tensor_data(tensor.encoded())
    writer.close()
    return f"gguf {importlib.metadata.version('gguf')}", "; ".join(notes)


def _architecture(checkpoint: Path, config: PretrainedConfig) -> MODEL_ARCH:
    if config.model_type not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise UnsupportedFamily(f"{checkpoint}: model type {config.model_type} is not written as GGUF; {supported} are")
    if config.hidden_act != "silu":
        raise UnsupportedFamily(f"{checkpoint}: llama.cpp computes silu in this family, not {config.hidden_act}")
    return _ARCHITECTURES[config.model_type]


def _tensors(checkpoint: Path, model: PreTrainedModel, architecture: MODEL_ARCH, weights: GgufWeights) -> list[_Tensor]:
    """All that the file holds. A head that is the token embedding is not there twice."""
    parameters = {tensor_name(model.config, name): values for name, values in model.named_parameters()}
    head = _HEAD if _HEAD in parameters else _EMBEDDING
    # The rotary embedding of `llama` turns pairs of neighbours, transformers' and `qwen2`'s pairs across the halves.
    pairs = _head_dim(model.config) if architecture is MODEL_ARCH.LLAMA else None
    tensors = [
        _Tensor(
            name,
            values,
            _stored_as(values, GGMLQuantizationType.Q8_0 if (name, weights) == (head, "q4_0") else _TYPES[weights][0]),
            pairs if ".attn_q." in name or ".attn_k." in name else None,
        )
        for name, values in parameters.items()
    ]
    if (factors := _frequency_factors(checkpoint, model)) is not None:
        if architecture is not MODEL_ARCH.LLAMA:
            raise UnsupportedFamily(f"{checkpoint}: llama.cpp scales the rotary embedding of LLaMA only")
        tensors.append(_Tensor(_FREQUENCIES, factors, GGMLQuantizationType.F32))
    return tensors


def tensor_name(config: PretrainedConfig, parameter: str) -> str:
    """What llama.cpp calls a parameter of a model that `write_gguf` writes."""
    names = get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    name: str = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    return name


def _stored_as(values: torch.Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if values.dim() == 1:
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return GGMLQuantizationType.F16 if values.shape[-1] % block else wanted


def _exceptions(tensors: list[_Tensor], weights: GgufWeights) -> str:
    """The tensors that are not of the flavor's own type, in words: vectors, and matrices by name."""
    others = {
        f"{without_indices(tensor.name)} ({tensor.stored_as.name})"
        for tensor in tensors
        if tensor.values.dim() > 1 and tensor.stored_as is not _TYPES[weights][0]
    }
    return ", ".join(["vectors (F32)", *sorted(others)])


def _halves_to_pairs(values: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of heads [heads * head_dim, ...], in each element i of one half beside element i of the other."""
    halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _frequency_factors(checkpoint: Path, model: PreTrainedModel) -> torch.Tensor | None:
    """What llama.cpp is to divide each frequency of the rotary embedding by, [head_dim / 2]; None for nothing."""
    rotary = model.get_decoder().rotary_emb
    if rotary.rope_type not in ("default", "linear", "llama3"):
        raise UnsupportedFamily(f"{checkpoint}: a rotary embedding of type {rotary.rope_type} is not written as GGUF")
    if rotary.rope_type == "default":
        return None
    dimension = _head_dim(model.config)
    unscaled = model.config.rope_theta ** -(torch.arange(0, dimension, 2) / dimension)
    factors: torch.Tensor = unscaled / rotary.inv_freq.float()
    return factors


def _window(config: PretrainedConfig) -> int | None:
    """The tokens that attention looks back at, where these are fewer than the model's context."""
    window = getattr(config, "sliding_window", None)
    return window if window and window < config.max_position_embeddings else None


def _add_settings(writer: GGUFWriter, config: PretrainedConfig, weights: GgufWeights) -> None:
    head_dim = _head_dim(config)
    writer.add_file_type(_TYPES[weights][1])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(_window(config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
