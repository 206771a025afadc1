"""`owl-deploy evaluate`."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.reporting import Reporter


def evaluate(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    text: Annotated[
        str,
        typer.Option(help="Text: wikitext2, c4, demo, a .txt, .jsonl or .parquet file, or a .npy of ids [n, length]."),
    ] = "wikitext2",
    seqlen: options.Seqlen = None,
    windows: Annotated[Optional[int], typer.Option(min=1, help="Use only this many windows. Default: all.")] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Perplexity of a model in torch, fp32.

    The text is cut into windows that do not overlap; each predicts its own tokens after the first.

    Examples:

        owl-deploy evaluate demo --text demo --seqlen 512 --windows 24

        owl-deploy evaluate ./sparse --text wikitext2 --json
    """
    import torch

    from owl_deploy.checkpoints.load import context_length, load_model, load_tokenizer
    from owl_deploy.checkpoints.source import resolve_model
    from owl_deploy.evaluation.perplexity import perplexity
    from owl_deploy.text.windows import check_windows, evaluation_windows

    options.use_threads(threads)
    source = resolve_model(model)
    tokens = evaluation_windows(text, load_tokenizer(source), seqlen=seqlen, limit=windows)
    loaded = load_model(source, torch.float32)
    check_windows(tokens, vocabulary=loaded.config.vocab_size, context=context_length(loaded))
    value = perplexity(loaded, tokens.ids, Reporter(quiet=quiet))
    count, length = tokens.ids.shape
    if json:
        row = {
            "perplexity": value,
            "text": text,
            "windows": count,
            "seqlen": length,
            "text_sha256": tokens.sha256,
        }
        typer.echo(jsonlib.dumps({"model": model, **row}))
    else:
        typer.echo(f"perplexity {value:.4f} ({count} windows of {length} tokens of {text})")
