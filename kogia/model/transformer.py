"""The one model definition: training, rollout and serving all run this `Transformer`.

    x <- x + Attention(RMSNorm(x));   x <- x + FFN(RMSNorm(x));   logits = W_head RMSNorm(x)

Multi-token prediction (DeepSeek-V3 section 2.2) appends modules that predict one token further each:
    h'_i = W_eh [RMSNorm(embedding(t_{i+k})) ; RMSNorm(h_i)],   h^k = block(h'),   logits^k = W_head RMSNorm_k(h^k)
with embedding and head shared. The columns of W_eh take the embedding first, as the published checkpoints do (the
paper's equation 21 writes the hidden state first), and h_i is the residual stream before the final norm.

Parameter names are those of the Hugging Face checkpoints; only the routed experts are stacked (checkpoint/hf.py).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kogia.model.cache import StepCache
from kogia.model.config import Llama3RopeConfig, MLAConfig, ModelConfig, YarnConfig
from kogia.model.gqa import GQA
from kogia.model.indexer import Indexer
from kogia.model.layers import FeedForward, RMSNorm, StepContext, step_context
from kogia.model.mla import MLA
from kogia.model.moe import MoE, Router
from kogia.model.packed import PackedTokens
from kogia.ops.logprob import linear_logprob
from kogia.ops.rope import (
    inverse_frequencies,
    llama3_inverse_frequencies,
    rope_angles,
    yarn_inverse_frequencies,
    yarn_mscale,
)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, eps, attention = config.dim, config.norm_eps, config.attention
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn = (
            MLA(dim, attention, eps, layer) if isinstance(attention, MLAConfig) else GQA(dim, attention, eps, layer)
        )
        self.post_attention_layernorm = RMSNorm(dim, eps)
        if config.moe is not None and config.is_moe_layer(layer):
            self.mlp = MoE(dim, config.moe)
        else:
            self.mlp = FeedForward(dim, config.ffn_dim)

    def forward(self, x: Float[Tensor, "tokens dim"], step: StepContext) -> Float[Tensor, "tokens dim"]:
        x = x + self.self_attn(self.input_layernorm(x), step)
        u = self.post_attention_layernorm(x)
        return x + (self.mlp(u, step.batch.cu_seqlens) if isinstance(self.mlp, MoE) else self.mlp(u))


class SharedHead(nn.Module):
    """The norm before the shared output head; the published layout keeps it under this name."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)


