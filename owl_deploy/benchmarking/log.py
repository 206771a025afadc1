"""`measurements.jsonl`: every measurement as soon as it is there, so that a killed run loses one round at most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from owl_deploy.files import disk_errors, write_text

MEASUREMENTS = "measurements.jsonl"


class Log:
    """`measurements.jsonl`: appended line by line, read back on the next run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # a kill cut the last line short
                write_text(path, whole)
            self._lines = [json.loads(line) for line in whole.splitlines()]

    def append(self, **entry: Any) -> None:
        self._lines.append(entry)
        with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def of(self, key: str, kind: str) -> list[dict[str, Any]]:
        """All entries of one configuration and kind, oldest first."""
        return [line for line in self._lines if line["key"] == key and line["kind"] == kind]
