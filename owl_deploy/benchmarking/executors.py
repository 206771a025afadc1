"""Where the levels of a sweep are made: one after the other here, or side by side on a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import owl_deploy
from owl_deploy.errors import UserError, first_line
from owl_deploy.reporting import SILENT, Reporter

LevelT = TypeVar("LevelT")
ResultT = TypeVar("ResultT")
T = TypeVar("T")
Make = Callable[[LevelT, Reporter], ResultT]

_RETRIES = 3
_POLL_S = 0.2
_KNOCK_S = 5.0


def run_here(make: Make[LevelT, ResultT], levels: Iterable[LevelT], reporter: Reporter) -> list[ResultT]:
    """Make every level in this process, in order."""
    return [make(level, reporter) for level in levels]


def run_on_ray(
    make: Make[LevelT, ResultT],
    levels: Iterable[LevelT],
    reporter: Reporter,
    *,
    address: str | None = None,
    threads: int = 1,
) -> list[ResultT]:
    """Make the levels as tasks of a Ray cluster; the results in the order of the levels.

    What the workers report is shown here. The level of a worker that is lost is made again, by another one, from
    what was finished of it on the file system, which all workers must share.

    Args:
        address: of a running cluster; None starts one on this machine.
        threads: torch's threads in each task, and so the cores it takes.

    Raises:
        UserError: Ray is not installed or not to be reached, or what a level raised.
    """
    ray = _ray()
    _connect(ray, address)
    try:
        mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
        task = ray.remote(num_cpus=threads, max_retries=_RETRIES)(_make_on_worker)
        references = [task.remote(make, level, mailbox, threads) for level in levels]
        pending = list(references)
        while pending:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_S)
            for line in ray.get(mailbox.take.remote()):
                reporter.step(line)
        try:
            return list(ray.get(references))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.WorkerCrashedError as error:
            raise UserError(f"a level's worker was lost {_RETRIES + 1} times; has it enough memory?") from error
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray: Ray is not installed; run: pip install 'owl-deploy[ray]'") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    code = str(Path(owl_deploy.__file__).parents[1])
    search_path = os.pathsep.join(part for part in (code, os.environ.get("PYTHONPATH")) if part)
    # On a cluster of its own, workers are as urgent as any process: Ray's 15 starves them where others compute.
    own = {"include_dashboard": False, "_system_config": {"worker_niceness": 0}} if address is None else {}
    try:
        _knock(address)
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": search_path}},
            **own,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"--ray-address {address}: no Ray cluster can be reached there ({reason})") from error


def _knock(address: str | None) -> None:
    """Fail at once where nothing listens at HOST:PORT; Ray would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()


class _Mailbox:
    """An actor that keeps the lines of all workers until they are shown."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def put(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


class _Posting(Reporter):
    """Reports into the mailbox, each line under the level's name."""

    def __init__(self, mailbox: Any, name: str) -> None:
        super().__init__(quiet=True)
        self._mailbox = mailbox
        self._name = name

    def step(self, message: str) -> None:
        # Waited for: a line still on its way when its level is done would miss the last emptying of the mailbox.
        _ray().get(self._mailbox.put.remote(f"{self._name}: {message}"))

    def warn(self, message: str) -> None:
        self.step(f"warning: {message}")

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        self.step(description)
        yield from SILENT.track(items, description, total)
        self.step(f"{description}: done")


def _make_on_worker(make: Make[LevelT, ResultT], level: LevelT, mailbox: Any, threads: int) -> ResultT:
    import torch

    torch.set_num_threads(threads)
    return make(level, _Posting(mailbox, str(level)))
