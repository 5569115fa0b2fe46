"""The model in checkpoints/kogia-nano, as it is kept there."""

import json
import re
from pathlib import Path

import pytest

from kogia.checkpoint.own import OWN
from kogia.engine.request import SamplingParams
from kogia.inference.config import ChatConfig
from kogia.inference.llm import LLM
from kogia.tasks.countdown import Countdown
from kogia.tasks.task import Message, Response
from kogia.text.files import read_generation

ROOT = Path(__file__).parents[2]
MODEL = ROOT / OWN

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason=f"{OWN} is not in this checkout")


def response(completion):
    return Response(completion.text, len(completion.token_ids), completion.finish_reason == "length")


def test_its_files_fit_into_a_repository():
    sizes = [file.stat().st_size for file in MODEL.iterdir()]
    assert max(sizes) <= 16 << 20
    assert sum(sizes) <= 56 << 20


def test_its_card_says_what_was_measured():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "benchmarks/results/nano.json").read_text(encoding="utf-8"))["rows"]
    assert {row["id"] for row in rows} >= {"nano-bpb", "nano-countdown", "nano-gsm8k"}
    for row in rows:
        assert f"| {row['id']} | {row['value']:.4g} |" in card
    other = json.loads((ROOT / "benchmarks/results/nano_twin.json").read_text(encoding="utf-8"))["rows"]
    for row in other:
        if row["id"] in ("nano-bpb", "nano-bpb-dense"):
            assert f"{row['value']:.3f}" in card


def test_it_thinks_and_solves_held_out_problems():
    """Greedily four of five and more, and most drafts of its prediction module are accepted."""
    task = Countdown()
    problems = task.problems("test")[:10]
    llm = LLM(MODEL, num_draft_tokens=1, device="cpu")
    answers = [llm.chat(problem.messages, SamplingParams(temperature=0, max_tokens=300))[0] for problem in problems]
    assert all(answer.thinking for answer in answers)
    right = [task.verify(p, response(a)).correct for p, a in zip(problems, answers, strict=True)]
    assert sum(right) >= 7
    assert sum(a.num_accepted for a in answers) > 0.8 * sum(a.num_drafted for a in answers) > 0


def test_it_answers_the_questions_of_its_card_as_its_settings_have_it_sampled():
    (block,) = re.findall(
        r"## What to ask\n.*?```\n(.*?)```", (MODEL / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    questions = [quoted or line for quoted, line in re.findall(r'"""([^"]+)"""|^([^\n]+)$', block, re.MULTILINE)]
    params = SamplingParams.of(ChatConfig(str(MODEL)).sampling(read_generation(MODEL)))
    assert params.temperature == 0
    llm = LLM(MODEL, num_draft_tokens=1, device="cpu")
    answers = [llm.chat([Message("user", question)], params)[0].answer for question in questions]
    assert answers == [
        "11+(23-14)", "28", "enots", "enost", "1", "Ray knight, Ann knight, Cid knave", "U"
    ]  # fmt: skip
