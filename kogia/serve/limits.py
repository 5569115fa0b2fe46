"""What each key may use: requests and tokens per minute, and requests at once. Beyond it a client hears 429, and when
to come again.

Rates are token buckets (Turner 1986): a minute's worth may come at once, and comes back evenly. The tokens of an answer
are known only when it has come, so they are taken then: whoever has overdrawn waits until his account is even.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kogia.serve.config import operators_text
from kogia.serve.errors import ApiError

DEFAULT = "default"
"""Table of the file for keys that have none of their own."""


@dataclass(frozen=True)
class Limits:
    """None is no limit. Each prompt of a request counts as a request."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""
    concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(
                    f"{each.name} = {value!r:.100}: must be a whole number of at least 1; leave it out for none"
                )


class Bucket:
    """Fills up to `per_minute`, evenly, and may be overdrawn."""

    def __init__(self, per_minute: int) -> None:
        self._size, self._level, self._time = per_minute, float(per_minute), -math.inf

    def wait(self, need: float, now: float) -> float:
        """Seconds until it holds so much; 0 where it does."""
        self._fill(now)
        return max(0.0, need - self._level) * 60 / self._size

    def take(self, count: float, now: float) -> None:
        self._fill(now)
        self._level -= count

    def _fill(self, now: float) -> None:
        if now > self._time:
            self._level = min(self._size, self._level + (now - self._time) * self._size / 60)
            self._time = now


@dataclass
class Account:
    """What one key has used."""

    limits: Limits
    requests: Bucket | None = field(init=False)
    tokens: Bucket | None = field(init=False)
    num_running: int = 0

    def __post_init__(self) -> None:
        own = self.limits
        self.requests = None if own.requests_per_minute is None else Bucket(own.requests_per_minute)
        self.tokens = None if own.tokens_per_minute is None else Bucket(own.tokens_per_minute)


class Limiter:
    """The accounts of all keys, by name. For the event loop's thread alone."""

    def __init__(self, limits: Mapping[str, Limits] | None = None) -> None:
        self._limits = dict(limits or {})
        self._accounts: dict[str, Account] = {}

    @classmethod
    def read(cls, path: str | Path | None, names: Sequence[str]) -> "Limiter":
        """Of a TOML file with a table per key, and `default` for the others. Raises ValueError, naming the table."""
        if path is None:
            return cls()
        try:
            tables = tomllib.loads(operators_text(path, "--limits-file"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: is no TOML: {error}") from None
        return cls({name: _limits(path, name, table, names) for name, table in tables.items()})

    def admit(self, name: str, now: float) -> None:
        """Let a request of this key begin, or raise 429. Each that began must `leave`."""
        account = self._account(name)
        most = account.limits.concurrent_requests
        if most is not None and account.num_running >= most:
            raise _too_many(f"{most} requests of this key are running, and no more may", 1)
        for bucket, need, what in ((account.requests, 1, "requests"), (account.tokens, 0, "tokens")):
            if bucket is not None and (seconds := bucket.wait(need, now)) > 0:
                raise _too_many(f"this key has used its {what} per minute", seconds)
        if account.requests is not None:
            account.requests.take(1, now)
        account.num_running += 1

    def check_size(self, name: str, num_requests: int, field: str) -> None:
        """Raise 400 for a body whose `field` makes so many requests that this key may never have them."""
        limits = self._account(name).limits
        for most, what in ((limits.concurrent_requests, "at once"), (limits.requests_per_minute, "a minute")):
            if most is not None and num_requests > most:
                rule = f"each is a request, of which this key may have {most} {what}; send fewer"
                raise ApiError(f"{field} has {num_requests} texts: {rule}", param=field)

    def take_tokens(self, name: str, count: int, now: float) -> None:
        if (bucket := self._account(name).tokens) is not None:
            bucket.take(count, now)

    def leave(self, name: str) -> None:
        self._account(name).num_running -= 1

    def _account(self, name: str) -> Account:
        if name not in self._accounts:
            self._accounts[name] = Account(self._limits.get(name, self._limits.get(DEFAULT, Limits())))
        return self._accounts[name]


def _limits(path: str | Path, name: str, table: Any, names: Sequence[str]) -> Limits:
    known = [each.name for each in fields(Limits)]
    if name != DEFAULT and name not in names:
        raise ValueError(f"{path}: [{name}]: no key has this name; the key file names {', '.join(names)}")
    if not isinstance(table, dict) or not table.keys() <= set(known):
        raise ValueError(f"{path}: [{name}]: must be a table of {', '.join(known)}")
    try:
        return Limits(**table)
    except ValueError as error:
        raise ValueError(f"{path}: [{name}]: {error}") from None


def _too_many(message: str, seconds: float) -> ApiError:
    wait = max(1, math.ceil(seconds))
    return ApiError(
        f"{message}; try again in {wait} s", 429, code="rate_limit_exceeded", headers={"Retry-After": str(wait)}
    )
