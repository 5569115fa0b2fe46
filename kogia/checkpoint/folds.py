"""Activation-aware rounding: input channels that carry large numbers are given finer codes (AWQ, arXiv 2306.00978).

A weight's column j may be multiplied by s_j where what puts out channel j is divided by it: the preceding norm, or the
rows of the preceding projection where nothing but a product lies between. Then the model is the same function, and the
rounding of large columns counts for less. Every s_j is a power of two, so that folding itself rounds nothing.

    s_j = 2^round(alpha * log2(rms_j / geometric mean of rms)),    rms_j^2 = E[x_j^2] on a calibration text

alpha is the one of `ALPHAS` with the least sum_j E[x_j^2] * sum_i (Q(W s) / s - W)_ij^2 over the weights that read the
channels; 0 changes nothing. Where an indexer reads the same channels, they stay as they are.

In int4 the columns of a weight are then rounded one after the other, and those behind make up for the error of each, as
far as what they are multiplied with goes together (GPTQ, arXiv 2210.17323). What a text of so many tokens says of that
is mixed with that nothing goes together and all columns are alike: E[x x^T] is drawn towards a multiple of the identity
by in / (in + rows seen), and 1% at least, as GPTQ does. Without that, columns that are multiplied with little would
make up for more than their codes can hold. What errors of a column count for is drawn as far.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kogia.checkpoint.layout import disk_weights
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig
from kogia.model.transformer import Transformer
from kogia.ops.packed import FORMATS

ALPHAS = tuple(i / 10 for i in range(11))
_MOST_DOUBLINGS = 8.0
_SEARCH_ROWS = 512  # of each weight that alpha is searched on: rows are rounded one by one

HEAD_COPY = ".shared_head.head.weight"
"""What a prediction module's copy of the head ends with."""
_LEAST_DRAWN = 0.01
"""Share of the way to a multiple of the identity, however long the text was."""


@dataclass(frozen=True, eq=False)
class Moment:
    """Of what a weight is multiplied with, in float32 on the CPU."""

    squares: Float[Tensor, " in"]
    """E[x_j^2]"""
    products: Float[Tensor, "in in"] | None = None
    """E[x x^T]; None where they were not asked for, or are too many. Weights that read the same have the same one."""
    num_rows: int = 0
    """That were seen."""


Moments = Mapping[str, Moment]
"""By the name of the weight on disk."""


@dataclass(frozen=True, eq=False)
class Fold:
    """What a stored tensor is multiplied by, in powers of two, and what its columns count for when it is rounded."""

    rows: Tensor | None = None
    """[out]; of a vector its numbers."""
    columns: Tensor | None = None
    """[in]"""
    importance: Tensor | None = None
    """[in]: E[x_j^2] of what the multiplied weight meets; int4 scales are chosen by it."""
    spread: Tensor | None = None
    """[in, in]: how columns behind make up for the error of each, see `ops.integers.quantize_nibbles`."""

    def of(self, part: Tensor, start: int) -> Tensor:
        """Rows of the tensor, from `start` on, multiplied."""
        if self.rows is not None:
            rows = self.rows[start : start + len(part)].to(part.dtype)
            part = part * (rows if part.dim() == 1 else rows[:, None])
        return part if self.columns is None else part * self.columns.to(part.dtype)

    def then(self, rows: Tensor | None, columns: Tensor | None) -> "Fold":
        """This one and another."""
        return replace(self, rows=_product(self.rows, rows), columns=_product(self.columns, columns))


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


@dataclass(frozen=True, eq=False)
class Channels:
    """Numbers between two layers that may be scaled: who reads them and who puts them out."""

    readers: tuple[str, ...]
    """Weights whose columns they meet, one after the other; the rounded ones count in the search."""
    writers: Mapping[str, Tensor | None]
    """Weights or norms -> for each of their rows the channel that it puts out, or -1; None where row j puts out j."""
    shared: Tensor | None = None
    """For each column of the readers its channel, where several columns have one."""
    exact: tuple[str, ...] = field(default=())
    """Readers that are not rounded: routers, copies of the head."""


