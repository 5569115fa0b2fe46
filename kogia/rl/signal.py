"""The signal check: before the first update, is there anything to learn from, and do engine and trainer agree?

Group-relative learning needs groups whose samples differ. A run that starts from a model which always fails, or always
succeeds, or never stops, burns its budget in silence; so does one whose trainer scores tokens differently from the
engine that sampled them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from kogia import log
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.files import write_json
from kogia.model.packed import pack
from kogia.model.transformer import Transformer
from kogia.rl.config import RLConfig
from kogia.rl.rollout import ProblemSource, Rollout, collect, draw_problems
from kogia.text.tokenizer import Tokenizer

CHECKED_SEQUENCES = 64  # whose log-probabilities are compared


@dataclass(frozen=True)
class Signal:
    """What `signal.json` holds."""

    prompts: int
    samples: int
    mean_reward: float
    informative_groups: float
    """Share of groups with some right and some wrong samples; 0.6 or more is good, under 0.1 hardly teaches."""
    pass_at_1: float
    pass_at_n: float
    """Share of prompts that at least one of the samples solves."""
    truncated: float
    max_logprob_difference: float
    prompt: str
    """One prompt as the model sees it."""
    completion: str


def measure_signal(
    model: Transformer,
    engine: Engine,
    tokenizer: Tokenizer,
    sources: Sequence[ProblemSource],
    config: RLConfig,
    out: Path,
) -> Signal:
    """Sample training prompts, print what the run starts from, write OUT/signal.json.

    Raises ValueError when engine and trainer log-probabilities differ by more than `config.tolerance`, or when
    not one group is informative, and FileNotFoundError when OUT is gone.
    """
    drawn = draw_problems(sources, 0, config.signal_prompts, config.seed + 104_729)
    params = SamplingParams.of(config, n=config.signal_samples, logprobs=True)
    with engine.deterministic():
        rollout = collect(engine, tokenizer, drawn, params, thinking=config.thinking)
    signal = summarize(rollout, tokenizer, max_logprob_difference(model, rollout, config.temperature))
    log.check_in_place(out)
    write_json(out / "signal.json", asdict(signal))
    _show(signal)
    if not signal.max_logprob_difference <= config.tolerance:
        raise ValueError(
            f"engine and trainer disagree: log-probabilities differ by up to {signal.max_logprob_difference:.2e}, "
            f"above logprob_tolerance = {config.tolerance:.0e}. Training on such samples is biased; run both "
            "in float32, or raise the tolerance and set loss.rollout_is_cap = 2"
        )
    if signal.informative_groups == 0:
        raise ValueError(
            f"no signal: in none of {signal.prompts} groups of {signal.samples} do right and wrong samples mix "
            f"(pass@1 {signal.pass_at_1:.1%}). Improve the cold start or choose easier problems; --no-signal-check "
            "goes on anyway"
        )
    return signal


def summarize(rollout: Rollout, tokenizer: Tokenizer, difference: float) -> Signal:
    correct = torch.tensor([[v.correct for v in group] for group in rollout.verdicts]).float()
    share = correct.mean(1)
    return Signal(
        prompts=correct.shape[0],
        samples=correct.shape[1],
        mean_reward=float(rollout.rewards.nanmean()),
        informative_groups=float(((share > 0) & (share < 1)).float().mean()),
        pass_at_1=float(share.mean()),
        pass_at_n=float((share > 0).float().mean()),
        truncated=float(rollout.truncated.float().mean()),
        max_logprob_difference=difference,
        prompt=tokenizer.decode(rollout.prompts[0]),
        completion=rollout.completions[0][0].text,
    )


@torch.no_grad()
def max_logprob_difference(model: Transformer, rollout: Rollout, temperature: float) -> float:
    """Largest |trainer - engine| log-probability over the first samples of the rollout, in nats."""
    rows = [(p, c) for p, group in enumerate(rollout.completions) for c in group][:CHECKED_SEQUENCES]
    batch = pack([rollout.prompts[p] + c.token_ids for p, c in rows]).to(model.device)
    logprobs = model.logprobs(batch, temperature).cpu()
    gaps = []
    for (_, completion), end in zip(rows, np.cumsum(batch.segments.lengths).tolist(), strict=True):
        assert completion.logprobs is not None
        ours = torch.tensor(completion.logprobs)
        gaps.append(logprobs[end - len(ours) : end] - ours)
    return float(torch.cat(gaps).abs().max())  # NaN if any is


def _show(signal: Signal) -> None:
    log.info(
        f"signal check on {signal.prompts} training prompts x {signal.samples} samples: mean reward "
        f"{signal.mean_reward:+.3f}, pass@1 {signal.pass_at_1:.1%}, pass@{signal.samples} {signal.pass_at_n:.1%} "
        f"(ratio {signal.pass_at_n / max(signal.pass_at_1, 1e-9):.1f}), informative groups "
        f"{signal.informative_groups:.1%}, truncated {signal.truncated:.1%}, "
        f"|trainer - engine| log-probability <= {signal.max_logprob_difference:.1e}"
    )
    log.info(f"  one prompt: {signal.prompt!r}\n  one answer: {signal.completion!r}")
    if signal.informative_groups < 0.3:
        log.warn("few groups mix right and wrong samples: expect slow learning (0.6 or more is good)")
    if signal.truncated > 0.05:
        log.warn("many samples never stop: raise max_tokens, or cover longer searches in the cold start")
