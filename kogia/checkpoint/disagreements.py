"""Where the files of a model directory contradict its `config.json`, from headers alone.

The loader refuses what it cannot use; this says everything that is odd, with the field that explains it where there is
one. Tensors that differ only in their numbers (layer, expert) share a line.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from kogia.checkpoint.fit import LAYER, Stored, misfit
from kogia.checkpoint.quantisation import COMPRESSED, unlike_schemes, unsupported, weights_of
from kogia.checkpoint.stored import num_mtp_modules, same_samples
from kogia.model.config import ModelConfig

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d{1,9})\.")


def disagreements(config: ModelConfig, data: Mapping[str, Any], stored: Stored) -> list[str]:
    """One line each; `data` is config.json as it is. Imports torch, to know the tensors that the model has."""
    from kogia.checkpoint.layout import problems
    from kogia.model.transformer import empty_model

    lines = [*_sizes(config, stored), *_mtp(config, stored), *_head(config, stored)]
    lines += [*_quantisation(data, stored), *_dtypes(data, stored)]
    if reason := misfit(config, stored):
        return [*lines, f"config.json describes another model than the files: {reason}"]
    # what is announced but not there at all has its line above
    present = replace(config, num_mtp_layers=min(config.num_mtp_layers, _extra_layers(config, stored)))
    return lines + grouped(problems(empty_model(present), stored))


def grouped(lines: Iterable[str]) -> list[str]:
    """One line for all that differ only in the numbers of layers and experts, in the order of those numbers."""
    groups: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        groups[_NUMBER.sub(".*", line)].append(line)
    firsts = [(min(group, key=_in_order), len(group) - 1) for group in groups.values()]
    return [
        f"{line}, and {more:,} more like it" if more else line
        for line, more in sorted(firsts, key=lambda first: _in_order(first[0]))
    ]


def _in_order(line: str) -> tuple[tuple[int, str], ...]:
    """A key by which layer 10 comes after layer 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in line.split("."))


# Fields that the tensors contradict -----------------------------------------------------------------------------------


def _sizes(config: ModelConfig, stored: Stored) -> Iterator[str]:
    embedding = stored.get("model.embed_tokens.weight")
    if embedding is not None and len(embedding.shape) == 2:
        rows, width = embedding.shape
        if rows != config.vocab_size:
            yield f"vocab_size = {config.vocab_size:,}, but the embedding has {rows:,} rows"
        if width != config.dim:
            yield f"hidden_size = {config.dim:,}, but the embedding is {width:,} wide"
    layers = _count(LAYER, stored)
    if layers < config.num_layers:
        yield f"num_hidden_layers = {config.num_layers}, but {layers} layers are stored"
    experts = _count(_EXPERT, stored)
    if config.moe is not None and experts not in (0, config.moe.num_experts):
        yield f"n_routed_experts = {config.moe.num_experts}, but {experts} experts per layer are stored"
    elif config.moe is None and experts:
        yield f"the model is dense, but {experts} experts per layer are stored"


def _count(pattern: re.Pattern[str], stored: Stored) -> int:
    return max((int(found[1]) + 1 for name in stored if (found := pattern.search(name))), default=0)


def _extra_layers(config: ModelConfig, stored: Stored) -> int:
    return max(0, _count(LAYER, stored) - config.num_layers)


def _mtp(config: ModelConfig, stored: Stored) -> Iterator[str]:
    announced, extra = config.num_mtp_layers, _extra_layers(config, stored)
    modules = num_mtp_modules(stored)
    if modules < min(announced, extra):
        yield f"num_nextn_predict_layers = {announced}, but {modules} of the {extra} layers behind the last are such"
    elif extra < announced:
        yield f"num_nextn_predict_layers = {announced}, but {extra or 'no'} multi-token-prediction module is stored"
    elif extra > announced and modules:
        yield f"num_nextn_predict_layers = {announced}, but {modules} multi-token-prediction module(s) are stored"
    elif extra > announced:
        yield f"num_hidden_layers = {config.num_layers}, but {config.num_layers + extra} layers are stored"


def _head(config: ModelConfig, stored: Stored) -> Iterator[str]:
    head, embedding = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if "lm_head.weight" not in weights_of(stored)[0] and embedding is not None and not config.tie_embeddings:
        yield "tie_word_embeddings = false, but no lm_head.weight is stored: is the head tied?"
    elif config.tie_embeddings and head is not None and embedding is not None and not same_samples(head, embedding):
        yield "tie_word_embeddings = true, but the stored lm_head.weight differs from the embedding: it is the head"


def _quantisation(data: Mapping[str, Any], stored: Stored) -> Iterator[str]:
    announced = data.get("quantization_config")
    formats = Counter(weight.format for weight in weights_of(stored)[0].values() if weight.format)
    names = {format: format.replace("fp", "FP") for format in formats}
    if announced and not formats:
        method = announced.get("quant_method") if isinstance(announced, dict) else announced
        yield f"quantization_config announces {method!r}, but no tensor is quantised"
    for format, count in formats.items():
        if not announced:
            yield f"{count:,} tensors are {names[format]}, but config.json has no quantization_config"
        elif isinstance(announced, dict) and (announced.get("quant_method") == COMPRESSED) != (format != "fp8"):
            method = announced.get("quant_method")
            yield f"{count:,} tensors are {names[format]}, but quantization_config announces {method!r}"
    if reason := unsupported(data):
        yield reason
    else:
        yield from grouped(unlike_schemes(data, weights_of(stored)[0]))


def _dtypes(data: Mapping[str, Any], stored: Stored) -> Iterator[str]:
    """Dense matrices of another type than announced; vectors are often kept wider."""
    announced = data.get("dtype", data.get("torch_dtype"))
    wanted = _DTYPE_NAMES.get(str(announced))
    odd = Counter(
        weight.data.dtype
        for weight in weights_of(stored)[0].values()
        if len(weight.shape) > 1 and not weight.format and weight.data.dtype != wanted
    )
    if wanted is not None and odd:
        counts = ", ".join(f"{count:,} {'matrix is' if count == 1 else 'matrices are'} {t}" for t, count in odd.items())
        yield f"torch_dtype = {announced}, but {counts}"
