"""The prune stage: from a dense checkpoint to a sparse one on disk that says how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from owl_deploy.errors import UserError, first_line
from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.files import (
    read_json,
    resumable_directory,
    staged_directory,
    write_json,
    write_text,
)
from owl_deploy.models.load import context_length, load_model, load_tokenizer
from owl_deploy.models.shards import safetensors_files
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import Block
from owl_deploy.pruning.allocate import allocate
from owl_deploy.pruning.bits import bits_per_weight
from owl_deploy.pruning.calibration.dense import DenseStatistics, measure_dense
from owl_deploy.pruning.driver import prune_blocks
from owl_deploy.pruning.figure import plot_allocation
from owl_deploy.pruning.manifest import (
    MANIFEST,
    PerplexityRecord,
    PruningManifest,
    SearchRecord,
    SearchSummary,
    TrialRecord,
    read_manifest,
)
from owl_deploy.pruning.offload import OffloadedModel, offloaded_perplexity
from owl_deploy.pruning.opened import Opened, OpenedModel
from owl_deploy.pruning.plan import Allocation, BlockShare, PruningPlan
from owl_deploy.pruning.precision import with_grids, write_grids
from owl_deploy.pruning.recipe.read import Recipe
from owl_deploy.pruning.recipe.write import write_recipes
from owl_deploy.pruning.search.report import write_search
from owl_deploy.pruning.search.run import search
from owl_deploy.pruning.tune import tune
from owl_deploy.records import fingerprint, versions
from owl_deploy.reporting import SILENT, Clock, Reporter
from owl_deploy.text.windows import TokenWindows, calibration_windows, check_windows, evaluation_windows

_STATISTICS = "statistics.safetensors"


@dataclass(frozen=True)
class Calibration:
    """Which text to calibrate on; `samples` and `seqlen` of None are the defaults (or all of a `.npy` file)."""

    spec: str = "c4"
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Execution:
    """Where pruning computes; `offload` holds one block of the model at a time, with the same results."""

    device: str = "cpu"
    offload: bool = False


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
    tune_over: tuple[Allocation, ...] = (),
    statistics_file: Path | None = None,
    execution: Execution = Execution(),  # frozen
    reporter: Reporter = SILENT,
) -> PruningManifest:
    """Prune `source` into the new directory `out`, or find it there already made from the same inputs.

    If an earlier run was killed, this one continues after the last block that it finished.

    Args:
        recipe: the recipe `plan` came from; the blocks it names must be this model's.
        tune_over: choose among these allocations, and the parameters of the best, by held-out calibration text.
        statistics_file: where levels of one sweep share the input statistics of their dense model.

    Raises:
        UserError: something is wrong with the model, the text or the output directory; `out` is then not there.
    """
    clock = Clock()
    check_device(execution.device)
    if execution.offload:
        if tune_over:
            raise UserError("--tune tries allocations on the whole model in memory; leave out --offload, or --tune")
        if plan.allocation == "search":
            raise UserError("--allocation search compares whole models in memory; leave out --offload, or search")
        safetensors_files(source)
    with clock.phase("hash"):
        model_sha256 = source.fingerprint()
    tokenizer = load_tokenizer(source)
    with clock.phase("text"):
        windows = _calibration_windows(plan, bool(tune_over), calibration, tokenizer)
        evaluated = evaluation_of(evaluation, tokenizer)
    inputs: dict[str, object] = {
        "model": model_sha256,
        "plan": plan.fields,
        "tune_over": tune_over,
        "calibration": windows.sha256 if windows else None,
        "evaluation": evaluated.sha256 if evaluated else None,
    }
    if plan.allocation == "search":
        inputs["seed"] = calibration.seed
    inputs_sha256 = fingerprint(inputs)
    # Parts that were made in another way are not put together.
    conditions: dict[str, object] = {"versions": versions(), "device": execution.device}
    resumed_sha256 = fingerprint({**inputs, **conditions})
    if (made := read_manifest(out)) is not None:
        if made.inputs_sha256 != inputs_sha256:
            raise UserError(f"{out}: holds a checkpoint pruned from other inputs; choose another output directory")
        reporter.step(f"{out}: already made from the same inputs")
        return made

    with staged_directory(out, manifest=MANIFEST) as staging, resumable_directory(out, resumed_sha256) as unfinished:
        with clock.phase("load"):
            opened = open_model(source, staging, unfinished, execution, torch.float32 if plan.is_rounded else None)
            model, blocks = opened.model, opened.blocks
        block_class, names = type(blocks[0].module).__name__, [block.name for block in blocks]
        if recipe is not None:
            recipe.check_targets(block_class, names)
        for text in (windows, evaluated):
            if text is not None:
                check_windows(text, vocabulary=model.config.vocab_size, context=context_length(model))

        def evaluate(checkpoint: ModelSource) -> float | None:
            if evaluated is None:
                return None
            with clock.phase("evaluate"):
                return measured_perplexity(checkpoint, evaluated, execution, unfinished, reporter)

        before = evaluate(source)
        trials: list[TrialRecord] = []
        if tune_over and windows is not None:
            with clock.phase("tune"):
                plan, trials = _tune(opened, plan, tune_over, windows, unfinished, reporter)
        searched: list[SearchRecord] = []
        if plan.is_searched and windows is not None:
            with clock.phase("search"):
                plan, searched = search(
                    model,
                    blocks,
                    plan,
                    windows.ids,
                    opened.weights,
                    seed=calibration.seed,
                    kept=unfinished,
                    reporter=reporter,
                )
            write_search(searched, plan, staging)
        with clock.phase("allocate"):
            measured_of = {"model": model_sha256, **conditions}
            dense = _dense_statistics(
                opened, plan, windows, measured_of, statistics_file or unfinished / _STATISTICS, reporter
            )
            shares = allocate(plan, blocks, opened.weights, dense)
            mix = plan.mix
            plan = with_grids(plan, blocks, opened.weights, dense)
            if mix is not None:
                write_grids(plan, blocks, staging)
        with clock.phase("prune"):
            records = prune_blocks(
                model,
                blocks,
                plan,
                shares,
                ids=windows.ids if windows else None,
                dense=dense,
                weights=opened.weights,
                finished=opened.finished.restore,
                done=opened.finished.add,
                reporter=reporter,
            )
        with clock.phase("save"):
            opened.save(tokenizer)
        write_recipes(staging, plan, block_class, shares, names)
        after = evaluate(ModelSource(source.name, staging))
        weights = sum(block.weights for block in records)
        manifest = PruningManifest(
            model=source.name,
            model_sha256=model_sha256,
            family=type(model).__name__,
            block_class=block_class,
            plan=plan.fields | ({"allocation": "search"} if searched else {}) | ({"mix": mix} if mix else {}),
            seed=calibration.seed,
            calibration=windows.record if windows else None,
            tuning=trials,
            search=SearchSummary.of(searched),
            sparsity_asked=plan.sparsity if plan.linear_sparsities is None else _mean_share(shares, blocks),
            sparsity_achieved=sum(block.sparsity_achieved * block.weights for block in records) / weights,
            bits_per_weight=bits_per_weight(plan, records) if plan.is_rounded else None,
            blocks=records,
            perplexity=_perplexity_record(evaluated, before, after),
            inputs_sha256=inputs_sha256,
            versions=versions(),
            seconds=clock.seconds,
        )
        plot_allocation(manifest, staging / "allocation.png")
        write_text(staging / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def open_model(
    source: ModelSource, out: Path, unfinished: Path, execution: Execution, dtype: torch.dtype | None = None
) -> Opened:
    """A model in memory, or on disk with `offload`, which becomes a checkpoint in `out`."""
    kind = OffloadedModel if execution.offload else OpenedModel
    return kind(source, out, unfinished, execution.device, dtype)


def _mean_share(shares: Sequence[BlockShare], blocks: Sequence[Block]) -> float:
    asked = sum(share.mean(block.sizes) * block.weights for share, block in zip(shares, blocks, strict=True))
    return asked / sum(block.weights for block in blocks)


def check_device(device: str) -> None:
    """Refuse a device where torch does not compute.

    Raises:
        UserError: it is one.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"--device {device}: torch cannot compute there ({reason})") from error


