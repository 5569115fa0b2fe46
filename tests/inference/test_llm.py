"""The front end, over a model directory on disk."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inference.tiny import CONFIG, PARAMS
from tokenizer_families import QWEN3, write_llama2

import kogia
from kogia.checkpoint.convert import convert
from kogia.checkpoint.hf import load_model, save_model
from kogia.cli import main
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.inference.llm import LLM
from kogia.model.config import ModelConfig
from kogia.model.linear import Linear
from kogia.model.transformer import build_model
from kogia.text.chat import Message, render_prompt
from kogia.text.tokenizer import Tokenizer


def test_texts_and_their_ids_give_the_same_completions(llm):
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("the answer")]
    assert llm.generate(["the answer"], PARAMS) == llm.generate([ids], PARAMS)
    assert llm.generate("the answer", PARAMS) == llm.generate([ids], PARAMS)


def test_a_text_that_starts_with_bos_gets_no_second_one(llm):
    assert llm.generate(["<｜begin▁of▁sentence｜>the answer"], PARAMS) == llm.generate(["the answer"], PARAMS)


def test_the_front_end_is_the_engine_over_the_loaded_model(llm, directory):
    ids = [0, 11, 12]
    engine = Engine(load_model(directory), llm.tokenizer)
    assert llm.generate([ids], PARAMS)[0][0].token_ids == engine.generate([ids], PARAMS)[0][0].token_ids


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_weights_may_be_rounded_while_they_are_loaded(llm, directory, format):
    packed = LLM(directory, device="cpu", quantize=format)
    formats = {module.format for module in packed.model.modules() if isinstance(module, Linear)}
    assert format in formats <= {format, None}
    ids = [0, 11, 12]
    engine = Engine(load_model(directory, quantize=format), llm.tokenizer)
    assert packed.generate([ids], PARAMS)[0][0].token_ids == engine.generate([ids], PARAMS)[0][0].token_ids


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_commands_take_the_format_that_weights_are_rounded_to(directory, command, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("kogia.checkpoint.hf.make_packed", lambda model, format: seen.append(format))
    words = {
        "generate": ["--prompt", "hi"],
        "eval": ["--num-questions", "1", "--num-samples", "1", "--k", "1", "--out", str(tmp_path)],
    }
    assert main([command, str(directory), *words[command], "--max-tokens", "2", "--quantize", "int8"]) == 0
    assert seen == ["int8"]


def test_chat_answers_the_rendered_conversation_and_streams_the_same_text(llm):
    messages = [Message("system", "be brief"), Message("user", "hi")]
    (answer,) = llm.chat(messages, PARAMS)
    assert answer.token_ids == llm.generate([render_prompt(messages, llm.tokenizer).token_ids], PARAMS)[0][0].token_ids
    events = list(llm.stream(messages, PARAMS))
    assert "".join(event.text for event in events) == answer.text
    assert events[-1].completion is not None
    assert events[-1].completion.token_ids == answer.token_ids


def test_a_prompt_that_was_made_elsewhere_is_taken_as_it_is(llm):
    prompt = render_prompt([Message("user", "hi")], llm.tokenizer)
    (answer,) = llm.chat([Message("user", "hi")], PARAMS)
    groups = llm.generate([prompt, prompt.token_ids], PARAMS)
    assert [[completion.token_ids for completion in group] for group in groups] == [[answer.token_ids]] * 2
    assert list(llm.stream(prompt, PARAMS))[-1].completion.token_ids == answer.token_ids


def test_plain_objects_are_messages_wherever_a_conversation_is_taken(llm):
    messages = [
        Message("system", "be brief"),
        Message("user", "hi"),
        Message("assistant", "yes"),
        Message("user", "so"),
    ]
    plain = [{"role": message.role, "content": message.content} for message in messages]
    (expected,) = llm.chat(messages, PARAMS)
    mixed = [messages[0], *plain[1:]]
    assert [llm.chat(each, PARAMS)[0].token_ids for each in (plain, mixed)] == [expected.token_ids] * 2
    assert [group[0].token_ids for group in llm.generate([plain, mixed], PARAMS)] == [expected.token_ids] * 2
    assert list(llm.stream(plain, PARAMS))[-1].completion.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user"}], r"messages\[0\] has only \['role'\] filled"),
        ([{"role": "user", "content": "a"}, {"role": "boss", "content": "b"}], "role='boss': must be one of"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is 5 \(int\): must be text"),
        ([{"role": "assistant", "content": "a"}], "must end with a user message, this one ends with assistant"),
        ([], "ends with nothing"),
    ],
)
def test_what_is_no_conversation_is_named(llm, messages, reason):
    with pytest.raises(ValueError, match=reason):
        llm.chat(messages, PARAMS)


NO_CONVERSATIONS = """
import sys
from kogia import LLM
llm, message = LLM(sys.argv[1], device="cpu"), {"role": "user", "content": "hi"}
for ask in (lambda: llm.generate([message]), lambda: next(llm.stream(message)), lambda: llm.chat("hi")):
    try:
        ask()
    except ValueError as error:
        print(error)
