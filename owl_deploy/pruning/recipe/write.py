"""Writing recipes: a pruning plan as the YAML that SparseML 1.8 and llm-compressor 0.14 parse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from owl_deploy.files import write_text
from owl_deploy.pruning.plan import BlockShare, MixedNM, PruningPlan
from owl_deploy.pruning.recipe.schema import CLASS_OF, OWN_CLASS, UNSTRUCTURED

RECIPE = "recipe.yaml"
EXPLICIT_RECIPE = "recipe.explicit.yaml"


def write_recipes(
    directory: Path,
    plan: PruningPlan,
    block_class: str,
    shares: Sequence[BlockShare],
    layer_names: Sequence[str],
) -> None:
    """Write `recipe.yaml`, what was asked, and `recipe.explicit.yaml`, the sparsities that were found.

    Where the format cannot say what was asked (OWL by magnitude, a fractional `owl_m`, another allocation),
    `recipe.yaml` also lists the sparsities found, and its header says why: applying it gives the same weights. What
    neither tool can do at all (its method, or sparsities that differ within a block) is written as a modifier of our
    own, which both refuse by its name.

    By magnitude the recipe holds a `MagnitudePruningModifier`, for an explicit list one for each block. Both
    tools parse it, but know magnitude pruning only as a part of training; its `mask_structure` is one that
    both refuse when they come to apply it, so that neither leaves the model dense in silence.

    Args:
        block_class: class name of the blocks, such as `LlamaDecoderLayer`.
        shares: what each block gave up, first to last.
        layer_names: module names of the blocks, first to last.

    Raises:
        UserError: the files cannot be written.
        ValueError: the two lists differ in length.
    """
    if len(shares) != len(layer_names):
        raise ValueError(f"{len(shares)} shares of {len(layer_names)} blocks")
    found = _found(plan, shares, layer_names)
    if (unknown := _unknown_to_the_tools(found)) is not None:
        asked_note, found_note = f"what was asked, {unknown}", f"the sparsities found, {unknown}"
        write_text(directory / RECIPE, _document(plan, _own(plan, [block_class]), RECIPE, asked_note))
        write_text(directory / EXPLICIT_RECIPE, _document(plan, _own(found, layer_names), EXPLICIT_RECIPE, found_note))
        return
    listed = _whole(plan, layer_names) if plan.pattern else _listed(plan, found.block_sparsities or (), layer_names)
    unsayable = _why_unsayable(plan)
    if unsayable is not None:
        asked = listed
    elif plan.block_sparsities is not None:
        asked = _listed(plan, plan.block_sparsities, layer_names)
    else:
        asked = _whole(plan, [block_class])
    note = "what was asked" if unsayable is None else f"the sparsities found: {unsayable}"
    write_text(directory / RECIPE, _document(plan, asked, RECIPE, note))
    write_text(directory / EXPLICIT_RECIPE, _document(plan, listed, EXPLICIT_RECIPE, "the sparsities found"))


def _found(plan: PruningPlan, shares: Sequence[BlockShare], layer_names: Sequence[str]) -> PruningPlan:
    """The plan with the sparsities that were found in place of how to find them."""
    if plan.pattern is not None:
        return plan  # mixed N:M is found anew by OWL
    of_blocks = [share.uniform for share in shares]
    changed: dict[str, Any] = {
        "allocation": "explicit",
        "half_range": None,
        "generations": None,
        "bits": None,
        "granularity": "layer" if plan.allocation == "global" else plan.granularity,
    }
    if plan.allocation == "global" and plan.method not in ("magnitude", "wanda", "ria", "admm"):
        changed["granularity"] = None
    if None not in of_blocks:
        changed["block_sparsities"] = tuple(of_blocks)
    else:
        changed["linear_sparsities"] = {
            f"{block}.{name}": value
            for block, share in zip(layer_names, shares, strict=True)
            for name, value in share.sparsities.items()
        }
    return replace(plan, **changed)


def _unknown_to_the_tools(found: PruningPlan) -> str | None:
    """Why SparseML and llm-compressor cannot apply a plan, whatever the words for it, if they cannot."""
    if found.method not in CLASS_OF:
        return f"as neither SparseML nor llm-compressor knows {found.method}"
    if found.is_rounded:
        return "as both tools round to other grids"
    if found.linear_sparsities is not None:
        return "as both tools prune the linears of a block alike"
    if isinstance(found.pattern, MixedNM):
        return "as both tools prune all blocks by one N:M"
    usual = replace(found, granularity=None, statistics=None)
    if (found.granularity, found.statistics) != (usual.granularity, usual.statistics):
        return "as both tools choose and calibrate in one way only"
    return None


def _why_unsayable(plan: PruningPlan) -> str | None:
    """Why the profiles of both tools cannot state the plan's allocation, if they cannot."""
    if plan.allocation in ("uniform", "explicit"):
        return None
    if plan.allocation != "owl":
        return f"the {plan.allocation} allocation was asked, which recipes do not have"
    asked = f"OWL with M {plan.owl_m} and lambda {plan.half_range}"
    if plan.method == "magnitude":
        return f"{asked} was asked, and magnitude recipes have no OWL"
    if plan.owl_m % 1:
        return f"{asked} was asked, and owl_m is an integer"
    return None


