import subprocess
import sys
from fractions import Fraction
from functools import cache
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.tasks.countdown import Countdown, is_held_out, is_reachable
from kogia.tasks.task import Problem, Response
from kogia.text.chat import Message

TASK = Countdown(train_count=600, test_count=150)


@cache
def brute_force(numbers, operators="+-*/"):
    """{value: expression} over every order of the numbers and every bracketing, written without the code under test."""

    def build(items):
        if len(items) == 1:
            yield Fraction(items[0]), str(items[0])
        for cut in range(1, len(items)):
            for a, left in build(items[:cut]):
                for b, right in build(items[cut:]):
                    results = {"+": a + b, "-": a - b, "*": a * b} | ({"/": a / b} if b else {})
                    for operator in operators:
                        if operator in results:
                            yield results[operator], f"({left}{operator}{right})"

    return {value: text for order in set(permutations(numbers)) for value, text in build(order)}


def problem(numbers, target):
    return Problem("p", (Message("user", "q"),), {"numbers": list(numbers), "target": target})


def verdict(answer, numbers=(4, 6, 15), target=17, task=TASK, thinking="15-4=11,11+6=17 yes\n", truncated=False):
    return task.verify(problem(numbers, target), Response(f"{thinking}</think>\n{answer}", 20, truncated))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_problem_is_solvable_and_on_its_side(split):
    for item in TASK.problems(split)[:300]:
        numbers, target = item.data["numbers"], item.data["target"]
        key = tuple(sorted(numbers))
        assert brute_force(key)[Fraction(target)]
        assert is_held_out(key) == (split == "test")
        assert item.messages == (Message("user", f"numbers {' '.join(map(str, numbers))} target {target}"),)
        assert item.id == f"countdown/{'-'.join(map(str, key))}={target}"
        assert len(key) == 3
        assert max(key) <= 25
        assert 1 <= target <= 100


def test_train_and_test_share_no_multiset_and_no_problem_repeats():
    train, test = TASK.problems("train"), TASK.problems("test")
    assert not {tuple(sorted(p.data["numbers"])) for p in train} & {tuple(sorted(p.data["numbers"])) for p in test}
    ids = [item.id for item in (*train, *test)]
    assert len(set(ids)) == len(ids) == 750


def test_a_fifth_of_the_multisets_is_held_out():
    held_out = [is_held_out((a, b, c)) for a in range(1, 26) for b in range(a, 26) for c in range(b, 26)]
    assert 0.17 < sum(held_out) / len(held_out) < 0.23


def test_the_split_is_the_same_on_every_machine():
    """Values written down once: a change here moves test problems into training."""
    assert [n for n in range(1, 26) if is_held_out(tuple(sorted((3, 7, n))))] == [17, 21, 24]


def test_problems_are_the_same_for_the_same_seed_only():
    again = Countdown(train_count=600, test_count=150)
    assert again.problems("train") == TASK.problems("train")
    assert Countdown(train_count=600, seed=1).problems("train") != TASK.problems("train")


GENERATE = """
import time
from kogia.tasks.countdown import Countdown
start = time.process_time()
task = Countdown()
assert (len(task.problems("train")), len(task.problems("test"))) == (8000, 2000)
print(time.process_time() - start)
"""


def test_the_default_problems_are_generated_quickly():
    """In CPU seconds, in a process free of the type checks of the test run. About 0.6; a machine may be slow."""
    result = subprocess.run([sys.executable, "-c", GENERATE], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 6


def test_four_numbers_work():
    for item in Countdown(numbers=4, max_number=9, train_count=30).problems("train"):
        key = tuple(sorted(item.data["numbers"]))
        assert Fraction(item.data["target"]) in brute_force(key)


NUMBERS = st.lists(st.integers(1, 12), min_size=2, max_size=4).map(lambda numbers: tuple(sorted(numbers)))


@given(NUMBERS, st.integers(1, 100), st.sampled_from(["+-*/", "+-*", "+-", "*/", "+", "/"]))
def test_reachable_means_that_brute_force_reaches_it(numbers, target, operators):
    assert is_reachable(numbers, target, operators) == (Fraction(target) in brute_force(numbers, operators))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple), st.data())
def test_the_checker_agrees_with_brute_force(numbers, data):
    value, text = data.draw(st.sampled_from(sorted(brute_force(numbers).items())))
    target = data.draw(st.sampled_from([value, *range(1, 20)]))
    found = verdict(text, numbers, target)
    assert found.status == ("ok" if value == target else "wrong")
    assert found.correct == (value == target)
    assert verdict(text, (*numbers, 1), target).status == "wrong"
    assert verdict(text, numbers[1:], target).status == "wrong"


@pytest.mark.parametrize(
    ("answer", "status", "reward"),
    [
        ("(15-4)+6", "ok", 1.0),
        ("6 + 15 - 4", "ok", 1.0),
        ("so it is <answer> (15-4)+6 </answer>", "ok", 1.0),
        ("<answer>1</answer> no, <answer>(15-4)+6</answer>", "ok", 1.0),
        ("give up", "give_up", 0.0),
        ("Give up.", "give_up", 0.0),
        ("15+6", "wrong", -0.3),
        ("15-4+6+4-4", "wrong", -0.3),
        ("15*4+6", "wrong", -0.3),
        ("15/(6-6)*4", "wrong", -0.3),
        ("(15-4)+6 = 17", "parse_fail", -0.3),
        ("15-4+6**1", "parse_fail", -0.3),
        ("17", "wrong", -0.3),
        ("", "parse_fail", -0.3),
        ("the answer is (15-4)+6", "parse_fail", -0.3),
    ],
)
def test_answers_are_judged(answer, status, reward):
    found = verdict(answer)
    assert (found.status, found.reward, found.correct) == (status, reward, status == "ok")
    assert found.parts["accuracy"] == float(status == "ok")


def test_concatenated_numbers_are_a_wrong_use_of_numbers():
    assert verdict("46-15", (4, 6, 15), 31).status == "wrong"


def test_a_thought_that_was_never_closed_has_no_answer():
    open_thought = Response("15-4=11,11+6=17 yes (15-4)+6", 20, False)
    assert TASK.verify(problem((4, 6, 15), 17), open_thought).status == "parse_fail"


def test_a_truncated_response_is_counted_as_truncated_even_when_right():
    found = verdict("(15-4)+6", truncated=True)
    assert (found.status, found.reward, found.correct) == ("truncated", -0.3, False)
    assert found.parts["format"] == 0.0


def test_rewards_and_weights_are_options():
    task = Countdown(reward_correct=2.0, reward_wrong=-1.0, format_weight=0.5, language_weight=0.25)
    assert verdict("(15-4)+6", task=task).reward == 2.75
    assert verdict("15*4+6", task=task).reward == -0.25
    assert verdict("15*4+6", task=task, thinking="a да").reward == -1.0 + 0.5 + 0.25 * 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numbers": 5}, "numbers=5"),
        ({"operators": "+^"}, "operators='\\+\\^'"),
        ({"operators": ""}, "operators=''"),
        ({"max_target": 0}, "max_target=0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Countdown(**options)


def test_more_problems_than_exist_is_an_error_with_their_number():
    with pytest.raises(ValueError, match=r"train_count=8000: only \d+ train problems exist"):
        Countdown(max_number=5).problems("train")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='dev'"):
        TASK.problems("dev")
