"""How to train, as frozen values. Torch-free."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from kogia.config import Presets, check_finite, check_least, check_seed
from kogia.data.config import DataConfig
from kogia.model.config import Fp8Gradients, IndexerConfig, ModelConfig, Recompute, YarnConfig
from kogia.model.presets import preset
from kogia.sinks import SinkName

MOST_TOKENS = 1 << 28
"""Of a step, whose batches are laid out at once: four times those of DeepSeek-V3."""
MOST_RAMP = 1_000_000
"""Steps over which a batch may grow: each is counted."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its learning-rate schedule (DeepSeek-V3 section 4.2). Shared by every stage, GRPO included."""

    kind: Literal["adamw", "muon"] = "adamw"
    """Muon moves the matrices of layers, experts included, by orthogonal updates; embeddings, head, routers and norms
    stay with AdamW. Both take the same rates."""
    lr: float | None = None
    """Peak learning rate; None takes one for the size of the model and the kind of training (kogia.train.rates)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_momentum: float = 0.95
    moments: Literal["float32", "bfloat16"] = "float32"
    """What moments are kept in between steps (DeepSeek-V3: bfloat16)."""
    weight_decay: float = 0.1
    """On matrices only: norms and biases are not decayed."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "step", "v3"] = "cosine"
    """How the rate falls after warm-up (kogia/train/schedule.py): wsd stays, then falls linearly; step falls twice, as
    in DeepSeek-V2; v3 stays, falls as a cosine and ends in two constant parts, as in DeepSeek-V3."""
    warmup_steps: int | None = None
    """Steps from 0 to the peak rate; None takes 20, but no more than a tenth of the steps."""
    min_lr_ratio: float = 0.1
    """Final over peak rate of linear, cosine, wsd and v3, which ends at a third of it."""
    decay_share: float = 0.2
    """Share of what comes after warm-up in which wsd decays."""
    step_at: tuple[float, ...] = (0.6, 0.9)
    """Shares of what comes after warm-up at which `step` multiplies the rate by 0.316."""

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
        if not 0 <= self.muon_momentum < 1:
            raise ValueError(f"optim.muon_momentum = {self.muon_momentum}: must lie in [0, 1)")
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
class GuardConfig:
    """Steps that go wrong: of a loss or gradient norm that is not finite, or far above those before. Nothing is updated
    by one, and its batch is kept in bad_steps/ of the run."""

    skips: int = 0
    """Bad steps in a row that are left out, going on with the next batch; 0 ends the run at the first."""
    rollbacks: int = 0
    """Times that after one more the run goes back to its last good checkpoint, and on with the data behind the bad
    steps; the next time it ends. Needs save_every."""
    sigmas: float = 0.0
    """A loss or norm this many standard deviations above the mean of the good steps before is bad too (6 is usual); 0
    takes only what is not finite."""
    window: int = 128
    """Good steps that these are the mean and deviation of; half of them must be there."""

    def __post_init__(self) -> None:
        check_finite(self, "guard")
        for name, bound in (("skips", 0), ("rollbacks", 0), ("sigmas", 0), ("window", 4)):
            if getattr(self, name) < bound:
                raise ValueError(f"guard.{name} = {getattr(self, name)}: must be at least {bound}")


@dataclass(frozen=True)
class Fp8Config:
    """How layers are trained in FP8, where `precision` says that they are."""

    weight_gradients: Fp8Gradients = "dense"
    """Which gradients of weights are products in FP8: none, of dense layers, or all; the others are in `dtype`. Those
    of experts gain little, as tokens must be rounded once more, by column (DeepSeek-V3: all)."""
    power_of_two: bool = False
    """Scales that are powers of two where DeepSeek-V3 has them: of what goes into the projection behind attention, and
    of tokens and gradients on their way to experts."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every training loop computes in, keeps for its backward pass, and does about steps that go wrong."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in and is saved as; of bfloat16 weights the optimiser keeps float32 masters."""
    precision: Literal["dtype", "bfloat16", "fp8"] = "dtype"
    """What layers multiply in while they are trained: `dtype`; bfloat16, of float32 weights on a CPU with instructions
    for it, on others `dtype`; or FP8 as DeepSeek-V3 does. Weights, the optimiser, validation and checkpoints stay as
    `dtype` has them. FP8 pays on Hopper GPUs, for wide layers (docs/training.md)."""
    fp8: Fp8Config = Fp8Config()
    recompute: Recompute = "none"
    """Saves memory for time: what of each layer is not kept for the backward pass, which does it again. Routers choose
    once, and their load is counted once."""
    guard: GuardConfig = GuardConfig()


