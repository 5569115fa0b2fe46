"""Logits equal those of transformers in both directions, on tiny random models of every supported kind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kogia.checkpoint.hf import load_model, save_model
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

TOKENS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
YARN = {"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
YARN |= {"original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
SIZES = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3)
DEEPSEEK = SIZES | dict(
    num_attention_heads=3,
    num_key_value_heads=3,
    q_lora_rank=10,
    kv_lora_rank=12,
    qk_nope_head_dim=7,
    qk_rope_head_dim=4,
    v_head_dim=5,
    moe_intermediate_size=9,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=64,
)
DEEPSEEK_CASES = {
    "v3": dict(n_group=4, topk_group=2),
    "direct queries": dict(q_lora_rank=None),
    "two shared experts, no normalisation": dict(n_shared_experts=2, norm_topk_prob=False),
    "yarn past the original context": dict(rope_parameters=YARN),
    "yarn of v2, groups": dict(
        rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, n_group=4, topk_group=3
    ),
    "yarn with unequal mscales": dict(rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
    "tied, no dense layer, wide experts": dict(
        tie_word_embeddings=True, first_k_dense_replace=0, moe_intermediate_size=16, hidden_size=32
    ),
}


def draw(model: torch.nn.Module) -> torch.nn.Module:
    """Every tensor random: weights large enough to matter, norms around one, biases that change the routing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype.is_floating_point:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.2 * noise)
    return model.eval()


@torch.no_grad()
def logits_of(model: Transformer) -> torch.Tensor:
    return model.logits(model(pack(TOKENS.tolist()))).view(*TOKENS.shape, -1)


@torch.no_grad()
def check_both_ways(theirs, directory: Path) -> Transformer:
    """Load theirs, compare, save ours, let transformers load that, compare again."""
    eager = {}
    if hasattr(theirs.config, "n_routed_experts"):  # its default experts refuse rows that are no multiple of 16 bytes
        eager = {"experts_implementation": "eager"}
        theirs.set_experts_implementation("eager")
    theirs.save_pretrained(directory / "theirs")
    want = theirs(TOKENS).logits
    ours = load_model(directory / "theirs")
    assert want.abs().max() > 0.1
    torch.testing.assert_close(logits_of(ours), want, rtol=0, atol=2e-5)
    save_model(ours, directory / "ours")
    assert names(directory / "ours") == names(directory / "theirs")
    again, info = type(theirs).from_pretrained(directory / "ours", output_loading_info=True, **eager)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(again(TOKENS).logits, want, rtol=0, atol=0)
    return ours


def names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as handle:
        return set(handle.keys())


@pytest.mark.parametrize("case", DEEPSEEK_CASES)
def test_deepseek_v3_logits_are_those_of_transformers_and_back(case, tmp_path):
    config = transformers.DeepseekV3Config(**(DEEPSEEK | DEEPSEEK_CASES[case]))
    check_both_ways(draw(transformers.DeepseekV3ForCausalLM(config)), tmp_path)
    assert "model.layers.2.mlp.experts.7.up_proj.weight" in names(tmp_path / "ours")


@pytest.mark.parametrize("tied", [False, True])
def test_llama_logits_are_those_of_transformers_and_back(tied, tmp_path):
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=6, num_key_value_heads=2, head_dim=6, tie_word_embeddings=tied, rope_theta=500.0
    )
    check_both_ways(draw(transformers.LlamaForCausalLM(config)), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_logits_are_those_of_transformers_and_back(tied, tmp_path):
    config = transformers.Qwen2Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=tied, rms_norm_eps=1e-5
    )
    ours = check_both_ways(draw(transformers.Qwen2ForCausalLM(config)), tmp_path)
    assert ours.model.layers[0].self_attn.q_proj.bias.abs().sum() > 0


def test_a_model_of_ours_with_mtp_is_served_by_transformers_without_it(tmp_path):
    attention = MLAConfig(num_heads=3, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    config = ModelConfig(
        vocab_size=50, dim=16, num_layers=2, ffn_dim=24, attention=attention, num_mtp_layers=1,
        moe=MoEConfig(num_experts=4, topk=2, expert_dim=8), max_position=64,
    )  # fmt: skip
    ours = draw(build_model(config))
    save_model(ours, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, logits_of(ours), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "attention",
    [
        MLAConfig(num_heads=2, kv_lora_rank=8, rope_scaling=YarnConfig(factor=2.0, original_max_position=32)),
        GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    ],
    ids=["mla", "gqa"],
)
def test_the_saved_config_means_the_same_to_transformers(attention, tmp_path):
    moe = MoEConfig(num_experts=4, topk=2, expert_dim=8) if isinstance(attention, MLAConfig) else None
    config = ModelConfig(vocab_size=40, dim=16, num_layers=1, attention=attention, moe=moe, max_position=64, eos_id=7)
    save_model(build_model(config, dtype=torch.bfloat16), tmp_path / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (theirs.max_position_embeddings, theirs.eos_token_id, theirs.dtype) == (64, 7, torch.bfloat16)
    theirs.save_pretrained(tmp_path / "again")
    data = json.loads((tmp_path / "again" / "config.json").read_text())
    assert data["rope_parameters"]["rope_theta"] == 10000.0
    from kogia.model.hf_config import config_from_hf

    assert config_from_hf(data) == config
