"""Whether the server lives, and whether it takes requests. No key is asked for, and nothing is told."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kogia.serve.state import Status

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> Response:
    """200 as long as the process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while requests are taken, 503 while the model loads or the server drains."""
    status = request.app.state.server.status
    return JSONResponse({"status": status}, 200 if status is Status.READY else 503)
