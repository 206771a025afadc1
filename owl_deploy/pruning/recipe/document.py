"""A recipe as YAML nodes, which know their lines: every message names file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from owl_deploy.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One `key: value` of a mapping."""

    name: str
    key: yaml.Node
    value: yaml.Node


@dataclass(frozen=True)
class RecipeFile:
    """A recipe file being read."""

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

    def entries(self, node: yaml.Node, what: str) -> Iterator[Entry]:
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
            yield Entry(key.value, key, value)

    def _yaml_error(self, error: yaml.YAMLError) -> UserError:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = 1 if mark is None else mark.line + 1
        problem = getattr(error, "problem", None) or _first_line(error)
        return UserError(f"{self.path}:{line}: not valid YAML ({problem})")


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
