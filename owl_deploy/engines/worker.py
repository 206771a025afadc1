"""The process that owns one engine. Started as a script under the engine's own interpreter.

    python worker.py MODULE CLASS

Requests come as JSON lines on stdin, answers go as JSON lines to stdout: `{"ok": …}` or `{"error": …}`. Whatever
the engine itself prints goes to stderr. The process ends with its stdin, or with its parent.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import resource
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def _serve(module: str, class_name: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the engine's own printing must not mix with the answers
    os.register_at_fork(after_in_child=answers.close)  # or they would not end while what the engine forked runs
    worker = _Worker(module, class_name)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:  # every failure of an engine is an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Worker:
    """The requests, one method each; arguments and results are JSON."""

    def __init__(self, module: str, class_name: str) -> None:
        self._module = module
        self._class_name = class_name

    def load(self, model: str, threads: int, context: int, prompts: list[int], batch: int) -> dict[str, Any]:
        """Load the engine; its facts, and the milliseconds it took, imports included."""
        start = time.perf_counter()
        engine_class = getattr(importlib.import_module(self._module), self._class_name)
        self._engine = engine_class(Path(model), threads=threads, context=context, prompts=tuple(prompts), batch=batch)
        load_ms = (time.perf_counter() - start) * 1e3
        return {"load_ms": load_ms, "facts": self._engine.describe()}

    def logits(self, ids: list[int], out: str) -> None:
        """Save `engine_logits` as `at_once` and `decoded` in the .npz file `out`."""
        import numpy as np

        from owl_deploy.engines.probe import engine_logits

        at_once, decoded = engine_logits(self._engine, np.array(ids, np.int64))
        np.savez(out, at_once=at_once, decoded=decoded)

    def loss(self, ids: list[int]) -> float:
        """Mean cross-entropy of one window, in nats."""
        import numpy as np

        from owl_deploy.engines.probe import window_loss

        return window_loss(self._engine, np.array(ids, np.int64))

    def generate(
        self, prompts: list[list[int]], new_tokens: int, sampling: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One timed generation, greedy unless `sampling` (see `probe.Sampling`), and the process's peak memory so far.

        `prompts` [batch, length].
        """
        import numpy as np

        from owl_deploy.engines.probe import Sampling, timed_generation

        chosen = Sampling(**sampling) if sampling else None
        timed = timed_generation(self._engine, np.array(prompts, np.int64), new_tokens, chosen)
        return {**dataclasses.asdict(timed), "peak_rss_bytes": _peak_rss_bytes()}


def _peak_rss_bytes() -> int:
    """This process's own peak. Linux's `ru_maxrss` would begin at what its parent held when it was forked."""
    status = Path("/proc/self/status")
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _expose_engines() -> None:
    """Make `owl_deploy.engines` importable here without the rest of owl-deploy and what it requires.

    Only this package's own folder is looked in, not the site-packages around it, which may belong to another
    Python; and not this script's folder, whose modules would shadow the engines' own packages.
    """
    sys.path.pop(0)
    package = types.ModuleType("owl_deploy")
    package.__path__ = [str(Path(__file__).resolve().parent.parent)]
    sys.modules["owl_deploy"] = package


if __name__ == "__main__":
    _die_with_parent()
    _expose_engines()
    _serve(*sys.argv[1:])
