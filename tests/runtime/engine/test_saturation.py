"""Which batch is large enough, from times that are given and from real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from coldframe.runtime.engine import saturation
from coldframe.runtime.engine.saturation import SIZES, Saturation, SaturationProbe, saturating


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ({16: 1.0, 32: 1.0, 64: 1.0, 128: 2.0}, 64),  # as long for 64 as for 16
        ({16: 1.0, 32: 1.85, 64: 3.7, 128: 7.4}, 16),  # 8 % off are near enough ...
        ({16: 1.0, 32: 1.8, 64: 3.6, 128: 7.2}, 32),  # ... and 11 % are not
        ({16: 1.0, 32: 2.0, 64: 3.0, 128: 9.0}, 64),  # a large one may be worse again
        ({16: 5.0}, 16),
    ],
)
def test_the_smallest_that_is_near_the_best(seconds: dict[int, float], found: int) -> None:
    assert saturating(seconds) == found


def test_the_least_of_the_times_counts_and_the_first_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, used, ran = [object(), object(), object()], Counter[int](), Counter[int]()

    def seconds(layer: object, tokens: int) -> float:
        used[layers.index(layer)] += 1
        ran[tokens] += 1
        if ran[tokens] == 1:
            return 1e-9  # of no account, though it looks good
        disturbed = 10.0 if ran[tokens] % 3 else 1.0
        return disturbed * max(tokens, 64)

    monkeypatch.setattr(saturation, "_seconds", seconds)
    probe = SaturationProbe()
    found = None
    while found is None:
        found = probe.advance(layers)  # type: ignore[arg-type]
    assert found == Saturation(64, torch.get_num_threads())
    assert set(ran) == set(SIZES)
    assert len(set(ran.values())) == 1
    assert len(set(used.values())) == 1  # none of them stays in a cache


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_layers_of_every_kind_can_be_measured(pair: Callable[..., Any], family: str) -> None:
    probe = SaturationProbe()
    layers = pair(family).model.weights.layers
    while (found := probe.advance(layers)) is None:
        pass
    assert found.tokens in SIZES
    assert Saturation.from_wire(found.to_wire()) == found
