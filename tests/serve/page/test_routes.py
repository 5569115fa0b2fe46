"""What the page asks of the server, asked without a browser."""

import base64
import json
import re
from itertools import pairwise

import httpx2 as httpx
import numpy as np
import pytest

pytest.importorskip("nh3", reason="needs kogia[server]")

from serve.asks import HELLO, post, refusal

from kogia.engine.request import SamplingParams
from kogia.serve.page.files import STATIC
from kogia.serve.page.render import render
from kogia.serve.page.trace import token_texts


def told(server, body) -> list[tuple[str, dict]]:
    """Events of an answer: (kind, data)."""
    found, kind = [], "message"
    with httpx.stream("POST", server.url + "/page/chat", json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            if line.startswith("data: "):
                found.append((kind, json.loads(line.removeprefix("data: "))))
                kind = "message"
    return found


def test_an_answer_of_the_page_is_that_of_the_api_with_the_html_of_its_text(server):
    body = {"messages": HELLO, "max_tokens": 80, "seed": 3, "temperature": 1.0}
    (kind, start), *more = told(server, body)
    plain = post(server, "/v1/chat/completions", {**body, "return_token_ids": True}).json()
    message = plain["choices"][0]["message"]
    text = {name: "".join(data[name] for _, data in more) for name in ("reasoning", "content")}
    assert (kind, more[-1][0]) == ("start", "end")
    assert text["content"] == message["content"] and text["reasoning"] == message.get("reasoning", "")
    assert more[-1][1]["token_ids"] == plain["choices"][0]["token_ids"]
    assert start["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    for part, name in (("thought", "reasoning"), ("answer", "content")):
        assert shown(more, part) == render(text[name])


def shown(events, part) -> list[str]:
    blocks: list[str] = []
    for _, data in events:
        if part in data:
            blocks[data[part]["kept"] :] = data[part]["blocks"]
    return blocks


def test_counts_of_an_answer_grow_and_end_as_its_tokens(server):
    more = [data for kind, data in told(server, {"messages": HELLO, "max_tokens": 60, "ignore_eos": True})[1:]]
    assert all(one["tokens"] <= other["tokens"] for one, other in pairwise(more))
    assert more[-1]["tokens"] == len(more[-1]["token_ids"]) == 60
    assert more[-1]["thought_tokens"] <= 60 and more[-1]["seconds"] > 0


def test_a_request_that_will_not_do_is_refused_as_by_the_api(server):
    assert refusal(post(server, "/page/chat", {"messages": []}))["param"] == "messages"
    assert refusal(post(server, "/page/chat", {"messages": HELLO, "n": 2}))["param"] == "n"
    assert refusal(post(server, "/page/render", {"texts": "a"}))["param"] == "texts"
    assert refusal(post(server, "/page/trace", {"messages": HELLO, "token_ids": []}))["param"] == "token_ids"
    assert "model knows" in refusal(post(server, "/page/trace", {"messages": HELLO, "token_ids": [2**30]}))["message"]


def test_texts_are_rendered_in_order(server):
    answer = post(server, "/page/render", {"texts": ["**a**\n\nb", "", "<i>"]}).json()
    assert answer["blocks"] == [["<p><strong>a</strong></p>\n", "<p>b</p>\n"], [], ["<p>&lt;i&gt;</p>\n"]]


def test_models_are_told_with_the_share_of_their_parameters_that_is_active(server):
    (model,) = httpx.get(server.url + "/page/models").json()["models"]
    assert model["name"] == "tiny" and 0 < model["active_params"] < model["params"]
    inactive = (model["num_experts"] - model["topk"]) * model["expert_params"]
    embedding = server.state.models["tiny"].config.vocab_size * server.state.models["tiny"].config.dim
    assert model["params"] == model["active_params"] + inactive + embedding


def test_a_trace_has_the_probability_and_the_experts_of_each_token(server):
    """The engine's own of a request that asked for them when it was written."""
    messages = [{"role": "user", "content": "what is it?"}]
    body = {"messages": messages, "max_tokens": 20, "temperature": 1.0, "ignore_eos": True, "seed": 8}
    plain = post(server, "/v1/chat/completions", {**body, "return_token_ids": True, "logprobs": True}).json()
    prompt, answer = plain["prompt_token_ids"], plain["choices"][0]["token_ids"]
    trace = post(server, "/page/trace", {"messages": messages, "token_ids": answer}).json()
    scores = [each["logprob"] for each in plain["choices"][0]["logprobs"]["content"]]
    assert trace["logprobs"] == pytest.approx(scores, abs=1e-3)
    assert trace["tokens"] == token_texts(server.tokenizer, answer)
    for score, top in zip(trace["logprobs"], trace["top"]):
        likeliest = [each for _, _, each in top]
        assert len(top) == 5 and likeliest == sorted(likeliest, reverse=True) and likeliest[0] >= score

    (model,) = httpx.get(server.url + "/page/models").json()["models"]
    shape = (len(answer), len(trace["layers"]), model["topk"])
    experts = np.frombuffer(base64.b64decode(trace["experts"]), "<u2").reshape(shape)
    params = SamplingParams(max_tokens=1, return_routed_experts=True)
    (again,) = server.engine.generate([[*prompt, *answer]], params)[0]
    assert (experts == again.routed_experts[len(prompt) :]).all()
    assert len(trace["layers"]) == model["num_mixtures"] and experts.max() < model["num_experts"]


def test_a_trace_of_fewer_experts_shows_as_many(server):
    body = {"messages": HELLO, "token_ids": [40, 41, 42]}
    trace = post(server, "/page/trace", {**body, "active_experts": 1}).json()
    assert len(base64.b64decode(trace["experts"])) == 2 * 3 * len(trace["layers"])


def test_a_trace_of_an_answer_that_fills_the_context_leaves_out_what_does_not_fit(server):
    length = server.state.models["tiny"].config.max_position
    trace = post(server, "/page/trace", {"messages": HELLO, "token_ids": [40] * length}).json()
    assert 0 < len(trace["tokens"]) < length


def test_tokens_that_are_parts_of_a_character_make_its_text_together(server):
    ids = server.tokenizer.encode_raw("a𝛼é")
    texts = token_texts(server.tokenizer, ids)
    assert "".join(texts) == server.tokenizer.decode(ids) and len(texts) == len(ids) > 3


def test_every_file_of_the_page_comes_with_a_policy_that_allows_nothing_else(server):
    for path in ("/", *(f"/page/{each.name}" for each in STATIC.iterdir())):
        response = httpx.get(server.url + path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        again = httpx.get(server.url + path, headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2f__init__.py", "%2e%2e/render.py", "static/app.js", ""])
def test_no_other_file_can_be_asked_for(server, name):
    refusal(httpx.get(f"{server.url}/page/{name}"), 404)


def test_the_page_names_nothing_elsewhere_and_has_no_script_in_itself():
    for path in STATIC.iterdir():
        text = path.read_text().replace("http://www.w3.org/", "")
        assert "http://" not in text and "https://" not in text, path.name
        # the one place is the policy's own
        assert text.count("innerHTML") == (path.name == "html.js") * 2, path.name
        for word in ("insertAdjacentHTML", "document.write", "eval(", "outerHTML", "new Function"):
            assert word not in text, (path.name, word)
    index = (STATIC / "index.html").read_text()
    assert not re.search(r"\s(style|on\w+)=", index)
    assert index.count("<script") == index.count("<script src=") + index.count('<script type="module" src=') == 2
