"""The HTTP application: its paths, and how errors are told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from owl_deploy import __version__
from owl_deploy.serving.assemble import Assembler
from owl_deploy.serving.engine import Closed, Engine, Event
from owl_deploy.serving.errors import ApiError, ErrorBody, ErrorDetail, invalid, unavailable
from owl_deploy.serving.guard import Guard
from owl_deploy.serving.metrics import Metrics
from owl_deploy.serving.page import CHAT_PAGE, CONTENT_SECURITY_POLICY, docs_page
from owl_deploy.serving.prepare import (
    Prepared,
    ServedModel,
    Tell,
    prepare_chat,
    prepare_completion,
    token_ids,
)
from owl_deploy.serving.requests import ChatRequest, CompletionRequest, TokenizeRequest
from owl_deploy.serving.responses import ChatCompletion, Completion, ModelCard, ModelList, Status, Tokens
from owl_deploy.serving.scheduler import QueueFull
from owl_deploy.serving.text import TokenNames

_LOG = logging.getLogger("owl_deploy.serving")
Result = TypeVar("Result")
Events = asyncio.Queue[tuple[int, Event]]


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        timeout_s: from its arrival to the end of its answer; None for as long as it takes.
        body_bytes: of its body.
    """

    timeout_s: float | None = 600.0
    body_bytes: int = 1 << 20


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request asks for what it cannot have.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "The queue is full; Retry-After says when to come back.",
        500: "The answer failed.",
        503: "The server is being stopped.",
        504: "The answer took too long.",
    }.items()
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def create_app(
    engine: Engine,
    model: ServedModel,
    metrics: Metrics,
    *,
    limits: Limits = Limits(),  # frozen
    api_key: str | None = None,
    log_prompts: bool = False,
) -> Guard:
    """The ASGI application that answers with `engine`, which is running.

    Args:
        api_key: what requests have to bring; None to ask for none.
        log_prompts: write prompts and answers to the log.
    """
    app = FastAPI(title="owl-deploy serve", version=__version__, docs_url=None, redoc_url=None)
    service = _Service(engine, model, limits, log_prompts)
    _add_errors(app)
    _add_pages(app, metrics)
    _add_status(app, engine)

    @app.get("/v1/models", responses=_only(401), tags=["models"])
    async def list_models() -> ModelList:
        """The models that requests can name: one."""
        return ModelList(data=[service.card()])

    @app.get("/v1/models/{name:path}", responses=_only(401, 404), tags=["models"])
    async def show_model(name: str) -> ModelCard:
        """One of them."""
        service.check_name(name)
        return service.card()

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS | _STREAM, tags=["answers"])
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await service.respond(body, request)

    @app.post("/v1/completions", response_model=Completion, responses=_ERRORS | _STREAM, tags=["answers"])
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        return await service.respond(body, request)

    @app.post("/tokenize", responses=_only(400, 401, 404, 413, 500), tags=["models"])
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """The ids of a text or of a conversation."""
        if body.model is not None:
            service.check_name(body.model)
        tokens = await service.prepared(lambda: token_ids(model, body))
        return Tokens(tokens=tokens, count=len(tokens), max_model_len=model.context)

    _document(app)
    paths = [route.path for route in app.routes if hasattr(route, "path") and "{" not in route.path]
    return Guard(app, api_key=api_key, body_bytes=limits.body_bytes, paths=paths, metrics=metrics)


