"""What an evaluation is, as frozen values. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from tyro.conf import Positional

from kogia.checkpoint.config import LoadDtype, LoadQuantize
from kogia.config import check_finite, check_least, check_seed
from kogia.engine.config import EngineConfig, FilteredSamplingConfig
from kogia.tasks.pool import MAX_TIMEOUT

LongPrompts = Literal["refuse", "skip"]
TaskOptions = dict[str, dict[str, str | int | float | bool]]


def check_tasks(tasks: Sequence[str], task_options: Mapping[str, Any]) -> None:
    """Raise ValueError unless tasks are named once each and options belong to one of them."""
    if not tasks:
        raise ValueError("tasks is empty: name a built-in task, for example countdown, or 'module:Class'")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks = {list(tasks)}: each may be named once")
    for spec in task_options:
        if spec not in tasks:
            raise ValueError(f"task_options.{spec}: no such task in tasks = {list(tasks)}; write its spec exactly so")


def check_verification(workers: int, timeout: float) -> None:
    """Raise ValueError for workers or a wall clock that no `VerifyPool` takes."""
    if workers < 1:
        raise ValueError(f"verify_workers = {workers}: must be at least 1")
    if not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(f"verify_timeout = {timeout}: must be above 0 seconds and at most {MAX_TIMEOUT:g}")


def check_numbers_of_experts(numbers: Sequence[int], engines: int | None) -> None:
    """Raise ValueError unless each is named once, and not beside the engine's own."""
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"active_experts = {list(numbers)}: each may be named once")
    if numbers and engines is not None:
        raise ValueError(
            f"active_experts = {list(numbers)} and engine.active_experts = {engines}: they are the same setting; give "
            "one of them"
        )


@dataclass(frozen=True)
class EvalConfig(FilteredSamplingConfig):
    """Measure a model on tasks, by samples of each question, with intervals."""

    path: Positional[str]
    """Model directory, run directory, GGUF file, or a model of the Hugging Face Hub, `org/name`."""
    _: KW_ONLY
    tasks: tuple[str, ...] = ("countdown",)
    """Built-in names or 'module:Class'."""
    task_options: TaskOptions = field(default_factory=dict)
    """Constructor arguments by task, for example task_options.countdown = {numbers = 4}."""
    split: Literal["test", "train"] = "test"
    num_questions: int = 300
    """Drawn by `question_seed`; a smaller number takes a part of the same questions."""
    num_samples: int = 8
    """Sampled answers per question; 0 only with `greedy`."""
    k: tuple[int, ...] = ()
    """More pass@k and maj@k to report, up to num_samples; pass@1 always is, and those of 8 where the samples reach."""
    max_tokens: int = 512
    """Longest completion; longer ones count as wrong and as truncated."""
    thinking: bool | None = None
    """Turns thoughts on or off in models whose chat template has that switch; None leaves the template's default."""
    greedy: bool = False
    """Also take one greedy answer per question."""
    seed: int = 0
    """Of the sampling."""
    question_seed: int = 0
    """Of the choice of questions; equal values keep two evaluations comparable question by question."""
    active_experts: tuple[int, ...] = ()
    """Evaluate at each of these numbers of routed experts per token, as 2,4,6, and show score, speed and bytes per
    token side by side; each has files of its own, NAME-2experts. Empty: engine.active_experts decides."""
    name: str | None = None
    """Name of the files; None takes the task's. With several tasks it goes before the task's name."""
    out: str | None = None
    """Directory of NAME.json and NAME.jsonl; None is RUN/evals for a run directory or its checkpoints, else ./evals."""
    compare: str | None = None
    """Another evaluation (NAME.json, or a directory that holds one of the same name): adds the paired difference."""
    resume: bool = False
    """Go on with an interrupted evaluation: its answers are kept and the rest is sampled, with equal results."""
    long_prompts: LongPrompts = "refuse"
    """Questions that leave no room for an answer in the model's context: "refuse" ends with the first one's id before
    anything is sampled, "skip" leaves them out and says how many."""
    batch_questions: int = 8
    """Questions checked and written to disk at a time; an interruption costs these and what is under way."""
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
    dry_run: bool = False
    """Print the resolved configuration, parameter count and memory estimate, and stop."""
    quiet: bool = False
    """No progress line."""

    def __post_init__(self) -> None:
        check_finite(self)
        super().__post_init__()
        check_tasks(self.tasks, self.task_options)
        check_least(self, 1, "num_questions", "batch_questions", "threads", "engines")
        check_verification(self.verify_workers, self.verify_timeout)
        check_numbers_of_experts(self.active_experts, self.engine.active_experts)
        if self.num_samples < 1 and not (self.num_samples == 0 and self.greedy):
            raise ValueError(f"num_samples = {self.num_samples}: must be at least 1, or 0 together with greedy")
        if any(not 1 <= k <= self.num_samples for k in self.k):
            raise ValueError(
                f"k = {list(self.k)}: each must lie in 1..num_samples = {self.num_samples}; raise num_samples, or ask "
                "for a smaller k"
            )
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"temperature = {self.temperature} would draw {self.num_samples} equal samples; "
                "set num_samples = 0 and greedy"
            )


@dataclass(frozen=True)
class ContextConfig:
    """How far back a model looks: by losses behind more and more text, by pass keys."""

    path: Positional[str]
    """Model directory, run directory, GGUF file, or a model of the Hugging Face Hub, `org/name`."""
    _: KW_ONLY
    text: tuple[str, ...] = ()
    """Files with long documents (.txt, .jsonl, .json, each also .gz, or .parquet): losses are measured on them and pass
    keys hidden in them. Without any, keys are hidden in sentences that say nothing, and no loss is measured."""
    text_key: str = "text"
    """The column of a row that holds a document."""
    lengths: tuple[int, ...] = ()
    """Lengths of context in tokens, rising. Empty: doubled from 128 up to the model's context."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where keys are hidden: 0 is the beginning of a text, 1 the end."""
    keys: int = 5
    """Keys at each depth of each length."""
    windows: int = 16
    """Pieces of text, each of the largest length, that losses are measured on."""
    tail: int = 64
    """Last tokens of a window, whose loss is measured behind contexts of every length."""
    seed: int = 0
    """Of the keys and of the choice of windows."""
    name: str = "context"
    """Of the files."""
    out: str | None = None
    """Directory of NAME.json and NAME.png; None is RUN/evals for a run directory or its checkpoints, else ./evals."""
    engine: EngineConfig = EngineConfig()
    device: str = "auto"
    """auto is the GPU where there is one."""
    dtype: LoadDtype = "auto"
    """auto is the checkpoint's, float32 on a CPU; fp8 keeps the weights of an FP8 checkpoint as they are."""
    quantize: LoadQuantize = "auto"
    """Format to round the weights to when they are loaded; auto keeps int8 and int4 weights of a checkpoint as they
    are, none makes all dense."""
    threads: int | None = None
    """CPU threads for PyTorch; None is one per 10 million parameters, and never more than PyTorch's own choice."""
    quiet: bool = False
    """No progress line."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_least(self, 1, "keys", "windows", "tail", "threads")
        check_seed(self.seed)
        if list(self.lengths) != sorted(set(self.lengths)) or any(length < 2 for length in self.lengths):
            raise ValueError(f"lengths = {list(self.lengths)}: must rise, and each be at least 2")
        if not self.depths or any(not 0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths = {list(self.depths)}: at least one, each in [0, 1]")
