"""Recipes: a pruning plan as the YAML that SparseML 1.8 and llm-compressor 0.14 parse.

Both tools pass over much of what they do not understand, and leave a model dense that was meant to be sparse.
`read_recipe` refuses all of that, with the line it stands on.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from owl_deploy.errors import UserError
from owl_deploy.files import write_text
from owl_deploy.pruning.plan import (
    NM,
    Ablation,
    Allocation,
    BlockShare,
    Granularity,
    Method,
    MixedNM,
    PruningPlan,
    Statistics,
    Target,
    parse_pattern,
)

RECIPE = "recipe.yaml"
EXPLICIT_RECIPE = "recipe.explicit.yaml"

_CLASS_OF: dict[Method, str] = {
    "magnitude": "MagnitudePruningModifier",
    "wanda": "WandaPruningModifier",
    "sparsegpt": "SparseGPTModifier",
}
_OWN_CLASS = "OwlDeployPruningModifier"
_UNSTRUCTURED = "0:0"


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


# -------------------- writing


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
    if found.method not in _CLASS_OF:
        return f"as neither SparseML nor llm-compressor knows {found.method}"
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
    fields |= {"mask_structure": str(plan.pattern or _UNSTRUCTURED), "targets": list(targets)}
    return {"pruning_modifiers": {_OWN_CLASS: fields}}


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
    fields |= {"mask_structure": str(plan.pattern or _UNSTRUCTURED), "targets": list(targets)}
    return {_CLASS_OF[plan.method]: fields}


def _document(plan: PruningPlan, groups: Mapping[str, object], file_name: str, note: str) -> str:
    lines = [f"# Written by owl-deploy: {note}.", f"# Apply it: owl-deploy prune MODEL --recipe {file_name}"]
    if plan.method == "magnitude":
        lines.append("# SparseML and llm-compressor parse it, but refuse to prune by magnitude in one shot.")
    recipe = {"pruning_stage": {"run_type": "oneshot", **groups}}
    body = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100)
    return "\n".join([*lines, str(body)])


# -------------------- the fields


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a truth value is not a number")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _number_or_list(value: object) -> str:
    return "list" if isinstance(value, list) else "number"


_Real = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
_Integer = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)]
_Fraction = Annotated[_Real, Field(ge=0, lt=1)]
_FractionOrList = Annotated[
    Annotated[_Fraction, Tag("number")] | Annotated[tuple[_Fraction, ...], Field(min_length=1), Tag("list")],
    Discriminator(_number_or_list),
]
_NM_PATTERN = r"[0-9]+:[0-9]+"


class _Modifier(BaseModel):
    """Fields that every modifier has. A description says, in messages, what the field must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: tuple[str, ...] = Field(
        min_length=1,
        description="a list: of the class of the model's blocks, such as [LlamaDecoderLayer], or of all its "
        "blocks. A bare name means nothing to llm-compressor, and no targets mean all linears to it",
    )
    mask_structure: str = Field(
        default=_UNSTRUCTURED,
        pattern=f"^{_NM_PATTERN}$",
        description='"N:M" in quotes (N of every M weights are pruned), or "0:0" for unstructured',
    )


class _Wanda(_Modifier):
    sparsity: _FractionOrList = Field(
        description="a fraction from 0 up to, not including, 1, or a list of these, one for each block"
    )
    sparsity_profile: Annotated[Literal["owl"] | None, BeforeValidator(_lower)] = Field(
        default=None, description="owl, or left out; SparseML ignores any other"
    )
    owl_m: _Integer | None = Field(default=None, description="an integer of at least 1")
    owl_lmbda: _Fraction | None = Field(default=None, description="a number from 0 up to, not including, 1")
    sequential_update: Literal[True] = Field(
        default=True, description="true: each block is calibrated on what the pruned blocks before it put out"
    )
    ignore: tuple[Literal["lm_head", "re:.*lm_head"], ...] = Field(
        default=(), description="[lm_head], which stays dense anyway; every linear of a block is pruned"
    )
    requires_calibration_data: Literal[True] = Field(default=True, description="true, or left out")


