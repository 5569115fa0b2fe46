"""What a reinforcement-learning run and a curation run are, as frozen values. Torch-free."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from tyro.conf import Positional

from kogia.checkpoint.config import LoadDtype, LoadQuantize
from kogia.config import check_finite, check_least, check_seed
from kogia.engine.config import EngineConfig, FilteredSamplingConfig, SamplingConfig
from kogia.eval.config import LongPrompts, TaskOptions, check_tasks, check_verification
from kogia.sinks import SinkName
from kogia.tasks.format import check_script
from kogia.train.config import LoopConfig, OptimConfig


@dataclass(frozen=True)
class PolicyLossConfig:
    """One surrogate objective; the published variants are settings of it.

    GRPO: aggregate "sequence", clip 0.2 / 0.2. Dr. GRPO: aggregate "constant" and `normalize_std = false`. DAPO:
    aggregate "token", clip 0.2 / 0.28. GSPO: ratio and aggregate "sequence", clip 3e-4 / 4e-4. CISPO: objective
    "cispo", aggregate "token", clip_low 1 (off). DeepSeek-R1: as GRPO with clip 10 / 10 and kl_coef 0.001.
    """

    objective: Literal["clip", "cispo"] = "clip"
    """"clip" is the pessimistic minimum of PPO; "cispo" clips the weight and keeps every token's gradient."""
    ratio: Literal["token", "sequence"] = "token"
    """"sequence" is GSPO's geometric mean over the completion."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low; 1 or more never binds."""
    clip_high: float = 0.28
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """"token": all tokens weigh the same. "sequence": all completions weigh the same. "constant": a token weighs
    1 / max_tokens of a completion, whatever the completion's length."""
    truncated: Literal["mask", "count"] = "count"
    """"mask" leaves completions that ran out of tokens out of the loss and out of its denominator."""
    kl_coef: float = 0.0
    kl: Literal["k3", "k3_unbiased"] = "k3"
    """"k3_unbiased" weighs k3 by the importance ratio (DeepSeek-V3.2)."""
    rollout_is_cap: float | None = None
    """Upper bound of the weight pi_trainer / pi_engine of a token (truncated importance sampling); None: no weight."""

    def __post_init__(self) -> None:
        check_finite(self, "loss")
        for name in ("clip_low", "clip_high", "kl_coef"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"loss.{name} = {getattr(self, name)}: must not be negative")
        if self.rollout_is_cap is not None and self.rollout_is_cap < 1.0:
            raise ValueError(f"loss.rollout_is_cap = {self.rollout_is_cap}: must be at least 1 (2 is usual)")


