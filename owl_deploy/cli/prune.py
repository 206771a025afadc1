"""`owl-deploy prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter


def prune(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the sparse checkpoint.")],
    sparsity: Annotated[Optional[float], typer.Option(help="Fraction of all block weights to zero, 0 up to 1.")] = None,
    method: Annotated[
        Optional[str], typer.Option(help="Which weights go: magnitude, wanda (default) or sparsegpt.")
    ] = None,
    allocation: Annotated[Optional[str], typer.Option(help="How many of each block: owl (default) or uniform.")] = None,
    owl_m: Annotated[Optional[float], typer.Option(help="OWL: outliers exceed M times the mean. Default: 5.")] = None,
    owl_lambda: Annotated[
        Optional[float], typer.Option(help="OWL: half the range of block sparsities. Default: 0.08.")
    ] = None,
    pattern: Annotated[
        Optional[str], typer.Option(metavar="N:M", help="Prune N of every M weights, in place of --sparsity.")
    ] = None,
    recipe: Annotated[
        Optional[Path], typer.Option(help="Take all of the above from a SparseML or llm-compressor recipe.")
    ] = None,
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: Annotated[Optional[int], typer.Option(min=2, help="Tokens per window. Default: 2048.")] = None,
    seed: options.Seed = 0,
    evaluate: Annotated[
        Optional[str],
        typer.Option(metavar="SPEC", help="Also measure perplexity before and after on this text."),
    ] = None,
    evaluate_windows: Annotated[Optional[int], typer.Option(min=1, help="Evaluate on this many windows only.")] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Zero the weights of a causal LM that matter least, block by block.

    Writes a Hugging Face checkpoint with `recipe.yaml`, `recipe.explicit.yaml`, `pruning.json` and a plot of
    the block sparsities. What is there already from the same inputs is not made again.

    Examples:

        owl-deploy prune demo -o sparse --sparsity 0.7 --calibration demo --samples 32 --seqlen 512

        owl-deploy prune meta-llama/Llama-2-7b-hf -o sparse --sparsity 0.7 --method sparsegpt

        owl-deploy prune ./model -o sparse --recipe recipes/owl-wanda-70.yaml --calibration text.jsonl
    """
    from owl_deploy.checkpoints.source import resolve_model
    from owl_deploy.pruning.plan import PruningPlan
    from owl_deploy.recipes import read_recipe

    asked: dict[str, Any] = {
        "sparsity": sparsity,
        "method": method,
        "allocation": allocation,
        "owl_m": owl_m,
        "owl_lambda": owl_lambda,
        "pattern": pattern,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    read = None
    if recipe is not None:
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UserError(f"--recipe says what to prune; leave out {flags}, or edit the recipe")
        read = read_recipe(recipe)
        plan = read.plan
    else:
        plan = PruningPlan(**_with_pattern(given))
    source = resolve_model(model)

    # Mistakes above are told at once: only now torch is imported, which takes seconds.
    from owl_deploy.pruning.run import Calibration, Evaluation, prune_checkpoint

    options.use_threads(threads)
    reporter = Reporter(quiet=quiet)
    manifest = prune_checkpoint(
        source,
        output,
        plan,
        Calibration(calibration, samples, seqlen, seed),
        evaluation=Evaluation(evaluate, seqlen, evaluate_windows) if evaluate else None,
        recipe=read,
        reporter=reporter,
    )
    if json:
        typer.echo(manifest.model_dump_json())
    else:
        typer.echo(f"{output}: sparsity {manifest.sparsity_achieved:.4f} of {len(manifest.blocks)} blocks")
        if manifest.perplexity is not None:
            before, after = manifest.perplexity.before, manifest.perplexity.after
            typer.echo(f"perplexity on {manifest.perplexity.text.source}: {before:.2f} before, {after:.2f} after")


def _with_pattern(given: dict[str, Any]) -> dict[str, Any]:
    """Plan fields from the command line; a pattern sets sparsity and allocation."""
    from owl_deploy.pruning.plan import NM

    if "pattern" not in given:
        if "sparsity" not in given:
            raise UserError("say how much to prune: --sparsity, --pattern or --recipe")
        return given
    parts = str(given["pattern"]).split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UserError(f"--pattern {given['pattern']}: give N:M, for example 2:4")
    if "sparsity" in given:
        raise UserError("--pattern fixes the sparsity; leave out --sparsity")
    pattern = NM(int(parts[0]), int(parts[1]))
    return {"allocation": "uniform"} | given | {"pattern": pattern, "sparsity": pattern.prune / pattern.of}
