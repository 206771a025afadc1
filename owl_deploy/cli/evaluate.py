"""`owl-deploy evaluate`."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.evaluation.tasks import DEFAULT_BATCH
from owl_deploy.reporting import Reporter

if TYPE_CHECKING:
    from owl_deploy.evaluation.tasks import TaskAccuracy

_TEXT = "wikitext2"


def evaluate(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    text: Annotated[
        Optional[str],
        typer.Option(
            help="Text: wikitext2, c4, demo, a .txt, .jsonl or .parquet file, or a .npy of ids [n, length]. Default: "
            f"{_TEXT}, but no text with --tasks."
        ),
    ] = None,
    seqlen: options.Seqlen = None,
    windows: Annotated[Optional[int], typer.Option(min=1, help="Use only this many windows. Default: all.")] = None,
    tasks: Annotated[
        Optional[str], typer.Option(help="Zero-shot tasks of lm-eval: hellaswag,boolq,… They need the `tasks` extra.")
    ] = None,
    task_data: options.TaskData = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = DEFAULT_BATCH,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure the perplexity of a model with torch in fp32, or with --tasks its accuracy on zero-shot tasks.

    The text is cut into windows that do not overlap; in each, every token but the first is predicted. Of a task's
    examples, acc is the share whose right answer has the highest log-likelihood, and acc_norm the share whose right
    answer has the highest log-likelihood per character.

    Examples:

        owl-deploy evaluate demo --text demo --seqlen 512 --windows 24

        owl-deploy evaluate ./sparse --text wikitext2 --json

        owl-deploy evaluate ./sparse --tasks boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa

        owl-deploy evaluate ./sparse --tasks hellaswag --task-data hellaswag=validation.jsonl --limit 200 --json
    """
    from owl_deploy.evaluation.tasks import parse_tasks

    request = parse_tasks(tasks, task_data or (), limit, batch_size) if tasks is not None else None
    if request is None:
        options.need_tasks(task_data=task_data, limit=limit)

    import torch

    from owl_deploy.evaluation.perplexity import perplexity
    from owl_deploy.models.load import context_length, load_model, load_tokenizer, require_tokenizer
    from owl_deploy.models.source import resolve_model
    from owl_deploy.text.windows import check_windows, evaluation_windows

    options.use_threads(threads)
    reporter = Reporter(quiet=quiet)
    source = resolve_model(model)
    tokenizer = load_tokenizer(source)
    tokens = None
    if text is not None or request is None:
        tokens = evaluation_windows(text or _TEXT, tokenizer, seqlen=seqlen, limit=windows)
    zero_shot = None
    if request is not None:
        from owl_deploy.evaluation.zero_shot import ZeroShotTasks

        tokenizer = require_tokenizer(tokenizer, source, "--tasks")
        zero_shot = ZeroShotTasks(request)
    loaded = load_model(source, torch.float32)
    row: dict[str, Any] = {"model": model}
    if tokens is not None:
        check_windows(tokens, vocabulary=loaded.config.vocab_size, context=context_length(loaded))
        count, length = tokens.ids.shape
        row |= {
            "perplexity": perplexity(loaded, tokens.ids, reporter),
            "text": tokens.source,
            "windows": count,
            "seqlen": length,
            "text_sha256": tokens.sha256,
        }
    found: list[TaskAccuracy] = []
    if zero_shot is not None and tokenizer is not None:
        found = zero_shot.accuracies(loaded, tokenizer, reporter)
        row |= {"tasks": [dataclasses.asdict(one) for one in found], "tasks_sha256": zero_shot.sha256}
    if json:
        typer.echo(jsonlib.dumps(row))
        return
    if "perplexity" in row:
        of = f"{row['windows']} windows of {row['seqlen']} tokens of {row['text']}"
        typer.echo(f"perplexity {row['perplexity']:.4f} ({of})")
    for accuracy in found:
        typer.echo(str(accuracy))
