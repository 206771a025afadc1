"""Measure engines on bundles: checked first, then timed in interleaved rounds, every sample kept.

A round times every engine on one bundle and, for comparison, on the dense one: ratios are taken within a round,
where all met the same machine. Measurements go to `measurements.jsonl` as they are made, so that a killed run loses
at most the round it was in.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from owl_deploy.bench.machine import available_cores, busy_cores, cpu_model, load_average
from owl_deploy.engines.client import EngineFailed, EngineProcess
from owl_deploy.engines.probe import DECODED_TOKENS
from owl_deploy.engines.registry import EngineSpec, engine_spec
from owl_deploy.errors import CheckFailed, UserError
from owl_deploy.evaluation.perplexity import perplexity_of
from owl_deploy.export.bundle import GRAPH, BundleManifest, FlavorRecord
from owl_deploy.export.names import Flavor
from owl_deploy.export.parity import ParityRecord, compare
from owl_deploy.files import disk_errors, write_text
from owl_deploy.pruning.manifest import fingerprint
from owl_deploy.reporting import Reporter

MEASUREMENTS = "measurements.jsonl"
_WARM_UP_TOKENS = 8
_QUIET_S = 0.5  # how long the machine is watched, while every engine is paused, …
_QUIET_TRIES = 10  # … and how often, before it counts as busy
_MEMORY_SHARE = 0.7  # of what was free: idle engines stay loaded as long as they fit in it


@dataclass(frozen=True)
class Workload:
    """What each engine is timed on: a prompt, then greedy decoding.

    Attributes:
        prompt: token ids.
        windows: evaluation windows [n, length] for perplexity, or None.
        text: where these came from.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    threads: int
    repetitions: int
    windows: NDArray[np.int64] | None
    text: str | None

    @property
    def context(self) -> int:
        longest = 0 if self.windows is None else self.windows.shape[1]
        return max(len(self.prompt) + max(self.new_tokens, DECODED_TOKENS), longest)

    @property
    def prompts(self) -> list[int]:
        """Lengths that are prefilled."""
        return sorted({len(self.prompt)} | ({self.windows.shape[1]} if self.windows is not None else set()))

    def fingerprint(self) -> str:
        windows = None if self.windows is None else self.windows.tolist()
        return fingerprint([self.prompt, self.new_tokens, self.threads, windows])


@dataclass(frozen=True)
class Configuration:
    """One engine on one bundle's graph of one flavor."""

    spec: EngineSpec
    bundle: Path
    manifest: BundleManifest
    flavor: Flavor

    @property
    def name(self) -> str:
        return f"{self.spec.name} {self.bundle}"

    @property
    def graph(self) -> Path:
        return self.bundle / self.flavor / GRAPH

    @property
    def record(self) -> FlavorRecord:
        return self.manifest.flavors[self.flavor]

    def key(self, workload: Workload) -> str:
        """Equal for measurements that may stand for each other: same graph, engine, workload and machine."""
        files = [file.sha256 for file in self.record.files]
        environment = self.spec.environment.requirements if self.spec.environment else self.manifest.versions
        machine = [cpu_model(), available_cores()]
        return fingerprint([self.spec.name, environment, self.flavor, files, workload.fingerprint(), machine])