def channels_of(config: ModelConfig) -> Iterator[Channels]:
    """All of a model, its MTP modules' left out."""
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        if isinstance(config.attention, MLAConfig):
            yield from _latent_attention(config.attention, layer, f"{prefix}.self_attn", prefix)
        else:
            yield from _grouped_attention(config.attention, f"{prefix}.self_attn", prefix)
        yield from _feed_forward(config, layer, prefix)
    if not config.tie_embeddings:
        mtp = [f"model.layers.{config.num_layers + k}.shared_head" for k in range(config.num_mtp_layers)]
        norms = ("model.norm.weight", *(f"{head}.norm.weight" for head in mtp))
        yield Channels(("lm_head.weight",), dict.fromkeys(norms), exact=tuple(f"{head}.head.weight" for head in mtp))


def _latent_attention(a: MLAConfig, layer: int, attention: str, prefix: str) -> Iterator[Channels]:
    direct = a.query_rank(layer) is None
    if a.indexer is None:
        first = "q_proj" if direct else "q_a_proj"
        readers = (f"{attention}.{first}.weight", f"{attention}.kv_a_proj_with_mqa.weight")
        yield Channels(readers, {f"{prefix}.input_layernorm.weight": None})
        if not direct:
            yield Channels((f"{attention}.q_b_proj.weight",), {f"{attention}.q_a_layernorm.weight": None})
    yield Channels((f"{attention}.kv_b_proj.weight",), {f"{attention}.kv_a_layernorm.weight": None})
    values = torch.arange(a.num_heads * a.v_head_dim).view(a.num_heads, a.v_head_dim)
    rows = torch.cat((torch.full((a.num_heads, a.qk_nope_head_dim), -1), values), 1).flatten()
    yield Channels((f"{attention}.o_proj.weight",), {f"{attention}.kv_b_proj.weight": rows})


