"""Settings of `kogia serve`. Torch-free."""

import re
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path

from tyro.conf import Positional

from kogia.checkpoint.config import LoadDtype, LoadQuantize
from kogia.engine.config import EngineConfig
from kogia.inference.config import FILTERS, engine_options, filtered_sampling, settle_path

MODEL_OPTIONS = (
    *("path", "name", "max_tokens", *FILTERS, "marks_in_messages", "draft_tokens", "engine"),
    *("tensor_parallel", "expert_parallel", "device", "dtype", "quantize"),
)
"""Fields of `ServeConfig` that are about one model: what a table of `models_file` may say."""
UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("B", 1000), ("iB", 1024), ("", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:iB|B)?)")
LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")


@dataclass(frozen=True)
class ServeConfig:
    """Answer over HTTP, as OpenAI's, DeepSeek's and Anthropic's APIs do."""

    path: Positional[str] = ""
    """Model directory, run directory, GGUF file, or a model of the Hugging Face Hub, `org/name`. Without one it is our
    own, checkpoints/kogia-nano."""
    _: KW_ONLY
    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine's own take --api-key-file."""
    port: int = 8000
    """0 takes a free one, which the ready line names."""
    api_key_file: str | None = None
    """File with the keys that open the server, one a line; an optional name stands before it, as in `alice: KEY`. A key
    may be given by its SHA-256, as `sha256:HEX`."""
    admin_key_file: str | None = None
    """File with the keys of those who manage the server, written as those of --api-key-file and none of them; without
    it there is no /v1/admin."""
    limits_file: str | None = None
    """TOML file with what each key may use: a table per name, or `default`, of requests_per_minute, tokens_per_minute
    and concurrent_requests."""
    name: tuple[str, ...] = ()
    """Names that requests call the model by; the first is the one that is shown. None is the last part of `path`, or
    `org/name` too for a model of the Hugging Face Hub."""
    models_file: str | None = None
    """TOML file with further models, a table per name: path, and what is not as this command says for the first one.
    They are loaded when a request names them, or with at_start = true before the server is ready."""
    memory_limit: str | None = None
    """Most memory that weights and caches of all models may take, as 40GB or 37GiB: the model that nobody has named
    for the longest is unloaded for another one. None unloads nothing."""
    load_wait_seconds: float = 60.0
    """How long a request waits for its model to be loaded before it is told to come again."""
    max_tokens: int | None = None
    """Longest answer of requests that name none; None leaves the rest of the context."""
    temperature: float | None = None
    """Of requests that name none. None takes what the model's generation_config.json says, else 0.6."""
    top_k: int | None = None
    """The same; else 0, which is off."""
    top_p: float | None = None
    """The same; else 0.95."""
    min_p: float | None = None
    """The same; else 0, which is off."""
    marks_in_messages: bool = False
    """Let messages spell the model's marks, as <|im_end|>, which then end a turn or begin another.
    Without it they are text. Prompts of /v1/completions spell them in any case."""
    drain_seconds: float = 30.0
    """After SIGTERM or Ctrl-C: how long requests that run may go on. No new ones are taken."""
    keep_alive_seconds: float = 15.0
    """A stream that is silent for so long gets a comment, so that nothing on its way takes it for dead."""
    access_log: str | None = None
    """File that gets a line of JSON per request: who, what it took, how it ended, and nothing that was said; - is the
    standard output."""
    store: str | None = None
    """Directory for the conversations of the chat page, apart for each key. None leaves them in the browser."""
    store_megabytes: int = 256
    """Most that the conversations of one key may take, in 10^6 bytes."""
    otlp_endpoint: str | None = None
    """Address of an OpenTelemetry collector, as http://127.0.0.1:4318, that gets a span per request of a model (OTLP
    over HTTP; needs kogia[telemetry]). The only thing that the server ever asks of others. None sends nothing."""
    draft_tokens: int | None = None
    """Tokens drafted per step by the MTP module; None takes engine.num_draft_tokens, or if that is 0 one where the
    model has the module."""
    engine: EngineConfig = EngineConfig()
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
        if not 0 <= self.port < 65536:
            raise ValueError(f"port = {self.port}: must be 0 to 65535 (0 takes a free one)")
        for name in ("drain_seconds", "keep_alive_seconds", "load_wait_seconds"):
            if not 0 < getattr(self, name) <= 86400:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0 and at most 86400 seconds")
        filtered_sampling(self, {})
        engine_options(self.engine, self.draft_tokens)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: must be at least 1")
        if not 1 <= self.store_megabytes <= 10**6:
            raise ValueError(f"store_megabytes = {self.store_megabytes}: must be 1 to 1000000")
        if self.memory_limit is not None:
            num_bytes(self.memory_limit)
        if self.otlp_endpoint is not None and not re.match(r"https?://[^/\s]+", self.otlp_endpoint):
            raise ValueError(f"otlp_endpoint = {self.otlp_endpoint!r}: must be a URL, as http://127.0.0.1:4318")
        if self.limits_file is not None and self.api_key_file is None:
            raise ValueError(f"limits_file = {self.limits_file!r}: limits are for keys; name them by api_key_file")
        if self.api_key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host = {self.host!r}: whoever reaches this address could use the model, read the prompts of others "
                "from its timing and fill its memory; name a file with keys by --api-key-file, or listen at 127.0.0.1"
            )
        settle_path(self)


def num_bytes(size: str) -> int:
    """Of a size as people write it: 40GB, 37GiB or 37G, or bytes. Raises ValueError for what is none."""
    match = _SIZE.fullmatch(size.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"memory_limit = {size!r}: must be a size above 0, as 40GB, 37.5GiB or 40000000000")
    return int(float(match[1]) * UNITS[match[2]])


def operators_text(path: str | Path, option: str) -> str:
    """The text of a file that `option` names. Raises ValueError that names both."""
    file = Path(path).expanduser()
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; {option} names one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {option} names a text file") from None


@lru_cache(64)
def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") in LOOPBACK_NAMES
