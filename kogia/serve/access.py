"""Who asks: keys, hashed and compared in constant time, and the caller that a request belongs to."""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from kogia import log
from kogia.serve.config import operators_text
from kogia.serve.errors import ApiError
from kogia.serve.exchange import current

_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
_NAMED = re.compile(r"(?:([A-Za-z0-9_.-]{1,64}):\s+)?(\S+)")
ADMIN_PREFIX = "/v1/admin"
"""Of routes for those who manage the server."""
LEAST_CHARS = 16
"""Of a key: shorter ones can be tried out."""


@dataclass(frozen=True)
class Caller:
    """The owner of a key; of a server without keys there is one."""

    name: str
    digest: str = ""
    """SHA-256 of the key, as hexadecimal digits."""

    @property
    def salt(self) -> str | None:
        """What keeps its cached prefixes apart from those of others."""
        return self.digest or None


ANYBODY = Caller("anybody")


@dataclass(frozen=True)
class Keys:
    """The keys of a server; empty for one that asks for none."""

    callers: Sequence[Caller] = field(default=())

    @classmethod
    def read(cls, path: str | Path | None, option: str = "--api-key-file") -> "Keys":
        """Of a file as `ServeConfig.api_key_file` says. Raises ValueError, naming the line."""
        if path is None:
            return cls()
        file = Path(path).expanduser()
        if os.name == "posix" and file.is_file() and file.stat().st_mode & 0o077:
            log.warn(f"{file}: others on this machine can read these keys; chmod 600 {file}")
        lines = [(number, line.strip()) for number, line in enumerate(operators_text(file, option).splitlines(), 1)]
        callers = [_caller(f"{file}:{number}", line) for number, line in lines if line and not line.startswith("#")]
        if not callers:
            raise ValueError(f"{file}: holds no key; write one a line")
        return cls(tuple(callers))

    def check_apart(self, others: "Keys") -> None:
        """Raise ValueError for a key that is among `others`, too."""
        known = {caller.digest: caller.name for caller in others.callers}
        both = next((caller for caller in self.callers if caller.digest in known), None)
        if both is not None:
            raise ValueError(
                f"the admin key {both.name} is the key of {known[both.digest]}, too; draw another: what opens the "
                "server must not manage it"
            )

    def find(self, key: str | None) -> Caller | None:
        """Whose key it is. Takes the same time whichever it is."""
        if not self.callers:
            return ANYBODY
        digest = hashlib.sha256((key or "").encode()).hexdigest()
        found = None
        for caller in self.callers:
            if hmac.compare_digest(caller.digest, digest):
                found = caller
        return found


def _caller(place: str, line: str) -> Caller:
    match = _NAMED.fullmatch(line)
    if match is None:
        raise ValueError(f"{place}: is no key; write KEY or NAME: KEY, without blanks in either")
    hashed = _HASHED.fullmatch(match[2])
    if hashed is None and len(match[2]) < LEAST_CHARS:
        raise ValueError(f"{place}: a key of {len(match[2])} characters; take at least {LEAST_CHARS}, drawn at random")
    digest = hashed[1].lower() if hashed else hashlib.sha256(match[2].encode()).hexdigest()
    return Caller(match[1] or f"key {digest[:8]}", digest)


async def authenticate(request: Request) -> Caller:
    """The caller of a request, by its key. Raises 401 where a key is asked for and this is none.

    The dependency of every route that does work: what a caller may use is checked here, too. It waits for nothing; a
    coroutine, as others are given a thread.
    """
    return _authenticate(request.app.state.server.keys, request.headers)


def _authenticate(keys: Keys, headers: Mapping[str, str]) -> Caller:
    caller = keys.find(_key(headers))
    if caller is None:
        raise _no_key("key")
    if (exchange := current.get()) is not None:
        exchange.caller = caller.name
    return caller


def authenticate_by_path(path: str, headers: Mapping[str, str], keys: Keys, admin_keys: Keys) -> None:
    """What the route that the path leads to will ask for, before anything else of a request is read."""
    if path.startswith(f"{ADMIN_PREFIX}/") and admin_keys.callers:
        _authenticate_admin(keys, admin_keys, headers)
    else:
        _authenticate(keys, headers)


async def authenticate_admin(request: Request) -> Caller:
    """The operator behind a request. Raises 403 for a user's key, 401 for what is none."""
    state = request.app.state.server
    return _authenticate_admin(state.keys, state.admin_keys, request.headers)


def _authenticate_admin(keys: Keys, admin_keys: Keys, headers: Mapping[str, str]) -> Caller:
    key = _key(headers)
    admin, user = admin_keys.find(key), keys.find(key)
    if admin is None and user not in (None, ANYBODY):
        raise ApiError("this key is a user's: what manages the server takes one of --admin-key-file", 403)
    if admin is None:
        raise _no_key("admin key")
    if (exchange := current.get()) is not None:
        exchange.caller = f"admin: {admin.name}"
    return admin


def _no_key(what: str) -> ApiError:
    return ApiError(
        f"the {what} is missing or wrong: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
        401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _key(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
