"""How fast an answer comes and how long its thought took, by a clock that is set."""

import pytest

pytest.importorskip("nh3", reason="needs kogia[server]")

from kogia.serve.generation import Piece
from kogia.serve.page.answer import Counts


def counted(*pieces: tuple[float, Piece], begin: float = 0.0, now: float) -> dict:
    times = {"now": begin}
    counts = Counts(lambda: times["now"])
    for time, piece in pieces:
        times["now"] = time
        counts.note(piece)
    times["now"] = now
    return counts.words()


def test_a_thought_lasts_from_the_first_token_to_the_first_of_the_answer():
    words = counted(
        (10.0, Piece(0, reasoning="a", token_ids=[1, 2])),
        (12.0, Piece(0, reasoning="b", token_ids=[3])),
        (13.0, Piece(0, token_ids=[4])),
        (14.0, Piece(0, content="c", token_ids=[5, 6])),
        (20.0, Piece(0, content="d", token_ids=[7])),
        now=20.0,
    )
    assert words == {"tokens": 7, "thought_tokens": 4, "thought_seconds": 4.0, "seconds": 20.0, "rate": 0.5}


def test_the_rate_counts_from_the_first_token_and_not_what_came_with_it():
    assert counted((5.0, Piece(0, content="a", token_ids=[1] * 9)), now=5.0)["rate"] is None
    words = counted(
        (5.0, Piece(0, content="a", token_ids=[1] * 9)), (7.0, Piece(0, content="b", token_ids=[2] * 4)), now=7.0
    )
    assert words["rate"] == 2.0 and words["thought_seconds"] is None


def test_an_answer_without_a_thought_has_no_length_of_one():
    words = counted((1.0, Piece(0, content="a", token_ids=[1])), now=3.0)
    assert words["thought_tokens"] == 0 and words["thought_seconds"] is None


def test_a_thought_that_never_ends_lasts_until_now():
    words = counted((1.0, Piece(0, reasoning="a", token_ids=[1])), now=3.5)
    assert (words["thought_tokens"], words["thought_seconds"]) == (1, 2.5)
