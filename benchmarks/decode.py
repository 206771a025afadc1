"""Decode and prefill of several graphs, in interleaved rounds: sparse formats, thread counts and instruction sets.

    python benchmarks/decode.py OUT.csv DENSE_GRAPH_DIR GRAPH_DIR... [--threads 2] [--kernels avx512,avx2]
        [--past 127] [--new-tokens 12] [--rounds 7]

Each directory holds a `model.onnx` as `owl-deploy export` makes it (`BUNDLE/genai`, `BUNDLE/genai-int4`,
`BUNDLE/sparse-int8` …). Every configuration runs in a process of its own, stopped while another is timed; ratios to
the first one are taken within a round, and their median is reported.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
from contextlib import ExitStack
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from owl_deploy.bundle.manifest import GRAPH
from owl_deploy.engines.client import EngineProcess
from owl_deploy.engines.registry import engine_spec
from owl_deploy.machine.description import busy_cores, describe_machine
from owl_deploy.machine.threads import available_cores
from owl_deploy.sparse.formats import KERNELS_VARIABLE, SPARSE_DOMAIN

WARM_UP_TOKENS = 4

Key = tuple[str, int, str]  # graph, threads, kernels
Samples = dict[Key, list[tuple[float, float]]]  # prefill and decode milliseconds of each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("graphs", type=Path, nargs="+")
    parser.add_argument("--threads", default=str(available_cores()))
    parser.add_argument("--kernels", default="", help="of sparse graphs; default: the best there are")
    parser.add_argument("--past", type=int, default=127)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    vocabulary = vocabulary_of(arguments.graphs[0])
    prompt = [random.Random(0).randrange(vocabulary) for _ in range(arguments.past)]
    context = arguments.past + arguments.new_tokens
    samples: Samples = {}
    with ExitStack() as stack:
        processes: dict[Key, EngineProcess] = {}
        for threads in map(int, arguments.threads.split(",")):
            for graph in arguments.graphs:
                for kernels in arguments.kernels.split(",") if is_sparse(graph) else [""]:
                    key = (str(graph), threads, kernels)
                    processes[key] = start(stack, graph, threads, kernels, context)
                    processes[key].ask(do="generate", prompts=[prompt], new_tokens=WARM_UP_TOKENS)
                    processes[key].pause()
        busy = busy_cores(1.0)
        for _ in range(arguments.rounds):
            for key, process in processes.items():
                process.resume()
                timed = process.ask(do="generate", prompts=[prompt], new_tokens=arguments.new_tokens)
                process.pause()
                samples.setdefault(key, []).append((timed["ttft_ms"], statistics.median(timed["decode_ms"])))
    rows = [row(key, values, baseline(samples, key)) for key, values in samples.items()]
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    machine = describe_machine(available_cores())
    table = Table(title=f"{machine.cpu}, {machine.memory_bandwidth_gb_s:.1f} GB/s; {busy:.1f} cores busy before")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for line in rows:
        table.add_row(*map(str, line.values()))
    Console(width=200).print(table)


def start(stack: ExitStack, graph: Path, threads: int, kernels: str, context: int) -> EngineProcess:
    os.environ[KERNELS_VARIABLE] = kernels
    spec = engine_spec("sparse-packed32" if is_sparse(graph) else "onnxruntime")
    process = stack.enter_context(EngineProcess(spec, threads))
    process.load(graph / GRAPH, threads=threads, context=context, prompts=[])
    return process


def is_sparse(graph: Path) -> bool:
    model = onnx.load(str(graph / GRAPH), load_external_data=False)
    return any(entry.domain == SPARSE_DOMAIN for entry in model.opset_import)


def vocabulary_of(graph: Path) -> int:
    model = onnx.load(str(graph / GRAPH), load_external_data=False)
    return int(model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value)


def baseline(samples: Samples, key: Key) -> list[tuple[float, float]]:
    """The first graph at the same number of threads."""
    return next(values for (_, threads, _), values in samples.items() if threads == key[1])


def row(key: Key, values: list[tuple[float, float]], dense: list[tuple[float, float]]) -> dict[str, object]:
    result: dict[str, object] = {"graph": key[0], "threads": key[1], "kernels": key[2]}
    for index, name in enumerate(("prefill", "decode")):
        own = [value[index] for value in values]
        ratios = [first[index] / second[index] for first, second in zip(dense, values, strict=True)]
        result[f"{name}_ms"] = round(statistics.median(own), 2)
        result[f"{name}_ms_best"] = round(min(own), 2)
        result[f"{name}_speedup"] = round(statistics.median(ratios), 2)
        result[f"{name}_speedup_range"] = f"{min(ratios):.2f}-{max(ratios):.2f}"
    return result


if __name__ == "__main__":
    main()
