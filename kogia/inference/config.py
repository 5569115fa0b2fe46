"""Settings of the commands that answer prompts. Torch-free."""

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from math import inf
from typing import Any, Literal

from tyro.conf import Positional

from kogia.checkpoint.config import LoadDtype, LoadQuantize
from kogia.checkpoint.own import own_model
from kogia.config import check_least, check_seed
from kogia.engine.config import EngineConfig, FilteredSamplingConfig, check_sampling

FILTERS = ("temperature", "top_k", "top_p", "min_p")
"""Settings that a generation_config.json may hold too."""
GOALS = ("ttft", "tpot", "e2el")
"""Times that a request of a load may be held to."""
SERVER_OPTIONS = (
    "model", "api", "clients", "vary", "prefix_tokens", "prefixes", "prompts", "ignore_eos", "extra", "goodput",
    "api_key_file", "api_key_env", "timeout",
)  # fmt: skip
ENGINE_OPTIONS = (
    "random_weights", "batches", "rounds", "device", "dtype", "quantize", "tensor_parallel", "expert_parallel",
    "threads", "engine",
)  # fmt: skip
"""Options of `BenchConfig` for a server, and for a model in the process."""


@dataclass(frozen=True, kw_only=True)
class AnswerSamplingConfig:
    """How answers are drawn; what is left out is the model's own."""

    temperature: float | None = None
    """0 is greedy. None takes what the model's generation_config.json says, else 0.6."""
    max_tokens: int = 512
    """Longest answer; one that has not ended by then is cut off."""
    seed: int | None = None
    """Makes sampling repeatable; None draws a new seed."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0 is off. None takes what generation_config.json says, else 0."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens with at least this probability; 1 is off. None takes what
    generation_config.json says, else 0.95."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the most likely one; 0 is off. None takes what
    generation_config.json says, else 0."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value that will not do, in the fields of subclasses too."""
        check_sampling(self)

    def sampling(self, own: Mapping[str, Any]) -> FilteredSamplingConfig:
        """The settings given here, over those of `own`, a generation_config.json, over the defaults."""
        return filtered_sampling(self, own, max_tokens=self.max_tokens, seed=self.seed)


@dataclass(frozen=True)
class GenerateConfig(AnswerSamplingConfig):
    """Answer prompts, from --prompt, --file or stdin: one a line, or rows of JSON."""

    path: Positional[str] = ""
    """Model directory, run directory, GGUF file, or a model of the Hugging Face Hub, `org/name`. Without one it is our
    own, checkpoints/kogia-nano."""
    _: KW_ONLY
    prompt: tuple[str, ...] = ()
    """Prompts; each is one user message unless --raw."""
    file: str | None = None
    """Text file with one prompt per line, or rows (.jsonl, .json, each also .gz, or .parquet) with a "prompt", text or
    a list of messages, or with "messages". Text whose first line is such a row is read as rows, on stdin too."""
    out: str | None = None
    """JSONL file for the completions; printed to the terminal when left out. All columns of a row are kept; one that
    has the name of a column written here, such as "answer", is kept as "input_answer". It grows in the order of the
    prompts."""
    resume: bool = False
    """Go on with an interrupted run: the rows in `out` are kept and the rest is generated."""
    raw: bool = False
    """Continue the text itself instead of answering it as a chat message."""
    system: str | None = None
    """System message put before every prompt that has none."""
    thinking: bool | None = None
    """Turns thoughts on or off in models whose chat template has that switch; None leaves the template's default."""
    thinking_token_budget: int | None = None
    """Tokens after which a thought is closed by force, so that the answer follows; None leaves it open."""
    json_schema: str | None = None
    """File with a JSON schema that answers match, behind their thoughts."""
    n: int = 1
    """Completions per prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are cut off."""
    logprobs: bool = False
    """Write the log-probability of each token as a column."""
    device: str = "auto"
    """auto is the GPU where there is one."""
    dtype: LoadDtype = "auto"
    """auto is the checkpoint's, float32 on a CPU; fp8 keeps the weights of an FP8 checkpoint as they are."""
    quantize: LoadQuantize = "auto"
    """Format to round the weights to when they are loaded; auto keeps int8 and int4 weights of a checkpoint as they
    are, none makes all dense."""
    tensor_parallel: int = 1
    """Processes that share the model, with a GPU each where there are any."""
    expert_parallel: bool = False
    """With tensor_parallel, split the routed experts by number instead of each by its width."""
    threads: int | None = None
    """CPU threads for PyTorch; None is one per 10 million parameters, and never more than PyTorch's own choice."""
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.out is None:
            raise ValueError("resume: goes on with the rows of a file; name it with --out")
        settle_path(self)


