"""What every request passes before anything reads it: the key, the size of its body; and counting its response."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owl_deploy.serving.errors import ApiError
from owl_deploy.serving.metrics import Metrics

_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
_OTHER_PATH = "other"  # in metrics: whoever asks for a thousand paths must not make a thousand counters


class Guard:
    """An ASGI application around another.

    Args:
        api_key: what requests have to bring; None to ask for none.
        body_bytes: the largest body.
        paths: that are counted by name.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, body_bytes: int, paths: Iterable[str], metrics: Metrics
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._body_bytes = body_bytes
        self._paths = frozenset(paths)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else _OTHER_PATH

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.observe_response(path, message["status"])
            await send(message)

        try:
            self._check_key(scope)
            limited = self._limited(scope, receive)
        except ApiError as error:
            await _response(error)(scope, receive, counted)
            return
        await self._app(scope, limited, counted)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in _OPEN_PATHS:
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # compare_digest takes as long for a key that is nearly right as for any other.
        is_right = hmac.compare_digest(given.strip().encode("latin-1", errors="replace"), self._key)
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header: Authorization: Bearer KEY",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, which refuses a body as soon as it is too large."""
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isascii() and declared.isdecimal() and int(declared) > self._body_bytes:
            raise self._too_large()
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._body_bytes:
                raise HTTPException(413, str(self._too_large()))  # FastAPI lets no other exception through here
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than the {self._body_bytes} bytes that are read", code="body_too_large"
        )


def _response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body.model_dump(), error.status, error.headers)
