import pytest

from kogia.model.packed import pack


def test_sequences_are_laid_end_to_end_with_their_own_positions():
    batch = pack([[7, 8, 9], [4], [5, 6]])
    assert batch.token_ids.tolist() == [7, 8, 9, 4, 5, 6]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.segments.owner.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.segments.later_rows.tolist() == [1, 2, 5]
    assert (batch.segments.longest, batch.num_tokens) == (3, 6)


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_empty_sequences_are_refused(sequences):
    with pytest.raises(ValueError, match="every sequence needs at least one token"):
        pack(sequences)
