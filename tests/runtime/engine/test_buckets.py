"""The sizes that steps are padded to."""

from __future__ import annotations

import pytest

from coldframe.runtime.engine.buckets import Bucket, bucket_for, buckets, largest


@pytest.mark.parametrize(
    ("sequences", "blocks", "bucket"),
    [
        (1, 1, Bucket(1, 8)),
        (2, 8, Bucket(2, 8)),
        (3, 9, Bucket(4, 16)),
        (5, 16, Bucket(8, 16)),
        (8, 17, Bucket(8, 32)),
        (9, 1000, Bucket(16, 1024)),
        (17, 1024, Bucket(24, 1024)),
        (57, 1, Bucket(64, 8)),
        (64, 1, Bucket(64, 8)),
    ],
)
def test_a_step_goes_to_the_next_size(sequences: int, blocks: int, bucket: Bucket) -> None:
    assert bucket_for(sequences, blocks, 64) == bucket


def test_a_batch_may_be_of_any_size() -> None:
    assert bucket_for(3, 1, 3) == Bucket(3, 8)
    assert bucket_for(1, 1, 1) == Bucket(1, 8)
    assert bucket_for(17, 1, 20) == Bucket(20, 8)
    assert bucket_for(21, 1, 20) is None


@pytest.mark.parametrize(("most", "context"), [(1, 1), (5, 8), (20, 100), (64, 4096)])
def test_every_step_has_one_of_them(most: int, context: int) -> None:
    every = buckets(most, context, most * context)
    for sequences in range(1, most + 1):
        for blocks in {1, context // 3 + 1, context}:
            bucket = bucket_for(sequences, blocks, most)
            assert bucket in every
            assert (bucket.sequences, bucket.blocks) >= (sequences, blocks)
            assert bucket.blocks % 8 == 0  # what kernels read ahead
            assert bucket.numbers <= largest(most, context).numbers
    assert len(set(every)) == len(every)


def test_the_shortest_steps_come_first() -> None:
    every = buckets(64, 4096, 1 << 20)
    assert every[:4] == (Bucket(1, 8), Bucket(1, 16), Bucket(2, 8), Bucket(1, 32))
    sizes = [bucket.sequences * bucket.blocks for bucket in every]
    assert sizes == sorted(sizes)
    assert every[-1] == largest(64, 4096)


def test_no_step_needs_more_blocks_than_there_are() -> None:
    assert buckets(4, 64, 9) == (
        Bucket(1, 8),
        Bucket(1, 16),
        Bucket(2, 8),
        Bucket(4, 8),  # of three sequences with three blocks each
    )
    assert str(Bucket(4, 8)) == "4 x 8 blocks"
    assert Bucket(4, 8).numbers == 4 * (1 + 1 + 1 + 8)
