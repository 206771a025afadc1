"""`bundle.json`: the graphs made from one checkpoint, and what was checked about them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from owl_deploy.bundle.names import Flavor
from owl_deploy.bundle.records import CacheRecord, MatrixRecord, ParityRecord, StoredRecord
from owl_deploy.errors import UserError
from owl_deploy.records import Record, read_record, versions
from owl_deploy.sparse.formats import Head

MANIFEST = "bundle.json"
GRAPH = "model.onnx"
_GRAPHS = (GRAPH, "model.gguf", "openvino_model.", "model.safetensors", "model-")  # how files with weights begin
DENSE_BELOW = 0.01  # of all weights: dequantised checkpoints hold a few exact zeros


class FileRecord(Record):
    """One file of a flavor, by its path in the bundle."""

    path: str
    bytes: int
    sha256: str


class AuditRecord(Record):
    """The sparsity audit: each linear's weight was found unchanged in the graph, at this place."""

    weights: int
    zeros: int
    linears: dict[str, str]


class PackedRecord(Record):
    """How a sparse flavor stores its weights.

    Attributes:
        error: the norm of what storing changed in the packed weights, over their own norm.
        matrices: every product of the graph with constant weights, packed or not.
    """

    head: Head
    error: float
    matrices: list[MatrixRecord]


class FlavorRecord(Record):
    """One graph, or what another engine runs; `source` is the exporter it came from and `note` why that one.

    Attributes:
        parity, audit: of export; null for what other engines run. `bench` compares logits again, of every engine.
        stored: null in a bundle of an older owl-deploy.
        kv_cache: null where the graph keeps keys and values as it computes them.

    A sparse flavor's logits are compared with torch's on the weights as they are stored: the rounding of 16 and 8 bits
    is no error of the graph, and `packed` says what it is.
    """

    source: str
    note: str
    parity: ParityRecord | None
    audit: AuditRecord | None
    files: list[FileRecord]
    packed: PackedRecord | None = None
    kv_cache: CacheRecord | None = None
    stored: StoredRecord | None = None

    @property
    def bytes(self) -> int:
        """Size of the graph and its weights, tokenizer and configs not counted."""
        return sum(file.bytes for file in self.graph_files)

    @property
    def all_bits(self) -> float | None:
        """Bits of its files for each parameter of the model; None where `stored` is."""
        return None if self.stored is None else 8 * self.bytes / self.stored.parameters

    @property
    def graph_files(self) -> list[FileRecord]:
        """The graph and its weights."""
        return [file for file in self.files if Path(file.path).name.startswith(_GRAPHS)]


class BundleManifest(Record):
    """The whole of `bundle.json`.

    Attributes:
        parity_text: what the graphs were compared on: the packaged passage, or random ids without a tokenizer.
        base_sha256: of the model that `prune` made the checkpoint from; null for one that owl-deploy did not prune.
        frame_sha256: of the config and of all weights but those of the blocks' linears: what a model's levels share.
        architecture: class and sizes: equal for models that take the same time when they are equally sparse.
    """

    schema_version: int = 1
    model: str
    checkpoint_sha256: str
    base_sha256: str | None = None
    frame_sha256: str | None = None
    family: str
    architecture: str | None = None
    method: str | None
    allocation: str | None
    sparsity_asked: float | None
    sparsity_achieved: float
    vocabulary: int
    context: int | None
    has_tokenizer: bool
    parity_text: Literal["passage", "random"]
    flavors: dict[Flavor, FlavorRecord]
    unsupported: dict[Flavor, str] = Field(default_factory=dict)
    versions: dict[str, str]

    @property
    def is_dense(self) -> bool:
        """See `is_dense`."""
        return is_dense(self.sparsity_asked, self.sparsity_achieved)

    @property
    def sparsity(self) -> float:
        """See `sparsity_of`."""
        return sparsity_of(self.sparsity_asked, self.sparsity_achieved)


def is_dense(asked: float | None, achieved: float) -> bool:
    """Whether a model was asked to stay dense, rounded or not; of one that owl-deploy did not prune, whether it is."""
    return achieved < DENSE_BELOW if asked is None else asked == 0


def sparsity_of(asked: float | None, achieved: float) -> float:
    """A model's sparsity as asked; as achieved where owl-deploy was not asked."""
    return achieved if asked is None else asked


def flavors_of(bundles: Iterable[Path]) -> set[Flavor]:
    """What these bundles hold, all together.

    Raises:
        UserError: see `read_bundle`.
    """
    return {flavor for bundle in bundles for flavor in read_bundle(bundle).flavors}


def read_bundle(directory: Path) -> BundleManifest:
    """The manifest of a bundle.

    Raises:
        UserError: the directory is not a bundle, or its manifest is corrupted or of another schema.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory}: not an export bundle (no {MANIFEST}); make one with: owl-deploy export")
    return read_record(path, BundleManifest, mend="export the model again")


def exporter_versions() -> dict[str, str]:
    """Versions of what decides the graphs."""
    return versions("onnx", "onnxruntime", "onnxruntime-genai", "optimum-onnx")
