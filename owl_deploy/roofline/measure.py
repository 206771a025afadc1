"""Measure how far an engine is from what the memory of this machine allows: bandwidth, tokens, and operators."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from owl_deploy.benchmarking.run import random_prompt
from owl_deploy.bundle.manifest import GRAPH, BundleManifest, FlavorRecord, read_bundle
from owl_deploy.bundle.names import FLAVORS, Flavor, model_file, weights_of
from owl_deploy.bundle.verify import verify_files
from owl_deploy.engines.client import EngineFailed, EngineProcess
from owl_deploy.engines.registry import ENGINES, EngineSpec
from owl_deploy.errors import CheckFailed, UserError
from owl_deploy.machine.cpu import instruction_set
from owl_deploy.machine.description import (
    MEMORY_SET_BYTES,
    busy_cores,
    cpu_model,
    last_level_cache_bytes,
    read_bandwidth_gb_s,
)
from owl_deploy.machine.threads import available_cores
from owl_deploy.reporting import Reporter
from owl_deploy.roofline.engines import engine_of, engines_of, least_bytes, whole_engine
from owl_deploy.roofline.profile import Profile, by_operator, profile_decode
from owl_deploy.roofline.records import BandwidthRecord, FlavorFigures, KindFigures, MatrixFigures, Roofline
from owl_deploy.roofline.traffic import KINDS, Matrix, Traffic, read_traffic
from owl_deploy.sparse.library import library_path

ATTENTION, REST, MATRICES, TOKEN = "attention, KV cache", "other operators", "all matrices", "whole token"

DETAILED: tuple[Flavor, ...] = tuple(flavor for flavor in FLAVORS if flavor == "genai" or weights_of(flavor))
"""Those that are measured operator by operator too."""

_CACHES_IN_MEMORY_SET = 4  # as large a set, in caches, as hardly any of is found in one
_WARM_UP_TOKENS = 8
_BUSY_CORES = 0.5
_BUSY_S = 0.5
_BYTES_PER_MS = 1e6  # at 1 GB/s


@dataclass(frozen=True)
class Request:
    """What to measure: `rounds` times, `new_tokens` decoded after a prompt of `past` tokens."""

    past: int
    new_tokens: int
    rounds: int
    threads: int


@dataclass(frozen=True)
class _Roof:
    """The read bandwidth, GB/s, of a set of this size, and of memory."""

    gb_s: float
    memory_gb_s: float


def measure_roofline(bundle: Path, wanted: Sequence[str] | None, request: Request, *, reporter: Reporter) -> Roofline:
    """The roofline of a bundle's flavors; by default of all whose engines are installed.

    Raises:
        UserError: the bundle is not one, it has no such flavor, or the request exceeds the machine or the model.
        CheckFailed: an engine failed.
    """
    manifest = read_bundle(bundle)
    flavors = _flavors(bundle, manifest, wanted)
    others = [spec for flavor in flavors if flavor not in DETAILED for spec in engines_of(flavor)]
    for flavor in flavors:
        verify_files(bundle, manifest.flavors[flavor].files)
    _check(manifest, request)
    if any(weights_of(flavor) for flavor in flavors):
        library_path()  # that it is missing is said before anything is measured
    traffic = {
        flavor: read_traffic(bundle, flavor, manifest.flavors[flavor], request.past)
        for flavor in flavors
        if flavor in DETAILED
    }

    other_load_cores = busy_cores(_BUSY_S)
    if other_load_cores > _BUSY_CORES:
        reporter.warn(f"other processes keep {other_load_cores:.1f} cores busy: all that follows is slower for it")
    cache_bytes = last_level_cache_bytes()
    memory_set = max(MEMORY_SET_BYTES, _CACHES_IN_MEMORY_SET * (cache_bytes or 0))
    least = (least_bytes(manifest.flavors[spec.flavors[0]], spec, request.past) for spec in others)
    sets = {memory_set} | {min(size, memory_set) for size in (*(read.bytes for read in traffic.values()), *least)}
    bandwidth = _bandwidth(sorted(sets, reverse=True), request.threads, reporter)
    figures, engines = [], []
    for flavor, read in traffic.items():
        roof = _Roof(*(_highest(bandwidth, size, request) for size in (min(read.bytes, memory_set), memory_set)))
        fits_cache = cache_bytes is not None and read.bytes < cache_bytes
        figures.append(_measure_flavor(bundle, manifest, flavor, read, request, roof, fits_cache, reporter=reporter))
        engines.append(engine_of(figures[-1], manifest.flavors[flavor]))
    for spec in others:
        decode_ms, facts = _decode(spec, bundle, random_prompt(manifest.vocabulary, request.past), request, reporter)
        token_ms = statistics.median(sample for samples in decode_ms for sample in samples)
        size = least_bytes(manifest.flavors[spec.flavors[0]], spec, request.past, facts)
        gb_s = _highest(bandwidth, min(size, memory_set), request)
        engines.append(whole_engine(spec, manifest.flavors[spec.flavors[0]], size, token_ms, gb_s, facts))
    return Roofline(
        model=manifest.model,
        bundle=str(bundle),
        sparsity_achieved=manifest.sparsity_achieved,
        threads=request.threads,
        past=request.past,
        new_tokens=request.new_tokens,
        rounds=request.rounds,
        cpu=cpu_model(),
        cores=available_cores(),
        instruction_set=instruction_set(),
        cache_bytes=cache_bytes,
        other_load_cores=other_load_cores,
        memory_set_bytes=memory_set,
        bandwidth=bandwidth,
        flavors=figures,
        engines=engines,
    )


def _flavors(bundle: Path, manifest: BundleManifest, wanted: Sequence[str] | None) -> list[Flavor]:
    """Those that were asked for; else all that can be measured here.

    Raises:
        UserError: one is unknown, missing or without an engine, or there is none.
    """
    for name in wanted or ():
        if name not in FLAVORS:
            raise UserError(f"--flavor {name}: choose from {', '.join(FLAVORS)}")
    held = [flavor for flavor in FLAVORS if flavor in manifest.flavors and flavor in (wanted or FLAVORS)]
    problems = {flavor: _problem(flavor, manifest.flavors[flavor]) for flavor in held}
    for flavor in held if wanted else ():
        if (problem := problems[flavor]) is not None:
            raise UserError(f"{bundle / flavor}: {problem}")
    found = [flavor for flavor in held if problems[flavor] is None]
    missing = set(wanted or ()) - set(found)
    if missing or not found:
        lacks = ", ".join(sorted(missing)) or "a sparse or a genai flavor"
        raise UserError(
            f"{bundle}: holds {', '.join(manifest.flavors)} and lacks {lacks}; add it with: "
            f"owl-deploy export CHECKPOINT -o {bundle}"
        )
    return found


def _problem(flavor: Flavor, record: FlavorRecord) -> str | None:
    """Why it cannot be measured here; None if it can."""
    if flavor in DETAILED:
        return None
    if record.stored is None:
        return "an older owl-deploy made it, without the sizes of its matrices; export the model again"
    if not engines_of(flavor):
        problems = (
            spec.environment.problem() for spec in ENGINES.values() if spec.flavors[0] == flavor and spec.environment
        )
        return f"its engine is {next(problems)}"
    return None


def _check(manifest: BundleManifest, request: Request) -> None:
    if request.threads > available_cores():
        raise UserError(f"--threads {request.threads}: this process may use {available_cores()} cores")
    if manifest.context is not None and request.past + max(request.new_tokens, _WARM_UP_TOKENS) > manifest.context:
        raise UserError(
            f"--past {request.past} and --new-tokens {request.new_tokens} (at least {_WARM_UP_TOKENS}) exceed the "
            f"model's context of {manifest.context}"
        )


def _bandwidth(sets: Iterable[int], threads: int, reporter: Reporter) -> list[BandwidthRecord]:
    """Of each set's size, with one thread, with those asked for, and with all."""
    made = []
    for set_bytes in sets:
        reporter.step(f"reading {set_bytes / 1e6:.0f} MB again and again")
        for count in sorted({1, threads, available_cores()}):
            gb_s = read_bandwidth_gb_s(count, set_bytes)
            made.append(BandwidthRecord(set_bytes=set_bytes, threads=count, gb_s=gb_s))
    return made


