"""Knights, strings, mazes, and the text and traces made of them and of countdown and arithmetic."""

import random
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.tasks.arithmetic import Arithmetic
from kogia.tasks.countdown import Countdown, is_held_out
from kogia.tasks.knights import FORMS, Knights, is_true
from kogia.tasks.knights import make_problem as knights_problem
from kogia.tasks.mazes import Mazes, layers
from kogia.tasks.mazes import make_problem as maze
from kogia.tasks.puzzle import is_test
from kogia.tasks.strings import QUESTIONS, Strings
from kogia.tasks.strings import make_problem as string
from kogia.tasks.task import Response, load_task
from kogia.tasks.worked import KINDS, draw_worked, worked_text, worked_traces

PUZZLES = (Knights, Strings, Mazes)
LEVELS = [(cls, level) for cls in PUZZLES for level in cls.levels]
CHECKERS = {kind: load_task(kind) for kind in KINDS}


def judged(task, problem, answer):
    return task.verify(problem, Response(f"x</think>\n{answer}", 5, False))


def is_kept_out(problem):
    """Whether a problem of any kind belongs to a test split."""
    kind = problem.id.partition("/")[0]
    if kind in ("countdown", "arithmetic"):
        numbers = map(int, re.findall(r"\d+", problem.messages[-1].content.partition("target")[0]))
        return is_held_out(tuple(sorted(numbers)))
    return is_test(problem.id)


@given(st.sampled_from(LEVELS), st.integers(0, 2**32))
def test_the_answer_of_every_trace_passes_its_checker(kind, seed):
    cls, level = kind
    task = cls(level=level)
    problem = task.draw(random.Random(seed))
    trace = task.trace(problem)
    verdict = task.verify(problem, Response(trace, 9, False))
    assert verdict.correct, (problem, trace, verdict)
    assert verdict.parts["format"] == 1.0


@given(st.sampled_from(KINDS), st.integers(0, 2**32))
def test_so_does_the_answer_of_every_worked_problem_and_none_is_of_a_test_split(kind, seed):
    problem, steps, answer = draw_worked(kind, random.Random(seed))
    assert judged(CHECKERS[kind], problem, answer).correct, (problem, steps, answer)
    assert not is_kept_out(problem)


@given(st.sampled_from(LEVELS), st.integers(0, 2**32), st.integers(0, 2**32))
def test_the_answer_of_another_puzzle_fails_where_it_does_not_answer_this_one(kind, seed, another):
    cls, level = kind
    task = cls(level=level)
    problem, other = task.draw(random.Random(seed)), task.draw(random.Random(another))
    right, answer = task.work(problem)[1], task.work(other)[1]
    verdict = judged(task, problem, answer)
    if cls is not Mazes:  # a maze may have several shortest ways
        assert verdict.correct == (re.sub(r"\s", "", answer) == re.sub(r"\s", "", right))
    elif len(answer) != len(right):
        assert not verdict.correct


@pytest.mark.parametrize("cls", PUZZLES)
def test_splits_share_no_puzzle_whatever_the_seeds(cls):
    train = {p.id for seed in (0, 1) for p in cls(train_count=100, seed=seed).problems("train")}
    test = {p.id for seed in (0, 1) for p in cls(test_count=100, seed=seed).problems("test")}
    assert not train & test
    assert len(train) > 100
    assert len(cls(test_count=100).problems("test")) == 100
    assert cls(train_count=20).problems("train") == cls(train_count=20).problems("train")
    assert cls(train_count=20).problems("train") != cls(train_count=20, seed=1).problems("train")
    drawn = cls().draw_from("train", random.Random(5))
    assert drawn.id not in test


@pytest.mark.parametrize("cls", PUZZLES)
@pytest.mark.parametrize("answer", ["give up", "", "9" * 5000, "\n", "<think>", "ＵＤ"])
def test_what_is_no_answer_is_never_right(cls, answer):
    task = cls()
    problem = task.draw(random.Random(0))
    assert not judged(task, problem, answer).correct
    assert not task.verify(problem, Response(task.work(problem)[1], 5, False)).correct  # the thought was not closed
    assert not task.verify(problem, Response(task.trace(problem), 5, True)).correct  # cut off


def test_more_puzzles_than_there_are_are_refused():
    with pytest.raises(ValueError, match="found only .* ask for fewer or raise the level"):
        Mazes(level=2, walls=0.0, test_count=500).problems("test")
    with pytest.raises(ValueError, match="level=9: knights has levels 2 to 5"):
        Knights(level=9)
    with pytest.raises(ValueError, match="kinds='reverse,shout': must be of reverse"):
        Strings(kinds="reverse,shout")
    with pytest.raises(ValueError, match=r"walls=0\.9: must lie in"):
        Mazes(walls=0.9)
    with pytest.raises(ValueError, match="kinds='chess': 'chess' is none of countdown"):
        next(worked_text(1, 0, kinds="chess"))


