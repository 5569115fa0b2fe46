"""What operators do to a running server, behind keys of their own: `/v1/admin/*`.

The routes are there only where the operator has named a file of keys (`ServeConfig.admin_key_file`). No key of a user
opens them, and no body brings a path: models are those that the server was started with, by name.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import ConfigDict, Field
from starlette.requests import Request

from kogia.serve.access import ADMIN_PREFIX, authenticate_admin
from kogia.serve.errors import ApiError
from kogia.serve.fields import Body, Name
from kogia.serve.served import Entry, Phase
from kogia.serve.state import Running, ServerState
from kogia.serve.strict import StrictRoute

router = APIRouter(
    prefix=ADMIN_PREFIX,
    route_class=StrictRoute,
    dependencies=[Depends(authenticate_admin)],
    include_in_schema=False,  # the document is for those who use the models
)


class AdminBody(Body):
    """What is not known is refused, as nothing here is done by mistake."""

    model_config = ConfigDict(extra="forbid")


class OneModel(AdminBody):
    model: Name


class ModelOrServer(AdminBody):
    model: Name | None = None
    """None is the whole server."""


class Reload(AdminBody):
    model: Name
    from_: Name | None = Field(default=None, alias="from")
    """Another model of the server, whose files the weights are read from; None reads the model's own again."""


class Cancel(AdminBody):
    id: Name
    """Of an answer, or the `x-request-id` of its request."""


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """All models with what they are at, and the requests that run."""
    return _told(_state(request))


@router.post("/load")
async def load(body: OneModel, request: Request) -> dict[str, Any]:
    """Load a model, and answer when it has loaded. Models that nobody uses make room for it."""
    state = _state(request)
    entry = state.models.find(body.model)
    entry.retry_at = 0.0
    await asyncio.shield(state.models.begin_to_load(entry))
    if entry.served is None:
        has_failed = entry.phase is Phase.FAILED
        raise ApiError(f"{entry.name} could not be loaded: {entry.error}", 500 if has_failed else 503)
    return _model(entry, state)


@router.post("/unload")
async def unload(body: OneModel, request: Request) -> dict[str, Any]:
    """Unload a model that nobody uses; 409 where it answers. The next request that names it loads it again."""
    state = _state(request)
    entry = state.models.find(body.model)
    await asyncio.shield(state.models.unload(entry))
    return _model(entry, state)


@router.post("/drain")
async def drain(body: ModelOrServer, request: Request) -> dict[str, Any]:
    """Let a model, or the server, take no more requests. Those that run go on; /v1/admin/models says when none does."""
    return _drain(_state(request), body.model, True)


@router.post("/undrain")
async def undrain(body: ModelOrServer, request: Request) -> dict[str, Any]:
    """Take requests again. The server does not where it has been told to end."""
    return _drain(_state(request), body.model, False)


@router.post("/reload")
async def reload(body: Reload, request: Request) -> dict[str, Any]:
    """Put new weights in the place of those of a loaded model of the same architecture. Running requests go on with
    them from their next token; cached prefixes are forgotten."""
    state = _state(request)
    entry = state.models.find(body.model)
    source = entry if body.from_ is None else state.models.find(body.from_, "from")
    try:
        await asyncio.shield(state.models.reload(entry, source))
    except (ValueError, OSError) as error:
        raise ApiError(f"{entry.name} keeps its weights: {error}", param="model") from None
    return _model(entry, state)


@router.post("/flush")
async def flush(body: ModelOrServer, request: Request) -> dict[str, Any]:
    """Forget cached prefixes, of one model or all."""
    state = _state(request)
    entries = state.models if body.model is None else [state.models.find(body.model)]
    loaded = [(entry, entry.served.engine) for entry in entries if entry.served is not None]
    counts = {entry.name: await asyncio.to_thread(engine.forget_prefixes) for entry, engine in loaded}
    return {"object": "admin.flush", "blocks": counts}


@router.post("/cancel")
async def cancel(body: Cancel, request: Request) -> dict[str, Any]:
    """End a request: its client hears that the operator has ended it."""
    state = _state(request)
    found = [running for running in state.running.values() if body.id in (running.id, running.request_id)]
    if not found:
        raise ApiError(f"{body.id[:80]!r}: no request of that id is running", 404, param="id")
    for running in found:
        state.stop(running, "the operator has ended this request")
    return {"object": "admin.cancel", "ended": [running.id for running in found]}


def _state(request: Request) -> ServerState:
    return request.app.state.server


def _drain(state: ServerState, name: str | None, is_drained: bool) -> dict[str, Any]:
    if name is not None:
        entry = state.models.find(name)
        entry.is_drained = is_drained
        return _model(entry, state)
    if state.is_ending and not is_drained:
        raise ApiError("the server was told to end, and will", 409)
    state.is_drained = is_drained
    return _told(state)


def _told(state: ServerState) -> dict[str, Any]:
    return {
        "object": "admin.server",
        "status": state.status,
        "memory_limit": state.models.limit if state.config.memory_limit else None,
        "memory": state.models.num_bytes,
        "models": [_model(entry, state) for entry in state.models],
    }


def _model(entry: Entry, state: ServerState) -> dict[str, Any]:
    running = [each for each in state.running.values() if each.model is entry.served]
    return {
        "object": "admin.model",
        "names": entry.names,
        "path": entry.settings.path,
        "state": entry.phase,
        "is_drained": entry.is_drained,
        "error": entry.error,
        "weights_bytes": entry.need.weights,
        "cache_bytes": entry.cache_bytes if entry.need.cache is None else entry.need.cache,
        "memory": entry.num_bytes,
        "weights_version": None if entry.served is None else entry.served.engine.weights_version,
        "users": entry.num_users,
        "running": [_running(each, state.clock()) for each in running],
    }


def _running(running: Running, now: float) -> dict[str, Any]:
    return {
        "id": running.id,
        "request_id": running.request_id,
        "key": running.caller.name,
        "seconds": round(now - running.began, 3),
        "prompt_tokens": len(running.prompt_ids),
        "tokens": running.num_tokens,
    }
