"""The `gguf-original` flavor: the GGUF file that a dense checkpoint was made from, as it came."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from owl_deploy.bundle.names import model_file
from owl_deploy.errors import UnsupportedFamily, UserError
from owl_deploy.exporting.peers.gguf_quantised import types_in
from owl_deploy.files import sha256
from owl_deploy.models.source import ModelSource, resolve_model
from owl_deploy.pruning.manifest import PruningManifest, read_manifest


def write_gguf_original(checkpoint: Path, out: Path, _has_tokenizer: bool) -> tuple[str, str]:
    """See `flavors.Write`: the file itself, as a link where it is on the same disk.

    Raises:
        UnsupportedFamily: the checkpoint is not what a GGUF file holds, or that file is not where it was.
    """
    pruned = read_manifest(checkpoint)
    if pruned is None or pruned.sparsity_asked > 0 or pruned.plan.get("weights") is not None:
        raise UnsupportedFamily(f"{checkpoint}: is not a GGUF file as it came; prune one with: --sparsity 0")
    source = _find(checkpoint, pruned)
    target = out / model_file("gguf-original")
    try:
        os.link(source.path.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copy(source.path, target)
    return f"{source.path.name}, as it came", types_in(target)


def _find(checkpoint: Path, pruned: PruningManifest) -> ModelSource:
    """The file under the name it had when the checkpoint was made; the demo model where its package has it now."""
    named = [pruned.model] if pruned.model.endswith(".gguf") else []
    for name in (*named, "demo"):
        try:
            source = resolve_model(name)
        except UserError:
            continue
        if source.is_gguf and sha256(source.path) == pruned.model_sha256:
            return source
    raise UnsupportedFamily(
        f"{checkpoint}: no GGUF file {pruned.model} that it was made from; run this where that file is"
    )
