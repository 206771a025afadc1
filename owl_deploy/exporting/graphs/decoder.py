"""LLaMA-like decoders written straight as ONNX, from the checkpoint's tensors, without tracing a model.

A traced graph repeats keys and values for every query head, rebuilds the mask and the rotary angles in operators
that DeepSparse cannot compile, and takes most of a minute. This graph keeps the cache at the key-value heads, looks
the angles up, computes the mask once, and is written as fast as the disk takes it.

Shapes in this module: B sequences, L new tokens, P cached ones, S = P + L, D hidden, H query heads, K key-value heads,
G = H / K, E head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from owl_deploy.bundle.names import ATTENTION_BIAS, IR_VERSION, OPSET
from owl_deploy.bundle.tensors import CheckpointTensors, ExternalData, transposed
from owl_deploy.exporting.graphs.positions import select_positions

_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
_FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})  # the others depend on the sequence's length


@dataclass(frozen=True)
class _Dimensions:
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Dimensions:
        heads: int = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
        )


def unsupported(config: PretrainedConfig) -> str | None:
    """Why `write_decoder_graph` cannot express this model; None when it can."""
    if config.model_type not in _MODEL_TYPES:
        return f"no hand-written graph for model type {config.model_type}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act} is not SiLU"
    if _rope_type(config) not in _FIXED_ROPE_TYPES:
        return f"rotary scaling {_rope_type(config)} changes with the sequence's length"
    window = _sliding_window(config)
    if window is not None and window < config.max_position_embeddings:
        return f"attention slides over {window} of {config.max_position_embeddings} positions"
    return None


def _rope_type(config: PretrainedConfig) -> str:
    scaling = getattr(config, "rope_scaling", None) or {}
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _sliding_window(config: PretrainedConfig) -> int | None:
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or "sliding_attention" in layer_types
    return getattr(config, "sliding_window", None) if slides else None


def write_decoder_graph(config: PretrainedConfig, tensors: CheckpointTensors, path: Path) -> None:
    """Write `path` and its external data, `path` + ".data".

    Inputs and outputs are those of optimum's text-generation-with-past graphs. The weight of a linear module is the
    MatMul initializer `<module>.weight_t`, [in, out], its zeros intact.

    Args:
        config: of a model that `unsupported` has nothing against.
        tensors: its weights, of any dtype; the graph is fp32. One matrix at a time is in memory.

    Raises:
        UserError: a tensor is missing.
    """
    with ExternalData(path.with_name(f"{path.name}.data")) as data:
        model = _Decoder(config, tensors, data).build()
    select_positions(model)
    path.write_bytes(model.SerializeToString())


class _Decoder:
    """Builds the graph front to back. A method emits the nodes of one module and returns its output's name."""

    def __init__(self, config: PretrainedConfig, tensors: CheckpointTensors, data: ExternalData) -> None:
        self._config = config
        self._dimensions = _Dimensions.of(config)
        self._tensors = tensors
        self._data = data
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}

    def build(self) -> onnx.ModelProto:
        hidden = self._embed()
        self._attention_bias()
        cos, sin = self._rotary_angles()
        for index in range(self._dimensions.layers):
            hidden = self._layer(index, hidden, cos, sin)
        self._head(self._rms_norm("model.norm", hidden))
        graph = helper.make_graph(
            self._nodes,
            self._config.model_type,
            self._graph_inputs(),
            self._graph_outputs(),
            list(self._initializers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="owl-deploy",
        )

    # The interface

    def _graph_inputs(self) -> list[onnx.ValueInfoProto]:
        new, total = ["batch_size", "sequence_length"], ["batch_size", "total_sequence_length"]
        return [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, new),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, total),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, new),
            *self._cache("past_key_values", "past_sequence_length"),
        ]

    def _graph_outputs(self) -> list[onnx.ValueInfoProto]:
        shape: list[str | int | None] = ["batch_size", "sequence_length", self._dimensions.vocabulary]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        return [logits, *self._cache("present", "total_sequence_length")]

    def _cache(self, prefix: str, length: str) -> list[onnx.ValueInfoProto]:
        d = self._dimensions
        shape: list[str | int | None] = ["batch_size", d.kv_heads, length, d.head_dim]
        return [
            helper.make_tensor_value_info(f"{prefix}.{index}.{kind}", TensorProto.FLOAT, shape)
            for index in range(self._dimensions.layers)
            for kind in ("key", "value")
        ]

    # The modules

    def _embed(self) -> str:
        """Token embeddings, [B, L, D]."""
        weight = self._weight("model.embed_tokens.weight", self._tensors.read("model.embed_tokens.weight"))
        return self._node("Gather", [weight, "input_ids"], "model.embed_tokens")

    def _head(self, hidden: str) -> str:
        """The logits, [B, L, V]."""
        source = "model.embed_tokens" if self._config.tie_word_embeddings else "lm_head"
        weight = self._weight("lm_head.weight_t", transposed(self._tensors.read(f"{source}.weight")))
        return self._node("MatMul", [hidden, weight], "logits")

    def _layer(self, index: int, hidden: str, cos: str, sin: str) -> str:
        name = f"model.layers.{index}"
        attended = self._attention(index, self._rms_norm(f"{name}.input_layernorm", hidden), cos, sin)
        hidden = self._node("Add", [hidden, attended], f"{name}.attention_residual")
        forwarded = self._mlp(f"{name}.mlp", self._rms_norm(f"{name}.post_attention_layernorm", hidden))
        return self._node("Add", [hidden, forwarded], name)

    def _attention(self, index: int, hidden: str, cos: str, sin: str) -> str:
        """Grouped-query attention: the G query heads of a key-value head become G * L rows of one matrix."""
        d, name = self._dimensions, f"model.layers.{index}.self_attn"
        query = self._heads(f"{name}.q_proj", f"{name}.q_norm", hidden, d.heads)
        key = self._heads(f"{name}.k_proj", f"{name}.k_norm", hidden, d.kv_heads)
        value = self._heads(f"{name}.v_proj", f"{name}.v_norm", hidden, d.kv_heads)
        if self._has_rotary(index):
            query = self._rotate(f"{name}.rotary.query", query, cos, sin)
            key = self._rotate(f"{name}.rotary.key", key, cos, sin)
        keys = self._append(f"{index}.key", key)
        values = self._append(f"{index}.value", value)

        # Scaling the queries costs G * L * E products a head; scaling the scores would cost G * L * S.
        query = self._node("Mul", [query, self._constant("scale", np.float32(d.head_dim**-0.5))], f"{name}.scaled")
        query = self._reshape(f"{name}.grouped", query, [0, d.kv_heads, -1, d.head_dim])
        keys = self._node("Transpose", [keys], f"{name}.keys_t", perm=[0, 1, 3, 2])
        scores = self._node("MatMul", [query, keys], f"{name}.scores")
        scores = self._node("Add", [scores, ATTENTION_BIAS], f"{name}.masked")
        weights = self._node("Softmax", [scores], f"{name}.weights", axis=-1)
        mixed = self._node("MatMul", [weights, values], f"{name}.mixed")

        mixed = self._reshape(f"{name}.ungrouped", mixed, [0, d.heads, -1, d.head_dim])
        mixed = self._node("Transpose", [mixed], f"{name}.by_token", perm=[0, 2, 1, 3])
        return self._linear(f"{name}.o_proj", self._reshape(f"{name}.joined", mixed, [0, 0, -1]))

    def _has_rotary(self, layer: int) -> bool:
        """SmolLM3 leaves the rotation out of every fourth layer."""
        layers = getattr(self._config, "no_rope_layers", None)
        return layers is None or bool(layers[layer])

    def _heads(self, projection: str, norm: str, hidden: str, heads: int) -> str:
        """Project and split into heads, [B, heads, L, E], normalised over E where the model does so."""
        states = self._linear(projection, hidden)
        states = self._reshape(f"{projection}.heads", states, [0, 0, heads, self._dimensions.head_dim])
        if f"{norm}.weight" in self._tensors:
            states = self._rms_norm(norm, states)
        return self._node("Transpose", [states], f"{projection}.by_head", perm=[0, 2, 1, 3])

    def _append(self, slot: str, states: str) -> str:
        """The cached states followed by the new ones, [B, K, S, E]."""
        return self._node("Concat", [f"past_key_values.{slot}", states], f"present.{slot}", axis=2)

    def _mlp(self, name: str, hidden: str) -> str:
        gate = self._linear(f"{name}.gate_proj", hidden)
        sigmoid = self._node("Sigmoid", [gate], f"{name}.sigmoid")
        gate = self._node("Mul", [gate, sigmoid], f"{name}.silu")
        up = self._linear(f"{name}.up_proj", hidden)
        return self._linear(f"{name}.down_proj", self._node("Mul", [gate, up], f"{name}.gated"))

    def _linear(self, name: str, hidden: str) -> str:
        weight = self._weight(f"{name}.weight_t", transposed(self._tensors.read(f"{name}.weight")))
        biased = f"{name}.bias" in self._tensors
        product = self._node("MatMul", [hidden, weight], f"{name}.product" if biased else name)
        if not biased:
            return product
        return self._node("Add", [product, self._weight(f"{name}.bias", self._tensors.read(f"{name}.bias"))], name)

    def _rms_norm(self, name: str, hidden: str) -> str:
        """x / sqrt(mean(x^2) + eps) * weight, in the operators that ONNX Runtime fuses into one."""
        squares = self._node("Pow", [hidden, self._constant("two", np.float32(2))], f"{name}.squares")
        mean = self._node("ReduceMean", [squares], f"{name}.mean", axes=[-1], keepdims=1)
        epsilon = self._constant("epsilon", np.float32(self._config.rms_norm_eps))
        root = self._node("Sqrt", [self._node("Add", [mean, epsilon], f"{name}.shifted")], f"{name}.root")
        unit = self._node("Div", [hidden, root], f"{name}.unit")
        return self._node("Mul", [unit, self._weight(f"{name}.weight", self._tensors.read(f"{name}.weight"))], name)

    # Positions and mask

    def _rotary_angles(self) -> tuple[str, str]:
        """Cosines and sines of the new tokens' angles, [B, 1, L, E]."""
        axis = self._constant("head_axis", np.array([1], np.int64))
        found = []
        for name, table in zip(("rotary.cos", "rotary.sin"), _rotary_tables(self._config), strict=True):
            rows = self._node("Gather", [self._weight(f"{name}_table", table), "position_ids"], f"{name}_rows")
            found.append(self._node("Unsqueeze", [rows, axis], name))
        return found[0], found[1]

    def _rotate(self, name: str, states: str, cos: str, sin: str) -> str:
        """states * cos + rotate_half(states) * sin, [B, heads, L, E].

        The half turn is a product with a constant of 0, 1 and -1, which is exact. As Split, Neg and Concat, which a
        traced graph has, it makes DeepSparse compile longer: 150 s and more where TinyLlama's 22 blocks take 57 s.
        """
        half_turn = self._constant("half_turn", _half_turn(self._dimensions.head_dim))
        turned = self._node("MatMul", [states, half_turn], f"{name}.turned")
        straight = self._node("Mul", [states, cos], f"{name}.straight")
        across = self._node("Mul", [turned, sin], f"{name}.across")
        return self._node("Add", [straight, across], name)

    def _attention_bias(self) -> None:
        """`ATTENTION_BIAS` from the attention mask: key j is open to new token i if j <= P + i and it is no padding."""
        zero, one = (self._constant(name, np.array(n, np.int64)) for name, n in (("zero", 0), ("one", 1)))
        total = self._extent("attention_mask", "mask.total")
        new = self._extent("input_ids", "mask.new")
        key = self._node("Range", [zero, total, one], "mask.key")
        query = self._node("Range", [self._node("Sub", [total, new], "mask.past"), total, one], "mask.query")
        query = self._node("Unsqueeze", [query, self._constant("head_axis", np.array([1], np.int64))], "mask.rows")
        causal = self._node("LessOrEqual", [key, query], "mask.causal")
        padded = self._constant("mask.axes", np.array([1, 2], np.int64))
        present = self._node("Cast", ["attention_mask"], "mask.bool", to=TensorProto.BOOL)
        present = self._node("Unsqueeze", [present, padded], "mask.present")
        visible = self._node("And", [present, causal], "mask.visible")
        # Finite, so that a row of padding, which sees nothing, gets some mean and not NaN.
        hidden = self._constant("mask.hidden", np.finfo(np.float32).min)
        bias = self._node("Where", [visible, self._constant("mask.shown", np.float32(0)), hidden], "mask.bias")
        group = self._dimensions.heads // self._dimensions.kv_heads
        self._node("Concat", [bias] * group, ATTENTION_BIAS, axis=2)

    def _extent(self, tensor: str, name: str) -> str:
        """The size of axis 1 of `tensor`, a scalar."""
        shape = self._node("Shape", [tensor], f"{name}.shape")
        return self._node("Gather", [shape, self._constant("one", np.array(1, np.int64))], name)

    # Plumbing

    def _reshape(self, name: str, states: str, shape: list[int]) -> str:
        """Reshape by a constant of 0 (keep) and -1 (what is left), so that one graph serves every B and L."""
        constant = self._constant("shape." + "_".join(map(str, shape)), np.array(shape, np.int64))
        return self._node("Reshape", [states, constant], name)

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def _constant(self, name: str, value: np.generic | NDArray[Any]) -> str:
        """A small value, inside the model file."""
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def _weight(self, name: str, values: NDArray[np.float32]) -> str:
        """A tensor in the external data."""
        self._initializers[name] = self._data.add(name, values)
        return name


def _half_turn(head_dim: int) -> NDArray[np.float32]:
    """R, [E, E]: x R is the second half of x, negated, and then its first half."""
    return np.eye(head_dim, k=head_dim // 2, dtype=np.float32) - np.eye(head_dim, k=-(head_dim // 2), dtype=np.float32)


def _rotary_tables(config: PretrainedConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, [positions, E], in the same fp32 arithmetic as the model's own."""
    frequencies, scaling = ROPE_INIT_FUNCTIONS[_rope_type(config)](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).numpy(), (angles.sin() * scaling).numpy()
