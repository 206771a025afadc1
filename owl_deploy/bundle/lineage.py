"""Which dense model a model is compared with: the one it was made from, or else one of the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar


class Model(Protocol):
    """What bundles and rows say of where their model comes from; null where an older version wrote them."""

    @property
    def model(self) -> str: ...
    @property
    def checkpoint_sha256(self) -> str | None: ...
    @property
    def base_sha256(self) -> str | None: ...
    @property
    def architecture(self) -> str | None: ...


ModelT = TypeVar("ModelT", bound=Model)


def baseline_of(model: Model, dense: Iterable[ModelT]) -> ModelT | None:
    """Of several dense models the one that this is compared with, None if it is of another architecture than all.

    That is the first that shares a checkpoint with it: it was pruned from this one, or both from a third. A model that
    another tool trained further has no such record; then the first of its name counts, or else of its architecture.
    """
    candidates = [other for other in dense if _is_of_one_architecture(model, other)]
    relations: tuple[Callable[[Model, Model], bool], ...] = (_share_a_checkpoint, _share_a_name)
    for are_related in relations:
        for other in candidates:
            if are_related(model, other):
                return other
    return candidates[0] if candidates else None


def _is_of_one_architecture(one: Model, other: Model) -> bool:
    """Also where it is not recorded."""
    return one.architecture == other.architecture or None in (one.architecture, other.architecture)


def _share_a_checkpoint(one: Model, other: Model) -> bool:
    """All levels of a sweep are pruned from its level 0, itself written by `prune`: so either hash of either counts."""
    return bool(_hashes(one) & _hashes(other))


def _share_a_name(one: Model, other: Model) -> bool:
    return one.model == other.model


def _hashes(model: Model) -> set[str]:
    return {found for found in (model.checkpoint_sha256, model.base_sha256) if found is not None}
