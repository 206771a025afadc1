"""Which dense model a model is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from owl_deploy.bundle.lineage import baseline_of


@dataclass(frozen=True)
class Named:
    model: str
    checkpoint_sha256: str | None = None
    base_sha256: str | None = None
    architecture: str | None = "llama"


def test_levels_of_a_sweep_are_compared_with_its_level_0() -> None:
    dense = Named("a", "level 0", base_sha256="source")
    other = Named("b", "other")
    assert baseline_of(Named("x", "level 50", base_sha256="level 0"), [other, dense]) is dense
    assert baseline_of(Named("y", "pruned alone", base_sha256="source"), [other, dense]) is dense


def test_what_another_tool_trained_is_compared_with_a_dense_model_of_its_sizes() -> None:
    dense, small = Named("dense", "d"), Named("small", "s", architecture="llama, smaller")
    recovered = Named("recovered", "r")
    assert baseline_of(recovered, [small, dense]) is dense
    assert baseline_of(recovered, [small]) is None


def test_a_dense_model_is_its_own_baseline() -> None:
    dense = [Named("first", "1"), Named("second", "2")]
    assert [baseline_of(model, dense) for model in dense] == dense


def test_models_that_older_versions_recorded_are_compared_by_name() -> None:
    old = [Named("a", architecture=None), Named("b", architecture=None)]
    assert baseline_of(Named("b", architecture=None), old) is old[1]
    assert baseline_of(Named("b", "new"), old) is old[1]
