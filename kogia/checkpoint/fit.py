"""Whether files can belong to a model at all, from sizes alone: before a header is parsed or a model built whose size a
stranger's `config.json` decides. Torch-free.

The bounds are wide. What differs a little is compared tensor by tensor later, and told with more detail.
"""

import math
import re
from collections.abc import Mapping

from kogia.checkpoint.tensorfile import MAX_HEADER, StoredTensor
from kogia.model.config import ModelConfig
from kogia.model.costs import num_mtp_params, num_params

Stored = Mapping[str, StoredTensor]

LAYER = re.compile(r"^model\.layers\.(\d{1,9})\.")
_SPARE_LAYERS = 8  # prediction modules that config.json may not announce
_LAYER_TENSORS = 96
_ENTRY_BYTES = 400  # a tensor's name, type, shape and offsets; about 150 in published files
_METADATA_BYTES = 1_000_000


def max_header(config: ModelConfig) -> int:
    """Bytes that the header of a weight file of this model, or the index of its files, can need at most."""
    experts = 0 if config.moe is None else config.moe.num_experts + config.moe.num_shared_experts
    layers = config.num_cache_layers + _SPARE_LAYERS
    tensors = layers * (_LAYER_TENSORS + 12 * experts)  # an expert has three matrices, in int4 of four parts each
    return min(MAX_HEADER, _METADATA_BYTES + _ENTRY_BYTES * tensors)


def misfit(config: ModelConfig, stored: Stored) -> str | None:
    """How the model is out of all proportion to the files; None where it could be theirs."""
    layers = len({found[1] for name in stored if (found := LAYER.match(name))})
    if config.num_cache_layers > 2 * layers + 100:
        return f"num_hidden_layers = {config.num_layers:,}, but {layers:,} layers are stored"
    if config.moe is not None:
        matrices = 3 * config.moe.num_experts * sum(map(config.is_moe_layer, range(config.num_cache_layers)))
        if matrices > 16 * len(stored) + 10_000:
            return f"n_routed_experts = {config.moe.num_experts:,}, but {len(stored):,} tensors are stored in all"
    params = num_params(config) + num_mtp_params(config)
    numbers = sum(math.prod(t.shape) for t in stored.values())
    if params > 1000 * numbers + 2**32:
        return f"its sizes make {params:,} parameters, but {numbers:,} numbers are stored"
    return None
