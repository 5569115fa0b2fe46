"""OpenAI's API, asked by the `openai` package as it is."""

import json
import threading
import time
from contextlib import closing

import httpx2 as httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.asks import HELLO, events, letters, post, refusal, until
from serve.server import serving
from serve.sockets import connect, head, status

from kogia.engine.grammar import Compiler
from kogia.engine.request import SamplingParams
from kogia.serve import openai_chat, openai_completions
from kogia.serve.state import ServerState
from kogia.serve.tools import Tool, call_format
from kogia.text.chat import Message, render_prompt
from kogia.text.tools import DEEPSEEK, DEEPSEEK_V31, HERMES, LLAMA

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PICK = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {
            "type": "object",
            "properties": {"n": {"enum": [1, 2]}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}
DROP = {"type": "function", "function": {**PICK["function"], "name": "drop"}}


@pytest.fixture(scope="module")
def server(model):
    with serving(model, engine={"deterministic": True}) as running:  # so that two answers can be compared bit by bit
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def whole(chunks):
    """The answers that chunks of a stream are parts of, by their index."""
    answers = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        own = answers.setdefault(
            choice["index"], {"content": "", "reasoning": "", "calls": {}, "ids": [], "logprobs": []}
        )
        delta = choice.get("delta", {"content": choice.get("text")})
        own["content"] += delta.get("content") or ""
        own["reasoning"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", ()):
            name, arguments = own["calls"].get(call["index"], (None, ""))
            function = call["function"]
            own["calls"][call["index"]] = (function.get("name", name), arguments + function["arguments"])
        own["ids"] += choice.get("token_ids") or []
        own["logprobs"] += (choice.get("logprobs") or {}).get("content", [])
        own["finish"] = choice["finish_reason"]
    return answers


def same(server, body):
    """The answers of a chat request, which streamed must be the same."""
    body = {"seed": 7, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, **body}
    answer = post(server, CHAT, body)
    assert answer.status_code == 200, answer.text
    chunks = list(events(server, CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}}))
    streamed = whole(chunks)
    for choice in answer.json()["choices"]:
        message, own = choice["message"], streamed[choice["index"]]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        assert own == {
            "content": message["content"] or "",
            "reasoning": message.get("reasoning_content", ""),
            "calls": dict(enumerate(calls)),
            "ids": choice["token_ids"],
            "logprobs": choice["logprobs"]["content"],
            "finish": choice["finish_reason"],
        }
    usage, again = answer.json()["usage"], chunks[-1]["usage"]
    known = ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details")
    assert [usage[name] for name in known] == [again[name] for name in known]  # the second time more is cached
    return answer.json()


def test_the_client_lists_the_model_and_asks_it(client, server):
    (name,) = [model.id for model in client.models.list()]
    assert client.models.retrieve(name).id == name
    never = {server.tokenizer.token_id("</think>"): -100}
    answer = client.chat.completions.create(
        model=name, messages=HELLO, max_completion_tokens=12, seed=3, temperature=1, logit_bias=never
    )
    assert answer.object == "chat.completion" and answer.model == name and answer.choices[0].finish_reason == "length"
    prompt = render_prompt([Message("user", "hello")], server.tokenizer)
    params = SamplingParams(max_tokens=12, seed=3, top_p=0.95, logit_bias=never)
    ((completion,),) = server.engine.generate([prompt.token_ids], params)
    assert answer.choices[0].message.reasoning_content == completion.thinking
    assert answer.choices[0].message.content == completion.answer == ""  # the thought did not end: no answer
    assert answer.usage.completion_tokens == 12 == answer.usage.completion_tokens_details.reasoning_tokens
    assert answer.usage.prompt_tokens == len(prompt.token_ids)


