"""lm-eval's `local-completions` and `local-chat-completions`, as they are, on a served model."""

import pytest
from serve.asks import HELLO, post

from kogia.engine.request import SamplingParams

pytest.importorskip("lm_eval.models.api_models", reason="pip install 'lm-eval[api]'")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

PAIRS = [("the answer is", " 42."), ("the answer", " is 42. the answer is 42."), ("", "the answer"), ("a", "b")]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def instances(kind, arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def by_the_engine(server, start, context, continuation):
    """(log-probability of a continuation, whether it is the likeliest) as the engine scores it."""
    tokenizer = server.tokenizer
    before = tokenizer.encode(context) or [start]
    ids = tokenizer.encode(context + continuation) if context else before + tokenizer.encode(continuation)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    ((completion,),) = server.engine.generate([ids], params)
    values = completion.prompt_logprobs[len(before) :]
    likeliest = [max(table.values()) for table in completion.prompt_top_logprobs[len(before) :]]
    return sum(values), all(value == best for value, best in zip(values, likeliest))


@pytest.mark.parametrize("settings", [
    {"tokenizer_backend": "auto"},
    {"tokenizer_backend": "huggingface"},
    {"tokenizer_backend": "huggingface", "batch_size": 3},
    {"tokenizer_backend": "huggingface", "num_concurrent": 4},
])  # fmt: skip
def test_continuations_are_scored_as_the_engine_scores_them(server, model, settings):
    if settings["tokenizer_backend"] == "huggingface":
        pytest.importorskip("transformers")
    asking = LocalCompletionsAPI(
        base_url=server.url + "/v1/completions", model="tiny", tokenizer=str(model), max_retries=1, **settings
    )
    found = asking.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (value, is_greedy), pair in zip(found, PAIRS, strict=True):
        want = by_the_engine(server, asking.prefix_token_id, *pair)
        assert value == pytest.approx(want[0], abs=1e-4) and is_greedy == want[1]


def test_texts_are_continued_up_to_where_they_are_to_end(server, model):
    asking = LocalCompletionsAPI(
        base_url=server.url + "/v1/completions", model="tiny", max_retries=1, tokenizer_backend="auto"
    )
    ids = server.tokenizer.encode("the answer is")
    body = {"prompt": ids, "max_tokens": 24, "temperature": 0, "seed": 1234}
    whole = post(server, "/v1/completions", body).json()["choices"][0]["text"]
    assert len(whole) > 8
    until = whole[4:6]
    arguments = [
        ("the answer is", {"until": [], "max_gen_toks": 24}),
        ("the answer is", {"until": [until], "max_gen_toks": 24}),
    ]
    found = asking.generate_until(instances("generate_until", arguments), disable_tqdm=True)
    assert whole.startswith(found[0]) and found[1] == whole[: whole.index(until)]


def test_conversations_are_answered(server):
    asking = LocalChatCompletion(base_url=server.url + "/v1/chat/completions", model="tiny", max_retries=1)
    said = asking.apply_chat_template(HELLO)
    arguments = [(said, {"until": ["~"], "max_gen_toks": 20, "chat_template_kwargs": {"enable_thinking": False}})]
    (found,) = asking.generate_until(instances("generate_until", arguments), disable_tqdm=True)
    body = {"messages": HELLO, "max_tokens": 20, "temperature": 0, "stop": ["~"], "enable_thinking": False}
    assert found == post(server, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"] != ""
