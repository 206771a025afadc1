"""What is written to disk as JSON: one base, one way to read it, and what a record says of how it was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from owl_deploy import __version__
from owl_deploy.errors import UserError
from owl_deploy.files import read_json


class Record(BaseModel):
    """Base of everything written to disk as JSON: unknown fields are errors, and infinities are kept, as strings.

    A string under a field describes it, here and in the record's JSON schema.
    """

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings", use_attribute_docstrings=True
    )


RecordT = TypeVar("RecordT", bound=Record)


class TextRecord(Record):
    """Token windows that were used: where from, and the SHA-256 of their ids as int64."""

    source: str
    windows: int
    seqlen: int
    sha256: str


def read_record(path: Path, kind: type[RecordT], *, mend: str) -> RecordT:
    """Read a JSON file as a record.

    Raises:
        UserError: the file is corrupted, or of another schema: its first field that is wrong, and how to `mend` it.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}; {mend}") from error


def versions(*packages: str) -> dict[str, str]:
    """Versions of what decides a result: owl-deploy, Python, torch, transformers and numpy, and `packages`."""
    names = ("torch", "transformers", "numpy", *packages)
    found = {name: importlib.metadata.version(name) for name in names}
    return {"owl-deploy": __version__, "python": platform.python_version()} | found


def fingerprint(inputs: object) -> str:
    """SHA-256 of a JSON value: equal for equal inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
