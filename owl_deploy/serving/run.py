"""`owl-deploy serve`: open a bundle, start the engine, and answer HTTP until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import uvicorn

from owl_deploy.bundle.manifest import GRAPH, MANIFEST, BundleManifest, read_bundle
from owl_deploy.bundle.names import FLAVORS, SPARSE_BY_BYTES, Flavor, weights_of
from owl_deploy.bundle.verify import verify_files
from owl_deploy.errors import CheckFailed, UserError
from owl_deploy.files import read_json
from owl_deploy.models.load import load_tokenizer, require_tokenizer
from owl_deploy.models.source import ModelSource
from owl_deploy.reporting import SILENT, Reporter
from owl_deploy.serving.app import Limits, create_app
from owl_deploy.serving.constraints import Grammars
from owl_deploy.serving.engine import Engine
from owl_deploy.serving.metrics import Metrics
from owl_deploy.serving.prepare import ServedModel
from owl_deploy.serving.runner import SlotRunner
from owl_deploy.serving.scheduler import Scheduler

_CONFIG = "genai_config.json"
_PREFERRED: tuple[Flavor, ...] = (*SPARSE_BY_BYTES, "genai-int4", "genai-int8", "genai")
_DEFAULT_CONTEXT = 2048
_SWITCH_S = 0.0005  # how long a thread may hold Python's lock: the engine's must not wait for the HTTP one
_SAME_SIGNAL_S = 0.3  # `timeout`, shells and make send one signal to the process and to its group: it comes twice
_MIB = 2**20


@dataclass(frozen=True)
class Serving:
    """How a bundle is served.

    Attributes:
        flavor: the graph; None for the smallest sparse one, else the smallest dense one.
        name: what requests call the model; None for the name of the bundle's directory.
        slots: answers that are made at once.
        context: tokens of each, prompt and answer; None for 2048, or what the model was made for if that is less.
        queue: answers that may wait for a slot.
        piece: tokens of a prompt that are computed together, between the tokens of the running answers.
        threads: of the engine.
    """

    flavor: str | None = None
    name: str | None = None
    slots: int = 8
    context: int | None = None
    queue: int = 64
    piece: int = 16
    threads: int = 1


@dataclass(frozen=True)
class Opened:
    """A bundle that can be served.

    Attributes:
        buffer_bytes: of all keys and values.
    """

    engine: Engine
    model: ServedModel
    metrics: Metrics
    flavor: Flavor
    serving: Serving
    buffer_bytes: int


def open_bundle(bundle: Path, serving: Serving) -> Opened:
    """Load the model and make the engine, which is not started.

    Raises:
        UserError: the bundle has no such flavor or no tokenizer, or the slots do not fit into memory.
    """
    manifest = read_bundle(bundle)
    flavor = choose_flavor(bundle, manifest, serving.flavor)
    verify_files(bundle, manifest.flavors[flavor].graph_files)
    folder = bundle / flavor
    source = ModelSource(str(folder), folder)
    tokenizer = require_tokenizer(load_tokenizer(source), source, "serve")
    config = read_json(folder / _CONFIG)
    if not config["search"].get("past_present_share_buffer"):
        raise UserError(f"{folder}: its attention has no buffer that slots can share; this model cannot be served")
    longest: int = config["model"]["context_length"]
    context = min(_DEFAULT_CONTEXT, longest) if serving.context is None else serving.context
    if context > longest:
        raise UserError(f"--context {context}: the model was made for {longest} tokens; give at most as many")
    runner = SlotRunner(
        folder / GRAPH,
        packed=weights_of(flavor) is not None,
        slots=serving.slots,
        context=context,
        threads=serving.threads,
    )
    _allocate(runner, serving.slots, context)
    stop_tokens = _ids(config["model"].get("eos_token_id"))
    model = ServedModel(
        name=serving.name or bundle.resolve().name,
        created=int((bundle / MANIFEST).stat().st_mtime),
        tokenizer=tokenizer,
        context=context,
        vocabulary=manifest.vocabulary,
        stop_tokens=frozenset(stop_tokens),
        most_answers=serving.slots + serving.queue,
        grammars=Grammars(tokenizer, manifest.vocabulary, stop_tokens),
    )
    scheduler = Scheduler(slots=serving.slots, context=context, piece=serving.piece, waiting=serving.queue)
    metrics = Metrics()
    engine = Engine(runner, scheduler, metrics)
    metrics.watch(engine.counts, serving.slots, runner.buffer_bytes)
    return Opened(engine, model, metrics, flavor, serving, runner.buffer_bytes)


def choose_flavor(bundle: Path, manifest: BundleManifest, asked: str | None) -> Flavor:
    """The graph to serve.

    Raises:
        UserError: there is none, or none of this name, that slots can share.
    """
    here = [flavor for flavor in _PREFERRED if flavor in manifest.flavors]
    if not here:
        raise UserError(f"{bundle}: holds no graph that can be served; add one: owl-deploy export … --flavor genai")
    if asked is None:
        return here[0]
    for flavor in here:
        if flavor == asked:
            return flavor
    what = "is not here, or its graph cannot be served" if asked in FLAVORS else "is unknown"
    raise UserError(f"--flavor {asked}: {what}; choose from {', '.join(here)}")


def _allocate(runner: SlotRunner, slots: int, context: int) -> None:
    available = psutil.virtual_memory().available
    if runner.buffer_bytes > available:
        raise UserError(
            f"--slots {slots} of --context {context}: their keys and values take {runner.buffer_bytes / _MIB:.0f} MiB, "
            f"and {available / _MIB:.0f} MiB are free; give fewer, or shorter ones"
        )
    runner.allocate()


def _ids(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


# -------------------- the server


class _Server(uvicorn.Server):
    """Uvicorn's, with our signals: the first one lets answers be finished, the second one does not."""

    def __init__(self, config: uvicorn.Config, on_drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_drain = on_drain
        self.was_forced = False
        self._told_at = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only it gets signals
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del sig, frame
        if not self.should_exit:
            self.should_exit = True
            self._told_at = time.monotonic()
            self._on_drain()
        elif time.monotonic() - self._told_at > _SAME_SIGNAL_S:
            self.force_exit = self.was_forced = True


def serve_bundle(
    bundle: Path,
    serving: Serving,
    *,
    host: str,
    port: int,
    limits: Limits = Limits(),  # frozen
    api_key: str | None = None,
    log_prompts: bool = False,
    on_ready: Callable[[Opened, str], object] = lambda _opened, _url: None,
    reporter: Reporter = SILENT,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was begun; a second one does not wait for that.

    Args:
        port: 0 for any that is free.
        api_key: what requests have to bring; None to ask for none.
        log_prompts: write prompts and answers to the log.
        on_ready: is called with the address once requests are taken.

    Raises:
        UserError: the bundle cannot be served, or the port is taken.
        KeyboardInterrupt: a second signal came.
        CheckFailed: the engine has failed.
    """
    with _listening(host, port) as listener:
        opened = open_bundle(bundle, serving)
        engine = opened.engine
        application = create_app(
            engine, opened.model, opened.metrics, limits=limits, api_key=api_key, log_prompts=log_prompts
        )
        config = uvicorn.Config(application, log_config=None, access_log=False, lifespan="off", server_header=False)

        def drain() -> None:
            engine.close()
            reporter.step("stopping: answers that were begun are finished; a second signal ends them")

        server = _Server(config, drain)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        engine.start()
        try:
            asyncio.run(_serve(server, listener, engine, lambda: on_ready(opened, url)))
        finally:
            failed = not engine.is_alive
            engine.stop()
            sys.setswitchinterval(before)
        if server.was_forced:
            raise KeyboardInterrupt
        if failed:
            raise CheckFailed("the engine has failed; see the log above")


async def _serve(server: _Server, listener: socket.socket, engine: Engine, on_ready: Callable[[], object]) -> None:
    watching = asyncio.create_task(_watch(server, engine, on_ready))
    try:
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()


async def _watch(server: _Server, engine: Engine, on_ready: Callable[[], object]) -> None:
    """Say when requests are taken; end the server if the engine does not run any more."""
    while not server.started:
        await asyncio.sleep(0.01)
    on_ready()
    while engine.is_alive:
        await asyncio.sleep(0.5)
    server.should_exit = True


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound, so that a port that is taken is known before a model is loaded.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host}: is no address of this machine ({error.strerror})") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise UserError(f"--port {port}: cannot be had on {host} ({error.strerror}); choose another") from error
        yield listener


def tell(opened: Opened, url: str, reporter: Reporter) -> None:
    """Say what is served, how much memory it may take, and where."""
    model, serving = opened.model, opened.serving
    reporter.step(
        f"{model.name} ({opened.flavor}): {serving.slots} slots of {model.context} tokens, "
        f"{opened.buffer_bytes / _MIB:.0f} MiB of keys and values; {serving.queue} answers may wait"
    )
    reporter.step(f"{url}  chat; {url}/v1  API; {url}/docs  documentation")


def log_to(reporter: Reporter) -> None:
    """Let what the server logs go to the terminal."""
    handler = logging.StreamHandler(reporter.console.file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("owl_deploy.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO if name == "owl_deploy.serving" else logging.WARNING)
        logger.propagate = False
