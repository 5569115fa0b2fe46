"""The one model definition: training, rollout and serving all run this `Transformer`.

    x <- x + Attention(RMSNorm(x));   x <- x + FFN(RMSNorm(x));   logits = W_head RMSNorm(x)

Multi-token prediction (DeepSeek-V3 section 2.2) appends modules that predict one token further each:
    h'_i = W_eh [RMSNorm(embedding(t_{i+k})) ; RMSNorm(h_i)],   h^k = block(h'),   logits^k = W_head RMSNorm_k(h^k)
with embedding and head shared. The columns of W_eh take the embedding first, as the published checkpoints do (the
paper's equation 21 writes the hidden state first), and h_i is the residual stream before the final norm.

Parameter names are those of the Hugging Face checkpoints; only the routed experts are stacked (checkpoint/hf.py).
"""

import hashlib
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kogia.model.cache import StepCache
from kogia.model.config import MLAConfig, ModelConfig, Recompute
from kogia.model.gqa import GQA
from kogia.model.indexer import Indexer
from kogia.model.layers import Embedding, FeedForward, Head, ResidualNorm, RMSNorm, StepContext
from kogia.model.mla import MLA
from kogia.model.moe import MoE, Router
from kogia.model.packed import PackedTokens
from kogia.model.rotary import Rotary
from kogia.model.routing import Routing
from kogia.ops.cpu import pages
from kogia.ops.dispatch import which
from kogia.ops.embed import embed
from kogia.ops.linear import linear
from kogia.ops.moe import Activation
from kogia.ops.norm import paired_norms
from kogia.ops.segments import take_rows


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind its norm and beside the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, eps, attention = config.dim, config.norm_eps, config.attention
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn = (
            MLA(dim, attention, layer) if isinstance(attention, MLAConfig) else GQA(dim, attention, eps, layer)
        )
        self.post_attention_layernorm = ResidualNorm(dim, eps)
        if config.moe is not None and config.is_moe_layer(layer):
            self.mlp = MoE(dim, config.moe, layer - config.moe.num_dense_layers)
        else:
            self.mlp = FeedForward(dim, config.ffn_dim)

    def block(
        self, x: Float[Tensor, "tokens dim"], step: StepContext, places: Int[Tensor, " some"] | None = None
    ) -> Float[Tensor, "some dim"]:
        """With `places`, only those rows go on behind the attention, for which the others are keys."""
        attended = step.run("attention", self._attend, x, step)
        if places is not None:
            x, attended = embed(places, x), embed(places, attended)
        x, normed = self.post_attention_layernorm(x, attended)
        return step.run("feed_forward", self.mlp, normed, step, x)

    def _attend(self, x: Float[Tensor, "tokens dim"], step: StepContext) -> Float[Tensor, "tokens dim"]:
        return self.self_attn(self.input_layernorm(x), step)


class DecoderLayer(Layer):
    def forward(self, x: Float[Tensor, "tokens dim"], step: StepContext) -> Float[Tensor, "tokens dim"]:
        return step.run("layer", self.block, x, step)


