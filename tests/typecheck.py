"""The type checker of the test run: beartype, with ints accepted for floats (PEP 484's numeric tower).

jaxtyping's hook puts `jaxtyped` around every function. Its own form runs the checker twice a call and binds the
arguments besides, for better messages; that was most of what the tests took. This one checks as much, once, and calls
that differ in nothing that the types speak of are checked once: the same types and values of text, and of tensors the
same types and shapes.
"""

import contextlib
import dataclasses
import functools
import inspect
import threading
import typing
from collections.abc import Callable, Collection, Hashable
from types import FunctionType, SimpleNamespace
from typing import Any

import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype
from torch import Tensor

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
_jaxtyped = jaxtyping.jaxtyped


def jaxtyped(given: Any = None, *, typechecker: Any = None) -> Any:
    """A function, or the `__init__` of a dataclass, with its types checked at each call."""
    if given is None:
        return jaxtyped
    if inspect.isclass(given):
        if dataclasses.is_dataclass(given) and "__init__" in vars(given):
            given.__init__ = _checked(given.__init__)
        return given
    return _checked(given)


def _checked(function: FunctionType) -> Callable[..., Any]:
    code = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    if function.__code__.co_flags & code:  # beartype would look at the arguments when somebody waits for the first item
        return _jaxtyped(function, typechecker=check)
    written = function.__annotations__
    function.__annotations__ = {name: _known(each, function.__globals__) for name, each in written.items()}
    has_shapes = "jaxtyping" in repr(function.__annotations__)
    found = _checked_shapes(function) if has_shapes else check(function)
    function.__annotations__ = found.__annotations__ = written
    return found


def _checked_shapes(function: FunctionType) -> Callable[..., Any]:
    """Checks what a call is given, and its answer, unless both were in one before."""
    made = threading.local()
    before: dict[Hashable, set[Hashable]] = {}
    """What answers there were to what was given."""

    @functools.wraps(function)
    def answer(*args: Any, **kwargs: Any) -> Any:
        return made.answers.pop() if getattr(made, "answers", None) else function(*args, **kwargs)

    checked = check(answer)

    @functools.wraps(function)
    def with_shapes(*args: Any, **kwargs: Any) -> Any:
        try:
            given = tuple(map(_kind, args)), tuple((name, _kind(each)) for name, each in kwargs.items())
            answers = before.get(given)
        except _Unknown:
            given = answers = None
        if answers is not None:
            found = function(*args, **kwargs)
            with contextlib.suppress(_Unknown):
                if _kind(found) in answers:
                    return found
            made.answers = [found]
        try:
            with _jaxtyped("context"):  # a name of an axis has one length within a call
                found = checked(*args, **kwargs)
        finally:
            made.answers = []
        if given is not None:
            with contextlib.suppress(_Unknown):
                before.setdefault(given, set()).add(_kind(found))
        return found

    return with_shapes


class _Unknown(Exception):
    """A value whose types are not told by its own: those of its items count."""


def _kind(value: Any) -> Hashable:
    """Equal for values that satisfy the same types."""
    own = type(value)
    if isinstance(value, Tensor | np.ndarray):
        return own, value.dtype, value.shape
    if isinstance(value, tuple):
        return own, *map(_kind, value)
    if isinstance(value, str | type):
        return value
    if isinstance(value, Collection):
        raise _Unknown
    return own


def _known(annotation: Any, names: dict[str, Any]) -> Any:
    """An annotation without strings; Any where they name what is not there yet, or for readers alone."""
    bearer = SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(bearer, names, include_extras=True)["it"]
    except Exception:  # noqa: BLE001 - whatever is wrong with it
        return Any


jaxtyping.jaxtyped = jaxtyped
