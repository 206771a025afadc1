"""How long work tells the user where it is: steps, and bars with the time left, on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sized
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
        with self._bar() as bar:
            yield from bar.track(items, total=total, description=description)

    @contextlib.contextmanager
    def progress(self, total: int, description: str, *, done: int = 0) -> Iterator[Callable[[str], None]]:
        """A bar with the time left; each call moves it on by one, and shows how that one went."""
        with self._bar() as bar:
            task = bar.add_task(description, total=total, completed=done)
            yield lambda how: bar.update(task, advance=1, description=f"{description}: {how}")

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )


SILENT = Reporter(quiet=True)


class Clock:
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
