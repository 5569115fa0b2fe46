"""Words turned round, spelled, sorted, and their letters counted: easy for a rule, hard for a model that reads pieces.

Words are made of syllables, so that there is no end of them. Every solution spells the word first.
"""

import random
import re
from dataclasses import dataclass
from typing import ClassVar

from kogia.tasks.puzzle import Puzzle
from kogia.tasks.task import Problem, Status
from kogia.text.chat import Message

_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl pr sh sl st th tr".split()
_VOWELS = "a e i o u ai ea ee oo ou".split()
_CODAS = ["", "", "", "n", "r", "l", "t", "s", "m", "nd", "st"]
_LETTERS = re.compile(r"[a-z]")

QUESTIONS = {
    "reverse": 'Write "{word}" backwards.',
    "spell": 'Spell "{word}".',
    "sort": 'Put the letters of "{word}" in order.',
    "count": 'How often is the letter {letter} in "{word}"?',
    "order": "Put these words in order: {word}",
}


@dataclass(frozen=True, kw_only=True)
class Strings(Puzzle):
    """`level`: syllables of a word, and one more than that words to put in order. `kinds`: which of reverse, spell,
    sort, count and order, with commas between."""

    name: ClassVar[str] = "strings"
    levels: ClassVar[range] = range(1, 7)
    kinds: str = "reverse,spell,sort,count,order"

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.kinds.split(",")) - set(QUESTIONS)
        if unknown:
            raise ValueError(f"kinds={self.kinds!r}: must be of {', '.join(QUESTIONS)}, with commas between")

    def draw(self, rng: random.Random) -> Problem:
        kind = rng.choice(self.kinds.split(","))
        if kind == "order":
            words = dict.fromkeys(_word(rng, 2) for _ in range(self.level + 1))
            return make_problem(kind, " ".join(words))
        word = _word(rng, self.level)
        letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("aeiostrnl")
        return make_problem(kind, word, letter if kind == "count" else "")

    def work(self, problem: Problem) -> tuple[str, str]:
        kind, word, letter = (problem.data[key] for key in ("kind", "word", "letter"))
        spelled = " ".join(word)
        match kind:
            case "reverse":
                return f"{spelled}\n{spelled[::-1]}", word[::-1]
            case "spell":
                return f"{word} has {len(word)} letters.", spelled
            case "sort":
                return f"{spelled}\n{_inserted(list(word))}", "".join(sorted(word))
            case "order":
                return _inserted(word.split()), " ".join(sorted(word.split()))
        counts = [f"{each} {word[: i + 1].count(letter)}" for i, each in enumerate(word)]
        return ", ".join(counts), str(word.count(letter))

    def judge(self, problem: Problem, answer: str) -> tuple[Status, str]:
        """Letter by letter; marks and spaces around and between do not count, but between words to order they do."""
        kind, right = problem.data["kind"], self.work(problem)[1]
        given = answer.lower()
        if kind == "count":
            found = re.findall(r"[0-9]+", answer)
            if len(found) != 1:
                return "parse_fail", "not one number"
            return ("ok", "") if found[0] == right else ("wrong", f"is not {right}")
        if not _LETTERS.search(given):
            return "parse_fail", "no letters"
        said, wanted = (_bare(text, words=kind == "order") for text in (given, right))
        return ("ok", "") if said == wanted else ("wrong", f"is not {right}")


def make_problem(kind: str, word: str, letter: str = "") -> Problem:
    """The id leaves out the kind, so that a word is held out from all of them or from none."""
    text = QUESTIONS[kind].format(word=word, letter=letter)
    key = " ".join(sorted(word.split()))
    return Problem(f"strings/{key}", (Message("user", text),), {"kind": kind, "word": word, "letter": letter})


def _bare(text: str, *, words: bool) -> list[str]:
    found = re.findall(r"[a-z]+", text)
    return found if words else list("".join(found))


def _word(rng: random.Random, syllables: int) -> str:
    parts = (rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return "".join(parts) + rng.choice(_CODAS)


def _inserted(items: list[str]) -> str:
    """Sorting by insertion, a line for each item."""
    lines = [" ".join(sorted(items[: i + 1])) for i in range(len(items))]
    return "\n".join(lines)
