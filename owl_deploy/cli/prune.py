"""`owl-deploy prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter

if TYPE_CHECKING:
    from owl_deploy.pruning.plan import PruningPlan


def prune(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the sparse checkpoint.")],
    sparsity: Annotated[Optional[float], typer.Option(help="Fraction of all block weights to zero, 0 up to 1.")] = None,
    method: options.Method = None,
    allocation: Annotated[
        Optional[str],
        typer.Option(
            help="How many of each block: owl (default), owl-per-layer, owl-inverse, dlp, linear, global, "
            "erdos-renyi, er-plus, uniform, or a .json of sparsities: a list of blocks', or linears' by name."
        ),
    ] = None,
    owl_m: options.OwlM = None,
    half_range: options.HalfRange = None,
    pattern: Annotated[
        Optional[str],
        typer.Option(
            metavar="N:M", help="Prune N of every M weights, in place of --sparsity; or mixed-N:M, N on average by OWL."
        ),
    ] = None,
    granularity: Annotated[
        Optional[str],
        typer.Option(help="Compare scores within a row (wanda's), a layer (magnitude, ria, admm), or global."),
    ] = None,
    statistics: Annotated[
        Optional[str],
        typer.Option(
            help="Inputs to look at: block (after pruned blocks, default), linear (after pruned linears, admm's) or "
            "dense."
        ),
    ] = None,
    dense_statistics: Annotated[
        bool, typer.Option("--dense-statistics", help="The same as --statistics dense.")
    ] = False,
    target: Annotated[
        Optional[str],
        typer.Option(help="admm reproduces the dense model's stream (dense, default) or each layer's output (layer)."),
    ] = None,
    ablation: Annotated[
        Optional[str], typer.Option(help="ablate-*: choose the mask at once (seq, default) or in turn (iter).")
    ] = None,
    block_size: Annotated[
        Optional[int], typer.Option(help="sparsegpt, ablate-*: columns at a time. Default: 128.")
    ] = None,
    percdamp: Annotated[
        Optional[float],
        typer.Option(help="Damping, as a fraction of the Hessian's mean diagonal. Default: 0.01; admm 0.3."),
    ] = None,
    admm_steps: Annotated[Optional[int], typer.Option(help="admm: iterations. Default: 20.")] = None,
    recipe: Annotated[
        Optional[Path], typer.Option(help="Take all of the above from a SparseML or llm-compressor recipe.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Choose the allocation's parameters, or without --allocation the allocation too, by perplexity on "
            "calibration windows held out.",
        ),
    ] = False,
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Annotated[
        Optional[str],
        typer.Option(metavar="SPEC", help="Also measure perplexity before and after on this text."),
    ] = None,
    evaluate_windows: options.EvaluateWindows = None,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload", help="Hold one block in memory at a time: for safetensors larger than memory. Same results."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, cuda:1, mps, …")] = "cpu",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Zero the weights of a causal LM that matter least, block by block.

    Writes a Hugging Face checkpoint with `recipe.yaml`, `recipe.explicit.yaml`, `pruning.json` and a plot of
    the block sparsities. What is there already from the same inputs is not made again, and a run that was killed
    goes on after the last block it finished.

    The default, OWL with Wanda, is the paper's. `--method admm` gives the lowest perplexity, and takes two to four
    times as long.

    Examples:

        owl-deploy prune demo -o sparse --sparsity 0.7 --calibration demo --samples 32 --seqlen 512

        owl-deploy prune meta-llama/Llama-2-7b-hf -o sparse --sparsity 0.7 --method admm --offload

        owl-deploy prune ./model -o sparse --pattern mixed-4:8 --calibration text.jsonl

        owl-deploy prune ./model -o sparse --recipe recipes/owl-wanda-70.yaml --calibration text.jsonl
    """
    from owl_deploy.models.source import resolve_model
    from owl_deploy.pruning.plan import PruningPlan
    from owl_deploy.pruning.recipe.recipes import read_recipe

    asked: dict[str, Any] = {
        "sparsity": sparsity,
        "method": method,
        "allocation": allocation,
        "owl_m": owl_m,
        "lambda": half_range,
        "pattern": pattern,
        "granularity": granularity,
        "statistics": statistics,
        "dense_statistics": dense_statistics or None,
        "target": target,
        "ablation": ablation,
        "block_size": block_size,
        "percdamp": percdamp,
        "admm_steps": admm_steps,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    read = None
    if recipe is not None:
        if given or tune:
            flags = ", ".join("--" + name.replace("_", "-") for name in (*given, *(["tune"] if tune else [])))
            raise UserError(f"--recipe says what to prune; leave out {flags}, or edit the recipe")
        read = read_recipe(recipe)
        plan = read.plan
    else:
        plan = PruningPlan(**_fields(given))
    if tune:
        _check_tunable(plan, allocation)
    source = resolve_model(model)

    # Mistakes above are told at once: only now torch is imported, which takes seconds.
    from owl_deploy.pruning.run import Calibration, Evaluation, Execution, prune_checkpoint
    from owl_deploy.pruning.tune import TUNABLE

    options.use_threads(threads)
    reporter = Reporter(quiet=quiet)
    tune_over = ((plan.allocation,) if allocation and plan.allocation else TUNABLE) if tune else ()
    manifest = prune_checkpoint(
        source,
        output,
        plan,
        Calibration(calibration, samples, seqlen, seed),
        evaluation=Evaluation(evaluate, seqlen, evaluate_windows) if evaluate else None,
        recipe=read,
        tune_over=tune_over,
        execution=Execution(device, offload),
        reporter=reporter,
    )
    if json:
        typer.echo(manifest.model_dump_json())
    else:
        typer.echo(f"{output}: sparsity {manifest.sparsity_achieved:.4f} of {len(manifest.blocks)} blocks")
        if manifest.perplexity is not None:
            before, after = manifest.perplexity.before, manifest.perplexity.after
            typer.echo(f"perplexity on {manifest.perplexity.text.source}: {before:.2f} before, {after:.2f} after")


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """Plan fields from the command line's: a pattern sets the sparsity, a file the allocation."""
    from owl_deploy.pruning.plan import parse_pattern

    fields = dict(given)
    fields |= {new: fields.pop(old) for old, new in _RENAMED.items() if old in fields}
    if fields.pop("dense_statistics", False):
        if fields.get("statistics", "dense") != "dense":
            raise UserError(f"--dense-statistics and --statistics {fields['statistics']} exclude each other")
        fields["statistics"] = "dense"
    if "pattern" in fields and (pattern := parse_pattern(fields.pop("pattern"))) is not None:
        if "sparsity" in fields:
            raise UserError("--pattern fixes the sparsity; leave out --sparsity")
        fields |= {"pattern": pattern, "sparsity": pattern.ratio}
    if str(fields.get("allocation", "")).endswith(".json"):
        if "sparsity" in fields:
            raise UserError(f"{fields['allocation']} says all sparsities; leave out --sparsity and --pattern")
        fields |= _explicit(Path(fields["allocation"]))
    if "sparsity" not in fields:
        raise UserError("say how much to prune: --sparsity, --pattern or --recipe")
    return fields


_RENAMED = {"lambda": "half_range", "percdamp": "dampening"}


def _explicit(path: Path) -> dict[str, Any]:
    """Plan fields of a JSON file: a list of sparsities by block, or a mapping of linears' full names to theirs."""
    from owl_deploy.files import read_json

    if not path.is_file():
        raise UserError(f"--allocation {path}: no such file")
    values = read_json(path)
    items = list(values.values()) if isinstance(values, dict) else values
    if not isinstance(items, list) or not items or not all(type(item) in (int, float) for item in items):
        raise UserError(f"{path}: give a list of numbers, one for each block, or numbers by the names of linears")
    field = {"linear_sparsities": values} if isinstance(values, dict) else {"block_sparsities": tuple(items)}
    return {"allocation": "explicit", "sparsity": sum(items) / len(items), **field}


def _check_tunable(plan: PruningPlan, allocation: str | None) -> None:
    tunable = ("owl", "owl-per-layer", "owl-inverse", "dlp", "linear")
    if plan.pattern is not None:
        raise UserError(f"--tune chooses an allocation, and pattern {plan.pattern} sets it; leave out one of them")
    if allocation is not None and plan.allocation not in tunable:
        raise UserError(f"--tune: the {plan.allocation} allocation has no parameters; choose {', '.join(tunable)}")
