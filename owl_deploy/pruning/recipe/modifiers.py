"""From a recipe's YAML to modifiers whose class and fields are right one by one.

SparseML and llm-compressor pass over much of what they do not understand, and leave a model dense that was meant to be
sparse. All of that is refused here, with the line it stands on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import yaml
from pydantic import ValidationError

from owl_deploy.errors import UserError
from owl_deploy.pruning.recipe.document import Entry, RecipeFile
from owl_deploy.pruning.recipe.schema import MODELS, TRAINING_FIELDS, Modifier


@dataclass(frozen=True)
class ParsedModifier:
    """A modifier whose fields are right one by one, and the file they came from."""

    model: Modifier
    file: RecipeFile
    entry: Entry
    fields: Mapping[str, Entry]

    def refuse(self, field: str, message: str) -> UserError:
        """The error for one field; where the field was left out, it points to the modifier."""
        entry = self.fields.get(field)
        return self.file.refuse(self.entry.key if entry is None else entry.key, message)


def read_modifiers(file: RecipeFile) -> list[ParsedModifier]:
    """The modifiers of the recipe's one stage, at least one.

    Raises:
        UserError: something beside them, or a field that is wrong.
    """
    return [_parse_modifier(file, entry) for entry in _modifier_entries(file)]


def _modifier_entries(file: RecipeFile) -> list[Entry]:
    """The modifiers of the recipe's one stage; anything beside them is refused."""
    root = file.root()
    modifiers: list[Entry] = []
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
        raise file.refuse(root, f"the recipe has no modifier; give one of {', '.join(MODELS)}")
    return modifiers


def _stage_entries(file: RecipeFile, root: yaml.Node) -> list[Entry]:
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


def _parse_modifier(file: RecipeFile, entry: Entry) -> ParsedModifier:
    """Check a modifier's class, then each of its fields on its own."""
    if entry.name == "ConstantPruningModifier":
        raise file.refuse(entry.key, f"{entry.name} makes no zeros, it keeps them while training")
    if entry.name not in MODELS:
        raise file.refuse(
            entry.key,
            f"modifier {entry.name} cannot be applied{_did_you_mean(entry.name, MODELS)}; "
            f"owl-deploy knows {', '.join(MODELS)}",
        )
    fields = {field.name: field for field in file.entries(entry.value, entry.name)}
    values = {name: file.value(field.value) for name, field in fields.items()}
    model = MODELS[entry.name]
    try:
        return ParsedModifier(model.model_validate(values), file, entry, fields)
    except ValidationError as error:
        raise _field_error(file, entry, fields, model, error) from None


def _field_error(
    file: RecipeFile, entry: Entry, fields: Mapping[str, Entry], model: type[Modifier], error: ValidationError
) -> UserError:
    """The first error of pydantic's, at the line of its field, or of its list item."""
    details = error.errors()[0]
    name, *inside = details["loc"]
    name = str(name)
    if details["type"] == "missing":
        return file.refuse(entry.key, f"{entry.name} lacks {name}: {model.model_fields[name].description}")
    if details["type"] == "extra_forbidden" and name in TRAINING_FIELDS:
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


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
