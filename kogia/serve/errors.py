"""What a client hears when something will not do: one shape per API, a clear 4xx or an opaque 500."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.requests import Request

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KINDS = {"str", "int", "float", "bool", "dict", "list", "tuple", "none", "body", "literal", "nullable"}
"""Words in pydantic's locations that name a branch of a union, not a field."""
MOST_SHOWN = 80
"""Characters of a wrong value in a message."""
NAMES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
"""Kinds of errors, in the words that OpenAI's and Anthropic's APIs share."""


class ApiError(Exception):
    """A request that will not do, or a server that cannot now. The message is for the client."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        kind = NAMES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        return {"type": "error", "error": {"type": self.body["error"]["type"], "message": self.message}}


def response_to(error: ApiError, path: str) -> JSONResponse:
    """In the shape of the API that the path belongs to."""
    body = error.anthropic_body if is_anthropic(path) else error.body
    return JSONResponse(body, error.status, error.headers)


def is_anthropic(path: str) -> bool:
    return path.startswith(("/v1/messages", "/anthropic/"))


def internal(error_id: str) -> ApiError:
    """The server's own fault, of which a client learns nothing but what to quote."""
    return ApiError(f"internal error; the server's log has it under {error_id}", 500, code=error_id)


def wrong_value(name: str, value: Any, rule: str) -> ApiError:
    """400 that names field, value and rule."""
    return ApiError(f"{name} = {shown(value)}: {rule}", param=name)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"


def refused(error: ValueError, fields: Sequence[str]) -> ApiError:
    """400 for what the engine refuses: its errors name value and rule; the field too, where it is one of the body."""
    text = str(error).removeprefix("SamplingParams.")
    words = _FIELD.findall(text.split(":")[0])
    return ApiError(text, param=next((word for word in words if word in fields), None))


def validation(error: RequestValidationError | ValidationError) -> ApiError:
    """400 for the first value that has the wrong type or is out of its range."""
    found = error.errors()
    # of the branches of a union, the one that got furthest is what was meant, or the one of the right type
    first = max(found, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    if first["type"] == "json_invalid":
        return ApiError("the body is no JSON; send an object with content-type application/json")
    field = _field(first["loc"])
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return ApiError(f"{field or 'the body'} is missing: {rule}", param=field)
    return wrong_value(field or "the body", first.get("input"), rule)


def _field(loc: Sequence[str | int]) -> str | None:
    parts = [str(part) for part in loc if isinstance(part, int) or (_FIELD.fullmatch(part) and part not in _KINDS)]
    return ".".join(parts) or None


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return response_to(error, request.url.path)


async def answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response_to(validation(error), request.url.path)
