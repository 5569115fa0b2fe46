"""The application: all routes around one `ServerState`."""

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from kogia.serve import (
    admin,
    anthropic,
    deepseek,
    health,
    metrics,
    openai_chat,
    openai_completions,
    openai_models,
    openai_tokens,
    responses,
)
from kogia.serve.access import Caller, authenticate
from kogia.serve.document import openapi
from kogia.serve.errors import ApiError, answer_api_error, answer_validation, internal, response_to
from kogia.serve.exchange import current
from kogia.serve.guard import Guard
from kogia.serve.metrics import Metrics
from kogia.serve.page import files, kept, routes
from kogia.serve.state import ServerState
from kogia.serve.strict import Shortcut

ROUTERS = (
    openai_chat.router,
    openai_completions.router,
    responses.router,
    anthropic.router,
    deepseek.router,
    openai_models.router,
    openai_tokens.router,
    health.router,
    metrics.router,
    routes.router,
    kept.router,
    files.router,
)
"""Those that are asked most first: an address is held against each route in turn."""


def create_app(state: ServerState) -> ASGIApp:
    """Routes find `state` as `request.app.state.server`."""
    app = FastAPI(title="kogia", openapi_url=None, redirect_slashes=False)
    app.state.server = state
    app.state.metrics = Metrics(state)
    for router in ROUTERS:
        app.include_router(router)
    if state.admin_keys.callers:
        app.include_router(admin.router)
    app.add_api_route("/openapi.json", openapi_document, include_in_schema=False)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_fault)
    return Guard(Shortcut(app, ROUTERS), state)


async def openapi_document(request: Request, caller: Caller = Depends(authenticate)) -> JSONResponse:
    """What the server takes and answers. Takes a key where the server has keys."""
    return JSONResponse(openapi(request.app, has_keys=bool(request.app.state.server.keys.callers)))


async def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    """What the guard answers, too, to what is raised past FastAPI; it writes the log in either case."""
    exchange = current.get()
    assert exchange is not None, "the guard has begun one"
    return response_to(internal(exchange.id), request.url.path)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # FastAPI's own words for a body that we have refused
        return response_to(error.__cause__, request.url.path)
    known = {404: f"there is no {request.method} {request.url.path[:200]} here", 405: "this path takes other methods"}
    message = known.get(error.status_code, str(error.detail))
    return response_to(ApiError(message, error.status_code, headers=error.headers or {}), request.url.path)