class Log:
    """`measurements.jsonl`: appended line by line, read back on the next run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # a kill cut the last line short
                write_text(path, whole)
            self._lines = [json.loads(line) for line in whole.splitlines()]

    def append(self, **entry: Any) -> None:
        self._lines.append(entry)
        with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def of(self, key: str, kind: str) -> list[dict[str, Any]]:
        """All entries of one configuration and kind, oldest first."""
        return [line for line in self._lines if line["key"] == key and line["kind"] == kind]


class Bench:
    """One run over several configurations: first `run`, then ask for what was measured."""

    def __init__(
        self,
        configurations: Sequence[Configuration],
        workload: Workload,
        log: Log,
        *,
        max_load: float,
        reporter: Reporter,
    ) -> None:
        """`max_load` is how many cores other processes may keep busy before measuring is refused."""
        self.configurations = configurations
        self._workload = workload
        self._log = log
        self._max_load = max_load
        self._reporter = reporter
        self._errors: dict[str, str] = {}
        self._idle: dict[str, EngineProcess] = {}
        self._load_before = self._other_load = 0.0
        self._has_timed = False
        self._budget_bytes = int(_MEMORY_SHARE * psutil.virtual_memory().available)

    def run(self) -> None:
        """Check and time every configuration, as far as the log does not hold it yet.

        Raises:
            UserError: the machine is busy with other work.
        """
        groups = [group for group in self._groups() if not self._is_done(group)]
        steps = sum(len(group) for group in groups) * self._workload.repetitions
        try:
            for step in self._reporter.track(self._steps(groups), "measuring", steps) if groups else ():
                step()
        finally:
            for process in self._idle.values():
                process.close()

    def setup(self, configuration: Configuration) -> dict[str, Any] | None:
        """Facts, perplexity and parity of a configuration; None if it failed."""
        entries = self._log.of(configuration.key(self._workload), "setup")
        return entries[-1] if entries else None

    def error(self, configuration: Configuration) -> str | None:
        """Why a configuration could not be measured."""
        return self._errors.get(configuration.name)

    def rounds(self, configuration: Configuration) -> dict[str, dict[str, Any]]:
        """The samples of each round the configuration was in, by the round's name."""
        wanted = {name for group in self._groups() for name in self._round_names(group)}
        entries = self._log.of(configuration.key(self._workload), "round")
        return {entry["round"]: entry for entry in entries if entry["round"] in wanted}

    def _groups(self) -> list[list[Configuration]]:
        """What is timed in one round: the engines on one bundle, and again on the dense one they are compared with.

        Few enough to stay loaded together, which all levels of a sweep would not.
        """
        bundles = list(dict.fromkeys(item.bundle for item in self.configurations))
        of_bundle = {bundle: [item for item in self.configurations if item.bundle == bundle] for bundle in bundles}
        dense = next((bundle for bundle in bundles if of_bundle[bundle][0].manifest.is_dense), None)
        others = [bundle for bundle in bundles if bundle != dense]
        baseline = of_bundle[dense] if dense else []
        return [baseline + of_bundle[bundle] for bundle in others] or [baseline]

    def _round_names(self, group: list[Configuration]) -> list[str]:
        """The rounds of a level; the dense row's samples are told apart by them."""
        level = group[-1].manifest.checkpoint_sha256[:12]
        return [f"{level} {number}" for number in range(self._workload.repetitions)]

    def _missing_rounds(self, group: list[Configuration]) -> list[str]:
        """Rounds that some engine was not in, failed ones apart. One that was cut short is measured anew, all of it."""
        working = [item for item in group if item.name not in self._errors]
        if not any(item.bundle == group[-1].bundle for item in working):
            return []  # nothing to compare with the dense model
        return [name for name in self._round_names(group) if not all(name in self.rounds(item) for item in working)]

    def _is_done(self, group: list[Configuration]) -> bool:
        return all(self.setup(item) is not None for item in group) and not self._missing_rounds(group)

    def _steps(self, groups: list[list[Configuration]]) -> Iterator[Callable[[], None]]:
        """One step for every working engine in every round, each made ready when the one before is done."""
        for group in groups:
            for item in group:
                if self.setup(item) is None and item.name not in self._errors:  # as part of another group
                    self._check(item)
            for name in self._missing_rounds(group):
                self._wait_for_quiet()
                for item in group:
                    yield partial(self._time, item, name)
            self._unload(group[-1].bundle)

    @contextlib.contextmanager
    def _failures_of(self, configuration: Configuration) -> Iterator[None]:
        """What goes wrong with one engine becomes its row's error; the others go on."""
        try:
            yield
        except (EngineFailed, CheckFailed, UserError) as error:
            self._errors[configuration.name] = str(error)
            self._reporter.warn(f"{configuration.name}: {error}")

    def _check(self, configuration: Configuration) -> None:
        """See that the engine computes what ONNX Runtime computes, and at what perplexity."""
        workload = self._workload
        with self._failures_of(configuration), self._loaded(configuration) as process:
            parity = self._parity(configuration, process)
            perplexity = None
            if workload.windows is not None:
                losses = [process.ask(do="loss", ids=window.tolist()) for window in workload.windows]
                perplexity = perplexity_of(losses)
            self._log.append(
                kind="setup",
                key=configuration.key(workload),
                name=configuration.name,
                facts=process.facts,
                perplexity=perplexity,
                parity=parity.model_dump(),
            )

    def _parity(self, configuration: Configuration, process: EngineProcess) -> ParityRecord:
        """ONNX Runtime's own agreement with torch is the bundle's; any other engine is compared with it.

        Raises:
            CheckFailed: the logits differ; what the engine is fast at is then not this model.
        """
        if configuration.spec.checked_at_export:
            return configuration.record.parity
        reference = self._reference(configuration)
        # A prompt of the length that is timed, and a few tokens after it: nothing more has to be compiled for it.
        ids = [*self._workload.prompt, *self._workload.prompt[:DECODED_TOKENS]]
        with tempfile.TemporaryDirectory(prefix="owl-deploy-") as folder:
            paths = [str(Path(folder) / name) for name in ("reference.npz", "engine.npz")]
            process.ask(do="logits", ids=ids, out=paths[1])
            with self._loaded(reference) as reference_process:
                reference_process.ask(do="logits", ids=ids, out=paths[0])
            expected, actual = (np.load(path) for path in paths)
            both = np.concatenate([expected["at_once"], expected["decoded"]])
            return compare(both, actual["at_once"], actual["decoded"], what=configuration.name, reference="onnxruntime")

    def _reference(self, configuration: Configuration) -> Configuration:
        """ONNX Runtime on the same bundle, whose graphs all hold the same audited weights."""
        spec, manifest = engine_spec("onnxruntime"), configuration.manifest
        flavor = next(flavor for flavor in spec.flavors if flavor in manifest.flavors)
        return Configuration(spec, configuration.bundle, manifest, flavor)

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
        with self._failures_of(configuration), self._loaded(configuration) as process:
            samples = process.ask(do="generate", prompt=workload.prompt, new_tokens=workload.new_tokens)
            self._has_timed = True
            self._log.append(
                kind="round",
                key=configuration.key(workload),
                name=configuration.name,
                round=round_name,
                load_ms=process.load_ms,
                load_average=[self._load_before, load_average()],
                other_load_cores=self._other_load,
                **samples,
            )

    @contextlib.contextmanager
    def _loaded(self, configuration: Configuration) -> Iterator[EngineProcess]:
        """The configuration's process, loaded and warm; afterwards paused, or ended if memory is short."""
        workload = self._workload
        process = self._idle.pop(configuration.name, None)
        try:
            if process is None:
                process = EngineProcess(configuration.spec, workload.threads)
                process.load(
                    configuration.graph, threads=workload.threads, context=workload.context, prompts=workload.prompts
                )
                process.ask(do="generate", prompt=workload.prompt, new_tokens=_WARM_UP_TOKENS)
            else:
                process.resume()
            yield process
            process.measure_memory()
        except BaseException:
            if process is not None:
                process.close()
            raise
        if process.memory_bytes + sum(idle.memory_bytes for idle in self._idle.values()) > self._budget_bytes:
            process.close()
        else:
            process.pause()
            self._idle[configuration.name] = process

    def _unload(self, bundle: Path) -> None:
        """End the processes of a bundle whose rounds are over."""
        for name in [name for name in self._idle if name.endswith(f" {bundle}")]:
            self._idle.pop(name).close()
