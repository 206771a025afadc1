"""Rows that belong on one curve: an engine's figures as sparsity rises."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from owl_deploy.bench.rows import Row
from owl_deploy.report.text import percent


class _Key(NamedTuple):
    """What the rows of one curve have in common."""

    engine: str
    model: str
    flavor: str
    weights: str
    threads: int
    prompt_tokens: int
    new_tokens: int

    def words(self) -> tuple[str, ...]:
        return (
            *(self.engine, self.model, self.flavor, self.weights),
            *(f"threads {self.threads}", f"prompt {self.prompt_tokens}", f"new {self.new_tokens}"),
        )


@dataclass(frozen=True)
class Series:
    """One engine on one graph flavor under one workload, by rising sparsity.

    Attributes:
        name: the engine, and what tells it from the engine's other series, if it has any.
    """

    name: str
    rows: tuple[Row, ...]

    @property
    def dense(self) -> Row | None:
        """The dense row, if there is one and it ran."""
        return next((row for row in self.rows if row.is_dense and row.status == "ok"), None)

    @property
    def sparse(self) -> list[Row]:
        """The sparse rows that ran."""
        return [row for row in self.rows if not row.is_dense and row.status == "ok"]

    def label(self, row: Row) -> str:
        """The row's sparsity, with the bundle where several have the same."""
        label = sparsity_label(row)
        twins = sum(sparsity_label(other) == label for other in self.rows)
        return label if twins == 1 else f"{label} {row.bundle}"


def sparsity_label(row: Row) -> str:
    """The sparsity as asked; as achieved where owl-deploy was not asked."""
    return "dense" if row.is_dense else percent(_sparsity(row))


def model_name(row: Row) -> str:
    """A hub id without its owner, a directory without its parents."""
    return Path(row.model).name


def same_workload(row: Row, other: Row) -> bool:
    """Whether two rows did the same work, whatever the engine."""
    return _workload(row) == _workload(other)


def by_series(rows: Iterable[Row]) -> list[Series]:
    """All rows, by engine and then by sparsity."""
    groups: dict[_Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return [
        Series(_name(key, groups), tuple(sorted(groups[key], key=lambda row: (_sparsity(row), row.bundle))))
        for key in sorted(groups)
    ]


def _workload(row: Row) -> tuple[str, int, int, int]:
    return model_name(row), row.threads, row.prompt_tokens, row.new_tokens


def _key(row: Row) -> _Key:
    return _Key(
        row.engine,
        model_name(row),
        row.flavor,
        row.weights,
        row.threads,
        row.prompt_tokens,
        row.new_tokens,
    )


def _name(key: _Key, keys: Iterable[_Key]) -> str:
    """The engine with those of its settings that differ between its series: `onnxruntime (genai, threads 4)`."""
    peers = [peer for peer in keys if peer.engine == key.engine]
    differing = [len(set(values)) > 1 for values in zip(*peers, strict=True)]
    details = ", ".join(compress(key.words(), differing))
    return f"{key.engine} ({details})" if details else key.engine


def _sparsity(row: Row) -> float:
    return row.sparsity_achieved if row.sparsity_asked is None else row.sparsity_asked
