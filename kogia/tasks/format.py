"""Rewards beside correctness: the think structure and the share of words in the target script (R1, section 2.3.2)."""

import math
import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from kogia.tasks.task import Response, Status, Verdict
from kogia.text.chat import ParsedResponse, parse_response
from kogia.text.tokenizer import END_THINK, THINK

_WORD = re.compile(r"[^\W\d_]+")
_TAG = re.compile(r"</?(?:think|answer)>")
_SAYS = re.compile(r"\w")
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}
_LONGEST_WORD = 24
"""Characters of a spaced script that count as one word at most."""


def think_format(completion: str) -> float:
    """1.0 if a thought is closed exactly once and never reopened and an answer follows, both with words; else 0.0."""
    thought, closing, answer = completion.partition(END_THINK)
    once = closing and END_THINK not in answer and THINK not in completion
    return float(bool(once and _SAYS.search(thought) and _SAYS.search(_TAG.sub("", answer))))


def language_consistency(text: str, script: str = "LATIN") -> float:
    """Share of words written wholly in `script` (first word of its Unicode character names); 1.0 without words.

    In scripts that do not space their words every character counts as one, so that a foreign sentence weighs as much
    as it would in a spaced script, and so does each part of a run that is longer than words are.
    """
    total = matching = 0
    for word in _WORD.findall(text):
        scripts = [_script(char) for char in word]
        spaced = [found for found in scripts if found not in _UNSPACED]
        words = math.ceil(len(spaced) / _LONGEST_WORD)
        total += words + len(scripts) - len(spaced)
        matching += words if all(found == script for found in spaced) else 0
        matching += scripts.count(script) if script in _UNSPACED else 0
    return matching / total if total else 1.0


def check_script(script: str) -> None:
    """Raise ValueError unless some letter is of that script."""
    letters = (char for char in map(chr, range(sys.maxunicode + 1)) if _WORD.match(char))
    if all(_script(char) != script for char in letters):
        raise ValueError(
            f"script = {script!r}: the Unicode name of no letter begins so; write LATIN, CJK, CYRILLIC, ARABIC, ..."
        )


def answer_text(answer: str) -> str:
    """What to judge: the inside of the last <answer>...</answer> if there is one, else the whole answer."""
    start = answer.rfind("<answer>", 0, max(answer.rfind("</answer>"), 0))
    if start < 0:
        return answer.strip()
    return answer[start + len("<answer>") : answer.index("</answer>", start)].strip()


def gives_up(answer: str) -> bool:
    """Whether the answer is an honest "give up"."""
    return answer.strip().rstrip(".").lower() == "give up"


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Reward per status, and weights of the parts that are added to it; options of every built-in task."""

    reward_correct: float = 1.0
    reward_give_up: float = 0.0
    reward_wrong: float = -0.3
    """A claim that is false. Below `reward_give_up`, or claiming anything becomes free (it then rises during RL)."""
    reward_truncated: float = -0.3
    """Must not be above `reward_wrong`, or rambling into the token limit becomes the safe choice."""
    reward_parse_fail: float = -0.3
    format_weight: float = 0.0
    language_weight: float = 0.0
    script: str = "LATIN"
    """Target script of the language part, as Unicode character names start: LATIN, CJK, CYRILLIC, ..."""

    def read(self, response: Response) -> tuple[ParsedResponse, str]:
        """The parsed response and the answer text to judge."""
        parsed = parse_response(response.text)
        return parsed, answer_text(parsed.answer)

    def early_verdict(self, response: Response, closed: bool, answer: str) -> Verdict | None:
        """The verdict where no answer needs judging: truncated, never closed, empty or given up; else None."""
        if response.truncated:
            return self.verdict(response, "truncated", None, "stopped by the token limit")
        if not closed:
            return self.verdict(response, "parse_fail", None, f"no {END_THINK}")
        if not answer:
            return self.verdict(response, "parse_fail", None, "empty answer")
        if gives_up(answer):
            return self.verdict(response, "give_up", answer)
        return None

    def verdict(self, response: Response, status: Status, extracted: str | None, detail: str = "") -> Verdict:
        """Reward of `status` plus the weighted format and language parts."""
        parts = {
            "accuracy": float(status == "ok"),
            "format": 0.0 if response.truncated else think_format(response.text),
            "language": language_consistency(_TAG.sub(" ", response.text), self.script),
        }
        rewards = {
            "ok": self.reward_correct,
            "give_up": self.reward_give_up,
            "wrong": self.reward_wrong,
            "truncated": self.reward_truncated,
            "parse_fail": self.reward_parse_fail,
        }
        reward = rewards[status] + self.format_weight * parts["format"] + self.language_weight * parts["language"]
        return Verdict(reward, status == "ok", status, parts, extracted, detail)


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").split(" ")[0]