def test_the_client_streams_with_usage(client):
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=9,
            stream=True,
            stream_options=options,
            extra_body={"timings": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 9 and not chunks[-1].choices
    timings = chunks[-1].timings
    assert timings["predicted_n"] == 9 and timings["prompt_n"] + timings["cache_n"] == chunks[-1].usage.prompt_tokens
    assert all(timings[name] > 0 for name in ("queue_ms", "prompt_ms", "predicted_ms", "predicted_per_second"))


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": HELLO}), (TEXT, {"prompt": "the answer"})])
def test_a_stream_ends_with_its_usage_where_that_is_asked_for(server, monkeypatch, path, body):
    """What nobody is told is not counted either: the thoughts of a long answer take a while, at the end of all."""
    counted = []
    for module in (openai_chat, openai_completions):
        count = module.usage
        monkeypatch.setattr(module, "usage", lambda *args, count=count: (counted.append(args), count(*args))[1])
    asked = {**body, "max_tokens": 4, "stream": True}
    *_, last = events(server, path, asked)
    assert last["choices"] and not counted
    *_, last = events(server, path, {**asked, "stream_options": {"include_usage": True}})
    assert not last["choices"] and last["usage"]["completion_tokens"] <= 4 and len(counted) == 1


@settings(max_examples=12)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 3),
            "seed": st.integers(0, 99),
            "max_tokens": st.integers(1, 40),
            "temperature": st.sampled_from([0, 0.5, 2]),
            "stop": st.sampled_from(["4", ["e", "42"], [" "]]),
            "thinking_token_budget": st.integers(1, 9),
            "enable_thinking": st.booleans(),
            "top_k": st.integers(-1, 5),
            "frequency_penalty": st.floats(-2, 2),
            "min_tokens": st.integers(0, 1),
            "logit_bias": st.just({"65": 5}),
        },
    )
)
def test_streaming_equals_not_streaming(server, body):
    same(server, {"messages": HELLO, "max_tokens": 12, **body})


PARTS = st.sampled_from([
    "so ", "42", "\n\n", "<tool_call>", DEEPSEEK.before, DEEPSEEK.after, DEEPSEEK.write("pick", '{"n": 1}'), " é",
])  # fmt: skip


@settings(max_examples=10)
@given(st.lists(PARTS, min_size=1, max_size=5).map("".join), st.booleans())
def test_whatever_the_model_writes_streaming_equals_not_streaming(server, text, thinks):
    body = {"messages": HELLO, "tools": [PICK], "max_tokens": 300, "structured_outputs": {"choice": [text]}}
    answer = same(server, body | ({"thinking_token_budget": 2} if thinks else {"enable_thinking": False}))
    if DEEPSEEK.before not in text and DEEPSEEK.after not in text and DEEPSEEK.call[1] not in text:
        # blanks in front of an answer belong to the closing of a thought
        assert answer["choices"][0]["message"]["content"] == (text.lstrip() if thinks else text)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "drop"}}])
def test_a_tool_is_called_because_the_grammar_says_so(client, choice):
    def ask(**more):
        return client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[PICK, DROP], tool_choice=choice, max_tokens=400, seed=1,
            parallel_tool_calls=False, extra_body={"enable_thinking": False}, **more,
        )  # fmt: skip

    message = ask().choices[0].message
    (call,) = message.tool_calls
    assert message.content is None and call.function.name in ("pick", "drop") and call.id.startswith("call_")
    assert json.loads(call.function.arguments)["n"] in (1, 2)
    if isinstance(choice, dict):
        assert call.function.name == "drop"
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, tools=[PICK, DROP], tool_choice=choice, max_tokens=400, seed=1,
        parallel_tool_calls=False, extra_body={"enable_thinking": False},
    ) as stream:  # fmt: skip
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.arguments == call.function.arguments


@pytest.mark.parametrize("form", [DEEPSEEK, DEEPSEEK_V31, HERMES, LLAMA], ids=lambda form: form.name)
def test_a_grammar_of_calls_bounds_their_blanks(server, form):
    tokenizer = server.tokenizer
    compiler = Compiler(tokenizer.backend.to_str(), tokenizer.vocab_size, tokenizer.eos_ids)
    matcher = compiler.start(*call_format([Tool(**PICK)], form, tokenizer, parallel=False).source)

    def takes(text: str) -> bool:
        own = matcher.deep_copy()
        return all(own.consume_token(token) for token in tokenizer.encode(text))

    begun = form.before + form.call[0].replace("NAME", "pick")
    assert takes(begun + '{\n  "n": 1\n}') and takes(begun + '{"n":1}') and not takes(begun + '{"n"' + " " * 50)


def test_blanks_in_a_call_come_to_an_end(client, server):
    blanks = [number for number in range(server.tokenizer.vocab_size) if server.tokenizer.decode([number]).isspace()]
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[PICK], tool_choice="required", parallel_tool_calls=False, max_tokens=200,
        logit_bias={str(number): 100 for number in blanks}, extra_body={"enable_thinking": False},
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and json.loads(call.function.arguments)["n"] in (1, 2)


