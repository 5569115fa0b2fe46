import pytest
import torch
from train.tiny import make_batch, random_sequences

from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.transformer import build_model
from kogia.train.estimate import train_memory
from kogia.train.loss import LossWeights, supervised_loss

SIZES = {"vocab_size": 64, "dim": 64, "num_layers": 3, "ffn_dim": 128}
MODELS = {
    "mla, experts, mtp": ModelConfig(**SIZES, moe=MoEConfig(num_experts=16, topk=4, expert_dim=32), num_mtp_layers=1),
    "mla with compressed queries": ModelConfig(**SIZES, attention=MLAConfig(q_lora_rank=32), moe=None),
    "gqa, dense": ModelConfig(**SIZES, attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16), moe=None),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_activation_estimate_is_near_what_autograd_really_keeps(name):
    model = build_model(MODELS[name])
    batch = make_batch(random_sequences([64] * 16, vocab=64))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = supervised_loss(model, batch, LossWeights(mtp=0.3, balance=1e-4))
    assert loss.total.requires_grad
    estimate = train_memory(MODELS[name], 1024).activations
    assert sum(kept.values()) == pytest.approx(estimate, rel=0.15)


def test_weights_gradients_and_moments_are_sixteen_bytes_per_parameter():
    config = MODELS["mla, experts, mtp"]
    memory = train_memory(config, 1024)
    parameters = sum(p.numel() for p in build_model(config).parameters())
    assert memory.weights + memory.gradients + memory.optimizer == 16 * parameters
    assert memory.total == 16 * parameters + memory.activations + memory.temporaries
