"""DeepSeek's own addresses and words, asked by the `openai` package as its documentation does."""

import openai
import pytest
from serve.asks import HELLO, letters, post, refusal

from kogia.serve.errors import ApiError
from kogia.serve.openai_completions import HOLES, fill_prompt
from kogia.text.tokenizer import train_bpe


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def beta(server):
    return openai.OpenAI(base_url=server.url + "/beta", api_key="none", max_retries=0)


def test_the_routes_are_there_without_v1_and_count_cache_hits(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    question = [{"role": "user", "content": "a question that fills more than a block of the cache"}]
    for _ in range(2):
        usage = client.chat.completions.create(model="tiny", messages=question, max_tokens=2).usage
        assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
    assert usage.prompt_cache_hit_tokens == usage.prompt_tokens_details.cached_tokens > 0


def test_thinking_is_switched_and_what_was_thought_is_not_in_the_next_prompt(client, server):
    kwargs = {"model": "tiny", "max_tokens": 30, "seed": 1}
    first = client.chat.completions.create(
        messages=HELLO, extra_body={"thinking": {"type": "enabled", "budget_tokens": 3}}, **kwargs
    )
    message = first.choices[0].message
    assert message.reasoning_content and message.content
    again = [*HELLO, message.model_dump(exclude_none=True), *HELLO]
    body = {"messages": again, "max_tokens": 1, "return_token_ids": True, "thinking": {"type": "disabled"}}
    answer = post(server, "/chat/completions", body).json()
    text = server.tokenizer.decode(answer["prompt_token_ids"])
    assert f"<think>\n{message.reasoning_content}" not in text and message.content in text
    assert "reasoning_content" not in answer["choices"][0]["message"]


def test_an_answer_is_continued_from_its_prefix_and_from_its_thought(beta, server):
    begun = {"role": "assistant", "content": "```python\n", "prefix": True}
    answer = beta.chat.completions.create(
        model="tiny", messages=[*HELLO, begun], max_tokens=3, stop=["```"], extra_body=letters(server)
    )
    assert answer.choices[0].message.content
    thought = {"role": "assistant", "content": "", "reasoning_content": "Let me see", "prefix": True}
    body = {"messages": [*HELLO, thought], "max_tokens": 3, "return_token_ids": True, **letters(server)}
    answer = post(server, "/beta/chat/completions", body).json()
    assert server.tokenizer.decode(answer["prompt_token_ids"]).endswith("<think>\nLet me see")
    assert answer["choices"][0]["message"]["reasoning_content"] and not answer["choices"][0]["message"]["content"]
    for left in (2, 0):
        budget = len(server.tokenizer.encode("Let me see")) + left
        given = {"messages": [*HELLO, thought], "max_tokens": 12, "thinking_token_budget": budget}
        answer = post(server, "/beta/chat/completions", given | letters(server)).json()
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == left
        assert answer["choices"][0]["message"]["content"]
    wrong = {"role": "user", "content": "x", "prefix": True}
    refusal(post(server, "/beta/chat/completions", {"messages": [wrong]}))


def test_a_hole_in_a_text_is_filled(beta, server):
    answer = beta.completions.create(
        model="tiny",
        prompt="def f():",
        suffix="return 1",
        max_tokens=4,
        echo=True,
        extra_body={"return_token_ids": True},
    )
    begin, hole, end = HOLES[0]
    prompt = server.tokenizer.decode(answer.choices[0].prompt_token_ids)
    assert prompt.endswith(f"{begin}def f():{hole}return 1{end}")
    assert answer.choices[0].text.startswith("def f():") and begin not in answer.choices[0].text


def test_a_model_without_marks_for_holes_says_so():
    with pytest.raises(ApiError, match="no marks for a hole"):
        fill_prompt(train_bpe(["ab " * 20], 270), "a", "b")
