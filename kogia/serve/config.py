"""Settings of `kogia serve`. Torch-free."""

from dataclasses import KW_ONLY, dataclass
from ipaddress import ip_address

from tyro.conf import Positional

from kogia.checkpoint.config import LoadDtype, LoadQuantize
from kogia.engine.config import EngineConfig
from kogia.inference.config import engine_options, filtered_sampling

LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")


@dataclass(frozen=True)
class ServeConfig:
    """Answer over HTTP, as OpenAI's, DeepSeek's and Anthropic's APIs do."""

    path: Positional[str]
    """Model directory, run directory, GGUF file, or a model of the Hugging Face Hub, `org/name`."""
    _: KW_ONLY
    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine's own take --api-key-file."""
    port: int = 8000
    """0 takes a free one, which the ready line names."""
    api_key_file: str | None = None
    """File with the keys that open the server, one a line; an optional name stands before it, as in `alice: KEY`. A key
    may be given by its SHA-256, as `sha256:HEX`."""
    limits_file: str | None = None
    """TOML file with what each key may use: a table per name, or `default`, of requests_per_minute, tokens_per_minute
    and concurrent_requests."""
    name: tuple[str, ...] = ()
    """Names that requests call the model by; the first is the one that is shown. None is the last part of `path`."""
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
    draft_tokens: int | None = None
    """Tokens drafted per step by the MTP module; None takes engine.num_draft_tokens, or if that is 0 one where the
    model has the module."""
    engine: EngineConfig = EngineConfig()
    tensor_parallel: int = 1
    """Processes that share the model, with a GPU each where there are any."""
    expert_parallel: bool = False
    """With tensor_parallel, split the routed experts by number instead of each by its width."""
    device: str = "auto"
    dtype: LoadDtype = "auto"
    """auto is the checkpoint's, float32 on a CPU; fp8 keeps the weights of an FP8 checkpoint as they are."""
    quantize: LoadQuantize = "auto"
    """Format to round the weights to when they are loaded; auto keeps int8 and int4 weights of a checkpoint as they
    are, none makes all dense."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port = {self.port}: must be 0 to 65535 (0 takes a free one)")
        for name in ("drain_seconds", "keep_alive_seconds"):
            if not 0 < getattr(self, name) <= 86400:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0 and at most 86400 seconds")
        filtered_sampling(self, {})
        engine_options(self.engine, self.draft_tokens)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: must be at least 1")
        if not 1 <= self.store_megabytes <= 10**6:
            raise ValueError(f"store_megabytes = {self.store_megabytes}: must be 1 to 1000000")
        if self.limits_file is not None and self.api_key_file is None:
            raise ValueError(f"limits_file = {self.limits_file!r}: limits are for keys; name them by api_key_file")
        if self.api_key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host = {self.host!r}: whoever reaches this address could use the model, read the prompts of others "
                "from its timing and fill its memory; name a file with keys by --api-key-file, or listen at 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") in LOOPBACK_NAMES
