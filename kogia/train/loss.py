"""The supervised loss of every stage, as a SUM over tokens (train_step divides by the global count).

    L = sum_i -log p(t_i | t_<i)  +  (lambda / D) sum_k L_k  +  alpha L_Bal           (DeepSeek-V3 sections 2.1.2, 2.2)

over the masked tokens i. L_k is the loss of MTP depth k = 0..D-1: row i, which has seen t_i and knows the tokens up to
t_{i+1+k}, predicts t_{i+2+k}; a row counts only if that token is masked in and lies in the same sequence. L_k keeps the
main loss's denominator, so lambda means the same under any mask. L_Bal averages over tokens and sums over layers.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kogia.data.loader import Batch
from kogia.model.config import MLAConfig
from kogia.model.packed import PackedTokens
from kogia.model.transformer import Transformer
from kogia.ops.logprob import linear_logprob
from kogia.train.step import Metrics


def supervised_loss(
    model: Transformer,
    batch: Batch,
    *,
    mtp_weight: float,
    balance_weight: float,
    indexer_weight: float = 0.0,
    nested_rank_min: int | None = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Loss of one micro-batch and its parts, all summed over tokens. A weight of 0 skips the work of its part."""
    ranks = None if nested_rank_min is None else nested_ranks(model, batch.tokens, nested_rank_min)
    hidden = model(batch.tokens, latent_ranks=ranks)
    logprobs, entropy = model.logprobs_from_hidden(hidden, batch.tokens, mask=batch.loss_mask)
    main = -logprobs.sum()
    metrics: Metrics = {"loss": main.detach(), "entropy": entropy.detach().sum()}
    total = main
    depths = model.config.num_mtp_layers if mtp_weight else 0
    for depth, loss in enumerate(mtp_losses(model, hidden, batch, depths, ranks)):
        total = total + mtp_weight / depths * loss
        metrics[f"mtp_loss_{depth + 1}"] = loss.detach()
    balance = model.pop_balance_loss()
    if balance_weight and (routers := model.routers()):
        # the routers sum over all tokens, prompts included; the loss over masked ones
        balance = balance * (batch.num_loss_tokens / batch.tokens.num_tokens)
        total = total + balance_weight * balance
        metrics["balance"] = balance.detach() / len(routers)
    if indexers := model.indexers():
        imitation = model.pop_indexer_loss() * (batch.num_loss_tokens / batch.tokens.num_tokens)
        total = total + indexer_weight * imitation
        metrics["indexer"] = imitation.detach() / len(indexers)
    return total, metrics


def mtp_losses(
    model: Transformer,
    hidden: Float[Tensor, "tokens dim"],
    batch: Batch,
    depths: int,
    latent_ranks: Int[Tensor, " seqs"] | None = None,
) -> list[Float[Tensor, ""]]:
    """Summed negative log-probability of each MTP depth, the depths chained."""
    losses = []
    for depth in range(depths):
        next_ids, _ = shifted_ids(batch.tokens, depth + 1)
        hidden = model.mtp_hidden(depth, hidden, next_ids, batch.tokens, latent_ranks=latent_ranks)
        rows, targets = mtp_targets(batch.tokens, batch.loss_mask, depth)
        normed = model.mtp_norm(depth, hidden[rows])
        logprobs, _ = linear_logprob(normed, model.lm_head.weight, targets)
        losses.append(-logprobs.sum())
    return losses


def nested_ranks(model: Transformer, tokens: PackedTokens, smallest: int) -> Int[Tensor, " seqs"]:
    """Nested dropout (Rippel et al. 2014) over the latent: full rank for half of the sequences, for the others a rank
    drawn evenly from `smallest` up, so that every prefix is trained and the early numbers carry most."""
    attention = model.config.attention
    if not isinstance(attention, MLAConfig) or smallest > attention.kv_lora_rank:
        what = f"kv_lora_rank = {attention.kv_lora_rank}" if isinstance(attention, MLAConfig) else "no latent attention"
        raise ValueError(f"nested_rank_min = {smallest}: the model has {what}")
    full, num_seqs = attention.kv_lora_rank, len(tokens.cu_seqlens) - 1
    drawn = torch.randint(smallest, full + 1, (num_seqs,))
    return torch.where(torch.rand(num_seqs) < 0.5, full, drawn).to(tokens.token_ids.device)


def shifted_ids(tokens: PackedTokens, by: int) -> tuple[Int[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """(token `by` places after each row, whether that is in the row's own sequence); id 0 where it is not."""
    lengths = tokens.cu_seqlens.diff()
    ends = torch.repeat_interleave(tokens.cu_seqlens[1:], lengths, output_size=tokens.num_tokens)
    inside = torch.arange(tokens.num_tokens, device=ends.device) + by < ends
    return tokens.token_ids.roll(-by) * inside, inside


def mtp_targets(
    tokens: PackedTokens, loss_mask: Bool[Tensor, " tokens"], depth: int
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """(rows whose prediction at MTP depth `depth` counts, the tokens they must predict)."""
    targets, inside = shifted_ids(tokens, depth + 2)
    rows = (inside & loss_mask.roll(-(depth + 2))).nonzero().flatten()
    return rows, targets[rows]


@torch.no_grad()
def validation_loss(model: Transformer, batches: list[Batch]) -> dict[str, float]:
    """Mean nats per masked token over all batches, of the main model ("val_loss") and of each MTP depth.

    Runs in evaluation mode, so that no router counts these tokens, and restores the mode.
    """
    training = model.training
    model.eval()
    try:
        depths, device = model.config.num_mtp_layers, model.device
        sums = torch.zeros(1 + depths, dtype=torch.float64)
        for batch in (b.to(device) for b in batches):
            hidden = model(batch.tokens)
            main = -model.logprobs_from_hidden(hidden, batch.tokens, mask=batch.loss_mask)[0].sum()
            sums += torch.stack([main, *mtp_losses(model, hidden, batch, depths)]).double().cpu()
    finally:
        model.train(training)
    means = (sums / sum(batch.num_loss_tokens for batch in batches)).tolist()
    names = ["val_loss", *(f"val_mtp_loss_{depth + 1}" for depth in range(depths))]
    return dict(zip(names, means, strict=True))