def _highest(bandwidth: Sequence[BandwidthRecord], set_bytes: int, request: Request) -> float:
    """GB/s of this set; of a larger one or with fewer threads where that was faster, as then this can be too."""
    return max(
        record.gb_s for record in bandwidth if record.set_bytes >= set_bytes and record.threads <= request.threads
    )


def _measure_flavor(
    bundle: Path,
    manifest: BundleManifest,
    flavor: Flavor,
    traffic: Traffic,
    request: Request,
    roof: _Roof,
    fits_cache: bool,
    *,
    reporter: Reporter,
) -> FlavorFigures:
    spec = next(spec for spec in ENGINES.values() if spec.flavors[0] == flavor)
    graph = bundle / flavor / GRAPH
    prompt = random_prompt(manifest.vocabulary, request.past)
    decode_ms, facts = _decode(spec, bundle, prompt, request, reporter)
    reporter.step(f"{flavor}: operator by operator")
    profile = profile_decode(
        spec,
        graph,
        prompt,
        new_tokens=request.new_tokens,
        warm_up_tokens=_WARM_UP_TOKENS,
        threads=request.threads,
    )
    token_ms = statistics.median(sample for samples in decode_ms for sample in samples)

    matrices = _of_matrices(MATRICES, traffic.matrices, profile, roof)
    kinds = [(kind, [matrix for matrix in traffic.matrices if matrix.kind == kind]) for kind in KINDS]
    operators_ms = by_operator(profile, (matrix.node for matrix in traffic.matrices))
    attention_ms = sum(taken for name, taken in operators_ms.items() if "Attention" in name)
    rest_ms = sum(operators_ms.values()) - attention_ms
    between_ms = _between_ms(token_ms, matrices.measured_ms, attention_ms + rest_ms, profile)
    return FlavorFigures(
        flavor=flavor,
        engine=spec.name,
        facts=facts,
        bandwidth_gb_s=roof.gb_s,
        fits_cache=fits_cache,
        memory_floor_ms=traffic.bytes / _BYTES_PER_MS / roof.memory_gb_s,
        kinds=[_of_matrices(kind, of_kind, profile, roof) for kind, of_kind in kinds if of_kind],
        matrices=matrices,
        attention=_figures(ATTENTION, traffic.cache_bytes, attention_ms, roof, formats=(traffic.cache_format,)),
        rest=_figures(REST, traffic.rest_bytes, rest_ms, roof),
        token=_figures(TOKEN, traffic.bytes, token_ms, roof, formats=()),
        between_ms=between_ms,
        outside_ms=None if between_ms is None else attention_ms + rest_ms + between_ms,
        operators_ms=operators_ms,
        profiled_token_ms=profile.token_ms,
        profile_cost_ms=profile.cost_ms,
        decode_ms=decode_ms,
        each_matrix=[_of_matrix(matrix, profile, roof) for matrix in traffic.matrices],
    )


