"""`owl-deploy export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory, as `prune` writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the bundle.")],
    flavor: Annotated[str, typer.Option(help="standard, genai or all.")] = "all",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write ONNX graphs with a KV cache, each checked against the checkpoint.

    `standard` is portable (opset 14, for DeepSparse and any ONNX user); `genai` is onnxruntime-genai's
    graph, the fastest one for ONNX Runtime. The export fails, and leaves nothing, if a weight is not in the graph
    unchanged, or if the graph computes other logits than torch.

    Examples:

        owl-deploy export sparse -o bundle

        owl-deploy export sparse -o bundle --flavor genai --json
    """
    from owl_deploy.export.names import FLAVORS
    from owl_deploy.export.run import export_checkpoint

    if flavor not in (*FLAVORS, "all"):
        raise UserError(f"--flavor {flavor}: choose one of {', '.join(FLAVORS)}, all")
    options.use_threads(threads)
    wanted = [name for name in FLAVORS if flavor in (name, "all")]
    manifest = export_checkpoint(checkpoint, output, wanted, reporter=Reporter(quiet=quiet))
    if json:
        typer.echo(manifest.model_dump_json())
        return
    for name, record in manifest.flavors.items():
        worst = max(record.parity.max_abs_difference, record.parity.max_abs_difference_with_past)
        zeros = record.audit.zeros / record.audit.weights
        typer.echo(
            f"{output / name}: {record.bytes / 2**20:.0f} MiB from {record.source}, {zeros:.2%} zeros all in place, "
            f"logits within {worst:.1e} of torch"
        )