@dataclass(frozen=True)
class ChatConfig(AnswerSamplingConfig):
    """Talk to a model in the terminal."""

    path: Positional[str] = ""
    """Model directory, run directory, GGUF file, or a model of the Hugging Face Hub, `org/name`. Without one it is our
    own, checkpoints/kogia-nano."""
    _: KW_ONLY
    system: str | None = None
    """System message of the conversation."""
    thinking: bool | None = None
    """Turns thoughts on or off in models whose chat template has that switch; None leaves the template's default."""
    thinking_token_budget: int | None = None
    """Tokens after which a thought is closed by force, so that the answer follows; None leaves it open."""
    json_schema: str | None = None
    """File with a JSON schema that answers match, behind their thoughts."""
    max_tokens: int = 2048
    single: bool = False
    """Forget each exchange before the next question, as models trained on single questions expect."""
    draft_tokens: int | None = None
    """Tokens drafted per step by the MTP module; None takes engine.num_draft_tokens, or if that is 0 one where the
    model has the module."""
    history: bool = True
    """Keep what is typed for the arrow keys of later chats, in $XDG_STATE_HOME/kogia/chat_history, else below
    ~/.local/state, where nobody else can read it."""
    threads: int | None = None
    """CPU threads for PyTorch; None is one per 10 million parameters, and never more than PyTorch's own choice."""
    engine: EngineConfig = EngineConfig(max_sequences=1)
    tensor_parallel: int = 1
    """Processes that share the model, with a GPU each where there are any."""
    expert_parallel: bool = False
    """With tensor_parallel, split the routed experts by number instead of each by its width."""
    device: str = "auto"
    """auto is the GPU where there is one."""
    dtype: LoadDtype = "auto"
    """auto is the checkpoint's, float32 on a CPU; fp8 keeps the weights of an FP8 checkpoint as they are."""
    quantize: LoadQuantize = "auto"
    """Format to round the weights to when they are loaded; auto keeps int8 and int4 weights of a checkpoint as they
    are, none makes all dense."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value that will not do, before anything is loaded."""
        super().__post_init__()
        self.engine_options()
        settle_path(self)

    def engine_options(self) -> dict[str, Any]:
        """Fields of `EngineConfig`. `num_draft_tokens` may be None: one where the model can draft."""
        return engine_options(self.engine, self.draft_tokens)


def settle_path(config: Any) -> None:
    """Put our own model in the place of an empty `path`. Raises ValueError where it is not there."""
    if not config.path:
        object.__setattr__(config, "path", own_model())


def filtered_sampling(settings: object, own: Mapping[str, Any], **fixed: Any) -> FilteredSamplingConfig:
    """The FILTERS that are fields of `settings`, where not None, over those of `own`, a generation_config.json, over
    the defaults of programs that answer. Raises ValueError that says which of them will not do."""
    given = {name: value for name in FILTERS if (value := getattr(settings, name)) is not None}
    greedy = {"temperature": 0.0} if own.get("do_sample") is False else {}
    asked = {name: own[name] for name in FILTERS if own.get(name) is not None} | greedy
    values = {"temperature": 0.6, "top_p": 0.95, **asked, **given}
    try:
        return FilteredSamplingConfig(**fixed, **values)
    except ValueError as error:
        if any(f"{name} = " in str(error) for name in asked.keys() - given.keys()):
            raise ValueError(f"generation_config.json of the model: {error}; or give a value of your own") from error
        raise


