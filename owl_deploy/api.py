"""The commands as functions of Python: `import owl_deploy` has them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from owl_deploy.benchmarking.rows import Row
from owl_deploy.benchmarking.run import Request, bench_bundles
from owl_deploy.bundle.manifest import BundleManifest, flavors_of, read_bundle
from owl_deploy.bundle.names import Flavor, KvCache
from owl_deploy.engines.registry import installed_engines
from owl_deploy.errors import UserError
from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.generation.model import Sampling
from owl_deploy.generation.run import Generation, generate_text
from owl_deploy.machine.threads import available_cores
from owl_deploy.models.load import context_length, load_model, load_tokenizer
from owl_deploy.models.source import resolve_model
from owl_deploy.pruning.manifest import PruningManifest
from owl_deploy.pruning.plan import PruningPlan
from owl_deploy.pruning.run import Calibration, Evaluation, Execution, prune_checkpoint
from owl_deploy.recovery.manifest import RecoveryManifest
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.recovery.run import recover_checkpoint
from owl_deploy.report.write import renew_report
from owl_deploy.reporting import SILENT, Reporter
from owl_deploy.sparse.formats import Head
from owl_deploy.text.windows import check_windows, evaluation_windows

AnyPath = str | PathLike[str]


@dataclass(frozen=True)
class Bundle:
    """An export bundle on disk: its directory, and what `bundle.json` says of it."""

    path: Path
    manifest: BundleManifest

    def generate(
        self,
        prompt: str,
        *,
        flavor: Flavor | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # frozen
        threads: int | None = None,
        system: str | None = None,
        chat: bool = True,
    ) -> Generation:
        """Answer `prompt`, or continue it where there is no chat template or not `chat`, as `owl-deploy generate` does.

        Args:
            flavor: the graph to run; None for the smallest there is.
            sampling: greedy unless its temperature is above 0.
            threads: None for all cores.
            system: what the chat template's system says.

        Raises:
            UserError: the bundle has no tokenizer or no such flavor, or the prompt is too long.
        """
        return generate_text(
            self.path,
            prompt,
            flavor=flavor,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            threads=threads or available_cores(),
            system=system,
            chat=chat,
        )


def prune(
    model: str,
    output: AnyPath,
    plan: PruningPlan,
    calibration: Calibration = Calibration(),  # frozen
    *,
    evaluation: Evaluation | None = None,
    execution: Execution = Execution(),  # frozen
    reporter: Reporter = SILENT,
) -> PruningManifest:
    """Write a sparse checkpoint, as `owl-deploy prune` does; one that is there from the same inputs is not made again.

    Args:
        model: a hub id, a directory, a `.gguf` file, or `demo`.
        output: a new directory.
        evaluation: also measure perplexity before and after, on this text.

    Raises:
        UserError: something is wrong with the model, the text or the output directory, which is then not there.
    """
    return prune_checkpoint(
        resolve_model(model),
        Path(output),
        plan,
        calibration,
        evaluation=evaluation,
        execution=execution,
        reporter=reporter,
    )


def recover(
    sparse: str,
    dense: str,
    output: AnyPath,
    plan: RecoveryPlan,
    text: str,
    *,
    evaluation: Evaluation | None = None,
    execution: Execution = Execution(),  # frozen
    reporter: Reporter = SILENT,
) -> RecoveryManifest:
    """Train a sparse checkpoint towards its dense model, as `owl-deploy recover` does; zeros stay zeros.

    Args:
        sparse: a checkpoint with zeros.
        dense: what it was pruned from.
        output: a new directory.
        text: `wikitext2`, `c4`, `demo`, a `.txt`, `.jsonl` or `.parquet` file, or a `.npy` file of ids [n, length].
        evaluation: also measure perplexity before and after, on this text.

    Raises:
        UserError: something is wrong with the models, the text or the output directory, which is then not there.
        CheckFailed: the loss became NaN; the last good save is a checkpoint beside `output`.
    """
    return recover_checkpoint(
        resolve_model(sparse),
        resolve_model(dense),
        Path(output),
        plan,
        text,
        evaluation=evaluation,
        execution=execution,
        reporter=reporter,
    )


def evaluate(
    model: str, text: str, *, seqlen: int | None = None, windows: int | None = None, reporter: Reporter = SILENT
) -> float:
    """Perplexity of a model in torch, fp32, as `owl-deploy evaluate` measures it.

    Args:
        text: `wikitext2`, `c4`, `demo`, a `.txt`, `.jsonl` or `.parquet` file, or a `.npy` file of ids [n, length].
        seqlen: tokens of a window; None for 2048, or the length that a `.npy` file has.
        windows: how many windows of the text, from its beginning; None for all.

    Raises:
        UserError: something is wrong with the model or the text.
    """
    source = resolve_model(model)
    tokens = evaluation_windows(text, load_tokenizer(source), seqlen=seqlen, limit=windows)
    loaded = load_model(source, torch.float32)
    check_windows(tokens, vocabulary=loaded.config.vocab_size, context=context_length(loaded))
    return perplexity(loaded, tokens.ids, reporter)


def export(
    checkpoint: AnyPath,
    output: AnyPath,
    flavors: Sequence[Flavor] = ("standard", "genai", "sparse-packed32"),
    *,
    head: Head | None = None,
    kv_cache: KvCache | None = None,
    calibration: Calibration = Calibration(),  # frozen
    reporter: Reporter = SILENT,
) -> Bundle:
    """Write checked ONNX graphs into a bundle, as `owl-deploy export` does; flavors that are there are not made again.

    Args:
        head: how sparse flavors store the matrix of the vocabulary; None for what goes with their weights.
        kv_cache: how genai and sparse graphs keep keys and values; None for fp32, or what is there.
        calibration: the text by which 8-bit keys and values are scaled: by default 32 windows of 512 tokens.

    Raises:
        UserError: the checkpoint cannot be read or exported, or `output` is in use.
        CheckFailed: a graph does not compute what the checkpoint computes; no bundle is left.
    """
    manifest = export_checkpoint(
        *(Path(checkpoint), Path(output), flavors),
        head=head,
        kv_cache=kv_cache,
        calibration=calibration,
        reporter=reporter,
    )
    return Bundle(Path(output), manifest)


def load_bundle(path: AnyPath) -> Bundle:
    """A bundle that `export` has written.

    Raises:
        UserError: the directory is not a bundle, or `bundle.json` is damaged.
    """
    return Bundle(Path(path), read_bundle(Path(path)))


def serve(
    bundle: AnyPath,
    *,
    flavor: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 8,
    context: int | None = None,
    queue: int = 64,
    piece: int = 16,
    timeout_s: float | None = 600,
    api_key: str | None = None,
    log_prompts: bool = False,
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> None:
    """Answer with the API of OpenAI, as `owl-deploy serve` does, until SIGTERM or SIGINT.

    Args:
        flavor: the graph; None for the smallest sparse one, else the smallest of genai.
        port: 0 takes one that is free, which `reporter` tells.
        name: what requests call the model; None for the name of the bundle's directory.
        slots: answers that are made at once.
        context: tokens of each, prompt and answer; None for 2048, or the model's if it has fewer.
        queue: answers that may wait.
        piece: tokens of a prompt that are computed together, between the tokens of the running answers.
        timeout_s: from a request to the end of its answer; None for no limit.
        api_key: what requests have to bring; None to ask for none.
        threads: None for all cores.

    Raises:
        UserError: the bundle cannot be served, the port is taken, or the extra `serve` is not installed.
        KeyboardInterrupt: a second signal came before all answers were finished.
        CheckFailed: the engine has failed.
    """
    try:
        from owl_deploy.serving.app import Limits
        from owl_deploy.serving.run import Serving, serve_bundle, tell
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}; install it with: pip install 'owl-deploy[serve]'") from error
    serve_bundle(
        Path(bundle),
        Serving(flavor, name, slots, context, queue, piece, threads or available_cores()),
        host=host,
        port=port,
        limits=Limits(timeout_s=timeout_s),
        api_key=api_key,
        log_prompts=log_prompts,
        on_ready=lambda opened, url: tell(opened, url, reporter),
        reporter=reporter,
    )


def bench(
    bundles: Sequence[AnyPath],
    output: AnyPath,
    *,
    engines: str = "onnxruntime",
    request: Request = Request(),  # frozen
    reporter: Reporter = SILENT,
) -> list[Row]:
    """Measure engines on bundles, as `owl-deploy bench` does; rows and report go to the directory `output`.

    Args:
        engines: a comma-separated list, as `owl-deploy engines list` names them.
        request: what to time, on which text, in how many rounds.

    Raises:
        UserError: a bundle is not one, an engine is unknown or not installed, or the machine is busy.
    """
    paths = [Path(bundle) for bundle in bundles]
    specs = installed_engines(engines, flavors_of(paths))
    rows = bench_bundles(paths, specs, request, Path(output), reporter=reporter)
    renew_report(Path(output), command=f"owl_deploy.bench({[str(path) for path in paths]}, engines={engines!r})")
    return rows