class _SparseGPT(_Wanda):
    block_size: _Integer = Field(default=128, description="an integer of at least 1")
    dampening_frac: Annotated[_Real, Field(gt=0)] = Field(default=0.01, description="a number above 0")
    preserve_sparsity_mask: Literal[False] = Field(default=False, description="false: owl-deploy chooses the mask anew")
    offload_hessians: bool = Field(default=False, description="true or false")


class _Magnitude(_Modifier):
    init_sparsity: _Fraction = Field(description="a fraction from 0 up to, not including, 1")
    final_sparsity: _Fraction = Field(description="a fraction from 0 up to, not including, 1")
    mask_structure: str = Field(
        default="unstructured",
        pattern=f"^({_NM_PATTERN}|unstructured)$",
        description='"N:M" in quotes (N of every M weights are pruned), or unstructured',
    )
    leave_enabled: bool = Field(default=True, description="true or false")
    apply_globally: Literal[False] = Field(default=False, description="false: each linear has its own threshold")


class _Own(_Modifier):
    """A plan of ours, field by field; `PruningPlan` checks what goes together."""

    sparsity: _Fraction = Field(description="a fraction from 0 up to, not including, 1")
    method: Method = Field(description="one of owl-deploy's methods")
    allocation: Allocation = Field(description="one of owl-deploy's allocations")
    owl_m: _Real = Field(default=5.0, description="a number above 0")
    half_range: _Real | None = Field(default=None, description="a number from 0")
    block_sparsities: tuple[_Fraction, ...] | None = Field(
        default=None, description="a list of fractions, one for each block"
    )
    linear_sparsities: dict[str, _Fraction] | None = Field(
        default=None, description="a fraction for each linear, by its full name"
    )
    granularity: Granularity | None = Field(default=None, description="row, layer or global")
    statistics: Statistics | None = Field(default=None, description="dense, block or linear")
    target: Target | None = Field(default=None, description="layer or dense")
    ablation: Ablation | None = Field(default=None, description="seq or iter")
    block_size: _Integer = Field(default=128, description="an integer of at least 1")
    dampening: _Real | None = Field(default=None, description="a number above 0")
    admm_steps: _Integer = Field(default=20, description="an integer of at least 1")
    mask_structure: str = Field(
        default=_UNSTRUCTURED,
        pattern=f"^(mixed-)?{_NM_PATTERN}$",
        description='"N:M" or "mixed-N:M" in quotes, or "0:0" for unstructured',
    )


_MODELS: dict[str, type[_Modifier]] = {
    _CLASS_OF["magnitude"]: _Magnitude,
    _CLASS_OF["wanda"]: _Wanda,
    _CLASS_OF["sparsegpt"]: _SparseGPT,
    _OWN_CLASS: _Own,
}
_TRAINING_FIELDS = ("start", "end", "update", "update_scheduler", "scheduler_args")

# -------------------- reading


@dataclass(frozen=True)
class _Entry:
    """One `key: value` of a mapping."""

    name: str
    key: yaml.Node
    value: yaml.Node


@dataclass(frozen=True)
class _Parsed:
    """A modifier whose fields are right one by one, and the file they came from."""

    model: _Modifier
    file: _File
    entry: _Entry
    fields: Mapping[str, _Entry]

    def refuse(self, field: str, message: str) -> UserError:
        """The error for one field; where the field was left out, it points to the modifier."""
        entry = self.fields.get(field)
        return self.file.refuse(self.entry.key if entry is None else entry.key, message)


