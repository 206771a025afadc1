"""The recover stage: a sparse checkpoint, trained towards its dense model, becomes a better one with the same zeros."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from owl_deploy.bundle.manifest import DENSE_BELOW
from owl_deploy.errors import CheckFailed, UserError
from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.files import resumable_directory, staged_directory, write_text
from owl_deploy.models.load import architecture, context_length, load_model, load_tokenizer
from owl_deploy.models.precision import fast_dtype
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import Block, find_blocks, share_of_zeros
from owl_deploy.pruning.manifest import PerplexityRecord, read_manifest
from owl_deploy.pruning.run import Evaluation, Execution, check_device, evaluation_of, measured_perplexity, open_model
from owl_deploy.records import fingerprint, versions
from owl_deploy.recovery.adapter import write_adapter
from owl_deploy.recovery.blocks import recover_blocks
from owl_deploy.recovery.curve import plot_curve, write_curve
from owl_deploy.recovery.manifest import MANIFEST, RecoveryManifest, read_recovery
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.recovery.processes import ALONE, Processes
from owl_deploy.recovery.save import Zeros, save_beside_model, save_model
from owl_deploy.recovery.self_text import write_text as write_own_text
from owl_deploy.recovery.teacher import teacher_of
from owl_deploy.recovery.text import TrainingText, split, training_text, windows_needed
from owl_deploy.recovery.train import Diverged, StepRecord, Trainer
from owl_deploy.recovery.training import Training
from owl_deploy.recovery.weights import what_is_trained
from owl_deploy.reporting import SILENT, Clock, Reporter
from owl_deploy.text.windows import TokenWindows, check_windows

_TEXT = "text.npy"
SELF = "self"
"""Names text that the dense model writes itself."""


@dataclass(frozen=True)
class _Job:
    """A recovery under way."""

    sparse: ModelSource
    dense: ModelSource
    out: Path
    plan: RecoveryPlan
    execution: Execution
    processes: Processes
    dtype: torch.dtype
    staging: Path
    unfinished: Path
    clock: Clock
    reporter: Reporter


@dataclass(frozen=True)
class _Outcome:
    """What a method came to.

    Attributes:
        before, after: perplexity on the held-out windows.
        tokens_per_s: of the training alone.
        final: perplexity on the text that was asked for, where the checkpoint cannot be loaded to measure it (an
            adapter).
    """

    log: list[StepRecord]
    sparsity: float
    trained_weights: int
    tokens_per_s: float
    before: float
    after: float
    final: float | None = None


def recover_checkpoint(
    sparse: ModelSource,
    dense: ModelSource,
    out: Path,
    plan: RecoveryPlan,
    text: str,
    *,
    evaluation: Evaluation | None = None,
    execution: Execution = Execution(),  # frozen
    processes: Processes = ALONE,
    reporter: Reporter = SILENT,
) -> RecoveryManifest:
    """Train `sparse` towards `dense` and write it to the new directory `out`, or find it there from the same inputs.

    An earlier run that was killed is continued from its last save, to the same bytes if the threads are as many.

    Args:
        text: what `owl_deploy.text.documents.load_documents` takes, a `.npy` file of ids, or `self` for text that
            `dense` writes, which is kept as `text.npy`.
        evaluation: also measure perplexity on this text, in fp32, before and after.
        processes: of which this is the main one; the others run `help_recovery`.

    Raises:
        UserError: something is wrong with the models, the text or the output directory; `out` is then not there.
        CheckFailed: the loss became NaN. The last good save is then a checkpoint beside `out`, which the message names.
    """
    clock = Clock()
    check_device(execution.device)
    _check_offload(plan, text, execution)
    _check_shares(plan, processes)
    with clock.phase("hash"):
        sparse_sha256, dense_sha256 = sparse.fingerprint(), dense.fingerprint()
    _check_hash(sparse, dense, dense_sha256)
    tokenizer = load_tokenizer(sparse) or load_tokenizer(dense)
    with clock.phase("text"):
        windows = None if text == SELF else training_text(text, tokenizer, plan)
        evaluated_on = evaluation_of(evaluation, tokenizer)
    inputs = {
        "model": sparse_sha256,
        "dense": dense_sha256,
        "plan": dataclasses.asdict(plan),
        "text": SELF if windows is None else [windows.windows.sha256, windows.held_out.sha256],
        "evaluation": evaluated_on.sha256 if evaluated_on else None,
    }
    inputs_sha256 = fingerprint(inputs)
    dtype = torch.float32 if plan.method == "blocks" else fast_dtype(execution.device)
    conditions: dict[str, object] = {"versions": versions(), "device": execution.device, "dtype": str(dtype)}
    if processes.count > 1:
        conditions["processes"] = processes.count
    if (earlier := read_recovery(out)) is not None:
        if earlier.inputs_sha256 != inputs_sha256:
            raise UserError(f"{out}: holds a checkpoint recovered from other inputs; choose another output directory")
        reporter.step(f"{out}: already made from the same inputs")
        return earlier

    with (
        staged_directory(out, manifest=MANIFEST) as staging,
        resumable_directory(out, fingerprint({**inputs, **conditions})) as unfinished,
    ):
        job = _Job(sparse, dense, out, plan, execution, processes, dtype, staging, unfinished, clock, reporter)
        method = _by_blocks if plan.method == "blocks" else _trained
        windows, outcome, before = method(job, windows, evaluated_on, tokenizer)
        held_out = scores = PerplexityRecord(text=windows.held_out.record, before=outcome.before, after=outcome.after)
        if evaluated_on is not None and before is not None:
            after = outcome.final
            if after is None:
                made = ModelSource(sparse.name, staging)
                with clock.phase("evaluate"):
                    after = measured_perplexity(made, evaluated_on, execution, unfinished, reporter)
            scores = PerplexityRecord(text=evaluated_on.record, before=before, after=after)
        log = outcome.log
        write_curve(log, staging / "recovery.csv")
        plot_curve(log, outcome.before, f"{Path(sparse.name).name}: recovery", staging / "recovery.png")
        manifest = RecoveryManifest(
            model=sparse.name,
            model_sha256=sparse_sha256,
            dense=dense.name,
            dense_sha256=dense_sha256,
            plan=dataclasses.asdict(plan),
            dtype=str(dtype).removeprefix("torch."),
            text=windows.windows.record,
            steps=len(log),
            tokens=log[-1].tokens,
            trained_weights=outcome.trained_weights,
            loss=float(np.mean([step.loss for step in log[-max(1, len(log) // 10) :]])),
            held_out=held_out,
            perplexity=scores,
            zeros_kept=True,
            sparsity=outcome.sparsity,
            tokens_per_s=round(outcome.tokens_per_s, 1),
            seconds=clock.seconds,
            inputs_sha256=inputs_sha256,
            versions=versions(),
            earlier=_earlier(sparse),
        )
        write_text(staging / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _trained(
    job: _Job,
    text: TrainingText | None,
    evaluated_on: TokenWindows | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[TrainingText, _Outcome, float | None]:
    """The whole model at once, all its kept weights or low-rank changes; what was trained on, and how it went."""
    plan, clock, device = job.plan, job.clock, job.execution.device
    with clock.phase("load"):
        model, teacher = load_model(job.sparse), load_model(job.dense, job.dtype)
        stored = None if plan.weights else {name: one.dtype for name, one in model.named_parameters()}
        model.float()
        blocks = find_blocks(model)
    _check_pair(job, model, blocks, teacher)
    if text is None:
        teacher.to(device)
        with clock.phase("write text"):
            text = _own_text(job, teacher)
    _check_texts(model, text, evaluated_on)
    zeros, before = Zeros(blocks), None
    if evaluated_on is not None:
        with clock.phase("evaluate"):
            before = perplexity(model, evaluated_on.ids, job.reporter)
    model.to(device)
    teacher.to(device)
    what = what_is_trained(model, blocks, plan)
    remembering = teacher_of(teacher, plan, text.windows.ids, job.unfinished)
    trainer = Trainer(model, what, remembering, plan, job.processes)
    training = Training(trainer, model, text, plan, job.unfinished, clock)
    try:
        training.train(job.reporter)
    except Diverged as error:
        if (step := training.take_last_save()) is None:
            raise CheckFailed(f"{error}; nothing had been saved yet; a lower --lr may help") from error
        beside = job.out.with_name(f"{job.out.name}.step-{step}")
        with staged_directory(beside, manifest="config.json") as staging:
            save_model(trainer.finish(merge=True).to("cpu"), blocks, zeros, stored, staging)
        raise CheckFailed(f"{error}; the last good save, of step {step}, is {beside}; a lower --lr may help") from error
    trainer.finish(merge=plan.merge).to("cpu")
    sparsity, final = share_of_zeros(blocks), None
    with clock.phase("save"):
        if plan.merge:
            save_model(model, blocks, zeros, stored, job.staging)
            save_beside_model(job.sparse, blocks, job.staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(job.staging)
        else:
            write_adapter(job.staging, what.parameters, plan, job.sparse.name)
    if evaluated_on is not None and not plan.merge:
        with clock.phase("evaluate"):
            final = perplexity(model, evaluated_on.ids, job.reporter)
    speed = trainer.log[-1].tokens / training.seconds
    outcome = _Outcome(trainer.log, sparsity, trainer.parameters, speed, training.before, training.after, final)
    return text, outcome, before


def _by_blocks(
    job: _Job,
    text: TrainingText | None,
    evaluated_on: TokenWindows | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[TrainingText, _Outcome, float | None]:
    """One block after the other; with `offload` no more than one of each model is in memory."""
    clock = job.clock
    with clock.phase("load"):
        sparse = open_model(job.sparse, job.staging, job.unfinished, job.execution)
        dense = open_model(job.dense, job.staging, job.unfinished, job.execution)
    _check_pair(job, sparse.model, sparse.blocks, dense.model)
    if text is None:
        with clock.phase("write text"):
            text = _own_text(job, dense.model)
    _check_texts(sparse.model, text, evaluated_on)

    def measured(source: ModelSource, windows: TokenWindows) -> float:
        with clock.phase("evaluate"):
            return measured_perplexity(source, windows, job.execution, job.unfinished, job.reporter)

    before, held_out_before = None, measured(job.sparse, text.held_out)
    if evaluated_on is not None:
        before = measured(job.sparse, evaluated_on)
    with clock.phase("train"):
        log, sparsity, fitted = recover_blocks(sparse, dense, text, job.plan, job.reporter)
    with clock.phase("save"):
        sparse.save(tokenizer)
        save_beside_model(job.sparse, sparse.blocks, job.staging)
    made = ModelSource(job.sparse.name, job.staging)
    speed = fitted * log[-1].tokens / len(log) / clock.seconds["train"]
    kept = round((1 - sparsity) * sum(block.weights for block in sparse.blocks))
    return text, _Outcome(log, sparsity, kept, speed, held_out_before, measured(made, text.held_out)), before


def _own_text(job: _Job, dense: PreTrainedModel) -> TrainingText:
    """Text that the dense model writes, which is kept beside the checkpoint."""
    plan = job.plan
    count = windows_needed(plan)
    ids = write_own_text(dense, count, plan.seqlen, seed=plan.seed, kept=job.unfinished, reporter=job.reporter)
    np.save(job.staging / _TEXT, ids)
    return split(TokenWindows(ids, SELF), plan)


def _check_offload(plan: RecoveryPlan, text: str, execution: Execution) -> None:
    if not execution.offload:
        return
    if plan.method != "blocks":
        raise UserError(f"--method {plan.method} holds the whole model in memory; use --method blocks with --offload")
    if text == SELF:
        raise UserError("--text self needs the whole dense model in memory; give another text with --offload")


def _check_shares(plan: RecoveryPlan, processes: Processes) -> None:
    if processes.count == 1:
        return
    if plan.method == "blocks":
        raise UserError("--method blocks trains in one process; launch one, or choose another method")
    micro_batches = plan.batch // plan.micro_batch
    if micro_batches % processes.count:
        raise UserError(
            f"--batch {plan.batch} in micro-batches of {plan.micro_batch} makes {micro_batches} of them, which "
            f"{processes.count} processes cannot share equally; make --batch a multiple of "
            f"{plan.micro_batch * processes.count}"
        )


def _check_hash(sparse: ModelSource, dense: ModelSource, dense_sha256: str) -> None:
    pruned = read_manifest(sparse.path)
    if pruned is not None and pruned.model_sha256 != dense_sha256:
        raise UserError(
            f"--dense {dense.name}: is not what {sparse.name} was pruned from, which was {pruned.model} "
            f"(SHA-256 {pruned.model_sha256[:12]}, not {dense_sha256[:12]})"
        )


def _check_pair(job: _Job, model: PreTrainedModel, blocks: Sequence[Block], teacher: PreTrainedModel) -> None:
    ours, theirs = architecture(model), architecture(teacher)
    if ours != theirs:
        raise UserError(f"--dense {job.dense.name}: is no dense model of {job.sparse.name} ({theirs}; not {ours})")
    if job.execution.offload or job.plan.weights is not None:  # offloaded weights are not there to be counted
        return
    zeros = share_of_zeros(blocks)
    if zeros < DENSE_BELOW:
        raise UserError(
            f"{job.sparse.name}: {zeros:.2%} of its weights are zeros, so nothing was pruned; prune it first"
        )


def _check_texts(model: PreTrainedModel, text: TrainingText, evaluated_on: TokenWindows | None) -> None:
    for windows in (text.windows, text.held_out, *([evaluated_on] if evaluated_on else [])):
        check_windows(windows, vocabulary=model.config.vocab_size, context=context_length(model))


def _earlier(sparse: ModelSource) -> list[RecoveryManifest]:
    before = read_recovery(sparse.path)
    return [] if before is None else [*before.earlier, before.model_copy(update={"earlier": []})]
