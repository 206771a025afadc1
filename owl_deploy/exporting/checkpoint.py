"""The checkpoint that is exported, open in torch, with all that its flavors are made from and compared on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from owl_deploy.engines.protocol import TokenIds
from owl_deploy.errors import UserError
from owl_deploy.files import read_json
from owl_deploy.models.load import context_of, load_config, load_model, load_tokenizer
from owl_deploy.models.shards import as_bytes
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import find_blocks, share_of_zeros
from owl_deploy.pruning.run import Calibration
from owl_deploy.text.windows import TokenWindows, calibration_windows, check_windows

PARITY_TOKENS = 64
_PARITY_SEED = 0
_LARGE_BYTES = 1 << 30  # of weights as stored; a second Python takes a third of that
_SAMPLES, _SEQLEN = 32, 512
_OF_THE_FILE = {"_name_or_path", "transformers_version"}  # what a config says of where it came from


@dataclass(frozen=True)
class OpenCheckpoint:
    """What is exported.

    Attributes:
        directory: its files, with a config that every exporter reads right.
        calibration: the text of `windows`.
    """

    source: ModelSource
    directory: Path
    tokenizer: PreTrainedTokenizerBase | None
    calibration: Calibration = Calibration()

    @cached_property
    def model(self) -> PreTrainedModel:
        """In fp32. A large one is loaded when it is first needed, after the flavors that are written without it."""
        return load_model(self.source, torch.float32)

    @cached_property
    def config(self) -> PretrainedConfig:
        return load_config(self.source.path)

    @cached_property
    def is_large(self) -> bool:
        """Whether its memory counts: a small one may lie beside what other libraries make of it, and leave behind."""
        return sum(file.stat().st_size for file in self.source.path.glob("*.safetensors")) > _LARGE_BYTES

    @cached_property
    def ids(self) -> TokenIds:
        """The sequence that logits are compared on."""
        return _parity_ids(self.tokenizer, self.config.vocab_size, context_of(self.config))

    @cached_property
    def windows(self) -> TokenWindows:
        """What exports are calibrated on: less text than pruning takes, unless it was asked for.

        Raises:
            UserError: the text cannot be used with this model, or is a single window.
        """
        spec, is_ids = self.calibration.spec, self.calibration.spec.endswith(".npy")
        windows = calibration_windows(
            spec,
            self.tokenizer,
            samples=self.calibration.samples or (None if is_ids else _SAMPLES),
            seqlen=self.calibration.seqlen or (None if is_ids else _SEQLEN),
            seed=self.calibration.seed,
        )
        check_windows(windows, vocabulary=self.config.vocab_size, context=context_of(self.config))
        if len(windows.ids) < 2:
            raise UserError(f"{spec}: one window is too few to calibrate on; give two at least")
        return windows

    @property
    def sparsity(self) -> float:
        """Zeros among the weights of its blocks' linears."""
        return share_of_zeros(find_blocks(self.model))

    @cached_property
    def frame_sha256(self) -> str:
        """See `BundleManifest`."""
        weights = {f"{block.full_name(name)}.weight" for block in find_blocks(self.model) for name in block.linears}
        digest = hashlib.sha256()
        for config in (self.model.config, self.model.generation_config):
            told = config.to_dict() if config is not None else {}
            known = {name: told[name] for name in sorted(told.keys() - _OF_THE_FILE)}
            digest.update(json.dumps(known, default=str).encode())
        for name, tensor in self.model.state_dict().items():
            if name not in weights:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(as_bytes(tensor))
        return digest.hexdigest()


@contextlib.contextmanager
def open_checkpoint(source: ModelSource, calibration: Calibration) -> Iterator[OpenCheckpoint]:
    """Load a checkpoint for export.

    Raises:
        UserError: it cannot be read.
    """
    with _readable_by_exporters(source.path) as directory:
        checkpoint = OpenCheckpoint(source, directory, load_tokenizer(source), calibration)
        if not checkpoint.is_large:
            _ = checkpoint.model  # what is wrong with it is told before the work
        yield checkpoint


def _parity_ids(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, context: int | None) -> TokenIds:
    """The first tokens of the packaged passage; random ones for a model without a tokenizer."""
    count = min(PARITY_TOKENS, context or PARITY_TOKENS)
    if tokenizer is None:
        return np.random.default_rng(_PARITY_SEED).integers(0, vocabulary, count, dtype=np.int64)
    passage = (resources.files("owl_deploy") / "text" / "passage.txt").read_text(encoding="utf-8")
    return np.asarray(tokenizer(passage)["input_ids"][:count], dtype=np.int64)


@contextlib.contextmanager
def _readable_by_exporters(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint, with a config that transformers 4.57 reads right (see `load_config`)."""
    config = read_json(checkpoint / "config.json")
    if "rope_parameters" not in config or "rope_theta" in config:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="owl-deploy-") as temporary:
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != "config.json":
                (Path(temporary) / file.name).symlink_to(file.resolve())
        load_config(checkpoint).save_pretrained(temporary)
        yield Path(temporary)
