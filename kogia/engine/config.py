"""Settings of the engine and of the two commands that stand on it alone. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True)
class PruneConfig:
    """Drop the least attended rows of long contexts, layer by layer: an approximation (engine.pruning says what of).

    The layers between the first and the last have budgets in a straight line between theirs. A cache block spans all
    layers, so a sequence holds blocks for its largest budget and slack: a smaller one in other layers saves the time to
    read rows, not their memory.
    """

    first_budget: int
    """Tokens kept per sequence in the first decoder layer."""
    last_budget: int
    """Tokens kept per sequence in the last decoder layer."""
    recent: int = 64
    """Newest tokens that are never dropped."""
    slack: int = 64
    """Layers are cut back to their budgets every `slack` tokens. Prefill chunks end there: raise it for longer ones."""

    def __post_init__(self) -> None:
        for name, bound in {"first_budget": 1, "last_budget": 1, "recent": 0, "slack": 1}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"engine.prune.{name} = {getattr(self, name)}: must be at least {bound}")
        if self.recent > min(self.first_budget, self.last_budget):
            raise ValueError(
                f"engine.prune.recent = {self.recent}: must fit into the budgets {self.first_budget} and "
                f"{self.last_budget}, which count the newest tokens too; lower it or raise them"
            )

    @property
    def first_cut(self) -> int:
        """Context length at which a layer may first drop rows: a multiple of `slack`, as all later ones are."""
        return (min(self.first_budget, self.last_budget) // self.slack + 1) * self.slack

    @property
    def most_rows(self) -> int:
        """Most rows that a layer ever holds of one sequence."""
        return max(self.first_budget, self.last_budget) + self.slack


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine may run at once. Naming a field of `prune`, such as `first_budget`, switches pruning on."""

    block_size: int = 16
    """Tokens per cache block: the unit of allocation and of prefix sharing."""
    num_blocks: int | None = None
    """Cache blocks; None derives them from `cache_memory_bytes`."""
    cache_memory_bytes: int = 1 << 30
    """Most memory that the cache may take when `num_blocks` is not given."""
    max_batch_tokens: int = 2048
    """Token budget of one step, shared by prefill chunks, decodes and draft verification."""
    max_sequences: int = 256
    """Sequences that run at once; the rest wait."""
    num_draft_tokens: int = 0
    """Tokens drafted per step by the model's MTP module; 0 turns speculative decoding off."""
    overlap: bool | None = None
    """Plan the next step while the present one runs; not with drafts. None: on a GPU, where it hides the planning; on a
    CPU, which has nothing to hide it behind, a sequence that ends would only run one token more."""
    cache_dtype: Literal["auto", "fp8"] = "auto"
    """Of the cached latents: the model's dtype, or FP8 with 16-bit rotary keys (latent attention only)."""
    rank_by_context: tuple[tuple[int, int], ...] = ()
    """[[tokens, rank], ...]: from a context of `tokens` on, queries read only the first `rank` numbers of the latents.
    Starts at 0, falls; no more than the first rank is stored. For models trained with `nested_rank_min`."""
    prefix_cache: bool = True
    """Share the blocks of equal prefixes between sequences, and keep them after a sequence ends."""
    prune: PruneConfig | None = None
    """Bounds what long contexts cost by dropping little-attended rows (latent attention only); None keeps them all."""

    def __post_init__(self) -> None:
        least = {"block_size": 1, "max_batch_tokens": 1, "max_sequences": 1, "num_draft_tokens": 0, "num_blocks": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"engine.{name} = {value}: must be at least {bound}")
        table = self.rank_by_context
        tokens, ranks = [pair[0] for pair in table], [pair[1] for pair in table]
        if table and (tokens[0] != 0 or tokens != sorted(set(tokens)) or ranks != sorted(ranks, reverse=True)):
            raise ValueError(
                f"engine.rank_by_context = {[list(pair) for pair in table]}: must start at 0 tokens, with rising "
                "tokens and falling ranks, as [[0, 512], [32768, 256]]"
            )
        if self.prune is not None and (self.prefix_cache or self.num_draft_tokens):
            raise ValueError(
                f"engine.prune with prefix_cache = {self.prefix_cache} and num_draft_tokens = {self.num_draft_tokens}: "
                "pruned rows move up within their blocks, layer by layer, so no prefix can be shared and no rejected "
                "draft taken back; set prefix_cache = false and num_draft_tokens = 0"
            )


@dataclass(frozen=True)
class GenerateConfig:
    """Answer prompts with a model: from --prompt, from --file (one prompt per line, or JSONL), or from stdin."""

    path: Positional[str]
    """Model directory or run directory."""
    prompt: tuple[str, ...] = ()
    """Prompts; each is one user message unless --raw."""
    file: str | None = None
    """Text file with one prompt per line, or .jsonl with {"prompt": ...} lines."""
    out: str | None = None
    """JSONL file for the completions; printed to the terminal when left out."""
    raw: bool = False
    """Continue the text itself instead of answering it as a chat message."""
    system: str | None = None
    """System message put before every prompt."""
    thinking: bool | None = None
    """Turns thoughts on or off in models whose chat template has that switch; None leaves the template's default."""
    n: int = 1
    """Completions per prompt."""
    max_tokens: int = 512
    temperature: float = 0.6
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 0.95
    """1 is off."""
    min_p: float = 0.0
    """0 is off."""
    seed: int | None = None
    """Makes sampling repeatable; None draws a new seed."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are cut off."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"
    """auto is the checkpoint's, float32 on a CPU; fp8 keeps the weights of an FP8 checkpoint as they are."""
    engine: EngineConfig = EngineConfig()


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model in the terminal."""

    path: Positional[str]
    """Model directory or run directory."""
    system: str | None = None
    """System message of the conversation."""
    thinking: bool | None = None
    """Turns thoughts on or off in models whose chat template has that switch; None leaves the template's default."""
    max_tokens: int = 2048
    temperature: float = 0.6
    """0 is greedy."""
    top_p: float = 0.95
    """1 is off."""
    seed: int | None = None
    """Makes the conversation repeatable; None draws a new seed."""
    single: bool = False
    """Forget each exchange before the next question, as models trained on single questions expect."""
    draft_tokens: int | None = None
    """Tokens drafted per step by the MTP module; None uses 1 where the model has one."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"
    """auto is the checkpoint's, float32 on a CPU; fp8 keeps the weights of an FP8 checkpoint as they are."""
