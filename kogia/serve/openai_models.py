"""OpenAI's list of models, by all their names, with what they are at."""

from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from kogia.serve.access import Caller, authenticate
from kogia.serve.errors import ApiError
from kogia.serve.served import Entry

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def models(request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    names = request.app.state.server.models.names
    return {"object": "list", "data": [_model(name, entry) for name, entry in names.items()]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    names = request.app.state.server.models.names
    if name not in names:
        raise ApiError(f"model = {name[:80]!r}: is not served here", 404, param="model", code="model_not_found")
    return _model(name, names[name])


def _model(name: str, entry: Entry) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": entry.created,
        "owned_by": "kogia",
        "root": entry.name,
        "max_model_len": entry.config.max_position,
        "state": entry.phase,
    }