def _between_ms(token_ms: float, matrices_ms: float | None, others_ms: float, profile: Profile) -> float | None:
    """What no operator takes: what is left of the token, yet not more than was seen between the profile's operators.

    More is left where the machine is not steady: something is late in every token, each time something else.
    """
    if matrices_ms is None:
        return None
    return min(max(0.0, token_ms - matrices_ms - others_ms), profile.between_ms)


def _decode(
    spec: EngineSpec, bundle: Path, prompt: list[int], request: Request, reporter: Reporter
) -> tuple[list[list[float]], dict[str, object]]:
    """Milliseconds of each token after the first, round by round, and what the engine says of itself."""
    reporter.step(f"{spec.name}: {request.rounds} times {request.new_tokens} tokens")
    graph = bundle / spec.flavors[0] / model_file(spec.flavors[0])
    context = request.past + max(request.new_tokens, _WARM_UP_TOKENS)
    try:
        with EngineProcess(spec, request.threads) as process:
            process.load(graph, threads=request.threads, context=context, prompts=[request.past])
            process.ask(do="generate", prompts=[prompt], new_tokens=_WARM_UP_TOKENS)
            rounds = [
                process.ask(do="generate", prompts=[prompt], new_tokens=request.new_tokens)
                for _ in range(request.rounds)
            ]
            return [samples["decode_ms"] for samples in rounds], process.facts
    except EngineFailed as error:
        raise CheckFailed(f"{graph.parent}: engine {spec.name}: {error}") from error


def _of_matrices(kind: str, matrices: Sequence[Matrix], profile: Profile, roof: _Roof) -> KindFigures:
    measured_ms = profile.of(matrix.node for matrix in matrices)
    bytes_read = sum(matrix.bytes for matrix in matrices)
    formats = sorted({matrix.format for matrix in matrices})
    return _figures(kind, bytes_read, measured_ms, roof, matrices=len(matrices), formats=formats)


def _of_matrix(matrix: Matrix, profile: Profile, roof: _Roof) -> MatrixFigures:
    figures = _figures(matrix.kind, matrix.bytes, profile.of([matrix.node]), roof)
    return MatrixFigures(
        **figures.model_dump(exclude={"matrices", "formats"}),
        name=matrix.name,
        rows=matrix.rows,
        columns=matrix.columns,
        format=matrix.format,
    )


def _figures(
    kind: str,
    bytes_read: int,
    measured_ms: float | None,
    roof: _Roof,
    *,
    matrices: int = 0,
    formats: Sequence[str] = ("fp32",),
) -> KindFigures:
    floor_ms = bytes_read / _BYTES_PER_MS / roof.gb_s
    # The profile counts in whole microseconds: what is very small takes none.
    gb_s = bytes_read / _BYTES_PER_MS / measured_ms if measured_ms else None
    return KindFigures(
        kind=kind,
        matrices=matrices,
        formats=list(formats),
        bytes=bytes_read,
        floor_ms=floor_ms,
        measured_ms=measured_ms,
        gb_s=gb_s,
        share=None if gb_s is None else gb_s / roof.gb_s,
    )
