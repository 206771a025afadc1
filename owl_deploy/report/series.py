"""Rows that belong on one curve: an engine's figures as sparsity rises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from owl_deploy.benchmarking.rows import Row
from owl_deploy.bundle.lineage import baseline_of
from owl_deploy.formatting import enumeration, percent


class Workload(NamedTuple):
    """What rows have in common whose figures may be compared: the shape of the model, the work, and the machine.

    Attributes:
        shape: the model's architecture; its name, where none of its rows has recorded that.
    """

    shape: str
    cpu: str
    cores: int
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int

    def words(self) -> tuple[str, ...]:
        """Each part but the shape as it appears in a name."""
        counts = {
            "cores": self.cores,
            "threads": self.threads,
            "batch": self.batch,
            "prompt": self.prompt_tokens,
            "new": self.new_tokens,
        }
        return self.cpu, *(f"{name} {count}" for name, count in counts.items())


class _Key(NamedTuple):
    """What the rows of one curve have in common."""

    engine: str
    model: str
    flavor: str
    weights: str
    kv_cache: str
    workload: Workload

    def words(self) -> tuple[str, ...]:
        return (
            self.flavor,
            self.weights,
            f"{self.kv_cache} KV cache",
            self.model,
            *self.workload.words(),
            self.workload.shape,
        )


@dataclass(frozen=True)
class Series:
    """One engine on one model in one graph flavor under one workload, by rising sparsity.

    Attributes:
        name: the engine, and what tells it from the engine's other series, if it has any.
        dense: what its sparse rows are compared with: its own dense row, else that of the engine on the model they were
            made from; None where there is none that ran.
        dense_model: the name of that other model; None where the dense row is its own.
    """

    name: str
    rows: tuple[Row, ...]
    dense: Row | None
    dense_model: str | None = None

    @property
    def sparse(self) -> list[Row]:
        """The sparse rows that ran."""
        return [row for row in self.rows if not row.is_dense and row.status == "ok"]

    def label(self, row: Row) -> str:
        """The row's sparsity; where several have the same, also the bundle, or else the checkpoint."""
        label = sparsity_label(row)
        twins = [other for other in self.rows if sparsity_label(other) == label]
        if len(twins) == 1:
            return label
        if len({other.bundle for other in twins}) == len(twins) or row.checkpoint_sha256 is None:
            return f"{label} {row.bundle}"
        return f"{label} {row.bundle} ({row.checkpoint_sha256[:8]})"


def sparsity_label(row: Row) -> str:
    """The sparsity as asked; as achieved where owl-deploy was not asked."""
    return "dense" if row.is_dense else percent(row.sparsity)


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Of a hub id the part after its owner, of a directory its own name: more of both where that is not enough."""
    parts = {model: Path(model).parts or (model,) for model in models}
    for count in range(1, max(map(len, parts.values()), default=0)):
        names = {model: "/".join(words[-count:]) for model, words in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {model: model for model in parts}


def model_names(rows: Iterable[Row]) -> str:
    """All models of a report, in a title."""
    return enumeration(sorted(short_names(row.model for row in rows).values()))


def dense_references(rows: Iterable[Row], field: str) -> list[Row]:
    """The dense rows that speed-ups were taken over, by `field`: in every round exactly as fast as themselves."""
    found = []
    for row in rows:
        spread = row.spread_of(field)
        if row.is_dense and spread is not None and spread.low == spread.high == 1:
            found.append(row)
    return found


def by_workload(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """All rows, each workload's together under what tells it from the others; one workload alone has no name.

    Models of one architecture are under one: what is pruned or trained further belongs beside what it was made from.
    """
    groups: dict[Workload, list[Row]] = {}
    for row, workload in zip(rows, _workloads(rows), strict=True):
        groups.setdefault(workload, []).append(row)
    models = {
        shape: model_names(row for workload, here in groups.items() if workload.shape == shape for row in here)
        for shape in {workload.shape for workload in groups}
    }
    ordered = sorted(groups, key=lambda workload: (models[workload.shape], workload))
    words = [(models[workload.shape], *workload.words()) for workload in ordered]
    if len(set(words)) < len(words):
        words = [(*parts, workload.shape) for parts, workload in zip(words, ordered, strict=True)]
    return {name: groups[workload] for name, workload in zip(_differing(words), ordered, strict=True)}


def by_series(rows: Sequence[Row]) -> list[Series]:
    """All rows, by engine, model and then sparsity."""
    models = short_names(row.model for row in rows)
    groups: dict[_Key, list[Row]] = {}
    for row, workload in zip(rows, _workloads(rows), strict=True):
        graph = (row.flavor, row.weights, row.kv_cache)
        groups.setdefault(_Key(row.engine, models[row.model], *graph, workload), []).append(row)
    names = _names(list(groups))
    return [
        _series(names[key], key, tuple(sorted(groups[key], key=lambda row: (row.sparsity, row.bundle))), groups)
        for key in sorted(groups)
    ]


def _workloads(rows: Sequence[Row]) -> list[Workload]:
    """Each row's. Older versions recorded no architecture: their rows go with newer ones of the same model."""
    shapes = {row.model: row.architecture for row in rows if row.architecture is not None}
    return [
        Workload(
            *(row.architecture or shapes.get(row.model, Path(row.model).name), row.machine.cpu, row.machine.cores),
            *(row.threads, row.batch, row.prompt_tokens, row.new_tokens),
        )
        for row in rows
    ]


def _series(name: str, key: _Key, rows: tuple[Row, ...], groups: Mapping[_Key, Sequence[Row]]) -> Series:
    own = [row for row in rows if row.is_dense and row.status == "ok"]
    if own:
        return Series(name, rows, own[0])
    dense = {
        id(row): other.model
        for other, there in groups.items()
        if (other.engine, other.workload) == (key.engine, key.workload)
        for row in there
        if row.is_dense and row.status == "ok"
    }
    found = baseline_of(rows[0], [row for there in groups.values() for row in there if id(row) in dense])
    return Series(name, rows, found, dense[id(found)] if found is not None else None)


def _names(keys: Sequence[_Key]) -> dict[_Key, str]:
    """Each curve's engine, of which model where several are in one picture, and what else tells it from its peers.

    As in `sparse-int8 of smol-recovered`, or `onnxruntime (genai, threads 4)`, and no more.
    """
    models: dict[Workload, set[str]] = {}
    for key in keys:
        models.setdefault(key.workload, set()).add(key.model)
    titles = {key: f"{key.engine} of {key.model}" if len(models[key.workload]) > 1 else key.engine for key in keys}
    names = {}
    for key, title in titles.items():
        peers = [peer for peer in keys if titles[peer] == title]
        details = _telling([peer.words() for peer in peers])[peers.index(key)]
        names[key] = f"{title} ({details})" if details else title
    return names


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
