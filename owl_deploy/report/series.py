"""Rows that belong on one curve: an engine's figures as sparsity rises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from owl_deploy.bench.rows import Row
from owl_deploy.formatting import enumeration, percent


class Workload(NamedTuple):
    """What rows have in common whose times may be compared: the work, and the machine that did it."""

    model: str
    cpu: str
    cores: int
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int

    def words(self) -> tuple[str, ...]:
        """Each part as it appears in a name."""
        counts = {
            "cores": self.cores,
            "threads": self.threads,
            "batch": self.batch,
            "prompt": self.prompt_tokens,
            "new": self.new_tokens,
        }
        return self.model, self.cpu, *(f"{name} {count}" for name, count in counts.items())


class _Key(NamedTuple):
    """What the rows of one curve have in common."""

    engine: str
    flavor: str
    weights: str
    workload: Workload

    def words(self) -> tuple[str, ...]:
        return self.engine, self.flavor, self.weights, *self.workload.words()


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
    return "dense" if row.is_dense else percent(row.sparsity)


def model_name(row: Row) -> str:
    """A hub id without its owner, a directory without its parents."""
    return Path(row.model).name


def model_names(rows: Iterable[Row]) -> str:
    """All models of a report, in a title."""
    return enumeration(sorted({model_name(row) for row in rows}))


def workload_of(row: Row) -> Workload:
    """Of rows that may be compared this is equal, whatever the engine."""
    machine = row.machine
    return Workload(
        model_name(row), machine.cpu, machine.cores, row.threads, row.batch, row.prompt_tokens, row.new_tokens
    )


def same_workload(row: Row, other: Row) -> bool:
    """Whether two rows did the same work on the same machine, whatever the engine."""
    return workload_of(row) == workload_of(other)


def dense_references(rows: Iterable[Row], field: str) -> list[Row]:
    """The dense rows that speed-ups were taken over, by `field`: in every round exactly as fast as themselves."""
    found = []
    for row in rows:
        spread = row.spread_of(field)
        if row.is_dense and spread is not None and spread.low == spread.high == 1:
            found.append(row)
    return found


def by_workload(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """All rows, each workload's together under what tells it from the others; one workload alone has no name."""
    groups: dict[Workload, list[Row]] = {}
    for row in rows:
        groups.setdefault(workload_of(row), []).append(row)
    ordered = sorted(groups)
    names = _differing([workload.words() for workload in ordered])
    return {name: groups[workload] for name, workload in zip(names, ordered, strict=True)}


def by_series(rows: Iterable[Row]) -> list[Series]:
    """All rows, by engine and then by sparsity."""
    groups: dict[_Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return [
        Series(_name(key, groups), tuple(sorted(groups[key], key=lambda row: (row.sparsity, row.bundle))))
        for key in sorted(groups)
    ]


def _key(row: Row) -> _Key:
    return _Key(row.engine, row.flavor, row.weights, workload_of(row))


def _name(key: _Key, keys: Iterable[_Key]) -> str:
    """The engine with what tells its series apart, and no more: `onnxruntime (genai, threads 4)`."""
    peers = [peer for peer in keys if peer.engine == key.engine]
    details = _telling([peer.words() for peer in peers])[peers.index(key)]
    return f"{key.engine} ({details})" if details else key.engine


def _differing(names: Sequence[tuple[str, ...]]) -> list[str]:
    """Of names in parts, the parts that are not the same in all."""
    differs = [len(set(parts)) > 1 for parts in zip(*names, strict=True)]
    return [", ".join(compress(parts, differs)) for parts in names]


def _telling(names: Sequence[tuple[str, ...]]) -> list[str]:
    """Of names in parts, the first parts that suffice to tell them apart."""
    kept = [True] * len(names[0])
    for index in reversed(range(len(kept))):
        kept[index] = False
        if len({tuple(compress(parts, kept)) for parts in names}) < len(names):
            kept[index] = True
    return [", ".join(compress(parts, kept)) for parts in names]
