"""`owl-deploy study`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from owl_deploy.cli import options
from owl_deploy.evaluation.tasks import DEFAULT_BATCH, TaskRequest
from owl_deploy.paper.tables import TABLE_5_TASKS
from owl_deploy.reporting import Reporter

if TYPE_CHECKING:
    from owl_deploy.studies.cells import Study

_TABLE_COLUMNS = 160  # where the tables do not go to a terminal

app = typer.Typer(
    no_args_is_help=True,
    help="The paper's studies, on your model: each a table, a plot and a CSV, with the paper's figures beside.",
)

Model = Annotated[str, typer.Argument(help=options.MODEL_HELP)]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Directory of the study. Cells that are there already are not measured again."),
]
Sparsities = Annotated[str, typer.Option(help="FIRST:LAST:STEP, or a list: 0.5,0.6,0.7.")]
Method = Annotated[str, typer.Option(help="Which weights go: wanda, sparsegpt, admm, … as in `prune`.")]
OwlMs = Annotated[str, typer.Option("--m", help="Values of M.")]
Evaluate = Annotated[str, typer.Option(metavar="SPEC", help="Text to measure perplexity on.")]


@app.command()
def lod(
    model: Model,
    output: Output,
    m: OwlMs = "3,5,7,10",
    sparsities: Annotated[
        Optional[str], typer.Option(help="Also prune to these: FIRST:LAST:STEP, or a list: 0.6,0.7.")
    ] = None,
    methods: Annotated[str, typer.Option(help="By these methods.")] = "magnitude,wanda,sparsegpt",
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Annotated[
        Optional[str], typer.Option(metavar="SPEC", help="Also measure perplexity on this text.")
    ] = None,
    evaluate_windows: options.EvaluateWindows = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Outliers by block (LOD), and what pruning leaves of them (paper, Figure 1 and Table 2).

    After pruning, outliers are counted with the dense model's mean scores and inputs, among all weights.

    Examples:

        owl-deploy study lod demo -o lod --calibration demo --samples 32 --seqlen 512

        owl-deploy study lod ./model -o lod --sparsities 0.6,0.7 --methods magnitude,wanda --evaluate wikitext2
    """
    from owl_deploy.studies.cells import levels, numbers
    from owl_deploy.studies.lod import lod as study

    pruned = levels(sparsities) if sparsities else []
    asked = study(numbers(m, "--m"), pruned, _names(methods))
    texts = (calibration, samples, seqlen, seed), (evaluate, evaluate_windows)
    _run(asked, model, output, *texts, threads=threads, json=json, quiet=quiet)


