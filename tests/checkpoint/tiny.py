"""Tiny models and checkpoints, and ways to change the files of one."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.quantised import packable
from kogia.model.transformer import Transformer, build_model

MLA = MLAConfig(num_heads=3, q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=7)
CONFIG = ModelConfig(
    vocab_size=19, dim=10, num_layers=2, ffn_dim=14, attention=MLA, num_mtp_layers=1,
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=6, num_groups=2, topk_groups=1, routed_scale=2.5),
)  # fmt: skip
DENSE = replace(CONFIG, attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=4), moe=None, num_mtp_layers=0)
# widths over and under a block of 128, and no multiple of it
BLOCKS = replace(
    CONFIG, dim=144, ffn_dim=272,
    attention=replace(MLA, q_lora_rank=130, kv_lora_rank=40, num_heads=2, v_head_dim=70),
    moe=replace(CONFIG.moe, expert_dim=136),
)  # fmt: skip
# widths of which int4 takes groups of 128, 64 and 32
GROUPS = replace(
    CONFIG, vocab_size=50, dim=64, ffn_dim=256,
    attention=replace(MLA, num_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, v_head_dim=16),
    moe=replace(CONFIG.moe, expert_dim=32, num_shared_experts=1),
)  # fmt: skip


def tiny(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """A random model whose router biases are not zero."""
    model = build_model(config, seed=seed, dtype=dtype)
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    return model


def tiny_packed(format: str, config: ModelConfig = GROUPS, **options: bool) -> Transformer:
    """A random bfloat16 model with all weights that the format is for packed."""
    model = tiny(config, torch.bfloat16)
    for _, layer in packable(model, format):
        layer.pack(format, **options)
    return model


def tiny_fp8(config: ModelConfig = BLOCKS, *, power_of_two: bool = False) -> Transformer:
    """A random bfloat16 model with every matrix of V3's kind in FP8."""
    return tiny_packed("fp8", config, power_of_two=power_of_two)


def assert_same(ours: Transformer, theirs: Transformer) -> None:
    assert ours.config == theirs.config
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        other = theirs.state_dict()[name]
        assert tensor.dtype == other.dtype, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


def edit(directory: Path, **fields: object) -> None:
    """Change fields of config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by the format's own library."""
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def rewrite(directory: Path, change) -> None:
    """Apply `change` to the stored tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path, parts: int = 3) -> Path:
    """Deal the weights out over several files in turn, so that FP8 scales part from their weights; gives the index."""
    tensors = load_file(directory / "model.safetensors")
    weight_map = {name: f"model-{i % parts:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index
