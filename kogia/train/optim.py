"""What moves the weights: AdamW, or Muon with AdamW beside it, float32 masters of 16-bit weights, 16-bit moments.

AdamW decays matrices only. Muon takes the matrices of attention and feed-forward parts, experts included; embeddings,
head, routers and vectors stay AdamW's. Of weights in bfloat16 the optimiser keeps float32 masters, and gathers their
gradients, which micro-batches add up, in float32 too (DeepSeek-V3 section 3.3); moments in bfloat16 are widened for
the moment of their update.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.adamw import adamw

from kogia.model.moe import Router
from kogia.train.config import OptimConfig
from kogia.train.muon import Muon

MASTER = "master"
STATES = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum",)}
"""What each keeps of a parameter."""
WIDENED_AT_ONCE = 2**26
"""Numbers of moments that are held in float32 at a time."""


class Optimizer:
    """All that moves the weights of one model."""

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        self.weights = {name: _master(p) for name, p in model.named_parameters()}
        """What is trained of each parameter, in float32: itself, or its master."""
        self._copies = [(p, self.weights[name]) for name, p in model.named_parameters() if p is not self.weights[name]]
        trained = {name: weight for name, weight in self.weights.items() if weight.requires_grad}
        by_muon = _matrices(model) & trained.keys() if optim.kind == "muon" else set()
        self.parts: list[torch.optim.Optimizer] = [
            _adamw([weight for name, weight in trained.items() if name not in by_muon], optim)
        ]
        if by_muon:
            self.parts.append(_muon([weight for name, weight in trained.items() if name in by_muon], optim))

    def zero_grad(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    def with_gradients(self) -> list[Parameter]:
        """The weights that the backward passes since `zero_grad` have reached."""
        return [weight for weight in self.weights.values() if weight.grad is not None]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at this learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
        # AdamW's fused kernel does not count as a write, by which FP8 forms of weights know that they are old
        torch.autograd.graph.increment_version(list(self.weights.values()))
        if self._copies:
            copies, masters = zip(*self._copies, strict=True)
            torch._foreach_copy_(list(copies), list(masters))

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: "<parameter>/<exp_avg|exp_avg_sq|step|momentum>", empty before the first step, and
        "<parameter>/master" where there is one."""
        masters = {id(master) for _, master in self._copies}
        found = {f"{name}/{MASTER}": weight.data for name, weight in self.weights.items() if id(weight) in masters}
        for name, weight in self.weights.items():
            for part in self.parts:
                found |= {f"{name}/{key}": value for key, value in part.state.get(weight, {}).items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave; a parameter that never had a gradient has no state.

        Raises ValueError naming a parameter whose state is incomplete or of another shape.
        """
        names = {id(weight): name for name, weight in self.weights.items()}
        for part in self.parts:
            part.state.clear()
            for weight in (w for group in part.param_groups for w in group["params"]):
                if state := _loaded(part, names[id(weight)], weight, tensors):
                    part.state[weight] = state
        for _, master in self._copies:
            name = names[id(master)]
            saved = tensors.get(f"{name}/{MASTER}", master)
            if saved.shape != master.shape:
                raise ValueError(f"{name}/{MASTER}: found {tuple(saved.shape)}, expected {tuple(master.shape)}")
            master.copy_(saved)


def build_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimiser of `optim` over all parameters that train."""
    return Optimizer(model, optim)


class LowMoments(torch.optim.AdamW):
    """AdamW whose moments are kept in bfloat16 between steps."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "a training step has the gradients already"
        for group in self.param_groups:
            for weights in _in_parts([p for p in group["params"] if p.grad is not None]):
                self._update(weights, group)

    def _update(self, weights: list[Parameter], group: dict[str, Any]) -> None:
        states = [self.state[weight] for weight in weights]
        for weight, state in zip(weights, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=weight.device)
                state |= {key: torch.zeros_like(weight, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
        first, second = ([state[key].float() for state in states] for key in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = self.defaults["betas"]
        adamw(
            list[Tensor](weights),
            [weight.grad for weight in weights if weight.grad is not None],
            first,
            second,
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        torch._foreach_copy_([state["exp_avg"] for state in states], first)
        torch._foreach_copy_([state["exp_avg_sq"] for state in states], second)


def _master(parameter: Parameter) -> Parameter:
    """What is trained of a parameter: itself in float32, else a copy in it, which gathers its gradients."""
    if parameter.dtype == torch.float32 or not parameter.requires_grad:
        return parameter
    master = Parameter(parameter.detach().float())
    parameter.register_post_accumulate_grad_hook(partial(_gather, master))
    return master


def _gather(master: Parameter, parameter: Tensor) -> None:
    assert parameter.grad is not None
    grad, parameter.grad = parameter.grad.float(), None
    master.grad = grad if master.grad is None else master.grad.add_(grad)


def _matrices(model: nn.Module) -> set[str]:
    """Names of what Muon takes."""
    vocabulary = ("embed_tokens.weight", "lm_head.weight")
    routers = {id(module.weight) for module in model.modules() if isinstance(module, Router)}
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim >= 2 and not name.endswith(vocabulary) and id(p) not in routers
    }


def _adamw(weights: list[Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """Two groups: matrices, which are decayed, and vectors (norms, biases), which are not."""
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if optim.moments == "float32" else LowMoments
    # the rate is set before each step
    return kind(groups, lr=optim.lr or 0.0, betas=optim.betas, eps=optim.eps, fused=True)


def _muon(weights: list[Parameter], optim: OptimConfig) -> Muon:
    return Muon(
        weights,
        lr=optim.lr or 0.0,
        momentum=optim.muon_momentum,
        weight_decay=optim.weight_decay,
        moments=getattr(torch, optim.moments),
    )


def _loaded(
    part: torch.optim.Optimizer, name: str, weight: Parameter, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of one parameter from a checkpoint, where its part wants it; nothing if there is none."""
    keys = next(keys for kind, keys in STATES.items() if isinstance(part, kind))
    known = {key for keys in STATES.values() for key in keys}
    state = {key: tensors[f"{name}/{key}"] for key in known if f"{name}/{key}" in tensors}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    expected = {key: () if key == "step" else tuple(weight.shape) for key in keys}
    if state and shapes != expected:
        raise ValueError(
            f"optimiser state of {name}: found {shapes}, expected {expected}; this checkpoint belongs to another model "
            "or another optim.kind"
        )
    moments = torch.bfloat16 if isinstance(part, LowMoments) else getattr(part, "moments", torch.float32)
    # AdamW's fused kernel wants its step counter where the parameter is
    return {
        key: value.to(weight.device, torch.float32 if key == "step" else moments, copy=True)
        for key, value in state.items()
    }


def _in_parts(weights: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    """Runs of parameters of no more than `WIDENED_AT_ONCE` numbers, or of one that is larger."""
    part: list[Parameter] = []
    for weight in weights:
        if part and sum(p.numel() for p in part) + weight.numel() > WIDENED_AT_ONCE:
            yield part
            part = []
        part.append(weight)
    if part:
        yield part
