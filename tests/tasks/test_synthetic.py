import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest

from kogia.tasks.countdown import Countdown, is_held_out
from kogia.tasks.expression import parse_expression
from kogia.tasks.synthetic import arithmetic_corpus, base_corpus, cold_start_traces
from kogia.tasks.task import Response
from kogia.text.chat import parse_response

OPTIONS = {"num_problems": 300}
TRACES = list(cold_start_traces(1500, 0, **OPTIONS))
STEP = re.compile(r"(\d+)([+\-*/])(\d+)=(\d+)")


CHECK = re.compile(r"(.+)\?(\d+) (yes|no)")


def attempts_of(text):
    """[(steps, verdict)] of a trace, checking its outer form and that every check names one and the same target."""
    lines = text.split("\n")
    assert lines[-2] == "</think>"
    checks = [CHECK.fullmatch(line).groups() for line in lines[:-2]]
    assert len({target for _, target, _ in checks}) == 1
    attempts = [(steps, verdict) for steps, _, verdict in checks]
    assert {verdict for _, verdict in attempts} <= {"yes", "no"}
    assert [verdict for _, verdict in attempts[:-1]].count("yes") == 0
    assert (attempts[-1][1] == "yes") == (lines[-1] != "give up")
    return attempts


def replay(steps, numbers):
    """The result of an attempt, checking each step and that every number is used exactly once."""
    available = Counter(numbers)
    for step in steps.split(","):
        a, operator, b, value = STEP.fullmatch(step).groups()
        a, b, value = int(a), int(b), int(value)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b or 1)}[operator] == value
        assert not (operator == "/" and b == 0)
        assert 0 <= value <= 200
        available.subtract([a, b])
        assert min(available.values()) >= 0, f"{step} uses what is not there"
        available[value] += 1
    (result,) = available.elements()
    return result


def false_verdicts(problem, text):
    target = problem.data["target"]
    judged = [(replay(steps, problem.data["numbers"]) == target, verdict) for steps, verdict in attempts_of(text)]
    return sum(right != (verdict == "yes") for right, verdict in judged)


def test_every_step_of_every_trace_is_true_and_uses_the_given_numbers():
    for problem, text in TRACES:
        for steps, _ in attempts_of(text):
            replay(steps, problem.data["numbers"])


def test_at_most_one_verdict_is_false_in_the_share_of_the_noise():
    counts = Counter(false_verdicts(problem, text) for problem, text in TRACES)
    assert set(counts) == {0, 1}
    assert 0.07 < counts[1] / len(TRACES) < 0.13


def test_without_noise_every_verdict_is_true():
    traces = cold_start_traces(300, 1, verdict_noise=0.0, **OPTIONS)
    assert not any(false_verdicts(problem, text) for problem, text in traces)


def test_noise_is_of_both_kinds():
    task = Countdown()
    noisy = [(problem, text) for problem, text in TRACES if false_verdicts(problem, text)]
    wrong_claims = [task.verify(problem, Response(text, 1, False)).status == "wrong" for problem, text in noisy]
    assert 0.3 < sum(wrong_claims) / len(noisy) < 0.8


def test_the_answer_is_the_last_attempt_as_an_expression():
    for problem, text in TRACES:
        answer = parse_response(text).answer
        if answer == "give up":
            continue
        steps, _ = attempts_of(text)[-1]
        expression = parse_expression(answer)
        assert expression.value == replay(steps, problem.data["numbers"])
        assert sorted(expression.numbers) == sorted(problem.data["numbers"])
        assert not answer.startswith("(") or parse_inner_brackets(answer), answer


def parse_inner_brackets(answer):
    """Whether the first bracket closes before the end: no bracket around the whole."""
    depth = 0
    for i, char in enumerate(answer):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return i < len(answer) - 1
    return False


def test_true_traces_satisfy_the_task_itself():
    statuses = Counter(
        Countdown().verify(problem, Response(text, 1, False)).status
        for problem, text in cold_start_traces(400, 2, verdict_noise=0.0, **OPTIONS)
    )
    assert set(statuses) == {"ok", "give_up"}
    assert 0.42 < statuses["ok"] / 400 < 0.58


def test_no_wrong_attempt_repeats_and_none_is_more_than_allowed():
    for _, text in TRACES:
        steps = [steps for steps, _ in attempts_of(text)]
        assert len(set(steps)) == len(steps) <= 10
        commuted = {",".join(sorted(map(commute, one.split(",")))) for one in steps}
        assert len(commuted) == len(steps), text


def commute(step):
    a, operator, b, value = STEP.fullmatch(step).groups()
    if operator in "+*":
        a, b = sorted((a, b))
    return f"{a}{operator}{b}={value}"


def test_only_training_numbers_are_used():
    for problem, _ in TRACES:
        assert not is_held_out(tuple(sorted(problem.data["numbers"])))


def test_shares_and_lengths_are_as_asked():
    easy = sum(len(problem.data["numbers"]) == 2 for problem, _ in TRACES) / len(TRACES)
    assert 0.07 < easy < 0.13
    lengths = {claim: [] for claim in (True, False)}
    for problem, text in TRACES:
        if len(problem.data["numbers"]) == 3:
            lengths[not text.endswith("give up")].append(len(attempts_of(text)))
    solved, given_up = (sum(values) / len(values) for values in (lengths[True], lengths[False]))
    assert given_up > solved + 0.5
    assert min(lengths[True]) == min(lengths[False]) == 1
    assert max(lengths[False]) >= 9


