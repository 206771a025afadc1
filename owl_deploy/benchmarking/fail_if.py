"""Conditions on rows that fail a run: `speedup["sparse-int8"]@0.7 < 2.0`, for other people's CI.

The grammar is a part of Python's, read by `ast` and never executed: figures of rows, numbers, + - * /, comparisons,
and, or, not. A figure is FIELD["ENGINE"]@SPARSITY: a numeric field of a row, `speedup` being short for
`speedup_fastest_dense`; ENGINE is an engine's name, or short for several as on the command line (`sparse` for all
formats). Of several such rows the figure must hold for each: the condition is met when it is met for any.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from owl_deploy.benchmarking.rows import Row
from owl_deploy.engines.registry import full_names
from owl_deploy.errors import UserError

_SHORT = {"speedup": "speedup_fastest_dense", "ttft_ms": "ttft_ms_p50", "decode_ms": "decode_ms_p50"}
_AT = re.compile(r"\]\s*@\s*([0-9.]+)")
_INDEX = re.compile(r"\['([^']*)', ([0-9.]+)\]")  # as `ast.unparse` writes what `_AT` was turned into
_TOLERANCE = 1e-6  # of a sparsity
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Figure:
    """One figure of the rows of one engine at one sparsity."""

    field: str
    engine: str
    sparsity: float

    def __str__(self) -> str:
        return f'{self.field}["{self.engine}"]@{self.sparsity:g}'

    def is_at(self, sparsity: float) -> bool:
        return abs(sparsity - self.sparsity) < _TOLERANCE

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Those it is read from.

        Raises:
            UserError: there is none.
        """
        engines = full_names(self.engine)
        found = [row for row in rows if row.engine in engines and self.is_at(row.sparsity)]
        if not found:
            there = sorted({f"{row.engine}@{row.sparsity:g}" for row in rows})
            raise UserError(f"--fail-if: no row of {self.engine!r} at {self.sparsity:g}; there are {', '.join(there)}")
        return found


@dataclass(frozen=True)
class Condition:
    """A condition as it was given, and read."""

    text: str
    tree: ast.expr

    def check_names(self, engines: Collection[str], sparsities: Collection[float]) -> None:
        """See before anything is measured that every figure will have a row.

        Raises:
            UserError: a figure is of another engine or sparsity than those that will be measured.
        """
        for figure in _figures(self.tree):
            if set(full_names(figure.engine)).isdisjoint(engines):
                raise UserError(
                    f"--fail-if {self.text}: {figure.engine} is not measured here; name one of {', '.join(engines)}"
                )
            if not any(figure.is_at(sparsity) for sparsity in sparsities):
                levels = ", ".join(f"{sparsity:g}" for sparsity in sorted(set(sparsities)))
                raise UserError(
                    f"--fail-if {self.text}: nothing is measured at {figure.sparsity:g}; name one of {levels}"
                )

    def failure(self, rows: Sequence[Row]) -> str | None:
        """Why the run fails: the condition is met for some choice of rows, or cannot be told; None if neither.

        It cannot be told where a row failed or lacks the figure, a figure is not a number, or 0 is divided by.

        Raises:
            UserError: no row is meant by one of its figures.
        """
        figures = list(dict.fromkeys(_figures(self.tree)))
        choices = [[getattr(row, figure.field) for row in figure.rows(rows)] for figure in figures]
        unknown: str | None = None
        for values in itertools.product(*choices):
            try:
                if _value(self.tree, dict(zip(figures, values, strict=True))):
                    return "it holds"
            except _Unknown as error:
                unknown = unknown or f"it cannot be told: {error}"
        return unknown


