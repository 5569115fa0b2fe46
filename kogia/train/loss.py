"""The supervised loss of every stage, as a SUM over tokens (train_step divides by the global count).

    L = sum_i -log p(t_i | t_<i)  +  (lambda / D) sum_k L_k  +  alpha L_Bal           (DeepSeek-V3 sections 2.1.2, 2.2)

over the masked tokens i. L_k is the loss of MTP depth k = 0..D-1: row i, which has seen t_i and knows the tokens up to
t_{i+1+k}, predicts t_{i+2+k}; a row counts only if that token is masked in and lies in the same sequence. L_k keeps the
main loss's denominator, so lambda means the same under any mask. L_Bal averages over tokens and sums over layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kogia.data.loader import Batch
from kogia.model.config import MLAConfig, ModelConfig, Recompute
from kogia.model.layers import StepContext
from kogia.model.moe import max_violation
from kogia.model.packed import PackedTokens
from kogia.model.routing import Routing
from kogia.model.transformer import Transformer
from kogia.ops.moe import Balance
from kogia.train.config import SupervisedConfig
from kogia.train.step import Loss, Metrics

BALANCES = ("balance", "device_balance", "communication_balance")
"""Metrics of the balance losses, each a mean over the mixtures that ran, in the order of `balance_losses`."""


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the parts of the loss; 0 skips the work of its part."""

    mtp: float
    """lambda of DeepSeek-V3 eq 25."""
    balance: float
    """alpha of DeepSeek-V3 eq 17, alpha 1 of DeepSeek-V2."""
    indexer: float = 0.0
    device_balance: float = 0.0
    """alpha 2 of DeepSeek-V2."""
    communication_balance: float = 0.0
    """alpha 3 of it."""
    balanced: Balance = Balance()
    share: float = 1.0
    """Tokens that count over all tokens, of the whole optimiser step: what brings sums over all tokens, as the routers
    and indexers give, to the scale of sums over those that count. One number: micro-batches may be cut anywhere."""

    @property
    def balances(self) -> tuple[float, float, float]:
        return self.balance, self.device_balance, self.communication_balance


def balance_of(config: SupervisedConfig, model: ModelConfig) -> Balance:
    """Over what the balance losses of a run go. Raises ValueError for devices that the experts do not go into."""
    weighted = config.device_balance_weight or config.communication_balance_weight
    if model.moe is None or not weighted:
        return Balance(config.balance_over)
    moe, devices = model.moe, config.balance_devices or model.moe.num_groups
    if devices < 2 or moe.num_experts % devices:
        raise ValueError(
            f"device_balance_weight and communication_balance_weight are of {devices} device(s) for "
            f"model.moe.num_experts = {moe.num_experts}: set balance_devices to a divisor of it above 1"
        )
    reach = moe.topk_groups if devices == moe.num_groups else min(moe.topk, devices)
    return Balance(config.balance_over, devices, reach)


def supervised_loss(
    model: Transformer,
    batch: Batch,
    weights: LossWeights,
    nested_rank_min: int | None = None,
    recompute: Recompute = "none",
) -> Loss:
    """Loss of one micro-batch and its parts, all summed over tokens."""
    ranks = None if nested_rank_min is None else nested_ranks(model, batch.tokens, nested_rank_min)
    routing = Routing(losses=True, balance=weights.balanced)
    step = model.step(batch.tokens, routing=routing, latent_ranks=ranks, recompute=recompute)
    hidden = model(batch.tokens, step=step)
    rows = batch.loss_rows
    main, entropy = model.loss_from_hidden(hidden, batch.tokens, rows)
    metrics: Metrics = {"loss": main.detach(), "entropy": entropy}
    total = main
    depths = model.config.num_mtp_layers if weights.mtp else 0
    for depth, loss in enumerate(mtp_losses(model, hidden, batch.tokens, rows, step, depths)):
        total = total + weights.mtp / depths * loss
        metrics[f"mtp_loss_{depth + 1}"] = loss.detach()
    balance, imitation = routing.balance_losses(), routing.indexer_loss()
    for name, weight, loss in zip(BALANCES, weights.balances, () if balance is None else balance, strict=False):
        if weight:
            total = total + weight * weights.share * loss
            metrics[name] = weights.share * loss.detach() / routing.num_mixtures
    if imitation is not None:
        total = total + weights.indexer * weights.share * imitation
        metrics["indexer"] = weights.share * imitation.detach() / routing.num_indexers
    return Loss(total, metrics, routing.loads(len(model.routers())), num_copies=routing.num_copies)


