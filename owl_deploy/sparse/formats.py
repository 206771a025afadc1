"""The formats of packed matrices, and the operator that multiplies them; standard library only, for the engines."""

from __future__ import annotations

from typing import Literal, get_args

FORMATS = {"packed32": 1, "packed16": 2, "int8": 3, "dense8": 4, "int4": 5, "dense4": 6}
"""Formats of one matrix, by the number that `csrc/format/format.h` gives them."""

Stored = Literal["fp32", "packed32", "packed16", "int8", "dense8", "int4", "dense4"]
"""How a graph stores one matrix: packed in one of `FORMATS`, or as it was."""

Weights = Literal["packed32", "packed16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
"""How a sparse flavor stores the weights of its blocks; see sparse/FORMAT.md."""

Head = Literal["fp32", "int8", "int4"]
HEADS: tuple[Head, ...] = get_args(Head)
"""How it stores the matrix of the vocabulary."""

SPARSE_OPERATOR, SPARSE_DOMAIN = "SparseMatMul", "owl"

KERNELS_VARIABLE = "OWL_DEPLOY_KERNELS"
"""Names an instruction set whose kernels are to run, instead of the best one's; `csrc/operator.cpp` reads it."""
