"""How to train, as frozen values. Torch-free."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from kogia.config import Presets, check_finite, check_least, check_seed
from kogia.data.config import DataConfig
from kogia.model.config import IndexerConfig, ModelConfig, YarnConfig
from kogia.model.presets import preset
from kogia.sinks import SinkName


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule (DeepSeek-V3 section 4.2). Shared by every stage, GRPO included."""

    lr: float | None = None
    """Peak learning rate; None takes one for the size of the model and the kind of training (kogia.train.rates)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only: norms and biases are not decayed."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "step"] = "cosine"
    warmup_steps: int | None = None
    """Steps from 0 to the peak rate; None takes 20, but no more than a tenth of the steps."""
    min_lr_ratio: float = 0.1
    """Final over peak rate of linear, cosine and wsd."""
    decay_share: float = 0.2
    """Share of the steps after warm-up in which wsd decays."""
    step_at: tuple[float, ...] = (0.6, 0.9)
    """Shares of the steps after warm-up at which `step` multiplies the rate by 0.316."""

    def __post_init__(self) -> None:
        check_finite(self, "optim")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"optim.{name} = {value}: must be above 0")
        for name in ("weight_decay", "clip", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"optim.{name} = {value}: must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas = {self.betas}: each must lie in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio = {self.min_lr_ratio}: must lie in [0, 1]")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"optim.decay_share = {self.decay_share}: must lie in (0, 1]")
        if list(self.step_at) != sorted(self.step_at) or not all(0 < at < 1 for at in self.step_at):
            raise ValueError(f"optim.step_at = {self.step_at}: shares in (0, 1), rising")

    @property
    def peak(self) -> float:
        """`lr`, once it is settled (kogia.train.rates)."""
        assert self.lr is not None, "optim.lr is not settled: kogia.train.rates.settle_rate"
        return self.lr

    def warmup(self, num_steps: int) -> int:
        """Steps of warm-up in a run of `num_steps`."""
        return min(20, num_steps // 10) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class SupervisedConfig:
    """One supervised stage: pretraining, cold-start SFT, rejection-sampled SFT or distillation."""

    out: str
    """Run directory to create."""
    init: str | None = None
    """Model directory, run directory, or `org/name` of the Hugging Face Hub to start from; exactly one of `init` and
    `model`."""
    model: Annotated[ModelConfig | None, Presets(preset)] = None
    """Architecture to initialise at random, or a model.preset; vocab_size is also that of a tokenizer trained here."""
    tokenizer: str | None = None
    """Directory with tokenizer.json, or `org/name` of the Hub. None takes that of `init`, or trains one on the data."""
    tokenizer_documents: int = 20000
    """A tokenizer is trained on at most this many documents of each source, the first ones."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int | None = None
    """Optimiser steps; exactly one of `steps` and `epochs`."""
    epochs: float | None = None
    """Passes over the training documents instead of `steps`."""
    micro_batches: int = 1
    """Batches of data.batch_tokens per optimiser step (gradient accumulation)."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss (lambda, DeepSeek-V3 eq 25)."""
    mtp_weight_late: float = 0.1
    """The weight from share `mtp_late_at` of the steps on."""
    mtp_late_at: float = 0.67
    balance_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (alpha, DeepSeek-V3 eq 17)."""
    bias_update_speed: float = 1e-3
    """Change of a router bias per step (gamma, DeepSeek-V3 section 2.1.2); 0 freezes the biases."""
    indexer_weight: float = 1.0
    """Weight of the lightning indexers' own loss (DeepSeek-V3.2 section 2.1.1), which reaches nothing else."""
    nested_rank_min: int | None = None
    """Nested dropout over the latent's rank: half of the sequences see only a prefix of at least this many numbers, so
    that the engine may store or read fewer (`engine.rank_by_context`). None trains the full rank alone."""
    add_indexer: IndexerConfig | None = None
    """Give the model of `init` fresh lightning indexers: the first step towards sparse attention."""
    extend_context: YarnConfig | None = None
    """Stretch the positions of the model of `init` by YaRN, to factor times original_max_position, the length that it
    was trained with: the first step to a longer context. data.max_seqlen says how much of it this run trains."""
    index_topk: int | None = None
    """Tokens each query attends to while training; None is the model's own number. Above data.max_seqlen: dense."""
    train_only: Literal["all", "indexer"] = "all"
    """`indexer` freezes everything else: the dense warm-up of sparse attention."""
    bias_freeze_at: float = 1.0
    """Share of the steps after which the biases stay fixed (DeepSeek-V3: 0.97)."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = 2
    eval_every: int = 0
    """Steps between validation losses, each after a save where one is due; 0 evaluates only at the end."""
    eval_tokens: int = 131072
    """Most held-out tokens per validation loss."""
    seed: int = 0
    """Of the weights and of the data order."""
    device: str = "auto"
    threads: int | None = None
    """CPU threads for PyTorch; None leaves its choice."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint, exactly."""
    overwrite: bool = False
    """Delete the run in `out` first."""
    dry_run: bool = False
    """Print the resolved configuration, parameter count and memory estimate, and stop."""
    quiet: bool = False
    """No progress line."""
    sinks: tuple[SinkName, ...] = ()
    """Where metrics go beside metrics.jsonl: "tensorboard", into RUN/tensorboard, or "wandb", to Weights & Biases. Each
    takes an extra: pip install 'kogia[tensorboard]'."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_least(self, 1, "micro_batches", "keep_checkpoints", "eval_tokens", "tokenizer_documents", "threads")
        check_least(self, 1, "nested_rank_min", "index_topk", "steps")
        check_seed(self.seed)
        for name in (
            "save_every",
            "eval_every",
            "mtp_weight",
            "mtp_weight_late",
            "balance_weight",
            "indexer_weight",
            "bias_update_speed",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs = {self.epochs}: must be above 0")

    def check_complete(self) -> None:
        """Raise ValueError if a choice that has no default is missing or given twice."""
        if (self.init is None) == (self.model is None):
            raise ValueError(
                "exactly one of `init` (a model or run directory to start from) and a [model] table (an architecture "
                f"to train from scratch) must be given; got init = {self.init!r} and {'a' if self.model else 'no'} "
                "[model] table"
            )
        if self.add_indexer is not None and self.init is None:
            raise ValueError("add_indexer is for the model of `init`; in a [model] table set attention.indexer")
        if self.extend_context is not None and self.init is None:
            raise ValueError("extend_context is for the model of `init`; in a [model] table set attention.rope_scaling")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"exactly one of steps = {self.steps} and epochs = {self.epochs} must be given")
        if not self.data.sources:
            raise ValueError(
                "data.sources is empty: give --data FILE, or add [[data.sources]] with spec = a file or module:function"
            )
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite are both set: resume continues the run, overwrite deletes it; drop one"
            )
