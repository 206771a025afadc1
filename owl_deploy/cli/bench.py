"""`owl-deploy bench`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.cli.results import show
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter

if TYPE_CHECKING:
    from owl_deploy.engines.registry import EngineSpec


def bench(
    bundles: Annotated[Optional[list[Path]], typer.Argument(help="Bundles that `export` wrote.")] = None,
    sweep: Annotated[
        Optional[str], typer.Option(metavar="MODEL", help="Prune and export this model at every sparsity first.")
    ] = None,
    sparsities: Annotated[str, typer.Option(help="Sparsities of the sweep: FIRST:LAST:STEP, or a list.")] = "0:0.9:0.1",
    engines: Annotated[str, typer.Option(help="Comma-separated; see `owl-deploy engines list`.")] = "onnxruntime",
    dense_engines: Annotated[
        Optional[str], typer.Option(help="Engines to measure on the dense model only, for example onnxruntime-int4.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the results and the report.")] = Path(
        "owl-bench"
    ),
    threads: options.Threads = None,
    prompt: Annotated[
        str, typer.Option(help="Tokens of the prompt, or a list: 1,512,2048. Each is a workload.")
    ] = "512",
    batch: Annotated[str, typer.Option(help="Sequences decoded side by side, or a list: 1,4,16.")] = "1",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    repetitions: Annotated[
        int, typer.Option(min=1, help="Rounds. Each round times every engine at every sparsity.")
    ] = 5,
    text: Annotated[
        Optional[str],
        typer.Option(
            help="Text for prompt and perplexity, as for `evaluate`. Default: demo if it is installed, else none."
        ),
    ] = None,
    seqlen: Annotated[
        Optional[int], typer.Option(min=2, help="Tokens per evaluation window. Default: as many as the prompt has.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Evaluation windows.")] = 16,
    max_load: Annotated[
        float, typer.Option(min=0, help="Refuse to start while other processes keep more cores busy than this.")
    ] = 1.0,
    timeout: Annotated[
        float, typer.Option(min=1, help="End an engine that has not answered for this many seconds.")
    ] = 600,
    end_to_end: Annotated[
        bool,
        typer.Option(
            "--end-to-end", help="Also time the way from text to text: tokenise, prefill, decode with sampling."
        ),
    ] = False,
    fail_if: Annotated[
        Optional[list[str]],
        typer.Option(
            help="""Exit with 1 if this holds or cannot be told: 'speedup["sparse-int8"]@0.7 < 2.0'. May be repeated."""
        ),
    ] = None,
    method: options.Method = None,
    allocation: Annotated[
        Optional[str], typer.Option(help="Allocation of sparsity to blocks, as in `prune`. Default: owl.")
    ] = None,
    owl_m: options.OwlM = None,
    half_range: options.HalfRange = None,
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    calibration_seqlen: Annotated[
        Optional[int], typer.Option(min=2, help="Tokens per calibration window. Default: 2048.")
    ] = None,
    seed: options.Seed = 0,
    executor: Annotated[
        str, typer.Option(help="Where to prune and export a sweep: here, or side by side on ray.")
    ] = "here",
    ray_address: Annotated[
        Optional[str], typer.Option(help="Address of a running Ray cluster. Default: start one on this machine.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time prefill and decode of every engine on every bundle, and measure the perplexity of each.

    Before it is timed, each engine must compute the right logits on this machine: those torch computed at export, or
    those ONNX Runtime computes from the same weights. The engines take turns in every round, speed-ups are ratios
    within a round, and results.jsonl keeps every sample. With --json, each row is printed as one JSON object.

    An engine that fails becomes a row that says why. The exit code is 1 if no engine could run, or if a condition of
    --fail-if holds. Results that --output already holds stay in the report, so you can add engines, sparsities and
    workloads later.

    Examples:

        owl-deploy bench dense-bundle sparse-bundle --engines onnxruntime,deepsparse

        owl-deploy bench --sweep demo --sparsities 0,0.5,0.7 --calibration demo --samples 32
            --calibration-seqlen 512 -o results

        owl-deploy bench bundle --engines sparse --prompt 1,512,2048 --batch 1,4 --end-to-end

        owl-deploy bench dense sparse --engines sparse-int8 --fail-if 'speedup["sparse-int8"]@0.7 < 2.0'
    """
    from owl_deploy.benchmarking.fail_if import parse_condition
    from owl_deploy.benchmarking.run import Request, bench_bundles, first_available_text
    from owl_deploy.benchmarking.sweep import Executor, make_levels
    from owl_deploy.bundle.manifest import read_bundle
    from owl_deploy.machine.threads import available_cores
    from owl_deploy.models.source import resolve_model
    from owl_deploy.pruning.levels import parse_sparsities
    from owl_deploy.pruning.run import Calibration
    from owl_deploy.report.write import renew_report

    if executor not in ("here", "ray"):
        raise UserError(f"--executor {executor}: give here or ray")
    if bool(bundles) == (sweep is not None):
        raise UserError("give either bundles to measure, or a model with --sweep")
    reporter = Reporter(quiet=quiet)
    conditions = [parse_condition(text) for text in fail_if or ()]
    paths = list(bundles or ())
    _engines(engines, dense_engines, ())  # a name is checked before anything is read
    levels = [read_bundle(path).sparsity for path in paths] or parse_sparsities(sparsities)
    specs, only_dense = _engines(engines, dense_engines, paths)
    for condition in conditions:
        condition.check_names([spec.name for spec in (*specs, *only_dense)], levels)
    options.use_threads(threads)
    if sweep is not None:
        asked = {"method": method, "allocation": allocation, "owl_m": owl_m, "half_range": half_range}
        given = {name: value for name, value in asked.items() if value is not None}
        wanted = Calibration(calibration, samples, calibration_seqlen, seed)
        where = Executor("ray" if executor == "ray" else "here", ray_address, threads or 1)
        paths = make_levels(
            resolve_model(sweep), output, levels, given, wanted, specs, only_dense, executor=where, reporter=reporter
        )
        specs, only_dense = _engines(engines, dense_engines, paths)  # the family may lack some of a group's graphs
    request = Request(
        prompts=options.integers(prompt, "--prompt"),
        batches=options.integers(batch, "--batch"),
        new_tokens=new_tokens,
        repetitions=repetitions,
        threads=threads or available_cores(),
        text=text or first_available_text(),
        seqlen=seqlen,
        windows=windows,
        max_load=max_load,
        timeout_s=timeout,
        end_to_end=end_to_end,
        dense_only=tuple(only_dense),
    )
    rows = bench_bundles(paths, [*specs, *only_dense], request, output, reporter=reporter)
    report = renew_report(output, command=shlex.join(["owl-deploy", *sys.argv[1:]]))
    show(rows, report, json=json, quiet=quiet)
    failures = [(condition.text, reason) for condition in conditions if (reason := condition.failure(rows))]
    for condition_text, reason in failures:
        typer.echo(f"--fail-if {condition_text}: {reason}", err=True)
    if failures or all(row.status == "failed" for row in rows):
        raise typer.Exit(1)


def _engines(names: str, dense_names: str | None, bundles: Sequence[Path]) -> tuple[list[EngineSpec], list[EngineSpec]]:
    """Engines for all bundles, and further ones for the dense bundle. A group's name means those that can run here.

    Those are the ones whose graphs the bundles hold; without bundles, all.
    """
    from owl_deploy.bundle.manifest import flavors_of
    from owl_deploy.engines.registry import installed_engines

    flavors = flavors_of(bundles) if bundles else None
    specs = installed_engines(names, flavors)
    dense = installed_engines(dense_names, flavors) if dense_names else []
    return specs, [spec for spec in dense if spec not in specs]
