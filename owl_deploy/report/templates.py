"""The report's templates; what is HTML is escaped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape


def template(name: str, **filters: Callable[..., Any]) -> Template:
    """A template of this package, by its path in it, with filters of its own."""
    environment = Environment(
        loader=PackageLoader("owl_deploy", "report"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.j2"], default=False),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
