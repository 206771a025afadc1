"""`owl-deploy export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory, as `prune` writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the bundle.")],
    flavor: Annotated[
        str,
        typer.Option(help="standard, genai, sparse, all (of these), or what another engine runs: torch, gguf-q8_0, …"),
    ] = "all",
    weights: Annotated[
        str, typer.Option(help="Of the sparse flavor: packed32, packed16, int8, or a list of them.")
    ] = "packed32",
    head: Annotated[
        Optional[str],
        typer.Option(help="Of the sparse flavor: fp32 or int8 for the head. Default: int8 with int8, else fp32."),
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write ONNX graphs with a KV cache, each checked against the checkpoint.

    `standard` is portable (opset 14, for DeepSparse and any ONNX user); `genai` is onnxruntime-genai's
    graph, the fastest one for dense weights in ONNX Runtime; `sparse` is that graph with its weights packed, for our
    own operator: packed32 (fp32), packed16 (11 bits) or int8. The export fails, and leaves nothing, if a weight is not
    in the graph as it should be, or if the graph computes other logits than torch. A bundle that is there already gets
    the flavors it lacks.

    Examples:

        owl-deploy export sparse -o bundle

        owl-deploy export sparse -o bundle --flavor genai --json

        owl-deploy export sparse -o bundle --flavor sparse --weights packed16,int8
    """
    from owl_deploy.bundle.names import PEER_FLAVORS, Flavor, sparse_flavor
    from owl_deploy.export.run import export_checkpoint
    from owl_deploy.sparse.formats import HEADS, WEIGHTS

    formats = [name.strip() for name in weights.split(",")]
    if not set(formats) <= set(WEIGHTS):
        raise UserError(f"--weights {weights}: choose from {', '.join(WEIGHTS)}")
    if head not in (None, *HEADS):
        raise UserError(f"--head {head}: choose one of {', '.join(HEADS)}")
    packed: list[Flavor] = [sparse_flavor(name) for name in WEIGHTS if name in formats]
    flavors: dict[str, list[Flavor]] = {"standard": ["standard"], "genai": ["genai"], "sparse": packed}
    flavors["all"] = [name for names in flavors.values() for name in names]
    flavors |= {peer: [peer] for peer in PEER_FLAVORS}
    if flavor not in flavors:
        raise UserError(f"--flavor {flavor}: choose one of {', '.join(flavors)}")
    options.use_threads(threads)
    manifest = export_checkpoint(
        checkpoint,
        output,
        flavors[flavor],
        head=head,
        reporter=Reporter(quiet=quiet),
    )
    if json:
        typer.echo(manifest.model_dump_json())
        return
    for name, record in manifest.flavors.items():
        line = f"{output / name}: {record.bytes / 2**20:.0f} MiB from {record.source}"
        if record.audit is not None:
            line += f", {record.audit.zeros / record.audit.weights:.2%} zeros all in place"
        if record.parity is not None:
            worst = max(record.parity.max_abs_difference, record.parity.max_abs_difference_with_past)
            line += f", logits within {worst:.1e} of torch"
        typer.echo(line)
