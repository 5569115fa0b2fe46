"""Which implementation of an op runs.

An op is its reference: a documented function in plain PyTorch. Beside it may stand *backends*, faster implementations
of the same signature, named where the op is defined, in order of preference and by kind of device:

    @op(cuda=("kogia.ops.triton.attention",), any=("kogia.ops.aten.experts",))
    def grouped_linear(x, weight, counts): ...

A backend is called as its package is ("triton", "aten", "cpu"). Its module has a function of the op's name and beside
it `NAME_supports` with the same arguments, which returns None, or the reason why it cannot take them. The first that
can is called, the reference where none can. Modules are imported when first needed; one that cannot be imported is
out, for that reason. The first argument of an op is a tensor, and its device is where the op runs.

Within `batch_invariant` modules under `invariant_cuda`, on a GPU, and then `invariant` run instead, and the reference
where an op has none of the latter: what it makes of a row depends on that row alone.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
INVARIANT = "invariant"
REFERENCE = "reference"


@dataclass(eq=False)
class Backend:
    """One faster implementation of an op."""

    module: str
    op: str
    _functions: tuple[Callable, Callable] | None = field(default=None, init=False)
    _missing: str | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.module.split(".")[-2]

    def load(self) -> str | None:
        """Import it; returns why that cannot be done here, or None."""
        if self._functions is None and self._missing is None:
            try:
                module = importlib.import_module(self.module)
                self._functions = getattr(module, self.op), getattr(module, f"{self.op}_supports")
            except (ImportError, RuntimeError) as error:  # no such library, or no driver for it
                self._missing = f"{self.module} cannot be imported: {error}"
        return self._missing

    def refusal(self, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        """Why these arguments cannot be taken, or None."""
        missing = self.load()
        return missing if self._functions is None else self._functions[1](*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._functions is not None, f"{self.module} was not loaded"
        return self._functions[0](*args, **kwargs)


class Op(Generic[P, R]):
    """A reference function that may hand over to a backend."""

    def __init__(self, reference: Callable[P, R], modules: dict[str, Sequence[str]]) -> None:
        self.reference = reference
        self.name = reference.__name__
        self.modules = modules
        self._backends: dict[str, tuple[Backend, ...]] = {}
        for device in ("cpu", "cuda"):  # now: torch.compile cannot trace a dictionary that grows
            self.backends(device)
        self.chosen: str | None = None
        """Set by `use_backend`; None leaves the choice to the arguments."""
        update_wrapper(self, reference)
        OPS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.modules:
            return self.reference(*args, **kwargs)
        return self._pick(args, kwargs)(*args, **kwargs)

    @property
    def backend_names(self) -> list[str]:
        """On any device, the reference first."""
        modules = [module for each in self.modules.values() for module in each]
        return [REFERENCE, *sorted({Backend(module, self.name).name for module in modules})]

    def backends(self, device: str) -> tuple[Backend, ...]:
        """Those of a kind of device, best first; of "invariant" and "invariant_cuda", those under that key."""
        if device not in self._backends:
            shared = () if device.startswith(INVARIANT) else self.modules.get("any", ())
            modules = (*self.modules.get(device, ()), *shared)
            self._backends[device] = tuple(Backend(module, self.name) for module in modules)
        return self._backends[device]

    def refusals(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, str | None]:
        """Backend -> why none of its modules can take these arguments, or None."""
        found: dict[str, str | None] = {}
        for backend in self.backends(args[0].device.type):
            reason, before = backend.refusal(args, kwargs), found.get(backend.name, "")
            found[backend.name] = f"{before}; {reason}".removeprefix("; ") if reason and before is not None else None
        return found

    def _pick(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[P, R]:
        chosen, reasons = self.chosen, []
        if chosen == INVARIANT or is_batch_invariant():
            return self._pick_invariant(args, kwargs)
        for backend in self.backends(args[0].device.type):
            if chosen is not None and chosen != backend.name:
                continue
            if backend.name == "cpu" and torch.compiler.is_compiling():  # it could not look into a C++ library
                continue
            reason = backend.refusal(args, kwargs)
            if reason is None:
                return cast("Callable[P, R]", backend)  # unquoted, it is made anew at every call, which takes 3 us
            reasons.append(reason)
        if chosen is not None and reasons:
            raise ValueError(f"backend {chosen!r} cannot run {self.name} here: {'; '.join(reasons)}")
        return self.reference

    def _pick_invariant(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[P, R]:
        """Raises ValueError for what has no batch-invariant form: nothing falls back silently."""
        reasons = []
        for backend in (*self.backends(f"{INVARIANT}_{args[0].device.type}"), *self.backends(INVARIANT)):
            reason = backend.refusal(args, kwargs)
            if reason is None:
                return cast(Callable[P, R], backend)
            reasons.append(reason)
        if self.backends(INVARIANT):
            raise ValueError(f"{self.name} cannot be batch-invariant here: {'; '.join(reasons)}")
        return self.reference


OPS: dict[str, Op] = {}
"""Every op of the modules imported so far, by name. `all_ops` has them all."""


def all_ops() -> dict[str, Op]:
    """Every op of kogia by name."""
    package = importlib.import_module("kogia.ops")
    for module in pkgutil.iter_modules(package.__path__, "kogia.ops."):
        if not module.ispkg:
            importlib.import_module(module.name)
    return OPS


def op(**modules: Sequence[str]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make a function the reference of an op. Keys are kinds of device, or `any`; values name backend modules."""

    def wrap(reference: Callable[P, R]) -> Op[P, R]:
        return Op(reference, modules)

    return wrap