@dataclass(frozen=True)
class RLConfig(LoopConfig, SamplingConfig):
    """Reinforcement learning with verifiable rewards (GRPO), by groups of samples."""

    init: str
    """Model directory, run directory, or `org/name` of the Hugging Face Hub to start from; also the KL reference."""
    _: KW_ONLY
    out: str = "runs/rl"
    """Run directory to create."""
    tasks: tuple[str, ...] = ("countdown",)
    """Built-in names or 'module:Class'; several tasks take turns."""
    task_options: TaskOptions = field(default_factory=dict)
    """Constructor arguments by task, for example task_options.countdown = {numbers = 4}."""
    steps: int = 200
    """Rollouts; each is followed by `updates_per_rollout` optimiser steps."""
    prompts_per_step: int = 32
    group_size: int = 16
    """Samples per prompt."""
    max_tokens: int = 256
    temperature: float = 1.0
    """Of the rollout; the trainer scores at the same one. No other filter is offered: it would bias the ratio."""
    thinking: bool | None = None
    """Turns thoughts on or off in models whose chat template has that switch; None leaves the template's default."""
    normalize_std: bool = True
    """Divide advantages by the standard deviation of the group's rewards (GRPO); false is Dr. GRPO."""
    std: Literal["sample", "population"] = "sample"
    """Which deviation `normalize_std` divides by. "sample", over group_size - 1 as in verl and TRL: rewards 1.0, 0.7,
    1.0, 0.0 deviate by 0.4717 and have advantages 0.689, 0.053, 0.689, -1.431. "population", over group_size: 0.4085,
    and 0.796, 0.061, 0.796, -1.652."""
    drop_zero_variance: bool = True
    """Leave groups with one reward out of the batch and of the denominator; they are counted either way."""
    loss: PolicyLossConfig = PolicyLossConfig()
    optim: OptimConfig = OptimConfig(schedule="constant", warmup_steps=10, weight_decay=0.0)
    updates_per_rollout: int = 1
    """Mini-batches of prompts that one rollout is split into, one optimiser step each."""
    micro_batch_tokens: int = 16384
    """Most tokens in one forward pass."""
    reference_every: int = 0
    """Steps between copies of the policy into the KL reference; 0 keeps the initial one. Needs loss.kl_coef."""
    overlong_penalty: float = 0.0
    """Reward lost at max_tokens, growing linearly over the last `overlong_buffer` tokens (DAPO); 0 is off."""
    overlong_buffer: int = 0
    random_reward: Literal["permute", "bernoulli"] | None = None
    """Control arm: rewards say nothing. "permute" shuffles them within each group, "bernoulli" tosses coins."""
    mtp_weight: float = 0.1
    """Weight of the multi-token-prediction loss on the sampled tokens, which keeps drafting apt; 0 is off."""
    balance_weight: float = 0.0
    """Weight of the sequence-wise balance loss."""
    indexer_weight: float = 1.0
    """Weight of the lightning indexers' own loss, in a model with sparse attention."""
    bias_update_speed: float = 1e-3
    """Change of a router bias per step; 0 freezes the biases."""
    signal_check: bool = True
    """Before the first update, sample training prompts and print whether there is a signal to learn from."""
    signal_prompts: int = 64
    signal_samples: int = 16
    logprob_tolerance: float | None = None
    """Largest difference of trainer and engine log-probabilities before the run stops; None takes 1e-4 in float32, and
    1.0 in bfloat16, whose rounding differs between the two forms of attention: by up to 0.24 nats over 1,200 tokens of
    kogia-nano, by 0.1 for the demonstration's model."""
    eval_every: int = 0
    """Steps between evaluations on the test split, each of a checkpoint; 0 evaluates only at the end."""
    eval_questions: int = 300
    """0 never evaluates."""
    eval_samples: int = 8
    long_prompts: LongPrompts = "refuse"
    """Problems that leave no room for an answer in the model's context: "refuse" ends with the first one's id before
    the first step, "skip" leaves them out and says how many."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = 2
    seed: int = 0
    """Of the order of the prompts and of the sampling."""
    engine: EngineConfig = EngineConfig(cache_memory_bytes=1 << 30)
    """The cache has 1 GiB, as gradients and the optimiser's state come after it."""
    engines: int = 1
    """Engines side by side on a CPU, each in a thread of its own, which share what `engine` grants: a small model
    generates faster so than with its kernels shared out."""
    verify_workers: int = 2
    """Processes that check answers."""
    verify_timeout: float = 5.0
    """Seconds one check may take."""
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
        super().__post_init__()
        check_tasks(self.tasks, self.task_options)
        check_verification(self.verify_workers, self.verify_timeout)
        check_seed(self.seed)
        check_least(
            self, 1, "steps", "prompts_per_step", "updates_per_rollout", "keep_checkpoints", "threads", "engines"
        )
        check_least(self, 1, "signal_prompts", "eval_samples", "micro_batch_tokens")
        check_least(self, 0, "save_every", "eval_every", "eval_questions", "reference_every", "overlong_penalty")
        check_least(self, 0, "mtp_weight", "balance_weight", "indexer_weight", "bias_update_speed")
        check_least(self, 2, "group_size", "signal_samples")
        if self.guard.rollbacks:
            raise ValueError(
                f"guard.rollbacks = {self.guard.rollbacks}: a reinforcement-learning run does not go back, for its "
                "problems and samples belong to its steps; set guard.skips"
            )
        if self.logprob_tolerance is not None and self.logprob_tolerance <= 0:
            raise ValueError(f"logprob_tolerance = {self.logprob_tolerance}: must be above 0; float32 reaches 1e-4")
        if self.temperature == 0:
            raise ValueError(
                f"temperature = {self.temperature}: a rollout must sample; use a value above 0, 1 is usual"
            )
        if self.updates_per_rollout > self.prompts_per_step:
            raise ValueError(
                f"updates_per_rollout = {self.updates_per_rollout}: at most prompts_per_step = {self.prompts_per_step}"
            )
        if self.overlong_penalty and not 0 < self.overlong_buffer <= self.max_tokens:
            raise ValueError(f"overlong_buffer = {self.overlong_buffer}: must lie in 1..max_tokens = {self.max_tokens}")
        if self.std != "sample" and not self.normalize_std:
            raise ValueError(f"std = {self.std!r} without normalize_std: nothing is divided by it; drop one of the two")
        if self.reference_every and not self.loss.kl_coef:
            raise ValueError(
                f"reference_every = {self.reference_every} without loss.kl_coef: there is no reference to refresh"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both set: resume continues the run, overwrite deletes it")

    @property
    def tolerance(self) -> float:
        """`logprob_tolerance`, or what stands for None."""
        if self.logprob_tolerance is not None:
            return self.logprob_tolerance
        return 1e-4 if self.dtype == "float32" else 1.0


@dataclass(frozen=True)
class CurateConfig(FilteredSamplingConfig):
    """Rejection sampling (DeepSeek-R1 section 2.3.3): verified samples become data."""

    path: Positional[str]
    """Model directory, run directory, GGUF file, or a model of the Hugging Face Hub, `org/name`."""
    _: KW_ONLY
    out: str = "curated.jsonl"
    """File to append to. An interrupted curation goes on where it stopped; with more tasks or larger num_problems,
    num_samples or keep_per_problem it is extended. A summary is written to OUT.summary.json."""
    tasks: tuple[str, ...] = ("countdown",)
    """Built-in names or 'module:Class'."""
    task_options: TaskOptions = field(default_factory=dict)
    """Constructor arguments by task, for example task_options.countdown = {numbers = 4}."""
    split: Literal["train", "test"] = "train"
    num_problems: int = 1000
    """Per task, drawn by `seed`."""
    num_samples: int = 8
    """Samples per problem."""
    thinking: bool | None = None
    """Turns thoughts on or off in models whose chat template has that switch; None leaves the template's default."""
    keep_per_problem: int = 2
    """Most samples kept of one problem."""
    pick: Literal["random", "shortest"] = "random"
    """Which of the good samples are kept when there are more."""
    correct_only: bool = True
    """Keep correct answers only; false keeps every sample with at least min_reward."""
    min_reward: float | None = None
    max_completion_tokens: int | None = None
    """Longer samples are dropped; None keeps all that fit max_tokens."""
    min_completion_tokens: int = 1
    min_language_share: float = 0.95
    """Smallest share of words written in `script`; below it a sample counts as mixed-language. 0 is off."""
    script: str = "LATIN"
    """As Unicode character names start: LATIN, CJK, CYRILLIC, ..."""
    max_solve_rate: float = 1.0
    """Problems solved by a larger share of their samples teach little and are dropped."""
    seed: int = 0
    """Of the sampling and of every choice."""
    long_prompts: LongPrompts = "refuse"
    """Problems that leave no room for an answer in the model's context: "refuse" ends with the first one's id before
    any is sampled, "skip" leaves them out and says how many."""
    batch_problems: int = 64
    """Problems sampled between two writes to disk."""
    engine: EngineConfig = EngineConfig()
    engines: int = 1
    """Engines side by side on a CPU, each in a thread of its own, which share what `engine` grants: a small model
    generates faster so than with its kernels shared out."""
    verify_workers: int = 2
    """Processes that check answers."""
    verify_timeout: float = 5.0
    """Seconds one check may take."""
    device: str = "auto"
    """auto is the GPU where there is one."""
    dtype: LoadDtype = "auto"
    """auto is the checkpoint's, float32 on a CPU; fp8 keeps the weights of an FP8 checkpoint as they are."""
    quantize: LoadQuantize = "auto"
    """Format to round the weights to when they are loaded; auto keeps int8 and int4 weights of a checkpoint as they
    are, none makes all dense."""
    threads: int | None = None
    """CPU threads for PyTorch; None is one per 10 million parameters, and never more than PyTorch's own choice."""
    overwrite: bool = False
    """Delete what is in `out` first."""
    dry_run: bool = False
    """Print the resolved configuration, parameter count and memory estimate, and stop."""
    quiet: bool = False
    """No progress line."""

    def __post_init__(self) -> None:
        check_finite(self)
        super().__post_init__()
        check_tasks(self.tasks, self.task_options)
        check_verification(self.verify_workers, self.verify_timeout)
        check_least(self, 1, "num_problems", "num_samples", "keep_per_problem", "batch_problems", "threads", "engines")
        if not self.out.endswith(".jsonl"):
            raise ValueError(f"out = {self.out!r}: must be a file that ends in .jsonl")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(f"temperature = {self.temperature} would draw {self.num_samples} equal samples; raise it")
        for name in ("min_language_share", "max_solve_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must lie in [0, 1]")
        longest = self.max_completion_tokens
        if longest is not None and longest < self.min_completion_tokens:
            raise ValueError(
                f"max_completion_tokens = {longest}: below min_completion_tokens = {self.min_completion_tokens}"
            )
        if self.min_completion_tokens > self.max_tokens:
            raise ValueError(
                f"min_completion_tokens = {self.min_completion_tokens}: above max_tokens = {self.max_tokens}, so no "
                "sample would be kept"
            )
        if self.max_solve_rate == 0 and self.correct_only:
            raise ValueError(
                f"max_solve_rate = {self.max_solve_rate} drops every problem that has a correct sample, and "
                "correct_only every other: nothing would be kept"
            )
        if self.min_language_share:
            check_script(self.script)