def _grouped_attention(a: GQAConfig, attention: str, prefix: str) -> Iterator[Channels]:
    readers = tuple(f"{attention}.{name}_proj.weight" for name in "qkv")
    yield Channels(readers, {f"{prefix}.input_layernorm.weight": None})
    values = torch.arange(a.num_kv_heads * a.head_dim).view(a.num_kv_heads, 1, a.head_dim)
    shared = values.expand(-1, a.num_heads // a.num_kv_heads, -1).flatten()
    writers = {f"{attention}.v_proj.weight": None}
    if a.qkv_bias:
        writers[f"{attention}.v_proj.bias"] = None
    yield Channels((f"{attention}.o_proj.weight",), writers, shared)


def _feed_forward(config: ModelConfig, layer: int, prefix: str) -> Iterator[Channels]:
    mlp, moe, parts, routers = f"{prefix}.mlp", config.moe, [f"{prefix}.mlp"], ()
    if moe is not None and config.is_moe_layer(layer):
        parts = [f"{mlp}.experts.{i}" for i in range(moe.num_experts)]
        parts += [f"{mlp}.shared_experts"] if moe.num_shared_experts else []
        routers = (f"{mlp}.gate.weight",)
    readers = tuple(f"{part}.{name}_proj.weight" for part in parts for name in ("gate", "up"))
    yield Channels(readers, {f"{prefix}.post_attention_layernorm.weight": None}, exact=routers)
    for part in parts:
        yield Channels((f"{part}.down_proj.weight",), {f"{part}.up_proj.weight": None})


def search_folds(model: Transformer, moments: Moments, format: str, *, asymmetric: bool = False) -> dict[str, Fold]:
    """Name on disk -> what to multiply it by before rounding to `format`, for a dense model."""
    weights, folds = dict(disk_weights(model)), {}
    options = {"asymmetric": True} if asymmetric else {}
    for channels in channels_of(model.config):
        rounded = [
            name for name in channels.readers if name in moments and FORMATS[format].takes(_shape(weights, name))
        ]
        if not rounded:
            continue
        moment = torch.stack([moments[name].squares for name in rounded]).mean(0)
        losses = {}
        for alpha in ALPHAS:
            scale = scales(_per_channel(moment, channels.shared), alpha)
            columns = scale if channels.shared is None else scale[channels.shared]
            losses[alpha] = sum(
                _loss(weights[name], moments[name].squares, columns, format, options) for name in rounded
            )
        _fold(folds, channels, scales(_per_channel(moment, channels.shared), min(losses, key=lambda a: losses[a])))
    if format == "int4":
        made: dict[tuple[int, int], Tensor | None] = {}  # experts share theirs
        for name, moment in moments.items():
            fold = folds.get(name, Fold())
            key = id(moment.products), id(fold.columns)
            if key not in made:
                made[key] = _spread(moment, fold.columns)
            folds[name] = replace(fold, importance=_known_importance(moment, fold.columns), spread=made[key])
        for name in weights:
            if name.endswith(HEAD_COPY) and "lm_head.weight" in folds:
                folds[name] = folds["lm_head.weight"]
    return folds


def _importance(squares: Tensor, columns: Tensor | None) -> Tensor:
    return squares if columns is None else squares / columns**2


def _share_drawn(moment: Moment) -> float:
    width = len(moment.squares)
    return max(_LEAST_DRAWN, width / (width + moment.num_rows))


def _known_importance(moment: Moment, columns: Tensor | None) -> Tensor:
    """Drawn towards its mean, as what is known of E[x x^T] is."""
    importance, drawn = _importance(moment.squares, columns), _share_drawn(moment)
    return importance * (1 - drawn) + importance.mean() * drawn


def _spread(moment: Moment, columns: Tensor | None) -> Float[Tensor, "in in"] | None:
    """The upper Cholesky factor of the inverse of what is known of E[x x^T]; None where nothing is."""
    if moment.products is None:
        return None
    products = moment.products.double()
    if columns is not None:
        products = products / (columns[:, None] * columns).double()
    own, drawn = products.diagonal(), _share_drawn(moment)
    middle = own[own > 0].mean() if bool((own > 0).any()) else own.new_ones(())
    products = products * ((1 - drawn) / middle)
    products.diagonal().add_(drawn)
    lower, trouble = torch.linalg.cholesky_ex(products)
    if int(trouble):
        return None
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def _shape(weights: Mapping[str, object], name: str) -> tuple[int, ...]:
    weight = weights[name]
    assert isinstance(weight, Tensor), "the model is dense"
    return tuple(weight.shape)


def _per_channel(moment: Tensor, shared: Tensor | None) -> Tensor:
    """The mean over the columns that share a channel."""
    if shared is None:
        return moment
    total = torch.zeros(int(shared.max()) + 1).index_add_(0, shared, moment)
    return total / torch.bincount(shared)


def scales(moment: Float[Tensor, " channels"], alpha: float) -> Float[Tensor, " channels"]:
    """The powers of two for one alpha; 1 for channels that are always 0."""
    logs = 0.5 * torch.log2(moment.double().clamp_min(1e-30))
    seen = moment > 0
    middle = logs[seen].mean() if bool(seen.any()) else 0.0
    powers = (alpha * (logs - middle)).round().clamp(-_MOST_DOUBLINGS, _MOST_DOUBLINGS)
    return torch.where(seen, torch.exp2(powers), 1.0).float()


def _loss(weight: object, moment: Tensor, columns: Tensor, format: str, options: Mapping[str, Any]) -> float:
    """sum_j E[x_j^2] * sum_i error_ij^2 over some of the rows."""
    assert isinstance(weight, Tensor), "the model is dense"
    step = -(-len(weight) // _SEARCH_ROWS)
    rows = weight[::step].float()
    columns, moment = columns.to(rows.device), moment.to(rows.device)
    if format == "int4":
        options = {**options, "importance": _importance(moment, columns)}
    back = FORMATS[format].pack(rows * columns, **options).dense(torch.float32) / columns
    return step * float((back - rows).square_().sum(0) @ moment)


def _fold(folds: dict[str, Fold], channels: Channels, scale: Tensor) -> None:
    if bool((scale == 1).all()):
        return
    columns = scale if channels.shared is None else scale[channels.shared]
    for name in (*channels.readers, *channels.exact):
        folds[name] = folds.get(name, Fold()).then(None, columns)
    for name, rows in channels.writers.items():
        own = 1 / scale if rows is None else torch.where(rows < 0, 1.0, 1 / scale[rows])
        folds[name] = folds.get(name, Fold()).then(own, None)
