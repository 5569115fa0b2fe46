"""One model over several ranks: what each of them holds (tensor and expert parallelism).

A rank's share is a model of its own, with the names and modules of the whole one and fewer numbers in them: some of the
attention heads, a part of the width of every feed-forward part and expert (or, with `whole_experts`, some of the
experts as they are), some rows of the output head. What attention and feed-forward parts put out are summands of the
whole model's outputs (Megatron-LM, arXiv 1909.08053 section 3). Embedding, norms, routers, indexers and the latent
projections, which are shared by all heads, are on every rank, and so are the cached latents.

Every tensor is cut along one axis into equal parts, in the order of the ranks. So where a rank's part of a tensor
stands follows from the two shapes alone.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from kogia.model.config import GQAConfig, MLAConfig, ModelConfig
from kogia.model.layers import FeedForward, Head
from kogia.model.linear import Linear
from kogia.model.moe import MoE, SomeExperts
from kogia.model.transformer import Transformer, empty_model, initialise, materialize
from kogia.ops.packed import FORMATS, Format, Packed

Shape = torch.Size | tuple[int, ...]


class Part(NamedTuple):
    """A run of numbers along one axis of a whole tensor."""

    axis: int
    start: int
    length: int

    def of(self, whole: Tensor) -> Tensor:
        """A view of it."""
        return whole.narrow(*self)


@dataclass(frozen=True)
class Share:
    """Which of how many."""

    rank: int
    size: int
    whole_experts: bool = False
    """Split the routed experts by number instead of each by its width."""

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}: ranks count from 0 and there is at least one")

    def part(self, whole: Shape, own: Shape) -> Part | None:
        """Where this rank's part, of shape `own`, stands in a tensor of shape `whole`; None where it has all of it.

        A rank has all where both are equal. Several neighbouring ranks have the same part where there are fewer parts
        than ranks.
        """
        axes = [axis for axis, (a, b) in enumerate(zip(whole, own, strict=True)) if a != b]
        if not axes:
            return None
        (axis,) = axes
        num_parts, rest = divmod(whole[axis], own[axis])
        assert not rest, f"{tuple(own)} is no equal part of {tuple(whole)}"
        return Part(axis, self.rank * num_parts // self.size * own[axis], own[axis])

    def of(self, whole: Tensor, own: Shape) -> Tensor:
        """A view of this rank's part of a whole tensor."""
        part = self.part(whole.shape, own)
        return whole if part is None else part.of(whole)


