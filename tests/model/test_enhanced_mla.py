"""The options beyond the published latent attention: query ranks by layer, nested latent ranks, FP8 cache rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kogia.checkpoint.hf import load_model, save_model
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.costs import num_params
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model
from kogia.train.loss import nested_ranks

MLA = MLAConfig(num_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
CONFIG = ModelConfig(
    vocab_size=61, dim=32, num_layers=3, ffn_dim=64, attention=MLA, moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
    num_mtp_layers=1, max_position=128, init_std=0.2, eos_id=60,
)  # fmt: skip
IDS = torch.randint(60, (24,), generator=torch.Generator().manual_seed(4)).tolist()


def engine_logprobs(model: Transformer, start: int = 6, **options) -> list[tuple[int, float]]:
    """(token, log-probability) that the engine samples behind every prefix of IDS."""
    found = []
    for end in range(start, len(IDS)):
        engine = Engine(model, None, EngineConfig(block_size=4, num_blocks=40, prefix_cache=False, **options))
        params = SamplingParams(temperature=1.0, max_tokens=1, logprobs=True, seed=0)
        (completion,) = engine.generate([IDS[:end]], params)[0]
        found.append((completion.token_ids[0], completion.logprobs[0]))
    return found


@torch.no_grad()
def model_logprobs(logits: torch.Tensor, tokens: list[tuple[int, float]], start: int = 6) -> list[float]:
    return [logits[start - 1 + i].log_softmax(-1)[token].item() for i, (token, _) in enumerate(tokens)]


def test_each_layer_has_its_own_query_rank_and_counts_for_it(tmp_path):
    config = replace(CONFIG, attention=replace(MLA, q_lora_rank=None, q_lora_ranks=(4, 8, 12)))
    model = build_model(config)
    assert [layer.self_attn.q_a_proj.out_features for layer in model.model.layers] == [4, 8, 12, 12]
    main = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("model.layers.3."))
    assert num_params(config) == main
    save_model(model, tmp_path)  # no published format has this: it must not look like one
    assert load_model(tmp_path).config == config
    with pytest.raises(ValueError, match="must have one for each of the 3 layers"):
        replace(CONFIG, attention=replace(MLA, q_lora_ranks=(4, 8)))


def test_equal_ranks_by_layer_are_the_published_form():
    ranks = replace(CONFIG, attention=replace(MLA, q_lora_rank=None, q_lora_ranks=(16, 16, 16)))
    batch = pack([IDS])
    torch.testing.assert_close(build_model(ranks)(batch), build_model(CONFIG)(batch), rtol=0, atol=0)
    assert num_params(ranks) == num_params(CONFIG)


@torch.no_grad()
def test_a_smaller_rank_is_the_model_whose_unused_columns_are_zero():
    model = build_model(CONFIG)
    batch = pack([IDS[:9], IDS])
    got = model(batch, step=model.step(batch, latent_ranks=torch.tensor([5, 16])))
    torch.testing.assert_close(got[9:], model(batch)[9:])
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.weight[:, 5:] = 0
    torch.testing.assert_close(got[:9], model(batch)[:9], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("indexer", [None, IndexerConfig(8, 16, 6)], ids=["dense", "sparse"])
def test_one_rank_for_all_stores_narrow_rows_and_computes_the_model_at_that_rank(indexer):
    model = build_model(replace(CONFIG, attention=replace(MLA, indexer=indexer)), seed=1).eval()
    engine = Engine(model, None, EngineConfig(block_size=4, num_blocks=40, rank_by_context=((0, 5),)))
    assert engine.runner.cache.rows.shape[-1] == 5 + 8 + (16 if indexer else 0)
    tokens = engine_logprobs(model, rank_by_context=((0, 5),))
    batch = pack([IDS])
    logits = model.logits(model(batch, step=model.step(batch, latent_ranks=torch.tensor([5]))))
    np.testing.assert_allclose([value for _, value in tokens], model_logprobs(logits, tokens), atol=2e-5)


@torch.no_grad()
def test_the_rank_of_a_query_follows_its_context():
    """One dense layer, so that the two ranks can be composed by hand: queries 0..9 at rank 16, later ones at 6."""
    config = replace(CONFIG, num_layers=1, moe=None, num_mtp_layers=0)
    model = build_model(config, seed=2).eval()
    tokens = engine_logprobs(model, rank_by_context=((0, 16), (11, 6)))
    batch = pack([IDS])
    layer = model.model.layers[0]
    x = model.model.embed_tokens(batch.token_ids)
    attended = []
    for rank in (16, 6):
        step = model.step(batch, latent_ranks=torch.tensor([rank]))
        attended.append(layer.self_attn(layer.input_layernorm(x), step))
    late = (batch.positions + 1 >= 11)[:, None]
    h, normed = layer.post_attention_layernorm(x, torch.where(late, attended[1], attended[0]))
    logits = model.logits(h + layer.mlp(normed, step))
    np.testing.assert_allclose([value for _, value in tokens], model_logprobs(logits, tokens), atol=2e-5)


@torch.no_grad()
def test_an_fp8_cache_is_smaller_and_close():
    model = build_model(replace(CONFIG, init_std=0.1), seed=1).eval()
    exact, rounded = (engine_logprobs(model, cache_dtype=kind) for kind in ("auto", "fp8"))
    logits = model.logits(model(pack([IDS])))
    want = model_logprobs(logits, rounded)
    np.testing.assert_allclose([value for _, value in exact], model_logprobs(logits, exact), atol=2e-5)
    errors = np.abs(np.array([value for _, value in rounded]) - want)
    assert 0 < errors.max() < 0.1
    caches = {
        kind: Engine(model, None, EngineConfig(cache_dtype=kind, cache_memory_bytes=200_000)).runner.cache
        for kind in ("auto", "fp8")
    }
    assert caches["fp8"].rows.dtype == torch.uint8
    # 16 + 8 float32 numbers against 16 bytes, one scale and 8 bfloat16 numbers
    assert caches["fp8"].num_blocks == pytest.approx(caches["auto"].num_blocks * 96 / 36, rel=0.05)


def test_nested_ranks_are_full_for_half_of_the_sequences_and_even_above_the_smallest():
    torch.manual_seed(0)
    model = build_model(CONFIG)
    ranks = nested_ranks(model, pack([[1]] * 4000), 4).tolist()
    counts = {rank: ranks.count(rank) for rank in range(4, 17)}
    assert sum(counts.values()) == 4000
    assert counts.pop(16) == pytest.approx(2000 + 2000 / 13, rel=0.1)
    assert all(count == pytest.approx(2000 / 13, rel=0.35) for count in counts.values())


def test_options_that_do_not_fit_the_model_are_refused():
    model = build_model(CONFIG)
    with pytest.raises(ValueError, match=r"latent rank 40: must lie in 1\.\.kv_lora_rank = 16"):
        Engine(model, None, EngineConfig(rank_by_context=((0, 40),)))
    for table in (((5, 8),), ((0, 8), (4, 12)), ((0, 8), (0, 4))):
        with pytest.raises(ValueError, match="must start at 0 tokens"):
            EngineConfig(rank_by_context=table)
    student = build_model(replace(CONFIG, attention=GQAConfig(), moe=None, num_mtp_layers=0))
    with pytest.raises(ValueError, match="need latent attention"):
        Engine(student, None, EngineConfig(cache_dtype="fp8"))
    with pytest.raises(ValueError, match="nested_rank_min = 17"):
        nested_ranks(model, pack([[1]]), 17)
