"""The export stage: from a checkpoint to a bundle of checked ONNX graphs."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from owl_deploy.bundle.manifest import (
    GRAPH,
    MANIFEST,
    BundleManifest,
    FileRecord,
    FlavorRecord,
    PackedRecord,
    exporter_versions,
    read_bundle,
)
from owl_deploy.bundle.names import PEER_FLAVORS, Flavor, weights_of
from owl_deploy.engines.protocol import TokenIds
from owl_deploy.engines.sparse_engine import SparseEngine
from owl_deploy.errors import UnsupportedFamily, UserError
from owl_deploy.export.graphs.genai import write_genai
from owl_deploy.export.graphs.packed import DenseGraph, audit_of, pack_flavor
from owl_deploy.export.graphs.standard import write_standard
from owl_deploy.export.peers.registry import write_peer
from owl_deploy.export.verify.parity import check_parity
from owl_deploy.files import read_json, sha256, staged_addition, staged_directory, write_text
from owl_deploy.models.load import architecture, context_length, load_config, load_model, load_tokenizer
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import find_blocks
from owl_deploy.pruning.manifest import read_manifest
from owl_deploy.reporting import SILENT, Reporter
from owl_deploy.sparse.formats import Head

PARITY_TOKENS = 64
_PARITY_SEED = 0


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    flavors: Sequence[Flavor],
    *,
    head: Head | None = None,
    name: str | None = None,
    like: Path | None = None,
    reporter: Reporter = SILENT,
) -> BundleManifest:
    """Export `checkpoint` into the directory `out`; what is already there of the same checkpoint is not made again.

    Args:
        head: how sparse flavors store the matrix of the vocabulary; None for what goes with their weights.
        name: what the model is called, if owl-deploy did not prune it; by default its directory.
        like: another level's bundle. Sparse flavors are then made from its dense graph, if it has one and the models
            differ in nothing but their linears; the bytes are the same.

    Every graph is audited (all weights in it, unchanged) and compared with torch before the bundle appears. Where
    several flavors are asked for, one that has no exporter for the family is left out and named in the manifest.

    Raises:
        UserError: the checkpoint cannot be read or exported, or `out` is in use.
        CheckFailed: a graph is not the checkpoint; no bundle is left.
    """
    if not (checkpoint / "config.json").is_file():
        raise UserError(
            f"{checkpoint}: not a checkpoint directory; a .gguf file becomes one by: owl-deploy prune --sparsity 0"
        )
    source = ModelSource(str(checkpoint), checkpoint)
    checkpoint_sha256 = source.fingerprint()
    made = read_bundle(out) if (out / MANIFEST).is_file() else None
    if made is not None:
        if (made.checkpoint_sha256, made.versions) != (checkpoint_sha256, exporter_versions()):
            raise UserError(f"{out}: holds a bundle made from other inputs; choose another output directory")
        _check_heads(out, made, flavors, head)
        flavors = [flavor for flavor in flavors if flavor not in (*made.flavors, *made.unsupported)]
        if not flavors:
            reporter.step(f"{out}: already made from the same checkpoint")
            return made

    model = load_model(source, torch.float32)
    tokenizer = load_tokenizer(source)
    ids = _parity_ids(tokenizer, model.config.vocab_size, context_length(model))
    pruned = read_manifest(checkpoint)
    place = staged_directory(out, manifest=MANIFEST) if made is None else staged_addition(out)
    # Files are hashed beside the work on the next flavor.
    with place as staging, _readable_by_exporters(checkpoint) as directory, ThreadPoolExecutor(1) as beside:
        records: dict[Flavor, FlavorRecord] = {}
        hashed: dict[Flavor, Future[list[FileRecord]]] = {}
        unsupported: dict[Flavor, str] = {}
        dense = DenseGraph(directory, staging / ".dense", model, tokenizer is not None)
        if made is not None and "genai" in made.flavors:
            dense.use(out / "genai", made.flavors["genai"].audit)
        elif like is not None and "genai" not in flavors:
            dense.borrow(like)
        for flavor in sorted(flavors, key=lambda flavor: weights_of(flavor) is not None):  # packed ones last
            reporter.step(f"exporting {flavor}")
            try:
                records[flavor] = _export(flavor, directory, staging / flavor, model, ids, tokenizer, dense, head)
                hashed[flavor] = beside.submit(_file_records, staging / flavor)
                if flavor == "genai":
                    dense.use(staging / flavor, records[flavor].audit)
            except UnsupportedFamily as error:
                if len(flavors) == 1:
                    raise
                reporter.warn(str(error))
                unsupported[flavor] = str(error)
                shutil.rmtree(staging / flavor)
        dense.remove()
        records = {
            flavor: record.model_copy(update={"files": hashed[flavor].result()}) for flavor, record in records.items()
        }
        if made is not None:
            manifest = made.model_copy(
                update={"flavors": made.flavors | records, "unsupported": made.unsupported | unsupported}
            )
        elif not records:
            raise UserError(f"{checkpoint}: no exporter knows this family: {'; '.join(unsupported.values())}")
        else:
            manifest = BundleManifest(
                model=pruned.model if pruned else name or source.name,
                checkpoint_sha256=checkpoint_sha256,
                base_sha256=pruned.model_sha256 if pruned else None,
                frame_sha256=dense.frame_sha256,
                family=type(model).__name__,
                architecture=architecture(model),
                method=str(pruned.plan["method"]) if pruned else None,
                allocation=str(pruned.plan["allocation"]) if pruned else None,
                sparsity_asked=pruned.sparsity_asked if pruned else None,
                sparsity_achieved=_sparsity(model),
                vocabulary=model.config.vocab_size,
                context=context_length(model),
                has_tokenizer=tokenizer is not None,
                parity_text="random" if tokenizer is None else "passage",
                flavors=records,
                unsupported=unsupported,
                versions=exporter_versions(),
            )
        write_text(staging / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _check_heads(out: Path, made: BundleManifest, flavors: Sequence[Flavor], head: Head | None) -> None:
    for flavor in flavors:
        packed = made.flavors[flavor].packed if flavor in made.flavors else None
        if packed is not None and head not in (None, packed.head):
            raise UserError(f"{out / flavor}: has a head of {packed.head}; choose another output directory")


def _export(
    flavor: Flavor,
    checkpoint: Path,
    out: Path,
    model: PreTrainedModel,
    ids: TokenIds,
    tokenizer: PreTrainedTokenizerBase | None,
    dense: DenseGraph,
    head: Head | None,
) -> FlavorRecord:
    """Make and check a flavor in `out`; its record, without the files."""
    out.mkdir()
    weights = weights_of(flavor)
    packed: PackedRecord | None = None
    if flavor in PEER_FLAVORS:
        source, note = write_peer(flavor, checkpoint, out, has_tokenizer=tokenizer is not None)
        audit, parity = None, None
    elif weights is None:
        source, note = _EXPORTERS[flavor](checkpoint, out, tokenizer is not None)
        audit = audit_of(out / GRAPH, model)
        parity = check_parity(out / GRAPH, model, ids)
    else:
        source, note = "onnxruntime-genai, packed", f"owl::SparseMatMul on {weights} weights"
        audit, packed, stored = pack_flavor(dense, out, weights, head)
        with _weights_of(model, stored):
            parity = check_parity(out / GRAPH, model, ids, SparseEngine)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return FlavorRecord(source=source, note=note, parity=parity, audit=audit, files=[], packed=packed)


def _file_records(flavor: Path) -> list[FileRecord]:
    return [
        FileRecord(path=str(file.relative_to(flavor.parent)), bytes=file.stat().st_size, sha256=sha256(file))
        for file in sorted(flavor.rglob("*"))
        if file.is_file()
    ]


@contextlib.contextmanager
def _weights_of(model: PreTrainedModel, weights: dict[str, NDArray[np.float32]]) -> Iterator[None]:
    """The model with these weights in its linears, for a while; what they were tied to keeps its own."""
    modules = dict(model.named_modules())
    before = {name: modules[name].weight for name in weights}
    try:
        for name, values in weights.items():
            modules[name].weight = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)
        yield
    finally:
        for name, weight in before.items():
            modules[name].weight = weight


def _standard(checkpoint: Path, out: Path, _: bool) -> tuple[str, str]:
    graph = write_standard(checkpoint, out)
    for name in ("config.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, out / name)
    return graph.source, graph.note


def _genai(checkpoint: Path, out: Path, has_tokenizer: bool) -> tuple[str, str]:
    write_genai(checkpoint, out, has_tokenizer=has_tokenizer)
    return (
        "onnxruntime-genai",
        "GroupQueryAttention on a shared KV buffer: the fastest dense graph of ONNX Runtime",
    )


_EXPORTERS: dict[Flavor, Callable[[Path, Path, bool], tuple[str, str]]] = {"standard": _standard, "genai": _genai}


def _sparsity(model: PreTrainedModel) -> float:
    """Zeros among the weights of its blocks' linears."""
    blocks = find_blocks(model)
    return sum(block.zeros for block in blocks) / sum(block.weights for block in blocks)


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