def share_config(config: ModelConfig, share: Share) -> ModelConfig:
    """The configuration of a rank's share. Raises ValueError where the model cannot be divided so."""
    check_divisible(config, share.size, whole_experts=share.whole_experts)
    attention, moe, size = config.attention, config.moe, share.size
    if isinstance(attention, MLAConfig):
        attention = replace(attention, num_heads=attention.num_heads // size)
    else:
        kv_heads = max(1, attention.num_kv_heads // size)
        attention = replace(attention, num_heads=attention.num_heads // size, num_kv_heads=kv_heads)
    if moe is not None and not share.whole_experts:
        moe = replace(moe, expert_dim=moe.expert_dim // size)
    return replace(config, attention=attention, moe=moe, ffn_dim=max(1, config.ffn_dim // size))


def check_divisible(config: ModelConfig, size: int, *, whole_experts: bool = False) -> None:
    """Raise ValueError, which says what does not divide and which sizes do, unless `size` ranks can share the model."""
    sizes = dict(_divided(config, whole_experts))
    odd = [f"{name} = {value}" for name, value in sizes.items() if value % size]
    attention = config.attention
    kv_heads = attention.num_kv_heads if isinstance(attention, GQAConfig) else 1
    if kv_heads % size and size % kv_heads:
        odd.append(f"attention.num_kv_heads = {kv_heads}")
    if odd:
        common = math.gcd(*sizes.values())
        fitting = [n for n in range(2, common + 1) if common % n == 0 and not (kv_heads % n and n % kv_heads)]
        choice = f"it can be {', '.join(map(str, fitting))}" if fitting else "this model cannot be divided"
        raise ValueError(f"tensor_parallel = {size}: does not divide {' and '.join(odd)} of the model; {choice}")


def _divided(config: ModelConfig, whole_experts: bool) -> Iterator[tuple[str, int]]:
    """What the ranks share out evenly."""
    moe = config.moe
    yield "attention.num_heads", config.attention.num_heads
    if moe is None or moe.num_dense_layers:
        yield "ffn_dim", config.ffn_dim
    if moe is not None and not whole_experts:
        yield "moe.expert_dim", moe.expert_dim
    elif moe is not None:
        yield "moe.num_experts", moe.num_experts
        yield "the width of the shared experts", moe.num_shared_experts * moe.expert_dim


def empty_share(config: ModelConfig, share: Share, dtype: torch.dtype = torch.float32) -> Transformer:
    """A rank's share of a model without storage, on the meta device. Raises ValueError as `share_config`."""
    model = empty_model(share_config(config, share), dtype)
    with torch.device("meta"):
        if _head_is_split(config, share):
            model.lm_head = Head(config.dim, config.vocab_size // share.size)
        for mixture in (module for module in model.modules() if isinstance(module, MoE)):
            _take_whole_experts(mixture, config, share)
    return model.to(dtype)


def _head_is_split(config: ModelConfig, share: Share) -> bool:
    """A tied head is the embedding, which every rank has whole; so is one with an odd number of tokens."""
    return not config.tie_embeddings and config.vocab_size % share.size == 0


def _take_whole_experts(mixture: MoE, config: ModelConfig, share: Share) -> None:
    moe = config.moe
    if moe is None or not share.whole_experts:
        return
    mixture.experts = SomeExperts(config.dim, moe.num_experts, moe.expert_dim, share.rank, share.size)
    if shared := moe.num_shared_experts * moe.expert_dim:
        mixture.shared_experts = FeedForward(config.dim, shared // share.size)


def build_share(
    config: ModelConfig,
    share: Share,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Transformer:
    """A rank's share of what `build_model` makes: one parameter at a time is drawn, of which it keeps its part."""
    model, whole = empty_share(config, share, dtype), dict(empty_model(config, dtype).named_parameters())
    materialize(model, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.empty(whole[name].shape, dtype=dtype, device=device)
            initialise(drawn, config.init_std, seed, name)
            parameter.copy_(share.of(drawn, parameter.shape))
    return model


def load_share(model: Transformer, whole: Mapping[str, Tensor], share: Share) -> None:
    """Copy a rank's part of every tensor of the whole model's state into its share, in place."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(share.of(whole[name], tensor.shape))


def whole_shapes(model: Transformer, config: ModelConfig) -> dict[str, torch.Size]:
    """Of the tensors of the whole model, of this configuration, that `model` is a share of."""
    whole = empty_model(config)
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.format is not None:
            like = whole.get_submodule(name)
            assert isinstance(like, Linear), "a share has the modules of the whole"
            operand = module.operand()
            like.make_packed(module.format, zeros=isinstance(operand, Packed) and operand.zero is not None)
    return {name: tensor.shape for name, tensor in whole.state_dict().items()}


def check_cuts(model: Transformer, whole: Transformer) -> None:
    """Raise ValueError where a share of packed weights would end within numbers that have one scale."""
    wide = dict(whole.named_modules())
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or module.format is None:
            continue
        own, full, format = module.shape, cast(Linear, wide[name]).shape, FORMATS[module.format]
        cut = [axis for axis in (-2, -1) if full[axis] != own[axis]]
        if not format.takes(own) or any(_cuts_a_block(full, own, axis, format) for axis in cut):
            raise ValueError(
                f"{name}: {list(own)} of {list(full)} numbers end within a block of {module.format} weights "
                "that has one scale; choose another tensor_parallel, or load the weights in bfloat16"
            )


def _cuts_a_block(full: Shape, own: Shape, axis: int, format: Format) -> bool:
    scales = format.scale_shape(tuple(full))[axis]
    if scales == 1:  # which every rank then has
        return False
    block = max(full[axis] // scales, format.row_block)
    return bool(full[axis] % scales or own[axis] % block)
