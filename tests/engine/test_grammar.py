"""Formats and thoughts: what comes out matches, drafts leave no trace, what cannot be compiled is refused in time."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.grammar import MOST_BYTES, Compiler, Grammars, ResponseFormat
from kogia.engine.request import Completion, SamplingParams, report_errors
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.transformer import Transformer, build_model
from kogia.text.chat import Message, Prompt, continue_prompt, render_prompt
from kogia.text.tokenizer import END_THINK, THINK, Tokenizer, train_bpe

CONFIG = ModelConfig(
    vocab_size=330,
    dim=32,
    num_layers=2,
    ffn_dim=64,
    attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
    num_mtp_layers=1,
    max_position=256,
    init_std=0.2,
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "ok": {"type": "boolean"},
        "kind": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "ok", "kind", "sizes"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
FORMATS = {
    "json": ResponseFormat(json=SCHEMA),
    "regex": ResponseFormat(regex=r"[a-c]{3,9}(-[0-9]{2}){2}"),
    "choice": ResponseFormat(choice=("yes", "no", 'a "third" way', "naïve")),
    "grammar": ResponseFormat(grammar='start: "(" NUM ("+" NUM)* ")"\nNUM: /[1-9][0-9]{0,3}/'),
}
CUTS = {
    "one_draft": {"num_draft_tokens": 1},
    "two_drafts_chunked": {"num_draft_tokens": 2, "max_batch_tokens": 7},
    "chunked": {"max_batch_tokens": 7},
    "preempted": {"num_blocks": 36},
    "preempted_with_drafts": {"num_blocks": 36, "num_draft_tokens": 1},
    "overlapped": {"overlap": True},
}


@pytest.fixture(scope="module", autouse=True)
def needs_llguidance() -> None:
    pytest.importorskip("llguidance", reason="formats take llguidance: pip install 'kogia[grammars]'")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(['{"name": "the answer", "ok": true, "kind": "red", "sizes": [42, 7]} no yes ' * 20], 320)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = build_model(CONFIG, seed=6)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def engine(model: Transformer, tokenizer: Tokenizer | None, **options) -> Engine:
    return Engine(model, tokenizer, EngineConfig(**{"block_size": 4, "num_blocks": 400, **options}))


@pytest.fixture(scope="module")
def uncut(model, tokenizer) -> Callable[..., list[list[Completion]]]:
    """What an engine with room for all makes of prompts, found out once for each name."""
    known: dict[str, list[list[Completion]]] = {}

    def uncut(name, prompts, params):
        if name not in known:
            known[name] = engine(model, tokenizer).generate(prompts, params)
        return known[name]

    return uncut


def asked(name: str, **options) -> SamplingParams:
    return SamplingParams(**{"response_format": FORMATS[name], "max_tokens": 120, "seed": 7, **options})


def assert_matches(name: str, text: str) -> None:
    match name:
        case "json":
            value = json.loads(text)
            assert list(value) == ["name", "ok", "kind", "sizes"]
            assert isinstance(value["ok"], bool)
            assert value["kind"] in ("red", "green")
            assert len(value["name"]) <= 6
            assert all(isinstance(size, int) and 0 <= size <= 99 for size in value["sizes"])
        case "regex":
            assert re.fullmatch(r"[a-c]{3,9}(-[0-9]{2}){2}", text)
        case "choice":
            assert text in ("yes", "no", 'a "third" way', "naïve")
        case "grammar":
            assert re.fullmatch(r"\([1-9][0-9]{0,3}(\+[1-9][0-9]{0,3})*\)", text)


PROMPTS = [[0, 15, 9, 11, 3], [0, 17], list(range(10, 48))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", FORMATS)
def test_what_comes_out_has_the_format(model, tokenizer, name, temperature):
    for group in engine(model, tokenizer).generate(PROMPTS, asked(name, temperature=temperature, n=3)):
        for completion in group:
            if completion.finish_reason == "stop":
                assert_matches(name, completion.text)
                assert completion.token_ids[-1] == tokenizer.eos_id
            else:
                assert name == "grammar" or temperature == 0.0, completion  # which may go on for ever


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_do_not_depend_on_how_the_work_is_cut(model, tokenizer, uncut, name, cut):
    params = asked(name, n=2, presence_penalty=0.3, logprobs=True, max_tokens=60)
    whole = uncut(name, PROMPTS, params)
    other = engine(model, tokenizer, **CUTS[cut])
    got = other.generate(PROMPTS, params)
    assert [[c.token_ids for c in group] for group in got] == [[c.token_ids for c in group] for group in whole]
    if "draft" in cut:
        assert other.stats.num_drafted > 30
    if "preempted" in cut and name == "json":
        assert other.stats.num_preemptions > 0


QUESTIONS = ("one", "numbers 4 6 15", "numbers 4 6 15 9")
MIXED = (
    SamplingParams(thinking_token_budget=6, ignore_eos=True),
    SamplingParams(thinking_token_budget=9, response_format=FORMATS["json"], frequency_penalty=0.4),
    SamplingParams(thinking_token_budget=3, response_format=FORMATS["regex"], logprobs=True, min_tokens=4),
)


def questions(tokenizer: Tokenizer) -> list[list[int]]:
    """Prompts that open a thought."""
    return [render_prompt([Message("user", text)], tokenizer).token_ids for text in QUESTIONS]


def tokens_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.mark.parametrize("cut", CUTS)
def test_thoughts_with_formats_do_not_depend_on_how_the_work_is_cut(model, tokenizer, uncut, cut):
    params = [replace(each, max_tokens=40, seed=5, n=2) for each in MIXED]
    whole = uncut("thoughts with formats", questions(tokenizer), params)
    other = engine(model, tokenizer, **CUTS[cut])
    got = other.generate(questions(tokenizer), params)
    assert tokens_of(got) == tokens_of(whole)
    assert other.stats.num_preemptions > 0 or "preempted" not in cut
    for group, each in zip(got, MIXED, strict=True):
        closing = [c.token_ids.index(tokenizer.token_id(END_THINK)) for c in group]
        assert max(closing) <= each.thinking_token_budget


@pytest.mark.parametrize("cut", ["", *CUTS])
def test_a_thought_that_is_closed_by_force_ends_with_the_phrase(model, tokenizer, cut):
    phrase = "numbers 4."
    closing = [*tokenizer.encode(phrase), tokenizer.token_id(END_THINK)]
    assert len(closing) > 2
    running = engine(model, tokenizer, thinking_end_phrase=phrase, **CUTS.get(cut, {}))
    params = [replace(each, max_tokens=30, seed=seed) for seed in range(4) for each in MIXED]
    num_forced = 0
    for (completion,), each in zip(running.generate(questions(tokenizer) * 4, params), params, strict=True):
        end = completion.token_ids.index(closing[-1]) + 1
        if end <= each.thinking_token_budget:
            continue  # the model has closed it by itself
        num_forced += 1
        assert completion.token_ids[each.thinking_token_budget : end] == closing, (
            "the phrase comes on top of the budget"
        )
    assert num_forced > 3
    stream = running.submit(questions(tokenizer)[0], SamplingParams(max_tokens=60, ignore_eos=True, seed=1))
    stream.stop_thinking()
    assert phrase + END_THINK in "".join(event.text for event in stream)


@pytest.mark.parametrize("phrase", ["x" * 1001, "so</think>"])
def test_a_phrase_that_cannot_end_a_thought_is_refused(phrase):
    with pytest.raises(ValueError, match=r"engine.thinking_end_phrase = .* no </think>"):
        EngineConfig(thinking_end_phrase=phrase)


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_prefix_hit_changes_nothing_for_formats_and_thoughts(model, tokenizer, drafts):
    prompts, params = questions(tokenizer), [replace(each, max_tokens=40, seed=5) for each in MIXED]
    cold = engine(model, tokenizer, prefix_cache=False).generate(prompts, params)
    warm = engine(model, tokenizer, num_draft_tokens=drafts)
    for _ in range(2):
        got = warm.generate(prompts, params)
        assert tokens_of(got) == tokens_of(cold)
    assert all(group[0].num_cached_tokens >= 4 for group in got)


@pytest.mark.parametrize("cut", ["", *CUTS])
def test_a_thought_stopped_after_so_many_tokens_is_one_with_that_budget_however_the_work_is_cut(model, tokenizer, cut):
    prompts = [*questions(tokenizer), *questions(tokenizer)]
    params = [SamplingParams(max_tokens=60, seed=seed, ignore_eos=True) for seed in range(10, 16)]
    params[1] = replace(params[1], presence_penalty=0.4)
    params[4] = replace(params[4], response_format=FORMATS["json"], ignore_eos=False)
    running = engine(model, tokenizer, **CUTS.get(cut, {}))
    ids = [running.add(prompt, each)[0] for prompt, each in zip(prompts, params, strict=True)]
    done: dict[int, Completion] = {}
    to_stop = set(ids)
    while running.num_unfinished:
        done |= {event.request_id: event.completion for event in running.step()}
        for request_id in sorted(to_stop - done.keys()):
            request = running.scheduler.find(request_id)
            if len(running.scheduler.generated(request)) >= 8:
                assert running.stop_thinking(request_id)
                to_stop.remove(request_id)
    assert running.stats.num_preemptions > 0 or "preempted" not in cut
    at = [done[request_id].token_ids.index(tokenizer.token_id(END_THINK)) for request_id in ids]
    assert all(8 <= place <= 12 for place in at), at
    bounded = [replace(each, thinking_token_budget=place) for each, place in zip(params, at, strict=True)]
    expected = engine(model, tokenizer).generate(prompts, bounded)
    assert [[done[request_id].token_ids] for request_id in ids] == tokens_of(expected)


def test_a_thought_is_stopped_while_its_request_waits_for_its_turn(model, tokenizer):
    prompt = questions(tokenizer)[1]
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    running = engine(model, tokenizer, max_sequences=1)
    (first,) = running.add(prompt, params)
    for _ in range(5):
        running.step()
    (urgent,) = running.add(prompt, replace(params, priority=-1))
    running.step()
    (unstarted,) = running.add(prompt, params)
    assert [request.id for request in running.scheduler.waiting] == [first, unstarted]
    assert running.stop_thinking(first)
    assert running.stop_thinking(unstarted)
    done: dict[int, Completion] = {}
    while running.num_unfinished:
        done |= {event.request_id: event.completion for event in running.step()}
    closing = tokenizer.token_id(END_THINK)
    assert [done[each].token_ids.index(closing) for each in (first, unstarted)] == [5, 0]
    assert done[first].token_ids[:5] == done[urgent].token_ids[:5]


def test_a_thought_comes_first_and_the_grammar_waits_for_its_end(model, tokenizer):
    prompt = render_prompt([Message("user", "numbers")], tokenizer).token_ids
    params = asked("json", thinking_token_budget=9, n=2)
    for drafts in (0, 2):
        (group,) = engine(model, tokenizer, num_draft_tokens=drafts).generate([prompt], params)
        for completion in group:
            assert completion.token_ids.index(tokenizer.token_id(END_THINK)) <= 9
            assert completion.text.count(END_THINK) == 1
            assert_matches("json", completion.answer)
    free = asked("json", max_tokens=30)  # this model does not close it by itself
    (open_one,) = engine(model, tokenizer).generate([prompt], free)[0]
    assert tokenizer.eos_id not in open_one.token_ids
    assert open_one.finish_reason == "length"


@pytest.mark.parametrize("cut", ["", *CUTS])
def test_a_budget_closes_the_thought_after_so_many_tokens_and_the_answer_follows(model, tokenizer, uncut, cut):
    prompts = [render_prompt([Message("user", text)], tokenizer).token_ids for text in ("one", "numbers 4 6 15")]
    params = SamplingParams(max_tokens=25, seed=3, ignore_eos=True, thinking_token_budget=6)
    free = uncut("no budget", prompts, replace(params, thinking_token_budget=None))
    got = engine(model, tokenizer, **CUTS.get(cut, {})).generate(prompts, params)
    whole = uncut("a budget", prompts, params)
    closing = tokenizer.token_id(END_THINK)
    for (mine,), (same,), (unbound,) in zip(got, whole, free, strict=True):
        assert mine.token_ids == same.token_ids
        assert mine.token_ids[:7] == [*unbound.token_ids[:6], closing]
        assert len(mine.token_ids) == 25
        assert mine.answer


@pytest.mark.parametrize(("content", "drafts"), [("", 0), (f"{THINK}\nthe answer ok", 2)], ids=["reasoning", "content"])
def test_a_budget_counts_what_a_prompt_has_of_a_thought(model, tokenizer, content, drafts):
    asked_first = render_prompt([Message("user", "one")], tokenizer)
    begun = continue_prompt(asked_first, content, None if content else "the answer ok", tokenizer)
    given = len(begun.token_ids) - len(asked_first.token_ids)
    bound, closing = engine(model, tokenizer, num_draft_tokens=drafts), tokenizer.token_id(END_THINK)
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    for left in (4, 1, 0, -2):
        each = replace(params, thinking_token_budget=given + left)
        (completion,) = bound.generate([begun], each)[0]
        assert completion.token_ids.index(closing) == max(0, left)
        assert completion.opens_thought and completion.answer
    (completion,) = bound.generate([begun], asked("choice", thinking_token_budget=given + 2))[0]
    assert_matches("choice", completion.answer)  # its grammar waits for the end of the thought
    request_id = bound.add(begun, params)[0]
    assert bound.stop_thinking(request_id)
    events: list = []
    while bound.num_unfinished:
        events += bound.step()
    assert events[-1].completion.token_ids[0] == closing


def test_an_answer_that_is_begun_opens_no_thought_where_a_template_leaves_the_tag_to_the_model(model, tokenizer):
    template = "{% if enable_thinking is false %}{{ '</think>' }}{% endif %}"
    switched = Tokenizer(tokenizer.backend, {**tokenizer.config, "chat_template": template})
    likes = asked("choice", logit_bias={switched.token_id(THINK): 100.0}, thinking_token_budget=4)
    begun = continue_prompt(Prompt([0, 9], opens_thought=False), "I say: ", None, switched)
    (completion,) = engine(model, switched).generate([begun], likes)[0]
    assert_matches("choice", completion.text)


def test_a_tag_of_several_tokens_is_found_and_forced(model):
    """A tokenizer without the tag among its special tokens."""
    plain = train_bpe(["the answer is 42. " * 20], 280)
    backend = json.loads(plain.backend.to_str())
    for token in backend["added_tokens"]:
        if token["content"] in (THINK, END_THINK):
            token["content"] = token["content"].upper()
    backend["model"]["vocab"] = {
        name.upper() if name in (THINK, END_THINK) else name: i for name, i in backend["model"]["vocab"].items()
    }
    tokenizer = Tokenizer(type(plain.backend).from_str(json.dumps(backend)), plain.config)
    assert len(tokenizer.encode(END_THINK)) > 1
    prompt = tokenizer.encode(f"Question.{THINK}\n")
    for drafts in (0, 2):
        params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True, thinking_token_budget=5)
        bound = engine(model, tokenizer, num_draft_tokens=drafts)
        (completion,) = bound.generate([prompt], params)[0]
        assert tokenizer.decode(completion.token_ids[5:]).startswith(END_THINK)
        begun = continue_prompt(Prompt(prompt, opens_thought=True), "", "the answer", tokenizer)
        (rest,) = bound.generate([begun], replace(params, thinking_token_budget=begun.num_thought + 2))[0]
        assert tokenizer.decode(rest.token_ids[2:]).startswith(END_THINK)
        assert completion.answer
        (choice,) = bound.generate([prompt], replace(asked("choice"), thinking_token_budget=5))[0]
        assert_matches("choice", choice.answer)


@pytest.mark.parametrize("options", [{}, {"num_draft_tokens": 2}, {"overlap": True}], ids=str)
@pytest.mark.parametrize("bound", [False, True])
def test_thinking_is_stopped_on_a_running_request(model, tokenizer, options, bound):
    prompt = render_prompt([Message("user", "numbers")], tokenizer).token_ids
    params = SamplingParams(max_tokens=40, seed=3, ignore_eos=True, presence_penalty=0.5 if bound else 0.0)
    running = engine(model, tokenizer, **options)
    (free,) = running.generate([prompt], params)[0]
    stream = running.submit(prompt, params)
    seen = [token for _, event in zip(range(6), stream) for token in event.token_ids]
    stream.stop_thinking()
    (completion,) = stream.result()
    at = completion.token_ids.index(tokenizer.token_id(END_THINK))
    assert len(seen) <= at <= len(seen) + 3
    assert completion.token_ids[:at] == free.token_ids[:at]
    assert len(completion.token_ids) == 40
    stream.stop_thinking()  # nothing happens to what has ended
    assert running.num_unfinished == 0


def test_stopping_a_thought_that_is_closed_changes_nothing(model, tokenizer):
    running = engine(model, tokenizer)
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    (free,) = running.generate([[0, 9]], params)[0]
    (request_id,) = running.add([0, 9], params)
    running.step()
    assert running.stop_thinking(request_id)
    events = []
    while running.num_unfinished:
        events += running.step()
    assert events[-1].completion.token_ids == free.token_ids
    assert not running.stop_thinking(request_id)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "response_format has nothing: give one of json, regex, choice, grammar, and no other"),
        ({"regex": "a", "choice": ("b",)}, "response_format has regex, choice: give one of"),
        ({"json": '{"type":'}, "response_format.json is no JSON"),
        ({"json": {"type": "integer", "x": float}}, "response_format.json is no JSON"),
        ({"choice": ()}, r"choice = \(\): must be at least one text, and none empty"),
        ({"choice": ("a", "")}, "none empty"),
        ({"choice": ("a", "\ud800")}, "response_format.choice holds half a character"),
        ({"regex": "a\udfff"}, "response_format.regex holds half a character"),
        ({"regex": "a" * (MOST_BYTES + 1)}, r"response_format.regex has 1,048,577 bytes: must have at most 1,048,576"),
    ],
)
def test_a_format_that_is_none_is_refused_where_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        ResponseFormat(**options)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_schema_that_is_too_deep_is_refused_however_deep_it_is(as_text):
    for levels in (60, 100_000):
        schema: dict = {"type": "integer"}
        text = '{"items":' * (2 * levels) + "1" + "}" * (2 * levels)
        for _ in range(levels):
            schema = {"type": "array", "items": {"anyOf": [schema]}}
        with pytest.raises(ValueError, match="nested too deep: at most 100 objects and lists"):
            ResponseFormat(json=text if as_text else schema)
        while isinstance(schema, dict) and "items" in schema:  # else freeing it recurses as deep
            schema = schema["items"]["anyOf"][0]


@pytest.mark.parametrize("schema", [{"type": "object"}, '{"type": "object"}', {}, "true"])
def test_json_may_be_laid_out_but_blanks_come_to_an_end(tokenizer, schema):
    def follow(text: str) -> int:
        """Characters up to the first that is refused."""
        matcher = compiler.start(*ResponseFormat(json=schema).source)
        for at, char in enumerate(text):
            (token,) = tokenizer.encode(char)
            if not matcher.consume_token(token):
                return at
        return len(text)

    compiler = Compiler(tokenizer.backend.to_str(), tokenizer.vocab_size, tokenizer.eos_ids)
    laid_out = json.dumps({"a": {"b": [1, {"c": None}]}}, indent=4)
    assert follow(laid_out) == len(laid_out)
    assert follow("{" + " " * 40) < 5 and follow("{" + "\n" * 40) < 5 and follow("{\n" + " " * 40) < 40


@pytest.mark.parametrize(
    "form, message",
    [
        (ResponseFormat(json={"type": 5}), "response_format.json: .*type.*; correct it"),
        (ResponseFormat(json={"$ref": "#/nowhere"}), "response_format.json: .*nowhere"),
        (ResponseFormat(regex="(a|b"), "response_format.regex: .*unclosed group"),
        (ResponseFormat(grammar="start: foo"), "response_format.grammar: .*unknown name"),
        (
            ResponseFormat(json={"type": "integer", "multipleOf": 62_615_533}),
            "response_format.json: compiling it .*; simplify",
        ),
        (ResponseFormat(regex="((((a{1,100}){1,100}){1,100}){1,100}){1,100}"), "regex: .*too many expressions"),
        (ResponseFormat(choice=tuple(f"choice {i}" for i in range(5000))), "choice: .*max is 2000"),
        (ResponseFormat(grammar="start: " + "(" * 5000 + '"a"' + ")" * 5000), "grammar: .*too deeply nested"),
        (ResponseFormat(json="[1]"), "json: schema must be an object or boolean; correct it"),
        (ResponseFormat(regex=r"[^\s\S]"), "regex: no text that the tokens can spell is in it; correct it"),
        (ResponseFormat(json={"$ref": "#"}), "json: no text that the tokens can spell is in it; correct it"),
        (ResponseFormat(grammar="start: start"), "grammar: no text that the tokens can spell is in it; correct it"),
        (
            ResponseFormat(
                grammar="start: "
                + " ".join(f"a{i}" for i in range(3000))
                + "".join(f'\na{i}: "x"~1..1000' for i in range(3000))
            ),
            r"grammar: llguidance gives up on it \(assertion failed: .* - 10\); correct it$",
        ),
    ],
)
def test_a_grammar_that_is_wrong_or_a_bomb_is_refused_in_time_and_leaves_nothing_behind(
    model, tokenizer, form, message
):
    started = time.monotonic()
    small = engine(model, tokenizer)
    with pytest.raises(ValueError, match=message):
        small.generate([[9], [10]], [SamplingParams(), SamplingParams(response_format=form)])
    assert time.monotonic() - started < 60
    assert small.num_unfinished == 0
    assert small.generate([[9]], asked("choice"))[0][0].finish_reason == "stop"


def test_a_grammar_that_takes_too_long_ends_its_process_alone(tokenizer, monkeypatch):
    grammars = Grammars(tokenizer, 330)
    grammars.start(FORMATS["choice"])
    worker = grammars._worker
    worker._child.process.kill()
    with pytest.raises(ValueError, match=r"response_format.regex: compiling it ended its process .*; simplify it"):
        grammars.start(FORMATS["regex"])
    grammars.start(FORMATS["regex"])
    assert grammars._worker is not worker


@pytest.fixture(scope="module")
def formats(model, tokenizer) -> Engine:
    return engine(model, tokenizer)


@pytest.mark.parametrize(
    "others",
    [
        lambda b: {"allowed_token_ids": (b,)},
        lambda b: {"logit_bias": {b: 100.0}, "allowed_token_ids": (b,)},
    ],
    ids=["allowed", "bias"],
)
def test_rules_that_leave_a_format_no_token_end_the_answer_and_are_named(formats, tokenizer, others):
    """The other sequence of the batch goes on."""
    b = tokenizer.encode_raw("b")[-1]
    params = SamplingParams(response_format=ResponseFormat(regex="a{3}"), max_tokens=8, **others(b))
    free = SamplingParams(response_format=ResponseFormat(regex="a{3}"), max_tokens=8)
    (ended,), (whole,) = formats.generate([[0, 9], [0, 9]], [params, free])
    assert ended.finish_reason == "error"
    assert "leaves no token that it allows" in (ended.error or "")
    assert (whole.finish_reason, whole.text) == ("stop", "aaa")


TAGS = (END_THINK, "<｜end▁of▁sentence｜>")
SPELT = {
    "choice": lambda tag: ResponseFormat(choice=(tag,)),
    "choice_within": lambda tag: ResponseFormat(choice=(f"a{tag}b",)),
    "regex": lambda tag: ResponseFormat(regex=re.escape(tag) + "[0-9]"),
    "regex_within": lambda tag: ResponseFormat(regex=f"(a|b){re.escape(tag)}"),
    "json": lambda tag: ResponseFormat(json={"const": f"{tag}x", "x-guidance": {"whitespace_flexible": False}}),
    "json_name": lambda tag: ResponseFormat(
        json={"properties": {tag: {"const": 1}}, "required": [tag], "additionalProperties": False, "type": "object"}
    ),
    "grammar": lambda tag: ResponseFormat(grammar=f'start: "{tag}" // not {tag}, a text'),
    "grammar_in_parts": lambda tag: ResponseFormat(grammar=f'start: "{tag[:2]}" "{tag[2:]}" /[x-z]{tag[:1]}/'),
}


@pytest.mark.parametrize("kind", SPELT)
@pytest.mark.parametrize("tag", TAGS)
def test_text_that_spells_a_special_token_is_written_as_text(formats, tokenizer, tag, kind):
    params = SamplingParams(response_format=SPELT[kind](tag), max_tokens=80, seed=3)
    (completion,) = formats.generate([[0, 9]], params)[0]
    assert (completion.finish_reason, completion.error) == ("stop", None)
    assert tag in completion.text
    assert tokenizer.special_ids.isdisjoint(completion.token_ids[:-1])


def test_a_tag_that_is_added_and_not_special_is_written_as_text_too(model, tokenizer):
    """As Qwen's are."""
    backend = json.loads(tokenizer.backend.to_str())
    for token in backend["added_tokens"]:
        token["special"] = token["content"] not in (THINK, END_THINK)
    switched = Tokenizer(type(tokenizer.backend).from_str(json.dumps(backend)), tokenizer.config)
    params = asked("choice", response_format=ResponseFormat(choice=(f"{END_THINK}b",)))
    (completion,) = engine(model, switched).generate([[0, 9]], params)[0]
    assert completion.text == f"{END_THINK}b"
    assert switched.token_id(END_THINK) not in completion.token_ids


