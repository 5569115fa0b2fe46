"""How bodies are read: as JSON in UTF-8, at most 200 deep, without NaN; and that nothing is done for those who left."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kogia.serve.errors import ApiError, shown
from kogia.serve.sse import until_gone

MOST_PARTS = 2**19
"""Opening brackets, those in texts among them: nobody else is served while they are read."""


class StrictRequest(Request):
    async def json(self) -> Any:
        """The body. Raises 400 where it is no JSON object, or one nested too deep or of too many parts."""
        body = await self.body()
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
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            body = await request.body()  # what is received behind it is that the client has left
            if request.method == "POST" and kind != "application/json" and body:
                raise ApiError(f"content-type = {shown(kind)}: must be application/json", 415)
            return await until_gone(request.receive, handle(request)) or Unsent()

        return strict
