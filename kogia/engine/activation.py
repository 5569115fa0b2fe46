"""How many routed experts the tokens of a step use, where requests or the engine ask for other numbers than the model
was trained with: per-token numbers that travel with the step."""

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.blocks import hash_block
from kogia.engine.config import EngineConfig
from kogia.engine.inputs import Upload
from kogia.engine.request import SamplingParams
from kogia.engine.sequences import SequenceTable
from kogia.engine.views import TokenRuns
from kogia.model.config import ModelConfig
from kogia.ops.moe import Activation


class ActiveExperts:
    """What the engine's settings are for one model, and what differs from them in a step."""

    def __init__(self, model: ModelConfig, config: EngineConfig) -> None:
        self._trained = 0 if model.moe is None else model.moe.topk
        self.number = self._trained if config.active_experts is None else config.active_experts
        """Routed experts that the engine's own setting activates; 0 in a model that has none."""
        self._threshold = config.expert_threshold
        self._own = self.number, float(np.float32(self._threshold))
        """The engine's own setting, as the sequence table has it."""

    def of(self, params: SamplingParams) -> tuple[int, float]:
        """(routed experts, threshold) of a request."""
        number, threshold = params.active_experts, params.expert_threshold
        return (
            self.number if number is None else number,
            self._threshold if threshold is None else float(threshold),
        )

    def salt(self, number: int, threshold: float) -> bytes:
        """What sets the cache rows of such a request apart; empty for the engine's own setting."""
        own = number == self.number and threshold == self._threshold
        return b"" if own else hash_block(b"active experts", np.array([number, threshold]))

    def are_own(self, table: SequenceTable, rows: NDArray[np.int64]) -> bool:
        """Whether all of these sequences have the engine's own setting."""
        return table.settings(rows).experts == self._own

    def own(self, tokens: int, device: torch.device) -> Activation | None:
        """The engine's own setting for a step of so many tokens; None where it is the trained number."""
        thresholds = torch.full((tokens,), self._threshold, device=device) if self._threshold else None
        if self.number == self._trained and thresholds is None:
            return None
        return Activation(self.number, None, thresholds)

    def put(self, upload: Upload, table: SequenceTable, runs: TokenRuns) -> None:
        """Add each token's numbers to the upload, as far as tokens differ."""
        numbers, thresholds = table.active_experts[runs.rows], table.expert_threshold[runs.rows]
        if (numbers != numbers[0]).any():
            upload.put("active_experts", numbers)
        if thresholds.any():
            upload.put("expert_thresholds", thresholds)

    def of_step(
        self, upload: Upload, table: SequenceTable, rows: NDArray[np.int64], tokens: Int[Tensor, " some"] | None = None
    ) -> Activation | None:
        """What `put` sent, for a step of these table rows; of some of its `tokens`. None where all are as trained."""
        most = int(table.active_experts[rows].max())
        numbers, thresholds = upload.get("active_experts"), upload.get("expert_thresholds")
        if numbers is None and thresholds is None and most == self._trained:
            return None
        if tokens is not None:
            numbers, thresholds = (None if each is None else each[tokens] for each in (numbers, thresholds))
        return Activation(most, numbers, thresholds)
