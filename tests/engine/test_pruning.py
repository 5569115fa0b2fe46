"""Pruned caches against a plain loop over lists of rows, and against themselves with the work cut in other ways."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from kogia.config import parse_args
from kogia.engine.config import EngineConfig, PruneConfig
from kogia.engine.engine import Engine
from kogia.engine.request import Completion, SamplingParams
from kogia.inference.config import GenerateConfig
from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model

MLA = MLAConfig(num_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
DENSE = ModelConfig(
    vocab_size=61, dim=32, num_layers=3, ffn_dim=64, attention=MLA, moe=None, num_mtp_layers=1, max_position=128,
    init_std=0.2, eos_id=60,
)  # fmt: skip
INDEXER = IndexerConfig(num_heads=16, head_dim=16, topk=5)  # so many heads: no ties at 0
CONFIGS = {
    "dense": DENSE,
    "moe": replace(DENSE, moe=MoEConfig(num_experts=4, topk=2, expert_dim=16)),
    "sparse": replace(DENSE, attention=replace(MLA, indexer=INDEXER)),
}
PRUNE = PruneConfig(first_budget=12, last_budget=6, recent=3, slack=4)
BUDGETS = [12, 9, 6]
PROMPTS = [list(range(2, 32)), [0, 5, 9, 11, 3], [7] * 17]


def build(name: str) -> Transformer:
    """A random model whose attention and logits lie far enough apart that rounding decides nothing."""
    model = build_model(CONFIGS[name], seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request) -> Transformer:
    return build(request.param)


@pytest.fixture(scope="module")
def dense() -> Transformer:
    return build("dense")


def engine(model: Transformer, prune: PruneConfig | None = PRUNE, **options) -> Engine:
    options = {"block_size": 4, "num_blocks": 200, "prefix_cache": False, **options}
    return Engine(model, None, EngineConfig(**options, prune=prune))


def params(**options) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 16, "seed": 7, "logprobs": True, "ignore_eos": True, **options})


@functools.cache
def alone(model: Transformer) -> list[list[Completion]]:
    """Every prompt by itself, in as few steps as there can be."""
    return [engine(model).generate([prompt], params())[0] for prompt in PROMPTS]


def assert_same(got: list[list[Completion]], want: list[list[Completion]]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.token_ids == b.token_ids
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    speed = MLA.rope_theta ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(speed), position * speed)).flatten(-2)


def prune_list(kept: list[dict], budget: int, recent: int) -> list[dict]:
    if len(kept) <= budget:
        return kept
    old, new = kept[: len(kept) - recent], kept[len(kept) - recent :]
    best = sorted(old, key=lambda r: -r["mass"])[: budget - recent]
    return sorted(best, key=lambda r: r["position"]) + new


@torch.no_grad()
def reference(model: Transformer, ids: list[int], prune: PruneConfig, budgets: list[int]):
    """(logits behind every token, rows that each layer has in the end): token by token, head by head, in float64."""
    model = build_model(model.config, dtype=torch.float64)
    model.load_state_dict(build("dense").state_dict())
    kept: list[list[dict]] = [[] for _ in budgets]
    logits = []
    for position, token in enumerate(ids):
        x = model.model.embed_tokens.weight[token, None]
        for index, budget in enumerate(budgets):
            layer = model.model.layers[index]
            attended = attend(layer.self_attn, layer.input_layernorm(x), position, kept[index])
            x, normed = layer.post_attention_layernorm(x, attended)
            x = x + layer.mlp(normed, model.step(pack([[token]])))
            if (position + 1) % prune.slack == 0:
                kept[index] = prune_list(kept[index], budget, prune.recent)
        logits.append(model.logits(x))
    return torch.cat(logits), kept


def attend(attn, x: torch.Tensor, position: int, kept: list[dict]) -> torch.Tensor:
    """Expanded attention over the rows of a list, to which this token's is added."""
    latent, k_rope = attn.kv_a_proj_with_mqa(x).split([16, 8], -1)
    latent, k_rope = attn.kv_a_layernorm(latent)[0], rotate(k_rope[0], position)
    kept.append({"position": position, "latent": latent, "rope": k_rope, "mass": 0.0})
    q = attn.q_b_proj(attn.q_a_layernorm(attn.q_a_proj(x))).view(2, 16)
    mixed = []
    for head, up in enumerate(attn.kv_b_proj.weight.view(2, 16, 16)):
        q_rope = rotate(q[head, 8:], position)
        scores = [q[head, :8] @ up[:8] @ row["latent"] + q_rope @ row["rope"] for row in kept]
        weights = torch.softmax(torch.stack(scores) * 16**-0.5, 0)
        for row, weight in zip(kept, weights.tolist(), strict=True):
            row["mass"] += weight / 2
        mixed.append(sum(w * (up[8:] @ row["latent"]) for w, row in zip(weights, kept, strict=True)))
    return attn.o_proj(torch.cat(mixed)[None])


