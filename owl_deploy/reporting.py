"""How long work tells the user where it is: steps, and bars with the time left, on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


class Reporter:
    """Prints to stderr, so that stdout stays for results; `quiet` prints nothing at all."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def step(self, message: str) -> None:
        """One line: something was started, skipped or finished."""
        self.console.print(message, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """One line that the user should not miss."""
        self.console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` behind a progress bar with the time left; one summary line where there is no terminal."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        with bar:
            yield from bar.track(items, total=total, description=description)


SILENT = Reporter(quiet=True)
