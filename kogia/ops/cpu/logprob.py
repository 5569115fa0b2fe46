"""What is made of the logits of a step of training: one pass for what is predicted, and one for the gradients."""

import torch
from torch import Tensor

from kogia.ops.cpu.common import Kernel, refusal

_logprob = Kernel("kogia_logprob", "3q 4q 2q")
_backward = Kernel("kogia_logprob_backward", "3q 4q 2q")


def predictions(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of powers side by side, then in float64."""
    made = tuple(torch.empty(len(logits)) for _ in range(3))
    _logprob(*_fields(logits, targets), *(each.data_ptr() for each in made), torch.get_num_threads(), 0)
    return made  # pyright: ignore[reportReturnType]


def predictions_supports(logits: Tensor, targets: Tensor) -> str | None:
    return refusal(logits, dtypes=(torch.float32,)) or refusal(targets, dtypes=(torch.int64,))


def prediction_grads(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    fields = _fields(logits, targets)
    _backward(*fields, 0, 0, lse.data_ptr(), torch.get_num_threads(), grad.data_ptr())
    return logits


def prediction_grads_supports(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> str | None:
    return predictions_supports(logits, targets) or refusal(lse, grad, dtypes=(torch.float32,))


def _fields(logits: Tensor, targets: Tensor) -> tuple[int, ...]:
    return logits.data_ptr(), *logits.shape, targets.data_ptr()
