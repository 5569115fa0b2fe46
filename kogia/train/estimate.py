"""How much memory one process needs to train, before anything is built. Torch-free."""

from dataclasses import dataclass

from kogia.model.config import ModelConfig

LOGIT_CHUNK = 1 << 20  # logits held at a time by ops/logprob.py


@dataclass(frozen=True)
class TrainMemory:
    """Bytes in float32."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What backward keeps of one micro-batch."""
    temporaries: int
    """Buffers of single operations and gaps between blocks: a third of the activations, as measured on a CPU."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporaries


def train_memory(model: ModelConfig, batch_tokens: int) -> TrainMemory:
    """Estimate for float32 weights, gradients, two AdamW moments, and what backward keeps of one micro-batch."""
    params = 4 * (model.num_params() + model.num_mtp_params())
    layers = range(model.num_layers + model.num_mtp_layers)
    floats = sum(_layer_floats(model, layer) for layer in layers) + 6 * model.dim * (1 + model.num_mtp_layers)
    activations = 4 * floats * batch_tokens
    return TrainMemory(params, params, 2 * params, activations, activations // 3 + 12 * LOGIT_CHUNK)


def _layer_floats(model: ModelConfig, layer: int) -> int:
    """Numbers per token that the backward pass of one layer keeps."""
    dim, attention, moe = model.dim, model.attention, model.moe
    if attention.kind == "mla":
        heads = attention.num_heads * (2 * attention.qk_head_dim + 2 * attention.v_head_dim)
        kept = heads + 2 * attention.cache_row + 2 * (attention.q_lora_rank or 0)
    else:
        kept = attention.head_dim * (2 * attention.num_heads + 2 * attention.num_kv_heads)
    kept += 5 * dim
    if moe is None or not model.is_moe_layer(layer):
        return kept + 4 * model.ffn_dim
    routed = moe.topk * (2 * dim + 4 * moe.expert_dim)
    return kept + routed + 4 * moe.num_shared_experts * moe.expert_dim + 4 * moe.num_experts + 2 * dim
