"""What a rollout says, before any update: numbers for metrics.jsonl, and samples for people to read."""

import math
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from kogia.files import json_line, writing
from kogia.rl.advantage import is_zero_variance
from kogia.rl.rollout import Rollout


def rollout_metrics(rollout: Rollout, rewards: Float[Tensor, "prompts group"]) -> dict[str, float]:
    """Means over all samples; the verifiers' statuses and parts of the reward each under their own name.

    The reward is a mean over the samples that have one: failed checks are counted by their status alone.
    """
    verdicts = [v for group in rollout.verdicts for v in group]
    statuses = rollout.statuses()
    completions = [c for group in rollout.completions for c in group]
    metrics = {
        "reward": float(rewards.nanmean()),
        "accuracy": sum(v.correct for v in verdicts) / len(verdicts),
        "completion_tokens": float(rollout.num_tokens.float().mean()),
        "truncated": float(rollout.truncated.float().mean()),
        "zero_variance_groups": float(is_zero_variance(rewards).float().mean()),
    }
    metrics |= {f"status_{name}": count / len(verdicts) for name, count in statuses.items()}
    parts = sorted({name for v in verdicts for name in v.parts})
    metrics |= {f"reward_{name}": sum(v.parts.get(name, 0.0) for v in verdicts) / len(verdicts) for name in parts}
    if drafted := sum(c.num_drafted for c in completions):
        metrics["mtp_acceptance"] = sum(c.num_accepted for c in completions) / drafted
    return metrics


def write_samples(path: Path, step: int, rollout: Rollout, rewards: Float[Tensor, "prompts group"]) -> None:
    """Append the first group of the rollout to a jsonl file."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        for completion, verdict, reward in zip(
            rollout.completions[0], rollout.verdicts[0], rewards[0].tolist(), strict=True
        ):
            row = {"step": step, "problem_id": rollout.problems[0].id, "text": completion.text}
            row |= {
                "reward": None if math.isnan(reward) else reward,
                "status": verdict.status,
                "num_tokens": len(completion.token_ids),
            }
            file.write(json_line(row))
