"""`owl-deploy study`."""

# No `from __future__ import annotations`: `_command` puts signatures together, and needs the types themselves.

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.evaluation.tasks import DEFAULT_BATCH, TaskRequest
from owl_deploy.paper.tables import TABLE_5_TASKS
from owl_deploy.reporting import Reporter

if TYPE_CHECKING:
    from owl_deploy.recovery.plan import RecoveryPlan
    from owl_deploy.studies.cells import Study

_TABLE_COLUMNS = 160  # if stdout is not a terminal

app = typer.Typer(
    no_args_is_help=True,
    help="The paper's studies, on your model: each writes a table, a plot and a CSV, with the paper's figures beside.",
)

Sparsities = Annotated[str, typer.Option(help="FIRST:LAST:STEP, or a list: 0.5,0.6,0.7.")]
Method = Annotated[str, typer.Option(help="Pruning method: wanda, sparsegpt, admm, … as in `prune`.")]
Generations = Annotated[
    Optional[int], typer.Option(min=1, help="Also search, by `--allocation search`, for so many generations.")
]
Tokens = Annotated[str, typer.Option(help="How many tokens to train on: 150k, 2M, …")]
RecoverText = Annotated[
    Optional[str],
    typer.Option(metavar="SPEC", help="Text to train on, or self. Default: that of --calibration."),
]
OwlMs = Annotated[str, typer.Option("--m", help="Values of M.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """The options of every study."""

    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)]
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory of the study. Cells it already holds are not measured again."),
    ]
    calibration: options.Calibration = "c4"
    samples: options.Samples = None
    seqlen: options.Seqlen = None
    seed: options.Seed = 0
    threads: options.Threads = None
    json: options.Json = False
    quiet: options.Quiet = False

    @property
    def evaluation(self) -> tuple[str, int | None] | None:
        """The text to measure perplexity on, and how many windows of it; None for no perplexity."""
        return None

    def run(self, study: "Study", tasks: TaskRequest | None = None) -> None:
        """Measure a study, write its files, and print its tables."""
        from owl_deploy.models.source import resolve_model
        from owl_deploy.pruning.run import Calibration, Evaluation
        from owl_deploy.report.study import write_study
        from owl_deploy.studies.run import run_study
        from owl_deploy.studies.tables import terminal_tables

        options.use_threads(self.threads)
        evaluation = None
        if self.evaluation is not None:
            text, windows = self.evaluation
            evaluation = Evaluation(text, self.seqlen, windows)
        result = run_study(
            resolve_model(self.model),
            self.output,
            study,
            Calibration(self.calibration, self.samples, self.seqlen, self.seed),
            evaluation,
            tasks,
            reporter=Reporter(quiet=self.quiet),
        )
        report = write_study(study, result, self.output)
        if self.json:
            typer.echo(result.model_dump_json())
        elif not self.quiet:
            width = None if sys.stdout.isatty() else _TABLE_COLUMNS
            Console(width=width).print(terminal_tables(study.tables(result)))
            typer.echo(str(report))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WithPerplexity(_Request):
    """Those of a study that measures perplexity."""

    evaluate: Annotated[str, typer.Option(metavar="SPEC", help="Text to measure perplexity on.")] = "wikitext2"
    evaluate_windows: options.EvaluateWindows = None

    @property
    def evaluation(self) -> tuple[str, int | None] | None:
        return self.evaluate, self.evaluate_windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PerhapsWithPerplexity(_Request):
    """Those of a study that measures perplexity if it is given a text."""

    evaluate: Annotated[Optional[str], typer.Option(metavar="SPEC", help="Also measure perplexity on this text.")] = (
        None
    )
    evaluate_windows: options.EvaluateWindows = None

    @property
    def evaluation(self) -> tuple[str, int | None] | None:
        return None if self.evaluate is None else (self.evaluate, self.evaluate_windows)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first parameter is a dataclass: its fields are options too."""
    request, *own = inspect.signature(function).parameters.values()
    shared = inspect.signature(request.annotation).parameters

    @functools.wraps(function)
    def command(**given: Any) -> None:
        asked = request.annotation(**{name: given.pop(name) for name in shared})
        function(asked, **given)

    # What must be given comes first, then what only this study has.
    parameters = sorted([*own, *shared.values()], key=lambda one: one.default is not inspect.Parameter.empty)
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    )
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    app.command()(command)
    return command


@_command
def lod(
    request: _PerhapsWithPerplexity,
    m: OwlMs = "3,5,7,10",
    sparsities: Annotated[
        Optional[str], typer.Option(help="Also prune to these sparsities: FIRST:LAST:STEP, or a list: 0.6,0.7.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods to prune by.")] = "magnitude,wanda,sparsegpt",
) -> None:
    """Share of outliers in each block (LOD), before and after pruning (paper, Figure 1 and Table 2).

    After pruning, the outliers among all weights are counted again, with the inputs and mean scores of the dense model.

    Examples:

        owl-deploy study lod demo -o lod --calibration demo --samples 32 --seqlen 512

        owl-deploy study lod ./model -o lod --sparsities 0.6,0.7 --methods magnitude,wanda --evaluate wikitext2
    """
    from owl_deploy.studies.cells import levels, numbers
    from owl_deploy.studies.lod import lod as study

    pruned = levels(sparsities) if sparsities else []
    request.run(study(numbers(m, "--m"), pruned, _names(methods)))


@_command
def granularity(request: _WithPerplexity, sparsities: Sparsities = "0.1:0.7:0.1") -> None:
    """Perplexity when scores are compared within a row, a layer or the whole model (paper, Table 3).

    Examples:

        owl-deploy study granularity demo -o granularity --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study granularity ./model -o granularity --sparsities 0.5,0.7
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.compare import granularity as study

    request.run(study(levels(sparsities)))


@_command
def allocation(
    request: _WithPerplexity,
    sparsities: Sparsities = "0.1:0.8:0.1",
    method: Method = "wanda",
    generations: Generations = None,
) -> None:
    """Perplexity by how sparsity is allocated to blocks (paper, Table 4, and later allocations).

    Examples:

        owl-deploy study allocation demo -o allocation --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study allocation ./model -o allocation --method sparsegpt --sparsities 0.6,0.7 --generations 400
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.compare import allocation as study

    request.run(study(levels(sparsities), method, generations))


@_command
def nm(request: _WithPerplexity) -> None:
    """Perplexity of Wanda in N:8 patterns, uniform and mixed by OWL (paper, Table 10).

    The paper's N counts the weights that are kept, ours those that are pruned; the table shows both.

    Examples:

        owl-deploy study nm demo -o nm --calibration demo --samples 32 --seqlen 512 --evaluate demo
    """
    from owl_deploy.studies.compare import n_of_m

    request.run(n_of_m())


@_command
def per_layer(request: _WithPerplexity, sparsities: Sparsities = "0.7", method: Method = "wanda") -> None:
    """Perplexity of OWL with one sparsity per block, or one per linear (paper, Tables 13 and 14).

    Examples:

        owl-deploy study per-layer demo -o per-layer --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study per-layer ./model -o per-layer --sparsities 0.5,0.7 --method sparsegpt
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.per_layer import per_layer as study

    request.run(study(levels(sparsities), method))


@_command
def efficiency(request: _Request, sparsities: Sparsities = "0.7") -> None:
    """Seconds that scores, allocations and weight updates take, without forward passes (paper, Table 7).

    Examples:

        owl-deploy study efficiency demo -o efficiency --calibration demo --samples 32 --seqlen 512 --threads 1
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.efficiency import efficiency as study

    request.run(study(levels(sparsities)))


@_command
def sweep(
    request: _WithPerplexity,
    sparsities: Sparsities = "0.7",
    method: Method = "wanda",
    m: OwlMs = "3,5,7,10",
    lambdas: Annotated[str, typer.Option(help="Values of lambda.")] = "0.02,0.05,0.08,0.1,0.2",
) -> None:
    """Perplexity by OWL's M and lambda (paper, section 2.2).

    The study chooses nothing. To choose M and lambda, use `prune --tune`, which holds out calibration text for it.

    Examples:

        owl-deploy study sweep demo -o sweep --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study sweep ./model -o sweep --method sparsegpt --sparsities 0.6,0.7 --m 5,7 --lambdas 0.05,0.08
    """
    from owl_deploy.studies.cells import levels, numbers
    from owl_deploy.studies.compare import sweep as study

    request.run(study(levels(sparsities), method, numbers(m, "--m"), numbers(lambdas, "--lambdas")))


@_command
def methods(
    request: _WithPerplexity,
    sparsities: Sparsities = "0.5:0.8:0.1",
    methods: Annotated[
        Optional[str], typer.Option("--methods", help="Only these methods. Table 1 has magnitude,wanda,sparsegpt.")
    ] = None,
) -> None:
    """Perplexity of every method, uniform and with OWL, and of ADMM in its variants (paper, Table 1).

    Examples:

        owl-deploy study methods demo -o methods --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study methods ./model -o table1 --methods magnitude,wanda,sparsegpt --sparsities 0.7
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.compare import methods as study

    request.run(study(levels(sparsities), _names(methods) if methods else ()))


@_command
def zero_shot(
    request: _PerhapsWithPerplexity,
    sparsities: Sparsities = "0.7",
    methods: Annotated[str, typer.Option(help="Methods to prune by.")] = "magnitude,wanda,sparsegpt",
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval.")] = ",".join(TABLE_5_TASKS),
    task_data: options.TaskData = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = DEFAULT_BATCH,
) -> None:
    """Accuracy on seven zero-shot tasks, by method, uniform and with OWL (paper, Table 5).

    Needs the `tasks` extra; the tasks' data comes from the hub, or from files given with --task-data.

    Examples:

        owl-deploy study zero-shot demo -o zero-shot --calibration demo --samples 32 --seqlen 512
            --tasks hellaswag --task-data hellaswag=validation.jsonl --limit 500

        owl-deploy study zero-shot ./model -o zero-shot --methods wanda,admm --sparsities 0.5,0.7
    """
    from owl_deploy.evaluation.tasks import parse_tasks
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.zero_shot import zero_shot as study

    asked = parse_tasks(tasks, task_data or (), limit, batch_size)
    request.run(study(levels(sparsities), _names(methods)), asked)


@_command
def recovery(
    request: _WithPerplexity,
    sparsities: Sparsities = "0.7",
    method: Method = "sparsegpt",
    allocation: Annotated[str, typer.Option(help="Allocation of sparsity, as in `prune`.")] = "owl",
    tokens: Tokens = "1M",
    recover_text: RecoverText = None,
    recoveries: Annotated[
        str, typer.Option(help="Ways to recover: lora-adapter (the paper's), lora (masked and merged), full, blocks.")
    ] = "lora-adapter,lora,full,blocks",
    weights: Annotated[
        str,
        typer.Option(
            help="Also train rounded weights, sparse and dense, through these grids: int8, int4, int3; or none."
        ),
    ] = "int4,int3",
) -> None:
    """Perplexity before and after training what was kept, beside dense models with the same training (paper, Table 6).

    Checkpoints stay in OUTPUT/checkpoints; an interrupted training goes on from its last save. The table begins with
    whether dense is better at no more bits.

    Examples:

        owl-deploy study recovery demo -o recovery --calibration demo --samples 32 --seqlen 512 --evaluate demo
            --tokens 150k

        owl-deploy study recovery ./model -o recovery --sparsities 0.5,0.7 --method admm --recoveries full --tokens 10M
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.recovery import recovery as study

    asked = levels(sparsities)
    grids = [] if weights == "none" else _names(weights)
    text = recover_text or request.calibration
    request.run(
        study(asked, method, allocation, _training(request, tokens), text, _names(recoveries), grids),
    )


@_command
def sparsity(
    request: _WithPerplexity,
    sparsities: Sparsities = "0.1:0.9:0.1",
    method: Method = "wanda",
    generations: Generations = None,
    tokens: Annotated[
        Optional[str], typer.Option(help="Also recover what OWL left, on so many tokens: 150k, 2M, …")
    ] = None,
    recover_text: RecoverText = None,
) -> None:
    """Perplexity by sparsity: uniform, OWL, and if told how long, searched and recovered (paper, Figure 2).

    Recovered checkpoints stay in OUTPUT/checkpoints.

    Examples:

        owl-deploy study sparsity demo -o figure2 --calibration demo --samples 32 --seqlen 512 --evaluate demo
            --generations 100 --tokens 150k

        owl-deploy study sparsity ./model -o figure2 --method admm --sparsities 0.3:0.7:0.1
    """
    from owl_deploy.studies.cells import levels
    from owl_deploy.studies.compare import by_level as study

    asked = levels(sparsities)
    if recover_text is not None and tokens is None:
        raise UserError("--recover-text is the text of a recovery; say on how many --tokens, or leave it out")
    recovery = None
    if tokens is not None:
        recovery = (_training(request, tokens), recover_text or request.calibration)
    request.run(study(asked, method, generations, recovery))


@_command
def mixed_precision(
    request: _WithPerplexity,
    mixes: Annotated[
        str, typer.Option(help="Mixes of bits, rounded to nearest by the paper's quantiser; or none.")
    ] = "4+3,4+3+2,4+2",
    grids: Annotated[str, typer.Option(help="Mixes of our own grids, rounded by GPTQ; or none.")] = "int4+int3",
    seeds: Annotated[int, typer.Option(min=1, help="How many random choices of blocks to take the mean of.")] = 3,
    m: Annotated[float, typer.Option("--m", help="OWL's M.")] = 5.0,
) -> None:
    """Perplexity of mixed precision: more bits for blocks with more outliers (paper, Table 12).

    Beside it, blocks of one precision, and the same mixes by mean weight and at random. To write a model whose grids
    OWL has chosen, use `prune --weights mixed-int4+int3`.

    Examples:

        owl-deploy study mixed-precision demo -o mixed --calibration demo --samples 32 --seqlen 512 --evaluate demo

        owl-deploy study mixed-precision ./model -o mixed --mixes 4+3 --grids int8+int4,int4+int3 --seeds 5
    """
    from owl_deploy.studies.mixed_precision import mixed_precision as study

    asked = [[] if text == "none" else _names(text) for text in (mixes, grids)]
    request.run(study(asked[0], asked[1], seeds, m))


def _training(request: _Request, tokens: str) -> "RecoveryPlan":
    """The defaults of `recover`, on windows no longer than those of calibration, measured at the end alone."""
    from owl_deploy.recovery.plan import RecoveryPlan, parse_tokens

    usual = RecoveryPlan(parse_tokens(tokens), evaluations=1, seed=request.seed)
    return dataclasses.replace(usual, seqlen=min(request.seqlen or usual.seqlen, usual.seqlen))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
