"""The paper's Table 8: decode latency by sparsity at TinyLlama-1.1B's geometry, one level after the other.

    python benchmarks/table8.py OUT [--model MODEL --calibration TEXT --text TEXT] [--sparsities 0.1:0.9:0.1]
        [--engines deepsparse,sparse-packed32,sparse-int8] [--dense-engines onnxruntime,onnxruntime-int4,llama.cpp-q4_0]
        [--prompt 1] [--new-tokens 16] [--repetitions 3] …

Each level is pruned, exported, measured beside the dense model, and deleted again, so that ten levels take the disk of
two: 30 GB at 1.1B parameters in fp32. While its engines are loaded and checked the next level is pruned: load times are
measured beside that, and all else alone. ONNX Runtime multiplies zeros like any other number, so that its dense row
stands for all levels; named in --engines, it is measured at each. Results gather in OUT as `owl-deploy bench` writes
them. Run it again after it was killed: it continues with the level it was in and skips those that have their rows.

Without --model the weights are random. They have no outliers, so OWL would have nothing to go by: blocks are pruned by
magnitude, from S - 0.08 for the first to S + 0.08 for the last, which is as uneven as OWL with its lambda of 0.08. With
--model, OWL and Wanda prune a real checkpoint on calibration text, and perplexity is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from random_checkpoint import add_geometry, geometry, write_random
from rich.console import Console

from owl_deploy.benchmarking.processes import Processes
from owl_deploy.benchmarking.rows import RESULTS, read_rows
from owl_deploy.benchmarking.run import Request, bench_bundles
from owl_deploy.benchmarking.sweep import Level, make_level, prune_level
from owl_deploy.bundle.manifest import MANIFEST, read_bundle
from owl_deploy.bundle.names import weights_of
from owl_deploy.engines.registry import EngineSpec, engine_spec, installed_engines
from owl_deploy.errors import CheckFailed, UserError
from owl_deploy.files import read_json, staged_directory, write_json
from owl_deploy.machine.threads import available_cores
from owl_deploy.models.source import ModelSource, resolve_model
from owl_deploy.pruning.levels import parse_sparsities
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.run import Calibration
from owl_deploy.report.tables import terminal_table
from owl_deploy.report.write import REPORT, renew_report
from owl_deploy.reporting import Reporter

HALF_RANGE = 0.08  # of block sparsities: OWL's lambda (paper, Table 15)
RANDOM = {"method": "magnitude", "allocation": "linear", "half_range": HALF_RANGE}
REAL = {"method": "wanda", "allocation": "owl"}
WORK = "work"
INPUTS = "inputs.json"
_TABLE_COLUMNS = 200
_KEPT_BYTES = 5 << 30


def main() -> None:
    arguments = parsed()
    try:
        report = Table8(arguments).run()
    except (UserError, CheckFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue with this level", file=sys.stderr)
        sys.exit(130)
    Console(width=_TABLE_COLUMNS).print(terminal_table(read_rows(arguments.output / RESULTS)))
    print(report)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="hub id or directory of a real model; default: random weights")
    parser.add_argument("--calibration", default="c4", help="of --model, as for `owl-deploy prune`")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seqlen", type=int, help="tokens per calibration window")
    parser.add_argument("--text", default="wikitext2", help="of --model: for its prompt and perplexity")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows")
    parser.add_argument("--sparsities", default="0.1:0.9:0.1", help="the dense level is always measured")
    parser.add_argument("--engines", default="deepsparse,sparse-packed32,sparse-int8")
    parser.add_argument("--dense-engines", default="onnxruntime", help="engines that run the dense model alone")
    parser.add_argument("--prompt", type=int, default=1, help="more than 1 makes DeepSparse compile a second graph")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--max-load", type=float, default=1.0)
    parser.add_argument("--keep", action="store_true", help="do not delete the dense level's files in the end")
    add_geometry(parser)
    return parser.parse_args()


class Table8:
    """One run over all levels."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._out: Path = arguments.output
        self._work = self._out / WORK
        self._reporter = Reporter()
        self._sparsities = [level for level in parse_sparsities(arguments.sparsities) if level > 0]
        self._engines = installed_engines(arguments.engines)
        # ONNX Runtime's dense graph is what all else is measured against; there is nothing in packing dense weights.
        dense = [spec for spec in self._engines if weights_of(spec.flavors[0]) is None]
        self._dense_engines = list(dict.fromkeys([*dense, engine_spec("onnxruntime")]))
        peers = installed_engines(arguments.dense_engines)
        self._peers = [spec for spec in peers if spec not in self._dense_engines]
        self._processes = Processes()

    def run(self) -> Path:
        """Measure the levels that are missing; the path of the report."""
        self._check_inputs()
        with self._processes:
            return self._measured()

    def _measured(self) -> Path:
        missing = [sparsity for sparsity in self._sparsities if not self._is_measured(sparsity)]
        self._reporter.step(f"{len(self._sparsities) - len(missing)} of {len(self._sparsities)} levels are there")
        if missing:
            self._step("dense", "checkpoint", self._make_dense)
            # Peers one by one: memory holds what one of their exporters takes, not what all of them leave.
            for specs in (self._dense_engines, *([peer] for peer in self._peers)):
                names = ", ".join(spec.name for spec in specs)
                self._step("dense", f"export for {names}", lambda specs=specs: self._make(PruningPlan(0.0), specs))
        for index, sparsity in enumerate(missing):
            name, directory = f"{sparsity:g}", self._directory(sparsity)
            self._step(name, "prune and export", lambda level=sparsity: self._make(self._plan(level), self._engines))
            shutil.rmtree(directory / "checkpoint", ignore_errors=True)  # not there: a run was killed while measuring
            ahead = missing[index + 1 : index + 2]
            self._step(name, "measure", lambda made=directory, ahead=ahead: self._measure(made, ahead))
            renew_report(self._out, command=shlex.join(["python", *sys.argv]))
            shutil.rmtree(directory)
        if not self._arguments.keep:
            shutil.rmtree(self._work, ignore_errors=True)
        return self._out / REPORT

    def _check_inputs(self) -> None:
        """Refuse to mix results of different models.

        Raises:
            UserError: the directory holds results of another model, or something else.
        """
        of_model = self._arguments.model or geometry(self._arguments)
        texts = {name: getattr(self._arguments, name) for name in ("calibration", "samples", "seqlen", "text")}
        inputs = {"model": of_model, **(texts if self._arguments.model else {})}
        file = self._out / INPUTS
        if file.is_file():
            if read_json(file) != inputs:
                raise UserError(f"{self._out}: holds Table 8 of another model or text; choose another directory")
            return
        if self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise UserError(f"{self._out}: is not empty, and holds no Table 8; choose another directory")
        self._out.mkdir(parents=True, exist_ok=True)
        write_json(file, inputs)

    def _directory(self, sparsity: float) -> Path:
        return self._work / f"{sparsity:g}"

    def _is_measured(self, sparsity: float) -> bool:
        """Whether every engine has a row of this level and workload."""
        if not (self._out / RESULTS).is_file():
            return False
        asked = self._arguments
        found = {
            row.engine
            for row in read_rows(self._out / RESULTS)
            if row.status == "ok"
            and row.bundle == str(self._directory(sparsity) / "bundle")
            and (row.threads, row.prompt_tokens, row.new_tokens) == (asked.threads, asked.prompt, asked.new_tokens)
            and row.repetitions >= asked.repetitions
        }
        return found >= {spec.name for spec in self._engines}

    def _plan(self, sparsity: float) -> PruningPlan:
        return PruningPlan(sparsity, **(REAL if self._arguments.model else RANDOM))

    def _level(self, plan: PruningPlan, engines: list[EngineSpec]) -> Level:
        source = ModelSource(self._arguments.model or "random weights", self._directory(0) / "checkpoint")
        texts = Calibration(self._arguments.calibration, self._arguments.samples, self._arguments.seqlen)
        return Level(source, self._work, plan, texts, tuple(engines))

    def _make_dense(self) -> None:
        """The dense checkpoint: written, or linked to."""
        checkpoint = self._directory(0) / "checkpoint"
        if checkpoint.exists():
            return
        if self._arguments.model:
            source = resolve_model(self._arguments.model)
            if source.is_gguf:
                raise UserError(f"{source.name}: make a checkpoint of it first: owl-deploy prune --sparsity 0")
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.symlink_to(source.path.resolve(), target_is_directory=True)
        else:
            with staged_directory(checkpoint, manifest="config.json") as staging:
                write_random(staging, geometry(self._arguments))

    def _make(self, plan: PruningPlan, engines: list[EngineSpec]) -> None:
        """Prune and export a level in a process of its own, whose memory is free again when engines are measured.

        Meanwhile few engines stay loaded: DeepSparse's dense model, which takes longest to load, and none besides.
        """
        bundle = self._directory(plan.sparsity) / "bundle"
        if (bundle / MANIFEST).is_file():
            made = read_bundle(bundle)
            if all(spec.flavors[0] in (*made.flavors, *made.unsupported) for spec in engines):
                return
        self._processes.keep(_KEPT_BYTES)
        with _maker() as pool:
            pool.submit(_make_level, self._level(plan, engines)).result()

    def _measure(self, directory: Path, ahead: list[float]) -> None:
        """Measure a level; while its engines are loaded and checked, the one `ahead`, if there is one, is pruned."""
        with _maker() as pool:
            for level in ahead:
                pool.submit(prune_level, self._level(self._plan(level), []))
            # Its errors are met again by `_make`; its memory is free once it is shut down.
            self._measure_alone(directory, pool.shutdown)

    def _measure_alone(self, directory: Path, alone: Callable[[], object]) -> None:
        asked = self._arguments
        engines = list(dict.fromkeys([*self._engines, *self._dense_engines, *self._peers]))
        request = Request(
            prompts=(asked.prompt,),
            batches=(1,),
            new_tokens=asked.new_tokens,
            repetitions=asked.repetitions,
            threads=asked.threads,
            text=asked.text if asked.model else None,
            seqlen=None,
            windows=asked.windows,
            max_load=asked.max_load,
            dense_only=tuple(spec for spec in engines if spec not in self._engines),
        )
        bundles = [self._directory(0) / "bundle", directory / "bundle"]
        bench_bundles(
            *(bundles, engines, request, self._out),
            processes=self._processes,
            alone=alone,
            reporter=self._reporter,
        )

    def _step(self, level: str, name: str, work: Callable[[], Any]) -> Any:
        """Do a part of the work, and note in `steps.csv` what it took, of all processes together."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        result = work()
        seconds, cpu_seconds = time.perf_counter() - wall, _cpu_seconds() - cpu
        file = self._out / "steps.csv"
        is_new = not file.is_file()
        with file.open("a", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            if is_new:
                writer.writerow(["level", "step", "seconds", "cpu_seconds"])
            writer.writerow([level, name, f"{seconds:.1f}", f"{cpu_seconds:.1f}"])
        self._reporter.step(f"{level}: {name} took {seconds:.0f} s, {cpu_seconds:.0f} CPU-seconds")
        return result


@contextlib.contextmanager
def _maker() -> Iterator[ProcessPoolExecutor]:
    """A process for work whose memory is to be free again after it; an error or an interruption here ends it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            for child in multiprocessing.active_children():  # else the pool waits for work that may take hours
                child.terminate()
            raise


def _end_with_parent() -> None:
    """Do not work on for a run that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_level(level: Level) -> None:
    make_level(level, Reporter())


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that engines, and what makes a level, end too
    main()
