"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from owl_deploy.errors import UserError
from owl_deploy.machine.threads import available_cores

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on stderr.")]
Threads = Annotated[Optional[int], typer.Option(min=1, help="CPU threads. Default: all cores this process may use.")]
Calibration = Annotated[
    str,
    typer.Option(help="Text to calibrate on: c4, wikitext2, demo, a .txt, .jsonl or .parquet file, or a .npy of ids."),
]
Samples = Annotated[Optional[int], typer.Option(min=1, help="Calibration windows. Default: 128.")]
Method = Annotated[
    Optional[str],
    typer.Option(
        help="Pruning method: wanda (default), sparsegpt, admm, ria, wanda-variant, magnitude, ablate-magnitude or "
        "ablate-wanda."
    ),
]
OwlM = Annotated[
    Optional[float], typer.Option(help="OWL's M: an outlier's score exceeds M times the mean of its block. Default: 5.")
]
HalfRange = Annotated[
    Optional[float],
    typer.Option(
        "--lambda",
        "--owl-lambda",
        help="Half the range of block sparsities: lambda of owl (default 0.08), alpha of dlp (0.15) or slope of linear "
        "(0 up to 50%, 0.0725 at 60%, 0.1 at 70%, 0.09 from 80% on).",
    ),
]
Seqlen = Annotated[Optional[int], typer.Option(min=2, help="Tokens per window. Default: 2048.")]
EvaluateWindows = Annotated[
    Optional[int], typer.Option(min=1, help="Evaluate on only this many windows. Default: all.")
]
Seed = Annotated[int, typer.Option(help="Seed by which calibration windows are chosen.")]
TaskData = Annotated[
    Optional[list[str]],
    typer.Option(
        metavar="TASK=FILE",
        help="Read the examples of a task from a .jsonl or .parquet file with the columns of its data set on the hub. "
        "May be repeated.",
    ),
]
Limit = Annotated[
    Optional[int], typer.Option(min=1, help="Use only the first examples of each task, this many. Default: all.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences of a task in one batch.")]

MODEL_HELP = "Hub id, local directory, .gguf file, or `demo` (SmolLM2-135M-Instruct from the demo extra)."


def integers(text: str, option: str) -> tuple[int, ...]:
    """The numbers of a comma-separated list, ascending, without repeats.

    Raises:
        UserError: one is not a positive whole number.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(name.isascii() and name.isdecimal() and int(name) > 0 for name in names):
        raise UserError(f"{option} {text}: give positive whole numbers, for example 1,512")
    return tuple(sorted({int(name) for name in names}))


def need_tasks(**given: object) -> None:
    """Refuse options about tasks if there are no tasks.

    Raises:
        UserError: one was given.
    """
    for name, value in given.items():
        if value:
            raise UserError(f"--{name.replace('_', '-')} needs --tasks; add it, or leave this out")


def use_threads(threads: int | None) -> None:
    """Let torch compute on this many threads; by default on as many as it would, and the process has cores."""
    import torch

    torch.set_num_threads(threads or min(torch.get_num_threads(), available_cores()))
