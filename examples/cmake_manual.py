"""Write CMake's manual as text of one narrow domain: train.jsonl, and test.jsonl with every tenth page.

Run it: python examples/cmake_manual.py OUT
The pages (BSD licence) come with the `cmake` package. docs/narrow-task.md shows what to do with them.
"""

import json
import sys
from pathlib import Path

import cmake


def write(pages: list[Path], file: Path) -> None:
    """A document a line."""
    lines = [json.dumps({"text": page.read_text(encoding="utf-8")}) for page in pages]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pages = sorted(Path(cmake.__file__).parent.glob("data/share/cmake-*/Help/**/*.rst"))
    write([page for index, page in enumerate(pages) if index % 10], out / "train.jsonl")
    write(pages[::10], out / "test.jsonl")
    print(f"{out}: {len(pages)} pages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
