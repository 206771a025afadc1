"""Measure the cells of a study, each once: after an interruption, only the missing ones are measured."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from owl_deploy.allocation.owl import outlier_percent
from owl_deploy.errors import UserError
from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.evaluation.tasks import TaskAccuracy, TaskRequest
from owl_deploy.files import disk_errors, locked, write_text
from owl_deploy.formatting import number, perplexity_text
from owl_deploy.machine.description import cpu_model
from owl_deploy.models.load import context_length, load_model, load_tokenizer, require_tokenizer
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import Block, find_blocks
from owl_deploy.pruning.allocate import allocate
from owl_deploy.pruning.bits import bits_per_weight
from owl_deploy.pruning.calibration.dense import measure_dense
from owl_deploy.pruning.calibration.stream import in_fp32
from owl_deploy.pruning.driver import prune_blocks
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.run import Calibration, Evaluation
from owl_deploy.pruning.search.run import search
from owl_deploy.pruning.weights import InMemory, restored
from owl_deploy.records import fingerprint, read_record, versions
from owl_deploy.reporting import SILENT, Reporter
from owl_deploy.rounding import Rounded
from owl_deploy.studies.cells import Cell, CellRecord, Study, StudyRecord, StudyResult, TasksRecord
from owl_deploy.studies.rounded import options_of, round_to_nearest, with_options
from owl_deploy.studies.trained import TrainedCells, linear_sparsities, texts_of
from owl_deploy.text.windows import TokenWindows, calibration_windows, check_windows, evaluation_windows

if TYPE_CHECKING:  # lm-eval is an extra
    from owl_deploy.evaluation.zero_shot import ZeroShotTasks

RECORD, CELLS = "study.json", "cells.jsonl"


def run_study(
    source: ModelSource,
    out: Path,
    study: Study,
    calibration: Calibration,
    evaluation: Evaluation | None = None,
    tasks: TaskRequest | None = None,
    *,
    reporter: Reporter = SILENT,
) -> StudyResult:
    """Measure the cells of `study` that the directory `out` lacks, and write each as soon as it is measured.

    Raises:
        UserError: something is wrong with the model, a text or a task; or `out` holds something else, cells of other
            inputs, or lacks cells and has others that were measured with other versions or on another machine.
    """
    tokenizer = load_tokenizer(source)
    windows = calibration_windows(
        calibration.spec, tokenizer, samples=calibration.samples, seqlen=calibration.seqlen, seed=calibration.seed
    )
    evaluated = None
    if evaluation is not None:
        evaluated = evaluation_windows(evaluation.spec, tokenizer, seqlen=evaluation.seqlen, limit=evaluation.windows)
    asked = None
    if tasks is not None:
        from owl_deploy.evaluation.zero_shot import ZeroShotTasks

        asked = _Asked(tasks, ZeroShotTasks(tasks), require_tokenizer(tokenizer, source, "--tasks"))
    inputs: dict[str, object] = {
        "study": study.name,
        "model": source.fingerprint(),
        "calibration": windows.sha256,
        "evaluation": evaluated.sha256 if evaluated else None,
    }
    if asked:
        inputs |= {"tasks": asked.tasks.sha256}
    if study.is_timed:
        inputs |= {"threads": torch.get_num_threads(), "cpu": cpu_model()}
    trained_on = texts_of(study, tokenizer)
    with locked(out):
        made = _read_made(out, fingerprint(inputs))
        known = _read_known(out) if made else {}
        cells = {study.key(*pair): pair[0] for pair in zip(study.cells, trained_on, strict=True)}
        missing = {key: cell for key, cell in cells.items() if key not in known}
        if len(missing) < len(cells):
            reporter.step(f"{out}: {len(cells) - len(missing)} of {len(cells)} cells were measured before")

        def measure(bench: _Bench | TrainedCells, keys: Sequence[str], what: str) -> None:
            for key in reporter.track(keys, what):
                known[key] = bench.measure(missing[key], key)
                # The whole file is replaced, so that an interruption cannot leave half a line.
                write_text(out / CELLS, "".join(f"{one.model_dump_json()}\n" for one in known.values()))
                reporter.step(f"{missing[key]}: {_outcome(known[key])}")

        if missing and made and known:
            _check_conditions(out, made)
        if one_shot := [key for key, cell in missing.items() if cell.recovery is None]:
            bench = _Bench(source, study, windows, evaluated, asked, out, calibration.seed)
            record = _describe(source, study, inputs, bench.blocks, windows, evaluated, asked)
            with disk_errors(out):
                out.mkdir(parents=True, exist_ok=True)
            write_text(out / RECORD, record.model_dump_json(indent=2) + "\n")
            measure(bench, one_shot, f"cells of {study.name}")
            del bench  # training needs the memory
        if recovered := [key for key in missing if key not in known]:
            measure(
                TrainedCells(source, out, calibration, evaluation, reporter),
                recovered,
                f"recovered cells of {study.name}",
            )
        record = read_record(out / RECORD, StudyRecord, mend=_MEND)
    return StudyResult(study=record, cells=[known[key] for key in cells])


_MEND = "delete it, and the cells beside it, and run the study again"


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The zero-shot tasks with their examples, and the tokenizer of the model."""

    request: TaskRequest
    tasks: ZeroShotTasks
    tokenizer: PreTrainedTokenizerBase

    @property
    def record(self) -> TasksRecord:
        return TasksRecord(
            examples=self.tasks.examples,
            files={name: str(path) for name, path in self.request.data.items()},
            sha256=self.tasks.sha256,
            lm_eval_version=importlib.metadata.version("lm_eval"),
        )