def mtp_losses(
    model: Transformer,
    hidden: Float[Tensor, "tokens dim"],
    tokens: PackedTokens,
    rows: Int[Tensor, " rows"],
    step: StepContext,
    depths: int,
) -> list[Float[Tensor, ""]]:
    """Summed negative log-probability of the tokens `rows` at each MTP depth, the depths chained."""
    losses = []
    for depth in range(depths):
        hidden = model.mtp_hidden(depth, hidden, shifted_ids(tokens, depth + 1), step)
        sources, targets, counted = mtp_targets(tokens, rows, depth)
        normed = model.mtp_norm(depth, hidden.index_select(0, sources))
        losses.append(model.lm_head(normed, targets, summed=True, counted=counted)[0])
    return losses


def nested_ranks(model: Transformer, tokens: PackedTokens, smallest: int) -> Int[Tensor, " seqs"]:
    """Nested dropout (Rippel et al. 2014) over the latent: full rank for half of the sequences, for the others a rank
    drawn evenly from `smallest` up, so that every prefix is trained and the early numbers carry most."""
    full, num_seqs = latent_rank(model.config, smallest), tokens.segments.num_seqs
    drawn = torch.randint(smallest, full + 1, (num_seqs,))
    return torch.where(torch.rand(num_seqs) < 0.5, full, drawn).to(tokens.token_ids.device)


def latent_rank(model: ModelConfig, smallest: int) -> int:
    """The full rank of the latent. Raises ValueError where `nested_rank_min` = `smallest` is beyond it."""
    attention = model.attention
    if not isinstance(attention, MLAConfig) or smallest > attention.kv_lora_rank:
        what = f"kv_lora_rank = {attention.kv_lora_rank}" if isinstance(attention, MLAConfig) else "no latent attention"
        raise ValueError(f"nested_rank_min = {smallest}: the model has {what}")
    return attention.kv_lora_rank


def shifted_ids(tokens: PackedTokens, by: int) -> Int[Tensor, " tokens"]:
    """The token `by` places after each row; id 0 where that lies beyond the row's sequence."""
    segments = tokens.segments
    ends = segments.cu_seqlens[1:][segments.owner]
    inside = torch.arange(tokens.num_tokens, device=ends.device) + by < ends
    return tokens.token_ids.roll(-by) * inside


def mtp_targets(
    tokens: PackedTokens, rows: Int[Tensor, " rows"], depth: int
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """(rows that predict the tokens `rows` at MTP depth `depth`, those tokens, which of them count).

    A token that stands too near to the start of its sequence is predicted by nothing and does not count. It is kept,
    since how many there are is known on the device alone.
    """
    counted = tokens.segments.offsets[rows] >= depth + 2
    return (rows - (depth + 2)).clamp_min(0), tokens.token_ids[rows], counted


@torch.no_grad()
def validation_loss(model: Transformer, batches: list[Batch]) -> dict[str, float]:
    """Mean nats per masked token over all batches, of the main model ("val_loss") and of each MTP depth; and MaxVio of
    the experts' load over all of them ("val_max_vio", arXiv 2408.15664's MaxVio_global), a mean over the mixtures."""
    depths, device, loads = model.config.num_mtp_layers, model.device, []
    sums = torch.zeros(1 + depths, dtype=torch.float64, device=device)
    for batch in (b.to(device) for b in batches):
        routing = Routing()
        step, rows = model.step(batch.tokens, routing=routing), batch.loss_rows
        hidden = model(batch.tokens, step=step)
        main, _ = model.loss_from_hidden(hidden, batch.tokens, rows)
        sums += torch.stack([main, *mtp_losses(model, hidden, batch.tokens, rows, step, depths)]).double()
        loads.append(routing.loads(len(model.routers())))
    means = (sums / sum(batch.num_loss_tokens for batch in batches)).tolist()
    names = ["val_loss", *(f"val_mtp_loss_{depth + 1}" for depth in range(depths))]
    return dict(zip(names, means, strict=True)) | _global_violation(loads)


def _global_violation(loads: Sequence[Tensor | None]) -> dict[str, float]:
    counted = [load for load in loads if load is not None]
    return {"val_max_vio": float(max_violation(torch.stack(counted).sum(0)).nanmean())} if counted else {}
