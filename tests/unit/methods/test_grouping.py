"""Items in groups of at most so many bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forgetscale.methods.grouping import groups_within


@given(sizes=st.lists(st.integers(0, 9), max_size=12), limit=st.integers(1, 15))
def test_groups_keep_order_and_the_limit_and_are_as_large_as_can_be(sizes: list[int], limit: int):
    items = list(enumerate(sizes))
    groups = list(groups_within(((item, item[1]) for item in items), limit))
    assert [item for group in groups for item in group] == items
    for group in groups:
        assert group and (sum(size for _, size in group) <= limit or len(group) == 1)
    for group, following in zip(groups, groups[1:], strict=False):
        assert sum(size for _, size in group) + following[0][1] > limit
