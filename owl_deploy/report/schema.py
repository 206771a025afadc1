"""The JSON schema of a line of `results.jsonl`, for those who read it with something else."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from owl_deploy.benchmarking.rows import SCHEMA_VERSION, Row


class _Schema(GenerateJsonSchema):
    """Numbers as these files hold them: infinities are strings."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["Infinity", "-Infinity", "NaN"]}]}


def row_schema() -> dict[str, Any]:
    """The schema of one line, each field described by the text under it in its record."""
    schema = Row.model_json_schema(mode="serialization", schema_generator=_Schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["$comment"] = f"Version {SCHEMA_VERSION}, as in schema_version. A new version may add fields."
    return schema
