"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from owl_deploy.errors import UserError
from owl_deploy.machine.threads import available_cores

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Threads = Annotated[Optional[int], typer.Option(min=1, help="CPU threads. Default: all cores this process may use.")]
Calibration = Annotated[
    str,
    typer.Option(help="Text to calibrate on: c4, wikitext2, demo, a .txt, .jsonl or .parquet file, or a .npy of ids."),
]
Samples = Annotated[Optional[int], typer.Option(min=1, help="Calibration windows. Default: 128.")]
Method = Annotated[
    Optional[str],
    typer.Option(
        help="Which weights go: wanda (default), sparsegpt, admm, ria, wanda-variant, magnitude, ablate-magnitude or "
        "ablate-wanda."
    ),
]
OwlM = Annotated[Optional[float], typer.Option(help="OWL: outliers exceed M times the mean. Default: 5.")]
HalfRange = Annotated[
    Optional[float],
    typer.Option(
        "--lambda",
        "--owl-lambda",
        help="Half the range of block sparsities: owl's lambda (default 0.08), dlp's alpha (0.15), linear's slope "
        "(0 up to 50%, 0.0725 at 60%, 0.1 at 70%, 0.09 from 80% on).",
    ),
]
Seqlen = Annotated[Optional[int], typer.Option(min=2, help="Tokens per window. Default: 2048.")]
EvaluateWindows = Annotated[Optional[int], typer.Option(min=1, help="Evaluate on this many windows only.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of calibration windows.")]
TaskData = Annotated[
    Optional[list[str]],
    typer.Option(
        metavar="TASK=FILE",
        help="Read a task's examples from a .jsonl or .parquet file, with its hub data set's columns. Repeatable.",
    ),
]
Limit = Annotated[Optional[int], typer.Option(min=1, help="Ask only this many examples of each task. Default: all.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences of a task that are computed at once.")]

MODEL_HELP = "Hub id, local directory, .gguf file, or `demo` (SmolLM2-135M-Instruct from the demo extra)."


def integers(text: str, option: str) -> tuple[int, ...]:
    """The numbers of a comma-separated list, in order, each once.

    Raises:
        UserError: one is not a positive whole number.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(name.isascii() and name.isdecimal() and int(name) > 0 for name in names):
        raise UserError(f"{option} {text}: give positive whole numbers, for example 1,512")
    return tuple(sorted({int(name) for name in names}))


def need_tasks(**given: object) -> None:
    """Refuse options that say something of tasks where none are asked for.

    Raises:
        UserError: one was given.
    """
    for name, value in given.items():
        if value:
            raise UserError(f"--{name.replace('_', '-')} is of --tasks; give some, or leave it out")


def use_threads(threads: int | None) -> None:
    """Let torch compute on this many threads; by default on as many as it would, and the process has cores."""
    import torch

    torch.set_num_threads(threads or min(torch.get_num_threads(), available_cores()))