def _document(app: FastAPI) -> None:
    """Take the 422 out of the OpenAPI page, which FastAPI writes to each path: it is a 400 here."""
    for methods in app.openapi()["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}


# -------------------- answers


class _Service:
    """Makes responses of what the engine tells."""

    def __init__(self, engine: Engine, model: ServedModel, limits: Limits, log_prompts: bool) -> None:
        self._engine = engine
        self._model = model
        self._names = TokenNames(model.tokenizer)
        self._limits = limits
        self._log_prompts = log_prompts
        # Templates, tokenizers and grammars take milliseconds: other requests do not wait for them. One thread, since
        # transformers' tokenizers are not made for several.
        self._preparing = ThreadPoolExecutor(1, "owl-deploy-prepare")

    def card(self) -> ModelCard:
        return ModelCard(id=self._model.name, created=self._model.created, max_model_len=self._model.context)

    def check_name(self, name: str) -> None:
        if name != self._model.name:
            raise ApiError(
                404, f"there is no model {name!r}; this is {self._model.name!r}", param="model", code="model_not_found"
            )

    async def prepared(self, prepare: Callable[[], Result]) -> Result:
        """The result of `prepare`, which is run beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, prepare)

    async def respond(self, body: ChatRequest | CompletionRequest, request: Request) -> Response:
        """
        Raises:
            ApiError: the request asks for what it cannot have, or the queue is full.
        """
        self.check_name(body.model)
        events: Events = asyncio.Queue()
        deadline = math.inf if self._limits.timeout_s is None else time.monotonic() + self._limits.timeout_s
        tell = _tell(events)
        prepared = await self.prepared(lambda: self._prepare(body, deadline, tell))
        if self._log_prompts:
            _LOG.info("prompts: %s", [self._model.tokenizer.decode(prompt) for prompt in prepared.prompts])
        assembler = Assembler(self._model, self._names, prepared, chat=isinstance(body, ChatRequest))
        self._submit(prepared)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return _EventStream(self._stream(prepared, events, assembler, usage), lambda: self._cancel(prepared))
        gathering = asyncio.ensure_future(self._gather(events, assembler))
        leaving = asyncio.ensure_future(_gone(request.receive))
        try:
            await asyncio.wait({gathering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():  # nobody will read the answer
                return Response(status_code=499)
            return JSONResponse((await gathering).model_dump())
        finally:
            gathering.cancel()
            leaving.cancel()
            self._cancel(prepared)

    def _prepare(self, body: ChatRequest | CompletionRequest, deadline: float, tell: Tell) -> Prepared:
        if isinstance(body, ChatRequest):
            return prepare_chat(self._model, body, deadline, tell)
        return prepare_completion(self._model, body, deadline, tell)

    def _submit(self, prepared: Prepared) -> None:
        try:
            self._engine.submit(prepared.answers)
        except QueueFull as error:
            seconds = self._engine.retry_after_s()
            raise ApiError(
                429,
                f"the queue is full; try again in about {seconds} s",
                type="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            ) from error
        except Closed as error:
            raise unavailable("the server is being stopped") from error

    def _cancel(self, prepared: Prepared) -> None:
        for answer in prepared.answers:
            self._engine.cancel(answer)

    async def _gather(self, events: Events, assembler: Assembler) -> BaseModel:
        while not assembler.is_complete:
            index, event = await events.get()
            self._check(event)
            assembler.add(index, event)
        whole = assembler.whole()
        if self._log_prompts:
            _LOG.info("answers: %s", whole.model_dump_json())
        return whole

    async def _stream(
        self, prepared: Prepared, events: Events, assembler: Assembler, usage: bool
    ) -> AsyncIterator[bytes]:
        """The lines of a stream of events; an error is the last of them."""
        try:
            for piece in assembler.opening():
                yield _data(piece)
            while not assembler.is_complete:
                index, event = await events.get()
                self._check(event)
                assembler.add(index, event)
                for piece in assembler.pieces(index):
                    yield _data(piece)
            if usage:
                yield _data(assembler.closing())
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _data(error.body)
        finally:
            self._cancel(prepared)

    def _check(self, event: Event) -> None:
        """
        Raises:
            ApiError: the answer has come to a bad end.
        """
        if event.finish == "deadline":
            raise ApiError(
                504,
                f"the answer was not finished within {self._limits.timeout_s:g} s",
                type="server_error",
                code="deadline_exceeded",
            )
        if event.finish == "shutdown":
            raise unavailable("the server was stopped before the answer was finished")
        if event.finish == "error":
            _LOG.error("an answer failed: %s", event.reason)
            raise ApiError(500, f"the answer failed: {event.reason}", type="server_error", code="answer_failed")


def _tell(events: Events) -> Tell:
    loop = asyncio.get_running_loop()

    def tell(index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would read this
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return tell


def _data(piece: BaseModel) -> bytes:
    return f"data: {piece.model_dump_json()}\n\n".encode()


async def _gone(receive: Receive) -> None:
    """Return when the client has gone away; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events, until they end or the client goes away."""

    def __init__(self, lines: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._lines = lines
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            sending.cancel()
            leaving.cancel()
            self._on_end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines:
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# -------------------- status and pages


def _add_status(app: FastAPI, engine: Engine) -> None:
    def status(good: bool) -> JSONResponse:
        waiting, running, _ = engine.counts()
        found = Status(status="ok" if good else "unavailable", waiting=waiting, running=running)
        return JSONResponse(found.model_dump(), 200 if good else 503)

    down: dict[int | str, dict[str, Any]] = {503: {"model": Status, "description": "It does not."}}

    @app.get("/health", response_model=Status, responses=down, tags=["status"])
    async def health() -> Response:
        """Whether the server computes."""
        return status(engine.is_alive)

    @app.get("/ready", response_model=Status, responses=down, tags=["status"])
    async def ready() -> Response:
        """Whether the server takes requests."""
        return status(engine.is_ready)


def _add_pages(app: FastAPI, metrics: Metrics) -> None:
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(CHAT_PAGE, headers=headers)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi()), headers=headers)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_only(401)},
        tags=["status"],
    )
    async def show_metrics() -> Response:
        """Counters, in Prometheus's format."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")


# -------------------- errors


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body.model_dump(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> Response:
        refusal = _refusal(error)
        return JSONResponse(refusal.body.model_dump(), refusal.status)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        detail = ErrorDetail(message=str(error.detail), type="invalid_request_error", param=None, code=None)
        return JSONResponse(ErrorBody(error=detail).model_dump(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        del error  # uvicorn logs it
        detail = ErrorDetail(message="the server failed", type="server_error", param=None, code=None)
        return JSONResponse(ErrorBody(error=detail).model_dump(), 500)


def _refusal(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body: where, and what. It does not repeat what the body holds."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported", param=param, code="unsupported_parameter")
    return invalid(f"{param or 'the body'}: {first['msg']}", param)