class SharedHead(nn.Module):
    """The norm before the shared output head; the published layout keeps it under this name.

    It runs apart from its layer, on the rows that predict: who shards the layer from outside shards this one by itself.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)

    def forward(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        return self.norm(x)


class MTPLayer(Layer):
    """One multi-token-prediction module: a layer fed with [embedding of the next token ; hidden state]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.dim, config.norm_eps)
        self.hnorm = RMSNorm(config.dim, config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.shared_head = SharedHead(config.dim, config.norm_eps)

    def forward(
        self,
        embedded: Float[Tensor, "tokens dim"],
        hidden: Float[Tensor, "tokens dim"],
        step: StepContext,
        places: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "some dim"]:
        """`embedded` is the embedding of the token after each row; `places` as in `Layer.block`."""
        return step.run("layer", self._paired, embedded, hidden, step, places)

    def _paired(
        self,
        embedded: Float[Tensor, "tokens dim"],
        hidden: Float[Tensor, "tokens dim"],
        step: StepContext,
        places: Int[Tensor, " some"] | None,
    ) -> Float[Tensor, "some dim"]:
        pair = paired_norms(embedded, hidden, (self.enorm.weight, self.hnorm.weight), self.enorm.eps)
        joined = self.eh_proj(pair) if step.cache is None else linear(pair, self.eh_proj.weight)
        return self.block(joined, step, places)


class Decoder(nn.Module):
    """Embedding, layers (the MTP modules follow the decoder layers) and final norm, under their published names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # given a weight, it draws none: drawing on the meta device would import the compiler, which takes a second
        self.embed_tokens = Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.num_layers = config.num_layers
        layers: list[nn.Module] = [DecoderLayer(config, i) for i in range(config.num_layers)]
        layers += [MTPLayer(config, config.num_layers + k) for k in range(config.num_mtp_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, token_ids: Int[Tensor, " tokens"], step: StepContext) -> Float[Tensor, "tokens dim"]:
        """Residual stream before the final norm."""
        x = self.embed_tokens(token_ids)
        for layer in islice(self.layers, self.num_layers):  # a slice would make a module of them, every time
            x = layer(x, step)
        return x


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.dim, config.vocab_size)
        self.tie_head()
        self.rotary = Rotary(config)
        self._is_compiled = False

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed with; a packed weight is stored in another."""
        return self.model.embed_tokens.weight.dtype

    def tie_head(self) -> None:
        """Let the head be the embedding where the configuration says so; needed again when either was replaced."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def step(
        self,
        batch: PackedTokens,
        cache: StepCache | None = None,
        routing: Routing | None = None,
        latent_ranks: Int[Tensor, " seqs"] | None = None,
        activation: Activation | None = None,
        recompute: Recompute = "none",
    ) -> StepContext:
        """What the layers share in the passes over one batch: those of the main model and of its MTP modules.

        `routing` gives the choice of experts or records it. `latent_ranks` cuts the latents of each sequence to a
        prefix: nested dropout in training, or a model's loss at a smaller rank; without a cache only. `activation` is
        how many routed experts each token uses. `recompute` saves memory in training: what a backward pass does again.
        """
        cos, sin = self.rotary(batch.positions)
        if routing is not None:
            routing.bind(batch.segments)
        if self._is_compiled and cache is None:
            _ = batch.segments.buckets  # made here: the compiler cannot trace how
        if latent_ranks is not None:
            latent_ranks = latent_ranks[batch.segments.owner]
        return StepContext(batch.segments, cos, sin, cache, routing, latent_ranks, activation, recompute)

    def forward(
        self, batch: PackedTokens, cache: StepCache | None = None, step: StepContext | None = None
    ) -> Float[Tensor, "tokens dim"]:
        """Residual stream before the final norm. With a cache, the batch's rows are written to it first.

        `step` is what `Transformer.step` made of the batch, by default of the batch and cache alone.
        """
        return self.model(batch.token_ids, step or self.step(batch, cache))

    def mtp_hidden(
        self,
        depth: int,
        hidden: Float[Tensor, "tokens dim"],
        next_ids: Int[Tensor, " tokens"],
        step: StepContext,
        places: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "some dim"]:
        """Hidden states of MTP module `depth` (from 0): row i sees `hidden[i]` and the token `next_ids[i]`.

        `hidden` comes from the main model for depth 0 and from the module before otherwise; `next_ids[i]` is the token
        depth + 1 places after row i, and `mtp_logits` of the result predicts the token after that one. Rows whose next
        token lies beyond their sequence carry no meaning. Positions stay those of row i. With `places` only those rows
        are wanted, and the activation of the step is theirs; the others leave their keys in the cache.
        """
        return self._mtp_layer(depth)(self.model.embed_tokens(next_ids), hidden, step, places)

    def logits(self, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows vocab"]:
        """Final norm and output head."""
        return self.lm_head(self.model.norm(hidden))

    def mtp_norm(self, depth: int, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """The norm of module `depth` that stands before the shared output head."""
        return self._mtp_layer(depth).shared_head(hidden)

    def mtp_logits(self, depth: int, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows vocab"]:
        """Norm of MTP module `depth` and the shared output head."""
        return self.lm_head(self.mtp_norm(depth, hidden))

    def logprobs(
        self, batch: PackedTokens, temperature: float = 1.0, rows: Int[Tensor, " rows"] | None = None
    ) -> Float[Tensor, " tokens"]:
        """log p(token_ids[i] | earlier tokens of its sequence) in nats; 0 at the start of a sequence.

        With `rows`, which name no start of a sequence, for those tokens alone and 0 elsewhere.
        """
        return self.logprobs_from_hidden(self(batch), batch, temperature, rows)[0]

    def logprobs_from_hidden(
        self,
        hidden: Float[Tensor, "tokens dim"],
        batch: PackedTokens,
        temperature: float = 1.0,
        rows: Int[Tensor, " rows"] | None = None,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """(log-probabilities as in `logprobs`, entropies of the same predictions), from `forward`'s output."""
        rows = batch.segments.later_rows if rows is None else rows
        normed = self.model.norm(take_rows(hidden, rows - 1))
        values, entropy = self.lm_head(normed, batch.token_ids[rows], temperature)
        zeros = values.new_zeros(batch.num_tokens)
        return zeros.index_copy(0, rows, values), zeros.index_copy(0, rows, entropy)

    def loss_from_hidden(
        self, hidden: Float[Tensor, "tokens dim"], batch: PackedTokens, rows: Int[Tensor, " rows"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """(summed negative log-probability of the tokens `rows`, sum of their entropies), from `forward`'s output: what
        `logprobs_from_hidden` gives, in one pass over the head."""
        normed = self.model.norm(take_rows(hidden, rows - 1))
        loss, _, entropy = self.lm_head(normed, batch.token_ids[rows], summed=True)
        return loss, entropy.sum()

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let torch.compile fuse every layer, each as one graph, forward and backward; the first passes take long.

        Layers of one kind share compiled kernels by the compiler's own cache. Batches whose sequences have other
        lengths, and other numbers of tokens, are compiled again.
        """
        which(self.device)  # loads the backends of the ops: imports cannot be traced
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 8 * len(self.model.layers))
        for layer in self.model.layers:
            layer.compile(backend=backend)
        self._is_compiled = True

    def routers(self) -> list[Router]:
        """Routers of all mixture layers in order, the MTP modules' last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def update_router_biases(self, loads: Int[Tensor, "mixtures experts"], speed: float) -> None:
        """Move every selection bias against the loads of an optimiser step, which `Routing.loads` counts."""
        for router, load in zip(self.routers(), loads, strict=True):
            router.update_bias(load, speed)

    def indexers(self) -> list[Indexer]:
        """Lightning indexers of all layers in order, the MTP modules' last; none without sparse attention."""
        return [module for module in self.modules() if isinstance(module, Indexer)]

    def absorb(self) -> None:
        """Prepare latent attention for decoding; to be called again when the weights have changed."""
        for module in self.modules():
            if isinstance(module, MLA):
                module.absorb()

    def _mtp_layer(self, depth: int) -> MTPLayer:
        layer = self.model.layers[self.model.num_layers + depth]
        assert isinstance(layer, MTPLayer)
        return layer


def empty_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model without storage, on the meta device. Selection biases stay float32 whatever the dtype."""
    with torch.device("meta"):
        model = Transformer(config)
    return model.to(dtype)


def materialize(model: Transformer, device: torch.device | str) -> None:
    """Give a model on the meta device storage: uninitialised parameters, zeroed buffers."""
    # what to_empty does, without its empty_like: that one imports sympy, which takes longer than to read 500 MB
    model._apply(lambda tensor: pages.empty(tensor.shape, tensor.dtype, device))
    for buffer in model.buffers():
        buffer.zero_()
    model.tie_head()


def build_model(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Transformer:
    """A freshly initialised model: normal(0, init_std) matrices, unit norms, zero biases.

    Each parameter is drawn on its device by a generator of its own, seeded by `seed` and its name: it depends neither
    on the other parts of the model nor on the order in which they are drawn.
    """
    model = empty_model(config, dtype)
    materialize(model, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialise(parameter, config.init_std, seed, name)
    return model


def initialise(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill the parameter of that name with what it begins with."""
    if name.endswith("norm.weight"):
        parameter.fill_(1.0)
    elif name.endswith(".bias"):
        parameter.zero_()
    else:
        draw(parameter, std, f"{seed}/{name}")


def draw(parameter: Tensor, std: float, key: str) -> None:
    """Fill with normal(0, std) numbers that depend on `key`, the shape and the kind of device alone.

    They are drawn in float32, then cast: drawing in bfloat16 quantises the small weights of wide layers.
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    generator = torch.Generator(parameter.device).manual_seed(seed)
    numbers = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    parameter.copy_(numbers.normal_(0.0, std, generator=generator))
