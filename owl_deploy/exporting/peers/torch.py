"""The `torch` flavor: the checkpoint itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_torch(checkpoint: Path, out: Path, _has_tokenizer: bool) -> tuple[str, str]:
    """Put the checkpoint's files into `out`: its weights as links to them where both are on one disk."""
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors":
            try:
                os.link(file.resolve(), out / file.name)
            except OSError:  # another disk, or one without links
                shutil.copy(file, out / file.name)
        elif file.suffix == ".json" and file.name != "pruning.json":
            shutil.copy(file, out / file.name)
    return "the checkpoint", "run by transformers"
