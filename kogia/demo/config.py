"""What the demonstration is, as frozen values. Torch-free."""

from dataclasses import dataclass
from pathlib import Path

from kogia.config import check_finite, check_least, check_seed

RECIPES = Path(__file__).parent.parent / "recipes" / "demo"
STAGES = ("base", "cold_start", "grpo", "rejection_sft", "student")
"""The stages that are measured, in order."""


@dataclass(frozen=True)
class DemoConfig:
    """The R1 recipe in miniature, from random weights to a distilled student."""

    out: str = "runs/demo"
    """Directory of all stages. A demonstration that was interrupted goes on where it stopped."""
    seed: int = 0
    """Of weights, data order and sampling."""
    recipes: str | None = None
    """Directory with the stages' recipes; None takes the ones shipped with kogia."""
    scale: float = 1.0
    """Multiplies the length of every stage. 0.05 is a dry run of the machinery, not a demonstration: where rejection
    sampling keeps nothing, the stages after it train on the cold start's traces, and the report says so."""
    num_questions: int = 300
    """Held-out problems per measurement."""
    num_samples: int = 8
    """Sampled answers per problem."""
    threads: int | None = None
    """CPU threads for PyTorch; None leaves its choice."""
    device: str = "cpu"
    """The stages are small: a GPU brings little."""
    overwrite: bool = False
    """Delete what is in `out` first."""
    dry_run: bool = False
    """Print the stages and their recipes, and stop."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        check_finite(self)
        if self.scale <= 0:
            raise ValueError(f"scale = {self.scale}: must be above 0")
        check_least(self, 1, "num_questions", "num_samples", "threads")
        check_seed(self.seed)
