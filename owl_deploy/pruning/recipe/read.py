"""Reading recipes: a pruning plan from the YAML that SparseML 1.8 and llm-compressor 0.14 parse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from owl_deploy.errors import UserError
from owl_deploy.pruning.plan import NM, PruningPlan, parse_pattern
from owl_deploy.pruning.recipe.document import RecipeFile
from owl_deploy.pruning.recipe.modifiers import ParsedModifier, read_modifiers
from owl_deploy.pruning.recipe.schema import UNSTRUCTURED, Magnitude, Own, SparseGPT, Wanda


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for, and of which blocks.

    Attributes:
        targets: one block class, or the module name of every block.
        where: `file:line` of the targets, for messages.
    """

    plan: PruningPlan
    targets: tuple[str, ...]
    where: str

    def check_targets(self, block_class: str, layer_names: Sequence[str]) -> None:
        """Check that the recipe prunes all blocks of a model, in the model's order.

        Args:
            block_class: class name of the model's blocks, such as `LlamaDecoderLayer`.
            layer_names: module names of its blocks, first to last.

        Raises:
            UserError: the targets are not exactly these blocks, or the list of sparsities is not as long.
        """
        if self.targets not in ((block_class,), tuple(layer_names)):
            raise UserError(
                f"{self.where}: targets {_shorten(self.targets)} are not the blocks of this model; give "
                f"{block_class}, or {len(layer_names)} names, {layer_names[0]} to {layer_names[-1]} in order"
            )
        sparsities = self.plan.block_sparsities
        if sparsities is not None and len(sparsities) != len(layer_names):
            raise UserError(
                f"{self.where}: {len(sparsities)} sparsities for a model of {len(layer_names)} blocks; "
                "give one for each block"
            )


def read_recipe(path: Path) -> Recipe:
    """Read a recipe written by owl-deploy, or for SparseML or llm-compressor.

    The `sparsity` of the plan is, for a list, its mean, and for an N:M pattern, its ratio.

    Raises:
        UserError: naming file and line, for everything that either tool ignores in silence (modifiers outside
            a stage or a `..._modifiers` group, unknown fields, OWL settings without `sparsity_profile: owl`,
            duplicate keys), and for everything that owl-deploy cannot apply (other modifiers, more than one,
            training, targets that leave linears out, values out of range).
    """
    file = RecipeFile(path)
    modifiers = read_modifiers(file)
    if len(modifiers) > 1:
        return _per_block_magnitude(modifiers)
    (only,) = modifiers
    targets = _check_targets(only)
    plan = _plan(only)
    return Recipe(plan, targets, file.where(only.fields["targets"].key))


def _plan(modifier: ParsedModifier) -> PruningPlan:
    if isinstance(modifier.model, Magnitude):
        return _magnitude_plan(modifier, modifier.model)
    if isinstance(modifier.model, Own):
        return _own_plan(modifier, modifier.model)
    assert isinstance(modifier.model, Wanda)
    return _calibrated_plan(modifier, modifier.model)


def _own_plan(modifier: ParsedModifier, model: Own) -> PruningPlan:
    fields = {name: getattr(model, name) for name in Own.model_fields if name not in ("targets", "mask_structure")}
    text = model.mask_structure
    try:
        return PruningPlan(pattern=None if text == UNSTRUCTURED else parse_pattern(text), **fields)
    except UserError as error:
        raise modifier.file.refuse(modifier.entry.key, str(error)) from error


def _calibrated_plan(modifier: ParsedModifier, model: Wanda) -> PruningPlan:
    """The plan of a Wanda or SparseGPT modifier."""
    settings: dict[str, Any] = {"method": "wanda", "allocation": "uniform", "sparsity": model.sparsity}
    if isinstance(model, SparseGPT):
        settings |= {"method": "sparsegpt", "block_size": model.block_size, "dampening": model.dampening_frac}
    _check_owl(modifier, model)
    if model.sparsity_profile == "owl":
        settings |= {"allocation": "owl", "owl_m": model.owl_m, "half_range": model.owl_lmbda}
    pattern = _pattern(modifier)
    if pattern is not None:
        _check_ratio(modifier, "sparsity", model.sparsity, pattern)
    if isinstance(model.sparsity, tuple):
        if len(model.targets) not in (1, len(model.sparsity)):
            raise modifier.refuse(
                "sparsity",
                f"{len(model.sparsity)} sparsities for {len(model.targets)} blocks; give one for each",
            )
        settings |= {"allocation": "explicit", "block_sparsities": model.sparsity}
        settings["sparsity"] = fmean(model.sparsity)
    return PruningPlan(pattern=pattern, **settings)


