"""What a client hears when something will not do: one shape per API, a clear 4xx or an opaque 500."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.requests import Request

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SHOULD = re.compile(r"^(?:Input|String|List|Dictionary|Value) should ")
RULES = {
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "extra_forbidden": "is not known here; leave it out",
}
"""In place of pydantic's own words."""
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


def refused(error: ValueError, called: Mapping[str, str]) -> ApiError:
    """400 for what the engine refuses. Its errors name value and rule, and the field as the engine calls it; `called`
    says what it is in the body, by these names."""
    text = str(error).removeprefix("SamplingParams.")
    head = next((word for word in _PATH.findall(text.split(":")[0]) if _called(word, called) is not None), None)
    if head is None:
        return ApiError(text)
    field = _called(head, called) or head
    begin, rest = (field, text.removeprefix(head)) if text.startswith(head) else (f"{field}: ", text)
    return ApiError(begin + _NAME.sub(lambda word: _called(word[0], called) or word[0], rest), param=field)


_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_NAME = re.compile(r"\b[a-z]+_\w+(?:\.\w+)*")
"""Of a field, and no word of a sentence."""


def _called(path: str, called: Mapping[str, str]) -> str | None:
    """What a body calls the engine's field, or the part of one."""
    name, _, part = path.partition(".")
    whole = called.get(name)
    return called.get(path) or (f"{whole}.{part}" if whole and part else whole)


def validation(error: RequestValidationError) -> ApiError:
    """400 for the first value that has the wrong type or is out of its range."""
    # of the branches of a union the one of the right type is what was meant, or else the one that got furthest
    first = max(error.errors(), key=lambda each: (not _is_other_type(each), len(each["loc"]), _last_index(each)))
    if first["type"] == "json_invalid":
        return ApiError("the body is no JSON; send an object with content-type application/json")
    field = _field(first, error.body)
    if first["type"] == "missing":
        return ApiError(f"{field or 'the body'} is missing", param=field)
    same = [each for each in error.errors() if _field(each, error.body) == field]
    rules = [_rule(each) for each in same if _is_other_type(each)] if _is_other_type(first) else [_rule(first)]
    rule, *others = dict.fromkeys(rules)
    either = "".join(f" or {other.removeprefix('must be ')}" for other in others)
    return wrong_value(field or "the body", first.get("input"), rule + either)


def _is_other_type(error: Mapping[str, Any]) -> bool:
    """Whether a value is of another type than a field, or a branch of it, takes."""
    kind = error["type"]
    return kind.endswith("_type") or (kind == "literal_error" and not isinstance(error.get("input"), str))


def _last_index(error: Mapping[str, Any]) -> int:
    return next((part for part in reversed(error["loc"]) if isinstance(part, int)), -1)


def _rule(error: Mapping[str, Any]) -> str:
    own = _SHOULD.sub("must ", error["msg"].removeprefix("Value error, ")).replace(" after validation", "")
    return RULES.get(str(error["type"]), own)


def _field(error: Mapping[str, Any], body: Any) -> str | None:
    """The place in the body. Pydantic's locations name branches of unions, too, which are nowhere in it."""
    start, *path = error["loc"]
    if start != "body":
        return str(path[-1])
    parts, value = [], body
    for number, part in enumerate(path, 1):
        is_there = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if is_there:
            value = value[part]
        is_missing = error["type"] == "missing" and number == len(path)
        if (is_there or is_missing) and (isinstance(part, int) or _FIELD.fullmatch(part)):
            parts.append(str(part))
    return ".".join(parts) or None


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return response_to(error, request.url.path)


async def answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response_to(validation(error), request.url.path)
