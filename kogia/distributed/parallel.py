"""The shares of a model as one model: what the layers of each rank put out is summed, twice a layer.

Between the two sums of a layer nothing is exchanged (Megatron-LM, arXiv 1909.08053 section 3). Sums are the same bits
on every rank, so residual streams stay equal, and every rank chooses the same experts. Logits are put together from
rows that one rank each has computed: all ranks sample the same tokens.
"""

from typing import Any

from torch import Tensor, nn

from kogia.distributed.group import Group
from kogia.model.transformer import Layer, Transformer


def connect(model: Transformer, group: Group) -> None:
    """Let a rank's share (`kogia.model.sharding`) compute what the whole model does, without gradients.

    From then on every forward pass waits for the other ranks, which must run the same one.
    """

    def summed(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return group.total(output)

    def residual_once(_module: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The first rank alone adds it, in whichever way it is given."""
        return (inputs, options) if group.rank == 0 else (inputs[:2], {**options, "residual": None})

    def all_logits(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return group.side_by_side(output)

    for layer in (module for module in model.modules() if isinstance(module, Layer)):
        layer.self_attn.register_forward_hook(summed)
        layer.mlp.register_forward_pre_hook(residual_once, with_kwargs=True)
        layer.mlp.register_forward_hook(summed)
    if len(model.lm_head.weight) < model.config.vocab_size:
        model.lm_head.register_forward_hook(all_logits)
