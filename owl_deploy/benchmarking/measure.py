"""Measure engines on bundles: checked first, then timed in interleaved rounds, every sample kept.

A round times every engine on one bundle and, for comparison, on the dense one: ratios are taken within a round,
where all met the same machine. Measurements go to `measurements.jsonl` as they are made, so that a killed run loses
at most the round it was in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from owl_deploy.benchmarking.checks import ParityCheck
from owl_deploy.benchmarking.log import Log
from owl_deploy.benchmarking.processes import Load, Processes
from owl_deploy.benchmarking.workload import Configuration, Workload
from owl_deploy.bundle.lineage import baseline_of
from owl_deploy.engines.client import REQUEST_TIMEOUT_S, EngineFailed, EngineProcess
from owl_deploy.errors import CheckFailed, DiskError, UserError
from owl_deploy.evaluation.perplexity import perplexity_of
from owl_deploy.machine.description import busy_cores, load_average
from owl_deploy.reporting import Reporter

_WARM_UP_TOKENS = 8
_QUIET_S = 0.5  # how long the machine is watched, while every engine is paused, …
_QUIET_TRIES = 10  # … and how often, before it counts as busy


class Bench:
    """One run over several configurations: first `run`, then ask for what was measured."""

    def __init__(
        self,
        configurations: Sequence[Configuration],
        workload: Workload,
        log: Log,
        processes: Processes,
        *,
        max_load: float,
        timeout_s: float = REQUEST_TIMEOUT_S,
        alone: Callable[[], object] = lambda: None,
        reporter: Reporter,
    ) -> None:
        """
        Args:
            processes: where engines stay loaded.
            max_load: how many cores other processes may keep busy before measuring is refused.
            timeout_s: how long an engine may take to answer before it counts as hung.
            alone: called before each round; returns when the caller has ended its own work beside ours.
        """
        self.configurations = configurations
        self._workload = workload
        self._log = log
        self._max_load = max_load
        self._timeout_s = timeout_s
        self._alone = alone
        self._reporter = reporter
        self._errors: dict[str, str] = {}
        self._processes = processes
        self._load_before = self._other_load = 0.0
        self._has_timed = False
        self._parity = ParityCheck(
            configurations,
            workload,
            running=partial(self._running, batch=1),
            has_failed=lambda item: item.name in self._errors,
            timeout_s=timeout_s,
        )

    def run(self) -> None:
        """Check and time every configuration, as far as the log does not hold it yet.

        Raises:
            UserError: the machine is busy with other work.
        """
        groups = [group for group in self._groups() if not self._is_done(group)]
        steps = sum(len(group) for group in groups) * self._workload.repetitions
        for step in self._reporter.track(self._steps(groups), "measuring", steps) if groups else ():
            step()

    def setup(self, configuration: Configuration) -> dict[str, Any] | None:
        """Facts, perplexity and parity of a configuration; None if it failed."""
        entries = self._log.of(configuration.key(self._workload.checks_fingerprint()), "setup")
        return entries[-1] if entries else None

    def error(self, configuration: Configuration) -> str | None:
        """Why a configuration could not be measured."""
        return self._errors.get(configuration.name)

    def rounds(self, configuration: Configuration) -> dict[str, dict[str, Any]]:
        """The samples of each round the configuration was in, by the round's name."""
        wanted = {name for group in self._groups() for name in self._round_names(group)}
        entries = self._log.of(configuration.key(self._workload.fingerprint()), "round")
        return {entry["round"]: entry for entry in entries if entry["round"] in wanted}

    def _groups(self) -> list[list[Configuration]]:
        """What is timed in one round: the engines on one bundle, and again on the dense one they are compared with.

        Few enough to stay loaded together, which all levels of a sweep would not.
        """
        of_bundle: dict[Path, list[Configuration]] = {}
        for item in self.configurations:
            of_bundle.setdefault(item.bundle, []).append(item)
        dense = {bundle: items[0].manifest for bundle, items in of_bundle.items() if items[0].manifest.is_dense}
        first = next(iter(dense), None)
        groups = []
        for bundle, items in of_bundle.items():
            baseline = baseline_of(items[0].manifest, dense.values())
            # A dense model that is its own baseline is timed beside the first one.
            beside = next((other for other in dense if dense[other] is baseline and other != bundle), first)
            if bundle != first:
                groups.append((of_bundle[beside] if beside is not None else []) + items)
        return groups or list(of_bundle.values())

    def _round_names(self, group: list[Configuration]) -> list[str]:
        """The rounds of a level; the dense row's samples are told apart by them."""
        level = group[-1].manifest.checkpoint_sha256[:12]
        return [f"{level} {number}" for number in range(self._workload.repetitions)]

    def _missing_rounds(self, group: list[Configuration]) -> list[str]:
        """Rounds that some engine was not in, failed ones apart. One that was cut short is measured anew, all of it."""
        working = [item for item in group if item.name not in self._errors]
        if not any(item.bundle == group[-1].bundle for item in working):
            return []  # nothing to compare with the dense model
        there = [self.rounds(item).keys() for item in working]
        return [name for name in self._round_names(group) if not all(name in names for names in there)]

    def _is_done(self, group: list[Configuration]) -> bool:
        return all(self.setup(item) is not None for item in group) and not self._missing_rounds(group)

    def _steps(self, groups: list[list[Configuration]]) -> Iterator[Callable[[], None]]:
        """One step for every working engine in every round, each made ready when the one before is done."""
        for group in groups:
            for item in group:
                if self.setup(item) is None and item.name not in self._errors:  # as part of another group
                    self._check(item)
            for name in self._missing_rounds(group):
                self._alone()
                self._wait_for_quiet()
                for item in group:
                    yield partial(self._time, item, name)
            self._processes.end(group[-1].bundle)

    @contextlib.contextmanager
    def _failures_of(self, configuration: Configuration) -> Iterator[None]:
        """What goes wrong with one engine becomes its row's error; the others go on."""
        try:
            yield
        except DiskError:  # no fault of the engine, and the others would meet it too
            raise
        except (EngineFailed, CheckFailed, UserError) as error:
            self._errors[configuration.name] = str(error)
            self._reporter.warn(f"{configuration.name}: {error}")

    def _check(self, configuration: Configuration) -> None:
        """See that the engine computes what the checkpoint computes, and at what perplexity."""
        workload = self._workload
        with self._failures_of(configuration), self._running(configuration, batch=1) as process:
            parity = self._parity.of(configuration, process)
            perplexity = None
            if workload.windows is not None:
                losses = [self._ask(process, do="loss", ids=window.tolist()) for window in workload.windows]
                perplexity = perplexity_of(losses)
            self._log.append(
                kind="setup",
                key=configuration.key(workload.checks_fingerprint()),
                name=configuration.name,
                facts=process.facts,
                perplexity=perplexity,
                parity=parity.model_dump(),
            )

    def _wait_for_quiet(self) -> None:
        """Let a moment's work of other processes pass, all our engines paused, and note what is left of it.

        Raises:
            UserError: it does not pass, and nothing was measured yet that would be lost.
        """
        for _ in range(_QUIET_TRIES):
            self._load_before, self._other_load = load_average(), busy_cores(_QUIET_S)
            if self._other_load <= self._max_load:
                return
        message = f"other processes keep {self._other_load:.1f} cores busy (limit {self._max_load:g})"
        if not self._has_timed:
            raise UserError(f"{message}; stop them, or allow it with --max-load")
        self._reporter.warn(message)

    def _time(self, configuration: Configuration, round_name: str) -> None:
        """One generation, in a process that was warmed up and meets no other engine of ours at work."""
        if configuration.name in self._errors:
            return
        workload = self._workload
        with self._failures_of(configuration), self._running(configuration, batch=workload.batch) as process:
            prompts, new_tokens = workload.batched_prompts, workload.new_tokens
            samples = self._ask(process, do="generate", prompts=prompts, new_tokens=new_tokens)
            self._has_timed = True
            end_to_end_ms = None
            if workload.end_to_end is not None:
                end_to_end_ms = workload.end_to_end.run(partial(self._ask, process), new_tokens)
            process.measure_memory()
            self._log.append(
                kind="round",
                key=configuration.key(workload.fingerprint()),
                name=configuration.name,
                round=round_name,
                load_ms=process.load_ms,
                load_average=[self._load_before, load_average()],
                other_load_cores=self._other_load,
                rss_bytes=process.memory_bytes,
                process=process.pid,
                end_to_end_ms=end_to_end_ms,
                **samples,
            )

    def _ask(self, process: EngineProcess, **request: Any) -> Any:
        return process.ask(timeout_s=self._timeout_s, **request)

    def _running(self, configuration: Configuration, *, batch: int) -> contextlib.AbstractContextManager[EngineProcess]:
        """The configuration's process, loaded and warm."""
        workload = self._workload
        prompts = workload.batched_prompts if batch > 1 else [workload.prompt]
        load = Load(
            configuration.spec,
            configuration.graph,
            threads=workload.threads,
            context=max(workload.context, configuration.tokens_to_check),
            prompts=workload.prompts,
            batch=batch,
        )
        warm_up = partial(self._ask, do="generate", prompts=prompts, new_tokens=_WARM_UP_TOKENS)
        return self._processes.running(load, timeout_s=self._timeout_s, warm_up=warm_up)