"""


def test_one_message_or_a_text_in_the_place_of_a_conversation_is_pointed_out(directory):
    # in a process of its own: the type checks of the test run would come first
    done = subprocess.run([sys.executable, "-c", NO_CONVERSATIONS, str(directory)], capture_output=True, text=True)
    one, streamed, text = done.stdout.splitlines()
    assert one == streamed
    assert one.endswith("one message is none; put it into a list, or use chat()")
    assert text == "messages is 'hi' (str): must be a list"


def test_a_completion_has_its_thought_and_its_answer_apart(llm, qwen):
    (answer,) = llm.chat([Message("user", "hi")], PARAMS)
    assert answer.opens_thought
    assert (answer.thinking, answer.answer) == (answer.text.strip(), "")  # random weights never close the thought
    assert replace(answer, text="so\n</think>\n\n42").thinking == "so"
    assert replace(answer, text="so\n</think>\n\n42").answer == "42"
    (plain,) = LLM(qwen, device="cpu").chat([Message("user", "hi")], PARAMS, thinking=False)
    assert not plain.opens_thought
    assert (plain.thinking, plain.answer) == (None, plain.text.strip())


def test_the_repr_of_a_completion_is_read_at_a_glance(llm):
    (answer,) = llm.chat([Message("user", "hi")], replace(PARAMS, logprobs=True))
    shown = repr(replace(answer, text="why not\n</think>\n" + "y" * 1000, finish_reason="stop"))
    assert shown == f"Completion(thinking='why not', answer='{'y' * 59}…', 12 tokens, finish_reason='stop')"
    assert "thinking=None, answer='42'" in repr(replace(answer, text="42", opens_thought=False))


def test_the_package_lists_its_names_and_has_them():
    assert set(kogia.__all__) <= set(dir(kogia))
    assert all(getattr(kogia, name).__name__ == name for name in kogia.__all__)
    assert kogia.Message is Message


def test_the_examples_of_the_readme_run(directory, tmp_path, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme.split("## In Python")[1].split("\n## ")[0], re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text("".join(blocks).replace("runs/demo/rejection_sft", str(directory)))
    names = runpy.run_path(str(script))
    assert capsys.readouterr().out.startswith(f"{names['completion'].thinking}\n{names['completion'].answer}\n")
    assert names["logits"].shape == (names["batch"].num_tokens, 290)


@pytest.mark.parametrize("ids", [[], [-1], [0, 290]])
def test_ids_that_are_no_prompt_are_refused_by_the_engine_in_its_own_words(llm, ids):
    with pytest.raises(ValueError, match=r"a prompt of 0 tokens|prompt token ids span"):
        llm.generate([ids], PARAMS)
    with pytest.raises(ValueError, match=r"a prompt of 0 tokens|prompt token ids span"):
        next(llm.stream(ids, PARAMS))


def test_leaving_a_stream_early_frees_its_blocks(llm):
    for _ in llm.stream("the answer", SamplingParams(max_tokens=50, seed=1, ignore_eos=True)):
        break
    assert llm.engine.num_unfinished == 0
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_blocks


def test_a_run_directory_loads_its_newest_checkpoint(tmp_path, llm):
    for step, seed in ((5, 1), (40, 2)):
        save_model(build_model(CONFIG, seed=seed), tmp_path / "checkpoints" / f"step-{step:06d}", llm.tokenizer)
    newest = LLM(tmp_path, device="cpu").model
    assert torch.equal(newest.lm_head.weight, build_model(CONFIG, seed=2).lm_head.weight)


def test_dtype_auto_is_float32_on_a_cpu_and_can_be_chosen(directory):
    assert LLM(directory, device="cpu").model.dtype == torch.float32
    half = LLM(directory, device="cpu", dtype="bfloat16", num_draft_tokens=None)
    assert half.model.dtype == torch.bfloat16
    assert half.engine.config.num_draft_tokens == 1
    assert len(half.generate(["the answer"], PARAMS)[0][0].token_ids) > 0


def test_wrong_options_are_named(directory, tmp_path, llm):
    with pytest.raises(ValueError, match="max_batch_token.*did you mean 'max_batch_tokens'"):
        LLM(directory, device="cpu", max_batch_token=3)
    with pytest.raises(ValueError, match="device = 'gpu'"):
        LLM(directory, device="gpu")
    with pytest.raises(ValueError, match="dtype = 'float8'"):
        LLM(directory, device="cpu", dtype="float8")
    with pytest.raises(ValueError, match="no such file"):
        LLM(tmp_path / "absent")
    small = ModelConfig(**{**vars(CONFIG), "vocab_size": 100})
    save_model(build_model(small), tmp_path / "other", llm.tokenizer)
    with pytest.raises(ValueError, match=r"275 tokens, the model only 100"):
        LLM(tmp_path / "other", device="cpu")


def test_a_model_without_bos_gets_none_and_stops_at_any_of_its_end_tokens(qwen):
    llm = LLM(qwen, device="cpu")
    assert llm.generate("The", PARAMS) == llm.generate([llm.tokenizer.encode("The")], PARAMS)
    params = SamplingParams(n=8, max_tokens=100, seed=0)
    completions = llm.generate("The", params)[0]
    assert {completion.token_ids[-1] for completion in completions} == {0}
    assert {completion.finish_reason for completion in completions} == {"stop"}
    assert all("<|endoftext|>" not in completion.text for completion in completions)


def test_a_model_saved_again_keeps_its_end_tokens_and_its_template(qwen):
    assert json.loads((qwen / "generation_config.json").read_text()) == {"eos_token_id": [2, 0], "do_sample": True}
    again = Tokenizer.load(qwen)
    assert again.eos_ids == (2, 0)
    assert again.template is not None
    assert again.template.source == QWEN3


def test_a_stream_of_pieces_with_byte_fallback_is_the_whole_text(tmp_path):
    tokenizer = Tokenizer.load(write_llama2(tmp_path / "tokenizer"))
    model = build_model(ModelConfig(**{**vars(CONFIG), "vocab_size": tokenizer.vocab_size}), seed=1)
    llm = LLM(save_model(model, tmp_path / "model", tokenizer), device="cpu")
    params = SamplingParams(max_tokens=60, seed=2, ignore_eos=True)
    (answer,) = llm.generate("The answer", params)[0]
    events = list(llm.stream("The answer", params))
    assert "\N{REPLACEMENT CHARACTER}" in answer.text  # runs of random bytes
    assert "".join(event.text for event in events) == answer.text


def test_fp8_weights_are_kept_on_demand_and_answer_as_their_dequantised_copy(directory, tmp_path):
    convert(directory, tmp_path / "fp8", dtype="fp8")
    kept, dense = (LLM(tmp_path / "fp8", device="cpu", dtype=dtype, block_size=4) for dtype in ("fp8", "float32"))
    assert {p.dtype for p in kept.model.parameters()} == {torch.float32, torch.float8_e4m3fn}
    ids = [[0, 11, 12], [0, 7]]
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    assert [c[0].token_ids for c in kept.generate(ids, greedy)] == [c[0].token_ids for c in dense.generate(ids, greedy)]
    with pytest.raises(ValueError, match="holds no FP8 weights to keep"):
        LLM(directory, device="cpu", dtype="fp8")