def engine_options(engine: EngineConfig, draft_tokens: int | None) -> dict[str, Any]:
    """Fields of `EngineConfig` as `LLM` takes them. `num_draft_tokens` None: one where the model can draft."""
    drafts = (engine.num_draft_tokens or None) if draft_tokens is None else draft_tokens
    return {**asdict(replace(engine, num_draft_tokens=drafts or 0)), "num_draft_tokens": drafts}


@dataclass(frozen=True)
class BenchConfig:
    """Measure how fast a model runs, here or behind an address.

    $ kogia bench PATH --batches 1 8 64
        decoding and reading prompts by themselves; with --rate also what
        requests wait for that arrive at random
    $ kogia bench --url http://127.0.0.1:8000 --rate 4 --requests 200
        any server with OpenAI's API (ours, vLLM's, llama.cpp's), and the
        table of `vllm bench serve`: requests and tokens per second, time to
        the first token (TTFT), per token behind it (TPOT), between pieces
        of a stream (ITL) and until the end (E2EL)
    $ kogia bench --url URL --clients 16 --prefix-tokens 100 --goodput ttft:500
        a closed loop with a shared beginning, and who met the goal
    """

    path: Positional[str] = ""
    """Model or run directory, GGUF file, or a model of the Hugging Face Hub; with --random-weights a preset, too."""
    _: KW_ONLY
    prompt_tokens: int = 128
    """Length of each prompt."""
    max_tokens: int = 64
    """Tokens decoded behind each prompt."""
    rate: float = 0.0
    """Requests per second, at random times (Poisson). 0 sends all of them to a --url at once, or whenever one of the
    --clients is free; of a PATH it leaves the load of requests out."""
    requests: int = 32
    """Requests of that load."""
    seed: int = 0
    """Of the prompts, the arrivals and drawn weights."""
    out: str | None = None
    """JSON file for the figures."""
    url: str | None = None
    """Server to ask instead of a PATH, as http://127.0.0.1:8000. Only the options from here to `timeout` and those
    above are for it; those below are for a PATH."""
    model: str | None = None
    """Name that the server knows its model by; None takes the first that it lists."""
    api: Literal["chat", "completions"] = "chat"
    """What is asked: /v1/chat/completions, or /v1/completions."""
    clients: int | None = None
    """Requests under way at once, at most: the next one is sent when one has ended. With --rate, what is due waits
    here, and its times count from when it was due."""
    vary: float = 0.0
    """Lengths of prompts and answers are drawn evenly within this share of prompt_tokens and max_tokens: 0.5 makes 64
    to 192 of 128."""
    prefix_tokens: int = 0
    """Of each prompt, so many tokens at its beginning are one of the shared prefixes."""
    prefixes: int = 1
    """How many shared prefixes there are."""
    prompts: str | None = None
    """File whose prompts are sent in place of random words (.jsonl, .json, .parquet: rows with "prompt" or "messages",
    and "max_tokens" where they differ), from the beginning again where it is short."""
    ignore_eos: bool = True
    """Ask for answers that go on to their max_tokens, as ours, vLLM's and llama.cpp's servers do. OpenAI's knows no
    such field: --no-ignore-eos."""
    extra: str | None = None
    """Further fields of each request, as JSON: '{"temperature": 1.0}'. Temperature is 0 otherwise."""
    goodput: tuple[str, ...] = ()
    """Goals in milliseconds, of ttft (first token), tpot (each token behind it) and e2el (the whole), as
    `ttft:500 tpot:50`: requests per second that meet them all are counted, too."""
    api_key_file: str | None = None
    """File with the server's key on its first line."""
    api_key_env: str | None = None
    """Environment variable with the server's key."""
    timeout: float = 600.0
    """Seconds after which a request counts as failed."""
    random_weights: bool = False
    """Draw the weights instead of loading them: speed does not depend on what they are."""
    batches: tuple[int, ...] = (1, 8)
    """Sequences that decode at once, one measurement each."""
    rounds: int = 3
    """Measurements of each kind; the median counts, with the least and the largest beside it."""
    device: str = "auto"
    """auto is the GPU where there is one."""
    dtype: LoadDtype = "auto"
    """auto is the checkpoint's, float32 on a CPU; drawn weights are bfloat16 on a GPU."""
    quantize: LoadQuantize = "auto"
    """Format to round the weights to when they are loaded or drawn; auto keeps int8 and int4 weights of a checkpoint as
    they are, none makes all dense."""
    tensor_parallel: int = 1
    """Processes that share the model, with a GPU each where there are any."""
    expert_parallel: bool = False
    """With tensor_parallel, split the routed experts by number instead of each by its width."""
    threads: int | None = None
    """CPU threads for PyTorch; None is one per 10 million parameters, and never more than PyTorch's own choice."""
    engine: EngineConfig = EngineConfig(prefix_cache=False)

    def __post_init__(self) -> None:
        check_least(self, 1, "prompt_tokens", "requests", "rounds", "clients", "prefixes")
        if not 0 <= self.rate < inf:
            raise ValueError(f"rate = {self.rate}: requests per second, 0 for no such load")
        if not 0 <= self.vary < 1:
            raise ValueError(f"vary = {self.vary}: must be at least 0 and below 1")
        if not 0 < self.timeout < inf:
            raise ValueError(f"timeout = {self.timeout}: seconds, above 0")
        self._check_place()
        check_least(self, 2 if self.path else 1, "max_tokens")
        if self.path:
            self._check_batches()
        else:
            self._check_load()

    def _check_place(self) -> None:
        """Raise ValueError for options of a server with a model here, and the other way round."""
        if bool(self.path) == (self.url is not None):
            raise ValueError("name a model to run here, or a server by --url, and not both")
        names = SERVER_OPTIONS if self.path else ENGINE_OPTIONS
        defaults = {field.name: field.default for field in fields(self)}
        given = [name for name in names if getattr(self, name) != defaults[name]]
        if given:
            kind = "a server, named by --url" if self.path else "a model in this process, named by its PATH"
            raise ValueError(f"{given[0]} = {getattr(self, given[0])!r}: is for {kind}; leave it out")

    def _check_batches(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches = {list(self.batches)}: name sizes of at least 1, as 1 8 64")
        if max(self.batches) > self.engine.max_sequences:
            raise ValueError(
                f"batches = {list(self.batches)}: engine.max_sequences = {self.engine.max_sequences} run at once; "
                "raise it or leave larger batches out"
            )

    def _check_load(self) -> None:
        check_seed(self.seed)
        if not 0 <= self.prefix_tokens <= self.prompt_tokens * (1 - self.vary):
            shortest = int(self.prompt_tokens * (1 - self.vary))
            raise ValueError(f"prefix_tokens = {self.prefix_tokens}: must lie in 0..{shortest}, the shortest prompt")
        if self.api_key_file is not None and self.api_key_env is not None:
            raise ValueError("api_key_file and api_key_env: give the key in one way")
        _ = self.further_fields, self.goals

    @property
    def further_fields(self) -> dict[str, Any]:
        """`extra` as an object. Raises ValueError for what is none."""
        try:
            found = json.loads(self.extra or "{}")
        except ValueError as error:
            raise ValueError(f"extra = {self.extra!r}: is no JSON ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"extra = {self.extra!r}: must be a JSON object, as '{{\"top_p\": 0.9}}'")
        return found

    @property
    def goals(self) -> dict[str, float]:
        """`goodput` by name. Raises ValueError for what is no goal."""
        found = {}
        for goal in self.goodput:
            name, _, most = goal.partition(":")
            try:
                found[name] = float(most)
            except ValueError:
                found[name] = -1.0
            if name not in GOALS or not 0 < found[name] < inf:
                raise ValueError(f"goodput = {goal!r}: must be {', '.join(GOALS)} with milliseconds, as ttft:500")
        return found


@dataclass(frozen=True)
class DoctorConfig:
    """What this machine has, how fast it is, and which implementation each op takes."""

    device: str = "auto"
    """auto is the GPU where there is one."""
    json: bool = False
    """Print JSON."""
