"""What the stored tensors of a model directory say by themselves. Torch-free."""

from kogia.checkpoint.fit import LAYER, Stored
from kogia.checkpoint.tensorfile import StoredTensor
from kogia.model.config import ModelConfig

_SAMPLE = 1 << 16
_NUM_SAMPLES = 16


def num_mtp_modules(stored: Stored) -> int:
    """Multi-token-prediction modules among the tensors: each has one `eh_proj`."""
    return sum(name.endswith(".eh_proj.weight") for name in stored)


def unused_mtp(config: ModelConfig, stored: Stored) -> list[str]:
    """Tensors of multi-token-prediction modules behind those that the model has."""
    first = config.num_cache_layers
    return [
        name
        for name in stored
        if (found := LAYER.match(name)) and int(found[1]) >= first and f"{found[0]}eh_proj.weight" in stored
    ]


def same_samples(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors agree in shape, dtype and some samples of their bytes."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    step = max(1, a.num_rows // _NUM_SAMPLES)
    return all(_sample(a, row) == _sample(b, row) for row in range(0, a.num_rows, step))


def _sample(tensor: StoredTensor, row: int) -> bytearray:
    data = bytearray(min(_SAMPLE, (tensor.num_rows - row) * tensor.row_bytes))
    tensor.read_into(row, memoryview(data))
    return data


# How the tensors are stored -------------------------------------------------------------------------------------------
