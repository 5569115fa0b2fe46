"""AdamW with weight decay on matrices only, and its state by parameter name for checkpoints."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kogia.train.config import OptimConfig

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters in two groups: matrices (decayed) and vectors (norms, biases: not decayed)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # the rate is set before each step
    return torch.optim.AdamW(groups, lr=optim.lr or 0.0, betas=optim.betas, eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as "<parameter name>/<exp_avg|exp_avg_sq|step>"; empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; a parameter that never had a gradient has no state.

    Raises ValueError naming a parameter whose state is incomplete or of another shape.
    """
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        state = {key: tensors[f"{name}/{key}"].clone() for key in ADAM_STATE if f"{name}/{key}" in tensors}
        if not state:
            continue
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        if shapes != dict.fromkeys(ADAM_STATE[1:], tuple(parameter.shape)) | {"step": ()}:
            raise ValueError(
                f"optimiser state of {name}: found {shapes}, expected a step and two moments of shape "
                f"{tuple(parameter.shape)}; this checkpoint belongs to another model"
            )
        # AdamW's fused kernel wants its step counter where the parameter is
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