def test_a_grammar_asks_for_a_special_token_by_its_name(model, tokenizer):
    form = ResponseFormat(grammar=f'start: "{THINK}" {THINK} /x<\\/think>/ {END_THINK} // {THINK}')
    (completion,) = engine(model, tokenizer).generate([[0, 9]], asked("grammar", response_format=form))[0]
    assert completion.text == f"{THINK}{THINK}x{END_THINK}{END_THINK}"
    specials = [token for token in completion.token_ids if token in tokenizer.special_ids]
    assert specials == [tokenizer.token_id(THINK), tokenizer.token_id(END_THINK), tokenizer.eos_id]


def test_formats_need_a_tokenizer_and_the_end_token(model, tokenizer):
    with pytest.raises(ValueError, match="response_format = .*: formats need a tokenizer; leave it out"):
        engine(model, None).add([5], asked("choice"))
    with pytest.raises(ValueError, match="thinking_token_budget = 5: the tags of a thought need a tokenizer"):
        engine(model, None).add([5], SamplingParams(thinking_token_budget=5))
    with pytest.raises(ValueError, match="ignore_eos with response_format"):
        asked("choice", ignore_eos=True)
    params = asked("choice")
    object.__setattr__(params, "response_format", {"type": "json"})  # past the tests' check of types
    with pytest.raises(ValueError, match=r"response_format = \{'type': 'json'\}: must be a kogia.ResponseFormat"):
        params.__post_init__()
    with pytest.raises(ValueError, match="thinking_token_budget = 0: must be at least 1.* turn thinking off"):
        SamplingParams(thinking_token_budget=0)


