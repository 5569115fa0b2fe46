import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kogia.data.packing import fill, gather_rows
from kogia.model.packed import pack, pack_arrays


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 60), st.data())
def test_fill_takes_whole_sequences_until_the_next_one_does_not_fit(lengths, budget, data):
    cursor = data.draw(st.integers(0, len(lengths)))
    end, used = cursor, 0
    while end < len(lengths) and used + lengths[end] <= budget:
        used += lengths[end]
        end += 1
    assert fill(np.cumsum([0, *lengths]), cursor, budget) == end


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=8), min_size=1, max_size=8), st.randoms())
def test_gathered_and_packed_rows_equal_packing_the_sequences_one_by_one(sequences, random):
    flat = np.array([t for s in sequences for t in s])
    starts = np.cumsum([0, *map(len, sequences[:-1])])
    order = list(range(len(sequences)))
    random.shuffle(order)
    lengths = np.array([len(sequences[i]) for i in order])
    packed = pack_arrays(flat[gather_rows(starts[order], lengths)], lengths)
    expected = pack([sequences[i] for i in order])
    assert packed.token_ids.tolist() == expected.token_ids.tolist()
    assert packed.positions.tolist() == expected.positions.tolist()
    assert packed.segments.cu_seqlens.tolist() == expected.segments.cu_seqlens.tolist()
    assert packed.segments.lengths.tolist() == expected.segments.lengths.tolist()
