"""What requests may not say, and what their rules leave as it was."""

from dataclasses import replace

import numpy as np
import pytest

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.output import TextStream
from kogia.engine.request import SamplingParams
from kogia.engine.rules import Allowed, BadWords, Penalised, TokenRules, pack_bits
from kogia.model.config import GQAConfig, ModelConfig
from kogia.model.transformer import Transformer, build_model
from kogia.text.tokenizer import Tokenizer, train_bpe

CONFIG = ModelConfig(
    vocab_size=300, dim=16, num_layers=1, ffn_dim=16, attention=GQAConfig(num_heads=2), moe=None, max_position=64,
    init_std=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the answer is 42. " * 20], 280)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(CONFIG, seed=3)


def engine(model: Transformer, tokenizer: Tokenizer | None = None, **options) -> Engine:
    return Engine(model, tokenizer, EngineConfig(**{"block_size": 4, "num_blocks": 100, **options}))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"logprobs": 21},
            "logprobs = 21: must be true, false, or how many of the likeliest tokens come along, 1 to 20",
        ),
        ({"logprobs": 0}, "logprobs = 0: must be true, false"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1: must be"),
        ({"presence_penalty": float("nan")}, r"presence_penalty = nan: must be in \[-2, 2\]"),
        ({"frequency_penalty": 2.5}, "frequency_penalty = 2.5: must be in"),
        ({"frequency_penalty": float("nan")}, r"frequency_penalty = nan: must be in \[-2, 2\]"),
        ({"repetition_penalty": float("nan")}, r"repetition_penalty = nan: must be in \[0.01, 100\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty = 0.0: must be in \[0.01, 100\]"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf: must be"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias = {5: nan}: must be a mapping of token ids to numbers in"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias = {-1: 1.0}: must be"),
        ({"logit_bias": {5: 101}}, "logit_bias = {5: 101}: must be"),
        ({"allowed_token_ids": ()}, r"allowed_token_ids = \(\): must be a tuple of at least one token id"),
        ({"bad_words": ("x", "")}, r"bad_words = \('x', ''\): must be a tuple of non-empty strings"),
        ({"min_tokens": -1}, "min_tokens = -1: must be at least 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9: is more than max_tokens = 8; lower it, or raise that"),
    ],
)
def test_a_value_that_will_not_do_is_named_with_its_rule(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize("name, value", [("logit_bias", {300: 1.0}), ("allowed_token_ids", (5, 300))])
def test_tokens_that_the_model_does_not_know_are_refused_and_leave_nothing_behind(model, name, value):
    small = engine(model)
    with pytest.raises(ValueError, match=rf"SamplingParams.{name} names token 300: the model knows 0\.\.299"):
        small.generate([[5], [6]], [SamplingParams(), SamplingParams(**{name: value})])
    assert small.num_unfinished == 0


def test_bad_words_need_a_tokenizer(model):
    with pytest.raises(ValueError, match="bad_words = .*: words need a tokenizer; use logit_bias"):
        engine(model).add([5], SamplingParams(bad_words=("x",)))


def test_parameters_can_be_hashed_and_compared():
    params = SamplingParams(logit_bias={5: 1.0})
    assert hash(params) == hash(replace(params))
    assert params == replace(params) != replace(params, logit_bias={})


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_or_the_text_of_a_stop_token_stays_where_it_is_asked_for(model, tokenizer, kept, stream):
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    (free,) = engine(model, tokenizer).generate([[0, 9]], params)[0]
    stop = free.text[12:15]
    end = free.text.index(stop)
    token = next(i for i in free.token_ids[8:] if tokenizer.decode([i]).isprintable())
    before = free.token_ids[: free.token_ids.index(token)]
    for asked, text in (
        ({"stop": (stop,)}, free.text[: end + len(stop) * kept]),
        ({"stop_token_ids": (token,)}, tokenizer.decode([*before, token] if kept else before)),
    ):
        wanted = replace(params, include_stop_str_in_output=kept, **asked)
        stopping = engine(model, tokenizer)
        completion = stopping.submit([0, 9], wanted, stream=stream).result()[0]
        assert (completion.text, completion.finish_reason) == (text, "stop")


def test_the_end_token_is_no_text_even_where_stops_stay(model, tokenizer):
    params = SamplingParams(max_tokens=30, include_stop_str_in_output=True, allowed_token_ids=(tokenizer.eos_id,))
    (completion,) = engine(model, tokenizer).generate([[0, 9]], params)[0]
    assert (completion.text, completion.token_ids) == ("", [tokenizer.eos_id])


def test_a_stop_string_before_min_tokens_is_text(tokenizer):
    ids = tokenizer.encode("one END two END three")
    at = ids.index(tokenizer.encode("D")[0]) + 1
    for min_tokens, text in ((0, "one "), (at, "one "), (at + 1, "one END two ")):
        stream = TextStream(tokenizer, ("END",), min_tokens=min_tokens)
        for token in ids:
            if stream.push([token]) is not None:
                break
        assert stream.finish() == text


def test_min_tokens_give_way_where_nothing_else_is_allowed(model, tokenizer):
    params = SamplingParams(max_tokens=9, min_tokens=9, allowed_token_ids=(tokenizer.eos_id,))
    (completion,) = engine(model, tokenizer).generate([[0, 9]], params)[0]
    assert (completion.token_ids, completion.finish_reason) == ([tokenizer.eos_id], "stop")


def test_rules_answer_alike_for_tokens_that_stand_and_for_drafts():
    def rules() -> TokenRules:
        return TokenRules(
            [Penalised((1.5, 0.0, 0.0), [1, 2]), BadWords([[7], [3, 4, 5]]), Allowed([1, 3, 4, 5, 70], 100)]
        )

    told, asked = rules(), rules()
    tokens = np.array([3, 4, 3, 4, 1])
    stepwise, counts = [], []
    for count in range(6):
        stepwise += told.edits(tokens[:count], tokens[:0], 0)
        counts.append(dict(stepwise[-1].counts))  # of the tokens that stand: it goes on counting
    # asked about the same places as drafts, every second time after other drafts that did not stand
    for start in (0, 2, 4):
        asked.edits(tokens[:start], np.array([9, 9]), 0)
        for count, edit in enumerate(asked.edits(tokens[:start], tokens[start:], 0), start):
            assert dict(edit.counts) == counts[count]
            assert edit.bans == stepwise[count].bans
            assert edit.mask.tolist() == pack_bits([1, 3, 4, 5, 70], 100).tolist()
    assert [edit.bans for edit in stepwise] == [[7], [7], [7, 5], [7], [7, 5], [7]]
    assert counts[5] == {1: 1, 2: 0, 3: 2, 4: 2}


def test_only_rules_that_must_know_tokens_keep_steps_from_overlapping(model):
    plain, bound = SamplingParams(logit_bias={5: 1.0}, min_tokens=3), SamplingParams(presence_penalty=0.5)
    for params, ahead in ((plain, True), (bound, False)):
        busy = engine(model, overlap=True)
        busy.add([5, 6], replace(params, max_tokens=10, ignore_eos=True, seed=0))
        busy.step()
        assert (busy.scheduler.plan() is not None) == ahead


def test_a_request_given_up_before_its_prompt_has_run_has_no_scores_for_the_rest(model):
    chunked = engine(model, max_batch_tokens=4)
    (request_id,) = chunked.add([5] * 10, SamplingParams(prompt_logprobs=1))
    chunked.step()
    completion = chunked.abort(request_id)
    assert completion is not None
    known = [value is not None for value in completion.prompt_logprobs]
    assert known == [False] + [True] * 4 + [False] * 5
    assert [each is not None for each in completion.prompt_top_logprobs] == known