def test_the_number_of_wrong_attempts_is_truncated_geometric():
    traces = cold_start_traces(
        3000, 3, solve_probability=1.0, verdict_noise=0.0, easy_share=0.0, continue_probability=0.5, max_attempts=4,
        **OPTIONS,
    )  # fmt: skip
    counts = Counter(len(attempts_of(text)) for _, text in traces if not text.endswith("give up"))
    shares = [counts[k] / sum(counts.values()) for k in range(1, 5)]
    assert shares == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15], abs=0.03)
    assert set(counts) == {1, 2, 3, 4}


def test_four_numbers_take_three_steps_and_may_join_two_partial_results():
    traces = list(cold_start_traces(100, 0, numbers=4, easy_share=0.0, num_problems=100))
    answers = []
    for problem, text in traces:
        for steps, _ in attempts_of(text):
            assert steps.count("=") == 3
            replay(steps, problem.data["numbers"])
        answers.append(parse_response(text).answer)
    assert any(re.fullmatch(r"\(\d+.\d+\).\(\d+.\d+\)", answer) for answer in answers)
    assert any("((" in answer or "))" in answer for answer in answers)


def test_the_intermediate_may_stand_on_the_right():
    steps = [steps for _, text in TRACES for steps, _ in attempts_of(text) if steps.count("=") == 2]
    right = [re.search(r"=(\d+),(?!\1\D)\d+.\1=", one) is not None for one in steps]
    assert 0.2 < sum(right) / len(right) < 0.6


def test_traces_are_the_same_for_the_same_seed_only():
    assert list(cold_start_traces(50, 0, **OPTIONS)) == TRACES[:50]
    assert list(cold_start_traces(50, 1, **OPTIONS)) != TRACES[:50]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verdict_noise": 1.5}, "verdict_noise=1.5: must be a share"),
        ({"max_attempts": 1}, "max_attempts=1 must be at least 2"),
        ({"continue_probability": -0.1}, "continue_probability=-0.1"),
        ({"numbers": 9}, "numbers=9"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        next(cold_start_traces(1, 0, **options))


def test_every_line_of_the_corpus_is_true():
    kinds = Counter()
    words = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
    for document in arithmetic_corpus(300, 0):
        assert document.endswith("\n")
        assert document.count("\n") == 8
        for line in document.splitlines():
            if match := CHECK.fullmatch(line):
                check_steps(match[1])
                assert (match[1].rpartition("=")[2] == match[2]) == (match[3] == "yes")
                kinds["checked", match[1].count("="), match[3]] += 1
            elif match := re.fullmatch(r"(\d+) (plus|minus|times|divided by) (\d+) is (\d+)\.", line):
                assert parse_expression(match[1] + words[match[2]] + match[3]).value == int(match[4])
                kinds["sentence"] += 1
            elif match := re.fullmatch(r"(\d+) is (more|less|equal) (?:than|to) (\d+)\.", line):
                order = (int(match[1]) > int(match[3])) - (int(match[1]) < int(match[3]))
                assert {"more": 1, "less": -1, "equal": 0}[match[2]] == order
                kinds["order"] += 1
            else:
                check_steps(line)
                kinds["steps", line.count("=")] += 1
    assert set(kinds) == {("checked", 2, "yes"), ("checked", 2, "no"), "sentence", "order", ("steps", 1)}
    assert all(count > 80 for count in kinds.values())


def check_steps(line):
    """Chains are replayed from the numbers they start with; these are never a held-out set."""
    numbers, made = [], Counter()
    for step in line.split(","):
        a, _, b, value = STEP.fullmatch(step).groups()
        for operand in (int(a), int(b)):
            if made[operand]:
                made[operand] -= 1
            else:
                numbers.append(operand)
        made[int(value)] += 1
    replay(line, numbers)
    if len(numbers) == 3:
        assert max(numbers) <= 25
        assert not is_held_out(tuple(sorted(numbers)))


def test_the_corpus_never_shows_the_chat_form():
    text = "".join(arithmetic_corpus(300, 5))
    assert not re.search(r"<|give up|target|numbers|= |\d (yes|no)\n.*</", text)
    assert not re.search(r"=\d+ (yes|no)", text)


def test_the_corpus_is_the_same_for_the_same_seed_only():
    assert base_corpus is arithmetic_corpus
    assert list(islice(arithmetic_corpus(50, 0), 5)) == list(arithmetic_corpus(5, 0))
    assert list(arithmetic_corpus(5, 0)) != list(arithmetic_corpus(5, 1))


SPEED = """
import time
from kogia.tasks.synthetic import arithmetic_corpus, cold_start_traces
next(cold_start_traces(1, 0))
for documents in (cold_start_traces(4000, 0), arithmetic_corpus(4000, 0)):
    start = time.process_time()
    assert len(list(documents)) == 4000
    print(4000 / (time.process_time() - start))
"""


def test_documents_are_made_quickly():
    """Per second of CPU, in a process free of the type checks of the test run. About 14000 and 20000; a machine may be
    slow."""
    result = subprocess.run([sys.executable, "-c", SPEED], capture_output=True, text=True, check=True)
    traces, documents = map(float, result.stdout.split())
    assert traces > 1500
    assert documents > 1500
