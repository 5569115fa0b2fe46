import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.prepare.words import BANDS, PERMUTATIONS, band_keys, hash_words, runs, signature, split_words


def hashes(text: str) -> np.ndarray:
    return hash_words(split_words(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don’t, “stop”!", "don t stop"),
        (r"$\frac{1}{2}$ + x_1", "frac 1 2 x 1"),
        ("深い海 sea", "深 い 海 sea"),
        ("naïve\u00a0CAFÉ", "naïve café"),
        ("+-*/ \n", ""),
    ],
)
def test_words_are_letters_and_digits_in_lower_case_and_signs_of_scripts_without_spaces(text, words):
    assert split_words(text) == words.split()


@given(st.lists(st.sampled_from("a b c d".split()), max_size=12), st.integers(1, 5))
def test_runs_are_equal_where_their_words_are_and_nowhere_else(words, length):
    found = runs(hash_words(words), length).tolist()
    spelled = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    assert len(found) == len(spelled)
    assert len(set(found)) == len(set(spelled))
    assert dict(zip(spelled, found, strict=True)) == {s: found[spelled.index(s)] for s in spelled}


@pytest.mark.parametrize("changed", [0, 20, 60, 150])
def test_equal_entries_of_two_signatures_estimate_the_similarity_of_the_texts(changed):
    draw = np.random.default_rng(changed)
    differences = []
    for _ in range(12):
        one = draw.integers(0, 2**64, 600, "uint64")
        other = one.copy()
        other[draw.choice(600, changed, replace=False)] = draw.integers(0, 2**64, changed, "uint64")
        a, b = set(runs(one, 5).tolist()), set(runs(other, 5).tolist())
        estimate = (signature(one) == signature(other)).mean()
        differences.append(estimate - len(a & b) / len(a | b))
    assert abs(np.mean(differences)) < 0.035, "3 standard errors of 12 estimates over 128 orders are 0.038 at most"


def test_a_signature_does_not_depend_on_how_the_text_is_cut_into_blocks_or_repeated():
    words = hash_words([str(i) for i in range(400)])
    assert signature(np.concatenate([words, words])).tolist() != signature(words[:300]).tolist()
    one, twice = signature(words), signature(np.concatenate([words, words]))
    assert (one == twice).mean() > 0.95  # four shingles more, over the seam
    assert signature(words[:2]).shape == (PERMUTATIONS,)


def test_bands_meet_where_eight_numbers_of_two_signatures_are_equal():
    one = np.arange(PERMUTATIONS, dtype="uint32")
    other = one.copy()
    other[::9] += 1000
    keys = band_keys(np.stack([one, other, one]))
    assert keys.shape == (3, BANDS)
    equal = [(one[8 * i : 8 * i + 8] == other[8 * i : 8 * i + 8]).all() for i in range(BANDS)]
    assert (keys[0] == keys[1]).tolist() == equal
    assert (keys[0] == keys[2]).all()
