"""Logits equal those of transformers in both directions, on tiny random models of every supported kind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kogia.checkpoint.hf import load_model, save_model
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.model.hf_config import config_from_hf
from kogia.model.hf_export import published_type
from kogia.model.packed import pack
from kogia.model.presets import preset
from kogia.model.routing import Routing
from kogia.model.transformer import Transformer, build_model
from kogia.text.tokenizer import train_bpe

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

from parity import (  # noqa: E402  # fmt: skip
    CASES,
    LIMIT,
    TOKENS,
    build_theirs,
    cached_logits,
    draw,
    packed_logits,
    relative_difference,
    theirs_logits,
)

ALL = [(architecture, case) for architecture, cases in CASES.items() for case in cases]


def names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as handle:
        return set(handle.keys())


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "case"), ALL, ids=lambda value: value)
def test_logits_are_those_of_transformers_and_back(architecture, case, tmp_path):
    (tmp_path / "theirs").mkdir()
    theirs = build_theirs(architecture, case, tmp_path / "theirs")
    want = theirs_logits(theirs)
    assert want.abs().max() > 0.1
    ours = load_model(tmp_path / "theirs")
    assert relative_difference(packed_logits(ours), want) <= LIMIT
    assert relative_difference(cached_logits(ours), want) <= LIMIT
    save_model(ours, tmp_path / "ours")
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")
    if architecture == "Deepseek":  # no class of theirs reads it
        torch.testing.assert_close(packed_logits(load_model(tmp_path / "ours")), packed_logits(ours), rtol=0, atol=0)
        return
    eager = {"experts_implementation": "eager"} if hasattr(theirs.config, "moe_intermediate_size") else {}
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, **eager)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(theirs_logits(again), want, rtol=0, atol=0)


def trained(config: ModelConfig, steps: int = 120) -> tuple[Transformer, torch.Tensor]:
    """A model that has learnt four fixed sequences by heart, so that bfloat16 rounding cannot flip its choices."""
    model = build_model(config, seed=0)
    text = torch.randint(2, config.vocab_size, (4, 80), generator=torch.Generator().manual_seed(3))
    batch = pack(text.tolist())
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        loss = -model.logprobs(batch).sum() / batch.num_tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, "the test's model must be sure of its tokens"
    return model.eval(), text


SMALL = ModelConfig(
    vocab_size=300, dim=64, num_layers=2, ffn_dim=96, max_position=256, init_std=0.08, moe=None, eos_id=1,
    attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16),
)  # fmt: skip
MOE = MoEConfig(num_experts=4, topk=2, expert_dim=32)
LATENT = MLAConfig(num_heads=4, q_lora_rank=24, kv_lora_rank=24, qk_nope_head_dim=16, v_head_dim=16)
GREEDY = {
    "v3": replace(SMALL, attention=LATENT, moe=MOE),
    "v3.2": replace(SMALL, attention=replace(LATENT, indexer=IndexerConfig(4, 16, 2048)), moe=MOE),
    "v2": replace(SMALL, attention=LATENT, moe=replace(MOE, score="softmax", normalize_topk=False, routed_scale=2.0)),
    "qwen3": replace(SMALL, attention=replace(SMALL.attention, qk_norm=True)),
    "llama": SMALL,
}


@pytest.mark.parametrize("name", GREEDY)
def test_bfloat16_greedy_generations_of_a_trained_model_agree_for_64_tokens(name, tmp_path):
    model, text = trained(GREEDY[name])
    save_model(model.to(torch.bfloat16), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        want = theirs.generate(text[:, :8], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = load_model(tmp_path)
    assert ours.dtype == torch.bfloat16
    engine = Engine(ours, train_bpe(["x"], 263), EngineConfig(block_size=4, num_blocks=200))
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    got = [completions[0].token_ids for completions in engine.generate(text[:, :8].tolist(), params)]
    assert got == want[:, 8:].tolist()
    assert got == text[:, 8:72].tolist()


def test_a_model_of_ours_with_mtp_is_served_by_transformers_without_it(tmp_path):
    attention = MLAConfig(num_heads=3, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    config = ModelConfig(
        vocab_size=50, dim=16, num_layers=2, ffn_dim=24, attention=attention, num_mtp_layers=1,
        moe=MoEConfig(num_experts=4, topk=2, expert_dim=8), max_position=64,
    )  # fmt: skip
    ours = draw(build_model(config))
    save_model(ours, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(theirs_logits(theirs), packed_logits(ours), rtol=0, atol=2e-5)


PLAIN = ModelConfig(vocab_size=40, dim=16, num_layers=2, max_position=64, eos_id=7)
TWINS = {
    "v3": replace(
        PLAIN, attention=MLAConfig(num_heads=2, kv_lora_rank=8,
        rope_scaling=YarnConfig(factor=2.0, original_max_position=32)), moe=MoEConfig(num_experts=4, topk=2),
    ),
    "v3, dense": replace(PLAIN, attention=MLAConfig(num_heads=2, q_lora_rank=4, kv_lora_rank=8), moe=None),
    "v3.2": replace(PLAIN, attention=MLAConfig(q_lora_rank=4, indexer=IndexerConfig(2, 16, 4)), moe=MoEConfig()),
    "v2": replace(
        PLAIN, moe=MoEConfig(score="softmax", normalize_topk=False, num_groups=4, topk_groups=2, routed_scale=16.0)
    ),
    "llama": replace(PLAIN, attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8), moe=None),
    "qwen3": replace(PLAIN, attention=GQAConfig(qk_norm=True), moe=None),
    "qwen3 moe": replace(
        PLAIN, attention=GQAConfig(qk_norm=True),
        moe=MoEConfig(score="softmax", num_shared_experts=0, num_dense_layers=0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_the_saved_config_means_the_same_to_transformers(name, tmp_path):
    config = TWINS[name]
    save_model(build_model(config, dtype=torch.bfloat16), tmp_path / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (theirs.max_position_embeddings, theirs.eos_token_id, theirs.dtype) == (64, 7, torch.bfloat16)
    theirs.save_pretrained(tmp_path / "again")
    data = json.loads((tmp_path / "again" / "config.json").read_text())
    assert data["rope_parameters"]["rope_theta"] == 10000.0
    assert config_from_hf(data) == config


@pytest.mark.parametrize(
    "name",
    "deepseek-r1 deepseek-v3.2 deepseek-v2 deepseek-v2-lite deepseek-moe-16b deepseek-moe-145b deepseek-moe-2b "
    "gshard-2b switch-2b dense-0.2b llama-2-7b llama-3.1-8b qwen2.5-1.5b qwen3-0.6b qwen3-30b-a3b".split(),
)
def test_a_small_twin_of_every_kind_of_preset_runs_trains_and_survives_the_disk(name, tmp_path):
    model = draw(build_model(shrink(preset(name))))
    want = packed_logits(model)
    assert relative_difference(cached_logits(model), want) <= LIMIT
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    torch.testing.assert_close(packed_logits(again), want, rtol=0, atol=0)
    batch, routing = pack(TOKENS.tolist()), Routing(losses=True)
    step = again.step(batch, routing=routing)
    hidden = again(batch, step=step)
    loss = -again.logprobs_from_hidden(hidden, batch)[0].sum()
    for depth in range(again.config.num_mtp_layers):
        hidden = again.mtp_hidden(depth, hidden, batch.token_ids.roll(-1 - depth), step)
        loss = loss + again.mtp_logits(depth, hidden).logsumexp(-1).sum()
    (loss + (routing.indexer_loss() or 0.0)).backward()
    assert [n for n, p in again.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def shrink(config: ModelConfig) -> ModelConfig:
    """The same architecture in miniature: every size small, every switch as it was."""
    a, moe = config.attention, config.moe
    if isinstance(a, MLAConfig):
        indexer = None if a.indexer is None else IndexerConfig(num_heads=5, head_dim=8, topk=8)
        rank = None if a.q_lora_rank is None else 10
        a = replace(
            a, num_heads=4, q_lora_rank=rank, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
            indexer=indexer, rope_scaling=a.rope_scaling and replace(a.rope_scaling, original_max_position=16),
        )  # fmt: skip
    else:
        groups = max(1, 4 * a.num_kv_heads // a.num_heads)
        a = replace(a, num_heads=4, num_kv_heads=groups, head_dim=6)
    if moe is not None:
        experts, topk = max(8, 2 * moe.num_groups), min(moe.topk, 3)
        moe = replace(moe, num_experts=experts, topk=topk, expert_dim=9, num_dense_layers=min(1, moe.num_dense_layers))
    return replace(
        config, vocab_size=50, dim=24, num_layers=3, ffn_dim=40, attention=a, moe=moe, max_position=64,
        bos_id=0, eos_id=1, init_std=0.2,
    )  # fmt: skip


def test_a_model_that_a_published_format_cannot_say_is_saved_under_our_own_name(tmp_path):
    """A head width of its own has no field in DeepSeekMoE's format: other tools would read another model."""
    moe = MoEConfig(score="softmax", normalize_topk=False)
    fits = replace(PLAIN, attention=GQAConfig(num_heads=2, num_kv_heads=2, head_dim=8), moe=moe)
    assert published_type(fits) == "deepseek"
    wide = replace(fits, attention=replace(fits.attention, head_dim=12))
    save_model(build_model(wide), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "kogia"
    assert load_model(tmp_path).config == wide
