"""What a request may say gives the tokens that its definition gives, however the work is cut: with drafts, prefix hits,
preemption and chunks. The reference is the model itself over whole sequences, and a loop in float64."""

import functools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import Completion, SamplingParams, derive_seed
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model
from kogia.ops.sample import counter_uniforms
from kogia.text.tokenizer import Tokenizer, train_bpe

CONFIG = ModelConfig(
    vocab_size=300,
    dim=32,
    num_layers=3,
    ffn_dim=64,
    attention=MLAConfig(num_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=16, num_dense_layers=1),
    num_mtp_layers=1,
    max_position=128,
    init_std=0.2,
)
PROMPTS = [[0, 15, 9, 11, 3], [0, 17], list(range(2, 40)), [0, 15, 9, 11, 3, 8, 8, 21, 4]]
CUTS = {
    "one_draft": {"num_draft_tokens": 1},
    "two_drafts": {"num_draft_tokens": 2},
    "chunked": {"max_batch_tokens": 7},
    "chunked_with_drafts": {"max_batch_tokens": 7, "num_draft_tokens": 2},
    "preempted": {"num_blocks": 14},
    "preempted_with_drafts": {"num_blocks": 16, "num_draft_tokens": 1},
    "overlapped": {"overlap": True},
    "no_prefix_cache": {"prefix_cache": False},
}
FEW = tuple(range(40, 52))
"""So few tokens that drafts are often right and words often come up."""
ASKED: dict[str, SamplingParams] = {
    "presence_penalty": SamplingParams(presence_penalty=1.5, allowed_token_ids=FEW),
    "frequency_penalty": SamplingParams(frequency_penalty=0.9, allowed_token_ids=FEW),
    "repetition_penalty": SamplingParams(repetition_penalty=1.7, allowed_token_ids=(*FEW, 15, 9, 12)),
    "logit_bias": SamplingParams(logit_bias={40: 12.0, 41: 12.5, 42: -100.0}),
    "allowed_token_ids": SamplingParams(allowed_token_ids=FEW),
    "bad_words": SamplingParams(bad_words=("*+", "-", "./", "'()"), allowed_token_ids=FEW),
    "min_tokens": SamplingParams(min_tokens=13, stop_token_ids=(44, 45), allowed_token_ids=FEW),
    "all_at_once": SamplingParams(
        presence_penalty=0.3,
        frequency_penalty=0.2,
        repetition_penalty=1.2,
        logit_bias={44: 2.0, 47: -1.0},
        bad_words=("*+",),
        min_tokens=5,
        stop_token_ids=(45,),
        allowed_token_ids=FEW,
        top_p=0.95,
        logprobs=3,
        prompt_logprobs=2,
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the answer is 42. " * 20], 280)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A random model whose logits lie far enough apart that rounding decides nothing."""
    model = build_model(CONFIG, seed=6)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def engine(model: Transformer, tokenizer: Tokenizer, **options) -> Engine:
    return Engine(model, tokenizer, EngineConfig(**{"block_size": 4, "num_blocks": 200, **options}))


def asked(name: str, temperature: float) -> SamplingParams:
    return replace(ASKED[name], temperature=temperature, max_tokens=16, seed=7)


@torch.no_grad()
def next_logits(model: Transformer, ids: list[int]) -> list[float]:
    return model.logits(model(pack([ids]))[-1:])[0].double().tolist()


def spellings(word: str, tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(word), tokenizer.encode(" " + word)]


def adjusted(z: list[float], prompt: list[int], output: list[int], params: SamplingParams, tokenizer: Tokenizer):
    """The definitions of docs/requests.md, one token at a time."""
    counts, stops = Counter(output), {*params.stop_token_ids, tokenizer.eos_id}
    banned = set(stops) if len(output) < params.min_tokens else set()
    for word in params.bad_words:
        for ids in spellings(word, tokenizer):
            if output[len(output) - len(ids) + 1 :] == ids[:-1] or len(ids) == 1:
                banned.add(ids[-1])
    for token in range(len(z)):
        z[token] += params.logit_bias.get(token, 0.0)
        if token in counts or token in prompt:
            z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
        z[token] -= params.frequency_penalty * counts[token] + params.presence_penalty * (token in counts)
        if token in banned or (params.allowed_token_ids is not None and token not in params.allowed_token_ids):
            z[token] = -math.inf
    return z


def by_definition(model: Transformer, prompt: list[int], params: SamplingParams, tokenizer: Tokenizer) -> list[int]:
    output: list[int] = []
    seed = derive_seed(params.seed, prompt, 0)
    while len(output) < params.max_tokens and (
        not output or output[-1] not in (*params.stop_token_ids, tokenizer.eos_id)
    ):
        z = torch.tensor(
            adjusted(next_logits(model, prompt + output), prompt, output, params, tokenizer), dtype=torch.float64
        )
        if params.temperature == 0:
            output.append(int(z.argmax()))
            continue
        probs, order = torch.softmax(z / params.temperature, -1).sort(descending=True, stable=True)
        probs[(probs.cumsum(0) - probs) >= params.top_p] = 0.0
        kept = torch.zeros_like(probs).scatter_(0, order, probs)
        u = counter_uniforms(torch.tensor([seed]), torch.tensor([len(prompt) + len(output)])).item()
        cumulative = np.cumsum(kept.numpy())
        output.append(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")))
    return output


@functools.cache
def expected(model: Transformer, tokenizer: Tokenizer, name: str, temperature: float) -> list[list[int]]:
    params = asked(name, temperature)
    return [by_definition(model, prompt, params, tokenizer) for prompt in PROMPTS]


@functools.cache
def uncut(model: Transformer, tokenizer: Tokenizer, name: str) -> list[list[Completion]]:
    return engine(model, tokenizer).generate(PROMPTS, replace(asked(name, 1.0), n=2))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ASKED)
def test_tokens_are_those_of_the_definition(model, tokenizer, name, temperature):
    got = engine(model, tokenizer).generate(PROMPTS, asked(name, temperature))
    assert [group[0].token_ids for group in got] == expected(model, tokenizer, name, temperature)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ASKED)
def test_tokens_do_not_depend_on_how_the_work_is_cut(model, tokenizer, name, cut):
    other = engine(model, tokenizer, **CUTS[cut])
    got = other.generate(PROMPTS, replace(asked(name, 1.0), n=2))
    for mine, theirs in zip(got, uncut(model, tokenizer, name), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
            assert_same_scores(a, b)
    if "preempted" in cut:
        assert other.stats.num_preemptions > 0
    if "draft" in cut:
        assert other.stats.num_drafted > 50


def assert_same_scores(a: Completion, b: Completion) -> None:
    for field in ("logprobs", "prompt_logprobs"):
        mine, theirs = getattr(a, field), getattr(b, field)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_allclose(np.array(mine, float), np.array(theirs, float), atol=1e-4)
    for field in ("top_logprobs", "prompt_top_logprobs"):
        mine, theirs = getattr(a, field), getattr(b, field)
        assert (mine is None) == (theirs is None)
        for left, right in zip(mine or (), theirs or (), strict=True):
            assert (left is None) == (right is None)
            assert left is None or list(left) == list(right)
            np.testing.assert_allclose(list((left or {}).values()), list((right or {}).values()), atol=1e-4)


@pytest.mark.parametrize("cut", CUTS)
def test_a_stop_string_ends_the_same_text_however_the_work_is_cut(model, tokenizer, cut):
    params = replace(asked("allowed_token_ids", 1.0), n=2)
    whole = uncut(model, tokenizer, "allowed_token_ids")
    stop = whole[0][0].text[5:7]
    texts = [[completion.text.partition(stop) for completion in group] for group in whole]
    ends = replace(params, stop=("never", stop), min_tokens=3)
    other = engine(model, tokenizer, **CUTS[cut])
    for keeps in (False, True):
        got = other.generate(PROMPTS, replace(ends, include_stop_str_in_output=keeps))
        for group, expected in zip(got, texts, strict=True):
            for completion, (before, found, _) in zip(group, expected, strict=True):
                if len(before) + len(found) > 3:  # else it stood before `min_tokens`, and was text
                    assert completion.text == before + (found if keeps else "")
                    assert completion.finish_reason == ("stop" if found else "length")
    assert got[0][0].finish_reason == "stop"


@pytest.mark.parametrize("name", ASKED)
def test_a_prefix_hit_changes_nothing(model, tokenizer, name):
    warm = engine(model, tokenizer, num_draft_tokens=1)
    warm.generate([PROMPTS[2]], asked(name, 1.0))
    (again,) = warm.generate([PROMPTS[2]], asked(name, 1.0))[0]
    hits = 0 if ASKED[name].prompt_logprobs else 36
    assert again.num_cached_tokens == hits
    assert again.token_ids == uncut(model, tokenizer, name)[2][0].token_ids


def test_requests_with_and_without_rules_share_a_batch(model, tokenizer):
    params = [asked(name, 1.0) for name in ASKED]
    plain = SamplingParams(max_tokens=16, seed=7)
    together = engine(model, tokenizer, overlap=True).generate([PROMPTS[0]] * (len(params) + 1), [*params, plain])
    alone = [uncut(model, tokenizer, name)[0][0].token_ids for name in ASKED]
    (free,) = engine(model, tokenizer).generate([PROMPTS[0]], plain)[0]
    assert [group[0].token_ids for group in together] == [*alone, free.token_ids]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("options", [{}, {"num_draft_tokens": 2}, {"max_batch_tokens": 7}], ids=str)
def test_scores_are_those_of_the_model_whatever_rules_apply(model, tokenizer, options, temperature):
    params = replace(asked("all_at_once", temperature), logprobs=20, prompt_logprobs=5)
    for prompt, (completion,) in zip(
        PROMPTS, engine(model, tokenizer, **options).generate(PROMPTS, params), strict=True
    ):
        ids = [*prompt, *completion.token_ids]
        with torch.no_grad():
            logits = model.logits(model(pack([ids]))).double() / (temperature or 1.0)
        table = torch.log_softmax(logits, -1).tolist()
        own = [None] + [table[i - 1][ids[i]] for i in range(1, len(ids))]
        assert completion.prompt_logprobs[0] is None
        np.testing.assert_allclose(completion.prompt_logprobs[1:], own[1 : len(prompt)], atol=1e-4)
        np.testing.assert_allclose(completion.logprobs, own[len(prompt) :], atol=1e-4)
        assert completion.prompt_top_logprobs[0] is None
        best = [*completion.prompt_top_logprobs[1:], *completion.top_logprobs]
        assert [len(each) for each in best] == [5] * (len(prompt) - 1) + [20] * len(completion.token_ids)
        for place, each in enumerate(best):
            assert list(each) == sorted(range(300), key=lambda i, row=table[place]: -row[i])[: len(each)]
            np.testing.assert_allclose(list(each.values()), [table[place][i] for i in each], atol=1e-4)


def test_prompt_scores_stay_within_their_byte_budget(model, tokenizer, monkeypatch):
    """Logits of three tokens at a time, instead of a chunk's."""
    monkeypatch.setattr("kogia.engine.scoring.PROMPT_LOGITS_BYTES", 3 * 4 * 300)
    params = replace(asked("all_at_once", 1.0), n=2)
    rows: list[int] = []
    small = engine(model, tokenizer)
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    got = small.generate(PROMPTS[2:3], params)
    monkeypatch.undo()
    assert rows[:2] == [2, 3]
    assert_same_scores(got[0][0], uncut(model, tokenizer, "all_at_once")[2][0])


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_stream_brings_the_likeliest_tokens_with_each_token(model, tokenizer, drafts):
    streaming = engine(model, tokenizer, num_draft_tokens=drafts)
    streaming.add(PROMPTS[0], asked("all_at_once", 1.0), stream=True)
    events = []
    while streaming.num_unfinished:
        events += streaming.step()
    assert [each for event in events for each in event.top_logprobs] == events[-1].completion.top_logprobs
    assert all(len(event.top_logprobs) == len(event.token_ids) for event in events)
