"""The `genai-int4` and `genai-int8` flavors: the graph of `genai/`, every product's weights rounded in blocks of 32."""

from __future__ import annotations

from pathlib import Path

import onnx

from owl_deploy.exporting.graphs.genai import silence, write_genai

_BLOCK = 32  # weights to a scale: at 8 bits, blocks of 128 change the logits of SmolLM2 1.7 times as much
_INPUTS_IN_8_BITS = 4  # the `accuracy_level` of MatMulNBits whose kernels multiply integers
_NOTE = "the genai graph, weights and head in {bits} bits by blocks of {block}, symmetric; inputs of products in 8 bits"


def write_genai_int4(checkpoint: Path, out: Path, has_tokenizer: bool) -> tuple[str, str]:
    """See `flavors.Write`. The builder's own choices: symmetric, rounded to nearest, the head in 4 bits too."""
    options = {"int4_block_size": _BLOCK, "int4_accuracy_level": _INPUTS_IN_8_BITS}
    write_genai(checkpoint, out, has_tokenizer=has_tokenizer, precision="int4", options=options)
    return "onnxruntime-genai", _NOTE.format(bits=4, block=_BLOCK)


def write_genai_int8(checkpoint: Path, out: Path, has_tokenizer: bool) -> tuple[str, str]:
    """See `flavors.Write`. The builder has no 8 bits for all of a model: ONNX Runtime's quantiser gives them."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    write_genai(checkpoint, out, has_tokenizer=has_tokenizer)
    graph, data = out / "model.onnx", out / "model.onnx.data"
    quantizer = MatMulNBitsQuantizer(
        onnx.load(graph), bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=_INPUTS_IN_8_BITS
    )
    with silence():
        quantizer.process()
    data.unlink()  # or the new weights would be appended
    onnx.save(quantizer.model.model, graph, save_as_external_data=True, location=data.name)
    return "onnxruntime-genai, quantised by ONNX Runtime", _NOTE.format(bits=8, block=_BLOCK)
