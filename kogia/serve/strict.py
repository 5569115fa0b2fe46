"""How bodies are read: as JSON in UTF-8, at most 200 deep, without NaN, and by routes that note what they pass over."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from kogia.serve.errors import ApiError, shown

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


class StrictRoute(APIRoute):
    """Takes its body from a `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(given: Request) -> Response:
            request = StrictRequest(given.scope, given.receive)  # one alone reads the body, which comes once
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json" and await request.body():
                raise ApiError(f"content-type = {shown(kind)}: must be application/json", 415)
            return await handle(request)

        return strict
