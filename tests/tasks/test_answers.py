import gzip
import json
import threading
from fractions import Fraction
from pathlib import Path

import pytest

from kogia.tasks.answers import answers_match, extract_answer, parse_number

SAMPLES = Path(__file__).parents[3] / "shared/data/math/gsm8k_sampled_solutions.jsonl.gz"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{5}, no, \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed {7} #### 8 and 9", "7"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{}", ""),
        ("1 + 2 = 3\n#### 1,234\nand more 5", "1,234"),
        ("she makes $1,224.50 a day.", "1,224.50"),
        ("16-3 = 13-4", "4"),
        ("the change is -4", "-4"),
        ("A: 3/4", "3/4"),
        ("from 1,2 and 3", "3"),
        ("in 2024.", "2024"),
        ("٣", None),
        ("no number", None),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-18.50", Fraction(-37, 2)),
        ("$1,234", 1234),
        ("\\$10.00", 10),
        ("3/4", Fraction(3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("50\\%", 50),
        ("18.", 18),
        ("18\\text{ dollars}", 18),
        ("18 dollars per day.", 18),
        ("18 million", None),
        ("18 or 19", None),
        ("18 x", None),
        ("1,23", None),
        ("1/0", None),
        ("two", None),
        ("9" * 41, None),
    ],
)
def test_plain_numbers_are_read_exactly(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("18", "18.00", True),
        ("18", "$18", True),
        ("18", "18 dollars", True),
        ("18", "17.9999999", False),
        ("0.3333", "1/3", False),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "\\frac12", True),
        ("x+1", "1+x", True),
        ("x+1", "x+2", False),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("(1,2)", "(1,2)", True),
        ("(1,2)", "(2,1)", False),
        ("18", "", False),
        ("18", "1" * 100_000, False),
    ],
)
def test_answers_are_compared_by_value(gold, answer, equal):
    assert answers_match(gold, answer) == equal


@pytest.mark.parametrize("gold", ["", " ", "@@", "\\text{}"])
def test_a_gold_answer_that_cannot_be_read_equals_nothing(gold):
    assert not answers_match(gold, gold)
    assert not answers_match(gold, "18")


def test_comparison_works_outside_the_main_thread():
    """math-verify's own time limits raise there, and the answer would silently count as wrong."""
    found = []
    thread = threading.Thread(target=lambda: found.append(answers_match("2\\sqrt{3}", "\\sqrt{12}")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.skipif(not SAMPLES.exists(), reason=f"needs {SAMPLES}")
def test_verdicts_agree_with_the_labels_of_gsm8k_sampled_solutions():
    agreed = []
    with gzip.open(SAMPLES, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            for sample in row["solutions"].values():
                extracted = extract_answer(sample["solution"])
                right = extracted is not None and answers_match(row["answer"], extracted)
                agreed.append(right == sample["is_correct"])
    print(f"agreement {sum(agreed)}/{len(agreed)}")
    assert len(agreed) == 5276
    assert sum(agreed) / len(agreed) >= 0.999