def _own(plan: PruningPlan, targets: Sequence[str]) -> dict[str, object]:
    """The modifier group of our own, which says all of a plan."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(plan).items()
        if value is not None and name != "pattern"
    }
    fields |= {"mask_structure": str(plan.pattern or UNSTRUCTURED), "targets": list(targets)}
    return {"pruning_modifiers": {OWN_CLASS: fields}}


def _whole(plan: PruningPlan, targets: Sequence[str]) -> dict[str, object]:
    """The modifier group for one sparsity, or one profile, over all targets."""
    sparsity = float(plan.sparsity) if plan.pattern is None else plan.pattern.ratio
    return {"pruning_modifiers": _modifier(plan, sparsity, targets)}


def _listed(plan: PruningPlan, sparsities: Sequence[float], layer_names: Sequence[str]) -> dict[str, object]:
    """The modifier groups for one sparsity per block."""
    values = [float(value) for value in sparsities]
    if plan.method != "magnitude":
        return {"pruning_modifiers": _modifier(plan, values, layer_names)}
    digits = len(str(len(values) - 1))
    return {
        f"block_{index:0{digits}}_modifiers": _modifier(plan, value, [name])
        for index, (value, name) in enumerate(zip(values, layer_names, strict=True))
    }


def _modifier(plan: PruningPlan, sparsity: float | list[float], targets: Sequence[str]) -> dict[str, object]:
    fields: dict[str, object]
    if plan.method == "magnitude":
        fields = {"init_sparsity": sparsity, "final_sparsity": sparsity}
    else:
        fields = {"sparsity": sparsity}
        if plan.allocation == "owl" and not isinstance(sparsity, list):
            fields |= {"sparsity_profile": "owl", "owl_m": int(plan.owl_m), "owl_lmbda": plan.half_range}
        fields["sequential_update"] = True
    if plan.method == "sparsegpt":
        fields |= {"block_size": plan.block_size, "dampening_frac": plan.dampening}
    fields |= {"mask_structure": str(plan.pattern or UNSTRUCTURED), "targets": list(targets)}
    return {CLASS_OF[plan.method]: fields}


def _document(plan: PruningPlan, groups: Mapping[str, object], file_name: str, note: str) -> str:
    lines = [f"# Written by owl-deploy: {note}.", f"# Apply it: owl-deploy prune MODEL --recipe {file_name}"]
    if plan.method == "magnitude":
        lines.append("# SparseML and llm-compressor parse it, but refuse to prune by magnitude in one shot.")
    recipe = {"pruning_stage": {"run_type": "oneshot", **groups}}
    body = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100)
    return "\n".join([*lines, str(body)])
