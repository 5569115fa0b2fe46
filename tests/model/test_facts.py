import pytest

from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.model.costs import Component
from kogia.model.facts import architecture, component_name

RANKS = "MLA, 4 heads; query ranks 8 to 48 by layer, key and value latent 32"
UNEVEN = YarnConfig(mscale_all_dim=0.5)


@pytest.mark.parametrize(
    "attention, key, words",
    [
        (MLAConfig(), "attention", "MLA, 4 heads; direct queries, key and value latent 32"),
        (MLAConfig(q_lora_rank=1536), "attention", "MLA, 4 heads; query rank 1,536, key and value latent 32"),
        (MLAConfig(q_lora_ranks=(48, 8, 16, 24)), "attention", RANKS),
        (GQAConfig(qkv_bias=True), "head width", "32; bias on query, key and value"),
        (GQAConfig(qk_norm=True), "head width", "32; queries and keys normalised"),
        (GQAConfig(), "head width", "32"),
        (MLAConfig(rope_scaling=YarnConfig()), "rotary", "base 10,000; YaRN x 40 over 4,096, mscale 1"),
        (MLAConfig(rope_scaling=UNEVEN), "rotary", "base 10,000; YaRN x 40 over 4,096, mscale 1 / 0.5"),
    ],
)
def test_attention_is_told_in_words(attention, key, words):
    assert architecture(ModelConfig(attention=attention))[key] == words


@pytest.mark.parametrize(
    "moe, words",
    [
        (None, "feed-forward"),
        (MoEConfig(), "dense layers, shared experts, router"),
        (MoEConfig(num_dense_layers=0), "shared experts, router"),
        (MoEConfig(num_shared_experts=0), "dense layers, router"),
        (MoEConfig(num_dense_layers=0, num_shared_experts=0), "router"),
    ],
)
def test_what_every_token_passes_is_named_after_what_is_there(moe, words):
    assert component_name(Component.FEED_FORWARD, moe) == words


def test_every_component_has_words_of_its_own():
    assert len({component_name(component, MoEConfig()) for component in Component}) == len(Component)
