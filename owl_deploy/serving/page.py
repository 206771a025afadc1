"""The pages for people: a chat, and what the API takes. They load nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import jinja2

_FOLDER = Path(__file__).parent
CHAT_PAGE = (_FOLDER / "chat.html").read_text(encoding="utf-8")
_DOCS = (_FOLDER / "docs.html.j2").read_text(encoding="utf-8")


def _hashes(page: str, element: str) -> str:
    """The hashes of a page's inline scripts or styles, by which a browser lets them through, and no others."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; connect-src 'self'; img-src data:; script-src {_hashes(CHAT_PAGE, 'script')}; "
    f"style-src {_hashes(CHAT_PAGE, 'style')} {_hashes(_DOCS, 'style')}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def docs_page(openapi: dict[str, Any]) -> str:
    """Paths, the fields of their bodies and their responses, as a page."""
    schemas = openapi["components"]["schemas"]
    operations = [
        {
            "method": method.upper(),
            "path": path,
            "summary": operation.get("description") or operation.get("summary", ""),
            "body": _body(operation, schemas),
            "responses": {
                status: response["description"] for status, response in sorted(operation["responses"].items())
            },
        }
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(_DOCS).render(title=openapi["info"]["title"], operations=operations, schemas=schemas)


def _body(operation: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, str]]:
    """The fields of a body: name, what it takes, its default."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return []
    schema = schemas[content["schema"]["$ref"].rsplit("/", 1)[1]]
    required = schema.get("required", [])
    return [
        {
            "name": name,
            "takes": _takes(field),
            "default": "required" if name in required else str(field.get("default", "")),
            "description": field.get("description", ""),
        }
        for name, field in schema["properties"].items()
    ]


def _takes(field: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in field:
        return str(field["$ref"].rsplit("/", 1)[1])
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(_takes(one) for one in field[several] if one.get("type") != "null")
    if "enum" in field or "const" in field:
        return " or ".join(f"“{value}”" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_takes(field.get('items', {}))}"
    limits = [
        f"{sign} {field[name]}"
        for name, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if name in field and abs(field[name]) < 2**31
    ]
    return " ".join([str(field.get("type", "anything")), ", ".join(limits)]).strip()