class MTPLayer(DecoderLayer):
    """One multi-token-prediction module: a decoder layer fed with [embedding of the next token ; hidden state]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.dim, config.norm_eps)
        self.hnorm = RMSNorm(config.dim, config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.shared_head = SharedHead(config.dim, config.norm_eps)


class Decoder(nn.Module):
    """Embedding, layers (the MTP modules follow the decoder layers) and final norm, under their published names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # given a weight, it draws none: drawing on the meta device would import the compiler, which takes a second
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        layers = [DecoderLayer(config, i) for i in range(config.num_layers)]
        layers += [MTPLayer(config, config.num_layers + k) for k in range(config.num_mtp_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def forward(
        self,
        batch: PackedTokens,
        cache: StepCache | None = None,
        latent_ranks: Int[Tensor, " seqs"] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Residual stream before the final norm. With a cache, the batch's rows are written to it first.

        `latent_ranks` cuts the latents of each sequence to a prefix: nested dropout in training, or a model's loss at a
        smaller rank. Without a cache only; there the cache's row and its ranks say it.
        """
        step = self._step(batch, cache, latent_ranks)
        x = self.model.embed_tokens(batch.token_ids)
        for layer in self.model.layers[: self.config.num_layers]:
            x = layer(x, step)
        return x

    def mtp_hidden(
        self,
        depth: int,
        hidden: Float[Tensor, "tokens dim"],
        next_ids: Int[Tensor, " tokens"],
        batch: PackedTokens,
        cache: StepCache | None = None,
        latent_ranks: Int[Tensor, " seqs"] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Hidden states of MTP module `depth` (from 0): row i sees `hidden[i]` and the token `next_ids[i]`.

        `hidden` comes from the main model for depth 0 and from the module before otherwise; `next_ids[i]` is the token
        depth + 1 places after row i, and `mtp_logits` of the result predicts the token after that one. Rows whose next
        token lies beyond their sequence carry no meaning. Positions stay those of row i.
        """
        module: MTPLayer = self.model.layers[self.config.num_layers + depth]  # pyright: ignore[reportAssignmentType]
        pair = torch.cat((module.enorm(self.model.embed_tokens(next_ids)), module.hnorm(hidden)), -1)
        return module(module.eh_proj(pair), self._step(batch, cache, latent_ranks))

    def logits(self, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows vocab"]:
        """Final norm and output head."""
        return self.lm_head(self.model.norm(hidden))

    def mtp_norm(self, depth: int, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """The norm of module `depth` that stands before the shared output head."""
        return self.model.layers[self.config.num_layers + depth].shared_head.norm(hidden)  # pyright: ignore

    def mtp_logits(self, depth: int, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows vocab"]:
        """Norm of MTP module `depth` and the shared output head."""
        return self.lm_head(self.mtp_norm(depth, hidden))

    def logprobs(
        self, batch: PackedTokens, temperature: float = 1.0, mask: Bool[Tensor, " tokens"] | None = None
    ) -> Float[Tensor, " tokens"]:
        """log p(token_ids[i] | earlier tokens of its sequence) in nats; 0 at position 0 and where `mask` is False."""
        return self.logprobs_from_hidden(self(batch), batch, temperature, mask)[0]

    def logprobs_from_hidden(
        self,
        hidden: Float[Tensor, "tokens dim"],
        batch: PackedTokens,
        temperature: float = 1.0,
        mask: Bool[Tensor, " tokens"] | None = None,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """(log-probabilities as in `logprobs`, entropies of the same predictions), from `forward`'s output."""
        wanted = torch.ones_like(batch.token_ids, dtype=torch.bool) if mask is None else mask.clone()
        wanted[batch.cu_seqlens[:-1]] = False
        rows = wanted.nonzero().flatten()
        normed = self.model.norm(hidden[rows - 1])
        values, entropy = linear_logprob(normed, self.lm_head.weight, batch.token_ids[rows], temperature)
        zeros = values.new_zeros(batch.num_tokens)
        return zeros.index_copy(0, rows, values), zeros.index_copy(0, rows, entropy)

    def routers(self) -> list[Router]:
        """Routers of all mixture layers in order, the MTP modules' last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def pop_balance_loss(self) -> Float[Tensor, ""]:
        """Sequence-wise balance loss summed over the tokens and routers of the last training forward, then cleared."""
        losses = [router.balance_loss for router in self.routers() if router.balance_loss is not None]
        for router in self.routers():
            router.balance_loss = None
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def indexers(self) -> list[Indexer]:
        """Lightning indexers of all layers in order, the MTP modules' last; none without sparse attention."""
        return [module for module in self.modules() if isinstance(module, Indexer)]

    def pop_indexer_loss(self) -> Float[Tensor, ""]:
        """The indexers' own loss summed over the tokens and layers of the last training forward, then cleared."""
        losses = [indexer.loss for indexer in self.indexers() if indexer.loss is not None]
        for indexer in self.indexers():
            indexer.loss = None
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def _step(self, batch: PackedTokens, cache: StepCache | None, latent_ranks: Tensor | None = None) -> StepContext:
        cos, sin = rope_angles(batch.positions, *_rope(self.config, batch.positions.device))
        return step_context(batch, cos, sin, cache, latent_ranks)


def _rope(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Inverse frequencies of the rotary part and the factor on cos and sin."""
    attention = config.attention
    dim = attention.qk_rope_head_dim if isinstance(attention, MLAConfig) else attention.head_dim
    base, scaling = attention.rope_theta, attention.rope_scaling
    if scaling is None:
        return inverse_frequencies(dim, base).to(device), 1.0
    if isinstance(scaling, Llama3RopeConfig):
        return llama3_inverse_frequencies(dim, base, **_fields(scaling)).to(device), 1.0
    numbers = _fields(scaling)
    mscale, all_dim = numbers.pop("mscale"), numbers.pop("mscale_all_dim")
    ratio = yarn_mscale(scaling.factor, mscale) / yarn_mscale(scaling.factor, all_dim)
    return yarn_inverse_frequencies(dim, base, **numbers).to(device), ratio


def _fields(scaling: YarnConfig | Llama3RopeConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(scaling).items() if name != "kind"}


def build_model(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Transformer:
    """A freshly initialised model: normal(0, init_std) matrices, unit norms, zero biases. Reproducible by seed."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="cpu")
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, config.init_std, generator=generator)
        for buffer in model.buffers():
            buffer.zero_()
    # initialise in float32, then cast: drawing in bfloat16 quantises the small weights of wide layers
    model = model.to(device=device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
