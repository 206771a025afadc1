"""The bench stage: bundles and engines in, rows out."""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from owl_deploy.benchmarking.end_to_end import EndToEnd
from owl_deploy.benchmarking.log import MEASUREMENTS, Log
from owl_deploy.benchmarking.measure import Bench
from owl_deploy.benchmarking.processes import Processes
from owl_deploy.benchmarking.results import make_rows
from owl_deploy.benchmarking.rows import RESULTS, Row, read_rows, updated, write_rows
from owl_deploy.benchmarking.workload import Configuration, Workload
from owl_deploy.bundle.manifest import BundleManifest, read_bundle
from owl_deploy.bundle.names import Flavor, weights_of
from owl_deploy.bundle.verify import verify_files
from owl_deploy.engines.client import REQUEST_TIMEOUT_S
from owl_deploy.engines.probe import DECODED_TOKENS
from owl_deploy.engines.registry import EngineSpec
from owl_deploy.errors import UserError
from owl_deploy.files import disk_errors, locked
from owl_deploy.machine.description import describe_machine
from owl_deploy.machine.threads import available_cores
from owl_deploy.models.load import load_tokenizer
from owl_deploy.models.source import ModelSource
from owl_deploy.reporting import Reporter
from owl_deploy.text.windows import TokenWindows, check_windows, evaluation_windows

_PROMPT_SEED = 0


@dataclass(frozen=True)
class Request:
    """What to time, and on which text.

    Attributes:
        prompts: prompt lengths; each is a workload of its own, with every batch.
        batches: how many sequences to decode side by side.
        text: a text as `evaluate` takes it; None for random token ids and no perplexity.
        seqlen: tokens of an evaluation window; None for as many as the prompt has.
        max_load: cores that other processes may keep busy.
        timeout_s: how long an engine may take to answer before it counts as hung.
        end_to_end: also time from text to text.
        dense_only: engines that are measured on dense bundles alone.
    """

    prompts: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 128
    repetitions: int = 5
    threads: int = field(default_factory=available_cores)
    text: str | None = None
    seqlen: int | None = None
    windows: int = 16
    max_load: float = 1.0
    timeout_s: float = REQUEST_TIMEOUT_S
    end_to_end: bool = False
    dense_only: tuple[EngineSpec, ...] = ()


def bench_bundles(
    bundles: Sequence[Path],
    engines: Sequence[EngineSpec],
    request: Request,
    out: Path,
    *,
    processes: Processes | None = None,
    alone: Callable[[], object] = lambda: None,
    reporter: Reporter,
) -> list[Row]:
    """Measure every engine on every bundle; the rows.

    Args:
        processes: engines that are loaded already, and stay so for a later call; None ends them all.
        alone: called before each round; returns when the caller has ended its own work beside ours.

    What `out` already holds of the same measurements is not measured again. Its `results.jsonl` is written after each
    workload, and keeps the rows of other engines, levels and workloads.

    Raises:
        UserError: a bundle is not one, they are of different vocabularies, or the machine is busy.
    """
    manifests = {bundle: read_bundle(bundle) for bundle in bundles}
    _check_bundles(manifests)
    if request.threads > available_cores():
        raise UserError(f"--threads {request.threads}: this process may use {available_cores()} cores")
    configurations = _configurations(manifests, engines, request.dense_only)
    for bundle, flavor in dict.fromkeys((item.bundle, item.flavor) for item in configurations):
        verify_files(bundle, manifests[bundle].flavors[flavor].files)
    workloads = _workloads(manifests, request)
    with locked(out):
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        known = read_rows(out / RESULTS) if (out / RESULTS).is_file() else []
        machine = describe_machine(request.threads)
        torch.set_num_threads(1)  # this process only waits from here on
        log = Log(out / MEASUREMENTS)
        rows = []
        for workload in workloads:
            able = [item for item in configurations if workload.batch == 1 or item.spec.runs_batches]
            for name in [item.spec.name for item in configurations if item not in able]:
                reporter.warn(f"{name} decodes one sequence at a time: no rows with batch {workload.batch}")
            with contextlib.nullcontext(processes) if processes else Processes() as loaded:
                bench = Bench(
                    *(able, workload, log, loaded),
                    max_load=request.max_load,
                    timeout_s=request.timeout_s,
                    alone=alone,
                    reporter=reporter,
                )
                bench.run()
            rows += make_rows(bench, workload, machine)
            write_rows(out / RESULTS, updated(known, rows))
    return rows


