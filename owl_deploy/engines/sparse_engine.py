"""Our own engine: ONNX Runtime with packed sparse weights, through the operator `owl::SparseMatMul`."""

from __future__ import annotations

import os
from typing import Any

from owl_deploy.engines.onnxruntime_engine import OnnxRuntimeEngine
from owl_deploy.sparse.formats import KERNELS_VARIABLE
from owl_deploy.sparse.library import instruction_sets, library_path


def chosen_kernels() -> str:
    """The instruction set of the kernels that will run here."""
    return os.environ.get(KERNELS_VARIABLE) or instruction_sets()[0]


class SparseEngine(OnnxRuntimeEngine):
    """Runs `sparse-*` graphs, whose weights are mapped from their file and read in place."""

    def _options(self, threads: int) -> Any:
        options = super()._options(threads)
        options.register_custom_ops_library(str(library_path()))
        return options

    def describe(self) -> dict[str, Any]:
        """The instruction set is that of our kernels; matrices that stay dense fp32 are ONNX Runtime's."""
        kernels = chosen_kernels()
        return super().describe() | {"instruction_set": kernels, "kernels": kernels}
