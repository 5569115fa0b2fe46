"""Whether drafts pay: measured, for each size of batch by itself, since verifying costs more the more sequences run.

    gain = tokens per second with drafts / without
         = (1 + accepted per sequence and step) * seconds of a plain step / seconds of a step with drafts

Drafts are on at first. After every window of steps their speed is measured again, half of it what it was before, and
every so often, or when they seem to be slower, the other way is tried for one window. Two trials in a row that say the
same change it, as one may fall on a moment in which the machine does something else: below a gain of 1 drafts
pause, above 1 and a margin they come back, and whether that was right is tried soon. Steps without drafts leave no MTP
rows, so that a trial begins a little below what it could be: a cost in acceptance, never in correctness.
"""

from dataclasses import dataclass, field
from statistics import fmean, median

WINDOW = 32
"""Steps that are measured together."""
INTERVAL = 1024
"""Steps between two trials of the other way."""
SOON = 4 * WINDOW
"""The same after a change of mind."""
MARGIN = 0.05
"""What must be gained before drafts come back."""
SETTLING = 2
"""Steps that are not measured after a change: the first ones still land what was launched before it."""


@dataclass(slots=True)
class _Batch:
    """What is known of one class of batch sizes."""

    is_on: bool = True
    is_trial: bool = False
    """The other way is being tried."""
    num_left: int = WINDOW
    """Steps until it is, or until that ends."""
    is_doubted: bool = False
    """The last trial spoke against `is_on`."""
    num_unsettled: int = SETTLING
    window: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, tokens per sequence) of the steps since the last measurement."""
    speeds: dict[bool, float] = field(default_factory=dict)
    """Tokens per second of a sequence, with drafts (True) and without."""

    @property
    def drafts(self) -> bool:
        return self.is_on != self.is_trial

    @property
    def gain(self) -> float | None:
        return self.speeds[True] / self.speeds[False] if len(self.speeds) == 2 else None

    def measure(self) -> None:
        """A window is full: its speed, and whether drafts stay on, or come back."""
        before, was_on = self.drafts, self.is_on
        speed = fmean(tokens for _, tokens in self.window) / median(seconds for seconds, _ in self.window)
        # by chance one window of right drafts is worse than the next: half of what is known of windows before counts
        self.speeds[before] = speed if self.is_trial else (speed + self.speeds.get(before, speed)) / 2
        self.window.clear()
        gain = self.gain
        if self.is_trial and gain is not None:
            is_against = gain < 1 if was_on else gain >= 1 + MARGIN
            self.is_on = was_on != (is_against and self.is_doubted)
            changed = self.is_on != was_on
            self.is_doubted, self.is_trial = is_against and not changed, False
            self.num_left = WINDOW if self.is_doubted else SOON if changed else INTERVAL
        elif before and gain is not None and gain < 1:
            self.num_left = 0
        if self.drafts != before:
            self.num_unsettled = SETTLING

    def turn(self) -> None:
        """Try the other way for a window."""
        self.is_trial, self.num_left, self.num_unsettled = True, WINDOW, SETTLING
        self.window.clear()


class DraftSwitch:
    """Decides for an engine, step by step, from what its steps took."""

    def __init__(self) -> None:
        self._batches: dict[int, _Batch] = {}

    def wants(self, num_seqs: int) -> bool:
        """Whether the next step of so many sequences should draft."""
        return self._at(num_seqs).drafts

    def gain(self, num_seqs: int) -> float | None:
        """Speed with drafts over speed without; None until both are measured."""
        return self._at(num_seqs).gain

    def note(self, num_seqs: int, drafts: bool, seconds: float, num_tokens: int) -> None:
        """A step of decodes only: it took `seconds` and gave `num_tokens` in all."""
        batch = self._at(num_seqs)
        if drafts != batch.drafts:
            return
        if batch.num_unsettled:
            batch.num_unsettled -= 1
            return
        batch.window.append((seconds, num_tokens / num_seqs))
        batch.num_left -= 1
        if len(batch.window) == WINDOW:
            batch.measure()
        if batch.num_left <= 0:
            batch.turn()

    def _at(self, num_seqs: int) -> _Batch:
        return self._batches.setdefault(num_seqs.bit_length(), _Batch())
