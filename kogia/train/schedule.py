"""Learning-rate schedules as pure functions of the step.

After a linear warm-up, with p the share of the remaining steps already done:

    constant  1
    linear    from 1 to r
    cosine    r + (1 - r) (1 + cos(pi p)) / 2
    wsd       1, then linear to r over the last `decay_share` (warm-up, stable, decay)
    step      x 0.316 at each of `step_at` (DeepSeek-V2 section 3.1.2, there by share of all tokens)
"""

import math
from bisect import bisect_right

from kogia.train.config import OptimConfig

STEP_FACTOR = 0.316  # two of them are one decade


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of update `step` (0-based) out of `num_steps`."""
    warmup = optim.warmup(num_steps)
    if step < warmup:
        return optim.peak * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return optim.peak * decay(optim, min(done, 1.0))


def decay(optim: OptimConfig, done: float) -> float:
    """Factor on the peak rate at share `done` of the steps after warm-up."""
    floor = optim.min_lr_ratio
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - floor) * done
        case "cosine":
            return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * done)) / 2
        case "wsd":
            into_decay = max(0.0, done - (1.0 - optim.decay_share)) / optim.decay_share
            return 1.0 - (1.0 - floor) * into_decay
        case "step":
            return STEP_FACTOR ** bisect_right(optim.step_at, done)
