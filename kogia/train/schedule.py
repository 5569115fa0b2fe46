"""Learning-rate schedules as pure functions of the step.

After a linear warm-up, with p the share of the remaining tokens already done, which is that of the steps where all have
as many (`Ramp`):

    constant  1
    linear    from 1 to r
    cosine    r + (1 - r) (1 + cos(pi p)) / 2
    wsd       1, then linear to r over the last `decay_share` (warm-up, stable, decay)
    step      x 0.316 at each of `step_at` (DeepSeek-V2 section 3.1.2)
    v3        1, from p = 10 / 14.8 cosine to r at 14.3 / 14.8, then r, and for the last 0.167 / 14.8 a third of r
              (DeepSeek-V3 section 4.2, in trillions of tokens: 2.2e-4, 2.2e-5 and 7.3e-6)
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from kogia.train.config import OptimConfig

STEP_FACTOR = 0.316  # two of them are one decade
V3_COSINE = 10 / 14.8, 14.3 / 14.8
V3_LAST = 1 - 0.167 / 14.8, 7.3 / 22
"""From which share on the rate is that part of r."""


@dataclass(frozen=True)
class Ramp:
    """Micro-batches of each optimiser step: `first`, rising evenly to `last` over `steps` steps, from then on that."""

    last: int = 1
    first: int = 1
    steps: int = 0

    def size(self, step: int) -> int:
        """Micro-batches of `step` (0-based)."""
        if step >= self.steps:
            return self.last
        return self.first + (self.last - self.first) * step // self.steps

    def before(self, step: int) -> int:
        """Micro-batches of all steps before `step`."""
        return self._sums[min(step, self.steps)] + self.last * max(0, step - self.steps)

    def share(self, step: int, num_steps: int) -> float:
        """The share of all micro-batches of a run of `num_steps` that comes before `step`."""
        return self.before(step) / self.before(num_steps)

    def steps_for(self, micro_batches: float) -> int:
        """The least number of steps that have as many micro-batches."""
        rising = bisect_left(self._sums, micro_batches)
        return rising if rising <= self.steps else self.steps + math.ceil((micro_batches - self._sums[-1]) / self.last)

    @cached_property
    def _sums(self) -> list[int]:
        return list(accumulate(map(self.size, range(self.steps)), initial=0))


STEADY = Ramp()


def learning_rate(optim: OptimConfig, step: int, num_steps: int, ramp: Ramp = STEADY) -> float:
    """The rate of update `step` (0-based) out of `num_steps`."""
    warmup = optim.warmup(num_steps)
    if step < warmup:
        return optim.peak * (step + 1) / warmup
    skipped = ramp.before(warmup)
    done = (ramp.before(step) - skipped) / max(1, ramp.before(num_steps) - skipped)
    return optim.peak * decay(optim, min(done, 1.0))


def decay(optim: OptimConfig, done: float) -> float:
    """Factor on the peak rate at share `done` of what comes after warm-up."""
    floor = optim.min_lr_ratio
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - floor) * done
        case "cosine":
            return _cosine(done, floor)
        case "wsd":
            into_decay = max(0.0, done - (1.0 - optim.decay_share)) / optim.decay_share
            return 1.0 - (1.0 - floor) * into_decay
        case "step":
            return STEP_FACTOR ** bisect_right(optim.step_at, done)
        case "v3":
            begin, end = V3_COSINE
            late, part = V3_LAST
            into_decay = min(max(0.0, done - begin) / (end - begin), 1.0)
            return floor * part if done >= late else _cosine(into_decay, floor)


def _cosine(done: float, floor: float) -> float:
    return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * done)) / 2
