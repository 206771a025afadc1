"""The export stage: from a checkpoint to a bundle of checked ONNX graphs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from owl_deploy.bundle.manifest import (
    MANIFEST,
    BundleManifest,
    FileRecord,
    FlavorRecord,
    exporter_versions,
    read_bundle,
)
from owl_deploy.bundle.names import Flavor, KvCache
from owl_deploy.bundle.records import CacheRecord
from owl_deploy.errors import UnsupportedFamily, UserError
from owl_deploy.exporting.checkpoint import OpenCheckpoint, open_checkpoint
from owl_deploy.exporting.flavors import EXPORTERS, Packed, Peer, can_round_cache, is_calibrated
from owl_deploy.exporting.graphs.dense import DenseGraph, lent_graph, written_graph
from owl_deploy.exporting.stored import stored_in
from owl_deploy.files import sha256, staged_addition, staged_directory, write_text
from owl_deploy.models.load import architecture, context_length
from owl_deploy.models.source import ModelSource
from owl_deploy.pruning.manifest import read_manifest
from owl_deploy.pruning.run import Calibration
from owl_deploy.reporting import SILENT, Reporter
from owl_deploy.sparse.formats import Head
from owl_deploy.sparse.library import library_path


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    flavors: Sequence[Flavor],
    *,
    head: Head | None = None,
    kv_cache: KvCache | None = None,
    calibration: Calibration = Calibration(),  # frozen
    name: str | None = None,
    like: Path | None = None,
    reporter: Reporter = SILENT,
) -> BundleManifest:
    """Export `checkpoint` into the directory `out`; flavors that are already there of the same checkpoint stay.

    Args:
        head: how sparse flavors store the matrix of the vocabulary; None for what goes with their weights.
        kv_cache: how flavors of onnxruntime-genai's graph keep keys and values; None for fp32, or what is there.
        calibration: the text that 8-bit caches and llama.cpp's K-quants are made by; read only for these.
        name: what the model is called, if owl-deploy did not prune it; by default its directory.
        like: another level's bundle. Sparse flavors are then made from its dense graph, if it has one and the models
            differ in nothing but their linears; the bytes are the same.

    Every graph is audited (all weights in it, unchanged) and compared with torch before the bundle appears. Where
    several flavors are asked for, one that cannot be made of this model, or on this machine, is left out and named in
    the manifest. It is tried again whenever it is asked for again.

    Raises:
        UserError: the checkpoint cannot be read or exported, or `out` is in use.
        UnsupportedFamily: the bundle would have none of `flavors`.
        CheckFailed: a graph is not the checkpoint.
    After each of these `out` is as it was.
    """
    if not (checkpoint / "config.json").is_file():
        raise UserError(
            f"{checkpoint}: not a checkpoint directory; a .gguf file becomes one by: owl-deploy prune --sparsity 0"
        )
    source = ModelSource(str(checkpoint), checkpoint)
    checkpoint_sha256 = source.fingerprint()
    rounding = calibration if kv_cache == "int8" else None
    there = _bundle_there(out, checkpoint_sha256, flavors, head, kv_cache, rounding)
    if there is not None and there.flavors.keys() >= set(flavors):
        reporter.step(f"{out}: already made from the same checkpoint")
        return there

    place = staged_directory(out, manifest=MANIFEST) if there is None else staged_addition(out)
    with place as staging, open_checkpoint(source, calibration) as opened:
        if rounding or any(is_calibrated(flavor) for flavor in flavors):
            _ = opened.windows  # what is wrong with the text is told before the work
        # Read again, as another process could add to it until it was locked.
        there = _bundle_there(out, checkpoint_sha256, flavors, head, kv_cache, rounding)
        before = {} if there is None else there.flavors
        made, left_out = _make_flavors(
            [flavor for flavor in flavors if flavor not in before],
            *(opened, staging, _own_graph(out, before), like, head),
            rounds_cache=kv_cache == "int8",
            reporter=reporter,
        )
        records = before | made
        if not any(flavor in records for flavor in flavors):
            raise UnsupportedFamily("; ".join(dict.fromkeys(left_out.values())))
        for flavor, reason in left_out.items():
            reporter.warn(f"without {flavor}: {reason}")
        manifest = there or _description(opened, source, checkpoint_sha256, name)
        known = manifest.unsupported | left_out
        unsupported = {flavor: known[flavor] for flavor in known if flavor not in records}
        manifest = manifest.model_copy(update={"flavors": records, "unsupported": unsupported})
        write_text(staging / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _bundle_there(
    out: Path,
    checkpoint_sha256: str,
    flavors: Sequence[Flavor],
    head: Head | None,
    kv_cache: KvCache | None,
    calibration: Calibration | None,
) -> BundleManifest | None:
    """What `out` holds already; None if it holds no bundle.

    Raises:
        UserError: it was made from other inputs, or one of `flavors` is there with another head or cache.
    """
    if not (out / MANIFEST).is_file():
        return None
    there = read_bundle(out)
    if (there.checkpoint_sha256, there.versions) != (checkpoint_sha256, exporter_versions()):
        raise UserError(f"{out}: holds a bundle made from other inputs; choose another output directory")
    for flavor in flavors:
        packed = there.flavors[flavor].packed if flavor in there.flavors else None
        if packed is not None and head not in (None, packed.head):
            raise UserError(f"{out / flavor}: has a head of {packed.head}; choose another output directory")
        if flavor in there.flavors and kv_cache is not None and can_round_cache(flavor):
            _check_cache(out / flavor, there.flavors[flavor].kv_cache, calibration)
    return there


def _check_cache(folder: Path, found: CacheRecord | None, asked: Calibration | None) -> None:
    """
    Raises:
        UserError: a flavor that is there keeps keys and values in another way than was asked for.
    """
    if (found is None) != (asked is None):
        raise UserError(f"{folder}: has a KV cache of {'int8' if found else 'fp32'}; choose another output directory")
    if found is None or asked is None:
        return
    known = (found.text.source, found.text.windows, found.text.seqlen)
    if (asked.spec, asked.samples or known[1], asked.seqlen or known[2]) != known:
        raise UserError(
            f"{folder}: its KV cache was calibrated on {known[1]} windows of {known[2]} tokens of {known[0]}; choose "
            "another output directory"
        )


def _make_flavors(
    flavors: Sequence[Flavor],
    checkpoint: OpenCheckpoint,
    staging: Path,
    own: DenseGraph | None,
    like: Path | None,
    head: Head | None,
    *,
    rounds_cache: bool,
    reporter: Reporter,
) -> tuple[dict[Flavor, FlavorRecord], dict[Flavor, str]]:
    """Make these flavors in `staging`: the records of those that could be made, and why the others could not.

    Args:
        own: the dense graph of the bundle, if it has one already.
        like: see `export_checkpoint`.
        rounds_cache: whether keys and values are kept in 8 bits, where a flavor can.
    """
    records: dict[Flavor, FlavorRecord] = {}
    hashed: dict[Flavor, Future[list[FileRecord]]] = {}
    left_out: dict[Flavor, str] = {}

    def attempt(flavor: Flavor, make: Callable[[Path], FlavorRecord]) -> None:
        reporter.step(f"exporting {flavor}")
        folder = staging / flavor
        folder.mkdir()
        try:
            records[flavor] = make(folder)
        except UnsupportedFamily as error:
            left_out[flavor] = str(error)
            shutil.rmtree(folder)
            return
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(folder)
        hashed[flavor] = beside.submit(_file_records, folder)

    packed = {flavor: exporter for flavor in flavors if isinstance(exporter := EXPORTERS[flavor], Packed)}
    with ThreadPoolExecutor(1) as beside:  # files are hashed beside the work on the next flavor
        for flavor in sorted(flavors, key=lambda flavor: not isinstance(EXPORTERS[flavor], Peer)):  # without the model
            if not isinstance(exporter := EXPORTERS[flavor], Packed):
                attempt(flavor, partial(exporter.make, checkpoint, rounds_cache=rounds_cache))
        if packed:
            try:
                with _dense_graph(checkpoint, own or _own_graph(staging, records), like, staging) as dense:
                    for flavor, packer in packed.items():
                        attempt(flavor, partial(packer.make, checkpoint, dense, head, rounds_cache=rounds_cache))
            except UnsupportedFamily as error:
                left_out |= dict.fromkeys(packed, str(error))
    finished = {
        flavor: records[flavor].model_copy(
            update={
                "files": hashed[flavor].result(),
                "stored": stored_in(staging / flavor, flavor, records[flavor], checkpoint.model),
            }
        )
        for flavor in sorted(flavors, key=lambda flavor: flavor in packed)
        if flavor in records
    }
    return finished, left_out


def _own_graph(bundle: Path, flavors: Mapping[Flavor, FlavorRecord]) -> DenseGraph | None:
    """The dense graph among a bundle's flavors."""
    genai = flavors.get("genai")
    return None if genai is None or genai.audit is None else DenseGraph(bundle / "genai", genai.audit)