RULES = {
    "falling": (PRUNE, BUDGETS),
    "sliding_window": (PruneConfig(8, 8, recent=8, slack=5), [8, 8, 8]),
    "heavy_hitters_only": (PruneConfig(4, 7, recent=0, slack=3), [4, 6, 7]),
}
CUTS = {
    "together": {},
    "chunked": {"max_batch_tokens": 7},
    "one_token_per_step": {"max_batch_tokens": 1},
    "other_block_size": {"block_size": 16},
}


@pytest.mark.parametrize("rule, cut", [*((r, "chunked") for r in RULES), *(("falling", c) for c in CUTS)])
def test_tokens_are_those_of_a_loop_over_lists_of_rows(dense, rule, cut):
    prune, budgets = RULES[rule]
    pruned = engine(dense, prune, **CUTS[cut])
    (completion,) = pruned.generate([PROMPTS[0]], params(temperature=0.0))[0]
    logits, _ = reference(dense, [*PROMPTS[0], *completion.token_ids], prune, budgets)
    steps = logits[len(PROMPTS[0]) - 1 : -1]
    assert completion.token_ids == steps.argmax(-1).tolist()
    expected = steps.log_softmax(-1)[torch.arange(16), completion.token_ids]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    (free,) = engine(dense, None).generate([PROMPTS[0]], params(temperature=0.0))[0]
    assert np.abs(np.array(free.logprobs) - completion.logprobs).max() > 0.1


@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_cache_holds_the_rows_and_masses_of_the_reference_in_order(dense, rule):
    prune, budgets = RULES[rule]
    pruned = engine(dense, prune, max_batch_tokens=11)
    pruned.add(PROMPTS[0], params(temperature=0.0))
    while (pruned.scheduler.table.num_computed < 41).all():
        pruned.step()
    table, cache = pruned.scheduler.table, pruned.runner.cache
    ids = table.token_ids[0, : table.num_computed[0]].tolist()
    slots = (torch.tensor(table.row_blocks(0))[:, None] * 4 + torch.arange(4)).flatten()
    _, kept = reference(dense, ids, prune, budgets)
    for layer, rows in enumerate(kept):
        assert len(ids) - pruned.pruner.dropped[layer, 0] == len(rows) < len(ids)
        mine = slots[: len(rows)]
        want = torch.stack([torch.cat((row["latent"], row["rope"])) for row in rows]).float()
        torch.testing.assert_close(cache.rows[layer][mine], want, rtol=1e-4, atol=1e-4)
        masses = [row["mass"] for row in rows]
        np.testing.assert_allclose(pruned.pruner.mass[layer][mine], masses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 7}, {"num_blocks": 14}])
def test_budgets_that_hold_the_context_change_no_bit(model, options):
    wide = engine(model, PruneConfig(48, 60, recent=9, slack=16), **options)
    assert wide.generate(PROMPTS, params()) == engine(model, None, **options).generate(PROMPTS, params())
    assert wide.stats.num_dropped_rows == 0


@pytest.mark.parametrize("cut", [*sorted(CUTS), "tiny_pool_preempts", "few_rows"])
def test_tokens_do_not_depend_on_how_the_work_is_cut(model, cut):
    more = {"tiny_pool_preempts": {"num_blocks": 6}, "few_rows": {"max_sequences": 2}}
    other = engine(model, **{**CUTS, **more}[cut])
    assert_same(other.generate(PROMPTS, params()), alone(model))
    assert (other.stats.num_preemptions > 0) == (cut == "tiny_pool_preempts")


@pytest.mark.parametrize("options", [{"cache_dtype": "fp8"}, {"rank_by_context": ((0, 16), (20, 8))}])
def test_other_forms_of_rows_move_as_well(dense, options):
    want = engine(dense, max_batch_tokens=1, **options).generate(PROMPTS, params())
    assert_same(engine(dense, **options).generate(PROMPTS, params()), want)