class _Unknown(Exception):
    """A part of a condition has no value; the message says which and why."""


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        UserError: it is not one; the part that is not is named.
    """
    try:
        # In Python @ binds no tighter than *; here it belongs to its figure, as if that had two indices.
        tree = ast.parse(_AT.sub(r", \1]", text), mode="eval").body
    except SyntaxError as error:
        raise _refused(text, f"{error.msg}") from error
    if not isinstance(tree, ast.Compare | ast.BoolOp | ast.UnaryOp):
        raise _refused(text, "it compares nothing")
    _check(text, tree)
    return Condition(text, tree)


def _refused(text: str, reason: str) -> UserError:
    return UserError(f"--fail-if {text}: {reason}; write for example 'speedup[\"sparse-int8\"]@0.7 < 2.0'")


def _check(text: str, node: ast.expr) -> None:
    """
    Raises:
        UserError: a part of the tree is not of the grammar.
    """
    if (figure := _figure(node)) is not None:
        if figure.field not in _numeric_fields():
            raise _refused(text, f"{figure.field} is not a figure of a row")
        return
    parts = _parts(node)
    if parts is None:
        raise _refused(text, f"cannot read {_shown(node)!r}")
    for part in parts:
        _check(text, part)


def _parts(node: ast.expr) -> list[ast.expr] | None:
    """What a node of the grammar is made of; None for any other node."""
    match node:
        case ast.Constant(value=bool()):  # which Python takes for a number
            return None
        case ast.Constant(value=int() | float()):
            return []
        case ast.BoolOp(values=values):
            return values
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            return [operand]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return [left, right]
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
            return [left, *others]
    return None


def _figure(node: ast.AST) -> Figure | None:
    match node:
        case ast.Subscript(
            value=ast.Name(id=field),
            slice=ast.Tuple(elts=[ast.Constant(value=str(engine)), ast.Constant(value=int() | float() as sparsity)]),
        ):
            return Figure(_SHORT.get(field, field), engine, float(sparsity))
    return None


def _figures(node: ast.AST) -> Iterator[Figure]:
    for child in ast.walk(node):
        if (figure := _figure(child)) is not None:
            yield figure


def _value(node: ast.expr, figures: dict[Figure, float | None]) -> float | bool:
    """Of a tree that `_check` has seen.

    Raises:
        _Unknown: a number in it is missing, or is none.
    """
    if (figure := _figure(node)) is not None:
        value = figures[figure]
        if value is None or math.isnan(value):
            raise _Unknown(f"{figure} {'was not measured' if value is None else 'is not a number'}")
        return value
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BoolOp(op=op, values=values):
            met = [bool(_value(value, figures)) for value in values]  # all of them: an unknown one decides
            return all(met) if isinstance(op, ast.And) else any(met)
        case ast.UnaryOp(op=op, operand=operand):
            operated = _value(operand, figures)
            return not operated if isinstance(op, ast.Not) else -operated
        case ast.BinOp(left=left, op=op, right=right):
            return _computed(node, type(op), _value(left, figures), _value(right, figures))
        case ast.Compare(left=left, ops=ops, comparators=others):
            compared = [_value(item, figures) for item in (left, *others)]
            pairs = itertools.pairwise(compared)
            return all(_COMPARISONS[type(op)](*pair) for op, pair in zip(ops, pairs, strict=True))
    raise AssertionError(ast.dump(node))


def _computed(node: ast.expr, op: type[ast.operator], left: float, right: float) -> float:
    try:
        result = _ARITHMETIC[op](float(left), float(right))
    except ArithmeticError as error:  # a division by 0, a number too large for a float
        raise _Unknown(f"{_shown(node)}: {error}") from error
    if math.isnan(result):  # of infinities
        raise _Unknown(f"{_shown(node)} is not a number")
    return result


def _shown(node: ast.expr) -> str:
    """As it would be written in a condition."""
    return _INDEX.sub(r'["\1"]@\2', ast.unparse(node))


def _numeric_fields() -> set[str]:
    kinds = (int, float, int | None, float | None)
    return {name for name, field in Row.model_fields.items() if field.annotation in kinds}
