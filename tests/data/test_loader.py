import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.data.config import DataConfig, Packing
from kogia.data.loader import Loader, LoaderState, epoch_order, validation_batches
from kogia.data.shards import Shard, ShardCounts


def make_shard(lengths: list[int], source_ends: tuple[int, ...] | None = None) -> Shard:
    """Sequence i consists of the token i, and every token but the first counts."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.repeat(np.arange(len(lengths)), lengths).astype("uint16")
    mask = np.ones(len(tokens), "uint8")
    mask[offsets[:-1]] = 0
    return Shard(tokens, mask, offsets[:-1], np.diff(offsets), source_ends or (len(lengths),), ShardCounts())


def visits(batch) -> list[int]:
    """The sequences of a batch, in order."""
    return batch.tokens.token_ids[batch.tokens.segments.cu_seqlens[:-1]].tolist()


corpora = st.lists(st.integers(1, 12), min_size=1, max_size=25)


@given(corpora, st.integers(12, 60), st.integers(0, 99), st.integers(0, 8), st.sampled_from(get_args(Packing)))
def test_a_loader_resumed_anywhere_gives_the_batches_of_one_that_never_stopped(lengths, budget, seed, stop, packing):
    shard = make_shard(lengths)
    whole = Loader(shard, weights=(1.0,), batch_tokens=budget, seed=seed, packing=packing)
    before = [whole.next_batch() for _ in range(stop)]
    state = LoaderState(whole.state.epoch, whole.state.cursor)
    resumed = Loader(shard, weights=(1.0,), batch_tokens=budget, seed=seed, packing=packing, state=state)
    for _ in range(4):
        expected, found = whole.next_batch(), resumed.next_batch()
        assert expected.tokens.token_ids.tolist() == found.tokens.token_ids.tolist()
        assert expected.loss_mask.tolist() == found.loss_mask.tolist()
    assert whole.state == resumed.state
    assert len(before) == stop


@given(corpora, st.integers(12, 60), st.integers(0, 99))
def test_every_epoch_visits_every_sequence_once_and_no_batch_could_take_one_more(lengths, budget, seed):
    loader = Loader(make_shard(lengths), weights=(1.0,), batch_tokens=budget, seed=seed)
    batches = [visits(loader.next_batch()) for _ in range(12)]
    flat = [i for batch in batches for i in batch]
    for start in range(0, len(flat) - len(lengths) + 1, len(lengths)):
        assert sorted(flat[start : start + len(lengths)]) == list(range(len(lengths)))
    for batch, after in itertools.pairwise(batches):
        used = sum(lengths[i] for i in batch)
        assert used <= budget < used + lengths[after[0]]


@given(corpora, st.integers(12, 60), st.integers(1, 4), st.sampled_from(get_args(Packing)))
def test_ranks_share_the_batches_of_one_and_a_run_may_go_on_with_another_number_of_them(
    lengths, budget, num_ranks, packing
):
    settings = {"weights": (1.0,), "batch_tokens": budget, "seed": 3, "packing": packing}
    alone = Loader(make_shard(lengths), **settings)
    ranks = [Loader(make_shard(lengths), **settings, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    for _ in range(3):
        assert [visits(rank.next_batch()) for rank in ranks] == [visits(alone.next_batch()) for _ in ranks]
    assert {rank.state for rank in ranks} == {alone.state}


@given(corpora, st.integers(12, 60))
def test_with_best_fit_an_epoch_is_whole_batches_that_hold_every_sequence_once(lengths, budget):
    loader = Loader(make_shard(lengths), weights=(1.0,), batch_tokens=budget, seed=0, packing="best_fit")
    for epoch in range(3):
        seen: list[int] = []
        while loader.state.epoch == epoch:
            batch = loader.next_batch()
            assert batch.tokens.num_tokens <= budget
            seen += visits(batch)
        assert sorted(seen) == list(range(len(lengths)))
        assert loader.state == LoaderState(epoch + 1, 0)


def test_the_order_differs_between_epochs_and_seeds_and_repeats_for_equal_ones():
    shard = make_shard([2] * 50)
    orders = [epoch_order(shard, (1.0,), *key).tolist() for key in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_weights_repeat_a_source_or_draw_a_fresh_part_of_it_each_epoch():
    shard = make_shard([2] * 20, (10, 20))
    first, second = (epoch_order(shard, (2.0, 0.5), 0, epoch) for epoch in (0, 1))
    for order in (first, second):
        counts = np.bincount(order, minlength=20)
        assert counts[:10].tolist() == [2] * 10
        assert sorted(counts[10:].tolist()) == [0] * 5 + [1] * 5
    assert set(first[first >= 10]) != set(second[second >= 10])
    loader = Loader(shard, weights=(2.0, 0.5), batch_tokens=10, seed=0)
    assert loader.tokens_per_epoch == 2 * 20 + 0.5 * 20


def test_first_tokens_never_count_and_the_batch_knows_how_many_do():
    batch = Loader(make_shard([3, 1, 4]), weights=(1.0,), batch_tokens=8, seed=0).next_batch()
    assert not batch.loss_mask[batch.tokens.segments.cu_seqlens[:-1]].any()
    assert batch.num_loss_tokens == int(batch.loss_mask.sum()) == 2 + 0 + 3


def test_validation_batches_show_each_sequence_once_and_stop_at_the_token_limit():
    shard = make_shard([5] * 9)
    batches = list(validation_batches(shard, batch_tokens=20, max_tokens=1000))
    assert sorted(i for batch in batches for i in visits(batch)) == list(range(9))
    assert len(list(validation_batches(shard, batch_tokens=20, max_tokens=21))) == 2


def test_an_epoch_without_sequences_is_an_error_and_no_endless_loop():
    with pytest.raises(ValueError, match=r"0 sequences.*weights \(0.1,\)"):
        Loader(make_shard([3]), weights=(0.1,), batch_tokens=8, seed=0).next_batch()


@given(corpora, st.integers(1, 6), st.integers(2, 12), st.integers(0, 99))
def test_joined_documents_are_rows_of_one_length_and_an_epoch_holds_every_token_once(lengths, rows, row, seed):
    shard, total = make_shard(lengths), sum(lengths)
    loader = Loader(shard, weights=(1.0,), batch_tokens=rows * row, seed=seed, packing="joined", row_tokens=row)
    batches = [loader.next_batch() for _ in range(2 + 2 * total // (rows * row))]
    for batch in batches:
        assert batch.tokens.segments.lengths.tolist() == [row] * rows
        assert batch.num_loss_tokens == int(batch.loss_mask.sum())
    flat = [i for batch in batches for i in batch.tokens.token_ids.tolist()]
    epoch = epoch_order(shard, (1.0,), seed, 0)
    assert flat[:total] == [i for i in epoch for _ in range(lengths[i])]
    assert sorted(flat[total : 2 * total]) == sorted(flat[:total])
    counted = [i for batch in batches for i in batch.loss_mask.tolist()][:total]
    begins = {0, *np.cumsum([lengths[i] for i in epoch])[:-1].tolist()}
    assert [place for place, counts in enumerate(counted) if not counts] == [
        place for place in range(total) if place in begins or place % row == 0
    ]


def test_rows_that_do_not_fill_a_batch_are_refused():
    with pytest.raises(
        ValueError, match=r"batch_tokens = 1000: must be a multiple of data\.max_seqlen = 300, the rows"
    ):
        DataConfig(batch_tokens=1000, max_seqlen=300, packing="joined")
    assert DataConfig(batch_tokens=1200, max_seqlen=300, packing="joined").piece > 10**9
    assert DataConfig(batch_tokens=1000, max_seqlen=300).piece == 300