@contextlib.contextmanager
def _dense_graph(
    checkpoint: OpenCheckpoint, own: DenseGraph | None, like: Path | None, staging: Path
) -> Iterator[DenseGraph]:
    """What sparse flavors are made from: the bundle's own dense graph, or that of `like`, or one made for the purpose.

    Raises:
        UnsupportedFamily: there is none for this model, or the library that packs its weights is missing.
    """
    try:
        library_path()
    except UserError as error:
        raise UnsupportedFamily(str(error)) from error
    graph = own or (lent_graph(checkpoint, like) if like is not None else None)
    with contextlib.nullcontext(graph) if graph else written_graph(checkpoint, staging) as dense:
        yield dense


def _description(
    checkpoint: OpenCheckpoint, source: ModelSource, checkpoint_sha256: str, name: str | None
) -> BundleManifest:
    """The manifest of a bundle without flavors yet."""
    pruned, model = read_manifest(source.path), checkpoint.model
    return BundleManifest(
        model=pruned.model if pruned else name or source.name,
        checkpoint_sha256=checkpoint_sha256,
        base_sha256=pruned.model_sha256 if pruned else None,
        frame_sha256=checkpoint.frame_sha256,
        family=type(model).__name__,
        architecture=architecture(model),
        method=str(pruned.plan["method"]) if pruned else None,
        allocation=str(pruned.plan["allocation"]) if pruned else None,
        sparsity_asked=pruned.sparsity_asked if pruned else None,
        sparsity_achieved=checkpoint.sparsity,
        vocabulary=model.config.vocab_size,
        context=context_length(model),
        has_tokenizer=checkpoint.tokenizer is not None,
        parity_text="random" if checkpoint.tokenizer is None else "passage",
        flavors={},
        versions=exporter_versions(),
    )


def _file_records(flavor: Path) -> list[FileRecord]:
    return [
        FileRecord(path=str(file.relative_to(flavor.parent)), bytes=file.stat().st_size, sha256=sha256(file))
        for file in sorted(flavor.rglob("*"))
        if file.is_file()
    ]
