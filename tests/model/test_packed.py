import pytest

from kogia.model.packed import PackedTokens, pack
from kogia.ops.segments import segments_of


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


@pytest.mark.parametrize("lengths", [[3, 2], [3, 4], [6, 6]])
def test_sequences_of_other_lengths_than_there_are_tokens_are_refused_at_construction(lengths):
    batch = pack([[7, 8, 9], [4, 5, 6]])
    with pytest.raises(ValueError, match=f"6 token ids, 6 positions, sequences of {sum(lengths)} tokens in all"):
        PackedTokens(batch.token_ids, batch.positions, segments_of(lengths))
