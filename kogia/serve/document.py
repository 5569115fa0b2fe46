"""The OpenAPI document: what routes take follows from their bodies, what they answer is said here."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kogia.serve.errors import ApiError, is_anthropic

Schema = dict[str, Any]

OPEN = ("/health", "/ready")
"""Take no key."""
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
REASONS = {
    400: "A value that will not do: the message names field, value and rule.",
    401: "The key is missing or wrong.",
    403: "From a page or a host that may not ask.",
    404: "No such thing here.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    414: "The address is too long.",
    415: "The body is not application/json.",
    429: "This key has used what it may; `Retry-After` says when to come again.",
    431: "The headers are too long.",
    500: "A fault of the server, with an id to quote.",
    503: "The server takes no requests now; `Retry-After` says when to come again.",
}


def openapi(app: FastAPI, *, has_keys: bool) -> Schema:
    """The document of an application. It is made once."""
    if app.openapi_schema is None:
        document = get_openapi(title="kogia", version="1", routes=app.routes)
        parts = document.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nobody gets here
            parts.get("schemas", {}).pop(name, None)
        if has_keys:
            parts["securitySchemes"] = KEYS
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                _describe(path, method, operation)
                if has_keys and path not in OPEN:
                    operation["security"] = [{name: []} for name in KEYS]
        app.openapi_schema = document
    return app.openapi_schema


def _describe(path: str, method: str, operation: Schema) -> None:
    """Say of one operation what it answers."""
    names_model = any(each["name"] == "model" for each in operation.get("parameters", ()))
    statuses = _statuses(path, method, names_model)
    good, errors = _answer(path), {status: _error(path, status) for status in statuses}
    own = {"503": {"description": "It takes no requests now.", "content": good}} if path == "/ready" else {}
    operation["responses"] = {"200": {"description": "As asked.", "content": good}} | errors | own


def _statuses(path: str, method: str, names_model: bool) -> Sequence[int]:
    if path in OPEN:
        return (400, 403, 413, 414, 431, 500)
    named = (404,) if "{" in path or method == "post" or names_model else ()
    posted = (408, 415, 429) if method == "post" else ()
    return (400, 401, 403, *named, *posted, 413, 414, 431, 500, 503)


def _error(path: str, status: int) -> Schema:
    example = ApiError("what is wrong", status)
    form = _object(error=_object(message=TEXT, type=TEXT, param=NULLABLE_TEXT, code=NULLABLE_TEXT))
    if is_anthropic(path):
        form = _object(type={"const": "error"}, error=_object(type=TEXT, message=TEXT))
    content = {"schema": form, "example": example.anthropic_body if is_anthropic(path) else example.body}
    return {"description": REASONS[status], "content": {"application/json": content}}


def _answer(path: str) -> Schema:
    """The content of a good answer, by how the path ends."""
    for end, content in ANSWERS.items():
        if path.endswith(end):
            return dict(content)
    return _json({})


def _object(required: Mapping[str, Schema] | None = None, /, **properties: Schema) -> Schema:
    properties = {**(required or {}), **properties}
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _streamed(schema: Schema) -> Schema:
    """A whole answer, or with `stream` server-sent events."""
    return _json(schema) | {"text/event-stream": {"schema": {"description": "Events, with JSON as their data."}}}


TEXT: Schema = {"type": "string"}
NULLABLE_TEXT: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
USAGE = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
REASON: Schema = {"enum": ["stop", "length", "tool_calls"]}
STATUS = _object(status=TEXT)
MODEL = _object(id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT, max_model_len=COUNT, state=TEXT)
MESSAGE = _object(role={"const": "assistant"}, content=NULLABLE_TEXT)


def _choices(kind: str, **choice: Schema) -> Schema:
    choices = _list(_object(index=COUNT, finish_reason=REASON, **choice))
    return _streamed(_object(id=TEXT, object={"const": kind}, created=COUNT, model=TEXT, choices=choices, usage=USAGE))


ANSWERS: dict[str, Schema] = {
    "/stop_thinking": _json(_object(id=TEXT, stopped={"const": True})),
    "/chat/completions": _choices("chat.completion", message=MESSAGE),
    "/completions": _choices("text_completion", text=TEXT),
    "/responses": _streamed(
        _object(id=TEXT, object={"const": "response"}, status=TEXT, model=TEXT, output=_list({"type": "object"}))
    ),
    "/count_tokens": _json(_object(input_tokens=COUNT)),
    "/messages": _streamed(
        _object(
            id=TEXT,
            type={"const": "message"},
            role={"const": "assistant"},
            model=TEXT,
            content=_list(_object(type=TEXT)),
            stop_reason=TEXT,
            usage=_object(input_tokens=COUNT, output_tokens=COUNT),
        )
    ),
    "/detokenize": _json(_object(prompt=TEXT)),
    "/tokenize": _json(_object(tokens=_list(COUNT), count=COUNT, max_model_len=COUNT)),
    "/models/{name}": _json(MODEL),
    "/models": _json(_object(object={"const": "list"}, data=_list(MODEL))),
    "/metrics": {"text/plain": {"schema": TEXT}, "application/openmetrics-text": {"schema": TEXT}},
    "/health": _json(STATUS),
    "/ready": _json(STATUS),
}
"""Content of good answers by the end of the path; of several ends the first that fits."""
