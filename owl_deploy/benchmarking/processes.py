"""Engine processes that stay loaded, paused while another is at work, as long as they fit in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from owl_deploy.engines.client import EngineProcess
from owl_deploy.engines.registry import EngineSpec

_MEMORY_SHARE = 0.8  # of what was free: engines stay loaded as long as they fit in it together


@dataclass(frozen=True)
class Load:
    """An engine with a model, made for sequences of up to `context` tokens and prompts of these lengths."""

    spec: EngineSpec
    model: Path
    threads: int
    context: int
    prompts: tuple[int, ...]
    batch: int

    @property
    def bytes(self) -> int:
        """Of its files: about what it will take."""
        return sum(file.stat().st_size for file in self.model.parent.rglob("*") if file.is_file())


class Processes:
    """Idle engine processes by what they hold. A context manager: none is left when it ends."""

    def __init__(self) -> None:
        self._idle: dict[Load, EngineProcess] = {}
        self._budget_bytes = int(_MEMORY_SHARE * psutil.virtual_memory().available)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep(0)

    @contextlib.contextmanager
    def running(
        self, load: Load, *, timeout_s: float, warm_up: Callable[[EngineProcess], object]
    ) -> Iterator[EngineProcess]:
        """The process that holds `load`, started and warm; afterwards it is paused. Where memory is short, some end.

        Raises:
            EngineFailed: it cannot be loaded. Whatever is raised while it runs ends it.
        """
        process = self._idle.pop(load, None)
        try:
            if process is None:
                self.keep(self._budget_bytes - load.bytes)
                process = EngineProcess(load.spec, load.threads)
                process.load(
                    load.model,
                    threads=load.threads,
                    context=load.context,
                    prompts=load.prompts,
                    batch=load.batch,
                    timeout_s=timeout_s,
                )
                warm_up(process)
            else:
                process.resume()
            yield process
            process.measure_memory()
        except BaseException:
            if process is not None:
                process.close()
            raise
        process.pause()
        self._idle[load] = process
        self.keep(self._budget_bytes)

    def keep(self, budget_bytes: int) -> None:
        """End idle processes until the rest fit in so much memory, those first that are soon loaded again."""
        for load, process in sorted(self._idle.items(), key=lambda item: item[1].load_ms or 0.0):
            if sum(idle.memory_bytes for idle in self._idle.values()) <= budget_bytes:
                return
            del self._idle[load]
            process.close()

    def end(self, directory: Path) -> None:
        """End the idle processes of models in this directory."""
        for load in [load for load in self._idle if load.model.is_relative_to(directory)]:
            self._idle.pop(load).close()
