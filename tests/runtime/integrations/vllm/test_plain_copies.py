"""Copies of weights: what torch's own would have made of them."""

from __future__ import annotations

import pytest
import torch

from coldframe.runtime.integrations.vllm.plain_copies import copy_all


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("threads", [1, 3])
def test_all_is_copied_whatever_its_form(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    large = _random(3000, 1001)  # more than a piece, and no whole number of them
    wide = _random(64, 128, dtype=torch.float32)
    pairs = [
        (torch.zeros_like(large), large),
        (torch.zeros(0, 7), _random(0, 7, dtype=torch.float32)),
        (torch.zeros(64, 100), wide[:, 28:]),  # cut by columns
        (torch.zeros(64, 256)[:, ::2], wide),  # into every other column
        (torch.zeros(64, 128, dtype=torch.bfloat16), wide),  # cast
        (torch.tensor(0.0), torch.tensor(3.0)),
    ]
    copy_all(pairs)
    for into, source in pairs:
        assert torch.equal(into, source.to(into.dtype))


def test_of_two_copies_to_one_place_the_later_one_stays():
    into = torch.zeros(3 << 20)
    first, second = torch.ones(3 << 20), torch.full((1 << 20,), 2.0)
    copy_all([(into, first), (into[1 << 20 : 2 << 20], second)])
    assert into[: 1 << 20].eq(1).all()
    assert into[1 << 20 : 2 << 20].eq(2).all()
    assert into[2 << 20 :].eq(1).all()