def _configurations(
    manifests: dict[Path, BundleManifest], engines: Sequence[EngineSpec], dense_only: Sequence[EngineSpec]
) -> list[Configuration]:
    """Every engine on every bundle that holds a flavor it runs.

    Raises:
        UserError: an engine or a bundle would be in no row at all.
    """
    found = [
        Configuration(spec, bundle, manifest, flavor)
        for spec in engines
        for bundle, manifest in manifests.items()
        if manifest.is_dense or spec not in dense_only
        for flavor in [next((flavor for flavor in spec.flavors if flavor in manifest.flavors), None)]
        if flavor is not None
    ]
    for spec in engines:
        if spec not in [item.spec for item in found]:
            raise UserError(
                f"engine {spec.name} runs {' or '.join(spec.flavors)}, which no bundle holds; export the model with "
                f"{_export_options(spec.flavors[0])}"
            )
    for bundle, manifest in manifests.items():
        if bundle not in [item.bundle for item in found]:
            wanted = ", ".join(flavor for spec in engines for flavor in spec.flavors)
            raise UserError(f"{bundle}: holds {', '.join(manifest.flavors)}; the engines asked for run {wanted}")
    return found


def _export_options(flavor: Flavor) -> str:
    weights = weights_of(flavor)
    return f"--flavor {flavor}" if weights is None else f"--flavor sparse --weights {weights}"


def _check_bundles(manifests: dict[Path, BundleManifest]) -> None:
    """Refuse bundles of different models."""
    if len({manifest.vocabulary for manifest in manifests.values()}) > 1:
        raise UserError("the bundles have different vocabularies; measure one model at a time")


def _workloads(manifests: dict[Path, BundleManifest], request: Request) -> list[Workload]:
    """One for every prompt length and batch; text, windows and tokenizer are the first bundle's."""
    bundle, manifest = next(iter(manifests.items()))
    context, longest = manifest.context, max(request.prompts)
    if context is not None and longest + max(request.new_tokens, DECODED_TOKENS) > context:
        raise UserError(
            f"--prompt {longest} and --new-tokens {request.new_tokens} (at least {DECODED_TOKENS}) exceed the "
            f"model's context of {context}"
        )
    directory = bundle / next(iter(manifest.flavors))
    tokenizer = load_tokenizer(ModelSource(str(directory), directory)) if manifest.has_tokenizer else None
    windows = _windows(manifest, tokenizer, request)
    if windows is None:
        tokens = random_prompt(manifest.vocabulary, longest)
    else:
        tokens = windows.ids.flatten()[:longest].tolist()
        if len(tokens) < longest:
            raise UserError(f"{windows.source}: {len(tokens)} tokens are less than --prompt {longest}")
    if request.end_to_end and tokenizer is None:
        raise UserError(f"{bundle}: --end-to-end is from text to text, and the model has no tokenizer")

    def end_to_end(prompt: list[int], batch: int) -> EndToEnd | None:
        if not request.end_to_end or tokenizer is None or batch > 1:
            return None
        return EndToEnd(tokenizer.decode(prompt), len(prompt), tokenizer)

    return [
        Workload(
            prompt=tuple(tokens[:length]),
            new_tokens=request.new_tokens,
            threads=request.threads,
            repetitions=request.repetitions,
            windows=None if windows is None else windows.ids[: request.windows],
            text=request.text,
            batch=batch,
            end_to_end=end_to_end(tokens[:length], batch),
        )
        for length in request.prompts
        for batch in request.batches
    ]


def _windows(
    manifest: BundleManifest, tokenizer: PreTrainedTokenizerBase | None, request: Request
) -> TokenWindows | None:
    if request.text is None or (tokenizer is None and not request.text.endswith(".npy")):
        return None
    # A file of ids has windows of its own length; from text they are as long as the longest prompt, so that engines
    # with static shapes compile once for both.
    seqlen = request.seqlen or (None if request.text.endswith(".npy") else max(*request.prompts, 2))
    windows = evaluation_windows(request.text, tokenizer, seqlen=seqlen)
    check_windows(windows, vocabulary=manifest.vocabulary, context=manifest.context)
    return windows


def random_prompt(vocabulary: int, length: int) -> list[int]:
    """The token ids that stand in for a text; always the same."""
    rng = random.Random(_PROMPT_SEED)
    return [rng.randrange(vocabulary) for _ in range(length)]


def first_available_text() -> str | None:
    """The demo text where its package is installed, else None: what `bench` measures perplexity on by default."""
    return "demo" if importlib.util.find_spec("gensim") else None
