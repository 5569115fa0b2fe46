"""How bodies are read: as JSON in UTF-8, at most 200 deep, without NaN; and that nothing is done for those who left.

What generates is called past FastAPI, whose way from an address to a call takes as long as all that such a call does
until the engine has its request. FastAPI describes these routes (`document.py`), and finds and calls all others.
"""

from collections.abc import Callable, Coroutine, Iterable
from functools import cached_property
from inspect import signature
from typing import Any, get_type_hints

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from kogia.serve.access import authenticate
from kogia.serve.errors import ApiError, shown, validation
from kogia.serve.sse import until_gone

MOST_PARTS = 2**19
"""Opening brackets, those in texts among them: nobody else is served while they are read."""


class StrictRequest(Request):
    async def json(self) -> Any:
        """Raises 400 as `json_object`."""
        return json_object(await self.body())


def json_object(body: bytes) -> dict[str, Any]:
    """What a body says. Raises 400 where it is no JSON object, or one nested too deep or of too many parts."""
    if body.count(b"[") + body.count(b"{") > MOST_PARTS:
        raise ApiError(f"the body has too many lists and objects: must have at most {MOST_PARTS:,} brackets")
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is no JSON that will do: {error}") from None
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object")
    return value


class Unsent(Response):
    """To a client that has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


class StrictRoute(APIRoute):
    """Takes its body from a `StrictRequest`, and works on its answer for as long as the client is there."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(given: Request) -> Response:
            request = StrictRequest(given.scope, given.receive)  # one alone reads the body, which comes once
            _check_kind(request, await request.body())  # what is received behind it is that the client has left
            return await until_gone(request.receive, handle(request)) or Unsent()

        return strict

    @property
    def is_plain(self) -> bool:
        """Whether it can be called without FastAPI: it has a body and a caller, and nothing else."""
        return list(signature(self.endpoint).parameters) == ["body", "request", "caller"]

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do what FastAPI would with a plain route. Raises what that answers, as ApiError."""
        request = Request(scope, receive)
        body = await request.body()
        _check_kind(request, body)
        response = await until_gone(receive, self._call(request, body)) or Unsent()
        await response(scope, receive, send)

    async def _call(self, request: Request, content: bytes) -> Response:
        caller = await authenticate(request)
        if not content:
            raise ApiError("the body is missing")
        given = json_object(content)
        try:
            body = self._body_model.model_validate(given)
        except ValidationError as error:
            found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
            raise validation(RequestValidationError(found, body=given)) from None
        answer = await self.endpoint(body, request, caller)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    @cached_property
    def _body_model(self) -> type[BaseModel]:
        return get_type_hints(self.endpoint)["body"]


class Shortcut:
    """Calls the plain route at an address, past the search for it; what is at others goes its usual way."""

    def __init__(self, app: FastAPI, routers: Iterable[APIRouter]) -> None:
        routes = [route for router in routers for route in router.routes if isinstance(route, StrictRoute)]
        plain = [route for route in routes if route.is_plain]
        self._routes = {(method, route.path): route for route in plain for method in route.methods or ()}
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope.get("method", ""), scope.get("path", "")))
        if route is None:
            await self._app(scope, receive, send)
        else:
            scope.update(app=self._app, route=route)
            await route.answer(scope, receive, send)


def _check_kind(request: Request, body: bytes) -> None:
    """Raise 415 for a body that is posted as something else than JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind != "application/json" and body:
        raise ApiError(f"content-type = {shown(kind)}: must be application/json", 415)