def test_claims_say_what_their_words_say():
    truth = {
        "knight": lambda a, b: a,
        "knave": lambda a, b: not a,
        "knights": lambda a, b: a and b,
        "knaves": lambda a, b: not a and not b,
        "same": lambda a, b: a is b,
        "different": lambda a, b: a is not b,
        "any": lambda a, b: not a or not b,
        "if": lambda a, b: not (a and not b),
    }
    assert truth.keys() == FORMS.keys()
    for form, (a, b) in product(FORMS, product((True, False), repeat=2)):
        assert is_true((form, 0, 1), (a, b)) is truth[form](a, b)
    with pytest.raises(ValueError, match="claim 'maybe'"):
        is_true(("maybe", 0, 1), (True, True))


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("Ann knight, Bob knave", "ok"),
        ("Bob is a knave, and Ann is a knight.", "ok"),
        ("Bob: knave\nAnn: knight", "ok"),
        ("Ann knave, Bob knight", "wrong"),
        ("Ann knight", "parse_fail"),
        ("Ann knight, Bob knave, Bob knight", "parse_fail"),
        ("Ann knight, Bob knave, Cid knave", "parse_fail"),
        ("knight, knave", "parse_fail"),
    ],
)
def test_everybody_is_said_to_be_something_once(answer, status):
    problem = knights_problem([("different", 0, 1), ("same", 0, 1)], ["Ann", "Bob"])
    assert judged(Knights(level=2), problem, answer).status == status


def test_puzzles_have_one_solution_and_are_the_same_under_other_names():
    claims = [("different", 0, 1), ("same", 0, 1)]
    assert knights_problem(claims, ["Ann", "Bob"]).id == knights_problem(claims, ["Zoe", "Kim"]).id
    steps, answer = Knights(level=2).work(knights_problem(claims, ["Ann", "Bob"]))
    assert answer == "Ann knight, Bob knave"
    assert steps.splitlines()[0] == "Ann knight, Bob knight: Ann says false, no."


@pytest.mark.parametrize(
    ("kind", "answer", "right"),
    [
        ("reverse", "enots", True),
        ("reverse", "e-n-o-t-s", True),
        ("reverse", "stone", False),
        ("spell", "s t o n e", True),
        ("spell", "S, T, O, N, E", True),
        ("spell", "s t o n", False),
        ("sort", "enost", True),
        ("sort", "enosst", False),
        ("count", "1", True),
        ("count", "There is 1.", True),
        ("count", "2", False),
        ("count", "1 or 2", False),
    ],
)
def test_words_are_judged_letter_by_letter(kind, answer, right):
    assert judged(Strings(), string(kind, "stone", "o" if kind == "count" else ""), answer).correct == right


def test_words_to_order_are_judged_word_by_word_and_a_word_is_held_out_from_every_question():
    problem = string("order", "fig apple pear")
    assert judged(Strings(), problem, "apple, fig, pear").correct
    assert not judged(Strings(), problem, "applefigpear").correct
    assert len({string(kind, "stone", "o").id for kind in QUESTIONS}) == 1


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("R D D R", "ok"),
        ("RDDR", "ok"),
        ("D, R, R, D", "ok"),
        ("R R D D", "wrong"),
        ("D D R R", "wrong"),
        ("R D", "wrong"),
        ("R L R D D R", "wrong"),
        ("U", "wrong"),
        ("right", "parse_fail"),
    ],
)
def test_ways_are_walked(answer, status):
    assert judged(Mazes(), maze(["S.#", "...", "#.G"]), answer).status == status


def test_a_longer_way_is_right_where_that_is_asked_for():
    assert judged(Mazes(shortest=False), maze(["S.#", "...", "#.G"]), "R L R D D R").correct
    assert layers(["S#", "#G"])[-1] == []


def test_text_and_traces_depend_on_their_seed_alone_and_do_not_repeat():
    first, again, other = (list(worked_text(20, seed, problems=3)) for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)
    assert all(text.count("Question: ") == text.count("\nAnswer: ") == 3 for text in first)
    assert "<" not in "".join(first)
    traces = list(worked_traces(300, 0))
    assert {problem.id.partition("/")[0] for problem, _ in traces} == set(KINDS)
    assert all(CHECKERS[p.id.partition("/")[0]].verify(p, Response(c, 9, False)).correct for p, c in traces)


def test_the_worked_steps_of_arithmetic_are_true_equations():
    for seed in range(50):
        problem, steps, answer = draw_worked("arithmetic", random.Random(seed))
        left = problem.messages[0].content.removeprefix("compute ")
        for line in steps.splitlines():
            before, after = line.split("=")
            assert before == left
            assert eval(before) == eval(after)  # noqa: S307 - digits and operators, by the line below
            assert set(line) <= set("0123456789+-*=")
            left = after
        assert left == answer
        assert isinstance(CHECKERS["arithmetic"], Arithmetic)
        assert isinstance(CHECKERS["countdown"], Countdown)