def _outcome(cell: CellRecord) -> str:
    figures = [str(one) for one in cell.tasks]
    if cell.perplexity is not None:
        before = f", {perplexity_text(cell.training.before)} before" if cell.training else ""
        figures.insert(0, f"perplexity {perplexity_text(cell.perplexity)}{before}")
    return "; ".join(figures) or f"{number(cell.seconds)} s"


def _read_made(out: Path, inputs_sha256: str) -> StudyRecord | None:
    """What the cells that were measured before were measured on."""
    if not (out / RECORD).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: is not empty, and holds no study; choose another output directory")
        return None
    record = read_record(out / RECORD, StudyRecord, mend=_MEND)
    if record.inputs_sha256 != inputs_sha256:
        raise UserError(
            f"{out}: holds a study of another kind, model, text or machine; choose another output directory"
        )
    return record


def _check_conditions(out: Path, made: StudyRecord) -> None:
    """Refuse to add cells to those that another machine, or other versions, may have given other figures."""
    before: dict[str, object] = {"CPU": made.cpu, "threads": made.threads, **made.versions}
    now: dict[str, object] = {"CPU": cpu_model(), "threads": torch.get_num_threads(), **versions()}
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise UserError(
                f"{out}: its cells were measured with {name} {before.get(name)}, and here it is {now.get(name)}; "
                "measure the others as those were, or choose another output directory"
            )


def _read_known(out: Path) -> dict[str, CellRecord]:
    """The cells that were measured before, by key."""
    if not (out / CELLS).is_file():
        return {}
    try:
        lines = (out / CELLS).read_text(encoding="utf-8").splitlines()
        cells = [CellRecord.model_validate_json(line) for line in lines]
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{out / CELLS}: is damaged; {_MEND}") from error
    return {cell.key: cell for cell in cells}


