"""Measure the kernels alone: weights and bytes a second by format, instruction set and density, beside dense fp32.

    python benchmarks/kernels.py DIRECTORY [--threads 1,2] [--tokens 1,128] [--rounds 7] [--sparsities 0.5,0.7]
        [--formats int8,int4] [--kernels avx512] [--shapes 576x1536,2048x5632]

Writes kernels.csv, kernels.md and kernels.png. Every matrix is measured twice: small enough for a core's own cache,
and of 512 MiB in fp32, of which the sparsest formats still leave less than the last cache of a large server. A rate
counts all weights of the matrix, zeros included, so that formats compare; the median of interleaved rounds is reported,
with the smallest and the largest in the CSV. `--shapes` measures matrices of these rows and columns instead, from
wherever they fit.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from owl_deploy.machine.description import describe_machine
from owl_deploy.machine.threads import available_cores
from owl_deploy.plotting import COLOURS, save_figure
from owl_deploy.sparse.formats import FORMATS
from owl_deploy.sparse.library import instruction_sets, pack, product

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
CACHED, LARGE = (512, 1024), (65536, 2048)  # rows and columns
MANY_TOKENS = (5632, 2048)
DENSE = ("dense8", "dense4")  # of matrices without zeros
SAMPLE_S = 0.05

Run = Callable[[int], float]  # repeats -> nanoseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", default=f"1,{available_cores()}")
    parser.add_argument("--tokens", default="1,128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsities", default=",".join(map(str, SPARSITIES)))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--kernels", default=",".join(instruction_sets()))
    parser.add_argument("--shapes", default="")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    asked = Asked(
        tuple(map(float, arguments.sparsities.split(","))),
        arguments.formats.split(","),
        arguments.kernels.split(","),
    )
    rows = []
    for tokens in map(int, arguments.tokens.split(",")):
        shapes = {"cache": CACHED, "memory": LARGE} if tokens == 1 else {"memory": MANY_TOKENS}
        if arguments.shapes:
            shapes = {f"a matrix of {name}": shape_of(name) for name in arguments.shapes.split(",")}
        for (place, shape), threads in itertools.product(shapes.items(), map(int, arguments.threads.split(","))):
            rows += measure(asked, place, shape, tokens, threads, arguments.rounds)
            print(f"{place}, {tokens} tokens, {threads} threads: done", flush=True)
    with (arguments.directory / "kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    machine = describe_machine(available_cores())
    title = f"{machine.cpu}, {machine.cores} cores, {machine.memory_bandwidth_gb_s:.1f} GB/s read"
    (arguments.directory / "kernels.md").write_text(f"# The kernels alone\n\n{title}.\n\n{markdown(rows)}")
    plot(rows, title, arguments.directory / "kernels.png")


def shape_of(name: str) -> tuple[int, int]:
    """Rows and columns of "576x1536"."""
    rows, _, columns = name.partition("x")
    return int(rows), int(columns)


class Asked(NamedTuple):
    """What is measured of each shape."""

    sparsities: tuple[float, ...]
    formats: list[str]
    kernels: list[str]


def measure(
    asked: Asked, place: str, shape: tuple[int, int], tokens: int, threads: int, rounds: int
) -> list[dict[str, object]]:
    """The formats, instruction sets and sparsities on matrices of one shape, in interleaved rounds."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, shape[1]), np.float32)
    rows = []
    for sparsity in (0.0, *asked.sparsities):
        weights = matrix(rng, shape, sparsity)
        runs: dict[tuple[str, str], tuple[Run, int]] = {}
        if sparsity == 0:
            runs["fp32", "torch"] = dense(weights, x, threads), weights.nbytes
        for name in asked.formats:
            if (name in DENSE) != (sparsity == 0):
                continue
            packed = pack(weights, name)
            for kernels in asked.kernels:
                runs[name, kernels] = packed_run(packed, x, kernels, threads), packed.nbytes
        samples: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        repeats = {key: max(1, int(SAMPLE_S * 1e9 / run(1))) for key, (run, _) in runs.items()}
        for _ in range(rounds):
            for key, (run, _) in runs.items():
                samples[key].append(run(repeats[key]) / repeats[key])
        for (name, kernels), times in samples.items():
            bytes_read = runs[name, kernels][1]
            rates = sorted(weights.size * tokens / time for time in times)  # per nanosecond: 1e9 a second
            rows.append(
                {
                    "format": name,
                    "kernels": kernels,
                    "from": place,
                    "tokens": tokens,
                    "threads": threads,
                    "sparsity": sparsity,
                    "gweights_per_s": round(statistics.median(rates), 2),
                    "gweights_per_s_low": round(rates[0], 2),
                    "gweights_per_s_high": round(rates[-1], 2),
                    "gbytes_per_s": round(bytes_read / statistics.median(times), 2),
                    "bytes_per_weight": round(bytes_read / weights.size, 4),
                }
            )
    return rows


