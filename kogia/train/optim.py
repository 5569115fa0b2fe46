"""What moves the weights: AdamW, or Muon with AdamW beside it, float32 masters of 16-bit weights, 16-bit moments.

AdamW decays matrices only. Muon takes the matrices of attention and feed-forward parts, experts included; embeddings,
head, routers and vectors stay AdamW's. Of weights in bfloat16 the optimiser keeps float32 masters, and what
micro-batches add up of their gradients is float32 too (DeepSeek-V3 section 3.3): of one alone it stays as it is.
Moments in bfloat16 are widened for the moment of their update.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from kogia.model.moe import Router
from kogia.ops.adamw import Trained, TrainedGroup, adamw, added_up
from kogia.train.config import OptimConfig
from kogia.train.muon import Muon

MASTER = "master"
_LARGE = 1 << 22
"""Numbers of a gradient whose norm is a launch of its own."""


class Optimizer:
    """All that moves the weights of one model."""

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        self.weights = {name: _master(p) for name, p in model.named_parameters()}
        """What is trained of each parameter, in float32: itself, or its master."""
        self._copies = {self.weights[name]: p for name, p in model.named_parameters() if p is not self.weights[name]}
        """Of each master, what the model multiplies with."""
        trained = {name: weight for name, weight in self.weights.items() if weight.requires_grad}
        by_muon = _matrices(model) & trained.keys() if optim.kind == "muon" else set()
        self.parts: list[AdamW | Muon] = [
            AdamW([weight for name, weight in trained.items() if name not in by_muon], optim, self._copies)
        ]
        if by_muon:
            self.parts.append(_muon([weight for name, weight in trained.items() if name in by_muon], optim))

    def zero_grad(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    def gradients(self) -> list[Tensor]:
        """Of the weights that the backward passes since `zero_grad` have reached."""
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Of all gradients together, in float32, on the device."""
        grads = self.gradients()
        halves = [grad for grad in grads if grad.dtype != torch.float32]
        if not halves:
            return get_total_norm(grads)
        small = [grad for grad in halves if grad.numel() < _LARGE]
        # one at a time, large ones are read at 3.4 TB/s, where those of a list are at 2.4 on an H200
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in halves if grad.numel() >= _LARGE]
        norms += torch._foreach_norm(small, 2, dtype=torch.float32) if small else ()
        if whole := [grad for grad in grads if grad.dtype == torch.float32]:
            norms += torch._foreach_norm(whole, 2)
        return torch.stack(norms).norm()

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor | None = None) -> None:
        """One update at this learning rate, of gradients times `scale`, which may stay on the device. The gradients
        mean nothing after it."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step(scale=scale)
        if len(self.parts) > 1 and (moved := [w for w in self.parts[1].param_groups[0]["params"] if w in self._copies]):
            torch._foreach_copy_([self._copies[weight] for weight in moved], moved)
        # kernels do not count as writes, by which FP8 forms of weights know that they are old
        torch.autograd.graph.increment_version([*self.weights.values(), *self._copies.values()])

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: "<parameter>/<exp_avg|exp_avg_sq|step|momentum>", empty before the first step, and
        "<parameter>/master" where there is one."""
        found = {f"{name}/{MASTER}": weight.data for name, weight in self.weights.items() if weight in self._copies}
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
        for master in self._copies:
            name = names[id(master)]
            saved = tensors.get(f"{name}/{MASTER}", master)
            if saved.shape != master.shape:
                raise ValueError(f"{name}/{MASTER}: found {tuple(saved.shape)}, expected {tuple(master.shape)}")
            master.copy_(saved)


def build_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimiser of `optim` over all parameters that train."""
    return Optimizer(model, optim)


class AdamW(torch.optim.AdamW):
    """In two groups: matrices, which are decayed, and vectors (norms, biases), which are not."""

    keys = "step", "exp_avg", "exp_avg_sq"
    """What is kept of a parameter."""

    def __init__(self, weights: list[Parameter], optim: OptimConfig, copies: Mapping[Parameter, Tensor]) -> None:
        """`copies` of weights are written with them."""
        groups = [
            {"params": [p for p in weights if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        # the rate is set before each step
        super().__init__(groups, lr=optim.lr or 0.0, betas=optim.betas, eps=optim.eps)
        self.moments: torch.dtype = getattr(torch, optim.moments)
        """What they are kept in between steps."""
        self._copies = copies

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, scale: Tensor | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "a training step has the gradients already"
        for group in self.param_groups:
            if trained := [self._trained(p, p.grad) for p in group["params"] if p.grad is not None]:
                rates = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
                adamw(TrainedGroup(trained), scale, **rates)

    def _trained(self, weight: Parameter, grad: Tensor) -> Trained:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state |= {key: torch.zeros_like(weight, dtype=self.moments) for key in ("exp_avg", "exp_avg_sq")}
        return Trained(weight, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], self._copies.get(weight))


def _master(parameter: Parameter) -> Parameter:
    """What is trained of a parameter: itself in float32, else a copy in it, which gathers its gradients."""
    if parameter.dtype == torch.float32 or not parameter.requires_grad:
        return parameter
    master = Parameter(parameter.detach().float())
    master.grad_dtype = None  # any: the gradient of one micro-batch stays as it is
    parameter.register_post_accumulate_grad_hook(partial(_gather, master))
    return master


def _gather(master: Parameter, parameter: Tensor) -> None:
    assert parameter.grad is not None
    grad, parameter.grad = parameter.grad, None
    master.grad = grad if master.grad is None else added_up(master.grad, grad)


def _matrices(model: nn.Module) -> set[str]:
    """Names of what Muon takes."""
    vocabulary = ("embed_tokens.weight", "lm_head.weight")
    routers = {id(module.weight) for module in model.modules() if isinstance(module, Router)}
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim >= 2 and not name.endswith(vocabulary) and id(p) not in routers
    }


def _muon(weights: list[Parameter], optim: OptimConfig) -> Muon:
    return Muon(
        weights,
        lr=optim.lr or 0.0,
        momentum=optim.muon_momentum,
        weight_decay=optim.weight_decay,
        moments=getattr(torch, optim.moments),
    )


def _loaded(part: AdamW | Muon, name: str, weight: Parameter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of one parameter from a checkpoint, where its part wants it; nothing if there is none."""
    keys, known = part.keys, {*AdamW.keys, *Muon.keys}
    state = {key: tensors[f"{name}/{key}"] for key in known if f"{name}/{key}" in tensors}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    expected = {key: () if key == "step" else tuple(weight.shape) for key in keys}
    if state and shapes != expected:
        raise ValueError(
            f"optimiser state of {name}: found {shapes}, expected {expected}; this checkpoint belongs to another model "
            "or another optim.kind"
        )
    # AdamW's kernels want its step counter where the parameter is
    return {
        key: value.to(weight.device, torch.float32 if key == "step" else part.moments, copy=True)
        for key, value in state.items()
    }
