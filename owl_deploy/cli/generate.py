"""`owl-deploy generate`."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import secrets
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter

_SEEDS = 2**31  # onnxruntime-genai takes a 32-bit integer


def generate(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `export` wrote.")],
    prompt: Annotated[str, typer.Argument(help="Text to answer or to continue; - reads it from stdin.")],
    flavor: Annotated[
        Optional[str], typer.Option(help="Graph to run. Default: the smallest sparse one, else genai, else standard.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sample at this temperature; 0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        Optional[int],
        typer.Option(
            min=0, help="Sample from this many of the likeliest tokens; 0 takes all of them and is slow. Default: 50."
        ),
    ] = None,
    top_p: Annotated[
        Optional[float],
        typer.Option(help="Sample from the likeliest tokens that together have this probability. Default: 1."),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, it makes tokens less likely that have occurred before.")
    ] = 1.0,
    seed: Annotated[
        Optional[int],
        typer.Option(min=0, max=_SEEDS - 1, help="The same seed gives the same text. Default: a new seed every time."),
    ] = None,
    threads: options.Threads = None,
    system: Annotated[Optional[str], typer.Option(metavar="TEXT", help="System message of the chat.")] = None,
    no_chat: Annotated[
        bool,
        typer.Option("--no-chat", help="Continue the prompt as it stands. Models without a chat template always do."),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate text with a bundle, from its sparse weights if it has any.

    The text goes to stdout as it is generated, and one line of timings to stderr. With --json, everything is printed as
    one JSON object at the end.

    Examples:

        owl-deploy generate bundle "What is the capital of France?"

        owl-deploy generate bundle - --no-chat --temperature 0.7 --top-p 0.9 --seed 1 < story.txt
    """
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise UserError("--top-k and --top-p restrict what is sampled from; give a --temperature above 0 too")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: give a probability above 0, at most 1")
    if not 0 < repetition_penalty < float("inf"):
        raise UserError(f"--repetition-penalty {repetition_penalty}: give a number above 0; 1 is none")
    text = _stdin() if prompt == "-" else prompt

    from owl_deploy.generation.model import Sampling
    from owl_deploy.generation.run import generate_text
    from owl_deploy.machine.threads import available_cores

    sampling = Sampling(
        temperature=temperature,
        top_k=50 if top_k is None else top_k,
        top_p=1.0 if top_p is None else top_p,
        repetition_penalty=repetition_penalty,
        seed=secrets.randbelow(_SEEDS) if seed is None else seed,
    )
    try:
        made = generate_text(
            bundle,
            text,
            flavor=flavor,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            threads=threads or available_cores(),
            system=system,
            chat=not no_chat,
            on_text=(lambda _: None) if json else lambda piece: typer.echo(piece, nl=False),
        )
    except KeyboardInterrupt:
        if not json:
            typer.echo(err=True)  # so that what a terminal shows next begins on a line of its own
        raise
    typer.echo(jsonlib.dumps(dataclasses.asdict(made)) if json else "")

    decode = "" if made.decode_ms_p50 is None else f", then {made.decode_ms_p50:.1f} ms/token (p50)"
    rate = "" if made.decode_tokens_per_s is None else f", {made.decode_tokens_per_s:.1f} tokens/s"
    chance = "" if made.seed is None else f"; seed {made.seed}"
    Reporter(quiet=quiet).step(
        f"{made.flavor}: {made.prompt_tokens} prompt tokens, {made.new_tokens} new; first after {made.ttft_ms:.0f} ms"
        f"{decode}{rate}{chance}"
    )


def _stdin() -> str:
    """All of stdin, without the line end that `echo` and editors put there."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on stdin is not text ({error}); give it in UTF-8") from error