def test_results_of_tools_go_back_in_and_results_without_calls_do_not(client, server):
    call = {"id": "call_1", "type": "function", "function": {"name": "pick", "arguments": '{"n": 1}'}}
    said = [*HELLO, {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "picked"}
    never_ends = {"ignore_eos": True}
    answer = client.chat.completions.create(
        model="tiny", messages=[*said, result], tools=[PICK], max_tokens=3, extra_body=never_ends
    )
    assert answer.choices[0].finish_reason == "length"
    tokens = post(server, "/tokenize", {"messages": [*said, result], "tools": [PICK]}).json()["tokens"]
    text = post(server, "/detokenize", {"tokens": tokens}).json()["prompt"]
    assert "`pick`" in text and "<think>\nhm\n</think>" in text and DEEPSEEK.write("pick", '{"n": 1}') in text
    assert "picked<｜tool▁output▁end｜>" in text and text.endswith("<｜tool▁outputs▁end｜>")
    for wrong in ({**result, "tool_call_id": "call_2"}, {"role": "tool", "content": "picked"}):
        error = refusal(post(server, CHAT, {"messages": [*said, wrong]}))
        assert error["param"] == "messages.2.tool_call_id"
    earlier = [*said, result, {"role": "assistant", "content": "done", "reasoning": "secret"}, *HELLO]
    tokens = post(server, "/tokenize", {"messages": earlier}).json()["tokens"]
    assert not {"secret", "hm"} & set(post(server, "/detokenize", {"tokens": tokens}).json()["prompt"].split("\n"))


def test_answers_in_json_match_their_schema(client):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    for format_ in (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        {"type": "text"},
    ):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=60, response_format=format_, seed=2,
            extra_body={"thinking_token_budget": 2},
        )  # fmt: skip
        content = answer.choices[0].message.content
        if format_["type"] == "text":
            with pytest.raises(ValueError, match="Expecting|Extra"):
                json.loads(content)
        else:
            assert json.loads(content) in ({"ok": True}, {"ok": False}) and answer.choices[0].finish_reason == "stop"


def test_thoughts_are_stopped_on_demand(server):
    never = {str(server.tokenizer.token_id("</think>")): -100}
    body = {"messages": HELLO, "stream": True, "max_tokens": 60, "ignore_eos": True, "logit_bias": never}
    chunks, asked = [], False
    for chunk in events(server, CHAT, body):
        chunks.append(chunk)
        if not asked and len(chunks) > 2:
            asked = True
            stopped = httpx.post(f"{server.url}{CHAT}/{chunk['id']}/stop_thinking")
            assert stopped.json()["stopped"] is True
    answer = whole(chunks)[0]
    assert answer["reasoning"] and answer["content"]
    refusal(httpx.post(f"{server.url}{CHAT}/{chunks[0]['id']}/stop_thinking"), 404)


@pytest.fixture
def seldom(monkeypatch):
    """Chunks that wait for each other come every two minutes."""
    monkeypatch.setattr(ServerState, "chunk_seconds", 120.0)


def test_the_first_text_waits_for_no_other_chunk_where_the_first_token_has_none(server, seldom):
    text = "é, " + "the answer is 42. " * 5
    body = {"messages": HELLO, "stream": True, "enable_thinking": False, "structured_outputs": {"choice": [text]}}
    assert len(server.tokenizer.encode("é")) > 1, "half a character"
    texts = (chunk["choices"][0]["delta"].get("content") for chunk in events(server, CHAT, body))
    first = next(filter(None, texts))
    assert text.startswith(first) and first != text


def test_the_end_of_a_stream_waits_for_no_other_chunk(server, seldom):
    began = time.monotonic()
    chunks = list(events(server, CHAT, {"messages": HELLO, "stream": True, "max_tokens": 20, **letters(server)}))
    assert chunks[-1]["choices"][0]["finish_reason"] == "length" and time.monotonic() - began < 60


@pytest.mark.parametrize("switch", [
    {"enable_thinking": False}, {"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"},
    {"chat_template_kwargs": {"thinking": False}},
])  # fmt: skip
def test_thinking_is_turned_off_in_all_its_words(server, switch):
    message = post(server, CHAT, {"messages": HELLO, "max_tokens": 5, **letters(server), **switch}).json()["choices"][
        0
    ]["message"]
    assert message["content"] and "reasoning_content" not in message


