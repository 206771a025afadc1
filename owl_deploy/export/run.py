"""The export stage: from a checkpoint to a bundle of checked ONNX graphs."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from owl_deploy.checkpoints.load import context_length, load_config, load_model, load_tokenizer
from owl_deploy.checkpoints.source import ModelSource
from owl_deploy.checkpoints.structure import find_blocks
from owl_deploy.engines.protocol import TokenIds
from owl_deploy.errors import UnsupportedFamily, UserError
from owl_deploy.export.audit import audit_graph
from owl_deploy.export.bundle import (
    GRAPH,
    MANIFEST,
    AuditRecord,
    BundleManifest,
    FileRecord,
    FlavorRecord,
    exporter_versions,
    read_bundle,
)
from owl_deploy.export.genai import write_genai
from owl_deploy.export.names import Flavor
from owl_deploy.export.parity import check_parity
from owl_deploy.export.standard import write_standard
from owl_deploy.files import read_json, sha256, staged_directory, write_text
from owl_deploy.pruning.manifest import read_manifest
from owl_deploy.reporting import SILENT, Reporter

PARITY_TOKENS = 64
_PARITY_SEED = 0


def export_checkpoint(
    checkpoint: Path, out: Path, flavors: Sequence[Flavor], *, reporter: Reporter = SILENT
) -> BundleManifest:
    """Export `checkpoint` into the new directory `out`, or find it there already made.

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
    if (out / MANIFEST).is_file():
        made = read_bundle(out)
        same_inputs = (made.checkpoint_sha256, made.versions) == (checkpoint_sha256, exporter_versions())
        if not same_inputs or set(flavors) != {*made.flavors, *made.unsupported}:
            raise UserError(f"{out}: holds a bundle made from other inputs; choose another output directory")
        reporter.step(f"{out}: already made from the same checkpoint")
        return made

    model = load_model(source, torch.float32)
    tokenizer = load_tokenizer(source)
    ids = _parity_ids(tokenizer, model.config.vocab_size, context_length(model))
    pruned = read_manifest(checkpoint)
    with staged_directory(out, manifest=MANIFEST) as staging, _readable_by_exporters(checkpoint) as directory:
        records: dict[Flavor, FlavorRecord] = {}
        unsupported: dict[Flavor, str] = {}
        for flavor in flavors:
            reporter.step(f"exporting {flavor}")
            try:
                records[flavor] = _export(flavor, directory, staging / flavor, model, ids, tokenizer)
            except UnsupportedFamily as error:
                if len(flavors) == 1:
                    raise
                reporter.warn(str(error))
                unsupported[flavor] = str(error)
                shutil.rmtree(staging / flavor)
        if not records:
            raise UserError(f"{checkpoint}: no exporter knows this family: {'; '.join(unsupported.values())}")
        manifest = BundleManifest(
            model=pruned.model if pruned else source.name,
            checkpoint_sha256=checkpoint_sha256,
            family=type(model).__name__,
            method=str(pruned.plan["method"]) if pruned else None,
            allocation=str(pruned.plan["allocation"]) if pruned else None,
            sparsity_asked=pruned.sparsity_asked if pruned else None,
            sparsity_achieved=_sparsity(next(iter(records.values())).audit),
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


def _export(
    flavor: Flavor,
    checkpoint: Path,
    out: Path,
    model: PreTrainedModel,
    ids: TokenIds,
    tokenizer: PreTrainedTokenizerBase | None,
) -> FlavorRecord:
    out.mkdir()
    source, note = _EXPORTERS[flavor](checkpoint, out, tokenizer is not None)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    audit = _audit(out / GRAPH, model)
    parity = check_parity(out / GRAPH, model, ids)
    files = [
        FileRecord(path=str(file.relative_to(out.parent)), bytes=file.stat().st_size, sha256=sha256(file))
        for file in sorted(out.rglob("*"))
        if file.is_file()
    ]
    return FlavorRecord(source=source, note=note, parity=parity, audit=audit, files=files)


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


def _audit(graph: Path, model: PreTrainedModel) -> AuditRecord:
    linears = {
        f"{block.name}.{name}": linear.weight.detach().numpy()
        for block in find_blocks(model)
        for name, linear in block.linears.items()
    }
    found = audit_graph(graph, linears)
    return AuditRecord(
        weights=sum(weight.weights for weight in found),
        zeros=sum(weight.zeros for weight in found),
        linears={weight.name: f"{weight.initializer}[{weight.first_column}]" for weight in found},
    )


def _sparsity(audit: AuditRecord) -> float:
    return audit.zeros / audit.weights


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