@contextmanager
def use_backend(name: str, ops: Sequence[str] | None = None) -> Iterator[None]:
    """Within the block, run `ops` (by default all that have it) on the backend `name`, or on the "reference".

    A call that the backend cannot take raises ValueError with the reason: nothing falls back silently. The choice is
    the process's; it is meant for tests, benchmarks and for finding out what is at fault. Raises ValueError for a
    backend that no op, or an op of `ops`, has.
    """
    known = all_ops()
    chosen = [each.name for each in known.values() if name in each.backend_names] if ops is None else ops
    for op_name in chosen:
        if op_name not in known:
            raise ValueError(f"there is no op {op_name!r}; there are {sorted(known)}")
        if name not in known[op_name].backend_names:
            raise ValueError(f"op {op_name!r} has no backend {name!r}; it has {known[op_name].backend_names}")
    if not chosen:
        names = sorted({each for one in known.values() for each in one.backend_names})
        raise ValueError(f"no op has a backend {name!r}; there are {names}")
    before = {op_name: OPS[op_name].chosen for op_name in chosen}
    try:
        for op_name in chosen:
            OPS[op_name].chosen = name
        yield
    finally:
        for op_name, previous in before.items():
            OPS[op_name].chosen = previous


_is_invariant: ContextVar[bool] = ContextVar("_is_invariant", default=False)
_blocks: list[None] = []
"""One entry for each block of `batch_invariant` that any thread is in: torch.compile cannot trace the variable, and
need not where there is none."""


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within the block, in this thread, what an op makes of a row does not depend on the rows beside it, bit for bit.

    It is slower (docs/deterministic.md), takes no gradients, and on a CPU runs one thread: where products are shared
    out, rows near the border of a share are summed in another order.
    """
    token, threads = _is_invariant.set(True), torch.get_num_threads()
    _blocks.append(None)
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        _blocks.pop()
        _is_invariant.reset(token)
        if threads > 1:
            torch.set_num_threads(threads)


def is_batch_invariant() -> bool:
    """Whether this thread is within `batch_invariant`."""
    return bool(_blocks) and _is_invariant.get()


def which(device: torch.device | str) -> dict[str, dict[str, str | None]]:
    """For every op, its backends on a device, best first: None where it can be loaded, else the reason.

    The reference, which is always there, comes last. Which of them takes a call depends on the call's arguments:
    `OPS[name].refusals(args, kwargs)` tells.
    """
    kind = torch.device(device).type
    return {
        name: {b.name: b.load() for b in each.backends(kind)} | {REFERENCE: None} for name, each in all_ops().items()
    }
