"""Completions that must match a JSON schema, a regular expression, one of some texts or a Lark grammar (llguidance).

A grammar is tried in a process of its own before it is compiled here, so that one that takes too long or too much costs
that process and nothing else; both happen where the request is made, never within a step. What a step does for it, one
mask of allowed tokens per sample, is bounded by llguidance's own limits. Torch-free.
"""

import importlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kogia.engine.rules import Edit, Rule, Words
from kogia.engine.thinking import Thought
from kogia.process import LineWorker, WorkerLost
from kogia.text.tokenizer import Tokenizer

MOST_BYTES = 1 << 20
"""Longest grammar."""
MOST_DEPTH = 100
"""Of the objects and lists in a JSON schema."""
CPU_SECONDS = 5.0
"""For one grammar to be compiled and tried."""
MEMORY_BYTES = 512 << 20
"""What it may allocate for that."""
WALL_SECONDS = 60.0
EXPLORED = 16
"""Tokens of one text that a grammar is tried with."""
MOST_KEPT = 32
"""Compiled grammars that are kept for requests to come."""
KINDS = ("json", "regex", "choice", "grammar")


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """What a completion, behind its thought, must be: one of these, whose names are vLLM's."""

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as an object or its text."""
    regex: str | None = None
    """A regular expression in Rust's syntax, which the whole answer matches."""
    choice: tuple[str, ...] | None = None
    """Texts, of which the answer is one."""
    grammar: str | None = None
    """A grammar in Lark's syntax, whose start is the rule `start`."""

    def __post_init__(self) -> None:
        """Raise ValueError unless it is one format, and of a size that will do."""
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"response_format has {', '.join(given) or 'nothing'}: give one of {', '.join(KINDS)}, and no other"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        if self.choice is not None and not _is_texts(self.choice):
            raise ValueError(f"response_format.choice = {self.choice!r:.80}: must be at least one text, and none empty")
        kind, text = given[0], self.source[1]
        if kind in ("regex", "grammar") and not isinstance(getattr(self, kind), str):
            raise ValueError(f"response_format.{kind} = {getattr(self, kind)!r:.80}: must be a text")
        if (size := len(text.encode(errors="replace"))) > MOST_BYTES:
            raise ValueError(f"response_format.{kind} has {size:,} bytes: must have at most {MOST_BYTES:,}")
        if any(not part.isascii() and _has_surrogates(part) for part in (text, *(self.choice or ()))):
            raise ValueError(
                f"response_format.{kind} holds half a character (a surrogate), which no text has; leave it out"
            )

    @property
    def source(self) -> tuple[str, str]:
        """(kind, text), as `Compiler.start` takes them."""
        for kind, text in (("json", self.json), ("regex", self.regex), ("grammar", self.grammar)):
            if text is not None:
                return kind, str(text)
        return "choice", json.dumps(self.choice)


def _is_texts(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(text, str) and text for text in value)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


OPTIONS = "x-guidance"
"""What llguidance calls its own settings within a schema."""
WHITESPACE = {"whitespace_pattern": r"[ \t]{0,2}(\r?\n[ \t]{0,32})?"}
"""Between parts of JSON: a model that likes blanks would write them until its tokens end."""


