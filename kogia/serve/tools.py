"""Tools of a request: what the model is told of them, and the grammar that makes it call one."""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from kogia.engine.grammar import ResponseFormat, with_blanks
from kogia.serve.errors import ApiError
from kogia.serve.fields import MOST_TOOLS, Flag, Part, Text, items
from kogia.text.tokenizer import Tokenizer
from kogia.text.tools import ToolFormat

Name = Annotated[Text, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class Function(Part):
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function

    @property
    def described(self) -> dict[str, Any]:
        """As chat templates are told of it."""
        own = self.function
        return {
            "type": "function",
            "function": {
                "name": own.name,
                "description": own.description or "",
                "parameters": own.parameters or {"type": "object", "properties": {}},
            },
        }


class NamedFunction(Part):
    name: Name


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], items(MOST_TOOLS)]
Choice = Literal["none", "auto", "required"]


FIRST_CALL = 3
"""Line of a grammar of calls where those of the first tool begin."""


def call_format(chosen: Sequence[Tool], form: ToolFormat, tokenizer: Tokenizer, *, parallel: bool) -> ResponseFormat:
    """The grammar of an answer that is calls of these tools and nothing else. ValueError for one that is too large."""
    before, between, after = (_literal(part, tokenizer) for part in (form.before, form.between, form.after))
    more = f"({between} call)*" if parallel and form.most_calls != 1 else ""
    rules = [f"start: {before} call {more} {after}", "call: " + " | ".join(f"call{i}" for i in range(len(chosen)))]
    for index, tool in enumerate(chosen):
        begin, end = (part.replace("NAME", tool.function.name) for part in form.call)
        schema = json.dumps(with_blanks(tool.function.parameters or {"type": "object"}))
        rules.append(f"call{index}: {_literal(begin, tokenizer)} arguments{index} {_literal(end, tokenizer)}")
        rules.append(f"arguments{index}: %json {schema}")
    return ResponseFormat(grammar="\n".join(rules))


_PLACE = re.compile(r"\bat (\d+)\(\d+\): (.*?)(?: \d+ \| |; correct it|$)")


def refused_call(error: ValueError, schemas: Sequence[str]) -> ApiError | None:
    """400 for the grammar of calls whose schemas the body has at these places: what is wrong with it is a schema's.
    None for other errors."""
    whole, name = "response_format.grammar", "tools"
    if not schemas or not str(error).startswith(whole):
        return None
    found = _PLACE.search(str(error))
    index = -1 if found is None else (int(found[1]) - FIRST_CALL) // 2  # each has two lines
    if found is None or not 0 <= index < len(schemas):
        return ApiError(name + str(error).removeprefix(whole), param=name)
    reason = found[2].removeprefix("failed to compile JSON schema: ")
    return ApiError(f"{schemas[index]}: {reason}; correct it", param=schemas[index])


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """A text in Lark's syntax; marks that are a token of their own are named by its id."""
    ids = {token.content: number for number, token in tokenizer.backend.get_added_tokens_decoder().items()}
    parts = re.split("|".join(f"({re.escape(mark)})" for mark in ids), text)
    words = [f"<[{ids[part]}]>" if part in ids else json.dumps(part, ensure_ascii=False) for part in parts if part]
    return " ".join(words)
