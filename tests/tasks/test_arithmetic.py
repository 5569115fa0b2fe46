import pytest

from kogia.tasks.arithmetic import Arithmetic
from kogia.tasks.countdown import is_held_out
from kogia.tasks.task import Problem, Response

TASK = Arithmetic(train_count=500, test_count=100)


def verdict(answer, truncated=False):
    return TASK.verify(Problem("p", (), {"answer": -12}), Response(f"x</think>\n{answer}", 5, truncated))


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_what_python_says(split):
    for item in TASK.problems(split):
        chain = item.messages[0].content.removeprefix("compute ")
        assert set(chain) <= set("0123456789+-*")
        assert eval(chain) == item.data["answer"]  # noqa: S307 - the line above says what it consists of
        numbers = [int(part) for part in chain.replace("+", " ").replace("-", " ").replace("*", " ").split()]
        assert len(numbers) == 4
        assert max(numbers) <= 20
        assert is_held_out(tuple(sorted(numbers))) == (split == "test")


def test_problems_differ_and_depend_on_the_seed_only():
    ids = [item.id for split in ("train", "test") for item in TASK.problems(split)]
    assert len(set(ids)) == 600
    assert Arithmetic(train_count=500).problems("train") == TASK.problems("train")
    assert Arithmetic(train_count=500, seed=1).problems("train") != TASK.problems("train")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("-12", "ok"),
        ("<answer>-12</answer>", "ok"),
        ("-012", "ok"),
        ("12", "wrong"),
        ("-12.0", "parse_fail"),
        ("3*-4", "parse_fail"),
        ("-１２", "parse_fail"),
        ("-12 apples", "parse_fail"),
        ("9" * 5000, "parse_fail"),
        ("give up", "give_up"),
        ("", "parse_fail"),
    ],
)
def test_only_the_exact_integer_is_right(answer, status):
    assert verdict(answer).status == status
    assert verdict(answer).correct == (status == "ok")


@pytest.mark.parametrize("length", [8, 12, 16])
def test_products_of_the_largest_numbers_are_judged(length):
    task = Arithmetic(length=length, max_number=1000, operators="*", train_count=3, test_count=3)
    for item in task.problems("train"):
        right = str(item.data["answer"])
        assert len(right) > 2 * length - 6
        assert task.verify(item, Response(f"x</think>{right}", 5, False)).correct
        assert task.verify(item, Response(f"x</think>{right[:-1]}", 5, False)).status == "wrong"


def test_truncated_is_truncated():
    assert verdict("-12", truncated=True).status == "truncated"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 1}, "length=1"), ({"operators": "+/"}, "operators"), ({"max_number": 0}, "max")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Arithmetic(**options)


def test_more_chains_than_exist_is_an_error():
    with pytest.raises(ValueError, match="train_count=500: found only"):
        Arithmetic(length=2, max_number=3, train_count=500).problems("train")