def _check_owl(modifier: ParsedModifier, model: Wanda) -> None:
    """OWL's three settings stand together, with one sparsity, and without N:M, or not at all."""
    settings = {"owl_m": model.owl_m, "owl_lmbda": model.owl_lmbda}
    for name, value in settings.items():
        if model.sparsity_profile is None and value is not None:
            raise modifier.refuse(name, f"SparseML ignores {name} without `sparsity_profile: owl`; add it")
        if model.sparsity_profile is not None and value is None:
            raise modifier.refuse("sparsity_profile", f"the owl profile needs {name} too")
    if model.sparsity_profile is None:
        return
    if isinstance(model.sparsity, tuple):
        raise modifier.refuse("sparsity", "the owl profile takes one sparsity, not a list")
    if model.mask_structure != UNSTRUCTURED:
        raise modifier.refuse(
            "mask_structure",
            f"with {model.mask_structure} the tools ignore the owl profile",
        )


def _magnitude_plan(modifier: ParsedModifier, model: Magnitude) -> PruningPlan:
    """The plan of one magnitude modifier: one sparsity for all its targets."""
    if model.init_sparsity != model.final_sparsity:
        raise modifier.refuse(
            "init_sparsity",
            "init_sparsity must equal final_sparsity; owl-deploy prunes once",
        )
    pattern = _pattern(modifier)
    if pattern is not None:
        _check_ratio(modifier, "final_sparsity", model.final_sparsity, pattern)
    return PruningPlan(model.final_sparsity, method="magnitude", allocation="uniform", pattern=pattern)


def _per_block_magnitude(modifiers: Sequence[ParsedModifier]) -> Recipe:
    """The explicit list by magnitude, for which the recipe format needs a modifier for each block."""
    targets: list[str] = []
    sparsities: list[float] = []
    for modifier in modifiers:
        if not isinstance(modifier.model, Magnitude):
            raise modifier.file.refuse(
                modifiers[1].entry.key,
                f"there are {len(modifiers)} pruning modifiers; keep one",
            )
        plan = _magnitude_plan(modifier, modifier.model)
        names = _check_targets(modifier)
        if len(names) != 1 or "." not in names[0] or names[0] in targets or plan.pattern is not None:
            raise modifier.refuse(
                "targets",
                "several magnitude modifiers must each name one block, and have no N:M",
            )
        targets += names
        sparsities.append(plan.sparsity)
    first = modifiers[0]
    plan = PruningPlan(fmean(sparsities), method="magnitude", allocation="explicit", block_sparsities=tuple(sparsities))
    return Recipe(plan, tuple(targets), first.file.where(first.fields["targets"].key))


def _check_targets(modifier: ParsedModifier) -> tuple[str, ...]:
    """Targets that can be all blocks of a model; `Recipe.check_targets` compares them with the model."""
    targets = modifier.model.targets
    for target in targets:
        if target.startswith(("re:", "__")) or target in ("Linear", "Conv1D", "Conv1d", "Conv2d"):
            raise modifier.refuse(
                "targets",
                f"target {target} may leave linears out, or take lm_head in; give the class of the model's "
                "blocks, such as LlamaDecoderLayer",
            )
    if len(targets) > 1 and not all("." in target for target in targets):
        raise modifier.refuse("targets", "give one block class, or the module names of all blocks, not both")
    if len(set(targets)) < len(targets):
        raise modifier.refuse("targets", "a block is named twice")
    return targets


def _pattern(modifier: ParsedModifier) -> NM | None:
    text = modifier.model.mask_structure
    if text in (UNSTRUCTURED, "unstructured"):
        return None
    prune, of = map(int, text.split(":"))
    try:
        return NM(prune, of)
    except UserError as error:
        raise modifier.refuse("mask_structure", str(error)) from error


def _check_ratio(modifier: ParsedModifier, field: str, sparsity: float | tuple[float, ...], pattern: NM) -> None:
    if isinstance(sparsity, tuple) or not math.isclose(sparsity, pattern.ratio):
        raise modifier.refuse(
            field, f"with mask_structure {pattern} the tools ignore {field}; set it to {pattern.ratio:g}"
        )


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ... {names[-1]}"