@app.command()
def granularity(
    model: Model,
    output: Output,
    sparsities: Sparsities = "0.1:0.7:0.1",
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Evaluate = "wikitext2",
    evaluate_windows: options.EvaluateWindows = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Scores compared within a row, a layer or the whole model (paper, Table 3).

    Examples:

        owl-deploy study granularity demo -o granularity --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study granularity ./model -o granularity --sparsities 0.5,0.7
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.compare import granularity as study

    texts = (calibration, samples, seqlen, seed), (evaluate, evaluate_windows)
    _run(study(levels(sparsities)), model, output, *texts, threads=threads, json=json, quiet=quiet)


@app.command()
def allocation(
    model: Model,
    output: Output,
    sparsities: Sparsities = "0.1:0.8:0.1",
    method: Method = "wanda",
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Evaluate = "wikitext2",
    evaluate_windows: options.EvaluateWindows = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Every allocation of sparsity to blocks (paper, Table 4, and those that came after).

    Examples:

        owl-deploy study allocation demo -o allocation --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study allocation ./model -o allocation --method sparsegpt --sparsities 0.6,0.7
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.compare import allocation as study

    texts = (calibration, samples, seqlen, seed), (evaluate, evaluate_windows)
    _run(study(levels(sparsities), method), model, output, *texts, threads=threads, json=json, quiet=quiet)


@app.command()
def nm(
    model: Model,
    output: Output,
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Evaluate = "wikitext2",
    evaluate_windows: options.EvaluateWindows = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Wanda in N:8, uniform and mixed by OWL (paper, Table 10).

    The paper's N counts the weights that are kept, ours those that are pruned; the table has both.

    Examples:

        owl-deploy study nm demo -o nm --calibration demo --samples 32 --seqlen 512 --evaluate demo
    """
    from owl_deploy.studies.compare import n_of_m

    texts = (calibration, samples, seqlen, seed), (evaluate, evaluate_windows)
    _run(n_of_m(), model, output, *texts, threads=threads, json=json, quiet=quiet)


@app.command()
def per_layer(
    model: Model,
    output: Output,
    sparsities: Sparsities = "0.7",
    method: Method = "wanda",
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Evaluate = "wikitext2",
    evaluate_windows: options.EvaluateWindows = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """OWL with one outlier count a block, or one a linear (paper, Tables 13 and 14).

    Examples:

        owl-deploy study per-layer demo -o per-layer --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study per-layer ./model -o per-layer --sparsities 0.5,0.7 --method sparsegpt
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.per_layer import per_layer as study

    texts = (calibration, samples, seqlen, seed), (evaluate, evaluate_windows)
    _run(study(levels(sparsities), method), model, output, *texts, threads=threads, json=json, quiet=quiet)


@app.command()
def efficiency(
    model: Model,
    output: Output,
    sparsities: Sparsities = "0.7",
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Seconds for scores, allocations and updates, without forward passes (paper, Table 7).

    Examples:

        owl-deploy study efficiency demo -o efficiency --calibration demo --samples 32 --seqlen 512 --threads 1
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.efficiency import efficiency as study

    texts = (calibration, samples, seqlen, seed), (None, None)
    _run(study(levels(sparsities)), model, output, *texts, threads=threads, json=json, quiet=quiet)


@app.command()
def sweep(
    model: Model,
    output: Output,
    sparsities: Sparsities = "0.7",
    method: Method = "wanda",
    m: OwlMs = "3,5,7,10",
    lambdas: Annotated[str, typer.Option(help="Values of lambda.")] = "0.02,0.05,0.08,0.1,0.2",
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Evaluate = "wikitext2",
    evaluate_windows: options.EvaluateWindows = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Perplexity by OWL's M and lambda (paper, section 2.2).

    It chooses nothing: `prune --tune` does, on text held out from calibration.

    Examples:

        owl-deploy study sweep demo -o sweep --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study sweep ./model -o sweep --method sparsegpt --sparsities 0.6,0.7 --m 5,7 --lambdas 0.05,0.08
    """
    from owl_deploy.studies.cells import levels, numbers
    from owl_deploy.studies.compare import sweep as study

    asked = study(levels(sparsities), method, numbers(m, "--m"), numbers(lambdas, "--lambdas"))
    texts = (calibration, samples, seqlen, seed), (evaluate, evaluate_windows)
    _run(asked, model, output, *texts, threads=threads, json=json, quiet=quiet)


@app.command()
def methods(
    model: Model,
    output: Output,
    sparsities: Sparsities = "0.5:0.8:0.1",
    methods: Annotated[
        Optional[str], typer.Option("--methods", help="Only these, for example magnitude,wanda,sparsegpt: Table 1's.")
    ] = None,
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Evaluate = "wikitext2",
    evaluate_windows: options.EvaluateWindows = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Every method, uniform and with OWL, and ADMM in its parts (paper, Table 1).

    Examples:

        owl-deploy study methods demo -o methods --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study methods ./model -o table1 --methods magnitude,wanda,sparsegpt --sparsities 0.7
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.compare import methods as study

    asked = study(levels(sparsities), _names(methods) if methods else ())
    texts = (calibration, samples, seqlen, seed), (evaluate, evaluate_windows)
    _run(asked, model, output, *texts, threads=threads, json=json, quiet=quiet)


@app.command()
def zero_shot(
    model: Model,
    output: Output,
    sparsities: Sparsities = "0.7",
    methods: Annotated[str, typer.Option(help="Prune by these methods.")] = "magnitude,wanda,sparsegpt",
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval.")] = ",".join(TABLE_5_TASKS),
    task_data: options.TaskData = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = DEFAULT_BATCH,
    calibration: options.Calibration = "c4",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = 0,
    evaluate: Annotated[
        Optional[str], typer.Option(metavar="SPEC", help="Also measure perplexity on this text.")
    ] = None,
    evaluate_windows: options.EvaluateWindows = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Accuracy at seven zero-shot tasks, each method uniform and with OWL (paper, Table 5).

    Needs the `tasks` extra; the tasks' data comes from the hub, or from files given with --task-data.

    Examples:

        owl-deploy study zero-shot demo -o zero-shot --calibration demo --samples 32 --seqlen 512
            --tasks hellaswag --task-data hellaswag=validation.jsonl --limit 500

        owl-deploy study zero-shot ./model -o zero-shot --methods wanda,admm --sparsities 0.5,0.7
    """
    from owl_deploy.evaluation.tasks import parse_tasks
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.zero_shot import zero_shot as study

    request = parse_tasks(tasks, task_data or (), limit, batch_size)
    texts = (calibration, samples, seqlen, seed), (evaluate, evaluate_windows)
    asked = study(levels(sparsities), _names(methods))
    _run(asked, model, output, *texts, request, threads=threads, json=json, quiet=quiet)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _run(
    study: Study,
    model: str,
    output: Path,
    calibration: tuple[str, int | None, int | None, int],
    evaluate: tuple[str | None, int | None],
    tasks: TaskRequest | None = None,
    *,
    threads: int | None,
    json: bool,
    quiet: bool,
) -> None:
    """Measure a study, write its files, and print its tables.

    Args:
        calibration: text, samples, seqlen and seed.
        evaluate: text and windows.
    """
    from owl_deploy.models.source import resolve_model
    from owl_deploy.pruning.run import Calibration, Evaluation
    from owl_deploy.report.study import write_study
    from owl_deploy.studies.run import run_study
    from owl_deploy.studies.tables import terminal_tables

    options.use_threads(threads)
    wanted, (text, windows) = Calibration(*calibration), evaluate
    result = run_study(
        resolve_model(model),
        output,
        study,
        wanted,
        Evaluation(text, wanted.seqlen, windows) if text else None,
        tasks,
        reporter=Reporter(quiet=quiet),
    )
    report = write_study(study, result, output)
    if json:
        typer.echo(result.model_dump_json())
    elif not quiet:
        width = None if sys.stdout.isatty() else _TABLE_COLUMNS
        Console(width=width).print(terminal_tables(study.tables(result)))
        typer.echo(str(report))
