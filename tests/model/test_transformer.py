from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kogia.model.cache import StepCache, build_cache
from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.model.packed import PackedTokens, pack
from kogia.model.routing import Routing
from kogia.model.transformer import Transformer, build_model
from kogia.ops.segments import segments_of

MLA = MLAConfig(num_heads=3, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
MOE = MoEConfig(num_experts=6, topk=2, expert_dim=8, num_groups=2, topk_groups=1, routed_scale=1.5, num_dense_layers=1)
SMALL = ModelConfig(
    vocab_size=31, dim=16, num_layers=2, ffn_dim=24, attention=MLA, moe=MOE, num_mtp_layers=2, init_std=0.2
)
YARN = YarnConfig(factor=4.0, original_max_position=8)
VARIANTS = {
    "mla": SMALL,
    "mla, direct queries, yarn": replace(SMALL, attention=replace(MLA, q_lora_rank=None, rope_scaling=YARN)),
    "mla, dense, tied": replace(SMALL, moe=None, num_mtp_layers=0, tie_embeddings=True),
    "gqa": replace(
        SMALL, attention=GQAConfig(num_heads=6, num_kv_heads=2, head_dim=4, qkv_bias=True), moe=None, num_mtp_layers=0
    ),
    "mqa, softmax router": replace(
        SMALL, attention=GQAConfig(num_heads=3, num_kv_heads=1, head_dim=6), moe=replace(MOE, score="softmax")
    ),
}
TIED = replace(SMALL, attention=replace(MLA, indexer=IndexerConfig(num_heads=1, head_dim=6, topk=3)))
"""Sparse, with one index head: about half of its scores are 0, so most selections cut between equal ones."""
WITH_TIES = {**VARIANTS, "mla, sparse": TIED}


def tiny(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose norms, biases and router biases are drawn too, so that forgetting one shows."""
    model = build_model(config, seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * (0.1 if "bias" in name else 0.3))
    return model


def ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(31, (n,), generator=generator).tolist() for n in lengths]


class Paged:
    """Runs sequences through a paged cache in arbitrary steps, with scattered blocks of three tokens."""

    def __init__(self, model: Transformer, sequences: list[list[int]], dtype: torch.dtype = torch.float32) -> None:
        self.model, self.sequences, self.size = model, sequences, 3
        self.done = [0] * len(sequences)
        widest = max(-(-len(s) // self.size) for s in sequences)
        order = torch.randperm(widest * len(sequences), generator=torch.Generator().manual_seed(5))
        self.tables = order.view(len(sequences), widest)
        self.pool = build_cache(model.config, len(order), self.size, dtype=dtype, device="cpu")

    def plan(self, counts: dict[int, int]) -> tuple[PackedTokens, StepCache]:
        token_ids, positions, slots = [], [], []
        for s, count in counts.items():
            span = range(self.done[s], self.done[s] + count)
            token_ids += self.sequences[s][span.start : span.stop]
            positions += span
            slots += [int(self.tables[s, t // self.size]) * self.size + t % self.size for t in span]
            self.done[s] += count
        contexts = np.array([self.done[s] for s in counts])
        segments = segments_of(list(counts.values()))
        batch = PackedTokens(torch.tensor(token_ids), torch.tensor(positions), segments)
        tables = self.tables[list(counts)]
        return batch, self.pool.step(torch.tensor(slots), tables, torch.from_numpy(contexts), contexts)


def run_in_steps(model: Transformer, sequences: list[list[int]], steps: list[dict[int, int]]) -> list[Tensor]:
    paged, out = Paged(model, sequences), [[] for _ in sequences]
    for counts in steps:
        batch, cache = paged.plan(counts)
        hidden, start = model(batch, cache), 0
        for s, count in counts.items():
            out[s].append(hidden[start : start + count])
            start += count
    return [torch.cat(parts) for parts in out]


@pytest.mark.parametrize("name", WITH_TIES)
def test_packed_sequences_are_the_sequences_one_by_one(name):
    model, sequences = tiny(WITH_TIES[name]), ids(7, 1, 12, 5)
    with torch.no_grad():
        together = model(pack(sequences)).split([len(s) for s in sequences])
        for sequence, hidden in zip(sequences, together, strict=True):
            torch.testing.assert_close(hidden, model(pack([sequence])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITH_TIES)
def test_the_cached_form_is_the_expanded_form_under_chunks_decodes_and_mixed_steps(name):
    model, sequences = tiny(WITH_TIES[name]), ids(11, 6, 14)
    steps = [{0: 11}, {1: 3, 2: 5}, {2: 1, 1: 1}, {1: 2, 2: 4}, {2: 1}, {2: 3}]
    with torch.no_grad():
        for hidden, sequence in zip(run_in_steps(model, sequences, steps), sequences, strict=True):
            torch.testing.assert_close(hidden, model(pack([sequence])), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["dense", "sparse"])
@given(data=st.data())
@settings(max_examples=15)
def test_any_division_into_steps_gives_the_same_hidden_states(config, data):
    model, sequences = tiny(config), ids(9, 4, 7)
    left, steps = [len(s) for s in sequences], []
    while any(left):
        alive = [s for s in range(3) if left[s]]
        chosen = data.draw(st.lists(st.sampled_from(alive), min_size=1, unique=True))
        steps.append({s: data.draw(st.integers(1, left[s])) for s in chosen})
        for s, count in steps[-1].items():
            left[s] -= count
    with torch.no_grad():
        for hidden, sequence in zip(run_in_steps(model, sequences, steps), sequences, strict=True):
            torch.testing.assert_close(hidden, model(pack([sequence])), rtol=1e-5, atol=2e-5)


def test_rejected_rows_are_overwritten_by_the_next_step():
    # speculative decoding writes rows past the accepted tokens; the counters move back and the slots are used again
    model, (sequence,) = tiny(), ids(10)
    wrong = [*sequence[:6], 1, 2, 3, 4]
    with torch.no_grad():
        paged = Paged(model, [wrong])
        model(*paged.plan({0: 9}))
        paged.sequences, paged.done = [sequence], [6]
        hidden = model(*paged.plan({0: 4}))
        torch.testing.assert_close(hidden, model(pack([sequence]))[6:], rtol=1e-5, atol=2e-5)


def test_absorbed_and_expanded_attention_agree_in_bfloat16():
    model, sequences = tiny(replace(SMALL, moe=None, num_mtp_layers=0), torch.bfloat16), ids(9)
    with torch.no_grad():
        paged = Paged(model, sequences, torch.bfloat16)
        absorbed, expanded = model(*paged.plan({0: 9})), model(pack(sequences))
        wide = tiny(replace(SMALL, moe=None, num_mtp_layers=0))(pack(sequences))
    assert absorbed.dtype == expanded.dtype == torch.bfloat16
    for hidden in (absorbed, expanded):
        assert (hidden - wide).norm() < 0.05 * wide.norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_logprobs_are_the_log_softmax_of_the_logits_one_token_later(name):
    model, sequences = tiny(VARIANTS[name]), ids(6, 1, 4)
    batch = pack(sequences)
    with torch.no_grad():
        got = model.logprobs(batch, temperature=0.7)
        for sequence, values in zip(sequences, got.split([6, 1, 4]), strict=True):
            assert values[0] == 0
            logp = torch.log_softmax(model.logits(model(pack([sequence]))) / 0.7, -1)
            for i in range(1, len(sequence)):
                torch.testing.assert_close(values[i], logp[i - 1, sequence[i]], rtol=1e-5, atol=1e-5)


def test_masked_tokens_have_logprob_and_entropy_zero_and_no_gradient():
    model, batch = tiny(), pack(ids(6, 5))
    mask = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1]).bool()
    counted = mask.clone()
    counted[[0, 6]] = False
    values, entropy = model.logprobs_from_hidden(model(batch), batch, 1.0, counted.nonzero().flatten())
    torch.testing.assert_close(values, model.logprobs(batch) * counted)
    assert entropy[counted].gt(0).all()
    assert entropy[~counted].eq(0).all()
    logits = model.logits(model(batch))
    want = torch.distributions.Categorical(logits=logits[counted.nonzero().flatten() - 1]).entropy()
    torch.testing.assert_close(entropy[counted], want)


def test_logprobs_of_nothing_wanted_are_zero():
    model, batch = tiny(), pack(ids(1, 1))
    assert model.logprobs(batch).tolist() == [0.0, 0.0]


def test_logprobs_see_only_earlier_tokens():
    model, (sequence,) = tiny(), ids(8)
    changed = [*sequence[:5], (sequence[5] + 1) % 31, *sequence[6:]]
    with torch.no_grad():
        before, after = model.logprobs(pack([sequence])), model.logprobs(pack([changed]))
    torch.testing.assert_close(after[:5], before[:5])
    assert (after[5:] - before[5:]).abs().gt(1e-4).all()


@pytest.mark.parametrize("depth", [0, 1])
def test_an_mtp_row_sees_tokens_and_next_tokens_up_to_itself_only(depth):
    model, batch = tiny(), pack(ids(7, 5))
    hidden, next_ids = torch.randn(12, 16), torch.arange(12)
    step = model.step(batch)
    with torch.no_grad():
        before = model.mtp_hidden(depth, hidden, next_ids, step)
        for row in (2, 8):
            sequence_end = 7 if row < 7 else 12
            other_hidden, other_ids = hidden.clone(), next_ids.clone()
            other_hidden[row] += 1.0
            other_ids[row] = 30
            for changed in (
                model.mtp_hidden(depth, other_hidden, next_ids, step),
                model.mtp_hidden(depth, hidden, other_ids, step),
            ):
                moved = (changed - before).abs().amax(-1) > 1e-6
                assert moved.tolist() == [row <= i < sequence_end for i in range(12)]


def test_mtp_is_the_published_formula_embedding_first():
    model, batch = tiny(), pack(ids(6))
    module = model.model.layers[2]
    hidden, next_ids = model(batch), batch.token_ids.roll(-1)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    with torch.no_grad():
        embedded = norm(model.model.embed_tokens.weight[next_ids], module.enorm.weight)
        left, right = module.eh_proj.weight.chunk(2, dim=1)
        joined = embedded @ left.T + norm(hidden, module.hnorm.weight) @ right.T
        want = module.block(joined, model.step(batch))
        got = model.mtp_hidden(0, hidden, next_ids, model.step(batch))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        logits = norm(got, module.shared_head.norm.weight) @ model.lm_head.weight.T
        torch.testing.assert_close(model.mtp_logits(0, got), logits, rtol=1e-5, atol=1e-5)


def test_mtp_in_the_cache_is_mtp_without_it():
    model, sequences = tiny(), ids(8, 5)
    with torch.no_grad():
        batch = pack(sequences)
        next_ids = batch.token_ids.roll(-1)
        hidden = model(batch)
        first = model.mtp_hidden(0, hidden, next_ids, model.step(batch))
        second = model.mtp_hidden(1, first, next_ids.roll(-1), model.step(batch))
        paged, got = Paged(model, sequences), [[], []]
        for counts in ({0: 4}, {0: 1, 1: 3}, {1: 2, 0: 3}):
            starts = {s: paged.done[s] + (0 if s == 0 else 8) for s in counts}
            rows = torch.cat([torch.arange(starts[s], starts[s] + n) for s, n in counts.items()])
            part, cache = paged.plan(counts)
            step = model.step(part, cache)
            one = model.mtp_hidden(0, model(part, step=step), next_ids[rows], step)
            two = model.mtp_hidden(1, one, next_ids.roll(-1)[rows], step)
            got[0].append((rows, one))
            got[1].append((rows, two))
    for parts, want in zip(got, (first, second), strict=True):
        for rows, values in parts:
            torch.testing.assert_close(values, want[rows], rtol=1e-5, atol=2e-5)


def complete_loss(model: Transformer, batch: PackedTokens) -> Tensor:
    routing = Routing(losses=True)
    step = model.step(batch, routing=routing)
    hidden = model(batch, step=step)
    loss = -model.logprobs_from_hidden(hidden, batch)[0].sum()
    for depth in range(model.config.num_mtp_layers):
        hidden = model.mtp_hidden(depth, hidden, batch.token_ids.roll(-1 - depth), step)
        targets = batch.token_ids.roll(-2 - depth)
        loss = loss + torch.nn.functional.cross_entropy(model.mtp_logits(depth, hidden), targets)
    return loss + 1e-3 * (routing.balance_loss() or 0.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_complete_loss_reaches_every_parameter(name):
    model = tiny(VARIANTS[name])
    complete_loss(model, pack(ids(25, 15, 20))).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None, parameter
        assert tensor.grad.isfinite().all(), parameter
        assert tensor.grad.abs().sum() > 0, parameter


def test_two_training_steps_from_the_same_state_are_bitwise_equal():
    runs = []
    for _ in range(2):
        model = tiny()
        loss = complete_loss(model, pack(ids(9, 14)))
        loss.backward()
        runs.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_each_forward_has_a_routing_of_its_own():
    """Two passes before either is read, which attributes of the model would have mixed."""
    model, first, second = tiny(), pack(ids(6)), pack(ids(9, seed=1))
    alone = []
    for batch in (first, second):
        routing = Routing(losses=True)
        model(batch, step=model.step(batch, routing=routing))
        alone.append((routing.balance_loss(), routing.loads(3)))
    together = [Routing(losses=True), Routing(losses=True)]
    for batch, routing in zip((first, second), together, strict=True):
        model(batch, step=model.step(batch, routing=routing))
    for routing, (balance, loads) in zip(together, alone, strict=True):
        assert routing.balance_loss() == balance
        assert routing.loads(3).equal(loads)
    assert alone[0][1].sum(1).tolist() == [12, 0, 0]  # the MTP modules did not run
    with pytest.raises(ValueError, match="a Routing records one batch"):
        model.step(second, routing=together[0])


def test_mtp_routers_come_last():
    model = tiny()
    assert [r is layer.mlp.gate for r, layer in zip(model.routers(), model.model.layers[1:], strict=True)] == [True] * 3


def test_initialisation_is_reproducible_drawn_in_float32_and_of_the_asked_width():
    config = replace(SMALL, dim=64, init_std=0.006)
    first, second, other = (build_model(config, seed=s) for s in (3, 3, 4))
    low = build_model(config, seed=3, dtype=torch.bfloat16)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert torch.equal(low.state_dict()[name], tensor.to(low.state_dict()[name].dtype)), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.model.layers[1].mlp.experts.gate_up_proj.weight.std().item() == pytest.approx(0.006, rel=0.05)
    assert first.model.norm.weight.eq(1).all()
    assert low.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_a_tied_head_is_the_embedding_also_after_a_cast():
    model = build_model(VARIANTS["mla, dense, tied"], dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
