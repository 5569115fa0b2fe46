import pytest

from kogia.model.packed import pack


def test_sequences_are_laid_end_to_end_with_their_own_positions():
    batch = pack([[7, 8, 9], [4], [5, 6]])
    assert batch.token_ids.tolist() == [7, 8, 9, 4, 5, 6]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert (batch.max_seqlen, batch.num_tokens) == (3, 6)


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_empty_sequences_are_a_bug_of_the_caller(sequences):
    with pytest.raises(AssertionError, match="non-empty"):
        pack(sequences)
