from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kogia.data.packing import best_fit, fill, gather_rows
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


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50), st.integers(1, 8))
def test_best_fit_packs_every_sequence_once_within_the_budget_and_leaves_no_gap_that_one_would_fill(
    lengths, budget, window
):
    sizes = np.array(lengths, "int64")
    order, bounds = best_fit(sizes, budget, window)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    for a, b in pairwise(bounds.tolist()):
        gap = budget - sizes[order[a:b]].sum()
        later = np.sort(order[b:])
        assert b > a
        assert gap >= 0
        assert not len(later) or (sizes[later[:1]] > gap).all(), "what comes next in order would have fitted"


def test_best_fit_fills_batches_that_the_given_order_leaves_a_tenth_empty():
    sizes = np.random.default_rng(0).integers(10, 400, 4000)
    _, bounds = best_fit(sizes, 1000)
    order, _ = best_fit(sizes, 1000)
    assert sizes.sum() / (1000 * (len(bounds) - 1)) > 0.995
    cumulative, cursor, count = np.cumsum([0, *sizes]), 0, 0
    while cursor < len(sizes):
        cursor, count = fill(cumulative, cursor, 1000), count + 1
    assert sizes.sum() / (1000 * count) < 0.9
    assert abs(np.corrcoef(np.arange(4000), sizes[order])[0, 1]) < 0.05, "the order stays mixed"