def test_a_thought_ends_where_its_budget_does_and_may_be_hidden(server):
    for budget in ({"thinking_token_budget": 4}, {"thinking": {"type": "enabled", "budget_tokens": 4}}):
        never = {str(server.tokenizer.token_id("</think>")): -100}  # but where the budget forces it
        body = {"messages": HELLO, "max_tokens": 20, "ignore_eos": True, "logit_bias": never, **budget}
        answer = post(server, CHAT, body).json()
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4
        assert answer["choices"][0]["message"]["content"]
    hidden = post(server, CHAT, {**body, "include_reasoning": False}).json()
    assert "reasoning" not in hidden["choices"][0]["message"]
    error = refusal(post(server, CHAT, {**body, "enable_thinking": False}))
    assert "at once" in error["message"]


def test_an_answer_goes_on_from_its_beginning(server):
    begun = {"role": "assistant", "content": "The answer is"}
    for more in ({"prefix": True}, {}):
        body = {"messages": [*HELLO, begun | more], "max_tokens": 4, "return_token_ids": True, **letters(server)}
        answer = post(server, CHAT, body | ({} if more else {"continue_final_message": True})).json()
        text = server.tokenizer.decode(answer["prompt_token_ids"])
        assert text.endswith("</think>\n\nThe answer is")
        assert answer["choices"][0]["message"]["content"]
    refusal(post(server, CHAT, {"messages": [*HELLO, begun]}))
    refusal(post(server, CHAT, {"messages": HELLO, "continue_final_message": True}))


def test_text_completions_take_texts_and_tokens_and_score_them(client, server):
    ids = server.tokenizer.encode_raw("the answer")
    answer = client.completions.create(model="tiny", prompt=["the answer", "is"], max_tokens=5, n=2, seed=1, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.usage.completion_tokens == 20
    again = client.completions.create(model="tiny", prompt=[ids], max_tokens=5, n=2, seed=1, logprobs=2)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices[:2]]
    assert again.choices[0].logprobs == answer.choices[0].logprobs
    default = client.completions.create(model="tiny", prompt=ids, extra_body={"ignore_eos": True})
    assert default.usage.completion_tokens == 16
    scored = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=3).choices[0]
    assert scored.text == "the answer" and scored.finish_reason == "length"
    ((completion,),) = server.engine.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=3, temperature=0.6))
    assert scored.logprobs.token_logprobs == pytest.approx(completion.prompt_logprobs, abs=1e-5)
    assert (
        len(scored.logprobs.tokens) == len(ids) == len(scored.logprobs.text_offset) == len(scored.logprobs.top_logprobs)
    )


def test_text_completions_stream_what_they_answer(server):
    body = {
        "prompt": ["the answer", "is"],
        "n": 2,
        "max_tokens": 8,
        "seed": 5,
        "return_token_ids": True,
        "stop": ["4"],
    }
    answer = post(server, TEXT, {**body, "echo": True}).json()
    streamed = whole(events(server, TEXT, {**body, "echo": True, "stream": True}))
    for choice in answer["choices"]:
        own = streamed[choice["index"]]
        assert (own["content"], own["ids"], own["finish"]) == (
            choice["text"],
            choice["token_ids"],
            choice["finish_reason"],
        )
    assert answer["choices"][0]["text"].startswith("the answer")


@pytest.mark.parametrize("body, param", [
    ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": ""}, None), ({"prompt": [[1], "a"]},
    "prompt"),
    ({"prompt": [10**9]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [1], "suffix": "b"}, "suffix"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"), ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"), ({"prompt": "a", "stream": True, "echo": True,
    "logprobs": 1}, "stream"),
])  # fmt: skip
def test_text_completions_that_will_not_do_are_refused(server, body, param):
    response = post(server, TEXT, body)
    if param is None:
        assert response.status_code == 200  # it begins with BOS
    else:
        assert (refusal(response)["param"] or "").split(".")[0] == param
    assert server.engine.num_unfinished == 0


@pytest.mark.parametrize("body, param", [
    ({"n": 10**9}, "n"), ({"n": 0}, "n"), ({"n": 1.5}, "n"), ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -5}, "max_tokens"), ({"max_tokens": 2**40}, "max_tokens"),
    ({"seed": 2**80}, "seed"), ({"stop": ["x"] * 17}, "stop"), ({"stop": "x" * 2**20}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"), ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
    ({"top_logprobs": 21}, "top_logprobs"), ({"prompt_logprobs": -1}, "prompt_logprobs"), ({"model": "gpt"}, "model"),
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [{"role": "wizard"}]},
    "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"), ({"active_experts": 99}, "active_experts"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
     "messages.0.content.0.type"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [PICK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [PICK] * 129}, "tools"), ({"response_format": {"type": "json_schema"}},
    "response_format.json_schema.schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"), ({"structured_outputs": {}}, None),
    ({"structured_outputs": {"regex": "("}}, None), ({"structured_outputs": {"grammar": "start: nothing"}}, None),
    ({"min_tokens": 50, "max_tokens": 5}, "min_tokens"), ({"cache_salt": ""}, "cache_salt"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"), ({"stream": "yes"}, "stream"),
])  # fmt: skip
def test_values_that_will_not_do_are_refused_by_field_value_and_rule(server, body, param):
    response = post(server, CHAT, {"messages": HELLO, "max_tokens": 3, **body})
    error = refusal(response, 404 if param == "model" else 400)
    assert param is None or error["param"] == param
    assert len(error["message"]) < 600
    assert server.engine.num_unfinished == 0 and not server.state.running


