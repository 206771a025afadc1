"""Our end of a worker process: start it, ask it, pause it, and survive whatever becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from owl_deploy.engines.environments import THREADS, process_variables
from owl_deploy.engines.protocol import Logits
from owl_deploy.engines.registry import EngineSpec
from owl_deploy.errors import UserError, ending, last_lines

_WORKER = Path(__file__).with_name("worker.py")
_LAST_LINES = 3
REQUEST_TIMEOUT_S = 600.0


class EngineFailed(Exception):
    """The engine said no, died, or did not answer in time. The message says which, with its last lines."""


class EngineProcess:
    """One worker with one engine. A context manager: no process of either is left when it ends.

    What the engine starts is paused and ended with it, unless it leaves the worker's process group.

    Attributes:
        load_ms: what loading took, imports included; None before.
        facts: what the engine says of itself.
        memory_bytes: its resident memory when last measured.

    Raises:
        UserError: the engine's environment is not installed.
    """

    def __init__(self, spec: EngineSpec, threads: int) -> None:
        self.load_ms: float | None = None
        self.facts: dict[str, Any] = {}
        self.memory_bytes = 0
        if spec.environment is not None and not spec.environment.is_ready():
            raise UserError(f"engine {spec.name}: {spec.environment.problem()}")
        interpreter = str(spec.environment.interpreter) if spec.environment else sys.executable
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [interpreter, str(_WORKER), spec.module, spec.class_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=process_variables(spec.environment) | {THREADS: str(threads)},
            start_new_session=True,  # an interrupt at the terminal is ours to handle; and one group, see `_signal`
        )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(
        self,
        model: Path,
        *,
        threads: int,
        context: int,
        prompts: Sequence[int],
        batch: int = 1,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        """Load a model's file (see `names.model_file`)."""
        request = {"threads": threads, "context": context, "prompts": prompts, "batch": batch}
        answer = self.ask(do="load", model=str(model.absolute()), timeout_s=timeout_s, **request)
        self.load_ms, self.facts = answer["load_ms"], answer["facts"]

    def logits(self, ids: Sequence[int], *, timeout_s: float = REQUEST_TIMEOUT_S) -> tuple[Logits, Logits]:
        """See `probe.engine_logits`. They are too many for the pipe, and come in a file."""
        with tempfile.TemporaryDirectory(prefix="owl-deploy-") as folder:
            out = Path(folder) / "logits.npz"
            self.ask(timeout_s=timeout_s, do="logits", ids=list(ids), out=str(out))
            with np.load(out) as found:
                return found["at_once"], found["decoded"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def measure_memory(self) -> None:
        """Update `memory_bytes`."""
        self.memory_bytes = psutil.Process(self.pid).memory_info().rss

    def ask(self, *, timeout_s: float = REQUEST_TIMEOUT_S, **request: Any) -> Any:
        """Send one request and wait for its answer.

        Raises:
            EngineFailed: the engine refused it, ended, or took longer than `timeout_s`; it is then closed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline() if self._answers_within(timeout_s) else None
        except BrokenPipeError:
            line = ""
        if line is None:
            self.close()
            raise EngineFailed(f"no answer to '{request['do']}' in {timeout_s:.0f} s; the process was ended")
        if not line:
            self._end()
            raise EngineFailed(
                f"ended ({ending(self._process.returncode)}) during '{request['do']}': {self._last_words()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer["ok"]

    def pause(self) -> None:
        """Stop all its threads and processes: an idle engine takes nothing from the one being measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the worker and all that it started, whatever state they are in."""
        self._end()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._errors.close()

    def _end(self) -> None:
        # In this order: once the worker has been waited for, its group's number may become another's.
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """To the worker's whole group: whatever the engine started is in it."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # what macOS says of a group that has ended
                os.killpg(self.pid, number)

    def _answers_within(self, timeout_s: float) -> bool:
        with selectors.DefaultSelector() as selector:
            assert self._process.stdout is not None
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(timeout_s))

    def _last_words(self) -> str:
        self._errors.seek(0)
        return last_lines(self._errors.read(), _LAST_LINES) or "it said nothing"