def with_blanks(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema that says how many blanks JSON may have, unless it does."""
    return schema if isinstance(schema.get(OPTIONS), Mapping) else {**schema, OPTIONS: WHITESPACE}


def _schema_text(schema: str | Mapping[str, Any]) -> str:
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if parsed is True:  # anything
            parsed = {}
        text = json.dumps(with_blanks(parsed) if isinstance(parsed, Mapping) else parsed, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"response_format.json is no JSON ({error}); give a schema as an object or its text") from None
    except RecursionError:
        text = "[" * (MOST_DEPTH + 1)
    if _depth(text) > MOST_DEPTH:
        raise ValueError(f"response_format.json is nested too deep: at most {MOST_DEPTH} objects and lists; flatten it")
    return text


def _depth(text: str) -> int:
    """Of JSON text: the most objects and lists around one place."""
    depth = deepest = 0
    is_text = is_escaped = False
    for char in text:
        if is_text:
            is_text, is_escaped = is_escaped or char != '"', not is_escaped and char == "\\"
        elif char in '[{"':
            is_text, depth = char == '"', depth + (char != '"')
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


class Compiler:
    """llguidance for one tokenizer, and for a model with `vocab` tokens."""

    def __init__(self, tokenizer: str, vocab: int, eos_ids: Sequence[int]) -> None:
        """`tokenizer` is the text of a tokenizer.json. Raises ValueError where llguidance is missing or refuses it."""
        self._library, self._eos_ids = _library(), list(eos_ids)
        unspelt, self._special_ids = _without_spellings(tokenizer)
        self._words = np.zeros(-(-vocab // 64), dtype=np.int64)
        # the library wants its own size exactly
        self._place = self._words.ctypes.data, 4 * -(-vocab // 32)
        try:
            self._tokenizer = self._library.LLTokenizer(unspelt, n_vocab=vocab, eos_token=list(eos_ids))
        except Exception as error:
            raise ValueError(f"this tokenizer cannot be used with llguidance: {error}") from error

    def start(self, kind: str, text: str) -> Any:
        """A matcher before the first token. Raises ValueError for a grammar that is wrong or too large."""
        library = self._library
        limits = library._lib.LLParserLimits(verbose_errors=False)
        try:
            if kind == "grammar":
                kind, text = "lark", _numbered(text, self._special_ids)
            grammar = library.grammar_from(kind, text)
            matcher = library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        except Exception as error:  # noqa: BLE001 - as above
            raise ValueError(_one_line(str(error))) from None
        if matcher.is_error():
            raise ValueError(_one_line(matcher.get_error()))
        return matcher

    def explore(self, matcher: Any) -> None:
        """Follow one text for some tokens. Raises ValueError for a grammar that goes beyond llguidance's limits there:
        it would end every request that has it."""
        for _ in range(EXPLORED):
            bits = np.unpackbits(self.next_words(matcher).view(np.uint8), bitorder="little")
            allowed = np.setdiff1d(np.flatnonzero(bits), self._eos_ids)
            if not len(allowed):
                return
            if not matcher.consume_token(int(allowed[len(allowed) // 2])):
                raise ValueError(_one_line(matcher.get_error()))

    def next_words(self, matcher: Any) -> Words:
        """The tokens that may be next, the end token among them where the text may end. Raises ValueError where that
        goes beyond llguidance's limits."""
        matcher.unsafe_compute_mask_ptr(*self._place)
        if matcher.is_error():
            raise ValueError(_one_line(matcher.get_error()))
        return self._words.copy()


def _without_spellings(tokenizer: str) -> tuple[str, dict[str, int]]:
    """(a tokenizer.json whose special tokens have names that no text holds, their ids by their own names). Text that a
    grammar leaves no choice about llguidance tokenises; where that spelt a special token, it would allow only this, and
    then refuse it, as it is no text."""
    setup = json.loads(tokenizer)
    specials = {token["content"]: token["id"] for token in setup["added_tokens"] if _is_special(token)}
    names = {name: f"\ufdd0{id}\ufdd0" for name, id in specials.items()}  # no character, by definition
    for token in setup["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "special": True}
    model = setup["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:  # a unigram model's, in order of the ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(setup), specials


def _is_special(token: Mapping[str, Any]) -> bool:
    """Whether an added token is to llguidance: Qwen's tags too, which the tokenizer calls none."""
    name = token["content"]
    return token["special"] or (name.startswith("<") and name.endswith(">"))


_LARK = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|<[^<>\s]+>')
"""What may hold angle brackets in a Lark grammar: texts, comments, regular expressions, and special tokens."""


def _numbered(lark: str, ids: Mapping[str, int]) -> str:
    """A Lark grammar that names special tokens by their ids."""
    return _LARK.sub(lambda part: f"<[{ids[part[0]]}]>" if part[0] in ids else part[0], lark)


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise ValueError("response_format takes llguidance; pip install 'kogia[grammars]'") from None


_NOTHING_FITS = "NoExtensionBias"
"""llguidance's word where not one token may come."""


def _one_line(text: str) -> str:
    """What llguidance says of a grammar, without the trace of where in itself it gave up."""
    text = text.replace("<non-verbose/>", "").partition("<backtrace>")[0]
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())[:300]
    if line == _NOTHING_FITS:
        return "no text that the tokens can spell is in it"
    if line.startswith("panic: "):
        return f"llguidance gives up on it ({line.removeprefix('panic: ')})"
    return line


_NOT_ALLOWED = "doesn't satisfy the grammar"
"""llguidance's words of a token that its mask had not allowed."""


def _answer_error(text: str) -> str:
    """Why an answer ends that a grammar was asked for. Only other rules of its request make a token come that the
    grammar does not allow, by forbidding all that it allows."""
    if _NOT_ALLOWED in text:
        return (
            "response_format: what else the request asks for (as allowed_token_ids) "
            "leaves no token that it allows; take one of them back"
        )
    return _one_line(text)


_OF_REGEX = re.compile(r"^at 1\(\d+\): | 1 \| start: .*")
"""Where an expression stands in the grammar that llguidance makes of it, and this grammar."""


class Grammars:
    """Compiled grammars for the requests of one engine."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._setup = {"tokenizer": tokenizer.backend.to_str(), "vocab": vocab, "eos_ids": list(tokenizer.eos_ids)}
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._compiler: Compiler | None = None
        self._worker: LineWorker | None = None

    def start(self, form: ResponseFormat) -> tuple[Compiler, Any]:
        """(the compiler, a matcher before the first token). Raises ValueError for a grammar that is wrong, or takes
        too much to compile."""
        with self._lock:
            compiler = self._compiler = self._compiler or Compiler(**self._setup)
            if form.source not in self._kept:
                self._try(form)
                self._kept[form.source] = compiler.start(*form.source)
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(form.source)
            return compiler, self._kept[form.source].deep_copy()

    def _try(self, form: ResponseFormat) -> None:
        kind = form.source[0]
        try:
            worker = self._worker = self._worker or LineWorker(
                "kogia.engine.grammar_worker", self._setup, cpu_seconds=CPU_SECONDS, wall_seconds=WALL_SECONDS
            )
            error = worker.ask(form.source)["error"]
        except BaseException as lost:  # Ctrl-C too: an answer still on its way must not meet the next question
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.close()
            if isinstance(lost, WorkerLost):
                raise ValueError(f"response_format.{kind}: compiling it {lost}; simplify it") from None
            raise
        if error is not None:
            own = _OF_REGEX.sub("", error) if kind == "regex" else error
            raise ValueError(f"response_format.{kind}: {own}; correct it")


class Grammar(Rule):
    """The rule that a completion, behind its thought if it has one, matches a grammar and ends with it."""

    def __init__(self, compiler: Compiler, matcher: Any, eos_ids: Sequence[int], thought: Thought) -> None:
        self._compiler, self._matcher = compiler, matcher
        self._eos_ids, self._thought = list(eos_ids), thought
        self._state = thought.beginning

    def learn(self, token_ids: list[int]) -> None:
        for token in token_ids:
            if not self._state.is_answer(token, self._thought) or self._matcher.is_stopped():
                pass
            elif not self._matcher.consume_token(token):
                self.error = _answer_error(self._matcher.get_error())
            self._state = self._thought.after(self._state, token)

    def apply(self, edit: Edit, num_tokens: int, drafts: list[int]) -> None:
        state, answer = self._state, []
        for token in drafts:
            if state.is_answer(token, self._thought):
                answer.append(token)
            state = self._thought.after(state, token)
        if state.is_open:
            edit.bans += self._eos_ids  # the answer is still to come
        elif self.error is None:
            self._mask(edit, answer)
            if state.may_open:
                edit.permit(self._thought.opening_ids)

    def _mask(self, edit: Edit, answer: list[int]) -> None:
        """Allow what may follow these drafts; nothing is said about what follows one that is wrong."""
        taken = self._matcher.try_consume_tokens(answer) if answer else 0
        try:
            if taken == len(answer):
                edit.allow(self._compiler.next_words(self._matcher))
        except ValueError as error:
            self.error = str(error)
        finally:
            if taken:
                self._matcher.rollback(taken)
