"""aipo/distributed.py where ranks do not matter."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from aipo.distributed import buckets


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_buckets_keep_order_and_size(sizes: list[int], limit: int) -> None:
    items = list(enumerate(sizes))
    cut = list(buckets(iter(items), limit, lambda item: item[1]))
    assert [item for bucket in cut for item in bucket] == items
    assert all(len(bucket) == 1 or sum(n for _, n in bucket) <= limit for bucket in cut)
    for first, second in pairwise(cut):  # none that the next could have joined
        assert sum(n for _, n in first) + second[0][1] > limit