class _Bench:
    """The dense model and its statistics, to measure one cell after the other."""

    def __init__(
        self,
        source: ModelSource,
        study: Study,
        windows: TokenWindows,
        evaluated: TokenWindows | None,
        asked: _Asked | None,
        out: Path,
        seed: int,
    ) -> None:
        self._out, self._seed = out, seed
        # 16 bits do not hold what is rounded.
        is_rounded = any(cell.precision is not None or cell.plan.is_rounded for cell in study.cells)
        self._model = load_model(source, torch.float32 if is_rounded else None)
        self.blocks = find_blocks(self._model)
        for text in (windows, evaluated):
            if text is not None:
                check_windows(text, vocabulary=self._model.config.vocab_size, context=context_length(self._model))
        self._weights = InMemory()
        self._ids = windows.ids
        self._evaluated = evaluated
        self._asked = asked
        self._lod_m = study.lod_m
        self._dense = measure_dense(self._model, self.blocks, self._ids, self._weights)
        self._means = [self._mean_score(block) for block in self.blocks] if study.lod_m else []

    def measure(self, cell: Cell, key: str) -> CellRecord:
        """Prune by the cell's plan, measure, and put the dense weights back."""
        watch = _Stopwatch()
        start = time.perf_counter()
        plan = cell.plan
        options: list[int | Rounded] = []
        with restored(self.blocks):
            with watch.running():
                if plan.allocation == "search":
                    plan = self._searched(plan)
                if cell.precision is not None:
                    options = options_of(cell.precision, self.blocks, self._weights, self._dense, plan.owl_m)
                    plan = with_options(plan, self.blocks, options)
                shares = allocate(plan, self.blocks, self._weights, self._dense)
            records = prune_blocks(
                self._model,
                self.blocks,
                plan,
                shares,
                ids=self._ids,
                dense=self._dense,
                weights=self._weights,
                timed=watch.running,
            )
            bits = round_to_nearest(self.blocks, options)
            if plan.is_rounded:
                bits = bits_per_weight(plan, records)
            lod = {f"{m:g}": self._lod(m) for m in self._lod_m}
            value, accuracies = None, list[TaskAccuracy]()
            if self._evaluated is not None or self._asked is not None:
                with in_fp32(self._model):  # as `prune --evaluate` does, whatever dtype the weights are stored in
                    if self._evaluated is not None:
                        value = perplexity(self._model, self._evaluated.ids)
                    if self._asked is not None:
                        accuracies = self._asked.tasks.accuracies(self._model, self._asked.tokenizer)
        return CellRecord(
            key=key,
            labels=cell.labels,
            plan=cell.plan.fields,
            sparsity_asked=cell.plan.sparsity,
            sparsity_achieved=sum(one.sparsity_achieved * one.weights for one in records)
            / sum(one.weights for one in records),
            linear_sparsities=linear_sparsities(records),
            perplexity=value,
            tasks=accuracies,
            lod_percent=lod,
            bits_per_weight=bits,
            metric_seconds=watch.seconds,
            metric_cpu_seconds=watch.cpu_seconds,
            seconds=time.perf_counter() - start,
        )

    def _searched(self, plan: PruningPlan) -> PruningPlan:
        """The plan with what a search chose; the pruned levels that it takes are gone after it."""
        with disk_errors(self._out), tempfile.TemporaryDirectory(prefix=".search-", dir=self._out) as kept:
            chosen, _ = search(
                self._model, self.blocks, plan, self._ids, self._weights, seed=self._seed, kept=Path(kept)
            )
        return chosen

    @torch.no_grad()
    def _mean_score(self, block: Block) -> float:
        with self._weights.held(block):
            return torch.cat([score.flatten() for score in self._dense.scores(block)]).mean().item()

    @torch.no_grad()
    def _lod(self, m: float) -> list[float]:
        """D of each block as it is now, from the inputs and mean scores of the dense model (paper, Table 2)."""
        found = []
        for block, mean in zip(self.blocks, self._means, strict=True):
            with self._weights.held(block):
                found.append(outlier_percent(self._dense.scores(block), m, mean=mean))
        return found


class _Stopwatch:
    """Wall-clock and CPU seconds, summed over all times it ran."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu


def _describe(
    source: ModelSource,
    study: Study,
    inputs: dict[str, object],
    blocks: Sequence[Block],
    windows: TokenWindows,
    evaluated: TokenWindows | None,
    asked: _Asked | None,
) -> StudyRecord:
    return StudyRecord(
        study=study.name,
        model=source.name,
        model_sha256=str(inputs["model"]),
        block_names=[block.name for block in blocks],
        calibration=windows.record,
        evaluation=evaluated.record if evaluated else None,
        tasks=asked.record if asked else None,
        threads=torch.get_num_threads(),
        cpu=cpu_model(),
        inputs_sha256=fingerprint(inputs),
        versions=versions(),
    )
