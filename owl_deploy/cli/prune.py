"""`owl-deploy prune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter

if TYPE_CHECKING:
    from owl_deploy.pruning.plan import PruningPlan
    from owl_deploy.recovery.plan import RecoveryPlan


def prune(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the sparse checkpoint.")],
    sparsity: Annotated[Optional[float], typer.Option(help="Fraction of all block weights to zero, 0 up to 1.")] = None,
    method: options.Method = None,
    allocation: Annotated[
        Optional[str],
        typer.Option(
            help="Allocation of sparsity to blocks: owl (default), owl-per-layer, owl-inverse, dlp, linear, global, "
            "erdos-renyi, er-plus, uniform; search (by linear, through evolution on held-out calibration text); or a "
            ".json file: a list with one sparsity per block, or an object with one per linear, by name."
        ),
    ] = None,
    bits: Annotated[
        Optional[float],
        typer.Option(
            help="For --allocation search: mean bits of a weight, masks and scales included, in place of --sparsity. "
            "Each linear is then dense in 8, 4 or 3 bits, or sparse in 8 or 4."
        ),
    ] = None,
    generations: Annotated[
        Optional[int], typer.Option(min=1, help="For --allocation search: generations. Default: 400.")
    ] = None,
    owl_m: options.OwlM = None,
    half_range: options.HalfRange = None,
    pattern: Annotated[
        Optional[str],
        typer.Option(
            metavar="N:M",
            help="Prune N of every M weights, in place of --sparsity. With mixed-N:M, OWL sets N by block.",
        ),
    ] = None,
    granularity: Annotated[
        Optional[str],
        typer.Option(
            help="Compare scores within a row (default for wanda), within a layer (magnitude, ria, admm), or global."
        ),
    ] = None,
    statistics: Annotated[
        Optional[str],
        typer.Option(
            help="Calibration inputs that a linear sees: those after pruned blocks (block, default), after pruned "
            "linears (linear, default for admm), or of the dense model (dense)."
        ),
    ] = None,
    dense_statistics: Annotated[
        bool, typer.Option("--dense-statistics", help="The same as --statistics dense.")
    ] = False,
    target: Annotated[
        Optional[str],
        typer.Option(
            help="For admm: reproduce the hidden states of the dense model (dense, default), or the output of each "
            "linear (layer)."
        ),
    ] = None,
    ablation: Annotated[
        Optional[str],
        typer.Option(help="For ablate-*: choose the mask at once (seq, default), or in turn with the updates (iter)."),
    ] = None,
    block_size: Annotated[
        Optional[int], typer.Option(help="For sparsegpt and ablate-*: columns pruned at a time. Default: 128.")
    ] = None,
    percdamp: Annotated[
        Optional[float],
        typer.Option(help="Damping, as a fraction of the mean of the Hessian's diagonal. Default: 0.01; for admm 0.3."),
    ] = None,
    admm_steps: Annotated[Optional[int], typer.Option(help="For admm: iterations. Default: 20.")] = None,
    weights: Annotated[
        Optional[str],
        typer.Option(
            help="Round the weights that are kept to int8, int4 or int3, in the same pass (GPTQ): the sparse format of "
            "that name stores them as they are. With --sparsity 0, rounds a dense model. With mixed-int4+int3 OWL "
            "gives each to half of the blocks, the finer to those with most outliers. Or a .json file: an object with "
            "one for each block or linear, by name."
        ),
    ] = None,
    recipe: Annotated[
        Optional[Path], typer.Option(help="Read all of the above from a SparseML or llm-compressor recipe.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Choose the parameters of the allocation by perplexity on held-out calibration windows; without "
            "--allocation, choose the allocation too.",
        ),
    ] = False,
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Annotated[
        Optional[str],
        typer.Option(metavar="SPEC", help="Also measure perplexity on this text, before and after pruning."),
    ] = None,
    evaluate_windows: options.EvaluateWindows = None,
    recover: Annotated[
        Optional[str],
        typer.Option(
            metavar="TOKENS",
            help="Then train what is kept on this many tokens, as `owl-deploy recover` does: 150k, 2M, … What was "
            "pruned is beside --output, as OUTPUT.pruned.",
        ),
    ] = None,
    recover_text: Annotated[
        Optional[str],
        typer.Option(metavar="SPEC", help="Text for --recover, or self. Default: that of --calibration."),
    ] = None,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Hold only one block in memory at a time, for safetensors models larger than memory. The results are "
            "the same.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, cuda:1, mps, …")] = "cpu",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Set the weights that matter least to zero, block by block.

    Writes a Hugging Face checkpoint with `recipe.yaml`, `recipe.explicit.yaml`, `pruning.json` and a plot of the block
    sparsities. If --output already holds the result of the same inputs, nothing is done. A run that was interrupted
    resumes after the last block it finished.

    The default, Wanda with OWL, is the paper's. `--method admm` gives the lowest perplexity and takes two to four times
    as long.

    Examples:

        owl-deploy prune demo -o sparse --sparsity 0.7 --calibration demo --samples 32 --seqlen 512

        owl-deploy prune meta-llama/Llama-2-7b-hf -o sparse --sparsity 0.7 --method admm --offload

        owl-deploy prune ./model -o sparse --sparsity 0.5 --method admm --weights int4 --calibration text.jsonl

        owl-deploy prune ./model -o mixed --sparsity 0 --weights mixed-int4+int3 --calibration text.jsonl

        owl-deploy prune demo -o sparse --sparsity 0.5 --method admm --calibration demo --recover 150k

        owl-deploy prune ./model -o sparse --pattern mixed-4:8 --calibration text.jsonl

        owl-deploy prune ./model -o sparse --recipe recipes/owl-wanda-70.yaml --calibration text.jsonl
    """
    from owl_deploy.models.source import resolve_model
    from owl_deploy.pruning.plan import PruningPlan
    from owl_deploy.pruning.recipe.read import read_recipe

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
        "weights": weights,
        "generations": generations,
        "bits": bits,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    read = None
    if recipe is not None:
        if given or tune:
            flags = ", ".join("--" + name.replace("_", "-") for name in (*given, *(["tune"] if tune else [])))
            raise UserError(f"--recipe sets what to prune; leave out {flags}, or edit the recipe")
        read = read_recipe(recipe)
        plan = read.plan
    else:
        plan = PruningPlan(**_fields(given))
    if tune:
        _check_tunable(plan, allocation)
    if recover_text is not None and recover is None:
        raise UserError("--recover-text is the text of --recover; say for how many tokens, or leave it out")
    training = _training(recover, plan, seqlen, seed, offload=offload) if recover is not None else None
    source = resolve_model(model)

    # Importing torch takes seconds, and the mistakes above are reported without it.
    from owl_deploy.pruning.run import Calibration, Evaluation, Execution, prune_checkpoint
    from owl_deploy.pruning.tune import TUNABLE

    options.use_threads(threads)
    reporter = Reporter(quiet=quiet)
    tune_over = ((plan.allocation,) if allocation and plan.allocation else TUNABLE) if tune else ()
    pruned = output if training is None else output.with_name(f"{output.name}.pruned")
    evaluation = Evaluation(evaluate, seqlen, evaluate_windows) if evaluate else None
    manifest = prune_checkpoint(
        source,
        pruned,
        plan,
        Calibration(calibration, samples, seqlen, seed),
        evaluation=evaluation,
        recipe=read,
        tune_over=tune_over,
        execution=Execution(device, offload),
        reporter=reporter,
    )
    if training is not None:
        from owl_deploy.cli.recover import show
        from owl_deploy.recovery.run import recover_checkpoint

        recovered = recover_checkpoint(
            resolve_model(str(pruned)),
            source,
            output,
            training,
            recover_text or calibration,
            evaluation=evaluation,
            execution=Execution(device),
            reporter=reporter,
        )
        show(output, recovered, json=json)
        return
    if json:
        typer.echo(manifest.model_dump_json())
    else:
        rounded = "" if manifest.bits_per_weight is None else f", {manifest.bits_per_weight:.2f} bits a weight"
        typer.echo(f"{output}: sparsity {manifest.sparsity_achieved:.4f} of {len(manifest.blocks)} blocks{rounded}")
        if manifest.perplexity is not None:
            before, after = manifest.perplexity.before, manifest.perplexity.after
            typer.echo(f"perplexity on {manifest.perplexity.text.source}: {before:.2f} before, {after:.2f} after")


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plan, from options: a pattern sets the sparsity, a file sets the allocation."""
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
            raise UserError(f"{fields['allocation']} sets every sparsity; leave out --sparsity and --pattern")
        fields |= _explicit(Path(fields["allocation"]))
    if "weights" in fields:
        if "linear_weights" in fields:
            raise UserError(f"{given['allocation']} sets all weights too; leave out --weights")
        fields |= _weights(fields.pop("weights"))
    if "bits" in fields:
        if "sparsity" in fields:
            raise UserError("--bits sets what the search keeps to; leave out --sparsity and --pattern")
        fields["sparsity"] = 0.0
    if "sparsity" not in fields:
        raise UserError("say how much to prune: --sparsity, --pattern, --bits or --recipe")
    return fields


_RENAMED = {"lambda": "half_range", "percdamp": "dampening"}


def _explicit(path: Path) -> dict[str, Any]:
    """The fields of a plan, from a JSON file: a list with a sparsity per block, or an object with one per linear."""
    from owl_deploy.files import read_json

    if not path.is_file():
        raise UserError(f"--allocation {path}: no such file")
    values = read_json(path)
    if isinstance(values, dict) and values and all(isinstance(value, dict) for value in values.values()):
        return _explicit_options(path, values)
    items = list(values.values()) if isinstance(values, dict) else values
    if not isinstance(items, list) or not items or not all(type(item) in (int, float) for item in items):
        raise UserError(
            f"{path}: give a list of numbers, one per block, or an object with one number per linear, by name"
        )
    field = {"linear_sparsities": values} if isinstance(values, dict) else {"block_sparsities": tuple(items)}
    return {"allocation": "explicit", "sparsity": sum(items) / len(items), **field}


def _explicit_options(path: Path, values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields of a plan, from an object with a sparsity and a grid for each linear: a search in bits writes it."""
    if not all(
        value.keys() == {"sparsity", "weights"} and type(value["sparsity"]) in (int, float) for value in values.values()
    ):
        raise UserError(f"{path}: give each linear a sparsity and its weights, or each a number")
    sparsities = {name: float(value["sparsity"]) for name, value in values.items()}
    grids = {name: value["weights"] for name, value in values.items()}
    mean = sum(sparsities.values()) / len(sparsities)
    return {"allocation": "explicit", "sparsity": mean, "linear_sparsities": sparsities, "linear_weights": grids}