def test_fields_without_meaning_are_passed_over_with_one_line(server, capfd):
    body = {"messages": HELLO, "max_tokens": 1, "service_tier": "auto", "\x1b[31m": 1, "stop": None, "n": None}
    for _ in range(2):
        assert post(server, CHAT, body).status_code == 200
    told = capfd.readouterr().err
    assert told.count("service_tier") == 1 and "\x1b[31m" not in told


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_within_one_step(server, stream):
    engine, step, begun, turns = server.engine, server.engine.step, [], threading.Semaphore(5)
    post(server, CHAT, {"messages": HELLO, "max_tokens": 1})
    free = engine.scheduler.pool.num_free
    engine.step = lambda: (begun.append(1), turns.acquire(timeout=60), step())[2]
    try:
        body = json.dumps({"messages": HELLO, "max_tokens": 3000, "ignore_eos": True, "stream": stream}).encode()
        with closing(connect(server)) as client:
            client.sendall(head(CHAT, "POST", f"Content-Length: {len(body)}") + body)
            assert until(lambda: len(begun) == 6)
            assert not stream or status(client.recv(100)) == 200
        assert until(lambda: not server.state.running)
        assert engine.num_unfinished == 1
        turns.release()  # the step under way
        assert until(lambda: engine.num_unfinished == 0 and engine.scheduler.pool.num_free == free)
    finally:
        engine.step = step
        turns.release(9)


def test_a_silent_stream_gets_comments(model):
    from serve.server import serving

    came, lines, body = threading.Semaphore(0), list[str](), {"messages": HELLO, "max_tokens": 2, "stream": True}
    with serving(model, keep_alive_seconds=0.1) as slow:
        step = slow.engine.step
        slow.engine.step = lambda: (came.acquire(timeout=60), came.acquire(timeout=60), step())[2]
        with httpx.stream("POST", slow.url + CHAT, json=body, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                if line == ": keep-alive":
                    came.release()
    assert lines.count(": keep-alive") >= 2 and lines[-2:] == ["data: [DONE]", ""]


def test_the_tokenizer_is_described(server):
    found = httpx.get(server.url + "/tokenizer_info").json()
    assert found["model_max_length"] == 4096 and found["eos_token"] == server.tokenizer.special_tokens["eos_token"]
    assert httpx.get(server.url + "/tokenizer_info", params={"model": "other"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "[0-9]"}}, "structured_outputs"),
        (
            "/v1/chat/completions",
            {"messages": HELLO, "enable_thinking": False, "response_format": {"type": "json_object"}},
            "response_format",
        ),
        (
            "/v1/responses",
            {"input": "a", "reasoning": {"effort": "none"}, "text": {"format": {"type": "json_object"}}},
            "text.format",
        ),
    ],
)
def test_a_format_that_other_rules_leave_no_token_is_the_requests_fault(server, path, body, field):
    error = refusal(post(server, path, body | letters(server)))
    assert error["param"] == field and error["message"].startswith(f"{field}: what else the request asks for")
    assert error["type"] == "invalid_request_error"


def test_a_stream_whose_format_is_left_no_token_ends_with_the_same_error(server):
    body = {"prompt": "a", "response_format": {"type": "json_object"}, "stream": True, **letters(server)}
    *_, last = events(server, "/v1/completions", body)
    assert last["error"]["param"] == "response_format"


@pytest.mark.parametrize(("field", "value"), [("allowed_token_ids", [10**6]), ("logit_bias", {"1000000": 1})])
def test_a_token_that_the_model_has_not_is_refused_by_the_name_of_its_field(server, field, value):
    answer = post(server, "/v1/chat/completions", {"messages": HELLO, field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field and error["message"].startswith(f"{field} names token")
