"""Settings of the commands that answer prompts. Torch-free."""

from dataclasses import KW_ONLY, dataclass

from tyro.conf import Positional

from kogia.checkpoint.config import LoadDtype
from kogia.engine.config import EngineConfig, FilteredSamplingConfig


@dataclass(frozen=True)
class GenerateConfig(FilteredSamplingConfig):
    """Answer prompts with a model: from --prompt, from --file or from stdin: one prompt per line, or JSON lines."""

    path: Positional[str]
    """Model directory or run directory."""
    _: KW_ONLY
    prompt: tuple[str, ...] = ()
    """Prompts; each is one user message unless --raw."""
    file: str | None = None
    """Text file with one prompt per line, or rows (.jsonl, .json, each also .gz, or .parquet) with a "prompt", text or
    a list of messages, or with "messages". Text whose first line is such a row is read as rows, on stdin too."""
    out: str | None = None
    """JSONL file for the completions; printed to the terminal when left out. All columns of a row are kept; one that
    has the name of a column written here, such as "answer", is kept as "input_answer"."""
    raw: bool = False
    """Continue the text itself instead of answering it as a chat message."""
    system: str | None = None
    """System message put before every prompt that has none."""
    thinking: bool | None = None
    """Turns thoughts on or off in models whose chat template has that switch; None leaves the template's default."""
    n: int = 1
    """Completions per prompt."""
    temperature: float = 0.6
    top_p: float = 0.95
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are cut off."""
    device: str = "auto"
    dtype: LoadDtype = "auto"
    """auto is the checkpoint's, float32 on a CPU; fp8 keeps the weights of an FP8 checkpoint as they are."""
    engine: EngineConfig = EngineConfig()


@dataclass(frozen=True)
class ChatConfig(FilteredSamplingConfig):
    """Talk to a model in the terminal."""

    path: Positional[str]
    """Model directory or run directory."""
    _: KW_ONLY
    system: str | None = None
    """System message of the conversation."""
    thinking: bool | None = None
    """Turns thoughts on or off in models whose chat template has that switch; None leaves the template's default."""
    max_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.95
    single: bool = False
    """Forget each exchange before the next question, as models trained on single questions expect."""
    draft_tokens: int | None = None
    """Tokens drafted per step by the MTP module; None uses 1 where the model has one."""
    device: str = "auto"
    dtype: LoadDtype = "auto"
    """auto is the checkpoint's, float32 on a CPU; fp8 keeps the weights of an FP8 checkpoint as they are."""
