"""The front end and the two commands, over a model directory on disk."""

import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizer_families import QWEN3, write_llama2, write_qwen

from kogia import cli
from kogia.checkpoint.convert import convert
from kogia.checkpoint.hf import load_model, save_model
from kogia.engine import chat as chat_command
from kogia.engine.chat import ThoughtStyle
from kogia.engine.config import ChatConfig, GenerateConfig
from kogia.engine.engine import Engine
from kogia.engine.generate import read_prompts
from kogia.engine.llm import LLM
from kogia.engine.request import SamplingParams
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.transformer import build_model
from kogia.text.chat import Message, render_prompt
from kogia.text.tokenizer import Tokenizer, train_bpe

CONFIG = ModelConfig(
    vocab_size=290,
    dim=32,
    num_layers=2,
    ffn_dim=64,
    attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
    num_mtp_layers=1,
    max_position=256,
    init_std=0.2,
)
PARAMS = SamplingParams(max_tokens=12, seed=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    tokenizer = train_bpe(["the answer is 42. " * 20], 280)
    return save_model(build_model(CONFIG, seed=5), tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def llm(directory) -> LLM:
    return LLM(directory, device="cpu", block_size=4)


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


def test_chat_answers_the_rendered_conversation_and_streams_the_same_text(llm):
    messages = [Message("system", "be brief"), Message("user", "hi")]
    (answer,) = llm.chat(messages, PARAMS)
    assert answer.token_ids == llm.generate([render_prompt(messages, llm.tokenizer)], PARAMS)[0][0].token_ids
    events = list(llm.stream(messages, PARAMS))
    assert "".join(event.text for event in events) == answer.text
    assert events[-1].completion is not None
    assert events[-1].completion.token_ids == answer.token_ids


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


def test_generate_command_writes_one_json_line_per_completion(directory, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    out = tmp_path / "out.jsonl"
    flags = ["--n", "2", "--max-tokens", "8", "--seed", "1", "--device", "cpu", "--engine.num-draft-tokens", "1"]
    assert cli.main(["generate", str(directory), "--file", str(prompts), "--out", str(out), *flags]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["prompt"], row["index"]) for row in rows] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    llm = LLM(directory, device="cpu")
    params = SamplingParams(n=2, max_tokens=8, seed=1, temperature=0.6, top_p=0.95)
    expected = llm.chat([Message("user", "two")], params)
    assert [row["text"] for row in rows[2:]] == [completion.text for completion in expected]
    assert [row["num_tokens"] for row in rows[2:]] == [len(completion.token_ids) for completion in expected]
    assert "tokens/s" in capsys.readouterr().err


def test_generate_command_continues_raw_text_on_stdout(directory, capsys):
    flags = ["--raw", "--max-tokens", "8", "--temperature", "0", "--device", "cpu"]
    assert cli.main(["generate", str(directory), "--prompt", "the answer", *flags]) == 0
    (expected,) = LLM(directory, device="cpu").generate("the answer", SamplingParams(max_tokens=8, temperature=0))[0]
    assert capsys.readouterr().out == expected.text + "\n"


def test_generate_command_names_what_is_missing(directory, tmp_path, capsys, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"question": "y"}\n')
    assert cli.main(["generate", str(directory), "--file", str(bad)]) == 2
    assert "bad.jsonl, line 2: must be a JSON object with a 'prompt'" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(ValueError, match="stdin holds no prompt"):
        read_prompts(GenerateConfig(path=str(directory)))


def test_a_byte_order_mark_before_prompts_is_no_part_of_the_first(tmp_path, monkeypatch):
    for name, content in (("a.txt", "one\ntwo\n"), ("a.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read_prompts(GenerateConfig(path="m", file=str(tmp_path / name))) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffone\ntwo\n"))
    assert read_prompts(GenerateConfig(path="m")) == ["one", "two"]


def test_chat_command_answers_lines_of_stdin_and_keeps_the_conversation(directory, monkeypatch, capsys, llm):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand again\n/reset\nhello\n/what\n"))
    config = ChatConfig(path=str(directory), max_tokens=9, seed=4, device="cpu")
    assert chat_command.main(config) == 0
    out = capsys.readouterr().out
    assert out.count("tokens/s") == 3
    assert "unknown command /what" in out
    params = SamplingParams(max_tokens=9, seed=4, temperature=0.6, top_p=0.95)
    (first,) = llm.chat([Message("user", "hello")], params)
    assert out.count(first.text.split("</think>")[0]) >= 2  # the same answer again after /reset


def test_chat_command_survives_a_question_that_is_too_long(directory, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("x " * 300 + "\nhello\n"))
    assert chat_command.main(ChatConfig(path=str(directory), max_tokens=4, seed=4, device="cpu")) == 0
    captured = capsys.readouterr()
    assert "or /reset the conversation" in captured.err.replace("\n", " ")
    assert captured.out.count("tokens/s") == 1


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(directory, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello\n"))
    original, pressed = LLM.stream, []

    def stream(self, *args):
        for number, event in enumerate(original(self, *args)):
            if number == 3 and not pressed:
                pressed.append(True)
                os.kill(os.getpid(), signal.SIGINT)
            yield event

    monkeypatch.setattr(LLM, "stream", stream)
    config = ChatConfig(path=str(directory), max_tokens=9, seed=1, draft_tokens=0, device="cpu")
    before = signal.getsignal(signal.SIGINT)
    assert chat_command.main(config) == 0
    out = capsys.readouterr().out
    assert out.count("stopped") == 1
    assert out.count("tokens/s") == 2
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A model with Qwen3's tokenizer and template that soon ends with <|endoftext|>, the second of its end ids."""
    root = tmp_path_factory.mktemp("qwen")
    tokenizer = Tokenizer.load(write_qwen(root / "tokenizer"))
    model = build_model(ModelConfig(**{**vars(CONFIG), "vocab_size": tokenizer.vocab_size}), seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1.0
        model.lm_head.weight[tokenizer.token_id("<|endoftext|>")] = 10.0 / CONFIG.dim
    return save_model(model, root / "model", tokenizer)


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


def test_generate_command_reads_answers_of_a_model_that_opens_no_thought(qwen, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ["--prompt", "one", "--max-tokens", "8", "--seed", "1", "--device", "cpu", "--thinking", "False"]
    assert cli.main(["generate", str(qwen), "--out", str(out), *flags]) == 0
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    params = SamplingParams(max_tokens=8, seed=1, temperature=0.6, top_p=0.95)
    (expected,) = LLM(qwen, device="cpu").chat([Message("user", "one")], params, thinking=False)
    assert row["text"] == expected.text
    assert (row["thinking"], row["answer"]) == (None, expected.text.strip())


def test_chat_command_stops_drafting_when_drafts_are_hardly_ever_right(directory, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\n"))
    config = ChatConfig(path=str(directory), max_tokens=90, seed=4, device="cpu", single=True)
    assert chat_command.main(config) == 0
    summaries = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert ["drafts" in line for line in summaries] == [True, False, False]


def test_a_stream_of_pieces_with_byte_fallback_is_the_whole_text(tmp_path):
    tokenizer = Tokenizer.load(write_llama2(tmp_path / "tokenizer"))
    model = build_model(ModelConfig(**{**vars(CONFIG), "vocab_size": tokenizer.vocab_size}), seed=1)
    llm = LLM(save_model(model, tmp_path / "model", tokenizer), device="cpu")
    params = SamplingParams(max_tokens=60, seed=2, ignore_eos=True)
    (answer,) = llm.generate("The answer", params)[0]
    events = list(llm.stream("The answer", params))
    assert "\N{REPLACEMENT CHARACTER}" in answer.text  # runs of random bytes
    assert "".join(event.text for event in events) == answer.text


@pytest.mark.parametrize(
    ("pieces", "dim", "normal"),
    [
        (("\n<th", "ink>", "\na", "b</think>", "c"), "ab", "\nc\n"),
        (("<thin", " air>"), "", "<thin air>\n"),
        (("a</think>",), "", "a</think>\n"),
        (("<think",), "", "<think\n"),
    ],
)
def test_an_answer_to_a_prompt_that_opens_no_thought_is_dimmed_only_if_it_opens_one(pieces, dim, normal):
    file = io.StringIO()
    style = ThoughtStyle(Console(file=file, force_terminal=True, color_system="standard", width=200), opened=False)
    for piece in pieces:
        style.write(piece)
    style.close()
    parts = file.getvalue().split("\x1b[0m")
    assert "".join(part.removeprefix("\x1b[2m") for part in parts[:-1]) == dim
    assert parts[-1] == normal


def test_thoughts_are_dimmed_until_the_mark_even_in_pieces():
    file = io.StringIO()
    style = ThoughtStyle(Console(file=file, force_terminal=True, color_system="standard", width=200))
    for piece in ("let me <", "think", "</", "thi", "nk>the answer", " </think>"):
        style.write(piece)
    style.close()
    dim, normal = file.getvalue().rsplit("\x1b[0m", 1)
    assert dim.replace("\x1b[2m", "").replace("\x1b[0m", "") == "let me <think"
    assert normal == "\nthe answer </think>\n"


def test_fp8_weights_are_kept_on_demand_and_answer_as_their_dequantised_copy(directory, tmp_path):
    convert(directory, tmp_path / "fp8", dtype="fp8")
    kept, dense = (LLM(tmp_path / "fp8", device="cpu", dtype=dtype, block_size=4) for dtype in ("fp8", "float32"))
    assert {p.dtype for p in kept.model.parameters()} == {torch.float32, torch.float8_e4m3fn}
    ids = [[0, 11, 12], [0, 7]]
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    assert [c[0].token_ids for c in kept.generate(ids, greedy)] == [c[0].token_ids for c in dense.generate(ids, greedy)]
    with pytest.raises(ValueError, match="holds no FP8 weights to keep"):
        LLM(directory, device="cpu", dtype="fp8")
