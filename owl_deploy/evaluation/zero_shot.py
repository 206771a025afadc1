"""Accuracy at zero-shot tasks: lm-eval's definitions and scoring, torch's log-likelihoods.

A task's data is read, and its prompts are made, once; then any number of models can be asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from owl_deploy.errors import UserError
from owl_deploy.evaluation.tasks import TaskAccuracy, TaskRequest
from owl_deploy.reporting import SILENT, Reporter

# Where lm-eval keeps the paper's tasks: looking through all of its folders takes longer than many an evaluation.
_FOLDERS = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
}
_READERS = {".jsonl": "json", ".parquet": "parquet"}
_BATCHES_PER_STEP = 16  # of the progress bar: lm-eval sorts by length within a step, so that batches are padded little


class ZeroShotTasks:
    """Tasks whose examples are read.

    Attributes:
        names: in the order of the request.
        sha256: over all prompts, answers and solutions: equal for equal examples, whatever file they came from.
    """

    def __init__(self, request: TaskRequest) -> None:
        """
        Raises:
            UserError: lm-eval knows no such task, it is not multiple choice, or its data cannot be had or read.
        """
        self.names = request.names
        self._batch_size = request.batch_size
        with _quiet():
            manager = _manager(request.names)
            self._tasks = {name: _load(manager, name, request) for name in request.names}
        self.examples = {name: len(_by_example(task)) for name, task in self._tasks.items()}
        digest = hashlib.sha256()
        for name, task in self._tasks.items():
            for examples in _by_example(task):
                asked = [name, [list(one.args) for one in examples], task.doc_to_target(examples[0].doc)]
                digest.update(json.dumps(asked).encode() + b"\n")
        self.sha256 = digest.hexdigest()

    def accuracies(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reporter: Reporter = SILENT
    ) -> list[TaskAccuracy]:
        """How `model` does at each task, in its own dtype.

        Raises:
            UserError: the tokenizer knows no token that may stand before a text.
        """
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError("the model's tokenizer has neither a BOS nor an EOS token, and lm-eval needs one")
        with _quiet():
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self._batch_size)
        return [self._accuracy(name, lm, reporter) for name in self.names]

    def _accuracy(self, name: str, lm: Any, reporter: Reporter) -> TaskAccuracy:
        task = self._tasks[name]
        requests = task.instances
        step = _BATCHES_PER_STEP * self._batch_size
        answers: dict[int, tuple[float, bool]] = {}  # log-likelihood, and whether it is the greedy one, by request
        for start in reporter.track(range(0, len(requests), step), name):
            chunk = requests[start : start + step]
            answers |= zip(map(id, chunk), lm.loglikelihood(chunk, disable_tqdm=True), strict=True)
        scores = [
            task.process_results(examples[0].doc, [answers[id(one)] for one in examples])
            for examples in _by_example(task)
        ]
        acc, acc_stderr = _mean([score["acc"] for score in scores])
        normed = [score["acc_norm"] for score in scores if "acc_norm" in score]
        return TaskAccuracy(name, len(scores), acc, acc_stderr, *(_mean(normed) if normed else ()))


def _by_example(task: Any) -> list[list[Any]]:
    """lm-eval's requests, one for each answer, by the example they belong to."""
    return [list(group) for _, group in groupby(task.instances, key=lambda one: one.doc_id)]


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, from the sample's deviation."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def _manager(names: Sequence[str]) -> TaskManager:
    """What knows these tasks.

    Raises:
        UserError: none does.
    """
    root = Path(lm_eval.tasks.__file__).parent
    if set(names) <= set(_FOLDERS):
        folders = list(dict.fromkeys(root / _FOLDERS[name] for name in names))
        manager = TaskManager(include_path=folders, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager()
    for name in names:
        if name not in manager.all_subtasks:
            raise UserError(
                f"--tasks: lm-eval knows no task {name!r}, or it is a group; the paper's are {', '.join(_FOLDERS)}"
            )
    return manager


def _load(manager: TaskManager, name: str, request: TaskRequest) -> Any:
    """lm-eval's task with its prompts made.

    Raises:
        UserError: its data cannot be had or read, or it is not scored by accuracy.
    """
    path = request.data.get(name)
    try:
        # Only in a group are settings of ours laid over those of lm-eval's own task.
        spec = {"group": "local", "task": [{"task": name, **_local(path)}]} if path else name
        task = manager.load([spec])["tasks"][name]
        if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in task.aggregation():
            raise UserError(f"--tasks: {name} is not a multiple choice; {', '.join(_FOLDERS)} are")
        task.build_all_requests(limit=request.limit)
    except UserError:
        raise
    except Exception as error:  # whatever `datasets`, the network, and lm-eval's templates on other columns raise
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if path is None:
            raise UserError(
                f"{name}: its data cannot be had ({reason}); give a local file with --task-data {name}=FILE"
            ) from error
        raise UserError(f"{path}: does not hold examples of {name} ({reason})") from error
    return task


def _local(path: Path) -> Mapping[str, object]:
    """What makes lm-eval read a task's examples from a file, as it would those of the hub."""
    files = {"validation": str(path)}
    splits = {"training_split": None, "validation_split": "validation", "test_split": None, "fewshot_split": None}
    return {
        "dataset_path": _READERS[path.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **splits,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stderr from lm-eval and `datasets`: what goes wrong they raise."""
    datasets.disable_progress_bars()
    for logger in ("lm_eval", "datasets"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    with contextlib.redirect_stderr(io.StringIO()):
        yield
