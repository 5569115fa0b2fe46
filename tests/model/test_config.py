from dataclasses import replace

import pytest

from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.model.mla import softmax_scale


def test_softmax_scales_are_those_of_the_released_models():
    v3 = MLAConfig(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=YarnConfig())
    v2 = replace(v3, rope_scaling=YarnConfig(mscale=0.707, mscale_all_dim=0.707))
    assert softmax_scale(v3) == pytest.approx(0.1352338, abs=1e-7)
    assert softmax_scale(v2) == pytest.approx(0.1147214, abs=1e-7)
    assert softmax_scale(replace(v3, rope_scaling=None)) == pytest.approx(0.0721688, abs=1e-7)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(vocab_size=0), "vocab_size = 0"),
        (dict(num_layers=-1), "num_layers = -1"),
        (dict(num_mtp_layers=-1), "num_mtp_layers = -1"),
        (dict(moe=MoEConfig(num_experts=4, topk=5)), "topk = 5.*num_experts = 4"),
        (dict(moe=MoEConfig(num_experts=4, topk=0)), "topk = 0"),
        (dict(moe=MoEConfig(num_experts=6, topk=1, num_groups=4)), "num_groups = 4"),
        (dict(moe=MoEConfig(num_experts=8, topk=1, num_groups=2, topk_groups=3)), "topk_groups = 3"),
        (dict(moe=MoEConfig(num_experts=8, topk=3, num_groups=4, topk_groups=1)), "topk = 3.*1 group"),
        (dict(attention=MLAConfig(qk_rope_head_dim=3)), "qk_rope_head_dim = 3.*even"),
        (dict(attention=MLAConfig(num_heads=0)), "num_heads = 0"),
        (dict(attention=GQAConfig(num_heads=4, num_kv_heads=3)), "num_heads = 4.*num_kv_heads = 3"),
        (dict(attention=GQAConfig(head_dim=5)), "head_dim = 5.*even"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**change)
