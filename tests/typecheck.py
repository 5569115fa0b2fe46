"""The type checker of the test run: beartype, with ints accepted for floats (PEP 484's numeric tower).

jaxtyping's hook puts `jaxtyped` around every function. Its own form runs the checker twice a call and binds the
arguments besides, for better messages; that was most of what the tests took. This one checks as much, once.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

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
    checked, has_shapes = check(function), "jaxtyping" in repr(function.__annotations__)
    function.__annotations__ = checked.__annotations__ = written
    if not has_shapes:
        return checked

    @functools.wraps(function)
    def with_shapes(*args: Any, **kwargs: Any) -> Any:
        with _jaxtyped("context"):  # a name of an axis has one length within a call
            return checked(*args, **kwargs)

    return with_shapes


def _known(annotation: Any, names: dict[str, Any]) -> Any:
    """An annotation without strings; Any where they name what is not there yet, or for readers alone."""
    bearer = SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(bearer, names, include_extras=True)["it"]
    except Exception:  # noqa: BLE001 - whatever is wrong with it
        return Any


jaxtyping.jaxtyped = jaxtyped
