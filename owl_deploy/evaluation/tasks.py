"""What zero-shot tasks are asked for, and how a model did at them; `zero_shot` measures it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from owl_deploy.errors import UserError
from owl_deploy.paper.tables import TABLE_5_TASKS

DEFAULT_BATCH = 16
_FORMATS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class TaskRequest:
    """Which tasks to evaluate.

    Attributes:
        names: lm-eval's.
        data: local files in place of the hub's data set, by task.
        limit: examples of each task, from its beginning; None for all.
        batch_size: sequences that the model computes at once.
    """

    names: tuple[str, ...]
    data: Mapping[str, Path] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = DEFAULT_BATCH


@dataclass(frozen=True)
class TaskAccuracy:
    """How a model did at one task.

    Attributes:
        examples: how many were asked.
        acc: the fraction whose right answer has the highest log-likelihood.
        acc_norm: the same with each log-likelihood divided by the answer's characters; None where the task has none.
        acc_stderr, acc_norm_stderr: standard errors of these means; None for one example.
    """

    task: str
    examples: int
    acc: float
    acc_stderr: float | None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None

    def __str__(self) -> str:
        figures = [_figure("acc", self.acc, self.acc_stderr)]
        if self.acc_norm is not None:
            figures.append(_figure("acc_norm", self.acc_norm, self.acc_norm_stderr))
        return f"{self.task}: {', '.join(figures)} ({self.examples} examples)"

    @property
    def headline(self) -> float:
        """The figure that stands for the task: normalised where it has one."""
        return self.acc if self.acc_norm is None else self.acc_norm

    @property
    def headline_stderr(self) -> float | None:
        return self.acc_stderr if self.acc_norm is None else self.acc_norm_stderr


def _figure(name: str, value: float, error: float | None) -> str:
    return f"{name} {value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def parse_tasks(
    names: str, data: Sequence[str] = (), limit: int | None = None, batch_size: int = DEFAULT_BATCH
) -> TaskRequest:
    """`hellaswag,boolq` and `hellaswag=FILE` -> a request.

    Raises:
        UserError: lm-eval is not installed; an empty name; or a file that is not there, not of a known format, or of no
            task that was asked for.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("zero-shot tasks need lm-eval; install it with: pip install 'owl-deploy[tasks]'")
    wanted = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    if not all(wanted):
        raise UserError(f"--tasks {names}: give names with commas between them, for example {','.join(TABLE_5_TASKS)}")
    files: dict[str, Path] = {}
    for text in data:
        name, _, file = text.partition("=")
        path = Path(file).expanduser()
        if name not in wanted:
            raise UserError(f"--task-data {text}: give TASK=FILE, with one of the tasks asked for: {', '.join(wanted)}")
        if path.suffix not in _FORMATS:
            raise UserError(f"--task-data {text}: the file must end in {' or '.join(_FORMATS)}")
        if not path.is_file():
            raise UserError(f"--task-data {text}: no such file")
        files[name] = path
    return TaskRequest(wanted, files, limit, batch_size)
