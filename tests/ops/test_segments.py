import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kogia.ops.segments import Segments, segments_of


@given(st.lists(st.integers(1, 70), min_size=1, max_size=20))
def test_owners_offsets_and_grids_are_those_of_a_loop(lengths):
    segments = segments_of(lengths)
    assert segments.owner.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert segments.offsets.tolist() == [j for n in lengths for j in range(n)]
    starts = np.cumsum(lengths) - lengths
    assert segments.later_rows.tolist() == [s + j for s, n in zip(starts, lengths) for j in range(1, n)]
    x = torch.arange(sum(lengths)).double()[:, None] + 1
    seen = []
    for bucket in segments.buckets:
        grid = bucket.to_grid(x)
        for place, seq in enumerate(bucket.members.tolist()):
            rows = [float(starts[seq] + j + 1) for j in range(lengths[seq])]
            assert grid[place, :, 0].tolist() == rows + [0.0] * (bucket.width - len(rows))
            seen.append(seq)
        flat = bucket.from_grid(grid)
        assert flat.equal(x if bucket.rows is None else x[bucket.rows])
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_may_be_of_either_width_of_integer(dtype):
    lengths = np.array([3, 300, 1, 2])
    segments = Segments(torch.tensor([0, 3, 303, 304, 306], dtype=dtype), lengths)
    assert len(segments.buckets) > 1
    assert segments.owner.bincount().tolist() == [3, 300, 1, 2]


@pytest.mark.parametrize(
    ("cu_seqlens", "lengths", "message"),
    [
        (torch.tensor([0, 3]), [3, 1], "one entry more than there are lengths"),
        (torch.tensor([0.0, 3.0]), [3], "must be int32 or int64"),
        (torch.tensor([0, 3], dtype=torch.int16), [3], "must be int32 or int64"),
        (torch.tensor([0, 3, 3]), [3, 0], "every sequence needs at least one token"),
        (torch.tensor([0]), [], "every sequence needs at least one token"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused_by_name(cu_seqlens, lengths, message):
    if cu_seqlens.is_floating_point():
        with pytest.raises(Exception, match="cu_seqlens"):  # the run-time check of types is first here
            Segments(cu_seqlens, np.array(lengths, dtype=np.int64))
        return
    with pytest.raises(ValueError, match=message):
        Segments(cu_seqlens, np.array(lengths, dtype=np.int64))
