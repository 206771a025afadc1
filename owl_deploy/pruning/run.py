"""The prune stage: from a dense checkpoint to a sparse one on disk that says how it was made."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from owl_deploy.checkpoints.load import context_length, load_model, load_tokenizer
from owl_deploy.checkpoints.source import ModelSource
from owl_deploy.checkpoints.structure import Block, find_blocks
from owl_deploy.errors import UserError
from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.files import read_json, staged_directory, write_json, write_text
from owl_deploy.pruning.driver import allocate, measure_lod, needs_calibration, prune_blocks
from owl_deploy.pruning.figure import plot_allocation
from owl_deploy.pruning.manifest import (
    MANIFEST,
    PerplexityRecord,
    PruningManifest,
    TextRecord,
    fingerprint,
    read_manifest,
    versions,
)
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.recipes import Recipe, write_recipes
from owl_deploy.reporting import SILENT, Reporter
from owl_deploy.text.windows import TokenWindows, calibration_windows, check_windows, evaluation_windows


@dataclass(frozen=True)
class Calibration:
    """Which text to calibrate on; `samples` and `seqlen` of None are the defaults (or all of a `.npy` file)."""

    spec: str = "c4"
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Which text to measure perplexity on; `windows` of None is all of it."""

    spec: str
    seqlen: int | None = None
    windows: int | None = None


def prune_checkpoint(
    source: ModelSource,
    out: Path,
    plan: PruningPlan,
    calibration: Calibration,
    *,
    evaluation: Evaluation | None = None,
    recipe: Recipe | None = None,
    lod_file: Path | None = None,
    reporter: Reporter = SILENT,
) -> PruningManifest:
    """Prune `source` into the new directory `out`, or find it there already made from the same inputs.

    Args:
        recipe: the recipe `plan` came from; the blocks it names must be this model's.
        lod_file: where levels of one sweep share the LOD of their dense model.

    Raises:
        UserError: something is wrong with the model, the text or the output directory; `out` is then not there.
    """
    clock = _Clock()
    with clock.phase("hash"):
        model_sha256 = source.fingerprint()
    tokenizer = load_tokenizer(source)
    with clock.phase("text"):
        windows = _calibration_windows(plan, calibration, tokenizer)
        evaluated = _evaluation_windows(evaluation, tokenizer)
    inputs_sha256 = fingerprint(
        {
            "model": model_sha256,
            "plan": dataclasses.asdict(plan),
            "calibration": windows.sha256 if windows else None,
            "evaluation": evaluated.sha256 if evaluated else None,
        }
    )
    if (made := read_manifest(out)) is not None:
        if made.inputs_sha256 != inputs_sha256:
            raise UserError(f"{out}: holds a checkpoint pruned from other inputs; choose another output directory")
        reporter.step(f"{out}: already made from the same inputs")
        return made

    with staged_directory(out, manifest=MANIFEST) as staging:
        with clock.phase("load"):
            model = load_model(source)
            blocks = find_blocks(model)
        block_class, names = type(blocks[0].module).__name__, [block.name for block in blocks]
        if recipe is not None:
            recipe.check_targets(block_class, names)
        for text in (windows, evaluated):
            if text is not None:
                check_windows(text, vocabulary=model.config.vocab_size, context=context_length(model))
        before = _evaluate(source, evaluated, clock, reporter)
        with clock.phase("allocate"):
            lod = _lod(model, blocks, plan, windows, model_sha256, lod_file, reporter)
            sparsities = allocate(plan, blocks, lod)
        with clock.phase("prune"):
            records = prune_blocks(
                model, blocks, plan, sparsities, ids=windows.ids if windows else None, lod=lod, reporter=reporter
            )
        with clock.phase("save"):
            _save(model, tokenizer, staging)
        write_recipes(staging, plan, block_class, sparsities, names)
        after = _evaluate(ModelSource(source.name, staging), evaluated, clock, reporter)
        weights = sum(block.weights for block in records)
        manifest = PruningManifest(
            model=source.name,
            model_sha256=model_sha256,
            family=type(model).__name__,
            block_class=block_class,
            plan=dataclasses.asdict(plan),
            seed=calibration.seed,
            calibration=_text_record(windows),
            sparsity_asked=plan.sparsity,
            sparsity_achieved=sum(block.sparsity_achieved * block.weights for block in records) / weights,
            blocks=records,
            perplexity=_perplexity_record(evaluated, before, after),
            inputs_sha256=inputs_sha256,
            versions=versions(),
            seconds=clock.seconds,
        )
        plot_allocation(manifest, staging / "allocation.png")
        write_text(staging / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _calibration_windows(
    plan: PruningPlan, calibration: Calibration, tokenizer: PreTrainedTokenizerBase | None
) -> TokenWindows | None:
    if not needs_calibration(plan):
        return None
    return calibration_windows(
        calibration.spec,
        tokenizer,
        samples=calibration.samples,
        seqlen=calibration.seqlen,
        seed=calibration.seed,
    )


def _lod(
    model: PreTrainedModel,
    blocks: list[Block],
    plan: PruningPlan,
    windows: TokenWindows | None,
    model_sha256: str,
    lod_file: Path | None,
    reporter: Reporter,
) -> list[float] | None:
    """OWL's D per block, from `lod_file` if it was measured there from the same inputs."""
    if plan.allocation != "owl" or windows is None:
        return None
    inputs = {"model": model_sha256, "calibration": windows.sha256, "owl_m": plan.owl_m}
    if lod_file is not None and lod_file.is_file():
        known = read_json(lod_file)
        if known["inputs"] == inputs:
            lod: list[float] = known["lod_percent"]
            return lod
    lod = measure_lod(model, blocks, windows.ids, plan.owl_m, reporter)
    if lod_file is not None:
        write_json(lod_file, {"inputs": inputs, "lod_percent": lod})
    return lod


def _evaluate(source: ModelSource, windows: TokenWindows | None, clock: _Clock, reporter: Reporter) -> float | None:
    """Perplexity of a checkpoint in fp32, whatever dtype it is stored in."""
    if windows is None:
        return None
    with clock.phase("evaluate"):
        return perplexity(load_model(source, torch.float32), windows.ids, reporter)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    model.config.use_cache = True  # calibration switched it off
    model.save_pretrained(directory, safe_serialization=True, max_shard_size="5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _evaluation_windows(
    evaluation: Evaluation | None, tokenizer: PreTrainedTokenizerBase | None
) -> TokenWindows | None:
    if evaluation is None:
        return None
    return evaluation_windows(evaluation.spec, tokenizer, seqlen=evaluation.seqlen, limit=evaluation.windows)


def _perplexity_record(
    windows: TokenWindows | None, before: float | None, after: float | None
) -> PerplexityRecord | None:
    text = _text_record(windows)
    if text is None or before is None or after is None:
        return None
    return PerplexityRecord(text=text, before=before, after=after)


def _text_record(windows: TokenWindows | None) -> TextRecord | None:
    if windows is None:
        return None
    count, seqlen = windows.ids.shape
    return TextRecord(source=windows.source, windows=count, seqlen=seqlen, sha256=windows.sha256)


class _Clock:
    """Wall-clock seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
