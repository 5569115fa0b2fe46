"""The page's conversations on a server that keeps them (`--store`): those of the caller's key, and no others."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import StreamingResponse

from kogia.serve.access import Caller, authenticate
from kogia.serve.conversations import ConversationStore
from kogia.serve.errors import ApiError
from kogia.serve.fields import Body, Whole
from kogia.serve.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


class Kept(Body):
    revision: Annotated[Whole, Field(ge=0, lt=2**53)]
    """That the page has read and changed; 0 of a new conversation."""
    conversation: dict[str, Any]


def store_of(request: Request) -> ConversationStore:
    """Raises 404 on a server that keeps none."""
    store = request.app.state.server.store
    if store is None:
        raise ApiError("conversations stay in the browser here; kogia serve --store DIR keeps them", 404)
    return store


@router.get("/page/conversations")
async def listed(request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    return {"conversations": await asyncio.to_thread(store_of(request).heads, caller.name)}


@router.get("/page/conversations.json")
async def exported(request: Request, caller: Caller = Depends(authenticate)) -> StreamingResponse:
    """A file that any chat page imports."""
    headers = {"Content-Disposition": 'attachment; filename="conversations.json"'}
    return StreamingResponse(store_of(request).export(caller.name), media_type="application/json", headers=headers)


@router.get("/page/conversations/{id}")
async def read(id: str, request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    return await asyncio.to_thread(store_of(request).read, caller.name, id)


@router.post("/page/conversations/{id}")
async def write(id: str, body: Kept, request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    written = store_of(request).write, caller.name, id, body.revision, body.conversation
    return {"revision": await asyncio.to_thread(*written)}


@router.delete("/page/conversations/{id}")
async def remove(id: str, request: Request, caller: Caller = Depends(authenticate)) -> dict[str, Any]:
    await asyncio.to_thread(store_of(request).remove, caller.name, id)
    return {"id": id, "deleted": True}
