"""The policy loss: GRPO, Dr. GRPO, DAPO, GSPO and CISPO as settings of one function.

Per completion token t of sample i, with r the importance ratio of `PolicyLossConfig.ratio` and A the advantage,

    clip:   l = -min(r A, clip(r, 1 - low, 1 + high) A)                             (DeepSeekMath eq 3; DAPO, GSPO)
    cispo:  l = -sg[clip(r, 1 - low, 1 + high)] A log pi(o_t)                                          (MiniMax-M1)
    token ratio     r = pi(o_t) / pi_old(o_t)
    sequence ratio  r = sg[s] pi(o_t) / sg[pi(o_t)],  s = exp(mean_t log pi / pi_old)                  (GSPO-token)
    KL              kl_coef (rho - log rho - 1),  rho = pi_ref / pi  (k3, never negative)       (DeepSeekMath eq 4)

and with separate `old_logprobs` the policy term may carry min(pi_old / pi_behaviour, cap): truncated importance
sampling of the gap between engine and trainer.

The loss is a SUM, sum_i w_i sum_t l_it, and train_step divides it by one number for the whole update. The weights and
that number come from `aggregation_weights` over ALL completions of the update, so micro-batches can be cut anywhere:

    aggregate    w_i             denominator         result
    token        1               tokens kept         1/sum|o_i| sum_i sum_t l               (DAPO)
    sequence     1 / |o_i|       completions kept    1/N sum_i 1/|o_i| sum_t l              (GRPO; N = prompts x group)
    constant     1 / max_tokens  completions kept    1/N sum_i 1/max_tokens sum_t l         (Dr. GRPO)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kogia.model.packed import PackedTokens
from kogia.rl.config import PolicyLossConfig
from kogia.train.step import Metrics

# exp(20) is far outside every clip range yet finite in float32; k3 grows as exp, so its argument is held tighter.
MAX_LOG_RATIO = 20.0
MAX_KL_LOG_RATIO = 10.0


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """One micro-batch of whole prompt + completion sequences. Row t of every token field speaks of `token_ids[t]`."""

    tokens: PackedTokens
    loss_mask: Bool[Tensor, " tokens"]
    """True on completion tokens, EOS included."""
    advantages: Float[Tensor, " tokens"]
    behaviour_logprobs: Float[Tensor, " tokens"]
    """Of the engine that sampled the tokens; anything outside the loss mask."""
    sequence_weights: Float[Tensor, " seqs"]
    """From `aggregation_weights`; 0 takes a sequence out of loss and metrics."""
    num_loss_tokens: int
    """Tokens in the loss, True entries of `kept`, known on the host. What train_step divides the summed metrics by."""
    old_logprobs: Float[Tensor, " tokens"] | None = None
    """Of the trainer before the first update on this rollout. None: the ratio is taken to `behaviour_logprobs`."""
    reference_logprobs: Float[Tensor, " tokens"] | None = None

    @property
    def sequence_index(self) -> Int[Tensor, " tokens"]:
        """The sequence of each row."""
        return self.tokens.segments.owner

    @property
    def kept(self) -> Bool[Tensor, " tokens"]:
        """Rows in the loss: completion tokens of the sequences that have a weight."""
        return self.loss_mask & (self.sequence_weights > 0.0)[self.sequence_index]

    @property
    def loss_rows(self) -> Int[Tensor, " rows"]:
        """The same as row numbers, in order."""
        return torch.nonzero_static(self.kept, size=self.num_loss_tokens).flatten()

    def to(self, device: torch.device | str) -> "PolicyBatch":
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return PolicyBatch(
            self.tokens.to(device),
            self.loss_mask.to(device),
            self.advantages.to(device),
            self.behaviour_logprobs.to(device),
            self.sequence_weights.to(device),
            self.num_loss_tokens,
            move(self.old_logprobs),
            move(self.reference_logprobs),
        )


def aggregation_weights(
    num_tokens: Int[Tensor, " seqs"], truncated: Bool[Tensor, " seqs"], config: PolicyLossConfig, max_tokens: int
) -> tuple[Float[Tensor, " seqs"], float]:
    """(weight of each completion, the one denominator) for all completions of an optimiser update.

    `num_tokens` counts completion tokens, EOS included. With `truncated = "mask"`, cut-off completions get weight 0 and
    leave the denominator. The denominator is 0.0 when nothing is left: skip the update then.
    """
    kept = num_tokens > 0
    if config.truncated == "mask":
        kept = kept & ~truncated
    if config.aggregate == "token":
        return kept.float(), float(num_tokens[kept].sum())
    if config.aggregate == "sequence":
        weights = 1.0 / num_tokens.clamp_min(1).float()
    else:
        weights = torch.full(num_tokens.shape, 1.0 / max_tokens, device=num_tokens.device)
    return weights * kept, float(kept.sum())


def policy_loss(
    logprobs: Float[Tensor, " tokens"],
    batch: PolicyBatch,
    config: PolicyLossConfig,
    entropy: Float[Tensor, " tokens"] | None = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Weighted sum of the loss over the micro-batch, and sums of the metrics over its loss tokens.

    `logprobs` are the trainer's, with gradient, at the rollout's temperature. Metrics, to be divided by
    `batch.num_loss_tokens`: "loss" before the weights of the aggregation, "clip_fraction", "ratio" and its square,
    "approx_kl" (from old to current policy), "engine_kl" (from engine to old policy), "kl" (to the reference) and
    "entropy", the estimate -log pi of the sampled tokens unless the exact one is passed.
    """
    _check(batch, config)
    sequence, kept = batch.sequence_index, batch.kept
    # rows outside the loss may hold anything, infinities included: they leave before the first arithmetic
    logprobs = logprobs.masked_fill(~kept, 0.0)
    behaviour = batch.behaviour_logprobs.masked_fill(~kept, 0.0)
    old = behaviour if batch.old_logprobs is None else batch.old_logprobs.masked_fill(~kept, 0.0)

    log_ratio = logprobs - old
    ratio = _importance_ratio(log_ratio, kept, sequence, batch, config)
    loss, clipped = _surrogate(logprobs, ratio, batch.advantages.masked_fill(~kept, 0.0), config)
    if config.rollout_is_cap is not None:
        loss = loss * (old - behaviour).clamp_max(MAX_LOG_RATIO).exp().clamp_max(config.rollout_is_cap)
    with torch.no_grad():
        metrics = _metrics(logprobs, old, behaviour, ratio, clipped, kept, entropy)
    if batch.reference_logprobs is not None:
        kl = _k3(logprobs, batch.reference_logprobs.masked_fill(~kept, 0.0))
        metrics["kl"] = (kl.detach() * kept).sum()
        loss = loss + config.kl_coef * (kl * ratio if config.kl == "k3_unbiased" else kl)
    metrics["loss"] = (loss.detach() * kept).sum()
    return (loss * batch.sequence_weights[sequence] * kept).sum(), metrics


