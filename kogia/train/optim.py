"""AdamW with weight decay on matrices only, and its state by parameter name for checkpoints."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kogia.train.config import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters in two groups: matrices (decayed) and vectors (norms, biases: not decayed)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


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
    """Put back what `optimizer_tensors` gave. Raises ValueError naming parameters without state or of other shape."""
    if not tensors:
        return
    for name, parameter in model.named_parameters():
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            found = tensors.get(f"{name}/{key}")
            if found is None or (key != "step" and found.shape != parameter.shape):
                raise ValueError(
                    f"optimiser state of {name}: {key} is {'missing' if found is None else tuple(found.shape)}, the "
                    f"parameter has shape {tuple(parameter.shape)}; this checkpoint belongs to another model"
                )
            state[key] = found.clone() if key == "step" else found.to(parameter.device).clone()
        optimizer.state[parameter] = state