def _tune(
    opened: Opened,
    plan: PruningPlan,
    allocations: tuple[Allocation, ...],
    windows: TokenWindows,
    unfinished: Path,
    reporter: Reporter,
) -> tuple[PruningPlan, list[TrialRecord]]:
    """`tune`, without the trials of an earlier run that was killed."""
    file = unfinished / "trials.json"
    known = [TrialRecord.model_validate(trial) for trial in read_json(file)] if file.is_file() else []
    return tune(
        opened.model,
        opened.blocks,
        plan,
        allocations,
        windows.ids,
        opened.weights,
        known=known,
        tried=lambda trials: write_json(file, [trial.model_dump(mode="json") for trial in trials]),
        reporter=reporter,
    )


def _calibration_windows(
    plan: PruningPlan, tuned: bool, calibration: Calibration, tokenizer: PreTrainedTokenizerBase | None
) -> TokenWindows | None:
    if not (plan.needs_inputs or plan.needs_lod or tuned):
        return None
    return calibration_windows(
        calibration.spec,
        tokenizer,
        samples=calibration.samples,
        seqlen=calibration.seqlen,
        seed=calibration.seed,
    )


def _dense_statistics(
    opened: Opened,
    plan: PruningPlan,
    windows: TokenWindows | None,
    measured_of: dict[str, object],
    file: Path,
    reporter: Reporter,
) -> DenseStatistics | None:
    """What the allocation asks of the dense model, from `file` if it was measured there from the same inputs."""
    if not plan.needs_lod or windows is None:
        return None
    inputs_sha256 = fingerprint({**measured_of, "calibration": windows.sha256})
    if (known := DenseStatistics.load(file, inputs_sha256)) is not None:
        return known
    dense = measure_dense(opened.model, opened.blocks, windows.ids, opened.weights, reporter)
    dense.save(file, inputs_sha256)
    return dense


def measured_perplexity(
    source: ModelSource, windows: TokenWindows, execution: Execution, scratch: Path, reporter: Reporter
) -> float:
    """Perplexity of a checkpoint in fp32, whatever dtype it is stored in."""
    if execution.offload:
        return offloaded_perplexity(source, windows.ids, scratch, execution.device, reporter)
    return perplexity(load_model(source, torch.float32), windows.ids, reporter)


def evaluation_of(evaluation: Evaluation | None, tokenizer: PreTrainedTokenizerBase | None) -> TokenWindows | None:
    """The windows that are to be measured on, if any."""
    if evaluation is None:
        return None
    return evaluation_windows(evaluation.spec, tokenizer, seqlen=evaluation.seqlen, limit=evaluation.windows)


def _perplexity_record(
    windows: TokenWindows | None, before: float | None, after: float | None
) -> PerplexityRecord | None:
    if windows is None or before is None or after is None:
        return None
    return PerplexityRecord(text=windows.record, before=before, after=after)