def _importance_ratio(
    log_ratio: Float[Tensor, " tokens"],
    kept: Bool[Tensor, " tokens"],
    sequence: Int[Tensor, " tokens"],
    batch: PolicyBatch,
    config: PolicyLossConfig,
) -> Float[Tensor, " tokens"]:
    if config.ratio == "token":
        return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    sums = torch.zeros_like(batch.sequence_weights, dtype=log_ratio.dtype)
    total = sums.index_add(0, sequence, log_ratio.detach() * kept)
    count = sums.index_add(0, sequence, kept.to(sums.dtype)).clamp_min(1.0)
    value = (total / count).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[sequence]
    # the value is the sequence's, the gradient each token's own, so that advantages may differ by token
    return value * (log_ratio - log_ratio.detach()).exp()


def _surrogate(
    logprobs: Float[Tensor, " tokens"],
    ratio: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    config: PolicyLossConfig,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """(loss per token, where the clip was felt)."""
    bounded = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    if config.objective == "cispo":
        return -bounded.detach() * advantages * logprobs, bounded != ratio
    plain, clipped = -ratio * advantages, -bounded * advantages
    return torch.maximum(plain, clipped), clipped > plain


def _k3(logprobs: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    log_rho = (reference - logprobs).clamp(-MAX_KL_LOG_RATIO, MAX_KL_LOG_RATIO)
    # expm1 keeps the quadratic start that exp(x) - 1 - x would lose to rounding
    return (torch.expm1(log_rho) - log_rho).clamp_min(0.0)


def _metrics(
    logprobs: Float[Tensor, " tokens"],
    old: Float[Tensor, " tokens"],
    behaviour: Float[Tensor, " tokens"],
    ratio: Float[Tensor, " tokens"],
    clipped: Bool[Tensor, " tokens"],
    kept: Bool[Tensor, " tokens"],
    entropy: Float[Tensor, " tokens"] | None,
) -> Metrics:
    return {
        "clip_fraction": (clipped & kept).sum(),
        "ratio": (ratio * kept).sum(),
        "ratio_squared": (ratio.square() * kept).sum(),
        "approx_kl": (_k3(old, logprobs) * kept).sum(),
        "engine_kl": (_k3(behaviour, old) * kept).sum(),
        "entropy": ((-logprobs if entropy is None else entropy) * kept).sum(),
    }


def _check(batch: PolicyBatch, config: PolicyLossConfig) -> None:
    if config.kl_coef > 0.0 and batch.reference_logprobs is None:
        raise ValueError(
            f"loss.kl_coef = {config.kl_coef} needs reference_logprobs: score it with the reference policy"
        )
    if config.rollout_is_cap is not None and batch.old_logprobs is None:
        raise ValueError(
            f"loss.rollout_is_cap = {config.rollout_is_cap} needs old_logprobs: score the rollout with the trainer"
        )
