"""Settings of the commands about model files, and what types of numbers are called. Torch-free."""

from dataclasses import dataclass
from typing import Literal, get_args

from tyro.conf import Positional

from kogia.config import check_finite

DTYPES = ("float32", "bfloat16", "float16", "fp8")
SPELLINGS = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
"""What people type for them."""
Dtype = Literal["float32", "bfloat16", "float16", "fp8", "fp32", "float", "bf16", "fp16", "half"]
GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
LoadDtype = Literal["auto", Dtype]
QuantizedFormat = Literal["fp8", "int8", "int4"]
LoadQuantize = Literal["auto", "none", QuantizedFormat]
"""What becomes of weights when they are loaded: "auto" keeps int8 and int4 as they are stored, "none" makes all dense,
a format rounds those that it is for to it."""


def dtype_name(dtype: object) -> str:
    """ "auto" or a name of DTYPES, from any spelling of it or from torch's own dtype. Raises ValueError for another."""
    given = str(dtype).removeprefix("torch.").lower()
    name = SPELLINGS.get(given, given)
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype = {str(dtype)!r}: must be auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return name


@dataclass(frozen=True)
class InspectConfig:
    """What a model is and costs; status 1 where its files contradict its config.json."""

    model: Positional[str] = ""
    """Model or run directory, GGUF file, preset, as deepseek-v3, or `org/name` of the Hugging Face Hub; without one
    the presets are listed."""
    context: int | None = None
    """Tokens of context that the cache and the FLOPs are given for; None takes the longest the model is made for."""
    json: bool = False
    """Print one JSON object instead of tables."""


@dataclass(frozen=True)
class ConvertConfig:
    """Rewrite a checkpoint in another type or in other files, piece by piece."""

    src: Positional[str]
    """Model directory, run directory, GGUF file, or a model of the Hugging Face Hub, `org/name`."""
    dst: Positional[str]
    """Directory to write, or `NAME.gguf`, a file for llama.cpp; it appears under its name only when complete."""
    dtype: Dtype | None = None
    """Type to convert to; None keeps every tensor's own. fp8 is --quantize fp8 with the other matrices in bfloat16."""
    quantize: QuantizedFormat | GGUFType | None = None
    """Format to round weights to. fp8 takes the matrices that DeepSeek-V3 publishes in FP8, with a scale per 128 x 128
    block; int8 (a scale per row) and int4 (one per 128 columns) take those of attention, feed-forward parts, experts
    and the head. f32, f16, bf16 and q8_0 are types of the matrices in a GGUF file, bf16 where none is given; vectors
    and routers are float32 there."""
    asymmetric: bool = False
    """int4 with a zero per 128 columns, for numbers that lie on one side of 0."""
    calibration: str | None = None
    """Text or rows, as `kogia pretrain` reads them, that a model of int8 or int4 weights is made for: the dense model
    runs on the first 65,536 tokens, weights that meet large numbers are rounded more finely, and in int4 columns
    make up for each other's errors (GPTQ). None is without."""
    shard_gib: float = 5.0
    """Largest size of one weight file; 0 writes a single file."""
    overwrite: bool = False
    """Replace a model directory or GGUF file that is there already."""
    dry_run: bool = False
    """Print what would be written and stop."""

    def __post_init__(self) -> None:
        check_finite(self)
        if self.quantize is not None and self.dtype == "fp8":
            raise ValueError(f"dtype = 'fp8' and quantize = {self.quantize!r}: give one of them")
        if self.calibration is not None and self.quantize not in ("int8", "int4"):
            raise ValueError(f"calibration: is for quantize = int8 or int4, not {self.quantize}; leave it out")
        if self.shard_gib < 0:
            raise ValueError(f"shard_gib = {self.shard_gib}: must be positive, or 0 for a single file")
        if self.to_gguf and self.dtype is not None:
            raise ValueError(f"dtype = {self.dtype}: the types of a GGUF file are given by quantize, such as bf16")
        if self.to_gguf and self.quantize in get_args(QuantizedFormat):
            raise ValueError(f"quantize = {self.quantize}: GGUF files have {' or '.join(get_args(GGUFType))}")
        if self.quantize in get_args(GGUFType) and not self.to_gguf:
            raise ValueError(f"quantize = {self.quantize}: a type of GGUF files; name one to write, as model.gguf")

    @property
    def to_gguf(self) -> bool:
        return self.dst.endswith(".gguf")
