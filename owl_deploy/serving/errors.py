"""Errors as the OpenAI API gives them: a status, and a body that its clients turn into their exceptions."""

from __future__ import annotations

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = ErrorBody(error=ErrorDetail(message=message, type=type, param=param, code=code))


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request asks for what it cannot have."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """The request asks for what this server does not do."""
    return ApiError(400, f"{param} is not supported: {why}", param=param, code="unsupported_parameter")


def unavailable(message: str) -> ApiError:
    """The server cannot answer any more."""
    return ApiError(503, message, type="server_error", code="unavailable", headers={"Retry-After": "5"})
