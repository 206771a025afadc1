"""Names that graphs and the engines reading them agree on; standard library only, for the engines' sake."""

from __future__ import annotations

from typing import Literal, get_args

from owl_deploy.sparse.formats import WEIGHTS, Weights

SparseFlavor = Literal["sparse-packed32", "sparse-packed16", "sparse-int8", "sparse-int4"]
Flavor = Literal[
    "standard",
    "genai",
    SparseFlavor,
    "genai-int8",
    "genai-int4",
    "openvino",
    "openvino-int8",
    "openvino-int4",
    "openvino-int8-static",
    "gguf-f16",
    "gguf-q8_0",
    "gguf-q4_0",
    "gguf-q4_k_m",
    "gguf-q3_k_m",
    "gguf-q2_k",
    "gguf-iq4_xs",
    "gguf-original",
    "torch",
]
SPARSE_BY_BYTES: tuple[SparseFlavor, ...] = ("sparse-int4", "sparse-int8", "sparse-packed16", "sparse-packed32")
"""The fewest first: decoding is bound by the bytes of the weights."""

KvCache = Literal["fp32", "int8"]
KV_CACHES: tuple[KvCache, ...] = get_args(KvCache)
"""How a graph of GroupQueryAttention keeps keys and values."""

FLAVORS: tuple[Flavor, ...] = get_args(Flavor)
"""What a bundle can hold of a checkpoint; `export/flavors.py` says how each is made."""


def model_file(flavor: Flavor) -> str:
    """The file of a flavor's folder that its engine is given; what else the engine needs lies beside it."""
    if flavor.startswith("openvino"):
        return "openvino_model.xml"
    if flavor.startswith("gguf"):
        return "model.gguf"
    return "config.json" if flavor == "torch" else "model.onnx"


def precision_of(flavor: Flavor) -> str:
    """How a flavor stores the weights of its blocks."""
    sparse = weights_of(flavor)
    suffix = flavor.partition("-")[2]
    return sparse or suffix or "fp32"


def sparse_flavor(weights: Weights) -> SparseFlavor:
    """The flavor with these weights."""
    flavors: tuple[SparseFlavor, ...] = get_args(SparseFlavor)
    return next(flavor for flavor in flavors if flavor == f"sparse-{weights}")


def weights_of(flavor: Flavor) -> Weights | None:
    """How a sparse flavor stores its weights; None for a flavor of plain fp32."""
    return next((weights for weights in WEIGHTS if sparse_flavor(weights) == flavor), None)


ATTENTION_BIAS = "attention_bias"
"""The tensor every layer of a built graph adds to its attention scores, [B, 1, G * L, S], where G is the number of
query heads to a key-value head: 0 where a query may look, else a huge negative number. It is the Concat of G equal
masks. Nothing else in the graph reads the attention mask, so an engine may cut the graph here."""

LOGITS_FROM = "logits_from"
"""An optional input of a graph, int64 [1]: the first position whose logits are computed, counted from the end where it
is negative. Its default is 0; -1 is the last position alone, which is what generation needs of a prompt."""

CACHE_BITS = "kv_cache_bit_width"
"""The attribute of a GroupQueryAttention whose keys and values are kept as integers."""

CACHES, CACHE_SCALES = slice(3, 5), slice(12, 14)
"""Of its inputs, the caches of keys and of values, and what 1 of their integers stands for: [1, heads, 1, channels]."""

OPSET = 14
"""The oldest that has every operator needed; DeepSparse reads 14 to 19."""

IR_VERSION = 8
"""DeepSparse refuses 9 and above."""
