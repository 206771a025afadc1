"""`owl-deploy export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory that `prune` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the bundle.")],
    flavor: Annotated[
        str,
        typer.Option(
            help="standard, genai, sparse, all (these three), or a flavor for another engine: torch, gguf-q8_0, …"
        ),
    ] = "all",
    weights: Annotated[
        str, typer.Option(help="Weight format of the sparse flavor: packed32, packed16, int8, int4, or a list.")
    ] = "packed32",
    head: Annotated[
        Optional[str],
        typer.Option(
            help="Weight format of the sparse flavor's LM head: fp32, int8 or int4. Default: int8 with int8 and int4, "
            "else fp32."
        ),
    ] = None,
    kv_cache: Annotated[
        Optional[str],
        typer.Option(
            help="How genai and sparse graphs keep keys and values: fp32, or int8, with scales calibrated on "
            "--calibration. Default: fp32."
        ),
    ] = None,
    calibration: options.Calibration = "c4",
    samples: Annotated[Optional[int], typer.Option(min=2, help="Calibration windows. Default: 32.")] = None,
    seqlen: Annotated[Optional[int], typer.Option(min=2, help="Tokens per window. Default: 512.")] = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write ONNX graphs with a KV cache, and check each against the checkpoint.

    `standard` is portable (opset 14, for DeepSparse and any other reader of ONNX). `genai` is the graph that
    onnxruntime-genai builds, the fastest for dense weights in ONNX Runtime. `sparse` is the same graph with packed
    weights, for our own operator: packed32 (fp32), packed16 (11 bits), int8 or int4. What was rounded to int8 or int4
    by `prune` or `recover` is stored exactly as it is; other weights are rounded here, and the bundle says by how much.

    If the weights in a graph differ from the checkpoint's, or its logits from torch's, the export fails and leaves
    nothing behind. If the bundle exists already, the flavors it lacks are added.

    Examples:

        owl-deploy export sparse -o bundle

        owl-deploy export sparse -o bundle --flavor genai --json

        owl-deploy export sparse -o bundle --flavor sparse --weights packed16,int8

        owl-deploy export sparse -o bundle --flavor sparse --weights int8 --kv-cache int8 --calibration wikitext2

        owl-deploy export recovered -o bundle --flavor sparse --weights int4
    """
    from owl_deploy.bundle.names import FLAVORS, KV_CACHES, Flavor, sparse_flavor
    from owl_deploy.exporting.run import export_checkpoint
    from owl_deploy.pruning.run import Calibration
    from owl_deploy.sparse.formats import HEADS, WEIGHTS

    formats = [name.strip() for name in weights.split(",")]
    if not set(formats) <= set(WEIGHTS):
        raise UserError(f"--weights {weights}: choose from {', '.join(WEIGHTS)}")
    if head not in (None, *HEADS):
        raise UserError(f"--head {head}: choose one of {', '.join(HEADS)}")
    if kv_cache not in (None, *KV_CACHES):
        raise UserError(f"--kv-cache {kv_cache}: choose one of {', '.join(KV_CACHES)}")
    packed: list[Flavor] = [sparse_flavor(name) for name in WEIGHTS if name in formats]
    groups: dict[str, list[Flavor]] = {"all": ["standard", "genai", *packed], "sparse": packed}
    groups |= {name: [name] for name in FLAVORS}
    if flavor not in groups:
        raise UserError(f"--flavor {flavor}: choose one of {', '.join(groups)}")
    asked = groups[flavor]
    options.use_threads(threads)
    manifest = export_checkpoint(
        checkpoint,
        output,
        asked,
        head=head,
        kv_cache=kv_cache,
        calibration=Calibration(calibration, samples, seqlen, seed),
        reporter=Reporter(quiet=quiet),
    )
    if json:
        typer.echo(manifest.model_dump_json())
        return
    for name, record in manifest.flavors.items():
        line = f"{output / name}: {record.bytes / 2**20:.0f} MiB from {record.source}"
        if record.audit is not None:
            line += f", {record.audit.zeros / record.audit.weights:.2%} zeros, all in place"
        if record.parity is not None:
            worst = max(record.parity.max_abs_difference, record.parity.max_abs_difference_with_past)
            line += f", logits within {worst:.1e} of torch"
        if record.kv_cache is not None:
            line += (
                f", perplexity {record.kv_cache.perplexity:.4g} with a KV cache of int8 instead of "
                f"{record.kv_cache.perplexity_exact:.4g}"
            )
        typer.echo(line)
    for name in asked:
        if name not in manifest.flavors:
            typer.echo(f"{output / name}: missing; {manifest.unsupported[name]}")