@dataclass(frozen=True)
class SupervisedConfig(LoopConfig):
    """One supervised stage: pretraining, fine-tuning on traces, or distillation."""

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
    micro_batches_first: int | None = None
    """Those of the first step, from which they rise evenly to `micro_batches` over `ramp_steps` steps."""
    ramp_steps: int = 0
    """Steps over which the batch grows; 0 does not let it. All shares of a run are then shares of its tokens."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss (lambda, DeepSeek-V3 eq 25)."""
    mtp_weight_late: float = 0.1
    """The weight from share `mtp_late_at` of the run on."""
    mtp_late_at: float = 0.67
    """Share of the run (DeepSeek-V3: 10 of 14.8 trillion tokens)."""
    balance_weight: float = 1e-4
    """Weight of the balance loss of experts (alpha, DeepSeek-V3 eq 17; alpha 1 of DeepSeek-V2)."""
    balance_over: Literal["sequence", "batch"] = "sequence"
    """What the balance losses want even loads of: each sequence, or each micro-batch as a whole."""
    balance_devices: int | None = None
    """Devices that the next two losses are of, each with as many neighbouring experts; None takes the groups of the
    model."""
    device_balance_weight: float = 0.0
    """Weight of the balance loss of devices (alpha 2, DeepSeek-V2 eq 26)."""
    communication_balance_weight: float = 0.0
    """Weight of the balance loss of what devices are sent (alpha 3, DeepSeek-V2 eq 29)."""
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
    """Share of the run after which the biases stay fixed (DeepSeek-V3: 0.97)."""
    average_decay: float = 0.0
    """Keeps averaged weights beside the trained ones, in average/ of each checkpoint, and measures their validation
    loss too: over about the last 1 / (1 - decay) steps, with 1 over all from `average_from` on. 0 keeps none."""
    average_from: float = 0.0
    """Share of the run after which steps count in the average."""
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
    """auto is the GPU where there is one."""
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
        check_least(self, 1, "nested_rank_min", "index_topk", "steps", "micro_batches_first", "balance_devices")
        check_seed(self.seed)
        for name in (
            "save_every",
            "eval_every",
            "mtp_weight",
            "mtp_weight_late",
            "balance_weight",
            "device_balance_weight",
            "communication_balance_weight",
            "indexer_weight",
            "bias_update_speed",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if not 0 <= self.average_decay <= 1:
            raise ValueError(f"average_decay = {self.average_decay}: must lie in [0, 1]")
        if not 0 <= self.average_from < 1:
            raise ValueError(f"average_from = {self.average_from}: must lie in [0, 1)")
        self._check_ramp()
        if (tokens := self.micro_batches * self.data.batch_tokens) > MOST_TOKENS:
            raise ValueError(
                f"micro_batches = {self.micro_batches} of data.batch_tokens = {self.data.batch_tokens} are {tokens:,} "
                f"tokens a step: at most {MOST_TOKENS:,} are laid out in memory; lower one of them"
            )
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs = {self.epochs}: must be above 0")

    def _check_ramp(self) -> None:
        check_least(self, 0, "ramp_steps")
        if self.ramp_steps > MOST_RAMP:
            raise ValueError(f"ramp_steps = {self.ramp_steps}: must be at most {MOST_RAMP:,}")
        if (self.micro_batches_first is None) != (self.ramp_steps == 0):
            raise ValueError(
                f"micro_batches_first = {self.micro_batches_first} and ramp_steps = {self.ramp_steps}: a growing batch "
                "needs both; set the other, or neither"
            )
        if self.micro_batches_first is not None and self.micro_batches_first > self.micro_batches:
            raise ValueError(
                f"micro_batches_first = {self.micro_batches_first}: above micro_batches = {self.micro_batches}, to "
                "which it grows; lower it"
            )

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
        if self.guard.rollbacks and not self.save_every:
            raise ValueError(
                f"guard.rollbacks = {self.guard.rollbacks}: there is no checkpoint to go back to with save_every = 0; "
                "set save_every, for example to a twentieth of the steps"
            )
        if not self.data.sources:
            raise ValueError(
                "data.sources is empty: give --data FILE, or add [[data.sources]] with spec = a file or module:function"
            )
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite are both set: resume continues the run, overwrite deletes it; drop one"
            )
