"""OpenAI's list of models: the one that is served, by its names."""

from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from kogia.serve.access import Caller, authenticate
from kogia.serve.errors import ApiError
from kogia.serve.state import ServedModel

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def models(request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    served = request.app.state.server.models
    return {"object": "list", "data": [_model(name, model) for name, model in served.items()]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    served = request.app.state.server.models
    if name not in served:
        raise ApiError(f"model = {name[:80]!r}: is not served here", 404, param="model", code="model_not_found")
    return _model(name, served[name])


def _model(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "kogia",
        "root": model.name,
        "max_model_len": model.config.max_position,
    }
