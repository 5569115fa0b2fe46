"""Text of a growing completion: stop strings that span tokens, characters that span tokens, what is held back."""

import pytest
from tokenizer_families import write_llama2

from kogia.engine.output import TextStream, printable
from kogia.text.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the answer is 42. " * 20], 280)


def test_a_stop_string_that_spans_tokens_cuts_the_text_before_it(tokenizer):
    ids = tokenizer.encode("one END two")
    stream = TextStream(tokenizer, ("END",))
    used = stream.push(ids)
    assert stream.finish() == "one "
    assert used is not None
    assert tokenizer.decode(ids[:used]) == "one END"


def test_the_earliest_of_several_stop_strings_wins(tokenizer):
    stream = TextStream(tokenizer, ("zz", "b", "ab"))
    stream.push(tokenizer.encode("xxab zz"))
    assert stream.finish() == "xx"


def test_text_is_found_however_it_is_cut_into_pushes(tokenizer):
    ids = tokenizer.encode("aaab naïve 🐋 STOPPED")
    for size in (1, 2, 3, 50):
        stream, used = TextStream(tokenizer, ("aab n", "STOP")), None
        for start in range(0, len(ids), size):
            used = stream.push(ids[start : start + size])
            if used is not None:
                break
        assert stream.finish() == "a"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided(tokenizer):
    stream = TextStream(tokenizer, ("</done>",))
    pieces = []
    for text in ("a<", "/do", "x</d"):
        stream.push(tokenizer.encode(text))
        pieces.append(stream.take(final=False))
    assert pieces == ["a", "", "</dox"]
    assert stream.take(final=True) == "</d"


def test_half_a_character_is_not_shown(tokenizer):
    ids = tokenizer.encode("🐋")
    assert len(ids) > 1
    stream = TextStream(tokenizer)
    stream.push(ids[:-1])
    assert stream.take(final=False) == ""
    stream.push(ids[-1:])
    assert stream.take(final=False) == "🐋"


def test_a_stop_string_is_found_in_what_was_held_back_to_the_end(tmp_path):
    pieces = Tokenizer.load(write_llama2(tmp_path))
    ids = pieces.encode("a\n")  # the newline is a byte token, which waits for the end of its run
    stream = TextStream(pieces, ("\n",))
    assert stream.push(ids) is None
    assert stream.finish() == "a"


def test_nothing_follows_a_stop_string_at_the_end(tokenizer):
    whale = tokenizer.encode("🐋")
    stream = TextStream(tokenizer, ("END",))
    assert stream.push([*tokenizer.encode("one END"), *whale[:2]]) is not None
    assert stream.finish() == "one "


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\r\x07\x9bc\tünï 🐋\n") == "a�[2Jb���c\tünï 🐋\n"
