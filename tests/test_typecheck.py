"""That the functions of kogia are checked while the tests run, and what is found."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor
from typecheck import jaxtyped

from kogia.ops.moe import expert_counts


@jaxtyped(typechecker=None)
def product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], scale: float = 1.0) -> Float[Tensor, "m n"]:
    return (a @ b * scale)[: 2 if scale else None]


@jaxtyped(typechecker=None)
@dataclass
class Pair:
    first: Float[Tensor, " n"]
    second: Float[Tensor, " n"]


@jaxtyped(typechecker=None)
def count(up_to: int) -> Iterator[int]:
    yield from range(up_to)


@jaxtyped(typechecker=None)
def later(given: "Unheard", count: "int", pair: "list[Missing] | None" = None) -> "Later | None":
    return None


@jaxtyped(typechecker=None)
def first(x: Int[Tensor, " n"], lengths: list[int]) -> Int[Tensor, " n"]:
    return x if lengths == [len(x)] else x[:1]


@dataclass
class Rows:
    num: int


@jaxtyped(typechecker=None)
def cut(x: Float[Tensor, " n"], rows: Rows) -> Float[Tensor, " n"]:
    return x[: rows.num]


class Later:
    pass


def test_a_name_that_is_not_there_yet_is_anything_and_one_that_is_what_it_says():
    assert later(object(), 3, 4) is None
    with pytest.raises(TypeCheckError):
        later(object(), "3")


def test_axes_of_one_name_have_one_length_within_a_call_and_another_in_the_next():
    for size in (3, 4):
        assert product(torch.ones(2, size), torch.ones(size, 5), 1).shape == (2, 5)


def test_wrong_arguments_and_answers_are_found():
    wrong = [
        lambda: product(torch.ones(2, 3), torch.ones(4, 5)),
        lambda: product(torch.ones(2, 3).int(), torch.ones(3, 5)),
        lambda: product(torch.ones(2, 3), torch.ones(3, 5), "1"),
        lambda: product(torch.ones(3, 3), torch.ones(3, 5)),  # its answer has two rows
        lambda: Pair(torch.ones(2), torch.ones(3)),
        lambda: count("3"),
    ]
    for call in wrong:
        with pytest.raises(TypeCheckError):
            call()
    assert list(count(3)) == [0, 1, 2] and Pair(torch.ones(2), torch.zeros(2)).second.sum() == 0


def test_calls_of_one_kind_are_checked_once_and_any_other_is_checked():
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    for _ in range(2):
        assert product(a, b, 1).shape == (2, 5)
        for wrong in ((a, b.T), (a.int(), b), (a, b.tolist()), (a, b, "1"), (a, None)):
            with pytest.raises(TypeCheckError):
                product(*wrong)
    for length in (2, 3, 2):
        assert first(torch.arange(length), [length]).shape == (length,)
    for given in ([9], [None]):  # of the same kind as before: what is in a list counts
        with pytest.raises(TypeCheckError):
            first(torch.arange(2), given)
    assert cut(torch.ones(3), Rows(3)).shape == (3,)
    with pytest.raises(TypeCheckError):
        cut(torch.ones(3), Rows(2))  # the same of all that it is given, and another answer


def test_the_package_is_checked():
    with pytest.raises(TypeCheckError):
        expert_counts(torch.ones(4, 2), 8)  # floats are no ids