def test_layers_never_hold_more_than_budget_and_slack_and_blocks_only_for_the_largest(dense):
    busy = engine(dense, max_batch_tokens=25, max_sequences=3)
    for prompt in PROMPTS:
        busy.add(prompt, params())
    table, pruner, most = busy.scheduler.table, busy.pruner, np.zeros(3, dtype=np.int64)
    while busy.num_unfinished:
        busy.step()
        rows = busy.scheduler.running
        held = table.num_computed[rows] - pruner.dropped[:, rows]
        most = np.maximum(most, held.max(axis=1, initial=0))
        assert (table.num_blocks[rows] <= (12 + 4) // 4).all()
        assert (held.min(initial=99) >= 0) and (held >= np.minimum(table.num_computed[rows], 6)).all()
    assert (most <= np.array(BUDGETS) + 4).all()
    assert (most > np.array(BUDGETS)).all()


def test_dropped_rows_are_counted(dense):
    pruned = engine(dense)
    pruned.generate([PROMPTS[0]], params(max_tokens=11))
    assert pruned.stats.num_dropped_rows == 3 * 40 - sum(BUDGETS)  # 40 rows ran, the last a multiple of the slack


def test_a_pool_smaller_than_the_context_is_enough(dense):
    small = engine(dense, num_blocks=4)  # 16 rows for 46 tokens
    assert_same(small.generate(PROMPTS[:1], params()), alone(dense)[:1])
    with pytest.raises(ValueError, match="may need 16 cached tokens, but the whole cache holds 12"):
        engine(dense, num_blocks=3).add(PROMPTS[0], params())
    full = Engine(dense, None, EngineConfig(block_size=4, max_sequences=2, prefix_cache=False, prune=PRUNE))
    assert full.scheduler.pool.num_blocks == 2 * 4


def test_a_row_that_is_used_again_starts_with_everything(dense):
    again = engine(dense, max_sequences=1)
    first = again.add(PROMPTS[0], params())[0]
    for _ in range(15):
        again.step()
    again.abort(first)
    assert_same(again.generate(PROMPTS, params()), alone(dense))


def test_new_weights_recompute_pruned_sequences(dense):
    own = build("dense")
    updated = engine(own)
    updated.add(PROMPTS[0], params(temperature=0.0), stream=True)
    for _ in range(15):
        updated.step()
    (table, row), new = (updated.scheduler.table, updated.scheduler.running[0]), build_model(DENSE, seed=5)
    before = table.token_ids[row, : table.num_known[row]].tolist()
    updated.update_weights(new)
    fresh = engine(new)
    fresh.add(before, params(temperature=0.0, max_tokens=46 - len(before)), stream=True)
    rest = [[t for e in iter_events(one) for t in e.token_ids] for one in (updated, fresh)]
    assert rest[0] == rest[1] and len(rest[0]) == 46 - len(before)


def iter_events(engine: Engine):
    while engine.num_unfinished:
        yield from engine.step()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"first_budget": 0}, r"engine.prune.first_budget = 0: must be at least 1"),
        ({"slack": 0}, r"engine.prune.slack = 0: must be at least 1"),
        ({"recent": -1}, r"engine.prune.recent = -1: must be at least 0"),
        ({"recent": 7}, r"engine.prune.recent = 7: must fit into the budgets 12 and 6"),
    ],
)
def test_impossible_budgets_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        replace(PRUNE, **values)


def test_what_cannot_be_pruned_is_refused(dense):
    with pytest.raises(ValueError, match="prefix_cache = True and num_draft_tokens = 0.*set prefix_cache = false"):
        EngineConfig(prune=PRUNE)
    with pytest.raises(ValueError, match="num_draft_tokens = 1.*set prefix_cache = false and num_draft_tokens = 0"):
        EngineConfig(prune=PRUNE, prefix_cache=False, num_draft_tokens=1)
    for heads in (1, 2):
        grouped = replace(DENSE, attention=GQAConfig(num_heads=2, num_kv_heads=heads, head_dim=8), num_mtp_layers=0)
        with pytest.raises(ValueError, match="this model has key and value heads; leave it out"):
            engine(build_model(grouped))


def test_flags_switch_pruning_on():
    flags = ["m", "--engine.prune.first-budget", "512", "--engine.prune.last-budget=128", "--engine.no-prefix-cache"]
    config = parse_args(GenerateConfig, flags, prog="generate", description="")
    assert config.engine.prune == PruneConfig(512, 128)
    assert parse_args(GenerateConfig, ["m"], prog="generate", description="").engine.prune is None


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 9}, {"num_blocks": 14}, {"max_sequences": 2}], ids=str)
def test_a_step_planned_while_another_is_in_flight_finds_the_rows_where_they_will_be(model, options):
    overlapped = engine(model, overlap=True, **options)
    assert_same(overlapped.generate(PROMPTS, params()), alone(model))
    assert overlapped.stats.num_dropped_rows > 0


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 9}, {"overlap": True}], ids=str)
def test_a_sequence_that_is_not_finite_spoils_no_other(options):
    ours = build("dense")
    with torch.no_grad():
        ours.model.embed_tokens.weight[59] = float("nan")
    for prompts in ([[59] * 20, *PROMPTS], [*PROMPTS, [3, 59]], [PROMPTS[0], [59] * 20, *PROMPTS[1:]]):
        mixed = [group[0] for group in engine(ours, **options).generate(prompts, params())]
        want = engine(ours).generate([prompt for prompt in prompts if 59 not in prompt], params())
        assert_same([[c] for c, prompt in zip(mixed, prompts, strict=True) if 59 not in prompt], want)
        assert [c.finish_reason == "error" for c in mixed] == [59 in prompt for prompt in prompts]