def _weights(given: str) -> dict[str, Any]:
    """The fields of a plan, from a grid, a mix of them, or a JSON file with one for each block or linear."""
    from owl_deploy.files import read_json

    if given.startswith("mixed-"):
        return {"mix": tuple(given.removeprefix("mixed-").split("+"))}
    if not given.endswith(".json"):
        return {"weights": given}
    if not Path(given).is_file():
        raise UserError(f"--weights {given}: no such file")
    values = read_json(Path(given))
    if not isinstance(values, dict) or not values or not all(isinstance(value, str) for value in values.values()):
        raise UserError(f"{given}: give an object with int8, int4 or int3 for each block or linear, by name")
    return {"linear_weights": values}


def _training(tokens: str, plan: PruningPlan, seqlen: int | None, seed: int, *, offload: bool) -> RecoveryPlan:
    """What `--recover` asks for: the defaults of `recover`, on windows no longer than those of calibration."""
    from owl_deploy.recovery.plan import RecoveryPlan, parse_tokens

    if offload:
        raise UserError("--recover holds the whole model in memory; leave it out, or --offload")
    if plan.is_rounded and plan.weights is None:
        raise UserError("--recover trains all weights through one grid; leave it out, or give one to --weights")
    usual = RecoveryPlan(parse_tokens(tokens), weights=plan.weights, seed=seed)
    return replace(usual, seqlen=min(seqlen or usual.seqlen, usual.seqlen))


def _check_tunable(plan: PruningPlan, allocation: str | None) -> None:
    tunable = ("owl", "owl-per-layer", "owl-inverse", "dlp", "linear")
    if plan.pattern is not None:
        raise UserError(f"--tune chooses an allocation, and pattern {plan.pattern} sets it; leave out one of them")
    if allocation is not None and plan.allocation not in tunable:
        raise UserError(f"--tune: the {plan.allocation} allocation has no parameters; choose {', '.join(tunable)}")
