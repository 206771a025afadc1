"""Graphs of every other architecture: traced by optimum, then put into the form that DeepSparse reads."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper
from transformers import PretrainedConfig

from owl_deploy.bundle.names import IR_VERSION, OPSET
from owl_deploy.bundle.tensors import ExternalData
from owl_deploy.errors import UnsupportedFamily
from owl_deploy.exporting.graphs.positions import select_positions

_SMALL_BYTES = 1024  # shapes and scalars stay in the model file, where shape inference can read them


def write_optimum_graph(checkpoint: Path, config: PretrainedConfig, path: Path) -> None:
    """Write `path` and its external data, `path` + ".data".

    Raises:
        UnsupportedFamily: optimum cannot export this architecture.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".optimum-") as folder:
        model = _export(checkpoint, config.model_type, Path(folder))
        _look_angles_up(model, positions=getattr(config, "max_position_embeddings", 0))
        _remove_unused(model)
        model.ir_version = IR_VERSION
        default_domain = [opset for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
        del model.opset_import[:]
        model.opset_import.extend(default_domain)
        with ExternalData(path.with_name(f"{path.name}.data")) as data:
            for tensor in model.graph.initializer:
                values = onnx.numpy_helper.to_array(tensor, base_dir=folder)
                if values.nbytes > _SMALL_BYTES:
                    tensor.CopyFrom(data.add(tensor.name, values))
                else:
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    select_positions(model)
    path.write_bytes(model.SerializeToString())


def _export(checkpoint: Path, model_type: str, folder: Path) -> ModelProto:
    """Optimum's graph, its external data left in `folder`."""
    from optimum.exporters.onnx import main_export  # takes seconds

    try:
        with _silence():
            main_export(
                str(checkpoint),
                output=folder,
                task="text-generation-with-past",
                opset=OPSET,
                dtype="fp32",
                do_validation=False,
                no_post_process=True,
                local_files_only=True,
            )
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedFamily(f"{checkpoint}: optimum cannot export model type {model_type} ({reason})") from error
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep a tracer's warnings, prints and progress bars from the user, who can do nothing about them."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _look_angles_up(model: ModelProto, positions: int) -> None:
    """Replace each Cos and Sin of the positions by a row of a table: DeepSparse's compiler aborts on them.

    Args:
        positions: rows of the table, that is the longest sequence the model is made for.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in [node for node in model.graph.node if node.op_type in ("Cos", "Sin")]:
        steps = _steps_from_positions(node, producers, {tensor.name for tensor in model.graph.initializer})
        if steps is None:
            continue
        table = f"{node.name}.table"
        values = _values_at_every_position(model, steps, node.output[0], positions)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, table))
        lookup = helper.make_node("Gather", [table, "position_ids"], node.output, name=node.name)
        node.CopyFrom(lookup)


def _steps_from_positions(
    last: NodeProto, producers: dict[str, NodeProto], constants: set[str]
) -> list[NodeProto] | None:
    """The nodes that compute `last` from `position_ids` alone; None if it needs another input as well."""
    steps: dict[str, NodeProto] = {}
    pending = [last]
    while pending:
        node = pending.pop()
        steps[node.output[0]] = node
        for name in node.input:
            if name in producers:
                if producers[name].output[0] not in steps:
                    pending.append(producers[name])
            elif name and name != "position_ids" and name not in constants:
                return None
    return list(steps.values())


def _values_at_every_position(
    model: ModelProto, steps: list[NodeProto], output: str, positions: int
) -> NDArray[np.float32]:
    """`output` for position_ids 0, 1, ..., [positions, angles]."""
    wanted = {step.output[0] for step in steps}
    read = {name for step in steps for name in step.input}
    graph = helper.make_graph(
        [node for node in model.graph.node if node.output[0] in wanted],  # in the graph's own, valid order
        "angles",
        [value for value in model.graph.input if value.name == "position_ids"],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in read],
    )
    angles = helper.make_model(graph, opset_imports=model.opset_import, ir_version=IR_VERSION)
    session = onnxruntime.InferenceSession(angles.SerializeToString(), providers=["CPUExecutionProvider"])
    values: list[NDArray[np.float32]] = session.run([output], {"position_ids": np.arange(positions)[None]})
    return values[0].reshape(positions, -1)


def _remove_unused(model: ModelProto) -> None:
    """Drop the nodes and initializers that no output needs."""
    needed = {output.name for output in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    nodes = list(reversed(kept))
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(initializers)
