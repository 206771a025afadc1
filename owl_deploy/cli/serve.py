"""`owl-deploy serve`."""

from __future__ import annotations

import json as jsonlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from owl_deploy.cli import options
from owl_deploy.errors import UserError
from owl_deploy.reporting import Reporter

if TYPE_CHECKING:
    from owl_deploy.serving.run import Opened

_KEY_VARIABLE = "OWL_DEPLOY_API_KEY"


def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `export` wrote.")],
    flavor: Annotated[
        Optional[str],
        typer.Option(help="Graph to serve: a sparse one, or one of genai. Default: the smallest sparse one."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        Optional[str], typer.Option(help="What requests call the model. Default: the bundle's directory.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=256, help="Answers that are made at once.")] = 8,
    context: Annotated[
        Optional[int],
        typer.Option(min=2, help="Tokens of each, prompt and answer. Default: 2048, or the model's if it has fewer."),
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; more are refused with 429.")] = 64,
    piece: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of a prompt that are computed together, between the tokens of running answers."
        ),
    ] = 16,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds from a request to the end of its answer; 0 for no limit.")
    ] = 600,
    api_key: Annotated[
        Optional[Path],
        typer.Option(help=f"File with a key that requests have to bring. Default: the variable {_KEY_VARIABLE}."),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts and answers.")] = False,
    threads: options.Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print the address as JSON, once requests are taken.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Serve a bundle with the API of OpenAI, and a chat page.

    Requests join and leave the running batch at every token. What prompts have in common is computed once. The first
    SIGTERM or Ctrl-C takes no more requests and finishes what was begun; the second one ends at once.

    Examples:

        owl-deploy serve bundle

        owl-deploy serve bundle --slots 16 --context 4096 --port 9000

        OWL_DEPLOY_API_KEY=secret owl-deploy serve bundle --host 0.0.0.0
    """
    key = _api_key(api_key)
    try:
        from owl_deploy.serving.app import Limits
        from owl_deploy.serving.run import Serving, log_to, serve_bundle, tell
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}; install it with: pip install 'owl-deploy[serve]'") from error
    from owl_deploy.machine.threads import available_cores

    reporter = Reporter(quiet=quiet)
    serving = Serving(
        flavor=flavor,
        name=name,
        slots=slots,
        context=context,
        queue=queue,
        piece=piece,
        threads=threads or available_cores(),
    )

    def ready(opened: Opened, url: str) -> None:
        tell(opened, url, reporter)
        if json:
            found = {
                "url": url,
                "pid": os.getpid(),
                "model": opened.model.name,
                "flavor": opened.flavor,
                "slots": slots,
                "context": opened.model.context,
                "buffer_bytes": opened.buffer_bytes,
            }
            typer.echo(jsonlib.dumps(found))

    log_to(reporter)
    serve_bundle(
        bundle,
        serving,
        host=host,
        port=port,
        limits=Limits(timeout_s=timeout or None),
        api_key=key,
        log_prompts=log_prompts,
        on_ready=ready,
        reporter=reporter,
    )


def _api_key(file: Path | None) -> str | None:
    """The key from a file, or from the environment; None for none."""
    if file is None:
        return os.environ.get(_KEY_VARIABLE) or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key {file}: cannot be read ({error})") from error
    if not key:
        raise UserError(f"--api-key {file}: is empty; write the key into it")
    return key
