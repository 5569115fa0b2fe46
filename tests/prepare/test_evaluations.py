import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.prepare.config import EvaluationConfig
from kogia.prepare.evaluations import Index, read_evaluations
from kogia.prepare.words import hash_words, split_words

QUESTION = "A farmer has 17 sheep and all but 9 of them run away; how many are left?"


def find(index: Index, text: str):
    return index.find(hash_words(split_words(text)))


@pytest.fixture
def sets(tmp_path):
    rows = [{"question": QUESTION, "answer": "nine"}, {"question": "What is 2+2?"}, {"question": "Why?"}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "set.jsonl")


def test_ten_words_in_a_row_give_a_text_away_nine_do_not_and_marks_do_not_count(sets):
    index = read_evaluations([EvaluationConfig(sets)], 10, 10).index
    words = split_words(QUESTION)
    assert find(index, f"Well: {QUESTION.upper()}") == (0, 1, 10)
    assert find(index, " -- ".join(words[3:13])) == (0, 0, 10)
    assert find(index, " ".join([*words[:9], "birds", *words[9:18]])) is None
    assert find(index, "") is None


def test_short_items_are_looked_for_whole_and_very_short_ones_not_at_all(sets):
    found = read_evaluations([EvaluationConfig(sets)], 10, 10)
    assert find(found.index, "so what is 2 + 2, then") == (1, 1, 4)
    assert find(found.index, "what is 2") is None
    assert find(found.index, "why why why") is None
    assert found.sets[0]["too_short"] == 1
    assert found.items[1].endswith("set.jsonl, line 2")


def test_words_that_many_items_share_are_a_phrase(tmp_path):
    phrase = "please give the answer as a common fraction in lowest terms"
    rows = [{"problem": f"Problem number {i} is about {'abcdefgh'[i]} {i}: {phrase}."} for i in range(6)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few, many = (read_evaluations([EvaluationConfig(str(tmp_path / "set.jsonl"))], 10, n) for n in (10, 5))
    assert find(few.index, f"now {phrase}") is not None
    assert find(many.index, f"now {phrase}") is None
    assert many.sets[0]["phrases"] == 2
    assert find(many.index, f"is about a 0: {phrase}") is not None


def test_a_task_is_known_by_the_problems_of_its_test_split():
    options = {"train_count": 50, "test_count": 20}
    found = read_evaluations([EvaluationConfig("countdown", options=options)], 10, 10)
    assert found.sets[0]["items"] == len(found.items) == 20
    assert all(item for item in found.items)


@pytest.mark.parametrize(
    ("spec", "content", "words"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", "", "no item in it"),
        ("other.jsonl", '{"query": "x"}', "line 1: none of the columns question, problem, prompt, text is there"),
        ("gsm9k", None, "did you mean 'gsm8k'"),
    ],
)
def test_a_set_that_cannot_be_read_is_named(tmp_path, monkeypatch, spec, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / spec).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_evaluations([EvaluationConfig(spec)], 10, 10)


def test_an_index_is_the_same_after_it_was_written_and_read(sets, tmp_path):
    index = read_evaluations([EvaluationConfig(sets)], 10, 10).index
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    assert find(again, QUESTION) == find(index, QUESTION) == (0, 0, 10)
    assert again.tables.keys() == index.tables.keys()


def one_length_after_the_other(items, texts, ngram):
    """The rule as it is said: tables of strings, tried at every place, the longest runs first."""
    tables = {}
    for number, item in enumerate(items):
        length = min(ngram, len(item))
        for i in range(len(item) - length + 1 if length >= 3 else 0):
            tables.setdefault(length, {}).setdefault(tuple(item[i : i + length]), number)

    def find(text):
        for length in sorted(tables, reverse=True):
            for i in range(len(text) - length + 1):
                if (item := tables[length].get(tuple(text[i : i + length]))) is not None:
                    return item, i, length
        return None

    return [find(text) for text in texts]


WORDS = st.lists(st.sampled_from("a b c".split()), max_size=12)


@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(WORDS, max_size=6), st.integers(3, 7))
def test_many_texts_at_once_are_searched_as_one_length_after_the_other_would(items, texts, ngram):
    with tempfile.TemporaryDirectory() as folder:
        rows = "".join(json.dumps({"text": " ".join(item)}) + "\n" for item in items)
        (Path(folder) / "set.jsonl").write_text(rows)
        index = read_evaluations([EvaluationConfig(f"{folder}/set.jsonl")], ngram, 100).index
    found = index.find_each([hash_words(text) for text in texts])
    assert found == one_length_after_the_other(items, texts, ngram)
    assert found == [index.find(hash_words(text)) for text in texts]
