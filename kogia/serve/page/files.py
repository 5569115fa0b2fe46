"""The page's files, read once, and sent with a policy under which they and nothing else may act."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kogia.serve.errors import ApiError

router = APIRouter(include_in_schema=False)
STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types kogia",
    )
)
"""Content-Security-Policy: no script or style but the page's own files, nothing from elsewhere, no HTML from a string
but through the page's one policy for it (Trusted Types)."""


@dataclass(frozen=True)
class File:
    content: bytes
    headers: Mapping[str, str]


@router.get("/")
async def index(request: Request) -> Response:
    return _respond(request, "index.html")


@router.get("/page/{name}")
async def file(name: str, request: Request) -> Response:
    return _respond(request, name)


def _respond(request: Request, name: str) -> Response:
    if name not in _FILES:
        raise ApiError(f"the page has no file {name[:80]!r}", 404)
    file = _FILES[name]
    is_known = request.headers.get("if-none-match") == file.headers["etag"]
    return Response(b"" if is_known else file.content, 304 if is_known else 200, file.headers)


def _read(path: Path) -> File:
    content = path.read_bytes()
    if path.name == "index.html":
        content = content.replace(b"<!-- modules -->", _preloads())
    headers = {
        "content-type": f"{TYPES[path.suffix]}; charset=utf-8",
        "content-security-policy": POLICY,
        "cache-control": "no-cache",
        "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    }
    return File(content, headers)


def _preloads() -> bytes:
    """All modules are asked for at once, instead of each when another that imports it has been read."""
    modules = sorted(path.name for path in STATIC.glob("*.js") if path.name != "theme.js")
    return "\n".join(f'<link rel="modulepreload" href="/page/{name}">' for name in modules).encode()


_FILES = {path.name: _read(path) for path in STATIC.iterdir() if path.suffix in TYPES}
