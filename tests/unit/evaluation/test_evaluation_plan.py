from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetscale.errors import ForgetScaleError
from forgetscale.evaluation.collective import (
    ProcessGroupCollective,
    SingleProcess,
    publish_on_rank_zero,
)
from forgetscale.evaluation.plan import gather_exactly_once, plan_batches


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_every_sample_once_and_equal_calls_on_all_ranks(
    lengths: list[int], batch_size: int, world_size: int
) -> None:
    plans = [
        plan_batches(lengths, batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(plan) for plan in plans}) == 1
    real = [batch for plan in plans for batch in plan if not batch.dummy]
    assert sorted(item for batch in real for item in batch.items) == list(range(len(lengths)))
    alone = plan_batches(lengths, batch_size)
    assert sorted(real, key=lambda batch: batch.number) == alone
    assert all(batch.items for plan in plans for batch in plan)


def test_gather_refuses_missing_repeated_and_strange_samples(run_ranks: Any) -> None:
    alone = SingleProcess()
    assert gather_exactly_once(alone, {2: "b", 1: "a"}, [1, 2]) == {1: "a", 2: "b"}
    with pytest.raises(ForgetScaleError, match="sample 2 is missing: 1 results for 2 samples"):
        gather_exactly_once(alone, {1: "a"}, [1, 2])
    with pytest.raises(ForgetScaleError, match="3 was not asked for"):
        gather_exactly_once(alone, {1: "a", 3: "c"}, [1])
    with pytest.raises(ForgetScaleError, match="came back twice"):
        run_ranks(2, lambda ranks: gather_exactly_once(ranks, {1: "a"}, [1]))


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        plan_batches([1], 0)
    with pytest.raises(ValueError, match="rank"):
        plan_batches([1], 1, rank=2, world_size=2)


def test_a_failed_write_fails_every_rank(run_ranks: Any) -> None:
    messages: list[str] = []

    def work(ranks: SingleProcess) -> None:
        def publish() -> None:
            raise OSError("disk full")

        try:
            publish_on_rank_zero(ranks, publish)
        except (OSError, ForgetScaleError) as error:
            messages.append(f"{ranks.rank} {error}")

    run_ranks(3, work)
    assert sorted(messages) == [
        "0 disk full",
        "1 rank 0 could not write the results: disk full",
        "2 rank 0 could not write the results: disk full",
    ]


def test_process_group_collective_gathers_over_the_group(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ranks = ProcessGroupCollective()
        assert (ranks.rank, ranks.world_size) == (0, 1)
        assert ranks.gather_objects({"a": 1}) == [{"a": 1}]
    finally:
        torch.distributed.destroy_process_group()