@dataclass(frozen=True)
class _File:
    """A recipe file being read: YAML nodes, which know their lines, in place of plain values."""

    path: Path

    def where(self, node: yaml.Node) -> str:
        return f"{self.path}:{node.start_mark.line + 1}"

    def refuse(self, node: yaml.Node, message: str) -> UserError:
        return UserError(f"{self.where(node)}: {message}")

    def root(self) -> yaml.Node:
        """Parse the file.

        Raises:
            UserError: it cannot be read, is not YAML, or is empty.
        """
        try:
            node = yaml.compose(self.path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not a text file ({error})") from error
        except yaml.YAMLError as error:
            raise self._yaml_error(error) from error
        if node is None:
            raise UserError(f"{self.path}:1: the recipe is empty")
        return node

    def value(self, node: yaml.Node) -> Any:
        """The plain value of a node, as both tools see it."""
        try:
            return yaml.constructor.SafeConstructor().construct_document(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.refuse(node, f"cannot be read as a value ({_first_line(error)})") from error

    def entries(self, node: yaml.Node, what: str) -> Iterator[_Entry]:
        """The entries of a mapping.

        Raises:
            UserError: it is not a mapping, or a key stands in it twice or is not a name.
        """
        if not isinstance(node, yaml.MappingNode):
            raise self.refuse(node, f"{what} must be a mapping (`name: value` lines)")
        first: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.refuse(key, f"{what} has a key that is not a name")
            if key.value in first:
                line = first[key.value].start_mark.line + 1
                raise self.refuse(key, f"{key.value} is already given on line {line}; one of them would be lost")
            first[key.value] = key
            yield _Entry(key.value, key, value)

    def _yaml_error(self, error: yaml.YAMLError) -> UserError:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = 1 if mark is None else mark.line + 1
        problem = getattr(error, "problem", None) or _first_line(error)
        return UserError(f"{self.path}:{line}: not valid YAML ({problem})")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe written by owl-deploy, or for SparseML or llm-compressor.

    The `sparsity` of the plan is, for a list, its mean, and for an N:M pattern, its ratio.

    Raises:
        UserError: naming file and line, for everything that either tool ignores in silence (modifiers outside
            a stage or a `..._modifiers` group, unknown fields, OWL settings without `sparsity_profile: owl`,
            duplicate keys), and for everything that owl-deploy cannot apply (other modifiers, more than one,
            training, targets that leave linears out, values out of range).
    """
    file = _File(path)
    modifiers = [_parse_modifier(file, entry) for entry in _modifier_entries(file)]
    if len(modifiers) > 1:
        return _per_block_magnitude(modifiers)
    (only,) = modifiers
    targets = _check_targets(only)
    plan = _plan(only)
    return Recipe(plan, targets, file.where(only.fields["targets"].key))


def _modifier_entries(file: _File) -> list[_Entry]:
    """The modifiers of the recipe's one stage; anything beside them is refused."""
    root = file.root()
    modifiers: list[_Entry] = []
    for group in _stage_entries(file, root):
        if group.name == "run_type":
            if file.value(group.value) != "oneshot":
                raise file.refuse(group.key, "run_type must be oneshot; owl-deploy prunes without training")
        elif group.name == "modifiers":
            raise file.refuse(group.key, "llm-compressor drops a group called modifiers; call it pruning_modifiers")
        elif not group.name.endswith("_modifiers"):
            raise file.refuse(
                group.key,
                f"the tools drop {group.name} in silence{_did_you_mean(group.name, ['run_type'])}; "
                "the name of a group of modifiers must end in _modifiers",
            )
        else:
            modifiers += file.entries(group.value, group.name)
    if not modifiers:
        raise file.refuse(root, f"the recipe has no modifier; give one of {', '.join(_MODELS)}")
    return modifiers


def _stage_entries(file: _File, root: yaml.Node) -> list[_Entry]:
    stages = list(file.entries(root, "a recipe"))
    for stage in stages:
        if not stage.name.endswith("_stage"):
            raise file.refuse(
                stage.key,
                f"llm-compressor drops {stage.name}, as no stage holds it; put it below `pruning_stage:`",
            )
    for extra in stages[1:]:
        raise file.refuse(extra.key, f"{extra.name} is a second stage; owl-deploy applies one only")
    return [entry for stage in stages for entry in file.entries(stage.value, stage.name)]


def _parse_modifier(file: _File, entry: _Entry) -> _Parsed:
    """Check a modifier's class, then each of its fields on its own."""
    if entry.name == "ConstantPruningModifier":
        raise file.refuse(entry.key, f"{entry.name} makes no zeros, it keeps them while training")
    if entry.name not in _MODELS:
        raise file.refuse(
            entry.key,
            f"modifier {entry.name} cannot be applied{_did_you_mean(entry.name, _MODELS)}; "
            f"owl-deploy knows {', '.join(_MODELS)}",
        )
    fields = {field.name: field for field in file.entries(entry.value, entry.name)}
    values = {name: file.value(field.value) for name, field in fields.items()}
    model = _MODELS[entry.name]
    try:
        return _Parsed(model.model_validate(values), file, entry, fields)
    except ValidationError as error:
        raise _field_error(file, entry, fields, model, error) from None


def _field_error(
    file: _File, entry: _Entry, fields: Mapping[str, _Entry], model: type[_Modifier], error: ValidationError
) -> UserError:
    """The first error of pydantic's, at the line of its field, or of its list item."""
    details = error.errors()[0]
    name, *inside = details["loc"]
    name = str(name)
    if details["type"] == "missing":
        return file.refuse(entry.key, f"{entry.name} lacks {name}: {model.model_fields[name].description}")
    if details["type"] == "extra_forbidden" and name in _TRAINING_FIELDS:
        return file.refuse(fields[name].key, f"{name} is for pruning while training, which owl-deploy does not do")
    if details["type"] == "extra_forbidden":
        near = _did_you_mean(name, model.model_fields)
        return file.refuse(fields[name].key, f"{entry.name} has no {name}; SparseML would ignore it{near}")
    node = fields[name].value
    index = next((part for part in inside if isinstance(part, int)), None)
    if index is not None and isinstance(node, yaml.SequenceNode):
        node = node.value[index]
    must_be = model.model_fields[name].description
    return file.refuse(node, f"{name} is {file.value(node)!r}; it must be {must_be}")


def _plan(modifier: _Parsed) -> PruningPlan:
    if isinstance(modifier.model, _Magnitude):
        return _magnitude_plan(modifier, modifier.model)
    if isinstance(modifier.model, _Own):
        return _own_plan(modifier, modifier.model)
    assert isinstance(modifier.model, _Wanda)
    return _calibrated_plan(modifier, modifier.model)


def _own_plan(modifier: _Parsed, model: _Own) -> PruningPlan:
    fields = {name: getattr(model, name) for name in _Own.model_fields if name not in ("targets", "mask_structure")}
    text = model.mask_structure
    try:
        return PruningPlan(pattern=None if text == _UNSTRUCTURED else parse_pattern(text), **fields)
    except UserError as error:
        raise modifier.file.refuse(modifier.entry.key, str(error)) from error


def _calibrated_plan(modifier: _Parsed, model: _Wanda) -> PruningPlan:
    """The plan of a Wanda or SparseGPT modifier."""
    settings: dict[str, Any] = {"method": "wanda", "allocation": "uniform", "sparsity": model.sparsity}
    if isinstance(model, _SparseGPT):
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


def _check_owl(modifier: _Parsed, model: _Wanda) -> None:
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
    if model.mask_structure != _UNSTRUCTURED:
        raise modifier.refuse(
            "mask_structure",
            f"with {model.mask_structure} the tools ignore the owl profile",
        )


def _magnitude_plan(modifier: _Parsed, model: _Magnitude) -> PruningPlan:
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


def _per_block_magnitude(modifiers: Sequence[_Parsed]) -> Recipe:
    """The explicit list by magnitude, for which the recipe format needs a modifier for each block."""
    targets: list[str] = []
    sparsities: list[float] = []
    for modifier in modifiers:
        if not isinstance(modifier.model, _Magnitude):
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


def _check_targets(modifier: _Parsed) -> tuple[str, ...]:
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


def _pattern(modifier: _Parsed) -> NM | None:
    text = modifier.model.mask_structure
    if text in (_UNSTRUCTURED, "unstructured"):
        return None
    prune, of = map(int, text.split(":"))
    try:
        return NM(prune, of)
    except UserError as error:
        raise modifier.refuse("mask_structure", str(error)) from error


def _check_ratio(modifier: _Parsed, field: str, sparsity: float | tuple[float, ...], pattern: NM) -> None:
    if isinstance(sparsity, tuple) or not math.isclose(sparsity, pattern.ratio):
        raise modifier.refuse(
            field, f"with mask_structure {pattern} the tools ignore {field}; set it to {pattern.ratio:g}"
        )


# -------------------- small things


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ... {names[-1]}"


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