def test_a_grammar_beyond_its_limits_in_a_step_ends_its_request_alone(model, tokenizer, monkeypatch):
    busy = engine(model, tokenizer)
    (bad,) = busy.add([0, 9], asked("regex"))
    (good,) = busy.add([0, 9], asked("json"))
    busy.step()
    rule = busy.scheduler.find(bad).rules.rules[0]
    monkeypatch.setattr(rule, "_matcher", Broken())
    done: dict[int, Completion] = {}
    while busy.num_unfinished:
        done |= {event.request_id: event.completion for event in busy.step()}
    assert (done[bad].finish_reason, done[bad].error) == ("error", "too complex")
    assert done[good].finish_reason == "stop"
    with pytest.raises(FloatingPointError, match="too complex"):
        report_errors([done[bad]])


class Broken:
    """A matcher that has met a limit."""

    def is_stopped(self) -> bool:
        return False

    def consume_token(self, _: int) -> bool:
        return False

    def get_error(self) -> str:
        return "too\ncomplex"


def test_a_model_may_think_before_its_answer_where_its_template_leaves_the_tag_to_it(model, tokenizer):
    template = "{% if enable_thinking is false %}{{ '</think>' }}{% endif %}"
    switched = Tokenizer(tokenizer.backend, {**tokenizer.config, "chat_template": template})
    think = switched.token_id(THINK)
    thinking = engine(model, switched)
    likes = asked("choice", logit_bias={think: 100.0}, thinking_token_budget=4)
    (completion,) = thinking.generate([[0, 9]], likes)[0]
    assert completion.token_ids[0] == think
    assert completion.token_ids.index(switched.token_id(END_THINK)) <= 5
    assert_matches("choice", completion.answer)
    (closed,) = thinking.generate([[0, 9, switched.token_id(END_THINK)]], likes)[0]
    assert_matches("choice", closed.text)
    (plain,) = engine(model, tokenizer).generate([[0, 9]], likes)[0]
    assert_matches("choice", plain.text)