def matrix(rng: np.random.Generator, shape: tuple[int, int], sparsity: float) -> NDArray[np.float32]:
    weights = rng.standard_normal(shape, np.float32)
    weights[rng.random(shape, np.float32) < sparsity] = 0
    return weights


def packed_run(packed: NDArray[np.uint8], x: NDArray[np.float32], kernels: str, threads: int) -> Run:
    return lambda repeats: product(packed, x, kernels, threads, repeats)[1]


def dense(weights: NDArray[np.float32], x: NDArray[np.float32], threads: int) -> Run:
    matrix, inputs = torch.from_numpy(weights), torch.from_numpy(x)

    def run(repeats: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter_ns()
        for _ in range(repeats):
            torch.nn.functional.linear(inputs, matrix)
        return time.perf_counter_ns() - start

    return run


def markdown(rows: list[dict[str, object]]) -> str:
    """One table for each place, number of tokens and of threads: 1e9 weights a second by sparsity."""
    text = ""
    keys = dict.fromkeys((row["from"], row["tokens"], row["threads"]) for row in rows)
    for place, tokens, threads in keys:
        chosen = [row for row in rows if (row["from"], row["tokens"], row["threads"]) == (place, tokens, threads)]
        sparsities = sorted({row["sparsity"] for row in chosen})  # type: ignore[type-var]
        text += f"## From {place}, {plural(tokens, 'token')}, {plural(threads, 'thread')}\n\n"
        text += "Weights a second (1e9, zeros counted), and in brackets the bytes read (GB/s).\n\n"
        text += f"| format | kernels | {' | '.join(f'{sparsity:.0%}' for sparsity in sparsities)} |\n"
        text += f"|---|---|{'---|' * len(sparsities)}\n"
        for name, kernels in dict.fromkeys((row["format"], row["kernels"]) for row in chosen):
            of_sparsity = {row["sparsity"]: row for row in chosen if (row["format"], row["kernels"]) == (name, kernels)}
            cells = [
                f"{row['gweights_per_s']:.1f} ({row['gbytes_per_s']:.1f})" if (row := of_sparsity.get(sparsity)) else ""
                for sparsity in sparsities
            ]
            text += f"| {name} | {kernels} | {' | '.join(cells)} |\n"
        text += "\n"
    return text


def plural(count: object, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def plot(rows: list[dict[str, object]], title: str, path: Path) -> None:
    """Weights a second by sparsity: one panel for each place and number of threads, one token, the best kernels."""
    best = instruction_sets()[0]
    panels = list(dict.fromkeys((row["from"], row["threads"]) for row in rows if row["tokens"] == 1))
    figure = Figure(figsize=(4.2 * len(panels), 4), layout="constrained")
    for axes, (place, threads) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        chosen = [row for row in rows if (row["from"], row["threads"], row["tokens"]) == (place, threads, 1)]
        for index, name in enumerate(("packed32", "packed16", "int8", "int4")):
            line = [row for row in chosen if row["format"] == name and row["kernels"] == best]
            axes.plot(
                [100 * float(str(row["sparsity"])) for row in line],
                [float(str(row["gweights_per_s"])) for row in line],
                color=COLOURS[index],
                marker="os^D"[index],
                label=f"{name} ({best})",
            )
        labels = {"fp32": "dense fp32 (torch)"} | {name: f"{name} ({best})" for name in DENSE}
        for index, (name, label) in enumerate(labels.items()):
            rate = next((row["gweights_per_s"] for row in chosen if row["format"] == name), None)
            if rate is not None:
                axes.axhline(float(str(rate)), color="#444444", linestyle=("--", ":", "-.")[index], label=label)
        axes.set_title(f"from {place}, {plural(threads, 'thread')}")
        axes.set_xlabel("sparsity (%)")
        axes.set_ylim(bottom=0)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("weights a second (1e9, zeros counted)")
    figure.suptitle(title)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
