"""Quantised weights as files name them, and as `quantization_config` describes them. Torch-free.

fp8    X.weight F8_E4M3, X.weight_scale_inv                              as DeepSeek-V3 publishes it
int8   X.weight I8, X.weight_scale                                       compressed-tensors, "int-quantized"
int4   X.weight_packed I32, eight codes each, X.weight_scale, X.weight_shape, and where it is asymmetric
       X.weight_zero_point I32, eight rows each                          compressed-tensors, "pack-quantized"
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kogia.checkpoint.tensorfile import FP8, StoredTensor

INT8, INT32, INT64 = "I8", "I32", "I64"
PACKED, SCALE_INV, SCALE, ZERO, SHAPE = "_packed", "_scale_inv", "_scale", "_zero_point", "_shape"
SCALES = {"fp8": SCALE_INV, "int8": SCALE, "int4": SCALE}
"""Format -> what its scales have behind the name of the weight."""
CODES_PER_WORD = 8  # int4 numbers of an int32
SCALE_DTYPES = {"fp8": ("F32", "BF16"), "int8": ("F32", "BF16", "F16"), "int4": ("F32", "BF16", "F16")}
_PARTS = re.compile(rf"^(.*\.weight)({PACKED}|{SCALE_INV}|{SCALE}|{ZERO}|{SHAPE})$")
_NUMBER = re.compile(r"\b\d+\b")

FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
COMPRESSED = "compressed-tensors"
_LAYOUTS = {"int8": "int-quantized", "int4": "pack-quantized"}
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored tensor as one thing: a dense one alone, a quantised one with its scales and what else it has."""

    name: str
    """As the dense weight is called."""
    parts: Mapping[str, StoredTensor]
    """By what their names have behind `name`: "" or "_packed" is the data."""

    @cached_property
    def data(self) -> StoredTensor:
        return self.parts[PACKED] if PACKED in self.parts else self.parts[""]

    @cached_property
    def format(self) -> str:
        """The key in `FORMATS`; empty for numbers that stand for themselves."""
        if PACKED in self.parts:
            return "int4"
        return {FP8: "fp8", INT8: "int8"}.get(self.data.dtype, "")

    @property
    def scale(self) -> StoredTensor:
        return self.parts[SCALES[self.format]]

    @property
    def zero(self) -> StoredTensor | None:
        return self.parts.get(ZERO)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        shape = self.data.shape
        return (*shape[:-1], CODES_PER_WORD * shape[-1]) if self.format == "int4" and shape else shape


