"""Answers as rows of parts: thought, texts and calls in the order in which the model wrote them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import combinations

import pytest

from kogia.engine.request import Completion, TokenEvent
from kogia.serve.generation import AnswerReader, Piece
from kogia.serve.segments import segments
from kogia.text.tools import DEEPSEEK, DEEPSEEK_V31, HERMES, LLAMA, ToolFormat


def parts_of(texts: Sequence[str], form: ToolFormat) -> list[tuple[str, str, str]]:
    """(kind, name, text) of each part of an answer whose text came in these pieces."""
    reader, ends = (
        AnswerReader(False, form.reader()),
        [*[None] * (len(texts) - 1), Completion([], "", None, "stop", *[0] * 4)],
    )

    async def pieces() -> AsyncGenerator[Piece, None]:
        for text, end in zip(texts, ends, strict=True):
            yield reader.read(0, TokenEvent(0, [], [], text, end))

    async def all_steps() -> list[tuple[str, str, str]]:
        steps = [step async for step in segments(pieces())]
        return [(own.kind, own.name, own.text) for step in steps if step.does == "ends" and (own := step.segment)]

    return asyncio.run(all_steps())


def written(form: ToolFormat, *, behind: str) -> str:
    calls = form.write("pick", '{"n": 1}'), form.write("drop", '{"m": {}}')
    before = "" if form is LLAMA else "first "
    return f"{before}{form.before}{(form.between or ' ').join(calls)}{form.after}{behind}"


@pytest.mark.parametrize("form", [DEEPSEEK, DEEPSEEK_V31, HERMES, LLAMA], ids=lambda form: form.name)
@pytest.mark.parametrize("behind", ["", "42", "\n\n42 "])
def test_parts_are_in_the_order_in_which_they_were_written_however_their_text_is_cut(form, behind):
    text = written(form, behind=behind)
    whole = parts_of([text], form)
    own = [("call", "pick", '{"n": 1}'), ("call", "drop", '{"m": {}}')]
    assert [part for part in whole if part[0] == "call"] == own
    texts = [part[2].strip() for part in whole if part[0] == "text"]
    assert texts == ([] if form is LLAMA else ["first"]) + ([behind.strip()] if behind else [])
    kinds = [part[0] for part in whole]
    assert kinds.index("call") + 2 == len(kinds) - bool(behind)  # calls side by side, and the text behind them
    for one, other in combinations(range(0, len(text) + 1, 5), 2):
        assert parts_of([text[:one], text[one:other], text[other:]], form) == whole, (one, other)
