"""`owl-deploy recover`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.reporting import Reporter

if TYPE_CHECKING:
    from owl_deploy.recovery.manifest import RecoveryManifest


def recover(
    sparse: Annotated[str, typer.Argument(help="Sparse checkpoint, of owl-deploy or another tool.")],
    dense: Annotated[str, typer.Option(help=f"What it was pruned from, and is trained towards. {options.MODEL_HELP}")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the recovered checkpoint.")],
    text: Annotated[
        str,
        typer.Option(
            help="Text to train on: c4, wikitext2, demo, a .txt, .jsonl or .parquet file, a .npy of ids, or self: what "
            "the dense model writes itself."
        ),
    ],
    tokens: Annotated[str, typer.Option(help="How many tokens to train on: 150k, 2M, …")] = "1M",
    method: Annotated[
        str,
        typer.Option(
            help="full trains every kept weight of the blocks and the norms, lora low-rank changes of some linears, "
            "blocks one block after the other towards the dense block's output."
        ),
    ] = "full",
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA's changes.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="LoRA's alpha: changes are scaled by alpha over rank.")] = 16.0,
    lora_dropout: Annotated[float, typer.Option(help="Share of a change's inputs that is dropped.")] = 0.05,
    lora_targets: Annotated[str, typer.Option(help="Linears that LoRA changes, by name.")] = "q_proj,v_proj",
    merge: Annotated[
        bool,
        typer.Option(
            "--merge/--no-merge",
            help="Mask LoRA's changes, so that they become weights and no zero is lost; or write them, unmasked, as an "
            "adapter in PEFT's format.",
        ),
    ] = True,
    weights: Annotated[
        Optional[str],
        typer.Option(
            help="Round weights to int8, int4 or int3 in every forward pass, so that they are trained for it; the "
            "checkpoint then has the rounded weights, in fp32. The model may be dense."
        ),
    ] = None,
    lr: Annotated[
        Optional[float],
        typer.Option(help="Peak of the learning rate. Default: 2.5e-4, for lora 1e-4, for blocks 2e-4."),
    ] = None,
    kl: Annotated[float, typer.Option(help="Weight of the KL divergence to the dense model.")] = 1.0,
    hidden: Annotated[
        float, typer.Option(help="Weight of SquareHead: the error of hidden states over their mean square.")
    ] = 1.0,
    cross_entropy: Annotated[float, typer.Option(help="Weight of the cross-entropy of the text.")] = 0.0,
    states: Annotated[str, typer.Option(help="Hidden states to compare: those of the last block, or of all.")] = "last",
    positions: Annotated[
        float, typer.Option(help="Share of positions at which losses over the vocabulary are computed.")
    ] = 0.25,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 4,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences that run at once; more take more memory.")] = 2,
    passes: Annotated[int, typer.Option(min=1, help="How often the text may be repeated.")] = 4,
    evaluations: Annotated[int, typer.Option(min=1, help="How often to measure perplexity on held-out text.")] = 10,
    patience: Annotated[
        Optional[int],
        typer.Option(min=1, help="Stop after this many evaluations without a better one, and take the best weights."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the text, and of what is held out.")] = 0,
    evaluate: Annotated[
        Optional[str], typer.Option(metavar="SPEC", help="Also measure perplexity on this text, before and after.")
    ] = None,
    evaluate_windows: options.EvaluateWindows = None,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload", help="With --method blocks: hold one block of each model in memory, for safetensors files."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, cuda:1, mps, …")] = "cpu",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the weights that pruning has kept, towards the dense model; zeros stay zeros.

    Writes a checkpoint with `recipe.yaml`, `recovery.json`, and loss and perplexity as `recovery.csv` and
    `recovery.png`. A twentieth of the text, at most 16 windows, is held out to measure on. Forward passes are computed
    in bf16 where the CPU has instructions for it, in fp32 elsewhere; the weights that are trained are fp32. A run that
    was interrupted resumes from its last save, to the same bytes. Several processes, of one machine or of many, train
    together if `accelerate launch` starts them (on CPUs, `torchrun`).

    Examples:

        owl-deploy recover sparse --dense demo -o recovered --text demo --tokens 150k

        owl-deploy recover sparse --dense demo -o recovered --text self --tokens 150k

        owl-deploy recover sparse --dense meta-llama/Llama-3.2-1B -o recovered --text c4 --tokens 10M --patience 2

        owl-deploy recover sparse --dense ./large -o recovered --text c4 --tokens 250k --method blocks --offload

        owl-deploy recover sparse --dense demo -o recovered --text news.jsonl --weights int4 --evaluate wikitext2 --json

        accelerate launch --num_processes 4 $(which owl-deploy) recover sparse --dense ./model -o recovered --text c4
            --tokens 100M --device cuda --batch 16
    """
    from typing import cast

    from owl_deploy.models.source import resolve_model
    from owl_deploy.recovery.plan import Hidden, Method, RecoveryPlan, parse_tokens
    from owl_deploy.rounding import Rounded

    plan = RecoveryPlan(
        tokens=parse_tokens(tokens),
        method=cast(Method, method),
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        lora_targets=tuple(name.strip() for name in lora_targets.split(",") if name.strip()),
        merge=merge,
        kl=kl,
        hidden=hidden,
        cross_entropy=cross_entropy,
        states=cast(Hidden, states),
        positions=positions,
        weights=cast(Optional[Rounded], weights),
        learning_rate=lr,
        seqlen=seqlen,
        batch=batch,
        micro_batch=micro_batch,
        passes=passes,
        evaluations=evaluations,
        patience=patience,
        seed=seed,
    )
    source, towards = resolve_model(sparse), resolve_model(dense)

    # Importing torch takes seconds, and the mistakes above are reported without it.
    from owl_deploy.pruning.run import Evaluation, Execution
    from owl_deploy.recovery.helper import help_recovery
    from owl_deploy.recovery.processes import launched
    from owl_deploy.recovery.run import recover_checkpoint

    options.use_threads(threads)
    with launched(device) as processes:
        if not processes.is_main:
            help_recovery(source, towards, plan, processes)
            return
        manifest = recover_checkpoint(
            source,
            towards,
            output,
            plan,
            text,
            evaluation=Evaluation(evaluate, seqlen, evaluate_windows) if evaluate else None,
            execution=Execution(processes.device, offload),
            processes=processes,
            reporter=Reporter(quiet=quiet),
        )
    show(output, manifest, json=json)


def show(output: Path, manifest: RecoveryManifest, *, json: bool) -> None:
    """Print how a recovery went."""
    if json:
        typer.echo(manifest.model_dump_json())
        return
    typer.echo(f"{output}: trained on {manifest.tokens} tokens, {manifest.tokens_per_s:.0f} a second; zeros kept")
    measured = {"held-out text": manifest.held_out, manifest.perplexity.text.source: manifest.perplexity}
    for name, scores in measured.items():
        typer.echo(f"perplexity on {name}: {scores.before:.2f} before, {scores.after:.2f} after")
