"""The JSON schema of a line of `results.jsonl`, for those who read it with something else."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from owl_deploy.bench.rows import SCHEMA_VERSION, Continuation, Row, Samples, Spread
from owl_deploy.bundle.records import ParityRecord
from owl_deploy.machine.description import Machine

_RECORDS: tuple[type[BaseModel], ...] = (Row, Machine, Spread, Continuation, Samples, ParityRecord)
_ATTRIBUTE = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<text>.*(?:\n {6,}.*)*)", re.MULTILINE)


class _Schema(GenerateJsonSchema):
    """Numbers as these files hold them: infinities are strings."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["Infinity", "-Infinity", "NaN"]}]}


def row_schema() -> dict[str, Any]:
    """The schema of one line, with what the records' docstrings say of each field as its description."""
    schema = Row.model_json_schema(mode="serialization", schema_generator=_Schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["$comment"] = f"Version {SCHEMA_VERSION}, as in schema_version. A new version may add fields."
    for record in _RECORDS:
        described = schema if record is Row else schema["$defs"][record.__name__]
        described["description"] = (record.__doc__ or "").partition("Attributes:")[0].strip()
        for name, text in attribute_texts(record).items():
            described["properties"][name]["description"] = text
    return schema


def attribute_texts(record: type[BaseModel]) -> dict[str, str]:
    """What the `Attributes:` of a record's docstring say, by field; fields that share a line share its text."""
    # Each line of that section is indented once more than the section's title, its continuations further.
    section = (record.__doc__ or "").partition("Attributes:")[2].replace("\n    ", "\n")
    return {
        name: " ".join(found["text"].split())
        for found in _ATTRIBUTE.finditer(section)
        for name in found["names"].split(", ")
    }
