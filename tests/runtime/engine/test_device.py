"""Numbers on their way to a device and back, where the device is a CPU."""

from __future__ import annotations

import time

import torch

from coldframe.runtime.engine.device import fetch, settle, stopwatch, upload

CPU = torch.device("cpu")


def test_rows_of_any_lengths_go_together() -> None:
    rows = [[1, 2, 3], [], [1 << 62], [-4, 5]]
    found = upload(rows, CPU)
    assert [tensor.tolist() for tensor in found] == rows
    assert {tensor.dtype for tensor in found} == {torch.int64}
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    assert [tensor.tolist() for tensor in upload([[], []], "cpu")] == [[], []]


def test_what_is_here_is_fetched_without_a_copy() -> None:
    one, two = torch.ones(3), torch.zeros(2, 2)
    found = fetch(one, two)
    assert [tensor.data_ptr() for tensor in found] == [one.data_ptr(), two.data_ptr()]
    settle(CPU)


def test_the_time_is_that_of_the_work() -> None:
    elapsed = stopwatch(CPU)
    begun = time.process_time()
    while time.process_time() - begun < 0.01:
        pass
    assert elapsed() >= 0.01