def weights_of(stored: Mapping[str, StoredTensor]) -> tuple[dict[str, Weight], list[StoredTensor]]:
    """(weights by name, parts of weights that are not there)."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        match = _PARTS.match(name)
        owner, part = match.groups() if match else (name, "")
        found.setdefault(owner, {})[part] = tensor
    whole = {name: Weight(name, parts) for name, parts in found.items() if "" in parts or PACKED in parts}
    return whole, [part for name, parts in found.items() if name not in whole for part in parts.values()]


# config.json ----------------------------------------------------------------------------------------------------------


def check_quantization(data: Mapping[str, Any], directory: Path) -> None:
    """Refuse a `config.json` that announces another quantisation than those of this module."""
    if reason := unsupported(data):
        raise ValueError(f"{directory}: {reason}. Use a checkpoint in bfloat16 or in one of these")


def unsupported(data: Mapping[str, Any]) -> str | None:
    """What `config.json` announces that cannot be read; None where there is no such thing."""
    settings = data.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method", "fp8") if isinstance(settings, dict) else settings
    if method == COMPRESSED:
        return _unsupported_compressed(settings)
    for key in ("quant_method", "fmt", "weight_block_size"):
        value = settings.get(key, FP8_CONFIG[key]) if isinstance(settings, dict) else settings
        if value != FP8_CONFIG[key]:
            other = f" or {COMPRESSED!r}" if key == "quant_method" else ""
            return f"quantization_config.{key} = {value!r} in config.json; only {FP8_CONFIG[key]!r}{other} is supported"
    return None


def _unsupported_compressed(settings: Mapping[str, Any]) -> str | None:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return f"quantization_config.config_groups = {groups!r} in config.json; {COMPRESSED} lists its schemes there"
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        where = f"quantization_config.config_groups.{name} in config.json"
        if not isinstance(weights, dict):
            return f"{where} describes no weights"
        layout = group.get("format") or settings.get("format")
        kind = (layout, weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy"))
        if kind == ("int-quantized", "int", 8, "channel"):
            if not weights.get("symmetric", True):
                return f"{where}: asymmetric int8 is not supported, only symmetric"
        elif kind != ("pack-quantized", "int", 4, "group"):
            shown = ", ".join(map(str, kind))
            return (
                f"{where}: ({shown}) is not supported, only (int-quantized, int, 8, channel) and (pack-quantized, "
                "int, 4, group)"
            )
        if weights.get("actorder"):
            return f"{where}: actorder = {weights['actorder']!r} is not supported: columns have to stand in order"
    return None


def unlike_schemes(data: Mapping[str, Any], weights: Mapping[str, Weight]) -> Iterator[str]:
    """One line for each int4 weight that no scheme of `config.json` is of: by the columns that share a
    scale, or as all schemes have zeros and it has none."""
    settings = data.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != COMPRESSED or unsupported(data):
        return
    schemes = [group["weights"] for group in settings["config_groups"].values() if group["weights"]["num_bits"] == 4]
    sizes = {scheme.get("group_size") for scheme in schemes}
    have_zeros = bool(schemes) and not any(scheme.get("symmetric", True) for scheme in schemes)
    for weight in weights.values():
        scale = weight.parts.get(SCALES["int4"])
        if weight.format != "int4" or scale is None or len(scale.shape) != 2 or not scale.shape[1]:
            continue
        size = weight.shape[1] // scale.shape[1]
        if size not in sizes:
            said = ", ".join(sorted(map(str, sizes)))
            yield f"mis-shaped: {scale.name} is of {size} columns each, config.json has group_size = {said}"
        if have_zeros and weight.zero is None:
            yield f"missing: {weight.name}{ZERO}, as config.json says symmetric = false"


def describe(weights: Mapping[str, Weight]) -> dict[str, Any] | None:
    """`quantization_config` of a checkpoint with these weights; None where none is quantised."""
    linear = {
        name.removesuffix(".weight"): weight
        for name, weight in weights.items()
        if len(weight.shape) == 2 and not name.endswith("embed_tokens.weight")
    }
    packed = {name: weight for name, weight in linear.items() if weight.format}
    if not packed:
        return None
    format = next(iter(packed.values())).format
    if format == "fp8":
        return dict(FP8_CONFIG)
    symmetric = all(weight.zero is None for weight in packed.values())
    sizes = {name: weight.shape[1] // weight.scale.shape[1] for name, weight in packed.items()}
    groups = _targets(sizes if format == "int4" else dict.fromkeys(sizes, 0))
    return {
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": _scheme(format, size, symmetric)}
            for i, (size, targets) in enumerate(groups)
        },
        "format": _LAYOUTS[format],
        "ignore": sorted(linear.keys() - packed.keys()),
        "quant_method": COMPRESSED,
        "quantization_status": "compressed",
    }


def _scheme(format: str, size: int, symmetric: bool) -> dict[str, Any]:
    own = {"strategy": "channel"} if format == "int8" else {"strategy": "group", "group_size": size}
    return {"num_bits": _BITS[format], "type": "int", "symmetric": symmetric, "dynamic": False, **own}


def _targets(packed: Mapping[str, int]) -> list[tuple[int, list[str]]]:
    """(columns per scale, targets): the class of all linear layers for the most frequent number, and for others
    patterns of names, which count before the class, or names, which count before patterns."""
    usual = Counter(packed.values()).most_common(1)[0][0]
    sizes: dict[str, set[int]] = {}
    for name, size in packed.items():
        sizes.setdefault(_pattern(name), set()).add(size)
    others: dict[int, set[str]] = {}
    for name, size in packed.items():
        if size != usual:
            pattern = _pattern(name)
            others.setdefault(size, set()).add(name if len(sizes[pattern]) > 1 else pattern)
    return [(usual, ["Linear"]), *((size, sorted(targets)) for size, targets in sorted(others.items()))]


def _pattern(name: str) -> str:
    """The names that differ from this one in their numbers alone."""
    return "re:^" + _NUMBER.sub(r"\\d+", name.replace(".", r"\.")) + "$"
